"""Op 7 in delta form: the proximal step for a Fisher information u vᵀ of ΔW, block by block.

Of one factor, theta [r, width] as it is stored, with the other one N and its anchor N*, both
[r, other width]: G = N W Nᵀ, C = N* W Nᵀ with W the Fisher weights of the other side, and then
column by column, with t_j = lr c s² (the weight of column j),

    (I + t_j G) theta_j = theta_j' + t_j Cᵀ theta*_j,   theta' : after the step without EWC.

B first (columns are its rows, W = diag v, N = A), then A (W = diag u, N = Bᵀ as stored).

The systems of all columns share G, so it is reduced once to a tridiagonal T = Qᵀ G Q by
Householder's reflections (Golub and Van Loan, Matrix Computations, 8.3.1), and each column takes
y = Qᵀ right side, one elimination of (I + t T) z = y, theta = Q z. I + t T is symmetric with no
eigenvalue below 1, where elimination without pivoting is stable. Against an eigendecomposition:
no iteration, so a fixed number of operations. All of it in float64: t times the largest
eigenvalue of G reaches 1e8, of which float32 would leave nothing in the directions that G does
not see.

Three launches a block: ``_gram``, ``_tridiagonal``, ``_solve``. G, C and Q live in the record.

A block of ``_solve`` holds 4, 32 or 256 ranks, the least that covers the largest in the pool:
another adapter's rank can so change the order of a float64 sum, before the rounding to storage.

Roofline on an H200, bfloat16 weights, in = out = 4096, records in float32, a row of bfloat16 a
user. A user with rank r reads its anchors 4 r (in + out) and u and v 4 (in + out) twice, weights
2 r (in + out) twice and writes them once; x and grad are copied to float32, 10 (in + out). For
each of its in + out columns, 8 r R float64 operations in ``_solve`` with R the ranks of its
block, 4 r R' in ``_gram`` with r rounded up to 4 or by 16, at 34 TFLOP/s: no matrix units.
256 users, r = 2: 59 MB, 17 of u and v, 21 of x and grad, 23 us at 4.3 TB/s; 0.2 GFLOP, 6 us;
expected 70 us, launches and the latency of few columns a block. 256 users, r = 16: 470 MB, 17 and
21, 118 us; 2.1 M columns of 5,120 operations, 10.7 GFLOP, 0.32 ms; expected 0.8 ms, bound by the
exchanges between threads inside ``_solve``. One user, r = 16: bound by latency; expected 100 us,
most of it the 14 reflections. Ranks above 64 are right and not fast.
"""

from __future__ import annotations

from itertools import product

import triton
import triton.language as tl

from .gradient import (
    WIDTHS,
    Samples,
    elements_before,
    factor,
    row_of,
    splits_of,
    strides_of,
    unit_of,
    vectors,
)
from .launch import FLOATS, Config, Device, Variant, Variants, cdiv, launch
from .lora_delta import spans
from .rounding import rounding_key, seed_words, stored
from .steps import Outcome, Step, record_of
from .storage import Adapters


@triton.jit
def _learner(p_keys, p_runs, p_outcomes, p_ranks, p_epochs, p_records, records, p, s, slices):
    """(slot, rank of its slice s, address of its record): rank 0 where there is nothing to do."""
    start = tl.load(p_runs + 4 * p.to(tl.int64))
    leads = start == p
    leads &= tl.load(p_outcomes + p, leads, 0) == 1
    slot = tl.load(p_keys + p, leads, 0)
    address = record_of(p_records, p_epochs, records, slot)
    rank = tl.load(p_ranks + slot.to(tl.int64) * slices + s)
    return slot, tl.where(leads & (address != 0), rank, 0), address


@triton.jit
def _work(address, p_ranks, slot, s, slices):
    """Of a record: G of slice s, float64 (C and Qᵀ follow it), and the float32 part."""
    before, total = slot.to(tl.int64) * 0, slot.to(tl.int64) * 0
    for i in range(slices):
        rank = tl.load(p_ranks + slot.to(tl.int64) * slices + i).to(tl.int64)
        before += tl.where(i < s, 3 * rank * rank, 0)
        total += 3 * rank * rank
    p_work = address.to(tl.pointer_type(tl.float64))
    return p_work + before, (address + 8 * total).to(tl.pointer_type(tl.float32))


@triton.jit
def _weights_of(p_floats, p_ranks, p_firsts, slot, z, in_features, slices):
    """Where the Fisher weights of the columns of factor z are: v for A, u for B."""
    elements = elements_before(p_ranks, p_firsts, slot, slices, in_features, slices)
    out = tl.load(p_firsts + slices)
    p_u = p_floats + elements + tl.load(p_firsts + z // 2)
    p_v = p_floats + elements + out + (z // 2).to(tl.int64) * in_features
    return tl.where(z % 2 == 0, p_v, p_u)


@triton.jit(do_not_specialize=["records", "side"])
def _gram(
    p_keys, p_runs, p_outcomes, p_arena, p_offsets, p_ranks, p_epochs, p_firsts, p_records, records,
    side, in_features, unit, slices,
):  # fmt: skip
    """A row of G and of C for the block of factor ``side``; grid (pairs, ranks, slices)."""
    p, i, s = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    slot, rank, address = _learner(
        p_keys, p_runs, p_outcomes, p_ranks, p_epochs, p_records, records, p, s, slices
    )
    if i >= rank:
        return
    z = 2 * s + 1 - side
    _, width, _, element = factor(p_ranks, p_firsts, slot, z, in_features, unit, slices)
    p_g, p_floats = _work(address, p_ranks, slot, s, slices)
    p_c = p_g + rank.to(tl.int64) * rank
    offset = tl.multiple_of(tl.load(p_offsets + slot.to(tl.int64) * slices + s), 16)
    p_own = p_arena + offset + (z % 2) * rank.to(tl.int64) * in_features
    p_star = p_floats + element
    p_w = _weights_of(p_floats, p_ranks, p_firsts, slot, z, in_features, slices)
    if rank <= 4:
        _products(p_own, p_star, p_w, p_g, p_c, i, rank, width, 4, 256)
    else:
        _products(p_own, p_star, p_w, p_g, p_c, i, rank, width, 16, 64)


@triton.jit
def _products(
    p_own, p_star, p_w, p_g, p_c, i, rank, width, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr
):
    """G_i = sum_c own_i w own_j and C_i = sum_c star_i w own_j for all j, over columns c."""
    at = i.to(tl.int64) * width
    for r0 in range(0, rank, BLOCK_R):
        i_r = r0 + tl.arange(0, BLOCK_R)
        m_r = i_r < rank
        b_g = tl.zeros((BLOCK_R, BLOCK_C), tl.float64)
        b_c = tl.zeros((BLOCK_R, BLOCK_C), tl.float64)
        for c0 in range(0, width, BLOCK_C):
            i_c = c0 + tl.arange(0, BLOCK_C)[None, :]
            m_c = i_c < width
            b_w = tl.load(p_w + i_c, m_c, 0.0).to(tl.float64)
            b_own = tl.load(p_own + at + i_c, m_c, 0.0).to(tl.float64)
            b_star = tl.load(p_star + at + i_c, m_c, 0.0).to(tl.float64)
            b_n = tl.load(
                p_own + i_r.to(tl.int64)[:, None] * width + i_c, m_r[:, None] & m_c, 0.0
            ).to(tl.float64)  # [BLOCK_R, BLOCK_C]
            b_g += (b_w * b_own) * b_n
            b_c += (b_w * b_star) * b_n
        to = i.to(tl.int64) * rank + i_r
        tl.store(p_g + to, tl.sum(b_g, 1), m_r)
        tl.store(p_c + to, tl.sum(b_c, 1), m_r)


@triton.jit(do_not_specialize=["records"])
def _tridiagonal(
    p_keys, p_runs, p_outcomes, p_ranks, p_epochs, p_records, records, slices,
    BLOCK_R: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """G <- Qᵀ G Q, tridiagonal, and Qᵀ; ROWS rows at a time; grid (pairs, 1, slices)."""
    p, s = tl.program_id(0), tl.program_id(2)
    _slot, rank, address = _learner(
        p_keys, p_runs, p_outcomes, p_ranks, p_epochs, p_records, records, p, s, slices
    )
    p_g, _ = _work(address, p_ranks, _slot, s, slices)
    p_q = p_g + 2 * rank.to(tl.int64) * rank
    i = tl.arange(0, BLOCK_R)
    m_i = i < rank
    for first in range(0, rank, ROWS):
        j = first + tl.arange(0, ROWS)
        one = (j[:, None] == i[None, :]).to(tl.float64)
        tl.store(p_q + j[:, None] * rank + i[None, :], one, (j < rank)[:, None] & m_i[None, :])
    tl.debug_barrier()
    for k in range(rank - 2):
        # The reflection I - 2 w wᵀ that leaves of row k only the element beside the diagonal.
        b_row = tl.load(p_g + k * rank + i, m_i & (i > k), 0.0)
        size = tl.sqrt(tl.sum(b_row * b_row, 0))
        beside = tl.sum(tl.where(i == k + 1, b_row, 0.0), 0)
        b_w = b_row - tl.where(i == k + 1, tl.where(beside > 0, -size, size), 0.0)
        length = tl.sqrt(tl.sum(b_w * b_w, 0))
        b_w = b_w / tl.where(length > 0, length, 1.0)
        b_gw = tl.zeros((BLOCK_R,), tl.float64)
        b_qw = tl.zeros((BLOCK_R,), tl.float64)
        for first in range(0, rank, ROWS):
            j = first + tl.arange(0, ROWS)
            m = (j < rank)[:, None] & m_i[None, :]
            w_j = tl.sum(tl.where(j[:, None] == i[None, :], b_w[None, :], 0.0), 1)
            at = j[:, None] * rank + i[None, :]
            b_gw += tl.sum(tl.load(p_g + at, m, 0.0) * w_j[:, None], 0)
            b_qw += tl.sum(tl.load(p_q + at, m, 0.0) * w_j[:, None], 0)
        b_gw -= tl.sum(b_gw * b_w, 0) * b_w
        tl.debug_barrier()
        for first in range(0, rank, ROWS):
            j = first + tl.arange(0, ROWS)
            m = (j < rank)[:, None] & m_i[None, :]
            same = j[:, None] == i[None, :]
            w_j = tl.sum(tl.where(same, b_w[None, :], 0.0), 1)[:, None]
            gw_j = tl.sum(tl.where(same, b_gw[None, :], 0.0), 1)[:, None]
            at = j[:, None] * rank + i[None, :]
            b_g = tl.load(p_g + at, m, 0.0)
            tl.store(p_g + at, b_g - 2.0 * (w_j * b_gw[None, :] + gw_j * b_w[None, :]), m)
            b_q = tl.load(p_q + at, m, 0.0)
            tl.store(p_q + at, b_q - 2.0 * w_j * b_qw[None, :], m)
        tl.debug_barrier()


@triton.jit
def _eliminated(b_right, b_t, p_g, p_q, rank, i, m_i, BLOCK_R: tl.constexpr, COLUMNS: tl.constexpr):
    """Q (I + t T)⁻¹ Qᵀ b_right, column by column: [BLOCK_R, COLUMNS] float64."""
    b_d = tl.zeros((BLOCK_R, COLUMNS), tl.float64)
    b_u = tl.zeros((BLOCK_R, COLUMNS), tl.float64)
    d = tl.zeros((COLUMNS,), tl.float64)
    u = tl.zeros((COLUMNS,), tl.float64)
    beside = tl.zeros((COLUMNS,), tl.float64)
    for j in range(rank):
        b_q = tl.load(p_q + j * rank + i, m_i, 0.0)
        y = tl.sum(b_q[:, None] * b_right, 0)
        pivot = 1.0 + b_t * tl.load(p_g + j * rank + j) - beside * u
        d = (y - beside * d) / pivot
        beside = b_t * tl.load(p_g + j * rank + j + 1, j + 1 < rank, 0.0)
        u = beside / pivot
        here = (i == j)[:, None]
        b_d = tl.where(here, d[None, :], b_d)
        b_u = tl.where(here, u[None, :], b_u)
    b_theta = tl.zeros((BLOCK_R, COLUMNS), tl.float64)
    z = tl.zeros((COLUMNS,), tl.float64)
    for back in range(rank):
        j = rank - 1 - back
        here = (i == j)[:, None]
        z = tl.sum(tl.where(here, b_d, 0.0), 0) - tl.sum(tl.where(here, b_u, 0.0), 0) * z
        b_theta += tl.load(p_q + j * rank + i, m_i, 0.0)[:, None] * z[None, :]
    return b_theta


@triton.jit(
    do_not_specialize=[
        "buffered", "scale", "pair_stride", "ranks", "records", "side", "tiles", "lr", "decay",
        "pull", "max_norm", "seed_low", "seed_high",
    ]
)  # fmt: skip
def _solve(
    p_x, p_grad, p_keys, p_runs, p_outcomes, p_norms, p_arena, p_offsets, p_ranks,
    p_scalings, p_versions, p_epochs, p_firsts, p_f, p_buffer, p_records,
    buffered, scale, pair_stride, ranks, records, side, tiles, lr, decay, pull, max_norm, seed_low,
    seed_high, in_features, unit, slices, stride_xn, stride_gn, splits,
    BLOCK_R: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """COLUMNS columns of factor ``side`` of each slice; grid (pairs * tiles, 1, slices)."""
    p, tile, s = tl.program_id(0) // tiles, tl.program_id(0) % tiles, tl.program_id(2)
    slot, rank, address = _learner(
        p_keys, p_runs, p_outcomes, p_ranks, p_epochs, p_records, records, p, s, slices
    )
    z = 2 * s + side
    _, width, first, element = factor(p_ranks, p_firsts, slot, z, in_features, unit, slices)
    c_first = tile * COLUMNS
    if (rank == 0) | (c_first >= width):
        return
    i_c = c_first + tl.arange(0, COLUMNS)
    m_c = i_c < width
    i_r = tl.arange(0, BLOCK_R)
    m_r = i_r < rank
    m = m_r[:, None] & m_c[None, :]
    i = i_r.to(tl.int64)[:, None] * width + i_c[None, :]
    if buffered:
        b_g = scale * tl.load(p_buffer + element + i, m, 0.0)
    else:
        b_g = tl.zeros((BLOCK_R, COLUMNS), tl.float32)
        for q in range(p, tl.load(p_runs + 4 * p.to(tl.int64) + 1)):
            row = row_of(p_runs, q)
            p_r = p_f + q * pair_stride.to(tl.int64) + (z ^ 1) * splits * ranks + i_r
            b_f = tl.load(p_r, m_r, 0.0)
            for split in range(1, splits):
                b_f += tl.load(p_r + split * ranks, m_r, 0.0)
            b_v = vectors(
                p_x, p_grad, z, row, stride_xn, stride_gn, first, i_c[None, :], m_c[None, :]
            )
            b_g += b_f[:, None] * b_v
    norm = tl.load(p_norms + p)
    clip = tl.where(
        (max_norm > 0) & (norm > max_norm), max_norm / tl.where(norm > 0, norm, 1.0), 1.0
    )
    offset = tl.multiple_of(tl.load(p_offsets + slot.to(tl.int64) * slices + s), 16)
    p_own = p_arena + offset + (z % 2) * rank.to(tl.int64) * in_features
    b_old = tl.load(p_own + i, m, 0.0).to(tl.float32)
    b_right = (decay * b_old - lr * clip.to(tl.float32) * b_g).to(tl.float64)
    p_g, p_floats = _work(address, p_ranks, slot, s, slices)
    p_c = p_g + rank.to(tl.int64) * rank
    p_w = _weights_of(p_floats, p_ranks, p_firsts, slot, z, in_features, slices)
    scaling = tl.load(p_scalings + slot).to(tl.float64)
    b_t = pull * scaling * scaling * tl.load(p_w + i_c, m_c, 0.0).to(tl.float64)
    p_star = p_floats + element
    for j in range(rank):
        b_star = tl.load(p_star + j * width.to(tl.int64) + i_c, m_c, 0.0).to(tl.float64)
        b_c = tl.load(p_c + j * rank + i_r, m_r, 0.0)
        b_right += b_c[:, None] * (b_t * b_star)[None, :]
    b_new = _eliminated(
        b_right, b_t, p_g, p_c + rank.to(tl.int64) * rank, rank, i_r, m_r, BLOCK_R, COLUMNS
    )
    key_low, key_high = rounding_key(seed_low, seed_high, slot, tl.load(p_versions + slot))
    dtype: tl.constexpr = p_arena.dtype.element_ty
    b_new = stored(b_new.to(tl.float32), dtype, (element + i).to(tl.uint32), key_low, key_high)
    tl.store(p_own + i, b_new, m)


CONFIG = Config(4, 1, fp_fusion=False, registers=255)
REDUCE = Config(2, 1, fp_fusion=False)
BLOCKS = (4, 32, 256)  # ranks of a block
WIDEST = BLOCKS[-1]
TILE = 1024  # elements


def block_of(adapters: Adapters) -> int:
    """Records are of WIDEST ranks at most, whatever else the pool has."""
    return next(b for b in BLOCKS if b >= min(adapters.max_rank, WIDEST))


def work_elements(ranks: tuple[int, ...]) -> int:
    """float64 numbers at the head of a record: G, C and Qᵀ of each slice."""
    return sum(3 * r * r for r in ranks)


def solve(adapters: Adapters, samples: Samples, made: Outcome, step: Step) -> None:
    """The step of every slot that learned and has a record, in the delta form."""
    a, runs, records = adapters, samples.runs, step.records
    assert records is not None
    x, grad = samples.x.float(), samples.grad.float()
    block, slices, table = block_of(a), len(a.outs), records.table
    shape = a.in_features, unit_of(a), slices
    for side in (1, 0) if step.train_A else (1,):
        launch(
            _gram, (runs.pairs, max(a.max_rank, 1), slices),
            (runs.keys, runs.table, made.outcomes, a.arena, a.offsets, a.ranks, a.epochs, a.firsts,
             table),
            (table.shape[0], side), shape, (), CONFIG,
        )  # fmt: skip
        launch(
            _tridiagonal, (runs.pairs, 1, slices),
            (runs.keys, runs.table, made.outcomes, a.ranks, a.epochs, table), (table.shape[0],),
            (slices,), (block, min(block, TILE // 2 // block)), REDUCE,
        )  # fmt: skip
        width = max(a.outs) if side else a.in_features
        lr, decay = (step.lr_B, step.decay_B) if side else (step.lr_A, step.decay_A)
        tiles = cdiv(width, TILE // block)
        launch(
            _solve, (runs.pairs * tiles, 1, slices),
            (x, grad, runs.keys, runs.table, made.outcomes, made.norms, a.arena,
             a.offsets, a.ranks, a.scalings, a.versions, a.epochs, a.firsts, samples.f,
             samples.f if samples.buffer is None else samples.buffer, table),
            (int(samples.buffer is not None), samples.scale, *strides_of(a), table.shape[0],
             side, tiles, lr, decay, lr * records.penalty, step.max_norm, *seed_words(step.seed)),
            (*shape, x.stride(0), grad.stride(0), splits_of(a)), (block, TILE // block), CONFIG,
        )  # fmt: skip


def variants(device: Device) -> Variants:
    """All that ``solve`` can launch, at 4096 features."""
    splits = spans(4096)[0]
    for block in BLOCKS:
        yield Variant(
            f"ewc_delta-tridiagonal-{block}", _tridiagonal,
            ("i32", "i32", "i32", "i32", "i64", "i64"), ("i32",), (1,),
            (block, min(block, TILE // 2 // block)), REDUCE, False,
        )  # fmt: skip
    for w, widths in product(FLOATS, WIDTHS):
        name = FLOATS[w]
        yield Variant(
            f"ewc_delta-gram-{name}-{widths.name}", _gram,
            ("i32", "i32", "i32", name, "i64", "i32", "i64", "i32", "i64"), ("i32", "i32"),
            (4096, *widths[1:]), (), CONFIG, False,
        )  # fmt: skip
        for block in BLOCKS:
            yield Variant(
                f"ewc_delta-solve-{name}-{block}-{widths.name}", _solve,
                ("fp32", "fp32", "i32", "i32", "i32", "fp64", name, "i64", "i32", "fp32",
                 "i64", "i64", "i32", "fp32", "fp32", "i64"),
                ("i32", "fp32", *("i32",) * 5, *("fp32",) * 4, "i32", "i32"),
                (4096, *widths[1:], 4096, 4096, splits), (block, TILE // block), CONFIG, False,
            )  # fmt: skip
