"""Op 2, batched_lora_delta: y_i += sum_j w_ij s_j B_j (A_j x_i), in two launches.

``_shrink`` leaves partial sums of h = A x for each (row, adapter) over spans of the
features; ``_expand`` adds them up in order, multiplies by Bᵀ and adds to y. No zeroing
pass, no atomics, nothing read back by the host. Few rows (decode): a block has one row.
Many rows (prefill): a block has 32 rows and goes through the adapters that occur in them,
so that rows of one adapter share its weights where they are adjacent. Both multiply with
the same instruction in the same order, so that a row's bits do not depend on its batch.
Ranks are those of the slots: a block past a slot's rank leaves at once, and no byte is
read for ranks that are not there.

Roofline on an H200, bfloat16, in = out = 4096, one slice, r = 16 (A and B: 0.26 MB an
adapter): two launches. 64 rows on 64 adapters: 16.8 MB of weights, 1.0 MB of x and y, 0.03
MB of partial h (8 splits) written and read: 4.2 us at 4.3 TB/s; expected 8 us, with 2 us of
launches in a graph; from L2 where the weights stay there. r = 2, 64 on 64: 3.1 MB, 0.7 us:
bound by launches and latency, expected 5 us. Prefill of 4096 rows in runs of 512 on 8
adapters: x and y 101 MB (y read and written), 23 us at 4.3 TB/s, and 1.1 GFLOP; the partial
h, 2.1 MB, is read again for every 128 columns, 67 MB from L2: bound by bytes, expected 40 us.
"""

from __future__ import annotations

from itertools import product
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from .launch import FLOATS, Config, Device, Variant, Variants, cdiv, launch, scratch
from .lora_delta import BLOCK_R, COLUMNS, SHRINK, block_k, expand_config, spans
from .storage import Adapters
from .tiles import expand, precision, project, rounded
from .tunable import Tunable

NOT_PENDING = tl.constexpr(2**31 - 1)


@triton.jit
def slots_of(p_ids, p_ranks, i_m, m_m, j, stride_in, stride_ik, slots, slices):
    """The slot of rows i_m at place j of their mixtures [BLOCK_M]: -1 for none and for bad ids.

    Also which of them are bad: beyond the pool, or not in use.
    """
    slot = tl.load(p_ids + i_m.to(tl.int64) * stride_in + j * stride_ik, m_m, -1)
    within = (slot >= 0) & (slot < slots)
    used = tl.load(p_ranks + slot.to(tl.int64) * slices, within, -1) >= 0
    return tl.where(used, slot, -1), m_m & (slot != -1) & (used == 0)


@triton.jit
def add_deltas(
    acc, touched, p_ids, p_weights, p_h, p_arena, p_offsets, p_ranks, p_scalings, p_firsts,
    i_m, m_m, i_n, n_first, k, weighted, slots, rank_stride, in_features, slices, transposed,
    splits, stride_in, stride_ik, stride_wn, stride_wk,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """acc [BLOCK_M, BLOCK_N] + the deltas of rows i_m in columns i_n = n_first + [0, BLOCK_N),
    and touched [BLOCK_M] or'ed with which rows have one there. k = 0 adds none.

    p_h: partial h [n, k, splits, slices, rank_stride].
    """
    for j in range(k):
        slot, _bad = slots_of(p_ids, p_ranks, i_m, m_m, j, stride_in, stride_ik, slots, slices)
        at = i_m.to(tl.int64) * stride_wn + j * stride_wk
        weight = tl.load(p_weights + at, m_m & (weighted != 0), 1.0)
        weight *= tl.load(p_scalings + slot, slot >= 0, 0.0)
        h_rows = p_h + (i_m.to(tl.int64) * k + j) * splits * slices * rank_stride
        pending = tl.where(slot >= 0, slot, NOT_PENDING)
        current = tl.min(pending, 0)
        while current != NOT_PENDING:
            mine = slot == current
            for s in range(slices):
                entry = current.to(tl.int64) * slices + s
                rank = tl.load(p_ranks + entry)
                first = tl.load(p_firsts + s) * (1 - transposed)
                end = tl.load(p_firsts + s + 1)
                width = end - first
                if transposed:
                    width = in_features
                if (rank > 0) & (n_first < first + width) & (n_first + BLOCK_N > first):
                    offset = tl.multiple_of(tl.load(p_offsets + entry), 16)
                    factor = p_arena + offset + (1 - transposed) * rank.to(tl.int64) * in_features
                    i_o = i_n - first
                    m_o = (i_o >= 0) & (i_o < width)
                    b_y = expand(
                        h_rows + s * rank_stride, mine, slices * rank_stride, splits, factor,
                        width, 1, rank, i_o, m_o, BLOCK_M, BLOCK_N, BLOCK_R, PRECISION,
                    )  # [BLOCK_M, BLOCK_N]  # fmt: skip
                    acc = tl.where(mine[:, None], acc + b_y * weight[:, None], acc)
                    touched = touched | mine
            pending = tl.where(mine, NOT_PENDING, pending)
            current = tl.min(pending, 0)
    return acc, touched


@triton.jit(do_not_specialize=["n", "k", "slots", "rank_stride", "slices", "transposed"])
def _shrink(
    p_x, p_ids, p_h, p_arena, p_offsets, p_ranks, p_firsts, p_flag,
    n, k, slots, rank_stride, slices, transposed, in_features, splits, span,
    stride_xn, stride_xk, stride_in, stride_ik,
    ROWS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Partial h [n, k, splits, slices, rank_stride] of the ranks that there are.

    Grid (rows / ROWS, splits, k * slices * (rank_stride / BLOCK_R)).
    """
    lane = tl.arange(0, BLOCK_M)
    i_m = tl.program_id(0) * ROWS + lane
    m_m = (lane < ROWS) & (i_m < n)
    split = tl.program_id(1)
    tiles = rank_stride // BLOCK_R
    j = tl.program_id(2) // (slices * tiles)
    s = tl.program_id(2) // tiles % slices
    r_first = tl.program_id(2) % tiles * BLOCK_R
    i_r = r_first + tl.arange(0, BLOCK_R)
    slot, bad = slots_of(p_ids, p_ranks, i_m, m_m, j, stride_in, stride_ik, slots, slices)
    found = tl.load(p_ids + i_m.to(tl.int64) * stride_in + j * stride_ik, bad, 0).to(tl.int64)
    tl.store(p_flag + tl.zeros((BLOCK_M,), tl.int32), 2 * found + 1, bad)
    first = tl.load(p_firsts + s) * transposed
    length = in_features
    if transposed:
        length = tl.load(p_firsts + s + 1) - first
    x_rows = p_x + i_m.to(tl.int64) * stride_xn + first * stride_xk
    to = ((i_m.to(tl.int64) * k + j) * splits + split) * slices * rank_stride + s * rank_stride
    pending = tl.where(slot >= 0, slot, NOT_PENDING)
    current = tl.min(pending, 0)
    while current != NOT_PENDING:
        mine = slot == current
        entry = current.to(tl.int64) * slices + s
        rank = tl.load(p_ranks + entry)
        if r_first < rank:
            offset = tl.multiple_of(tl.load(p_offsets + entry), 16)
            factor = p_arena + offset + transposed * rank.to(tl.int64) * in_features
            m_r = i_r < rank
            b_h = project(
                x_rows, mine, stride_xk, factor, length, 1, i_r, m_r, split * span,
                tl.minimum((split + 1) * span, length), BLOCK_M, BLOCK_R, BLOCK_K, PRECISION,
            )  # [BLOCK_M, BLOCK_R]  # fmt: skip
            tl.store(p_h + to[:, None] + i_r[None, :], b_h, mine[:, None] & m_r[None, :])
        pending = tl.where(mine, NOT_PENDING, pending)
        current = tl.min(pending, 0)


@triton.jit(
    do_not_specialize=[
        "n", "k", "weighted", "slots", "rank_stride", "accumulate", "slices", "transposed",
    ]
)  # fmt: skip
def _expand(
    p_y, p_ids, p_weights, p_h, p_arena, p_offsets, p_ranks, p_scalings, p_firsts,
    n, k, weighted, slots, rank_stride, accumulate, slices, transposed, in_features, splits,
    stride_yn, stride_yo, stride_in, stride_ik, stride_wn, stride_wk,
    ROWS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """y [n, out] from the partial h; grid (rows / ROWS, blocks of all slices, 1).

    A block's columns are of one slice: a row that has no adapter for it keeps its bits.
    """
    lane = tl.arange(0, BLOCK_M)
    i_m = tl.program_id(0) * ROWS + lane
    m_m = (lane < ROWS) & (i_m < n)
    tile = tl.program_id(1)
    n_first, n_end = tile * BLOCK_N, in_features
    if transposed == 0:
        for s in range(slices):
            first, end = tl.load(p_firsts + s), tl.load(p_firsts + s + 1)
            tiles = tl.cdiv(end - first, BLOCK_N)
            if (tile >= 0) & (tile < tiles):
                n_first, n_end = first + tile * BLOCK_N, end
            tile -= tiles
    i_n = n_first + tl.arange(0, BLOCK_N)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    acc, touched = add_deltas(
        acc, lane < 0, p_ids, p_weights, p_h, p_arena, p_offsets, p_ranks, p_scalings, p_firsts,
        i_m, m_m, i_n, n_first, k, weighted, slots, rank_stride, in_features, slices, transposed,
        splits, stride_in, stride_ik, stride_wn, stride_wk, BLOCK_M, BLOCK_N, BLOCK_R, PRECISION,
    )  # fmt: skip
    to = p_y + i_m.to(tl.int64)[:, None] * stride_yn + i_n.to(tl.int64)[None, :] * stride_yo
    m_n = i_n < n_end
    m_add = (touched & (accumulate != 0))[:, None] & m_n[None, :]
    acc += tl.load(to, m_add, 0.0).to(tl.float32)
    m_y = (touched | (m_m & (accumulate == 0)))[:, None] & m_n[None, :]
    tl.store(to, rounded(acc, p_y.dtype.element_ty), m_y)


class Batch(NamedTuple):
    """Which adapters each row has. ids int32 [n, k]; weights float32 [n, k] or None."""

    adapters: Adapters
    ids: torch.Tensor
    weights: torch.Tensor | None
    transposed: bool = False  # s Aᵀ Bᵀ in place of s B A

    @property
    def rank_stride(self) -> int:
        """From slice to slice in the partial h, so that each of its ranks has a place."""
        return cdiv(max(self.adapters.max_rank, 1), BLOCK_R) * BLOCK_R

    @property
    def strides(self) -> tuple[int, ...]:
        """Of ids [2] and of weights [2]."""
        of_weights = (0, 0) if self.weights is None else self.weights.stride()
        return (*self.ids.stride(), *of_weights)


class Tiling(NamedTuple):
    """rows: of a block; block_m: the same, at least what a matrix instruction takes."""

    rows: int
    block_m: int
    block_n: int


def tiling(n: int) -> Tiling:
    """Neither of these changes the order in which a row is summed."""
    return Tiling(1, 16, COLUMNS) if n <= 256 else Tiling(32, 32, COLUMNS)


class Choice(NamedTuple):
    """Of both launches; rows as in ``Tiling``, of which blocks of 16 and 32 take the same matrix
    instruction."""

    rows: int
    columns: int
    warps: int
    stages: int

    @property
    def tile(self) -> Tiling:
        return Tiling(self.rows, max(self.rows, 16), self.columns)

    @property
    def shrink(self) -> Config:
        return SHRINK._replace(num_warps=self.warps, num_stages=self.stages)


def _heuristic(index: int | None, n: int, *case: Any) -> Choice:
    tile = tiling(n)
    return Choice(tile.rows, tile.block_n, SHRINK.num_warps, SHRINK.num_stages)


SPACE = tuple(
    Choice(*tile, *shrink)
    for tile, shrink in product(
        ((1, 64), (1, COLUMNS), (16, 64), (32, 64), (32, COLUMNS)), ((4, 2), (4, 3), (8, 3))
    )
)
TILING = Tunable(
    "batched_lora_delta",
    ("x", "w", "in", "out", "rank", "places", "transposed"),
    _heuristic,
    lambda *case: SPACE,
)


def choice(x: torch.Tensor, batch: Batch) -> Choice:
    """For these rows and adapters."""
    a, (n, k) = batch.adapters, batch.ids.shape
    found: Choice = TILING.choose(
        x.device.index, n, x.dtype, a.arena.dtype, a.in_features, a.outs, a.max_rank, k,
        batch.transposed,
    )  # fmt: skip
    return found


def shrink(x: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, int]:
    """The partial h of every row and adapter [n, k, splits, slices, rank_stride], and splits."""
    a, (n, k) = batch.adapters, batch.ids.shape
    splits, span = spans(max(a.outs) if batch.transposed else a.in_features)
    slices, rank_stride = len(a.outs), batch.rank_stride
    h = scratch("h", x, n * k * splits * slices * rank_stride, torch.float32)
    chosen, how = choice(x, batch), precision(x.dtype, a.arena.dtype)
    tile = chosen.tile
    grid = cdiv(n, tile.rows), splits, k * slices * (rank_stride // BLOCK_R)
    launch(
        _shrink, grid, (x, batch.ids, h, a.arena, a.offsets, a.ranks, a.firsts, a.flag),
        (n, k, a.ranks.shape[0], rank_stride, slices, int(batch.transposed)),
        (a.in_features, splits, span, *x.stride(),
         *batch.ids.stride()),
        (tile.rows, tile.block_m, BLOCK_R, block_k(how), how), chosen.shrink,
    )  # fmt: skip
    return h, splits


def batched_lora_delta(x: torch.Tensor, batch: Batch, out: torch.Tensor, accumulate: bool) -> None:
    """x [n, in] and out [n, out] of one dtype, in any strides."""
    a, (n, k) = batch.adapters, batch.ids.shape
    h, splits = shrink(x, batch)
    tile = choice(x, batch).tile
    outs = (a.in_features,) if batch.transposed else a.outs
    weights = a.scalings if batch.weights is None else batch.weights
    launch(
        _expand, (cdiv(n, tile.rows), sum(cdiv(o, tile.block_n) for o in outs), 1),
        (out, batch.ids, weights, h, a.arena, a.offsets, a.ranks, a.scalings, a.firsts),
        (n, k, int(batch.weights is not None), a.ranks.shape[0], batch.rank_stride,
         int(accumulate), len(a.outs), int(batch.transposed)),
        (a.in_features, splits, *out.stride(),
         *batch.strides),
        (*tile, BLOCK_R, precision(x.dtype, a.arena.dtype)), expand_config(tile.block_m),
    )  # fmt: skip


def variants_of(chosen: Choice, x: torch.dtype, w: torch.dtype, device: Device) -> Variants:
    """What that choice launches, at 4096 features."""
    (splits, span), tile = spans(4096), chosen.tile
    how, names = precision(x, w), (FLOATS[x], FLOATS[w])
    matrix = how != "ieee" or device.backend == "hip"
    name = f"batched_lora_delta-{names[0]}-{names[1]}-{tile.rows}"
    yield Variant(
        f"{name}-{chosen.warps}x{chosen.stages}-shrink", _shrink,
        (names[0], "i32", "fp32", names[1], "i64", "i32", "i32", "i64"), ("i32",) * 6,
        (4096, splits, span, 4096, 1, 1, 1),
        (tile.rows, tile.block_m, BLOCK_R, block_k(how), how), chosen.shrink, matrix,
    )  # fmt: skip
    yield Variant(
        f"{name}-{tile.block_n}-expand", _expand,
        (names[0], "i32", "fp32", "fp32", names[1], "i64", "i32", "fp32", "i32"),
        ("i32",) * 8, (4096, splits, 4096, 1, 1, 1, 1, 1),
        (*tile, BLOCK_R, how), expand_config(tile.block_m), matrix,
    )  # fmt: skip


def variants(device: Device) -> Variants:
    """All that ``batched_lora_delta`` can launch untuned."""
    for x, w, n in product(FLOATS, FLOATS, (1, 4096)):
        yield from variants_of(_heuristic(None, n), x, w, device)


def tuned_variants(device: Device) -> Variants:
    """All that it can launch tuned."""
    for x, w, chosen in product(FLOATS, FLOATS, SPACE):
        yield from variants_of(chosen, x, w, device)
