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


def transposed(adapter: Adapter, outs: Sequence[int]) -> Adapter:
    """The adapter whose delta of grad [n, out] is the gradient with respect to x.

    s Aᵀ (Bᵀ grad), summed over slices: one slice with A' = blockdiag(B)ᵀ, B' = Aᵀ.
    """
    starts = np.cumsum([0, *outs[:-1]])
    here = [
        (_f64(A), _f64(B), first)
        for A, B, first in zip(adapter.A, adapter.B, starts, strict=True)
        if A is not None
    ]
    if not here:
        return Adapter([None], [None], adapter.scaling)
    down = np.zeros((sum(len(A) for A, _, _ in here), sum(outs)))
    row = 0
    for A, B, first in here:
        down[row : row + len(A), first : first + len(B)] = B.T
        row += len(A)
    return Adapter([down], [np.concatenate([A for A, _, _ in here]).T], adapter.scaling)


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


def clipping(gA: list[Any], gB: list[Any], step: Step) -> float | None:
    """What clipping multiplies the gradients by, over what learns; None for NaN or Inf."""
    learning = [g for g in (*(gA if step.train_A else []), *gB) if g is not None]
    norm = np.sqrt(sum(float((g**2).sum()) for g in learning))
    if not np.isfinite(norm):
        return None
    return float(step.max_norm / norm) if step.max_norm and norm > step.max_norm else 1.0


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
    clip = clipping(gA, gB, step)
    if clip is None:
        return None

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


def round_float16(values: ArrayLike) -> NDArray[np.float32]:
    """To the nearest float16, ties to even, beyond 65504 to Inf, as float32."""
    with np.errstate(over="ignore"):
        return np.asarray(values, dtype=np.float32).astype(np.float16).astype(np.float32)


def round_float16_stochastic(
    values: ArrayLike, key: int, elements: ArrayLike
) -> NDArray[np.float32]:
    """As ``round_bfloat16_stochastic``, to float16; finite values stay within 65504.

    A normal number loses 13 bits, one that is subnormal in float16 more: as many
    random bits are added to them before they are cut off. Of what lies below
    2^-32 the random bits are 31, and bits under those are dropped.
    """
    bits = np.asarray(values, dtype=np.float32).view(np.uint32)
    size = bits & np.uint32(0x7FFFFFFF)
    exponent = (size >> np.uint32(23)).astype(np.int32)
    cut = np.clip(126 - exponent, 13, 31).astype(np.uint32)
    below = np.clip(95 - exponent, 0, 31).astype(np.uint32)
    tiny = ((size & np.uint32(0x7FFFFF)) | np.uint32(0x800000)) >> below
    kept = np.where(exponent < 113, tiny, size - np.uint32(112 << 23))  # the bias of float16
    random = counter_hash(elements, key) >> (np.uint32(32) - cut)
    half = np.minimum((kept + random) >> cut, np.uint32(0x7BFF))
    half |= (bits >> np.uint32(16)) & np.uint32(0x8000)
    rounded = half.astype(np.uint16).view(np.float16).astype(np.float32)
    return np.where(exponent == 255, bits.view(np.float32), rounded)


# ---- NF4 (QLoRA: Dettmers et al. 2023), in the float32 that fixes the format's bits --------

NF4_CODES = np.array(
    [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
     -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
     0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
     0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0], np.float32)  # fmt: skip
NF4_NESTED_BLOCK = 256


def _scaled(values: ArrayLike, blocksize: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """(values / absmax of their block, absmax [blocks]), flat; a block of zeros stays zeros."""
    flat = np.asarray(values, dtype=np.float32).ravel()
    padded = np.zeros((-(-flat.size // blocksize), blocksize), np.float32)
    padded.ravel()[: flat.size] = flat
    absmax = np.abs(padded).max(axis=1)
    scaled = padded / np.where(absmax == 0, np.float32(1), absmax)[:, None]
    return scaled.ravel()[: flat.size], absmax


def _nearest(values: NDArray[np.float32], codes: NDArray[np.float32]) -> NDArray[np.uint8]:
    """The index of the nearest code: the upper iff the value is greater than the midpoint."""
    midpoints = (codes[:-1] + codes[1:]) / np.float32(2)
    return np.searchsorted(midpoints, values, side="left").astype(np.uint8)


def nf4_quantize(W: ArrayLike, blocksize: int) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """(packed, absmax) of W, flat and row by row; blocks cross rows.

    packed: the even element in the high nibble; the nibble past an odd end holds
    the code of zero, and so does every nibble of a block of zeros.
    """
    scaled, absmax = _scaled(W, blocksize)
    codes = _nearest(np.append(scaled, np.zeros(scaled.size % 2, np.float32)), NF4_CODES)
    return codes[::2] << np.uint8(4) | codes[1::2], absmax


def nf4_dequantize(
    packed: ArrayLike, rows: int, cols: int, blocksize: int, absmax: ArrayLike
) -> NDArray[np.float32]:
    """code * absmax of its block in float32, [rows, cols]."""
    pairs = np.asarray(packed, dtype=np.uint8).ravel()
    codes = np.stack([pairs >> np.uint8(4), pairs & np.uint8(15)], axis=1).ravel()[: rows * cols]
    scale = np.repeat(np.asarray(absmax, dtype=np.float32), blocksize)[: rows * cols]
    out: NDArray[np.float32] = (NF4_CODES[codes] * scale).reshape(rows, cols)
    return out


def dynamic_map() -> NDArray[np.float32]:
    """bitsandbytes' signed dynamic 8-bit map, ascending (Dettmers 2016, arXiv:1511.04561):
    0, 1 and seven decades of 1 to 64 steps each way. Each bound is rounded once, as torch's
    fused ``linspace`` does, from the nearer end."""
    values = [0.0, 1.0]
    first, last = np.float32(0.1), np.float32(1.0)
    for i in range(7):
        step, at = float((last - first) / np.float32(2**i)), np.arange(2**i + 1)
        up, down = float(first) + step * at, 1.0 - step * (2**i - at)
        bounds = np.where(at < (2**i + 1) // 2, up, down).astype(np.float32)
        means = (bounds[:-1] + bounds[1:]) / np.float32(2) * np.float32(10.0 ** (i - 6))
        values += [*means.tolist(), *(-means).tolist()]
    return np.array(sorted(values), np.float32)


def double_quantize(
    absmax: ArrayLike,
) -> tuple[NDArray[np.uint8], NDArray[np.float32], float]:
    """(codes [blocks], nested_absmax, offset) of absmax: 8 bits of the dynamic map for
    absmax - offset, in blocks of 256; offset = mean(absmax). Where all are equal: code 0."""
    values = np.asarray(absmax, dtype=np.float32)
    offset = np.float32(values.mean(dtype=np.float64))
    scaled, nested = _scaled(values - offset, NF4_NESTED_BLOCK)
    codes = _nearest(scaled, dynamic_map())
    codes[np.repeat(nested == 0, NF4_NESTED_BLOCK)[: codes.size]] = 0
    return codes, nested, float(offset)


def double_dequantize(
    codes: ArrayLike, nested_absmax: ArrayLike, nested_map: ArrayLike, blocksize: int, offset: float
) -> NDArray[np.float32]:
    """map[code] * nested_absmax + offset, each rounded to float32: absmax [blocks]."""
    index = np.asarray(codes, dtype=np.uint8)
    nested = np.repeat(np.asarray(nested_absmax, dtype=np.float32), blocksize)[: index.size]
    product = np.asarray(nested_map, dtype=np.float32)[index] * nested
    absmax: NDArray[np.float32] = product + np.float32(offset)
    return absmax


def nf4_linear(x: ArrayLike, W: ArrayLike, bias: ArrayLike | None = None) -> F64:
    """x Wᵀ + bias, W [out, in] as ``nf4_dequantize`` gives it; the deltas are added to it."""
    y = _f64(x) @ _f64(W).T
    return y if bias is None else y + _f64(bias)
