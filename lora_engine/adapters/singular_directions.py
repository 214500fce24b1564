"""The direction of x that each adapter of a pool changes most, as its weights are now."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_engine.adapters.pool import AdapterPool

F64 = NDArray[np.float64]
_ROUNDING = 1e-14  # of a product that is zero, squared


class SingularDirections:
    """Right singular vectors of adapters' ΔW, kept while ``pool.version`` stays."""

    def __init__(self, pool: AdapterPool) -> None:
        self.pool = pool
        self._kept: dict[int, tuple[int, F64 | None]] = {}

    def of(self, slot: int) -> F64 | None:
        """[in], of length 1; None where ΔW is zero. Raises IndexError."""
        version = self.pool.version(slot)
        kept, direction = self._kept.get(slot, (-1, None))
        if kept != version:
            A, B, scaling = self.pool.get(slot)
            if not self.pool._sliced:
                A, B = [A], [B]
            direction = top_direction(A, B) if scaling else None
            self._kept[slot] = version, direction
        return direction


def top_direction(A: list[Any], B: list[Any]) -> F64 | None:
    """The right singular vector of the slices' B A, one above the other, with the largest
    singular value; None where all are zero. A [r, in], B [out, r], None for a missing slice.

    With Aᵀ = Q R of all slices it is Q u, u the first eigenvector of R diag(BᵀB) Rᵀ: no matrix
    is larger than A.
    """
    pairs = [(a, b) for a, b in zip(A, B, strict=True) if a is not None]
    largest = [max(float(np.abs(m).max()) for m in ms) for ms in zip(*pairs, strict=True)]
    if not pairs or not all(largest):
        return None
    rows = np.concatenate([a for a, _ in pairs]).astype(np.float64) / largest[0]
    Q, R = np.linalg.qr(rows.T)
    gram = np.zeros((len(rows), len(rows)))
    at = 0
    for _, b in pairs:
        b = b.astype(np.float64) / largest[1]
        end = at + b.shape[1]
        gram[at:end, at:end] = b.T @ b
        at = end
    values, vectors = np.linalg.eigh(R @ gram @ R.T)
    direction: F64 = Q @ vectors[:, -1]
    nothing = _ROUNDING * np.square(R).sum() * np.trace(gram)
    return direction if values[-1] > nothing else None
