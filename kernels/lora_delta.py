"""Op 1, lora_delta: y = s (x Aᵀ) Bᵀ, in two launches.

``_shrink`` leaves partial sums of h = x Aᵀ over spans of the features; ``_expand`` adds
them up in order and multiplies by Bᵀ. No zeroing pass, no atomics: a row's bits do not
depend on its batch.

Roofline on an H200, bfloat16, in = out = 4096, r = 16: bytes = A and B 2 r (in + out) =
0.26 MB, x and y 2 n (in + out), partial h 8 * 2 * 4 n r; operations 2 n r (in + out).
One row: 0.3 MB, bound by the two launches and the latency of one block: 5 us expected,
2 us of it the launches in a graph. 512 rows: 9.2 MB, 2.1 us at 4.3 TB/s, expected 7 us.
4096 rows: 71 MB, 17 us at 4.3 TB/s and 1.1 GFLOP, 1.4 us at 790 TFLOP/s: bound by bytes,
expected 25 us.
"""

from __future__ import annotations

from functools import cache
from itertools import product
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from .launch import FLOATS, Config, Device, Variant, Variants, cdiv, launch, scratch
from .tiles import expand, precision, project, rounded
from .tunable import Tunable


@triton.jit(do_not_specialize=["n"])
def _shrink(
    p_x, p_a, p_h, n, in_features, rank, stride_xn, stride_xk, stride_ar, stride_ak, splits, span,
    BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Partial h [n, splits, rank]; grid (rows / BLOCK_M, splits, rank / BLOCK_R)."""
    i_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    split = tl.program_id(1)
    i_r = tl.program_id(2) * BLOCK_R + tl.arange(0, BLOCK_R)
    m_m, m_r = i_m < n, i_r < rank
    last = tl.minimum((split + 1) * span, in_features)
    b_h = project(
        p_x + i_m.to(tl.int64) * stride_xn, m_m, stride_xk, p_a, stride_ar, stride_ak, i_r, m_r,
        split * span, last, BLOCK_M, BLOCK_R, BLOCK_K, PRECISION,
    )  # [BLOCK_M, BLOCK_R]  # fmt: skip
    to = (i_m.to(tl.int64) * splits + split) * rank
    tl.store(p_h + to[:, None] + i_r[None, :], b_h, m_m[:, None] & m_r[None, :])


@triton.jit(do_not_specialize=["n", "scaling", "accumulate"])
def _expand(
    p_h, p_b, p_y, n, scaling, accumulate, out_features, rank, stride_br, stride_bo, stride_yn,
    stride_yo, splits, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """y [n, out] from the partial h; grid (rows / BLOCK_M, out / BLOCK_N, 1)."""
    i_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    i_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_m, m_n = i_m < n, i_n < out_features
    b_y = scaling * expand(
        p_h + i_m.to(tl.int64) * splits * rank, m_m, rank, splits, p_b, stride_br, stride_bo, rank,
        i_n, m_n, BLOCK_M, BLOCK_N, BLOCK_R, PRECISION,
    )  # [BLOCK_M, BLOCK_N]  # fmt: skip
    to = p_y + i_m.to(tl.int64)[:, None] * stride_yn + i_n.to(tl.int64)[None, :] * stride_yo
    m_y = m_m[:, None] & m_n[None, :]
    if accumulate:
        b_y += tl.load(to, m_y, 0.0).to(tl.float32)
    tl.store(to, rounded(b_y, p_y.dtype.element_ty), m_y)


SPAN = 128  # features: what the spans of the sum over features are multiples of
BLOCK_R = 16  # also of the sum over ranks, whatever the rank: it is part of its order
COLUMNS = 128  # of an expand
SHRINK = Config(4, 3, registers=224)


@cache
def spans(features: int) -> tuple[int, int]:
    """(splits, features in each) of the sum over features: a function of the shape alone."""
    splits = min(max(features // 512, 1), 16)
    span = max(cdiv(cdiv(features, splits), SPAN), 1) * SPAN
    return max(cdiv(features, span), 1), span


def block_k(how: str) -> int:
    """Features at a time: what a product in float32 holds is in registers."""
    return {"native": SPAN, "tf32": 64, "ieee": 16}[how]


def expand_config(rows: int) -> Config:
    """For blocks of so many rows."""
    return Config(4 if rows <= 16 else 8, 1, registers=128)


def rows_of_block(n: int) -> int:
    """It does not change the order in which a row is summed."""
    return 16 if n <= 64 else 32


class Tiling(NamedTuple):
    """Both launches. Rows of a block of 16 and 32 take the same matrix instruction; more do
    not, so there are no more."""

    rows: int
    columns: int
    warps: int
    stages: int

    @property
    def shrink(self) -> Config:
        return SHRINK._replace(num_warps=self.warps, num_stages=self.stages)


def _heuristic(index: int | None, n: int, *case: Any) -> Tiling:
    return Tiling(rows_of_block(n), COLUMNS, SHRINK.num_warps, SHRINK.num_stages)


SPACE = tuple(
    Tiling(rows, columns, *shrink)
    for rows, columns, shrink in product((16, 32), (64, COLUMNS), ((4, 2), (4, 3), (8, 3)))
)
TILING = Tunable("lora_delta", ("x", "w", "in", "out", "rank"), _heuristic, lambda *case: SPACE)


def lora_delta(
    x: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    scaling: float,
    out: torch.Tensor,
    accumulate: bool,
) -> None:
    """x [n, in], A [r, in], B [out, r], out [n, out] of x's dtype, in any strides."""
    n, features = x.shape
    rank, out_features = A.shape[0], B.shape[0]
    splits, span = spans(features)
    how = precision(x.dtype, A.dtype)
    tile = TILING.choose(x.device.index, n, x.dtype, A.dtype, features, out_features, rank)
    block_m = tile.rows
    h = scratch("h", x, n * splits * rank, torch.float32)
    launch(
        _shrink, (cdiv(n, block_m), splits, cdiv(rank, BLOCK_R)), (x, A, h), (n,),
        (features, rank, *x.stride(), *A.stride(), splits, span),
        (block_m, BLOCK_R, block_k(how), how), tile.shrink,
    )  # fmt: skip
    launch(
        _expand, (cdiv(n, block_m), cdiv(out_features, tile.columns), 1), (h, B, out),
        (n, scaling, int(accumulate)),
        (out_features, rank, B.stride(1), B.stride(0), *out.stride(), splits),
        (block_m, tile.columns, BLOCK_R, how), expand_config(block_m),
    )  # fmt: skip


def variants_of(tile: Tiling, x: torch.dtype, w: torch.dtype, device: Device) -> Variants:
    """What that tiling launches, at 4096 features and rank 16."""
    how, names = precision(x, w), (FLOATS[x], FLOATS[w])
    matrix = how != "ieee" or device.backend == "hip"
    name = f"lora_delta-{names[0]}-{names[1]}-{tile.rows}"
    yield Variant(
        f"{name}-{tile.warps}x{tile.stages}-shrink", _shrink, (*names, "fp32"), ("i32",),
        (4096, 16, 4096, 1, 4096, 1, *spans(4096)), (tile.rows, BLOCK_R, block_k(how), how),
        tile.shrink, matrix,
    )  # fmt: skip
    yield Variant(
        f"{name}-{tile.columns}-expand", _expand, ("fp32", names[1], names[0]),
        ("i32", "fp32", "i32"), (4096, 16, 1, 16, 4096, 1, spans(4096)[0]),
        (tile.rows, tile.columns, BLOCK_R, how), expand_config(tile.rows), matrix,
    )  # fmt: skip


def variants(device: Device) -> Variants:
    """All that ``lora_delta`` can launch untuned."""
    for x, w, n in product(FLOATS, FLOATS, (1, 4096)):
        yield from variants_of(_heuristic(None, n), x, w, device)


def tuned_variants(device: Device) -> Variants:
    """All that it can launch tuned."""
    for x, w, tile in product(FLOATS, FLOATS, SPACE):
        yield from variants_of(tile, x, w, device)
