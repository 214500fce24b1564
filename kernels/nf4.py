"""Op 4, the format: ``quantise``, ``dequantise``, and the decoding of a tile for other kernels.

NF4 (QLoRA: Dettmers et al. 2023): the flat matrix [rows * cols] in 4-bit codes, the even
element in the high nibble, with the largest magnitude (absmax) of each block of 32 to 4096
elements. Blocks cross rows where cols is no multiple. Every block begins at a multiple of
32: where 32 divides cols, each run of 32 elements of a row is 16 whole bytes under one
absmax ("aligned"); any other matrix is read element by element.

A code becomes a float by a gather from a table of 64 bytes in shared memory, which has no
bank conflicts: one load-store instruction for 32 weights, 0.5 instructions of a cycle's 4.

Roofline on an H200: ``dequantise`` reads 0.56 bytes a weight and writes 4 or 2. 4096x4096
to float32: 77 MB, 18 us at 4.3 TB/s, expected 24 us; to bfloat16: 43 MB, 10 us, expected
15 us. 1024x1024 to bfloat16: 2.7 MB, bound by the launch, expected 3 us. ``quantise`` reads
W twice, the second time from the L2 cache where its 60 MB hold it, and writes 0.56 bytes a
weight. 4096x4096 float32: 67 MB twice and 9 MB, 33 us; bfloat16: 34 MB and 9 MB, 10 us. The
machine code has 50 instructions a weight for absmax and 100 for the code, most of them a
division of the index, 15 comparisons and a division of the weight: 85 us of 4 instructions a
cycle at 1.8 GHz and 132 SMs, which bound both: expected 110 us. 1024x1024 bfloat16: 2.7 MB,
0.6 us, and 5 us of instructions: expected 10 us with two launches.
"""

from __future__ import annotations

from functools import cache
from itertools import product
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .launch import FLOATS, Config, Device, Variant, Variants, cdiv, launch
from .tiles import rounded

CODES = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


@triton.jit
def absmax_of(p_scales, p_steps, p_table, i_block, m_block, nested, offset):
    """float32 absmax of the blocks; nested >= 0: in 8 bits, with two roundings where the
    kernel is compiled without fused multiply-adds."""
    if nested >= 0:
        b_step = tl.load(p_steps + i_block, m_block, 0).to(tl.int32)
        b_scale = tl.load(p_scales + (i_block >> nested), m_block, 0.0)
        b_absmax = tl.load(p_table + 16 + b_step) * b_scale + offset
    else:
        b_absmax = tl.load(p_scales + i_block, m_block, 0.0)
    return b_absmax


@triton.jit
def load_table(p_table):
    """The 16 codes."""
    return tl.load(p_table + tl.arange(0, 16))


@triton.jit
def _lookup(b_index, b_table):
    """The codes of a tile of indices, float32."""
    ROWS: tl.constexpr = b_index.shape[0]
    COLS: tl.constexpr = b_index.shape[1]
    flat = tl.gather(b_table, tl.reshape(b_index, (ROWS * COLS,)), 0)
    return tl.reshape(flat, (ROWS, COLS))


@triton.jit
def load_words(p_packed, i_row, m_row, i_word, end, row_words):
    """Words of eight codes of aligned rows, [rows, words] int32: zeros from word end on."""
    at = i_row.to(tl.int64)[:, None] * row_words + i_word[None, :]
    m_word = m_row[:, None] & (i_word < end)[None, :]
    return tl.load(p_packed.to(tl.pointer_type(tl.int32)) + at, m_word, 0x77777777)


@triton.jit
def _nibble(b_words, SHIFT: tl.constexpr):
    return (b_words >> SHIFT) & 15


@triton.jit
def codes_of(b_words, b_table):
    """The codes of words [rows, words] in the order of the matrix, [rows, 8 * words] float32."""
    b_even = tl.join(
        tl.join(_nibble(b_words, 4), _nibble(b_words, 20)),
        tl.join(_nibble(b_words, 12), _nibble(b_words, 28)),
    )
    b_odd = tl.join(
        tl.join(_nibble(b_words, 0), _nibble(b_words, 16)),
        tl.join(_nibble(b_words, 8), _nibble(b_words, 24)),
    )
    ROWS: tl.constexpr = b_words.shape[0]
    WORDS: tl.constexpr = b_words.shape[1]
    return _lookup(tl.reshape(tl.join(b_even, b_odd), (ROWS, WORDS * 8)), b_table)


@triton.jit
def group_absmax(
    p_scales, p_steps, p_table, i_row, m_row, k0, cols, shift, nested, offset, GROUPS: tl.constexpr
):
    """absmax of each run of 32 columns of aligned rows from k0 on, [rows, GROUPS]."""
    i_k = k0 + tl.arange(0, GROUPS) * 32
    i_flat = i_row.to(tl.int64)[:, None] * cols + i_k[None, :]
    m_group = m_row[:, None] & (i_k < cols)[None, :]
    return absmax_of(p_scales, p_steps, p_table, i_flat >> shift, m_group, nested, offset)


@triton.jit
def decode_words(
    b_words, b_table, p_scales, p_steps, p_table, i_row, m_row, k0, cols, shift, nested, offset,
):  # fmt: skip
    """The aligned tile whose words were loaded, columns from k0 on, float32."""
    ROWS: tl.constexpr = b_words.shape[0]
    COLS: tl.constexpr = b_words.shape[1] * 8
    b_codes = tl.reshape(codes_of(b_words, b_table), (ROWS, COLS // 32, 32))
    b_absmax = group_absmax(
        p_scales, p_steps, p_table, i_row, m_row, k0, cols, shift, nested, offset, COLS // 32
    )
    return tl.reshape(b_codes * b_absmax[:, :, None], (ROWS, COLS))


@triton.jit
def decode_any(
    p_packed, b_table, p_scales, p_steps, p_table, i_row, m_row, k0, cols, shift, nested, offset,
    COLS: tl.constexpr,
):  # fmt: skip
    """A tile of any matrix, element by element: [rows, COLS] float32, zeros past its ends."""
    i_k = k0 + tl.arange(0, COLS)
    i_flat = i_row.to(tl.int64)[:, None] * cols + i_k[None, :]
    m_tile = m_row[:, None] & (i_k < cols)[None, :]
    b_pair = tl.load(p_packed + (i_flat >> 1), m_tile, 0x77).to(tl.int32)
    b_code = _lookup(tl.where((i_flat & 1) == 1, b_pair & 15, b_pair >> 4), b_table)
    return b_code * absmax_of(p_scales, p_steps, p_table, i_flat >> shift, m_tile, nested, offset)


@triton.jit(do_not_specialize=["shift", "nested", "offset"])
def _dequantise(
    p_packed, p_scales, p_steps, p_table, p_out, shift, nested, offset,
    rows, cols, row_words, stride_on, stride_ok,
    ALIGNED: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out [rows, cols]; grid (rows / BLOCK_N, cols / BLOCK_K, 1)."""
    k0 = tl.program_id(1) * BLOCK_K
    i_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    i_k = k0 + tl.arange(0, BLOCK_K)
    m_n = i_n < rows
    b_table = load_table(p_table)
    if ALIGNED:
        i_word = k0 // 8 + tl.arange(0, BLOCK_K // 8)
        b_w = decode_words(
            load_words(p_packed, i_n, m_n, i_word, row_words, row_words), b_table,
            p_scales, p_steps, p_table, i_n, m_n, k0, cols, shift, nested, offset,
        )  # fmt: skip
    else:
        b_w = decode_any(
            p_packed, b_table, p_scales, p_steps, p_table, i_n, m_n, k0, cols, shift, nested,
            offset, BLOCK_K,
        )  # fmt: skip
    to = p_out + i_n.to(tl.int64)[:, None] * stride_on + i_k.to(tl.int64)[None, :] * stride_ok
    tl.store(to, rounded(b_w, p_out.dtype.element_ty), m_n[:, None] & (i_k < cols)[None, :])


@triton.jit
def _elements(p_w, i_flat, total, cols, stride_wn, stride_wk):
    """The elements of those flat indices as float32, zeros past the end."""
    at = (i_flat // cols) * stride_wn + (i_flat % cols) * stride_wk
    return tl.load(p_w + at, i_flat < total, 0.0).to(tl.float32)


@triton.jit(do_not_specialize=["rows", "blocks", "blocksize"])
def _magnitudes(
    p_w, p_absmax, rows, blocks, blocksize, cols, stride_wn, stride_wk,
    BLOCKS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """absmax of BLOCKS blocks, chunk by chunk; grid (blocks / BLOCKS, 1, 1)."""
    total = rows.to(tl.int64) * cols
    i_block = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)
    first = i_block.to(tl.int64)[:, None] * blocksize + tl.arange(0, CHUNK)[None, :]
    b_absmax = tl.zeros((BLOCKS,), tl.float32)
    for k in range(0, blocksize, CHUNK):
        b_w = _elements(p_w, first + k, total, cols, stride_wn, stride_wk)
        b_absmax = tl.maximum(b_absmax, tl.max(tl.abs(b_w), 1))
    tl.store(p_absmax + i_block, b_absmax, i_block < blocks)


@triton.jit(do_not_specialize=["rows", "shift"])
def _quantise(
    p_w, p_absmax, p_middles, p_packed, rows, shift, cols, stride_wn, stride_wk, BYTES: tl.constexpr
):
    """packed, from absmax; grid (bytes / BYTES, 1, 1)."""
    total = rows.to(tl.int64) * cols
    i_byte = tl.program_id(0).to(tl.int64) * BYTES + tl.arange(0, BYTES)
    i_flat = 2 * i_byte[:, None] + tl.arange(0, 2)[None, :]
    b_absmax = tl.load(p_absmax + (i_flat >> shift), i_flat < total, 0.0)
    b_w = _elements(p_w, i_flat, total, cols, stride_wn, stride_wk)
    b_scaled = tl.div_rn(b_w, tl.where(b_absmax == 0.0, 1.0, b_absmax))
    b_code = tl.zeros((BYTES, 2), tl.int32)
    for i in tl.static_range(15):  # the upper code iff the value is past the middle
        b_code += (b_scaled > tl.load(p_middles + i)).to(tl.int32)
    b_even, b_odd = tl.split(b_code)
    b_pair = b_even << 4 | b_odd
    tl.store(p_packed + i_byte, b_pair.to(tl.uint8), 2 * i_byte < total)


class Packed(NamedTuple):
    """A packed matrix on a device.

    codes: uint8, two a byte. scales: absmax float32, or the nested absmax. steps: absmax in
    8 bits, or anything of uint8. table: 16 codes, then the 256 values of ``steps``. shift: log2
    of the block size. nested: log2 of the block size of ``scales``, -1 where there are no
    steps.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    steps: torch.Tensor
    table: torch.Tensor
    rows: int
    cols: int
    shift: int
    nested: int
    offset: float

    @property
    def pointers(self) -> tuple[torch.Tensor, ...]:
        return self.codes, self.scales, self.steps, self.table

    @property
    def sizes(self) -> tuple[int, int, float]:
        return self.shift, self.nested, self.offset

    @property
    def aligned(self) -> bool:
        """Whether each run of 32 elements of a row is 16 bytes under one absmax."""
        return self.cols % 32 == 0


BLOCK_N, BLOCK_K, BLOCKS, CHUNK, BYTES = 32, 128, 64, 32, 512
EXACT = Config(4, 1, fp_fusion=False)


def dequantise(w: Packed, out: torch.Tensor) -> None:
    """out [rows, cols] in any strides: code * absmax in float32, rounded once to its dtype."""
    launch(
        _dequantise, (cdiv(w.rows, BLOCK_N), cdiv(w.cols, BLOCK_K), 1), (*w.pointers, out), w.sizes,
        (w.rows, w.cols, w.cols // 8, *out.stride()), (w.aligned, BLOCK_N, BLOCK_K), EXACT,
    )  # fmt: skip


@cache
def _middles(device: torch.device) -> torch.Tensor:
    codes = torch.tensor(CODES, dtype=torch.float32)
    return ((codes[:-1] + codes[1:]) / 2).to(device)


def quantise(w: torch.Tensor, blocksize: int, packed: torch.Tensor, absmax: torch.Tensor) -> None:
    """packed uint8 [(rows * cols + 1) // 2] and absmax float32 of w [rows, cols], finite."""
    blocks, strides = absmax.numel(), (w.shape[1], *w.stride())
    launch(
        _magnitudes, (cdiv(blocks, BLOCKS), 1, 1), (w, absmax), (w.shape[0], blocks, blocksize),
        strides, (BLOCKS, CHUNK), EXACT,
    )  # fmt: skip
    launch(
        _quantise, (cdiv(packed.numel(), BYTES), 1, 1), (w, absmax, _middles(w.device), packed),
        (w.shape[0], blocksize.bit_length() - 1), strides, (BYTES,), EXACT,
    )  # fmt: skip


PACKED = ("u8", "fp32", "u8", "fp32")  # the pointers of a packed matrix


def variants(device: Device) -> Variants:
    """All that ``dequantise`` and ``quantise`` can launch, at 4096 columns or 4095."""
    for dtype, aligned in product(FLOATS.values(), (True, False)):
        cols = 4096 if aligned else 4095
        yield Variant(
            f"nf4-{dtype}-{'' if aligned else 'un'}aligned-dequantise", _dequantise,
            (*PACKED, dtype), ("i32", "i32", "fp32"), (4096, cols, cols // 8, cols, 1),
            (aligned, BLOCK_N, BLOCK_K), EXACT, False,
        )  # fmt: skip
    for dtype in FLOATS.values():
        yield Variant(
            f"nf4-{dtype}-magnitudes", _magnitudes, (dtype, "fp32"), ("i32",) * 3,
            (4096, 4096, 1), (BLOCKS, CHUNK), EXACT, False,
        )  # fmt: skip
        yield Variant(
            f"nf4-{dtype}-quantise", _quantise, (dtype, "fp32", "fp32", "u8"), ("i32",) * 2,
            (4096, 4096, 1), (BYTES,), EXACT, False,
        )  # fmt: skip
