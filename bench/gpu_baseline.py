"""Zeroing + shrink + expand: batched LoRA as vLLM launches it, in plain Triton, to compare with.

Three launches: h is zeroed, each block adds its part of h = A x to it by float atomics, then
y += s B h. Every adapter is padded to one rank. A row of -1 leaves at once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

SPLITS = 8


@triton.jit
def empty():
    """What a launch costs that does nothing."""


@triton.jit
def _shrink(p_x, p_a, p_ids, p_h, features, span, RANK: tl.constexpr, BLOCK: tl.constexpr):
    """Grid (rows, splits)."""
    row, split = tl.program_id(0), tl.program_id(1)
    slot = tl.load(p_ids + row).to(tl.int64)
    if slot < 0:
        return
    i_r = tl.arange(0, RANK)
    acc = tl.zeros((RANK, BLOCK), tl.float32)
    for first in range(split * span, tl.minimum((split + 1) * span, features), BLOCK):
        i_k = first + tl.arange(0, BLOCK)
        m_k = i_k < tl.minimum((split + 1) * span, features)
        b_x = tl.load(p_x + row.to(tl.int64) * features + i_k, m_k, 0.0).to(tl.float32)
        at = p_a + slot * RANK * features + i_r[:, None] * features + i_k[None, :]
        acc += tl.load(at, m_k[None, :], 0.0).to(tl.float32) * b_x[None, :]
    tl.atomic_add(p_h + row * RANK + i_r, tl.sum(acc, 1), sem="relaxed")


@triton.jit
def _expand(p_h, p_b, p_ids, p_y, out_features, scaling, RANK: tl.constexpr, BLOCK: tl.constexpr):
    """Grid (rows, out / BLOCK)."""
    row = tl.program_id(0)
    slot = tl.load(p_ids + row).to(tl.int64)
    if slot < 0:
        return
    i_o = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    i_r, m_o = tl.arange(0, RANK), i_o < out_features
    at = p_b + slot * out_features * RANK + i_o[:, None] * RANK + i_r[None, :]
    b_b = tl.load(at, m_o[:, None], 0.0).to(tl.float32)
    b_y = scaling * tl.sum(b_b * tl.load(p_h + row * RANK + i_r)[None, :], 1)
    to = p_y + row.to(tl.int64) * out_features + i_o
    b_y += tl.load(to, m_o, 0.0).to(tl.float32)
    tl.store(to, b_y.to(p_y.dtype.element_ty), m_o)


def zero_shrink_expand(
    x: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    ids: torch.Tensor,
    scaling: float,
    h: torch.Tensor,
    y: torch.Tensor,
) -> None:
    """y [n, out] += s B[ids] (A[ids] x). x [n, in], A [slots, R, in], B [slots, out, R],
    ids int32 [n], h float32 [n, R] for work; R a power of two."""
    (n, features), rank, out = x.shape, A.shape[1], B.shape[1]
    h.zero_()
    span = triton.cdiv(features, SPLITS)
    _shrink[(n, SPLITS)](x, A, ids, h, features, span, RANK=rank, BLOCK=256, num_warps=4)
    _expand[(n, triton.cdiv(out, 128))](
        h, B, ids, y, out, scaling, RANK=rank, BLOCK=128, num_warps=4
    )
