"""Merging low-rank deltas, in float64 NumPy: D = scaling B A, never formed.

What is served to session k is D_0 + D_k, the consolidated adapter's delta and the session's own.
So session k asks of a new consolidated adapter that D = D_0 + D_k, and a mean over sessions with
weights that sum to 1 is D_0 + sum_k w_k D_k: D_0 counts once, however many sessions there are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from lora_engine.reference import F64, _f64

BASE_PULL = 1e-9  # of the mean weight of an element of D: what nothing weighs keeps D_0


class Delta(NamedTuple):
    """scaling B A: A [r, in], B [out, r]."""

    A: Any
    B: Any
    scaling: float = 1.0

    def scaled(self) -> F64:
        """scaling B."""
        return self.scaling * _f64(self.B)


class Merged(NamedTuple):
    """A [r, in] = sqrt(S) Vᵀ and B [out, r] = U sqrt(S), each over sqrt(scaling).

    A direction without content has zeros in B and a unit row in A. objectives: after each
    block that ``ewc_merge`` solved.
    """

    A: F64
    B: F64
    objectives: tuple[float, ...] = ()


def _completed(rows: F64, rank: int) -> F64:
    """Orthonormal rows [k, n], k <= rank, and unit rows at right angles to them."""
    drawn = np.random.default_rng(0).standard_normal((rank - len(rows), rows.shape[1]))
    q, r = np.linalg.qr(np.concatenate([rows, drawn]).T)
    return _f64((q * np.where(np.diag(r) < 0, -1.0, 1.0)).T)


def truncate(left: F64, right: F64, rank: int) -> tuple[F64, F64, F64]:
    """The SVD of left @ right, [out, R] and [R, in], cut to the rank: U, S, Vᵀ.

    By QR of both factors: O((in + out) R²). Columns of U without content are zero.
    """
    ql, rl = np.linalg.qr(left)
    qr, rr = np.linalg.qr(right.T)
    U, S, Vt = np.linalg.svd(rl @ rr.T)
    least = 1e-12 * S[0] if len(S) else 0.0
    kept = min(rank, int((least < S).sum()))
    full_U, full_S = np.zeros((len(left), rank)), np.zeros(rank)
    full_U[:, :kept], full_S[:kept] = ql @ U[:, :kept], S[:kept]
    return full_U, full_S, _completed((qr @ Vt[:kept].T).T, rank)


def _balanced(U: F64, S: F64, Vt: F64, scaling: float) -> tuple[F64, F64]:
    root = np.sqrt(S / scaling)
    return np.where(root > 0, root, 1.0)[:, None] * Vt, U * root


def svd_merge(
    base: Delta, parts: Sequence[Delta], weights: F64, rank: int, scaling: float = 1.0
) -> Merged:
    """The nearest delta of the rank to D_0 + sum_k weights[k] D_k."""
    left = np.concatenate(
        [base.scaled(), *(w * p.scaled() for w, p in zip(weights, parts, strict=True))], axis=1
    )
    right = np.concatenate([_f64(base.A), *(_f64(p.A) for p in parts)])
    return Merged(*_balanced(*truncate(left, right, rank), scaling))


class _Target(NamedTuple):
    """What one adapter asks for, left @ right, and how each element weighs: u vᵀ."""

    left: F64
    right: F64
    u: F64
    v: F64


def _targets(base: Delta, parts: Sequence[Delta], weights: F64, u: F64, v: F64) -> list[_Target]:
    """Of the base, of the parts, and the small constant pull toward the base."""
    b0, a0 = base.scaled(), _f64(base.A)
    targets = [_Target(b0, a0, weights[0] * u[0], v[0])]
    for k, part in enumerate(parts, 1):
        left = np.concatenate([b0, part.scaled()], axis=1)
        right = np.concatenate([a0, _f64(part.A)])
        targets.append(_Target(left, right, weights[k] * u[k], v[k]))
    mean = sum(t.u.mean() * t.v.mean() for t in targets)
    pull = BASE_PULL * mean if mean > 0 else 1.0
    constant = _Target(b0, a0, np.full(len(b0), pull), np.ones(a0.shape[1]))
    return [*targets, constant]


def _objective(targets: list[_Target], A: F64, B: F64) -> float:
    total = 0.0
    for left, right, u, v in targets:
        gap_left = np.concatenate([B, -left], axis=1)
        gap_right = np.concatenate([A, right])
        inner = (gap_left.T * u) @ gap_left, (gap_right * v) @ gap_right.T
        total += float((inner[0] * inner[1]).sum())
    return total


def _solve(targets: list[tuple[F64, F64, F64, F64]], A: F64) -> tuple[F64, float]:
    """The B that minimises sum ||U^½ (B A - left right) V^½||², row by row, and B's own part.

    b_i (sum u[i] A V Aᵀ) = sum u[i] left[i] right V Aᵀ. For A: the targets transposed.
    """
    rows, r = len(targets[0][0]), len(A)
    systems, sides = np.zeros((rows, r, r)), np.zeros((rows, r))
    for left, right, u, v in targets:
        AV = A * v
        systems += u[:, None, None] * (AV @ A.T)
        sides += u[:, None] * (left @ (right @ AV.T))
    B = (np.linalg.pinv(systems, hermitian=True) @ sides[:, :, None])[:, :, 0]
    return _f64(B), float((B * sides).sum())


def ewc_objective(
    base: Delta, parts: Sequence[Delta], weights: F64, u: F64, v: F64, delta: Delta
) -> float:
    """What ``ewc_merge`` minimises, of a delta."""
    targets = _targets(base, parts, _f64(weights), _f64(u), _f64(v))
    return _objective(targets, _f64(delta.A), delta.scaled())


def ewc_merge(
    base: Delta,
    parts: Sequence[Delta],
    weights: F64,
    u: F64,
    v: F64,
    rank: int,
    scaling: float = 1.0,
    max_sweeps: int = 50,
    tolerance: float = 1e-6,
) -> Merged:
    """The D of the rank that minimises the Fisher-weighted distance from what each one asks for:

    sum_k weights[k] sum_ij u[k, i] v[k, j] (D - target_k)_ij², target_0 = D_0 of the base itself
    and target_k = D_0 + D_k of the parts; weights [K + 1], u [K + 1, out], v [K + 1, in]. (The
    posterior mode of tasks with delta-form Fisher information: Kirkpatrick et al. 2017.) Where
    nothing weighs, a pull of BASE_PULL keeps D_0.

    From the SVD of D_0 + sum_k weights[k] D_k (over the parts' weights' sum), B and A are solved
    for in turn, each exactly, until both gain no more than tolerance of D's own part.
    """
    weights = _f64(weights)
    targets = _targets(base, parts, weights, _f64(u), _f64(v))
    flipped = [_Target(t.right.T, t.left.T, t.v, t.u) for t in targets]
    total = weights[1:].sum()
    start = svd_merge(base, parts, weights[1:] / (total if total > 0 else 1.0), rank)
    A = start.A / np.linalg.norm(start.A, axis=1, keepdims=True)
    objectives = []
    for _ in range(max_sweeps):
        B, _size = _solve(list(targets), A)
        objectives.append(_objective(targets, A, B))
        transposed, size = _solve(list(flipped), B.T)
        A = transposed.T
        objectives.append(_objective(targets, A, B))
        before = objectives[-3] if len(objectives) > 2 else objectives[0]
        if before - objectives[-1] <= tolerance * size:
            break
    A, B = _balanced(*truncate(B, A, rank), scaling)
    return Merged(A, B, tuple(objectives))
