"""Gradients of adapters, run by run: gA = sum w s (Bᵀ grad) xᵀ and gB = sum w s grad hᵀ.

Factor z of a slot is A of slice z // 2 for even z, and the transpose of its B for odd z: a
matrix [rank, width] in storage, read against the vectors of its side, x or grad. ``_project``
leaves the dot products of each pair's vectors with the ranks, times w s (over the number of
rows for a mean). The gradient of factor z is then the sum over the run, in the order of rows,
of the products of its partner z ^ 1 with the vectors of z: ``few_rows`` and ``many_rows``
compute a tile of it where it is needed, and nobody stores it.
"""

from __future__ import annotations

from itertools import product
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .launch import FLOATS, Config, Device, Variant, Variants, cdiv, launch, scratch
from .lora_delta import spans
from .runs import Runs
from .storage import Adapters
from .tiles import precision, project

TILE = tl.constexpr(512)  # columns a block goes through
GROUP = tl.constexpr(16)  # rows and ranks of one matrix product
HALF = tl.constexpr(64)  # and its columns
PART = tl.constexpr(128)  # columns of one row taken at once where there are many ranks
GROUPED = tl.constexpr(8)  # a run of so many pairs is taken by groups


@triton.jit
def elements_before(p_ranks, p_firsts, slot, s, in_features, slices):
    """How many elements the slices of a slot before the s-th have, int64."""
    count = slot.to(tl.int64) * 0
    for before in range(s):
        width = in_features + tl.load(p_firsts + before + 1) - tl.load(p_firsts + before)
        count += tl.load(p_ranks + slot.to(tl.int64) * slices + before).to(tl.int64) * width
    return count


@triton.jit
def factor(p_ranks, p_firsts, slot, z, in_features, unit, slices):
    """(rank, width, first column of its vectors, index of its first element) of factor z.

    unit: a number that divides every width of y, for wide loads.
    """
    element = elements_before(p_ranks, p_firsts, slot, z // 2, in_features, slices)
    rank = tl.load(p_ranks + slot.to(tl.int64) * slices + z // 2)
    first = tl.load(p_firsts + z // 2)
    out = (tl.load(p_firsts + z // 2 + 1) - first) // unit * unit
    of_a = z % 2 == 0
    element = tl.where(of_a, element, element + rank.to(tl.int64) * in_features)
    return rank, tl.where(of_a, in_features, out), tl.where(of_a, 0, first // unit * unit), element


@triton.jit
def vectors(p_x, p_grad, z, row, stride_xn, stride_gn, first, i_c, m):
    """Columns i_c of x, or of a slice of grad, of the given rows: float32 [rows, columns]."""
    if z % 2 == 0:
        b_v = tl.load(p_x + row * stride_xn + i_c, m, 0.0)
    else:
        b_v = tl.load(p_grad + row * stride_gn + (first + i_c), m, 0.0)
    return b_v.to(tl.float32)


@triton.jit
def _one_row(
    p_weights, p_x, p_grad, p_to, z, row, stride_xn, stride_gn, first, rank, width, c_first, c_last,
    scale, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """A row's dot products with the ranks over columns [c_first, c_last), times scale."""
    for r0 in range(0, rank, BLOCK_R):
        i_r = r0 + tl.arange(0, BLOCK_R)
        m_r = i_r < rank
        acc = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
        for c0 in range(c_first, c_last, BLOCK_C):
            i_c = c0 + tl.arange(0, BLOCK_C)[None, :]
            m_c = i_c < c_last
            b_v = vectors(p_x, p_grad, z, row, stride_xn, stride_gn, first, i_c, m_c)
            at = i_r.to(tl.int64)[:, None] * width + i_c
            acc += b_v * tl.load(p_weights + at, m_r[:, None] & m_c, 0.0).to(tl.float32)
        tl.store(p_to + i_r, tl.sum(acc, 1) * scale, m_r)


@triton.jit
def _rows(
    p_weights, rows, p_to, m_row, rank, width, c_first, c_last, scale, pair_stride,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The same for GROUP rows, which go to p_to and on by pair_stride."""
    to = p_to + tl.arange(0, GROUP).to(tl.int64)[:, None] * pair_stride
    for r0 in range(0, rank, GROUP):
        i_r = r0 + tl.arange(0, GROUP)
        m_r = i_r < rank
        b_f = project(
            rows, m_row, 1, p_weights, width, 1, i_r, m_r, c_first, c_last, GROUP, GROUP, HALF,
            PRECISION,
        )  # [GROUP, GROUP]  # fmt: skip
        tl.store(to + i_r[None, :], b_f * scale[:, None], m_row[:, None] & m_r[None, :])


@triton.jit(
    do_not_specialize=["k", "weighted", "mean", "stride_wn", "stride_wk", "pair_stride", "ranks"]
)
def _project(
    p_x, p_grad, p_weights, p_keys, p_order, p_runs, p_arena, p_offsets, p_ranks, p_scalings,
    p_firsts, p_f, k, weighted, mean, stride_wn, stride_wk, pair_stride, ranks, in_features, unit,
    slices, stride_xn, stride_gn, splits, PRECISION: tl.constexpr,
):  # fmt: skip
    """f [pairs, 2 slices, splits, ranks]; grid (pairs, splits, 2 slices).

    A run of few pairs: a block for each. A longer one: a block for each GROUP.
    """
    p, split, z = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    start = tl.load(p_runs + 4 * p.to(tl.int64))
    last = tl.load(p_runs + 4 * p.to(tl.int64) + 1, start >= 0, 0)
    grouped = last - start >= GROUPED
    if (start < 0) | (grouped & ((p - start) % GROUP != 0)):
        return
    slot = tl.load(p_keys + p)
    rank, width, first, _ = factor(p_ranks, p_firsts, slot, z, in_features, unit, slices)
    offset = tl.load(p_offsets + slot.to(tl.int64) * slices + z // 2)
    p_own = p_arena + tl.multiple_of(offset, 16) + (z % 2) * rank.to(tl.int64) * in_features
    scale = tl.load(p_scalings + slot)
    if mean:
        scale /= tl.load(p_runs + 4 * p.to(tl.int64) + 2).to(tl.float32)
    span = tl.cdiv(tl.cdiv(width, splits), PART) * PART
    c_first, c_last = split * span, tl.minimum((split + 1) * span, width)
    p_to = p_f + p.to(tl.int64) * pair_stride + (z * splits + split) * ranks
    i_p = p + tl.arange(0, GROUP)
    m_p = i_p < last
    pair = tl.load(p_order + i_p, m_p, 0)
    at = pair // k * stride_wn + pair % k * stride_wk
    scales = tl.load(p_weights + at, m_p & (weighted != 0), 1.0) * scale
    if grouped & (z % 2 == 0):
        rows = p_x + pair // k * stride_xn
        _rows(p_own, rows, p_to, m_p, rank, width, c_first, c_last, scales, pair_stride, PRECISION)
    elif grouped:
        rows = p_grad + pair // k * stride_gn + first
        _rows(p_own, rows, p_to, m_p, rank, width, c_first, c_last, scales, pair_stride, PRECISION)
    else:
        row = row_of(p_runs, p)
        scale = tl.sum(tl.where(i_p == p, scales, 0.0), 0)
        if rank <= 4:
            _one_row(
                p_own, p_x, p_grad, p_to, z, row, stride_xn, stride_gn, first, rank, width, c_first,
                c_last, scale, 4, TILE,
            )  # fmt: skip
        else:
            _one_row(
                p_own, p_x, p_grad, p_to, z, row, stride_xn, stride_gn, first, rank, width, c_first,
                c_last, scale, GROUP, PART,
            )  # fmt: skip


@triton.jit
def row_of(p_runs, p):
    """The row at position p, int64."""
    return tl.load(p_runs + tl.cast(p, tl.int64) * 4 + 3).to(tl.int64)


@triton.jit
def few_rows(
    p_x, p_grad, p_runs, p_f, p_buffer, buffered, scale, start, last, z, r, first, width, element,
    i_c, m_c, stride_xn, stride_gn, pair_stride, splits, ranks,
):  # fmt: skip
    """Rank r of the gradient of factor z, columns i_c [1, TILE]; rows one by one.

    buffered: from p_buffer, in the order of storage, times scale.
    """
    if buffered:
        at = element + r * width.to(tl.int64) + i_c
        acc = scale * tl.load(p_buffer + at, m_c, 0.0)
    else:
        acc = tl.zeros((1, TILE), tl.float32)
        for p in range(start, last):
            row = row_of(p_runs, p)
            p_r = p_f + p * pair_stride.to(tl.int64) + (z ^ 1) * splits * ranks + r
            f = tl.load(p_r)
            for split in range(1, splits):
                f += tl.load(p_r + split * ranks)
            acc += f * vectors(p_x, p_grad, z, row, stride_xn, stride_gn, first, i_c, m_c)
    return acc


@triton.jit
def many_rows(
    p_x, p_grad, p_runs, p_f, start, last, z, i_r, m_r, first, i_c, m_c, stride_xn,
    stride_gn, pair_stride, splits, ranks,
):  # fmt: skip
    """Ranks i_r [GROUP] of the gradient of factor z, columns i_c [1, HALF]; rows by groups."""
    acc = tl.zeros((GROUP, HALF), tl.float32)
    for p in range(start, last, GROUP):
        i_p = p + tl.arange(0, GROUP)
        m_p = i_p < last
        row = tl.load(p_runs + 4 * i_p.to(tl.int64) + 3, m_p, 0).to(tl.int64)
        p_r = (
            p_f + i_p.to(tl.int64)[None, :] * pair_stride + (z ^ 1) * splits * ranks + i_r[:, None]
        )
        m_f = m_r[:, None] & m_p[None, :]
        b_f = tl.load(p_r, m_f, 0.0)  # [GROUP ranks, GROUP rows]
        for split in range(1, splits):
            b_f += tl.load(p_r + split * ranks, m_f, 0.0)
        b_v = vectors(
            p_x, p_grad, z, row[:, None], stride_xn, stride_gn, first, i_c, m_p[:, None] & m_c
        )  # [GROUP, HALF]
        acc = tl.dot(b_f, b_v, acc, input_precision="ieee")
    return acc


@triton.jit
def by_groups(start, last, rank, buffered):
    """Whether ``many_rows`` pays: a matrix product computes GROUP ranks of GROUP rows."""
    return (last - start >= GROUPED) & ((last - start) * rank >= 64) & (buffered == 0)


@triton.jit(do_not_specialize=["buffered", "keep", "scale", "train_A", "pair_stride", "ranks"])
def _squares(
    p_x, p_grad, p_keys, p_runs, p_ranks, p_firsts, p_f, p_buffer, p_squares,
    buffered, keep, scale, train_A, pair_stride, ranks, in_features, unit, slices, stride_xn,
    stride_gn, splits,
):  # fmt: skip
    """Sums of squares of TILE columns of the gradients [pairs, 2 slices, tiles] float64.

    keep: the gradient itself goes to p_buffer, in the order of storage (one run only).
    Grid (pairs, tiles, 2 slices).
    """
    p, tile, z = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    start = tl.load(p_runs + 4 * p.to(tl.int64))
    if start != p:
        return
    last = tl.load(p_runs + 4 * p.to(tl.int64) + 1)
    slot = tl.load(p_keys + p)
    rank, width, first, element = factor(p_ranks, p_firsts, slot, z, in_features, unit, slices)
    c_first = tile * TILE
    if (c_first >= width) | ((z % 2 == 0) & (train_A == 0)):
        return
    if by_groups(start, last, rank, buffered):
        sums = tl.zeros((HALF,), tl.float64)
        for r0 in range(0, rank, GROUP):
            i_r = r0 + tl.arange(0, GROUP)
            for c0 in range(c_first, tl.minimum(c_first + TILE, width), HALF):
                i_c = c0 + tl.arange(0, HALF)[None, :]
                b_g = many_rows(
                    p_x, p_grad, p_runs, p_f, start, last, z, i_r, i_r < rank, first, i_c,
                    i_c < width, stride_xn, stride_gn, pair_stride, splits, ranks,
                )  # fmt: skip
                if keep:
                    to = p_buffer + element + i_r.to(tl.int64)[:, None] * width + i_c
                    tl.store(to, b_g, (i_r < rank)[:, None] & (i_c < width))
                b_g = b_g.to(tl.float64)
                sums += tl.sum(b_g * b_g, 0)
        total = tl.sum(sums, 0)
    else:
        i_c = c_first + tl.arange(0, TILE)[None, :]
        squares = tl.zeros((1, TILE), tl.float64)
        for r in range(rank):
            b_g = few_rows(
                p_x, p_grad, p_runs, p_f, p_buffer, buffered, scale, start, last, z, r, first,
                width, element, i_c, i_c < width, stride_xn, stride_gn, pair_stride, splits,
                ranks,
            )  # fmt: skip
            if keep:
                to = p_buffer + element + r * width.to(tl.int64) + i_c
                tl.store(to, b_g, i_c < width)
            b_g = b_g.to(tl.float64)
            squares += b_g * b_g
        total = tl.sum(tl.sum(squares, 1), 0)
    to = (p.to(tl.int64) * slices * 2 + z) * tl.num_programs(1) + tile
    tl.store(p_squares + to, total)


@triton.jit
def norm_of(p_squares, p_ranks, p_firsts, slot, p, train_A, tiles, in_features, slices):
    """The norm of the gradient of the run that begins at p, float64; Inf beyond float32's range."""
    total = slot.to(tl.float64) * 0.0
    for z in range(2 * slices):
        width = in_features + (z % 2) * (
            tl.load(p_firsts + z // 2 + 1) - tl.load(p_firsts + z // 2) - in_features
        )
        learns = tl.load(p_ranks + slot.to(tl.int64) * slices + z // 2) > 0
        learns &= (z % 2 == 1) | (train_A != 0)
        squares = p_squares + (p.to(tl.int64) * slices * 2 + z) * tiles
        for t0 in range(0, tl.cdiv(width, TILE), 32):
            i_t = t0 + tl.arange(0, 32)
            total += tl.sum(tl.load(squares + i_t, learns & (i_t * TILE < width), 0.0), 0)
    norm = tl.sqrt(total)
    return tl.where(norm <= 3.4028234663852886e38, norm, float("inf"))


PROJECT, SQUARES = Config(4, 1), Config(4, 1, registers=128)


class Samples(NamedTuple):
    """Rows of x [n, in] and grad [n, out] with unit steps from column to column, and whose
    they are. f: what ``_project`` leaves of them. buffer: in their place, a gradient in the
    order of storage [elements] float32, which is taken ``scale`` times.
    """

    x: torch.Tensor
    grad: torch.Tensor
    runs: Runs
    f: torch.Tensor
    buffer: torch.Tensor | None = None
    scale: float = 1.0

    def pointers(self) -> tuple[torch.Tensor, ...]:
        return self.x, self.grad, self.runs.keys, self.runs.table


def unit_of(adapters: Adapters) -> int:
    """16 where it divides every width of y, or 1."""
    return 1 if any(out % 16 for out in adapters.outs) else 16


def splits_of(adapters: Adapters) -> int:
    """Of the sums over columns: a function of the pool's widths."""
    return spans(max(adapters.in_features, *adapters.outs))[0]


def tiles_of(adapters: Adapters) -> int:
    return cdiv(max(adapters.in_features, *adapters.outs), TILE.value)


def project_rows(
    adapters: Adapters,
    x: torch.Tensor,
    grad: torch.Tensor,
    runs: Runs,
    weights: torch.Tensor | None,
    mean: bool,
) -> Samples:
    """weights float32 [n, k] or None."""
    a = adapters
    x, grad = (t if t.stride(1) == 1 else t.contiguous() for t in (x, grad))
    slices, splits = len(a.outs), splits_of(a)
    f = scratch("adapt_f", x, runs.pairs * strides_of(a)[0], torch.float32)
    given = a.scalings if weights is None else weights
    strides = (0, 0) if weights is None else weights.stride()
    launch(
        _project, (runs.pairs, splits, 2 * slices),
        (x, grad, given, runs.keys, runs.order, runs.table, a.arena, a.offsets, a.ranks, a.scalings,
         a.firsts, f),
        (runs.k, int(weights is not None), int(mean), *strides, *strides_of(a)),
        (a.in_features, unit_of(a), slices, x.stride(0), grad.stride(0), splits),
        (product_precision(x.dtype, a.arena.dtype),), PROJECT,
    )  # fmt: skip
    return Samples(x, grad, runs, f)


def product_precision(x: torch.dtype, weights: torch.dtype) -> str:
    """As ``precision``, but where either is float32 no bit of it is lost."""
    return "ieee" if torch.float32 in (x, weights) else precision(x, weights)


def square_sums(
    adapters: Adapters, samples: Samples, train_A: bool, keep: torch.Tensor | None = None
) -> torch.Tensor:
    """Of every run's gradient, for ``norm_of``; ``keep``: the gradient itself goes there."""
    a, runs = adapters, samples.runs
    slices, tiles, splits = len(a.outs), tiles_of(a), splits_of(a)
    squares = scratch("adapt_squares", samples.x, runs.pairs * 2 * slices * tiles, torch.float64)
    buffer = keep if samples.buffer is None else samples.buffer
    launch(
        _squares, (runs.pairs, tiles, 2 * slices),
        (*samples.pointers(), a.ranks, a.firsts, samples.f, samples.f if buffer is None else buffer,
         squares),
        (int(samples.buffer is not None), int(keep is not None), samples.scale, int(train_A),
         *strides_of(a)),
        (a.in_features, unit_of(a), slices, samples.x.stride(0), samples.grad.stride(0), splits),
        (), SQUARES,
    )  # fmt: skip
    return squares


def strides_of(adapters: Adapters) -> tuple[int, int]:
    """Of f: from pair to pair, and from split to split."""
    ranks = max(adapters.max_rank, 1)
    return 2 * len(adapters.outs) * splits_of(adapters) * ranks, ranks


class Widths(NamedTuple):
    """What of a pool's widths kernels are compiled for."""

    name: str
    unit: int
    slices: int


# One slice of y, which 16 divides, and what else there is.
WIDTHS = Widths("even", 16, 1), Widths("odd", 1, 3)


def variants(device: Device) -> Variants:
    """All of this file, at 4096 features."""
    for widths in WIDTHS:
        yield from _variants(device, widths)


def _variants(device: Device, widths: Widths) -> Variants:
    shape = (4096, *widths[1:], 4096, 4096, spans(4096)[0])
    for x in FLOATS:
        name = FLOATS[x]
        yield Variant(
            f"adapt-squares-{name}-{widths.name}", _squares,
            (name, name, "i32", "i32", "i32", "i32", "fp32", "fp32", "fp64"),
            ("i32", "i32", "fp32", "i32", "i32", "i32"), shape, (), SQUARES, False,
        )  # fmt: skip
    for x, w in product(FLOATS, FLOATS):
        names, how = (FLOATS[x], FLOATS[w]), product_precision(x, w)
        matrix = how != "ieee" or device.backend == "hip"
        yield Variant(
            f"adapt-project-{names[0]}-{names[1]}-{widths.name}", _project,
            (names[0], names[0], "fp32", "i32", "i64", "i32", names[1], "i64", "i32", "fp32", "i32",
             "fp32"),
            ("i32",) * 7, shape, (how,), PROJECT, matrix,
        )  # fmt: skip
