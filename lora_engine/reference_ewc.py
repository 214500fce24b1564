"""EWC in delta form, in plain float64 NumPy: the penalty on ΔW = B A, whatever its factors.

The Fisher information of ΔW is taken as u vᵀ (u [out], v [in]); of a slice with scaling s,
P = lambda s² sum_ij u_i v_j (B A - B* A*)_ij² = lambda s² tr([B,-B*]ᵀ U [B,-B*] [A;A*] V [A;A*]ᵀ),
the same for (B G, G⁻¹ A) as for (B, A).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from lora_engine.reference import F64, Adapter, Step, _f64, clipping


def delta_penalty(
    A: ArrayLike, B: ArrayLike, A_star: ArrayLike, B_star: ArrayLike,
    u: ArrayLike, v: ArrayLike, scaling: float, ewc_lambda: float,
) -> float:  # fmt: skip
    """P of one slice, from matrices of twice the rank.

    B A - B* A* = [B - B*, B*] [A; A - A*]: near the anchor this cancels less.
    """
    left: F64 = np.concatenate([_f64(B) - _f64(B_star), _f64(B_star)], axis=1)
    right: F64 = np.concatenate([_f64(A), _f64(A) - _f64(A_star)])
    inner = (left.T @ (_f64(u)[:, None] * left)) @ ((right * _f64(v)) @ right.T)
    return float(ewc_lambda * scaling**2 * np.trace(inner))


def _block(before: F64, star: F64, other: F64, other_star: F64, weights: F64, pull: F64) -> F64:
    """Column by column: (I + pull_j G) theta_j = before_j + pull_j Cᵀ star_j, all [r, width].

    G = other W otherᵀ and C = other_star W otherᵀ; before: theta after the step without EWC.
    """
    G, C = (other * weights) @ other.T, (other_star * weights) @ other.T
    systems = np.eye(len(before)) + pull[:, None, None] * G
    targets = before + pull * (C.T @ star)
    solved = np.linalg.solve(systems, targets.T[:, :, None])
    return _f64(solved[:, :, 0].T)


def delta_step(
    adapter: Adapter,
    gA: list[Any],
    gB: list[Any],
    step: Step,
    factors: tuple[list[Any], list[Any]],
    anchor: Adapter,
    stored: Callable[[list[Any]], list[Any]] = lambda B: B,
) -> Adapter | None:
    """One proximal step from given mean gradients; None where they hold NaN or Inf.

    factors: u [out] and v [in] of each slice. B first, with the old A; then A, with the new B
    as it is ``stored``. Gradients, clipping and decay are from before the step.
    """
    clip = clipping(gA, gB, step)
    if clip is None:
        return None
    c, lr_B = 2.0 * step.ewc_lambda, step.lr * step.lr_ratio
    A, B = list(adapter.A), list(adapter.B)

    def moved(theta: Any, g: Any, lr: float) -> F64:
        return _f64(theta) * (1 - lr * step.weight_decay) - lr * clip * _f64(g)

    here = [s for s, a in enumerate(A) if a is not None]
    for s in here:
        a, a_star, b_star = _f64(A[s]), _f64(anchor.A[s]), _f64(anchor.B[s]).T
        pull = lr_B * c * adapter.scaling**2 * _f64(factors[0][s])
        before = moved(B[s], gB[s], lr_B).T
        B[s] = _block(before, b_star, a, a_star, _f64(factors[1][s]), pull).T
    B = stored(B)
    for s in here if step.train_A else []:
        bt, a_star, b_star = _f64(B[s]).T, _f64(anchor.A[s]), _f64(anchor.B[s]).T
        pull = step.lr * c * adapter.scaling**2 * _f64(factors[1][s])
        before = moved(A[s], gA[s], step.lr)
        A[s] = _block(before, a_star, bt, b_star, _f64(factors[0][s]), pull)
    return Adapter(A, B, adapter.scaling)
