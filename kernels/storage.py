"""The memory of a pool of adapters, as kernels see it."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Adapters(NamedTuple):
    """Slots of adapters on a device. Element i of a slot, in the order that stochastic
    rounding counts them: slice by slice A [r, in] row by row, then Bᵀ [r, out] row by row.

    arena: all weights, flat. offsets int64 [slots, slices]: where A of a slice begins, a
    multiple of 16. ranks int32 [slots, slices]: 0 for a missing slice, -1 in a slot that is
    not in use. scalings float32 [slots]. versions int64 [slots]. previous int64 [slots,
    slices]: offsets of what history keeps, -1 for nothing (no history: an empty tensor).
    firsts int32 [slices + 1]: where the columns of a slice begin in y. flag int32 [2]: set to
    (1, id) by a kernel that meets an id which is no slot in use; memory the host can read.
    max_rank: no slice has more.
    """

    arena: torch.Tensor
    offsets: torch.Tensor
    ranks: torch.Tensor
    scalings: torch.Tensor
    versions: torch.Tensor
    previous: torch.Tensor
    firsts: torch.Tensor
    flag: torch.Tensor
    in_features: int
    outs: tuple[int, ...]
    max_rank: int
