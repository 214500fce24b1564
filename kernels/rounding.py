"""Stochastic rounding to 16 bits from a counter generator: the bits of reference.py, on a device.

A value goes up with the probability of the part that is cut off. What decides is a hash of
the element's index, keyed by (seed, slot, version): nothing is kept, and every backend
rounds alike.
"""

from __future__ import annotations

import numpy as np
import triton
import triton.language as tl


@triton.jit
def splitmix64(z):
    """SplitMix64 (Steele et al. 2014) of a uint64."""
    z += 0x9E3779B97F4A7C15
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB
    return z ^ (z >> 31)


@triton.jit
def rounding_key(seed_low, seed_high, slot, version):
    """(low, high) words of the generator's key; the seed as ``seed_words`` gives it."""
    low, high = seed_low.to(tl.uint32, bitcast=True), seed_high.to(tl.uint32, bitcast=True)
    seed = (high.to(tl.uint64) << 32) | low.to(tl.uint64)
    key = splitmix64(splitmix64(seed ^ slot.to(tl.uint64)) ^ version.to(tl.uint64))
    return key.to(tl.uint32), (key >> 32).to(tl.uint32)


@triton.jit
def counter_hash(i_element, key_low, key_high):
    """32 random bits for each element index (uint32): a keyed bijective mix."""
    z = i_element ^ key_low
    z = ((z ^ (z >> 16)) * 0x7FEB352D) ^ key_high
    z = (z ^ (z >> 15)) * 0x846CA68B
    return z ^ (z >> 16)


@triton.jit
def _to_bfloat16(values, hashed):
    bits = values.to(tl.uint32, bitcast=True)
    finite = (bits & 0x7F800000) != 0x7F800000
    kept = tl.where(finite, bits + (hashed >> 16), bits)
    return (kept >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)


@triton.jit
def _to_float16(values, hashed):
    """A normal number loses 13 bits, one that is subnormal in float16 more."""
    bits = values.to(tl.uint32, bitcast=True)
    size = bits & 0x7FFFFFFF
    exponent = (size >> 23).to(tl.int32)
    cut = tl.minimum(tl.maximum(126 - exponent, 13), 31).to(tl.uint32)
    below = tl.minimum(tl.maximum(95 - exponent, 0), 31).to(tl.uint32)
    tiny = ((size & 0x7FFFFF) | 0x800000) >> below
    kept = tl.where(exponent < 113, tiny, size - 0x38000000)  # the bias of float16
    half = tl.minimum((kept + (hashed >> (32 - cut))) >> cut, 0x7BFF)
    half = half | ((bits >> 16) & 0x8000)
    special = tl.where(exponent == 255, values, 0.0).to(tl.float16)  # Inf and NaN as they are
    return tl.where(exponent == 255, special, half.to(tl.uint16).to(tl.float16, bitcast=True))


@triton.jit
def stored(values, dtype: tl.constexpr, i_element, key_low, key_high):
    """float32 values as a dtype keeps them; 16 bits are rounded stochastically."""
    if dtype == tl.float32:
        return values
    elif dtype == tl.bfloat16:
        return _to_bfloat16(values, counter_hash(i_element, key_low, key_high))
    else:
        return _to_float16(values, counter_hash(i_element, key_low, key_high))


_MASK = (1 << 64) - 1


def _splitmix64(z: int) -> int:
    z = (z + 0x9E3779B97F4A7C15) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)


def key_words(key: int) -> tuple[int, int]:
    """The (low, high) words of 64 bits, signed, as kernels take them."""
    low, high = np.array([key], np.uint64).view(np.int32).tolist()
    return low, high


def seed_words(seed: int) -> tuple[int, int]:
    """A seed's part of the key, for ``rounding_key`` in a kernel."""
    return key_words(_splitmix64(seed & _MASK))


def host_key(seed: int, slot: int, version: int) -> int:
    """``rounding_key`` on the host."""
    return _splitmix64(_splitmix64(_splitmix64(seed & _MASK) ^ slot) ^ (version & _MASK))
