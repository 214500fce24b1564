"""How a step is taken, and what became of it."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl


@triton.jit
def record_of(p_records, p_epochs, records, slot):
    """The address of a slot's EWC record, made at its present epoch, or 0."""
    at = p_records + 2 * slot.to(tl.int64)
    address = tl.load(at, slot < records, 0)
    epoch = tl.load(at + 1, slot < records, 0)
    return tl.where(epoch == tl.load(p_epochs + slot), address, address * 0)


class Records(NamedTuple):
    """EWC records. table int64 [slots, 2]: the address of a slot's record, 0 for none, and
    the epoch it was made at. penalty: 2 lambda. delta: the form.

    A record of the factor form is float32, in the order of storage: F [elements], anchor
    [elements]. One of the delta form is float64 memory for the solver (``work_elements`` of
    ewc_delta.py), then float32: anchor [elements], u of every slice, v [in] for every slice.
    """

    table: torch.Tensor
    penalty: float
    delta: bool


class Step(NamedTuple):
    """lr_A, decay_A = 1 - lr_A decay and so on are numbers that float32 holds. max_norm: 0
    for none. reach: the larger lr.
    """

    lr_A: float
    lr_B: float
    decay_A: float
    decay_B: float
    max_norm: float
    train_A: bool
    seed: int
    records: Records | None

    @property
    def reach(self) -> float:
        return max(self.lr_A, self.lr_B)


class Outcome(NamedTuple):
    """Of each run, at its first position: what became of it int32, its gradient's norm float64."""

    outcomes: torch.Tensor
    norms: torch.Tensor
