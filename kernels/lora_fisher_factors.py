"""Op 6, lora_fisher_factors: u [out] = sum of grad∘grad, v [in] = sum of x∘x over rows; and
what it shares with lora_fisher.

``_square_sums`` leaves float64 partial sums [splits, in + out] over spans of rows, ``_finish``
adds the splits in order. Squares and sums of 32 rows are float32, all beyond that float64.

Roofline on an H200, in = out = 4096: bytes = x and grad, n (in + out) of their size; 2
operations an element, so bound by bytes. 256 rows of float32: 8.4 MB, 2 us, bound by two
launches: expected 6 us. 4096 rows of bfloat16: 67 MB, 16 us: expected 22. A million: 17 GB,
3.9 ms: expected 4.5.
"""

from __future__ import annotations

from itertools import product

import torch
import triton
import triton.language as tl

from .launch import FLOATS, Config, Device, Variant, Variants, cdiv, launch, scratch


@triton.jit
def _square_sums_side(
    p_v, p_sums, n, span, tile, width, features, stride_vn, stride_vk,
    BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    i_c = (tile * BLOCK_C + tl.arange(0, BLOCK_C)).to(tl.int64)
    split = tl.program_id(1)
    acc = tl.zeros((BLOCK_C,), tl.float64)
    last = tl.minimum((split + 1) * span, n)
    for row in range(split * span, last, BLOCK_S):
        i_s = row + tl.arange(0, BLOCK_S)
        of = i_s.to(tl.int64)[:, None] * stride_vn + i_c.to(tl.int64)[None, :] * stride_vk
        m = (i_s < last)[:, None] & (i_c < width)[None, :]
        b_v = tl.load(p_v + of, m, 0.0).to(tl.float32)  # [BLOCK_S, BLOCK_C]
        acc += tl.sum(b_v * b_v, 0).to(tl.float64)
    tl.store(p_sums + split.to(tl.int64) * features + i_c, acc, i_c < width)


@triton.jit(do_not_specialize=["n", "span"])
def _square_sums(
    p_x, p_grad, p_sums, n, span, in_features, out_features, stride_xn, stride_xk,
    stride_gn, stride_gk, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Partial sums [splits, in + out] of x∘x and grad∘grad; grid (column tiles, splits, 1)."""
    tile = tl.program_id(0)
    tiles_in = tl.cdiv(in_features, BLOCK_C)
    features = in_features + out_features
    if tile < tiles_in:
        _square_sums_side(
            p_x,
            p_sums,
            n,
            span,
            tile,
            in_features,
            features,
            stride_xn,
            stride_xk,
            BLOCK_S,
            BLOCK_C,
        )
    else:
        _square_sums_side(
            p_grad, p_sums + in_features, n, span, tile - tiles_in, out_features, features,
            stride_gn, stride_gk, BLOCK_S, BLOCK_C,
        )  # fmt: skip


@triton.jit
def _finish_side(
    p_sums, p_to, splits, accumulate, tile, width, features, rank, stride_r, stride_c,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    i_r = (tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)).to(tl.int64)
    i_c = (tile * BLOCK_C + tl.arange(0, BLOCK_C)).to(tl.int64)
    m = (i_r < rank)[:, None] & (i_c < width)[None, :]
    acc = tl.zeros((BLOCK_R, BLOCK_C), tl.float64)
    of = p_sums + i_r[:, None] * features + i_c[None, :]
    for split in tl.range(0, splits, loop_unroll_factor=4):
        acc += tl.load(of + tl.cast(split, tl.int64) * rank * features, m, 0.0)
    to = p_to + i_r[:, None] * stride_r + i_c[None, :] * stride_c
    if accumulate:
        acc += tl.load(to, m, 0.0).to(tl.float64)
    tl.store(to, acc.to(p_to.dtype.element_ty), m)


@triton.jit(do_not_specialize=["splits", "accumulate"])
def _finish(
    p_sums, p_a, p_b, splits, accumulate, in_features, out_features, rank, stride_ar, stride_ak,
    stride_br, stride_bk, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """F_A [rank, in] and F_Bᵀ [rank, out] from the partial sums; grid (rank / BLOCK_R, column
    tiles, 1)."""
    tile = tl.program_id(1)
    tiles_in = tl.cdiv(in_features, BLOCK_C)
    features = in_features + out_features
    if tile < tiles_in:
        _finish_side(
            p_sums, p_a, splits, accumulate, tile, in_features, features, rank,
            stride_ar, stride_ak, BLOCK_R, BLOCK_C,
        )  # fmt: skip
    else:
        _finish_side(
            p_sums + in_features, p_b, splits, accumulate, tile - tiles_in, out_features,
            features, rank, stride_br, stride_bk, BLOCK_R, BLOCK_C,
        )  # fmt: skip


BLOCK_R, BLOCK_C = 16, 128
ROWS = 32  # squared and summed at a time
PROGRAMS = 512  # wanted of a launch, a few for each processor
SPLIT_ROWS = 64  # of a split at least: its sums are written and read again
MOST_SPLITS = 64  # which one program adds up
SQUARES, FINISH = Config(4, 2), Config(4, 1)


def splits_of(count: int, programs: int, least: int) -> tuple[int, int]:
    """(splits, rows or samples in each); programs: of one split; least: of each."""
    splits = max(min(PROGRAMS // max(programs, 1), cdiv(count, least), MOST_SPLITS), 1)
    span = max(cdiv(cdiv(count, splits), least), 1) * least
    return max(cdiv(count, span), 1), span


def column_tiles(x: torch.Tensor, grad: torch.Tensor) -> int:
    return cdiv(x.shape[1], BLOCK_C) + cdiv(grad.shape[1], BLOCK_C)


def write(
    sums: torch.Tensor, splits: int, F_A: torch.Tensor, F_B: torch.Tensor, accumulate: bool
) -> None:
    """F_A [r, in] and F_B [out, r] from the partial sums [splits, r, in + out]."""
    rank = F_A.shape[0]
    launch(
        _finish, (cdiv(rank, BLOCK_R), column_tiles(F_A, F_B.T), 1), (sums, F_A, F_B),
        (splits, int(accumulate)),
        (F_A.shape[1], F_B.shape[0], rank, *F_A.stride(), *F_B.T.stride()),
        (BLOCK_R, BLOCK_C), FINISH,
    )  # fmt: skip


def lora_fisher_factors(
    x: torch.Tensor, grad: torch.Tensor, u: torch.Tensor, v: torch.Tensor, accumulate: bool
) -> None:
    """u [out] and v [in], float64 or float32, in any strides: sums of grad∘grad and x∘x."""
    tiles = column_tiles(x, grad)
    splits, span = splits_of(x.shape[0], tiles, SPLIT_ROWS)
    sums = scratch("sums", x, splits * (x.shape[1] + grad.shape[1]), torch.float64)
    launch(
        _square_sums, (tiles, splits, 1), (x, grad, sums), (x.shape[0], span),
        (x.shape[1], grad.shape[1], *x.stride(), *grad.stride()), (ROWS, BLOCK_C), SQUARES,
    )  # fmt: skip
    write(sums, splits, v.unsqueeze(0), u.unsqueeze(1), accumulate)


def variants(device: Device) -> Variants:
    """All that ``lora_fisher_factors`` can launch, at 4096 features and rank 16."""
    for x in FLOATS.values():
        yield Variant(
            f"lora_fisher_factors-{x}", _square_sums, (x, x, "fp64"), ("i32", "i32"),
            (4096, 4096, 4096, 1, 4096, 1), (ROWS, BLOCK_C), SQUARES, False,
        )  # fmt: skip
    for a, b in product(("fp32", "fp64"), ("fp32", "fp64")):
        yield Variant(
            f"lora_fisher-{a}-{b}-finish", _finish, ("fp64", a, b), ("i32", "i32"),
            (4096, 4096, 16, 4096, 1, 1, 16), (BLOCK_R, BLOCK_C), FINISH, False,
        )  # fmt: skip
