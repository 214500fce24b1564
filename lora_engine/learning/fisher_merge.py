"""A task's Fisher information joins that of the tasks before it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from lora_engine.learning.moving_fisher import F32, F64, Pair


def merge_weights(old: Pair | None, new: Pair, gamma: float) -> Pair:
    """F* <- gamma F* + F, form "factor" (online EWC: Schwarz et al. 2018, section 3)."""
    if old is None:
        return new
    first, second = (
        [
            F if F is None else _stored(gamma * np.asarray(o, np.float64) + F)
            for o, F in zip(*pair, strict=True)
        ]
        for pair in zip(old, new, strict=True)
    )
    return first, second


def merge_factors(old: Pair | None, new: Pair, gamma: float) -> Pair:
    """Form "delta": u vᵀ with the marginals of gamma u* v*ᵀ + u vᵀ, slice by slice.

    Row sums as u, column sums over the total as v: of all matrices of rank one with these
    marginals the only one. Averaging u and v by themselves is no sum of the matrices.
    """
    if old is None:
        return new
    us: list[Any] = []
    vs: list[Any] = []
    for u_star, v_star, u, v in zip(*old, *new, strict=True):
        if u is None:
            us.append(None)
            vs.append(None)
            continue
        old_u, old_v, new_u, new_v = (np.asarray(f, np.float64) for f in (u_star, v_star, u, v))
        parts = [(gamma, old_u, old_v), (1.0, new_u, new_v)]
        rows = sum(scale * left * right.sum() for scale, left, right in parts)
        columns = sum(scale * left.sum() * right for scale, left, right in parts)
        total = rows.sum()
        us.append(_stored(rows))
        vs.append(_stored(columns / total if total > 0 else columns))
    return us, vs


def _stored(values: F64) -> F32:
    """As float32, and finite."""
    stored: F32 = np.minimum(values, np.finfo(np.float32).max).astype(np.float32)
    return stored
