"""The memory of a pool of adapters, as kernels see it."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Adapters(NamedTuple):
    """Slots of adapters on a device: of each slice A [r, in] row by row, then Bᵀ [r, out].

    Stochastic rounding counts the elements of a slot in that order, slice by slice, without
    the gaps between slices.

    arena: all weights, flat. offsets int64 [slots, slices]: where A of a slice begins, a
    multiple of 16. ranks int32 [slots, slices]: 0 for a missing slice, -1 in a slot that is
    not in use. scalings float32 [slots]. versions int64 [slots]: of the weights. epochs int64
    [slots]: of the adapter, which changes when another takes its place. previous int64 [slots,
    slices]: where the weights before an adapt are kept, in the same order (without history an
    empty tensor); kept int32 [slots]: 1 where they are. firsts int32 [slices + 1]: where the
    columns of a slice begin in y. flag int64 [1]: set to 2 id + 1 by a kernel that meets an id
    which is no slot in use; memory that the host can read.
    max_rank: no slice has more.
    """

    arena: torch.Tensor
    offsets: torch.Tensor
    ranks: torch.Tensor
    scalings: torch.Tensor
    versions: torch.Tensor
    epochs: torch.Tensor
    previous: torch.Tensor
    kept: torch.Tensor
    firsts: torch.Tensor
    flag: torch.Tensor
    in_features: int
    outs: tuple[int, ...]
    max_rank: int
