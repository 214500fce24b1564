"""Op 7 in factor form: theta <- (theta - lr g + lr c F anchor) / (1 + lr c F), elementwise.

The same step inside ``batched_adapt`` is kernels/batched_adapt.py's.

Roofline on an H200: one launch, reads theta, g, F and the anchor and writes theta: 20 bytes an
element where theta and g are float32, 14 where they are bfloat16; some 10 operations, 30 with
stochastic rounding. Bound by bytes. 16M elements, float32: 336 MB, 78 us at 4.3 TB/s, expected
85 us; bfloat16: 235 MB, 55 us, expected 60 us. 32K elements (4096 by 8): 0.6 MB, 0.2 us at the
speed of memory: bound by the launch, expected 3 us.
"""

from __future__ import annotations

from itertools import product

import torch
import triton
import triton.language as tl

from .launch import FLOATS, Config, Device, Variant, Variants, cdiv, launch
from .rounding import key_words, stored


@triton.jit(do_not_specialize=["n", "lr", "pull", "key_low", "key_high"])
def _ewc_step(
    p_theta, p_grad, p_fisher, p_anchor, n, lr, pull, key_low, key_high, m, stride_tn, stride_tm,
    stride_gn, stride_gm, stride_fn, stride_fm, stride_an, stride_am, stride_en, stride_em,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """BLOCK columns of a row; grid (rows * tiles, 1, 1). stride_en, stride_em: of the index
    that stochastic rounding counts by."""
    tiles = tl.cdiv(m, BLOCK)
    row = (tl.program_id(0) // tiles).to(tl.int64)
    i = tl.program_id(0) % tiles * BLOCK + tl.arange(0, BLOCK)
    m_i = i < m
    i = i.to(tl.int64)
    to = p_theta + row * stride_tn + i * stride_tm
    b_grad = tl.load(p_grad + row * stride_gn + i * stride_gm, m_i, 0.0).to(tl.float32)
    b_pull = pull * tl.load(p_fisher + row * stride_fn + i * stride_fm, m_i, 0.0)
    b_new = tl.load(to, m_i, 0.0).to(tl.float32) - lr * b_grad
    b_new += b_pull * tl.load(p_anchor + row * stride_an + i * stride_am, m_i, 0.0)
    b_new = tl.div_rn(b_new, 1.0 + b_pull)
    i_element = (row * stride_en + i * stride_em).to(tl.uint32)
    low, high = key_low.to(tl.uint32, bitcast=True), key_high.to(tl.uint32, bitcast=True)
    tl.store(to, stored(b_new, p_theta.dtype.element_ty, i_element, low, high), m_i)


BLOCK = 1024
CONFIG = Config(4, 2, fp_fusion=False)


def ewc_step(
    theta: torch.Tensor,
    grad: torch.Tensor,
    fisher: torch.Tensor,
    anchor: torch.Tensor,
    lr: float,
    pull: float,
    key: int,
) -> None:
    """All [n, m] in any strides, fisher and anchor float32; pull = 2 lambda lr; key: rounding's."""
    arrays = [theta, grad, fisher, anchor]
    element = theta.shape[1], 1
    if all(t.is_contiguous() for t in arrays):
        arrays, element = [t.view(1, -1) for t in arrays], (0, 1)
    elif theta.shape[0] > theta.shape[1]:  # blocks run along the longer side
        arrays, element = [t.T for t in arrays], element[::-1]
    n, m = arrays[0].shape
    strides = [s for t in arrays for s in t.stride()]
    launch(
        _ewc_step, (n * cdiv(m, BLOCK), 1, 1), tuple(arrays), (n, lr, pull, *key_words(key)),
        (m, *strides, *element), (BLOCK,), CONFIG,
    )  # fmt: skip


def variants(device: Device) -> Variants:
    """A contiguous theta of 16M elements."""
    for t, g in product(FLOATS, FLOATS):
        names = FLOATS[t], FLOATS[g]
        yield Variant(
            f"ewc_step-{names[0]}-{names[1]}", _ewc_step, (*names, "fp32", "fp32"),
            ("i32", "fp32", "fp32", "i32", "i32"), (1 << 24, *(1 << 24, 1) * 4, 0, 1), (BLOCK,),
            CONFIG, False,
        )  # fmt: skip
