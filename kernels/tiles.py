"""What several kernels share: products of tiles in a fixed order of summation."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .launch import IN_INTERPRETER


def precision(x: torch.dtype, weights: torch.dtype) -> str:
    """How tiles of these dtypes are multiplied; the sums are float32.

    "native": in the 16-bit dtype of both. "tf32": 16-bit numbers of two kinds, which tf32
    holds exactly (float32 ones are rounded to 10 bits of fraction, within what a 16-bit x
    promises).
    "ieee": float32 in full, without matrix instructions on NVIDIA.
    """
    if x == torch.float32:
        return "ieee"
    return "native" if x == weights else "tf32"


@triton.jit
def _tf32(b):
    """float32 for tf32 products: to nearest, as the instructions cut off what is too long."""
    if b.dtype == tl.float32:
        bits = b.to(tl.int32, bitcast=True)
        return ((bits + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
    else:
        return b.to(tl.float32)


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a b: a [M, K], b [K, N], acc [M, N] float32."""
    if PRECISION == "tf32":
        a, b = _tf32(a), _tf32(b)
    if IN_INTERPRETER:  # whose own is wrong in bfloat16, and of an order that M decides
        return acc + tl.sum(a.to(tl.float32)[:, :, None] * b.to(tl.float32)[None, :, :], 1)
    elif PRECISION == "native":
        return tl.dot(a, b, acc)
    else:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision=PRECISION)


@triton.jit
def rounded(b, dtype: tl.constexpr):
    """float32 to the nearest number of dtype, ties to even."""
    if IN_INTERPRETER and dtype == tl.bfloat16:  # whose cast cuts the bits off
        bits = b.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        finite = (b - b) == 0.0
        return tl.where(finite, bits.to(tl.uint16).to(tl.bfloat16, bitcast=True), b.to(dtype))
    else:
        return b.to(dtype)


@triton.jit
def project(
    x_rows, m_rows, stride_xk, p_a, stride_ar, stride_ak, i_rank, m_rank, k_first, k_last,
    BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """x Aᵀ over features [k_first, k_last), ascending: [BLOCK_M, BLOCK_R] float32.

    x_rows: pointers to the rows [BLOCK_M]; m_rows, m_rank: which rows and ranks there are.
    """
    acc = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for k0 in range(k_first, k_last, BLOCK_K):
        i_k = k0 + tl.arange(0, BLOCK_K)
        m_k = i_k < k_last
        b_x = tl.load(
            x_rows[:, None] + i_k.to(tl.int64)[None, :] * stride_xk,
            m_rows[:, None] & m_k[None, :],
            0.0,
        )  # [BLOCK_M, BLOCK_K]
        b_a = tl.load(
            p_a + i_rank.to(tl.int64)[None, :] * stride_ar + i_k.to(tl.int64)[:, None] * stride_ak,
            m_k[:, None] & m_rank[None, :], 0.0,
        )  # [BLOCK_K, BLOCK_R]  # fmt: skip
        acc = dot(b_x, b_a, acc, PRECISION)
    return acc


@triton.jit
def expand(
    h_rows, m_rows, stride_split, splits, p_b, stride_br, stride_bo, rank, i_out, m_out,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """h Bᵀ with h the sum of its splits, both ascending: [BLOCK_M, BLOCK_N] float32.

    h_rows: pointers to the partial h of each row [BLOCK_M].
    """
    HOW: tl.constexpr = "tf32" if PRECISION == "native" else PRECISION  # h is float32
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for r0 in range(0, rank, BLOCK_R):
        i_r = r0 + tl.arange(0, BLOCK_R)
        m_r = i_r < rank
        m_h = m_rows[:, None] & m_r[None, :]
        b_h = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
        for split in range(splits):
            b_h += tl.load(h_rows[:, None] + split * stride_split + i_r[None, :], m_h, 0.0)
        b_b = tl.load(
            p_b + i_r.to(tl.int64)[:, None] * stride_br + i_out.to(tl.int64)[None, :] * stride_bo,
            m_r[:, None] & m_out[None, :], 0.0,
        )  # [BLOCK_R, BLOCK_N]  # fmt: skip
        acc = dot(b_h, b_b, acc, HOW)
    return acc
