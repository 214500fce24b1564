"""Every op in plain float64 NumPy: the truth the tests hold the backends to.

Shapes: x [n, in], A [r, in], B [out, r], grad = dL/dy [n, out]. An adapter is
``(A, B, scaling)``; of a pool of several slices, A and B are lists (None for a
missing slice). Nothing here is fast, and nothing here is clever.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

F64 = NDArray[np.float64]


class Adapter(NamedTuple):
    """One adapter: per slice A [r, in] and B [out, r] (None: missing), one scaling."""

    A: list[Any]
    B: list[Any]
    scaling: float


def _f64(a: ArrayLike) -> F64:
    return np.asarray(a, dtype=np.float64)


def lora_delta(x: ArrayLike, A: ArrayLike, B: ArrayLike, scaling: float) -> F64:
    """scaling (x Aᵀ) Bᵀ, [n, out] (LoRA: Hu et al. 2021, eq. 3)."""
    return scaling * (_f64(x) @ _f64(A).T) @ _f64(B).T


def _adapter_delta(x: F64, adapter: Adapter, outs: Sequence[int]) -> F64:
    parts = [
        np.zeros((len(x), out)) if A is None else lora_delta(x, A, B, adapter.scaling)
        for A, B, out in zip(adapter.A, adapter.B, outs, strict=True)
    ]
    return np.concatenate(parts, axis=1)


def _pairs(ids: ArrayLike, weights: ArrayLike | None) -> tuple[NDArray[np.int64], F64]:
    """ids and weights as [n, k]."""
    slots = np.asarray(ids, dtype=np.int64)
    slots = slots[:, None] if slots.ndim == 1 else slots
    w = np.ones(slots.shape) if weights is None else _f64(weights).reshape(slots.shape)
    return slots, w


def batched_lora_delta(
    x: ArrayLike,
    adapters: dict[int, Adapter],
    outs: Sequence[int],
    ids: ArrayLike,
    weights: ArrayLike | None = None,
) -> F64:
    """Row i: sum over j of w_ij s_j B_j (A_j x_i), slices concatenated; -1 adds nothing."""
    rows = _f64(x)
    y = np.zeros((len(rows), sum(outs)))
    slots, w = _pairs(ids, weights)
    for i, j in np.argwhere(slots >= 0):
        y[i] += w[i, j] * _adapter_delta(rows[i : i + 1], adapters[int(slots[i, j])], outs)[0]
    return y


def adapter_gradients(
    x: ArrayLike, grad: ArrayLike, A: ArrayLike, B: ArrayLike, scaling: ArrayLike
) -> tuple[F64, F64]:
    """(gA, gB) of L summed over rows: gA = sum s (Bᵀ grad) xᵀ, gB = sum s grad (A x)ᵀ.

    scaling: a number, or one a row (weight times scaling).
    """
    rows, up, a, b = _f64(x), _f64(grad), _f64(A), _f64(B)
    s = np.broadcast_to(_f64(scaling), (len(rows),))[:, None]
    return (s * (up @ b)).T @ rows, up.T @ (s * (rows @ a.T))


class Step(NamedTuple):
    """The parameters of a step, as in ``batched_adapt``."""

    lr: float
    max_norm: float | None = None
    lr_ratio: float = 1.0
    train_A: bool = True
    weight_decay: float = 0.0
    ewc_lambda: float = 0.0


def slot_gradients(
    x: ArrayLike,
    grad: ArrayLike,
    adapter: Adapter,
    outs: Sequence[int],
    slot: int,
    ids: ArrayLike,
    weights: ArrayLike | None = None,
) -> tuple[list[Any], list[Any]]:
    """The mean gradient of one slot over the rows that name it, per slice."""
    rows, up = _f64(x), _f64(grad)
    slots, w = _pairs(ids, weights)
    named = (slots == slot).any(axis=1)
    row_weight = np.where(slots == slot, w, 0.0).sum(axis=1)[named]
    gA: list[Any] = []
    gB: list[Any] = []
    first = 0
    for A, B, out in zip(adapter.A, adapter.B, outs, strict=True):
        if A is None:
            gA.append(None)
            gB.append(None)
        else:
            part = up[named][:, first : first + out]
            a, b = adapter_gradients(rows[named], part, A, B, row_weight * adapter.scaling)
            gA.append(a / named.sum())
            gB.append(b / named.sum())
        first += out
    return gA, gB


def step_adapter(
    adapter: Adapter,
    gA: list[Any],
    gB: list[Any],
    step: Step,
    fisher: tuple[list[Any], list[Any]] | None = None,
    anchor: Adapter | None = None,
) -> Adapter | None:
    """One step from given mean gradients; None where they hold NaN or Inf.

    Clipping over gA and gB together, LoRA+ (Hayou et al. 2024: lr_B = lr_ratio lr),
    LoRA-FA (Zhang et al. 2023: train_A False), decoupled decay, then the
    proximal EWC step where fisher and anchor are given.
    """
    learning = [g for g in (*(gA if step.train_A else []), *gB) if g is not None]
    norm = np.sqrt(sum(float((g**2).sum()) for g in learning))
    if not np.isfinite(norm):
        return None
    clip = step.max_norm / norm if step.max_norm and norm > step.max_norm else 1.0

    def moved(theta: Any, g: Any, lr: float, F: Any, theta_star: Any) -> Any:
        if theta is None:
            return None
        theta = _f64(theta)
        g = clip * g + step.weight_decay * theta
        if F is None:
            return theta - lr * g
        return ewc_step(theta, g, F, theta_star, lr, step.ewc_lambda)

    none = [None] * len(gA)
    F_A, F_B = fisher or (none, none)
    at_A, at_B = (anchor.A, anchor.B) if anchor else (none, none)
    A = adapter.A
    if step.train_A:
        A = [moved(*args) for args in zip(A, gA, [step.lr] * len(A), F_A, at_A, strict=True)]
    lr_B = [step.lr * step.lr_ratio] * len(A)
    B = [moved(*args) for args in zip(adapter.B, gB, lr_B, F_B, at_B, strict=True)]
    return Adapter(A, B, adapter.scaling)


def batched_adapt(
    x: ArrayLike,
    grad: ArrayLike,
    adapters: dict[int, Adapter],
    outs: Sequence[int],
    ids: ArrayLike,
    step: Step,
    weights: ArrayLike | None = None,
) -> tuple[dict[int, Adapter], NDArray[np.bool_]]:
    """(adapters after one step each, which rows were learned from)."""
    slots, _ = _pairs(ids, weights)
    after = dict(adapters)
    applied = np.zeros(slots.shape, dtype=bool)
    for slot in sorted({int(s) for s in slots.ravel() if s >= 0}):
        gA, gB = slot_gradients(x, grad, adapters[slot], outs, slot, ids, weights)
        moved = step_adapter(adapters[slot], gA, gB, step)
        if moved is not None:
            after[slot] = moved
            applied |= slots == slot
    return after, ((slots < 0) | applied).all(axis=1) & (slots >= 0).any(axis=1)


def ewc_step(
    theta: ArrayLike,
    grad: ArrayLike,
    fisher: ArrayLike,
    anchor: ArrayLike,
    lr: float,
    ewc_lambda: float,
) -> F64:
    """The proximal step for P = lambda sum F (theta - anchor)², c = 2 lambda:

    theta <- (theta - lr g + lr c F anchor) / (1 + lr c F)
    (EWC: Kirkpatrick et al. 2017, eq. 3; the proximal form never diverges).
    """
    pull = lr * 2.0 * ewc_lambda * _f64(fisher)
    return (_f64(theta) - lr * _f64(grad) + pull * _f64(anchor)) / (1.0 + pull)


def fisher_accumulate(F: ArrayLike, g: ArrayLike, gamma: float, scale: float) -> F64:
    """gamma F + scale g∘g (the running Fisher information of online EWC: Schwarz et al. 2018)."""
    return gamma * _f64(F) + scale * _f64(g) ** 2


def lora_fisher(
    x: ArrayLike,
    grad: ArrayLike,
    A: ArrayLike,
    B: ArrayLike,
    scaling: float,
    segments: ArrayLike | None = None,
) -> tuple[F64, F64]:
    """(F_A, F_B): the sums over samples of squared per-sample gradients, one by one.

    The diagonal of the empirical Fisher information, times the number of samples
    (EWC: Kirkpatrick et al. 2017). Sample i is rows segments[i] to segments[i+1];
    without segments, row i.
    """
    rows, up = _f64(x), _f64(grad)
    ends = np.arange(len(rows) + 1) if segments is None else np.asarray(segments)
    F_A, F_B = np.zeros_like(_f64(A)), np.zeros_like(_f64(B))
    for first, last in pairwise(ends):
        gA, gB = adapter_gradients(rows[first:last], up[first:last], A, B, scaling)
        F_A += gA**2
        F_B += gB**2
    return F_A, F_B


def lora_fisher_factors(x: ArrayLike, grad: ArrayLike) -> tuple[F64, F64]:
    """(u [out], v [in]): sum grad², sum x² over rows.

    u vᵀ stands for the Fisher information of ΔW, as in the Kronecker factors of
    K-FAC (Martens and Grosse 2015) with diagonals kept.
    """
    return (_f64(grad) ** 2).sum(axis=0), (_f64(x) ** 2).sum(axis=0)


# ---- 16-bit storage ---------------------------------------------------------

_U64 = (1 << 64) - 1


def _splitmix64(z: int) -> int:
    z = (z + 0x9E3779B97F4A7C15) & _U64
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _U64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _U64
    return z ^ (z >> 31)


def rounding_key(seed: int, slot: int, version: int) -> int:
    """The 64-bit key of the counter generator (SplitMix64: Steele et al. 2014)."""
    return _splitmix64(_splitmix64(_splitmix64(seed) ^ slot) ^ version)


def counter_hash(elements: ArrayLike, key: int) -> NDArray[np.uint32]:
    """32 random bits for each element index: a keyed bijective mix."""
    lo, hi = np.uint32(key & 0xFFFFFFFF), np.uint32(key >> 32)
    z = np.asarray(elements, dtype=np.uint32) ^ lo
    with np.errstate(over="ignore"):
        z = ((z ^ (z >> np.uint32(16))) * np.uint32(0x7FEB352D)) ^ hi
        z = (z ^ (z >> np.uint32(15))) * np.uint32(0x846CA68B)
    return z ^ (z >> np.uint32(16))


def round_bfloat16(values: ArrayLike) -> NDArray[np.float32]:
    """To the nearest bfloat16, ties to even, as float32."""
    bits = np.asarray(values, dtype=np.float32).view(np.uint32)
    rounded = bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    nan = (bits & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
    out: NDArray[np.uint32] = np.where(nan, bits | np.uint32(0x400000), rounded)
    return (out & np.uint32(0xFFFF0000)).view(np.float32)


def round_bfloat16_stochastic(
    values: ArrayLike, key: int, elements: ArrayLike
) -> NDArray[np.float32]:
    """To one of the two nearest bfloat16, as float32: up with the probability of the
    part cut off, decided by ``counter_hash``. elements: index of each value in its
    slot (for each slice A row by row, then the transpose of B row by row)."""
    bits = np.asarray(values, dtype=np.float32).view(np.uint32)
    random = counter_hash(elements, key) >> np.uint32(16)
    finite = (bits & np.uint32(0x7F800000)) != np.uint32(0x7F800000)
    out: NDArray[np.uint32] = np.where(finite, bits + random, bits) & np.uint32(0xFFFF0000)
    return out.view(np.float32)
