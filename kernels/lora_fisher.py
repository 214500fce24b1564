"""Op 6, lora_fisher: F_A [r, in] and F_B [out, r], sums of squared per-sample gradients.

With h = s A x and g = s Bᵀ grad of each row, a row's gradients are g xᵀ and grad hᵀ.
``_project`` leaves h and g; ``_row_sums`` (one row a sample) or ``_sample_sums`` (runs of
rows) leaves float64 partial sums of the squares, [splits, r, in + out]; ``_finish`` adds
the splits in order. No atomics, no zeroing: the splits depend on sizes only, so the bits
are the same on every run. Rows come in pieces that stay in the L2 from the first launch
to the second; the partial sums run through all of them. ``lora_fisher_factors`` is
``_square_sums`` and ``_finish``.

Squares and sums of 16 samples are float32, all beyond that is float64. The products of
squares are float32 in full, so matrix units do not take them on NVIDIA.

Roofline on an H200, in = out = 4096: bytes = x and grad once, n (in + out) of their size,
and partial sums of up to 8 splits, 8 r (in + out) each, written and read once a piece of
32 MB of x and grad;
operations 4 n R (in + out) with R = r rounded up to 16, at 60 TFLOP/s of float32 (half of
them on matrix units where x and A share a 16-bit dtype).
256 samples, r = 2, float32: 8.4 MB and 1.0 MB of sums, 2.2 us; 134 MFLOP, 2.2 us; bound by
three launches and their latency: expected 15 us. 4096 samples, r = 16, bfloat16: 67 MB and
34 MB of sums, 23 us; 2.1 GFLOP, half of them float32, 18 us: expected 60 us. 2^20 samples: 17.2
GB and, in 512 pieces, 8.6 GB of sums, 6.0 ms if none of them stay in the L2; 550 GFLOP, half of
them float32, 4.6 ms: one launch is bound by bytes, the next by arithmetic, expected 12 ms.
"""

from __future__ import annotations

from itertools import product
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .launch import FLOATS, IN_INTERPRETER, Config, Device, Variant, Variants, cdiv, launch, scratch
from .lora_fisher_factors import (
    BLOCK_C,
    BLOCK_R,
    PROGRAMS,
    SPLIT_ROWS,
    column_tiles,
    splits_of,
    write,
)


@triton.jit
def _project_side(
    p_v, p_factor, p_to, n, split, span, features, rank, stride_vn, stride_vk, stride_fr, stride_fk,
    BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    i_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    i_r = tl.program_id(2) * BLOCK_R + tl.arange(0, BLOCK_R)
    m_m, m_r = i_m < n, i_r < rank
    last = tl.minimum((split + 1) * span, features)
    rows = p_v + i_m.to(tl.int64)[:, None] * stride_vn
    b_h = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for k in range(split * span, last, BLOCK_K):
        i_k = k + tl.arange(0, BLOCK_K)
        m_k = i_k < last
        b_v = tl.load(
            rows + i_k.to(tl.int64)[None, :] * stride_vk, m_m[:, None] & m_k[None, :], 0.0
        )
        of = i_r.to(tl.int64)[None, :] * stride_fr + i_k.to(tl.int64)[:, None] * stride_fk
        b_f = tl.load(p_factor + of, m_k[:, None] & m_r[None, :], 0.0)  # [BLOCK_K, BLOCK_R]
        if EXACT and not IN_INTERPRETER:  # whose bfloat16 product is wrong
            b_h = tl.dot(b_v, b_f, b_h)
        else:
            b_v, b_f = b_v.to(tl.float32), b_f.to(tl.float32)
            b_h = tl.dot(b_v, b_f, b_h, input_precision="ieee")
    to = (split * rank + i_r).to(tl.int64) * n
    tl.store(p_to + to[None, :] + i_m[:, None], b_h, m_m[:, None] & m_r[None, :])


@triton.jit(do_not_specialize=["n", "splits_in", "span_in", "span_out"])
def _project(
    p_x, p_grad, p_a, p_b, p_h, n, splits_in, span_in, span_out, in_features, out_features, rank,
    stride_xn, stride_xk, stride_gn, stride_gk, stride_ar, stride_ak, stride_br, stride_bk,
    BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Partial A x [splits_in, rank, n], then partial Bᵀ grad [splits_out, rank, n];
    grid (rows / BLOCK_M, splits_in + splits_out, rank / BLOCK_R)."""
    split = tl.program_id(1)
    if split < splits_in:
        _project_side(
            p_x, p_a, p_h, n, split, span_in, in_features, rank, stride_xn, stride_xk, stride_ar,
            stride_ak, BLOCK_M, BLOCK_R, BLOCK_K, EXACT,
        )  # fmt: skip
    else:
        p_g = p_h + splits_in.to(tl.int64) * rank * n
        _project_side(
            p_grad, p_b, p_g, n, split - splits_in, span_out, out_features, rank, stride_gn,
            stride_gk, stride_br, stride_bk, BLOCK_M, BLOCK_R, BLOCK_K, EXACT,
        )  # fmt: skip


@triton.jit
def _row_sums_side(
    p_v, p_h, p_sums, n, scaling, splits_h, span, accumulate, tile, width, features, rank,
    stride_vn, stride_vk, BLOCK_R: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    i_r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    i_c = (tile * BLOCK_C + tl.arange(0, BLOCK_C)).to(tl.int64)
    m_r, m_c = i_r < rank, i_c < width
    split = tl.program_id(2)
    to = p_sums + (split * rank + i_r).to(tl.int64)[:, None] * features + i_c[None, :]
    m = m_r[:, None] & m_c[None, :]
    acc = tl.zeros((BLOCK_R, BLOCK_C), tl.float64)
    if accumulate:
        acc = tl.load(to, m, 0.0)
    first = split * span
    last = tl.minimum(first + span, n)
    for row in range(first, last, BLOCK_S):
        i_s = row + tl.arange(0, BLOCK_S)
        m_s = i_s < last
        b_h = tl.zeros((BLOCK_R, BLOCK_S), tl.float32)
        for k in range(splits_h):
            of = (k * rank + i_r).to(tl.int64) * n
            b_h += tl.load(p_h + of[:, None] + i_s[None, :], m_r[:, None] & m_s[None, :], 0.0)
        b_h *= scaling
        of = i_s.to(tl.int64)[:, None] * stride_vn + i_c.to(tl.int64)[None, :] * stride_vk
        b_v = tl.load(p_v + of, m_s[:, None] & m_c[None, :], 0.0).to(tl.float32)
        acc += tl.dot(b_h * b_h, b_v * b_v, input_precision="ieee").to(tl.float64)
    tl.store(to, acc, m)


@triton.jit(do_not_specialize=["n", "scaling", "splits_in", "splits_out", "span", "accumulate"])
def _row_sums(
    p_x, p_grad, p_h, p_sums, n, scaling, splits_in, splits_out, span, accumulate,
    in_features, out_features, rank, stride_xn, stride_xk, stride_gn, stride_gk,
    BLOCK_R: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Partial sums [splits, rank, in + out] of (g∘g)ᵀ(x∘x) and (h∘h)ᵀ(grad∘grad) over spans
    of rows, added to those of earlier rows if accumulate; grid (rank / BLOCK_R, column
    tiles, splits)."""
    tile = tl.program_id(1)
    tiles_in = tl.cdiv(in_features, BLOCK_C)
    features = in_features + out_features
    p_g = p_h + splits_in.to(tl.int64) * rank * n
    if tile < tiles_in:
        _row_sums_side(
            p_x, p_g, p_sums, n, scaling, splits_out, span, accumulate, tile, in_features,
            features, rank, stride_xn, stride_xk, BLOCK_R, BLOCK_S, BLOCK_C,
        )  # fmt: skip
    else:
        _row_sums_side(
            p_grad, p_h, p_sums + in_features, n, scaling, splits_in, span, accumulate,
            tile - tiles_in, out_features, features, rank, stride_gn, stride_gk,
            BLOCK_R, BLOCK_S, BLOCK_C,
        )  # fmt: skip


@triton.jit
def _sample_sums_side(
    p_v, p_h, p_segments, p_sums, n, scaling, splits_h, samples, span, tile, width, features, rank,
    stride_vn, stride_vk, stride_s,
    BLOCK_R: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    i_r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    i_c = (tile * BLOCK_C + tl.arange(0, BLOCK_C)).to(tl.int64)
    m_r, m_c = i_r < rank, i_c < width
    split = tl.program_id(2)
    acc = tl.zeros((BLOCK_R, BLOCK_C), tl.float64)
    for i in range(split * span, tl.minimum((split + 1) * span, samples)):
        # Offsets that the host could not check are kept within the rows there are.
        begin = tl.maximum(tl.load(p_segments + tl.cast(i, tl.int64) * stride_s), 0)
        end = tl.minimum(tl.load(p_segments + tl.cast(i + 1, tl.int64) * stride_s), n)
        b_sample = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
        for row in range(begin, end, BLOCK_S):
            i_s = row + tl.arange(0, BLOCK_S)
            m_s = i_s < end
            b_h = tl.zeros((BLOCK_R, BLOCK_S), tl.float32)
            for k in range(splits_h):
                of = (k * rank + i_r).to(tl.int64) * n
                b_h += tl.load(p_h + of[:, None] + i_s[None, :], m_r[:, None] & m_s[None, :], 0.0)
            b_h *= scaling
            of = i_s.to(tl.int64)[:, None] * stride_vn + i_c.to(tl.int64)[None, :] * stride_vk
            b_v = tl.load(p_v + of, m_s[:, None] & m_c[None, :], 0.0).to(tl.float32)
            b_sample = tl.dot(b_h, b_v, b_sample, input_precision="ieee")
        acc += (b_sample * b_sample).to(tl.float64)
    to = p_sums + (split * rank + i_r).to(tl.int64)[:, None] * features + i_c[None, :]
    tl.store(to, acc, m_r[:, None] & m_c[None, :])


@triton.jit(do_not_specialize=["n", "scaling", "splits_in", "splits_out", "samples", "span"])
def _sample_sums(
    p_x, p_grad, p_h, p_segments, p_sums, n, scaling, splits_in, splits_out, samples, span,
    in_features, out_features, rank, stride_xn, stride_xk, stride_gn, stride_gk, stride_s,
    BLOCK_R: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """As ``_row_sums`` over spans of samples: each one's gradient is summed, then squared."""
    tile = tl.program_id(1)
    tiles_in = tl.cdiv(in_features, BLOCK_C)
    features = in_features + out_features
    p_g = p_h + splits_in.to(tl.int64) * rank * n
    if tile < tiles_in:
        _sample_sums_side(
            p_x, p_g, p_segments, p_sums, n, scaling, splits_out, samples, span, tile, in_features,
            features, rank, stride_xn, stride_xk, stride_s, BLOCK_R, BLOCK_S, BLOCK_C,
        )  # fmt: skip
    else:
        _sample_sums_side(
            p_grad, p_h, p_segments, p_sums + in_features, n, scaling, splits_in, samples, span,
            tile - tiles_in, out_features, features, rank, stride_gn, stride_gk, stride_s,
            BLOCK_R, BLOCK_S, BLOCK_C,
        )  # fmt: skip


BLOCK_M, BLOCK_K = 32, {True: 128, False: 32}  # of the projections
BLOCK_S = 16  # samples, or rows of one, at a time
PIECE_BYTES = 32 << 20  # of x and grad, which the L2 holds
PROJECT, ROWS, SAMPLES = Config(4, 3), Config(4, 2), Config(8, 2, registers=96)


def spans(features: int, programs: int) -> tuple[int, int]:
    """(splits, features in each) of the sum over features; programs: of one split."""
    splits = max(min(PROGRAMS // max(2 * programs, 1), features // 512, 16), 1)
    span = max(cdiv(cdiv(features, splits), 128), 1) * 128
    return max(cdiv(features, span), 1), span


def piece_rows(x: torch.Tensor, grad: torch.Tensor, rank: int) -> int:
    """Rows that the L2 holds from one launch to the next, with their h and g."""
    a_row = max((x.shape[1] + grad.shape[1]) * x.element_size(), 8 * rank)
    return max(PIECE_BYTES // max(a_row, 1) // BLOCK_M, 1) * BLOCK_M


def exact(x: torch.dtype, weights: torch.dtype) -> bool:
    """Whether matrix units multiply these dtypes exactly: 16-bit ones of one kind."""
    return x == weights != torch.float32


class Projected(NamedTuple):
    """Partial A x and Bᵀ grad, and how many of each there are."""

    h: torch.Tensor
    splits_in: int
    splits_out: int


def _projected(x: torch.Tensor, grad: torch.Tensor, A: torch.Tensor, B: torch.Tensor) -> Projected:
    n, rank = x.shape[0], A.shape[0]
    rows, ranks = cdiv(n, BLOCK_M), cdiv(rank, BLOCK_R)
    how = exact(x.dtype, A.dtype)
    splits_in, span_in = spans(x.shape[1], rows * ranks)
    splits_out, span_out = spans(grad.shape[1], rows * ranks)
    h = scratch("h", x, (splits_in + splits_out) * rank * n, torch.float32)
    launch(
        _project, (rows, splits_in + splits_out, ranks), (x, grad, A, B, h),
        (n, splits_in, span_in, span_out),
        (x.shape[1], grad.shape[1], rank, *x.stride(), *grad.stride(), *A.stride(), *B.T.stride()),
        (BLOCK_M, BLOCK_R, BLOCK_K[how], how), PROJECT,
    )  # fmt: skip
    return Projected(h, splits_in, splits_out)


def lora_fisher(
    x: torch.Tensor,
    grad: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    scaling: float,
    segments: torch.Tensor | None,
    F_A: torch.Tensor,
    F_B: torch.Tensor,
    accumulate: bool,
) -> None:
    """x [n, in], grad [n, out], A [r, in], B [out, r], segments int32 [S + 1] or None, F_A
    [r, in] and F_B [out, r] float64 or float32, all in any strides."""
    n, rank = x.shape[0], A.shape[0]
    features = x.shape[1] + grad.shape[1]
    shape = (x.shape[1], grad.shape[1], rank, *x.stride(), *grad.stride())
    ranks, tiles = cdiv(rank, BLOCK_R), column_tiles(x, grad)
    blocks = (BLOCK_R, BLOCK_S, BLOCK_C)
    if segments is not None:
        samples = segments.shape[0] - 1
        splits, span = splits_of(samples, ranks * tiles, 1)
        sums = scratch("sums", x, splits * rank * features, torch.float64)
        h, splits_in, splits_out = _projected(x, grad, A, B)
        launch(
            _sample_sums, (ranks, tiles, splits), (x, grad, h, segments, sums),
            (n, scaling, splits_in, splits_out, samples, span), (*shape, segments.stride(0)),
            blocks, SAMPLES,
        )  # fmt: skip
        return write(sums, splits, F_A, F_B, accumulate)

    step = piece_rows(x, grad, rank)
    splits, span = splits_of(min(n, step), ranks * tiles, SPLIT_ROWS)
    sums = scratch("sums", x, splits * rank * features, torch.float64)
    for first in range(0, max(n, 1), step):
        rows, up = x[first : first + step], grad[first : first + step]
        h, splits_in, splits_out = _projected(rows, up, A, B)
        launch(
            _row_sums, (ranks, tiles, splits), (rows, up, h, sums),
            (rows.shape[0], scaling, splits_in, splits_out, span, int(first > 0)), shape,
            blocks, ROWS,
        )  # fmt: skip
    write(sums, splits, F_A, F_B, accumulate)


def variants(device: Device) -> Variants:
    """All that ``lora_fisher`` and ``lora_fisher_factors`` can launch, at 4096 features and
    rank 16."""
    blocks, rows = (BLOCK_R, BLOCK_S, BLOCK_C), (4096, 1, 4096, 1)
    amd = device.backend == "hip"  # whose matrix units take float32
    for x, w in product(FLOATS, FLOATS):
        how = exact(x, w)
        yield Variant(
            f"lora_fisher-{FLOATS[x]}-{FLOATS[w]}-project", _project,
            (FLOATS[x], FLOATS[x], FLOATS[w], FLOATS[w], "fp32"), ("i32",) * 4,
            (4096, 4096, 16, *rows, 4096, 1, 1, 16), (BLOCK_M, BLOCK_R, BLOCK_K[how], how),
            PROJECT, how or amd,
        )  # fmt: skip
    for name in FLOATS.values():
        yield Variant(
            f"lora_fisher-{name}-rows", _row_sums, (name, name, "fp32", "fp64"),
            ("i32", "fp32", "i32", "i32", "i32", "i32"), (4096, 4096, 16, *rows), blocks, ROWS, amd,
        )  # fmt: skip
        yield Variant(
            f"lora_fisher-{name}-samples", _sample_sums, (name, name, "fp32", "i32", "fp64"),
            ("i32", "fp32", "i32", "i32", "i32", "i32"), (4096, 4096, 16, *rows, 1), blocks,
            SAMPLES, amd,
        )  # fmt: skip
