"""Sums of Fisher factors, a row a slot: over samples, of grad² and x² (lora_fisher_factors)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

F32 = NDArray[np.float32]
LARGEST = 1e30  # of a sample's sum of squares: float32 sums of very many of them are finite
_ROWS = 512  # that are added up at a time: a few long sums, between which others get the GIL


def can_be_summed(rows: F32) -> NDArray[np.bool_]:
    """[n]: whether a sample's squares fit the sums, as le_pool_adapt_slot_observed decides it of
    all its rows together."""
    squares: NDArray[np.float64] = np.einsum("ij,ij->i", rows, rows, dtype=np.float64)
    return squares <= LARGEST


class FactorSums:
    """u [slots, out] and v [slots, in], float32.

    They are replaced when they grow: who reads rows while others begin keeps the arrays.
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        self.u: F32 = np.zeros((1, out_features), np.float32)
        self.v: F32 = np.zeros((1, in_features), np.float32)

    def begin(self, slot: int, values: tuple[Any, Any] | None = None) -> None:
        """The slot's sums start at 0, or at u [out] and v [in]."""
        if slot >= len(self.u):
            self.u, self.v = (_grown(rows, max(2 * len(rows), slot + 1)) for rows in self)
        self.u[slot], self.v[slot] = values or (0.0, 0.0)

    def __iter__(self) -> Any:
        return iter((self.u, self.v))

    def over(self, slots: Sequence[int]) -> list[NDArray[np.float64]]:
        """The sums over slots: [out] and [in]."""
        totals = [np.zeros(rows.shape[1]) for rows in self]
        for at in range(0, len(slots), _ROWS):
            for rows, total in zip(self, totals, strict=True):
                total += np.take(rows, slots[at : at + _ROWS], axis=0).sum(0)
        return totals


def _grown(rows: F32, count: int) -> F32:
    larger = np.zeros((count, rows.shape[1]), np.float32)
    larger[: len(rows)] = rows
    return larger
