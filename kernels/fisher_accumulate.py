"""Op 5, fisher_accumulate: F <- gamma F + scale g∘g, in one launch and one pass.

Roofline on an H200: 12 bytes an element in float32, 6 in bfloat16, and 4 operations: bound
by bytes, at 4.3 TB/s for all that does not fit the L2. 16 M float32: 201 MB, 47 us;
expected 50, 16-byte accesses without a mask being all there is. 16 M bfloat16: 101 MB,
23 us; expected 26. 64 K float32: 0.8 MB, the launch: expected 2 us.
"""

from __future__ import annotations

from itertools import product

import torch
import triton
import triton.language as tl

from .launch import FLOATS, Config, Device, Variant, Variants, cdiv, launch
from .tiles import rounded


@triton.jit
def _update(b_old, b_g, gamma, scale, dtype: tl.constexpr):
    b_g = b_g.to(tl.float32)
    return rounded(gamma * b_old.to(tl.float32) + scale * (b_g * b_g), dtype)


@triton.jit(do_not_specialize=["rows", "columns", "gamma", "scale"])
def _accumulate(
    p_f, p_g, rows, columns, gamma, scale, stride_fr, stride_fc, stride_gr, stride_gc,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """F [rows, columns]; grid (rows / BLOCK_M * columns / BLOCK_N, 1, 1)."""
    across = tl.cdiv(columns, BLOCK_N)
    i_block = tl.program_id(0)
    first = (i_block % across) * BLOCK_N
    i_m = (i_block // across).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    i_n = first.to(tl.int64) + tl.arange(0, BLOCK_N)
    to = p_f + i_m[:, None] * stride_fr + i_n[None, :] * stride_fc  # [BLOCK_M, BLOCK_N]
    of = p_g + i_m[:, None] * stride_gr + i_n[None, :] * stride_gc
    dtype: tl.constexpr = p_f.dtype.element_ty
    if BLOCK_M == 1 and first + BLOCK_N <= columns:  # a mask would split 16-byte accesses
        tl.store(to, _update(tl.load(to), tl.load(of), gamma, scale, dtype))
    else:
        m = (i_m < rows)[:, None] & (i_n < columns)[None, :]
        tl.store(to, _update(tl.load(to, m, 0.0), tl.load(of, m, 0.0), gamma, scale, dtype), m)


FLAT, TILE = (1, 2048), (32, 64)
PIECE = 1 << 30  # columns of one launch, whose count fits 32 bits
CONFIG = Config(4, 1, fp_fusion=False)  # the same bits in every layout and dtype of g


def fisher_accumulate(F: torch.Tensor, g: torch.Tensor, gamma: float, scale: float) -> None:
    """F [n, m] in place, g [n, m], in any strides and of any two dtypes."""
    if F.stride(0) < F.stride(1):  # columns along the memory of F
        F, g = F.T, g.T
    if F.is_contiguous() and g.is_contiguous():
        F, g = F.view(1, -1), g.view(1, -1)
    rows, width = F.shape
    unit = F.stride(1) == 1 and g.stride(1) == 1
    block_m, block_n = FLAT if rows == 1 or (unit and width >= FLAT[1]) else TILE
    for first in range(0, width, PIECE):
        to, of = F[:, first : first + PIECE], g[:, first : first + PIECE]
        columns = to.shape[1]
        launch(
            _accumulate, (cdiv(rows, block_m) * cdiv(columns, block_n), 1, 1), (to, of),
            (rows, columns, float(gamma), float(scale)), (*to.stride(), *of.stride()),
            (block_m, block_n), CONFIG,
        )  # fmt: skip


def variants(device: Device) -> Variants:
    """All that ``fisher_accumulate`` can launch: one run of 16 M elements, and columns of a
    matrix against its rows."""
    for f, g in product(FLOATS.values(), FLOATS.values()):
        for name, block, strides in (
            ("flat", FLAT, (1 << 24, 1, 1 << 24, 1)),
            ("tile", TILE, (1024, 1, 1, 1024)),
        ):
            yield Variant(
                f"fisher_accumulate-{f}-{g}-{name}", _accumulate, (f, g),
                ("i32", "i32", "fp32", "fp32"), strides, block, CONFIG, False,
            )  # fmt: skip
