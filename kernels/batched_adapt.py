"""Op 3, batched_adapt: one step for every adapter that the rows name, nothing read back.

A chain of launches: ``_keys`` (slots of pairs), a sort, ``_runs`` (which positions are one
adapter's), ``_project`` (h = A x and Bᵀ grad), ``_squares`` (the gradients' norms, whose tiles are
computed and dropped), ``_update`` (the same tiles again, clipped and stepped), ``_finish``
(versions, outcomes of rows). The grid has a place for every
pair; all but an adapter's first leave at once. A tile goes over the ranks of its own adapter, so
that rank 1 costs nothing of rank 256 beside it.

The gradient is the sum of the products of few numbers (f, one a pair and rank) with rows of x or
grad. Computing it twice reads x, grad and f twice, from L2; keeping it would write and read 4
bytes a weight. Rows of a long run are multiplied by groups of 16, in float32 throughout (no tf32:
the gradient keeps what the weights' dtype keeps).

Roofline on an H200 (4.3 TB/s), in = out = 4096, one slice. Bytes: weights read twice (once for f,
once for the step) and written once, 6 r (in + out) an adapter in bfloat16, 12 in float32; x and
grad three times, once from memory; with a factor record 8 more a weight. 256 users of one row,
r = 2, float32: 50 MB and 8 MB, 14 us; expected 45 us: 3 us a launch for latency and early
leavers, 10 us for the sort. The same in bfloat16: 25 + 4 MB, 7 us; expected 35 us. 64 users, r =
16, bfloat16: 50 MB and 1 MB, 12 us; expected 45 us. 4096 rows of 8 adapters, r = 16, bfloat16:
6 MB and 67 MB, 17 us; the gradients are 2 * 2 n r (in + out) = 2.1 GFLOP in float32 without
matrix instructions, 60 us at half of 67 TFLOP/s, in few blocks (2 * 8 tiles an adapter): expected
400 us, bound by the latency of one run's chain of rows. Long runs are this file's weak place.
"""

from __future__ import annotations

from itertools import product

import torch
import triton
import triton.language as tl

from .ewc_delta import solve
from .gradient import (
    GROUP,
    HALF,
    TILE,
    WIDTHS,
    Samples,
    by_groups,
    elements_before,
    factor,
    few_rows,
    many_rows,
    norm_of,
    project_rows,
    splits_of,
    square_sums,
    strides_of,
    tiles_of,
    unit_of,
)
from .launch import FLOATS, Config, Device, Variant, Variants, launch, scratch
from .lora_delta import spans
from .rounding import rounding_key, seed_words, stored
from .runs import find_runs, finish, one_run
from .steps import Outcome, Step, record_of
from .storage import Adapters


@triton.jit
def _learn(
    p_weights, p_kept, p_fisher, p_anchor, b_g, i, m, i_element, decay, coef, pull, learns,
    penalized, history, key_low, key_high,
):  # fmt: skip
    """The step of elements i with gradient b_g; what was there goes to p_kept first."""
    b_old = tl.load(p_weights + i, m, 0.0)
    if history:
        tl.store(p_kept + i, b_old, m)
    if learns:
        b_new = decay * b_old.to(tl.float32) - coef * b_g
        if penalized:
            b_pull = pull * tl.load(p_fisher + i, m, 0.0)
            b_new += b_pull * tl.load(p_anchor + i, m, 0.0)
            b_new = tl.div_rn(b_new, 1.0 + b_pull)
        dtype: tl.constexpr = p_weights.dtype.element_ty
        tl.store(p_weights + i, stored(b_new, dtype, i_element, key_low, key_high), m)


@triton.jit(
    do_not_specialize=[
        "buffered", "scale", "train_A", "pair_stride", "ranks", "lr_A", "lr_B", "decay_A",
        "decay_B", "max_norm", "reach", "largest", "seed_low", "seed_high", "history", "records",
        "penalty_A", "penalty_B", "apart",
    ]
)  # fmt: skip
def _update(
    p_x, p_grad, p_keys, p_runs, p_arena, p_offsets, p_ranks, p_versions, p_previous,
    p_epochs, p_firsts, p_f, p_buffer, p_squares, p_records, p_outcomes, p_norms,
    buffered, scale, train_A, pair_stride, ranks, lr_A, lr_B, decay_A, decay_B, max_norm, reach,
    largest, seed_low, seed_high, history, records, penalty_A, penalty_B, apart,
    in_features, unit, slices, stride_xn, stride_gn, splits,
):  # fmt: skip
    """The step of TILE columns of a factor; grid (pairs, tiles, 2 slices).

    apart: a slot with an EWC record is only copied to its history, and learns elsewhere.
    """
    p, tile, z = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    start = tl.load(p_runs + 4 * p.to(tl.int64))
    if start != p:
        return
    last = tl.load(p_runs + 4 * p.to(tl.int64) + 1)
    slot = tl.load(p_keys + p)
    norm = norm_of(
        p_squares, p_ranks, p_firsts, slot, p, train_A, tl.num_programs(1), in_features, slices
    )
    limited = norm
    if max_norm > 0:
        limited = tl.minimum(norm, max_norm)
    applies = (norm < float("inf")) & (reach * limited < largest)
    if (tile == 0) & (z == 0):
        total = 0
        for s in range(slices):
            total += tl.load(p_ranks + slot.to(tl.int64) * slices + s)
        tl.store(p_outcomes + p, tl.where(total == 0, 0, tl.where(applies, 1, 2)))
        tl.store(p_norms + p, norm)
    rank, width, first, element = factor(p_ranks, p_firsts, slot, z, in_features, unit, slices)
    c_first = tile * TILE
    if (c_first >= width) | (applies == 0):
        return
    clip = tl.where(limited < norm, limited / tl.where(norm > 0, norm, 1.0), 1.0).to(tl.float32)
    of_a = z % 2 == 0
    lr, decay = tl.where(of_a, lr_A, lr_B), tl.where(of_a, decay_A, decay_B)
    entry = slot.to(tl.int64) * slices + z // 2
    start_of = (z % 2) * rank.to(tl.int64) * in_features
    p_weights = p_arena + tl.multiple_of(tl.load(p_offsets + entry), 16) + start_of
    p_kept = p_arena + tl.multiple_of(tl.load(p_previous + entry, history != 0, 0), 16) + start_of
    address = record_of(p_records, p_epochs, records, slot)
    penalized = address != 0
    learns = ((z % 2 == 1) | (train_A != 0)) & ((apart == 0) | (penalized == 0))
    elements = elements_before(p_ranks, p_firsts, slot, slices, in_features, slices)
    p_fisher = address.to(tl.pointer_type(tl.float32)) + element
    p_anchor = p_fisher + elements
    pull = tl.where(of_a, penalty_A, penalty_B)
    key_low, key_high = rounding_key(seed_low, seed_high, slot, tl.load(p_versions + slot))
    if by_groups(start, last, rank, buffered):
        for r0 in range(0, rank, GROUP):
            i_r = r0 + tl.arange(0, GROUP)
            for c0 in range(c_first, tl.minimum(c_first + TILE, width), HALF):
                i_c = c0 + tl.arange(0, HALF)[None, :]
                b_g = many_rows(
                    p_x, p_grad, p_runs, p_f, start, last, z, i_r, i_r < rank, first, i_c,
                    i_c < width, stride_xn, stride_gn, pair_stride, splits, ranks,
                )  # fmt: skip
                i = i_r.to(tl.int64)[:, None] * width + i_c
                _learn(
                    p_weights, p_kept, p_fisher, p_anchor, b_g, i,
                    (i_r < rank)[:, None] & (i_c < width), (element + i).to(tl.uint32), decay,
                    lr * clip, pull, learns, penalized, history, key_low, key_high,
                )  # fmt: skip
    else:
        i_c = c_first + tl.arange(0, TILE)[None, :]
        for r in range(rank):
            b_g = few_rows(
                p_x, p_grad, p_runs, p_f, p_buffer, buffered, scale, start, last, z, r, first,
                width, element, i_c, i_c < width, stride_xn, stride_gn, pair_stride, splits,
                ranks,
            )  # fmt: skip
            i = r * width.to(tl.int64) + i_c
            _learn(
                p_weights, p_kept, p_fisher, p_anchor, b_g, i, i_c < width,
                (element + i).to(tl.uint32), decay, lr * clip, pull, learns, penalized, history,
                key_low, key_high,
            )  # fmt: skip


UPDATE = Config(4, 1, fp_fusion=False, registers=128)


def update(adapters: Adapters, samples: Samples, step: Step) -> Outcome:
    a, runs = adapters, samples.runs
    squares = square_sums(a, samples, step.train_A)
    outcomes = scratch("adapt_outcomes", samples.x, runs.pairs, torch.int32)
    norms = scratch("adapt_norms", samples.x, runs.pairs, torch.float64)
    history = a.previous.numel() > 0
    records = step.records
    penalty = 0.0 if records is None else records.penalty
    apart = records is not None and records.delta
    launch(
        _update, (runs.pairs, tiles_of(a), 2 * len(a.outs)),
        (*samples.pointers(), a.arena, a.offsets, a.ranks, a.versions,
         a.previous if history else a.offsets, a.epochs, a.firsts, samples.f,
         samples.f if samples.buffer is None else samples.buffer, squares,
         a.epochs if records is None else records.table, outcomes, norms),
        (int(samples.buffer is not None), samples.scale, int(step.train_A), *strides_of(a),
         step.lr_A, step.lr_B, step.decay_A, step.decay_B, step.max_norm, step.reach,
         3e4 if a.arena.dtype == torch.float16 else 1e38, *seed_words(step.seed), int(history),
         0 if records is None else records.table.shape[0], penalty * step.lr_A,
         penalty * step.lr_B, int(apart)),
        (a.in_features, unit_of(a), len(a.outs), samples.x.stride(0), samples.grad.stride(0),
         splits_of(a)),
        (), UPDATE,
    )  # fmt: skip
    made = Outcome(outcomes, norms)
    if apart:
        solve(a, samples, made, step)
    return made


def batched_adapt(
    adapters: Adapters,
    x: torch.Tensor,
    grad: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor | None,
    step: Step,
) -> torch.Tensor:
    """x [n, in], grad [n, out] of one dtype, ids int32 [n, k], weights float32 [n, k] or None.

    Returns uint8 [n]: 0 for a row without an adapter, 1 where it was learned from, 2 where an
    adapter of it stays as it was.
    """
    runs = find_runs(adapters, ids)
    samples = project_rows(adapters, x, grad, runs, weights, True)
    return finish(adapters, runs, update(adapters, samples, step).outcomes)


def adapt_slot(
    adapters: Adapters, x: torch.Tensor, grad: torch.Tensor, slot: int, step: Step
) -> Outcome:
    """The step of one slot, from rows that are all its own (at least one)."""
    runs = one_run(adapters, slot, x.shape[0], x)
    made = update(adapters, project_rows(adapters, x, grad, runs, None, True), step)
    finish(adapters, runs, made.outcomes)
    return made


def apply(
    adapters: Adapters, gradient: torch.Tensor, slot: int, scale: float, step: Step
) -> Outcome:
    """The step of one slot from ``scale`` times a gradient in the order of storage."""
    runs = one_run(adapters, slot, 1, gradient)
    row = gradient.unsqueeze(0)
    made = update(adapters, Samples(row, row, runs, gradient, gradient, scale), step)
    finish(adapters, runs, made.outcomes)
    return made


def gradient_of(
    adapters: Adapters, x: torch.Tensor, grad: torch.Tensor, slot: int, to: torch.Tensor
) -> torch.Tensor:
    """The sum of the gradient over rows to ``to`` [elements] float32; its norm, float64."""
    runs = one_run(adapters, slot, x.shape[0], x)
    square_sums(adapters, project_rows(adapters, x, grad, runs, None, False), True, to)
    norm: torch.Tensor = torch.linalg.vector_norm(to, dtype=torch.float64)
    return norm


def variants(device: Device) -> Variants:
    """The update, at 4096 features."""
    for x, w, widths in product(FLOATS, FLOATS, WIDTHS):
        names = FLOATS[x], FLOATS[w]
        yield Variant(
            f"adapt-update-{names[0]}-{names[1]}-{widths.name}", _update,
            (names[0], names[0], "i32", "i32", names[1], "i64", "i32", "i64", "i64", "i64",
             "i32", "fp32", "fp32", "fp64", "i64", "i32", "fp64"),
            ("i32", "fp32", "i32", "i32", "i32", *("fp32",) * 7, *("i32",) * 4, "fp32",
             "fp32", "i32"),
            (4096, *widths[1:], 4096, 4096, spans(4096)[0]), (), UPDATE, False,
        )  # fmt: skip
