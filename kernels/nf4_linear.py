"""Op 4, nf4_linear: y = x Wᵀ + bias + deltas from packed weights, and dX = dY W from the same.

One row: each weight is multiplied and summed in float32 (``_row``). More: tiles of W are
decoded in registers and multiplied as yᵀ = W xᵀ, so that W is the operand that matrix
instructions can take from registers (``_product``, also of the backward pass). W is never
in memory. Where there are too few tiles for the device the sum is split; the parts, and
with a pool the deltas, are added in order by ``_finish``, before the one rounding: the
products need then not be compiled for each dtype of a pool. Three launches with a pool, two
with a split sum, else one.

Roofline on an H200, 4096x4096 in blocks of 64, bfloat16: 8.4 MB of codes and 1 MB of absmax,
2.2 us at 4.3 TB/s, 3.5 us with an empty kernel. The machine code of the loops has 6 (one
row) to 7 instructions a weight, one of them for the load-store unit: 3.2 to 3.9 us of 4
instructions a cycle at 1.8 GHz and 132 SMs, which is what bounds few rows. One row: 5.2 us
expected, 1.5 times the floor. 16 rows: 4.2 us, parts of 2 MB through the L2 cache and a
second launch: 7.5 us expected; a dense bfloat16 matrix takes 9 (33.5 MB). 4096 rows: 137
GFLOP, 174 us at 790 TFLOP/s; each tile of 256 rows decodes W anew, 16 times 4 us, in part
beside the matrix instructions of the other block of an SM: 260 us expected. float16 goes
through tf32, at half that rate; float32 without matrix instructions, at 30 TFMA/s at best.
The backward pass: 64 rows (few rows take as long): 9.4 MB of W and 1 MB of grad and dX, 2.4 us,
decoded once, 4 us; 4 parts of 1 MB written and read again through the L2 and a second launch:
9 us expected. 4096 rows: 9.4 MB and 67 MB, 18 us; 174 us of products; each tile of 128 rows
decodes W anew, 32 times 4 us, and it goes through shared memory: 400 us expected. A pool's
deltas are added to dX by batched_lora_delta.
Deltas add their shrink, and parts of 8 n out bytes.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from itertools import product
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from . import batched_lora_delta as deltas
from .batched_lora_delta import Batch, add_deltas
from .launch import FLOATS, Config, Device, Variant, Variants, cdiv, device_of, launch, scratch
from .lora_delta import BLOCK_R
from .nf4 import (
    PACKED,
    Packed,
    codes_of,
    decode_any,
    decode_words,
    group_absmax,
    load_table,
    load_words,
)
from .nf4_forms import (
    ROW,
    TILING,
    Choice,
    Form,
    form_of,
    how_of,
    product_form,
    space,
    splits_of,
)
from .tiles import dot, precision, rounded


@triton.jit
def _bias(p_bias, kind, i_c, m_c):
    """float32 of a bias of any dtype; kind 0: none, 1: float32, 2: bfloat16, 3: float16."""
    b_bias = tl.zeros(i_c.shape, tl.float32)
    if kind == 1:
        b_bias = tl.load(p_bias.to(tl.pointer_type(tl.float32)) + i_c, m_c, 0.0)
    elif kind == 2:
        b_bias = tl.load(p_bias.to(tl.pointer_type(tl.bfloat16)) + i_c, m_c, 0.0).to(tl.float32)
    elif kind == 3:
        b_bias = tl.load(p_bias.to(tl.pointer_type(tl.float16)) + i_c, m_c, 0.0).to(tl.float32)
    return b_bias


@triton.jit(do_not_specialize=["shift", "nested", "offset", "kind", "direct"])
def _row(
    p_x, p_packed, p_scales, p_steps, p_table, p_bias, p_y, p_parts,
    shift, nested, offset, kind, direct, rows, cols, row_words, span, stride_xk, stride_yo,
    BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """One row y, or its parts [splits, rows]; aligned W; grid (rows / BLOCK_C, splits, 1)."""
    i_c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    split = tl.program_id(1)
    m_c = i_c < rows
    first, last = split * span, tl.minimum((split + 1) * span, cols)
    b_table = load_table(p_table)
    i_word = tl.multiple_of(first // 8, 4) + tl.arange(0, BLOCK_R // 8)
    end = tl.multiple_of(last // 8, 4)  # for wide loads
    b_next = load_words(p_packed, i_c, m_c, i_word, end, row_words)
    acc = tl.zeros((BLOCK_C, BLOCK_R // 32), tl.float32)
    for r0 in range(first, last, BLOCK_R):
        b_words = b_next
        i_word += BLOCK_R // 8
        b_next = load_words(p_packed, i_c, m_c, i_word, end, row_words)
        i_r = r0 + tl.arange(0, BLOCK_R)
        b_x = tl.load(p_x + i_r.to(tl.int64) * stride_xk, i_r < last, 0.0).to(tl.float32)
        b_xw = codes_of(b_words, b_table) * b_x[None, :]  # [BLOCK_C, BLOCK_R]
        b_sums = tl.sum(tl.reshape(b_xw, (BLOCK_C, BLOCK_R // 32, 32)), 2)
        acc += b_sums * group_absmax(
            p_scales, p_steps, p_table, i_c, m_c, r0, cols, shift, nested, offset, BLOCK_R // 32
        )
    b_y = tl.sum(acc, 1)  # [BLOCK_C]
    if direct:
        b_y += _bias(p_bias, kind, i_c, m_c)
        to = p_y + i_c.to(tl.int64) * stride_yo
        tl.store(to, rounded(b_y, p_y.dtype.element_ty), m_c)
    else:
        tl.store(p_parts + split * rows + i_c, b_y, m_c)


@triton.jit(do_not_specialize=["n", "shift", "nested", "offset", "kind", "direct"])
def _product(
    p_x, p_packed, p_scales, p_steps, p_table, p_bias, p_y, p_parts,
    n, shift, nested, offset, kind, direct, rows, cols, row_words, span,
    stride_xn, stride_xr, stride_yn, stride_yc,
    ALIGNED: tl.constexpr, TRANSPOSED: tl.constexpr, HOW: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """y [n, C] = x [n, R] Wᵀ, W [C, R]; TRANSPOSED: x W, W [R, C]; or parts [splits, n, C].

    Grid (n / BLOCK_M, C / BLOCK_C, splits).
    """
    c_first = tl.program_id(1) * BLOCK_C
    i_c = c_first + tl.arange(0, BLOCK_C)
    i_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    split = tl.program_id(2)
    features, length = rows, cols
    if TRANSPOSED:
        features, length = cols, rows
    m_c, m_m = i_c < features, i_m < n
    first, last = split * span, tl.minimum((split + 1) * span, length)
    b_table = load_table(p_table)
    x_rows = p_x + i_m.to(tl.int64) * stride_xn
    if ALIGNED:
        if TRANSPOSED:
            i_row = first + tl.arange(0, BLOCK_R)
            i_word = c_first // 8 + tl.arange(0, BLOCK_C // 8)
            b_next = load_words(p_packed, i_row, i_row < last, i_word, row_words, row_words)
        else:
            i_word = tl.multiple_of(first // 8, 4) + tl.arange(0, BLOCK_R // 8)
            end = tl.multiple_of(last // 8, 4)
            b_next = load_words(p_packed, i_c, m_c, i_word, end, row_words)
    if TRANSPOSED:
        acc = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    else:
        acc = tl.zeros((BLOCK_C, BLOCK_M), tl.float32)
    for r0 in range(first, last, BLOCK_R):
        i_r = r0 + tl.arange(0, BLOCK_R)
        m_r = i_r < last
        if TRANSPOSED:
            i_row, m_row, k0 = i_r, m_r, c_first
        else:
            i_row, m_row, k0 = i_c, m_c, r0
        if ALIGNED:  # the next words are under way while these are decoded
            b_words = b_next
            if TRANSPOSED:
                i_next = i_r + BLOCK_R
                b_next = load_words(p_packed, i_next, i_next < last, i_word, row_words, row_words)
            else:
                i_word += BLOCK_R // 8
                b_next = load_words(p_packed, i_c, m_c, i_word, end, row_words)
            b_w = decode_words(
                b_words, b_table, p_scales, p_steps, p_table, i_row, m_row, k0, cols, shift,
                nested, offset,
            )  # fmt: skip
        else:
            b_w = decode_any(
                p_packed, b_table, p_scales, p_steps, p_table, i_row, m_row, k0, cols, shift,
                nested, offset, BLOCK_C if TRANSPOSED else BLOCK_R,
            )  # fmt: skip
        at = x_rows[:, None] + i_r.to(tl.int64)[None, :] * stride_xr
        b_x = tl.load(at, m_m[:, None] & m_r[None, :], 0.0)  # [BLOCK_M, BLOCK_R]
        if HOW == "native" and b_x.dtype != tl.bfloat16:
            b_x = rounded(b_x.to(tl.float32), tl.bfloat16)
        if HOW == "native":
            b_w = rounded(b_w, tl.bfloat16)
        if TRANSPOSED:  # noqa: SIM108
            acc = dot(b_x, b_w, acc, HOW)
        else:
            acc = dot(b_w, tl.trans(b_x), acc, HOW)
    if not TRANSPOSED:
        acc = tl.trans(acc)  # [BLOCK_M, BLOCK_C]
    m_y = m_m[:, None] & m_c[None, :]
    if direct:
        acc += _bias(p_bias, kind, i_c, m_c)[None, :]
        to = p_y + i_m.to(tl.int64)[:, None] * stride_yn + i_c.to(tl.int64)[None, :] * stride_yc
        tl.store(to, rounded(acc, p_y.dtype.element_ty), m_y)
    else:
        part_rows = p_parts + (split.to(tl.int64) * n + i_m) * features
        tl.store(part_rows[:, None] + i_c[None, :], acc, m_y)


@triton.jit(
    do_not_specialize=["n", "kind", "parts", "k", "weighted", "slots", "rank_stride", "slices"]
)
def _finish(
    p_y, p_bias, p_parts, p_ids, p_weights, p_h, p_arena, p_offsets, p_ranks, p_scalings, p_firsts,
    n, kind, parts, k, weighted, slots, rank_stride, slices, features, in_features, splits,
    stride_yn, stride_yc, stride_in, stride_ik, stride_wn, stride_wk,
    ROWS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """y [n, C]: the parts in order, the bias, then the deltas (k = 0: none).

    Grid (rows / ROWS, C / BLOCK_C, 1).
    """
    lane = tl.arange(0, BLOCK_M)
    i_m = tl.program_id(0) * ROWS + lane
    m_m = (lane < ROWS) & (i_m < n)
    c_first = tl.program_id(1) * BLOCK_C
    i_c = c_first + tl.arange(0, BLOCK_C)
    m_c = i_c < features
    m_y = m_m[:, None] & m_c[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    for part in range(parts):
        part_rows = p_parts + (part * n.to(tl.int64) + i_m) * features
        acc += tl.load(part_rows[:, None] + i_c[None, :], m_y, 0.0)
    acc += _bias(p_bias, kind, i_c, m_c)[None, :]
    acc, _touched = add_deltas(
        acc, lane < 0, p_ids, p_weights, p_h, p_arena, p_offsets, p_ranks, p_scalings, p_firsts,
        i_m, m_m, i_c, c_first, k, weighted, slots, rank_stride, in_features, slices, 0,
        splits, stride_in, stride_ik, stride_wn, stride_wk, BLOCK_M, BLOCK_C, BLOCK_R, PRECISION,
    )  # fmt: skip
    to = p_y + i_m.to(tl.int64)[:, None] * stride_yn + i_c.to(tl.int64)[None, :] * stride_yc
    tl.store(to, rounded(acc, p_y.dtype.element_ty), m_y)


FINISH = {1: Config(4, 1, registers=168), 32: Config(8, 1, registers=168)}  # by rows of a block
KINDS = {torch.float32: 1, torch.bfloat16: 2, torch.float16: 3}


class Target(NamedTuple):
    """Where a product goes: y [n, C] in any strides. bias: [C] of any dtype, or None."""

    y: torch.Tensor
    bias: torch.Tensor | None = None
    batch: Batch | None = None

    def bias_of(self, w: Packed) -> tuple[torch.Tensor, int]:
        """The bias as bytes, and its kind."""
        if self.bias is None:
            return w.codes, 0
        return self.bias.contiguous().view(torch.uint8), KINDS[self.bias.dtype]


def _multiply(
    x: torch.Tensor, w: Packed, to: Target, compute: str | None, transposed: bool
) -> None:
    """x Wᵀ or x W: one launch, or parts that are finished by another."""
    n, (features, length) = x.shape[0], to.y.shape[1:] + x.shape[1:]
    if n == 0:
        return
    how = how_of(x.dtype, compute, w.aligned)
    row = n == 1 and w.aligned and not transposed
    device = device_of(x.device.index)
    form = ROW if row else form_of(n, x.dtype, how, w.aligned, transposed, device)
    splits, span = splits_of(form, n, features, length, device.processors)
    if not transposed:
        chosen: Choice = TILING.choose(
            x.device.index, n, x.dtype, how, w.cols, w.rows, 1 << w.shift, w.nested
        )
        form = chosen.form(form)
    direct = splits == 1 and to.batch is None
    parts = w.scales if direct else scratch("parts", x, splits * n * features, torch.float32)
    bias, kind = to.bias_of(w)
    pointers, sizes = (x, *w.pointers, bias, to.y, parts), (*w.sizes, kind, int(direct))
    shape = w.rows, w.cols, w.cols // 8, span
    if row:
        launch(
            _row, (cdiv(features, form.block_c), splits, 1), pointers, sizes,
            (*shape, x.stride(1), to.y.stride(1)), (form.block_c, form.block_r), form.config,
        )  # fmt: skip
    else:
        launch(
            _product, (cdiv(n, form.block_m), cdiv(features, form.block_c), splits), pointers,
            (n, *sizes), (*shape, *x.stride(), *to.y.stride()),
            (w.aligned, transposed, how, *form[:3]), form.config,
        )  # fmt: skip
    if not direct:
        _add_parts(x, to, parts, splits, bias, kind)


@cache
def _nothing(device: torch.device) -> tuple[torch.Tensor, ...]:
    """What stands for the tables of a pool where there is none."""
    dtypes = torch.int32, torch.int64, torch.float32
    return tuple(torch.zeros(4, dtype=dtype, device=device) for dtype in dtypes)


def _add_parts(
    x: torch.Tensor, to: Target, parts: torch.Tensor, splits: int, bias: torch.Tensor, kind: int
) -> None:
    n, features = to.y.shape
    tile = deltas.tiling(n)
    i32, i64, f32 = _nothing(x.device)
    tables: tuple[torch.Tensor, ...] = i32, f32, f32, to.y, i64, i32, f32, i32
    sizes, shape, weights = (0, 0, 0, 0, 1), (features, 1), x.dtype
    strides: tuple[int, ...] = 1, 1, 1, 1
    if to.batch is not None:
        a, ids, w = to.batch.adapters, to.batch.ids, to.batch.weights
        h, h_splits = deltas.shrink(x, to.batch)
        factors = a.scalings if w is None else w
        tables = ids, factors, h, a.arena, a.offsets, a.ranks, a.scalings, a.firsts
        slices = len(a.outs)
        sizes = ids.shape[1], int(w is not None), a.ranks.shape[0], to.batch.rank_stride, slices
        shape, weights = (a.in_features, h_splits), a.arena.dtype
        strides = to.batch.strides
    launch(
        _finish, (cdiv(n, tile.rows), cdiv(features, tile.block_n), 1),
        (to.y, bias, parts, *tables), (n, kind, splits, *sizes),
        (features, *shape, *to.y.stride(), *strides),
        (*tile, BLOCK_R, precision(x.dtype, weights)), FINISH[tile.rows],
    )  # fmt: skip


def nf4_linear(x: torch.Tensor, w: Packed, to: Target, compute: str | None) -> None:
    """y = x Wᵀ + bias + deltas; x [n, cols] and y [n, rows] of one dtype, in any strides."""
    _multiply(x, w, to, compute, transposed=False)


def nf4_linear_backward(grad: torch.Tensor, w: Packed, dx: torch.Tensor) -> None:
    """dx = grad W; grad [n, rows] and dx [n, cols] of one dtype, in any strides."""
    _multiply(grad, w, Target(dx), None, transposed=True)


def _product_variants(
    dtype: torch.dtype, compute: str | None, aligned: bool, transposed: bool, device: Device
) -> Variants:
    how = how_of(dtype, compute, aligned)
    forms = {form_of(n, dtype, how, aligned, transposed, device) for n in (2, 64, 4096)}
    yield from _form_variants(sorted(forms), dtype, how, aligned, transposed, device)


def _form_variants(
    forms: Iterable[Form], dtype: torch.dtype, how: str, aligned: bool, transposed: bool,
    device: Device,
) -> Variants:  # fmt: skip
    name, cols = FLOATS[dtype], 4096 if aligned else 4095
    for form in forms:
        label = f"nf4_linear-{name}-{how}-{'x'.join(map(str, form[:3]))}"
        label += f"-{form.config.num_warps}x{form.config.num_stages}"
        label += "-backward" * transposed + "-unaligned" * (not aligned)
        yield Variant(
            label, _product, (name, *PACKED, "u8", name, "fp32"),
            ("i32", "i32", "i32", "fp32", "i32", "i32"),
            (4096, cols, cols // 8, 1024, 4096, 1, 4096, 1),
            (aligned, transposed, how, *form[:3]), form.config,
            how != "ieee" or device.backend == "hip",
        )  # fmt: skip


def _row_variant(form: Form, name: str) -> Variant:
    label = f"nf4_linear-{name}-row-{form.block_c}-{form.config.num_warps}"
    return Variant(
        label, _row, (name, *PACKED, "u8", name, "fp32"), ("i32", "i32", "fp32", "i32", "i32"),
        (4096, 4096, 512, 2048, 1, 1), (form.block_c, form.block_r), form.config, False,
    )  # fmt: skip


def tuned_variants(device: Device) -> Variants:
    """All that ``nf4_linear`` can launch tuned and not untuned."""
    for dtype, name in FLOATS.items():
        yield from (_row_variant(c.form(ROW), name) for c in space(ROW))
        for how in sorted(
            {how_of(dtype, compute, True) for compute in (None, "float32", "bfloat16")}
        ):
            for like in {form_of(n, dtype, how, True, False, device) for n in (2, 64, 4096)}:
                forms = [c.form(like) for c in space(like)]
                yield from _form_variants(forms, dtype, how, True, False, device)


def variants_of(
    chosen: Choice, n: int, dtype: torch.dtype, how: str, aligned: bool, device: Device
) -> Variants:
    """What that choice launches for so many rows."""
    form = chosen.form(product_form(None, n, dtype, how, aligned, device))
    if n == 1 and aligned:
        yield _row_variant(form, FLOATS[dtype])
    else:
        yield from _form_variants([form], dtype, how, aligned, False, device)


def variants(device: Device) -> Variants:
    """All that ``nf4_linear`` and its backward pass can launch untuned, at 4096 features."""
    for dtype, name in FLOATS.items():
        for compute in (None, "float32", "bfloat16"):
            if compute is None or how_of(dtype, compute, True) != how_of(dtype, None, True):
                yield from _product_variants(dtype, compute, True, False, device)
        yield from _product_variants(dtype, None, False, False, device)
        yield from _product_variants(dtype, None, True, True, device)
        yield from _product_variants(dtype, None, False, True, device)
        yield _row_variant(ROW, name)
    for (x, x_name), (w, w_name) in product(FLOATS.items(), FLOATS.items()):
        for n in (1, 4096):
            how, tile = precision(x, w), deltas.tiling(n)
            yield Variant(
                f"nf4_linear-{x_name}-{w_name}-{tile.rows}-finish", _finish,
                (x_name, "u8", "fp32", "i32", "fp32", "fp32", w_name, "i64", "i32", "fp32", "i32"),
                ("i32",) * 8, (4096, 4096, 8, 4096, 1, 1, 1, 1, 1), (*tile, BLOCK_R, how),
                FINISH[tile.rows], how != "ieee" or device.backend == "hip",
            )  # fmt: skip
