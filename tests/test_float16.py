"""float16: conversions bit for bit as NumPy's, stochastic rounding as the reference's."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers import bits, fill_pool
from hypothesis import given
from hypothesis import strategies as st

import lora_engine as le
from lora_engine import _C, reference

EVERY = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
LARGEST = np.float32(65504.0)


def widened() -> np.ndarray:
    """Every float16 as float32; NaN quiet, as the processors' conversion leaves it."""
    wide = EVERY.astype(np.float32)
    nan = np.isnan(wide)
    wide.view(np.uint32)[nan] |= 0x400000
    return wide


def near_float16() -> np.ndarray:
    """Every float16, every midpoint between two, their neighbours; and float32 at random."""
    positive = EVERY[:0x7C00].astype(np.float32)
    middle = (positive + np.append(positive[1:], np.float32(65536.0))) / 2
    at = np.concatenate([positive, middle])
    around = [np.nextafter(at, np.float32(end)) for end in (-np.inf, np.inf)]
    drawn = np.random.default_rng(0).integers(0, 1 << 32, 300_000, dtype=np.uint32)
    values = np.concatenate([at, *around, drawn.view(np.float32), np.float32([np.inf])])
    return np.concatenate([values, -values])


def as_numpy_rounds(values: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        return values.astype(np.float16)


def same(got: np.ndarray, want: np.ndarray) -> bool:
    """Bit for bit, any NaN for any NaN."""
    nan = np.isnan(want)
    return np.array_equal(np.isnan(got), nan) and bits(got[~nan]) == bits(want[~nan])


def plus_zero(values: np.ndarray) -> np.ndarray:
    """A sum that starts at 0 has no -0."""
    return np.where(values == 0, values.dtype.type(0), values)


def through_pool(values: np.ndarray, dtype: str) -> np.ndarray:
    """Stored as dtype in a pool, and read as float32."""
    pool = le.AdapterPool(values.size, 1, dtype=dtype)
    slot = pool.add(values[None], np.ones((1, 1), "f4"), 1.0)
    return pool.get(slot)[0][0]


def through_delta(values: np.ndarray, dtype: str) -> np.ndarray:
    """Times 1 to an output of dtype."""
    one = np.ones((1, 1), values.dtype)
    out = np.full((1, values.size), np.nan, dtype)
    return le.lora_delta(np.ones((1, 1), dtype), one, values[:, None], 1.0, out=out)[0]


@pytest.mark.parametrize("cut", [0, 3], ids=["whole", "part"])
def test_every_float16_is_widened_as_by_numpy(cut):
    values, want = EVERY[cut:], widened()[cut:]
    assert bits(through_pool(values, "float32")) == bits(want)
    assert bits(through_pool(np.repeat(values, 2)[::2], "float32")) == bits(want)
    assert same(through_delta(values, "float32"), plus_zero(want))


@pytest.mark.parametrize("cut", [0, 3], ids=["whole", "part"])
def test_float32_is_rounded_as_by_numpy(cut):
    values = near_float16()[cut:]
    assert same(through_pool(values, "float16"), as_numpy_rounds(values).astype(np.float32))
    want = as_numpy_rounds(plus_zero(values))
    assert same(through_delta(values, "float16"), want)
    y = np.empty((2 * values.size, 2), np.float16)[::2, 1]
    one = np.ones((1, 1), "f4")
    le.lora_delta(np.ones(1, np.float16), one, values[:, None], 1.0, out=y)
    assert same(y.copy(), want)


def test_the_reference_rounds_as_numpy():
    values = near_float16()
    assert same(reference.round_float16(values), as_numpy_rounds(values).astype(np.float32))


def test_quiet_nan_keeps_sign_and_payload():
    values = np.uint32([0x7FC00000, 0xFFC00000, 0x7FE02000, 0x7FC01FFF]).view(np.float32)
    want = as_numpy_rounds(values).astype(np.float32)
    assert bits(through_pool(values, "float16")) == bits(want)


def stored_by_ewc_step(values: np.ndarray, seed: int, version: int, step: int = 1) -> np.ndarray:
    """What a step from 0 to the values leaves in a float16 theta."""
    theta = np.zeros(values.size * step, np.float16)[::step]
    zeros = np.zeros(values.size, np.float32)
    le.ewc_step(theta, -values, zeros, zeros, 1.0, 0.0, seed=seed, version=version)
    return theta.astype(np.float32)


@given(data=st.data())
def test_stochastic_rounding_is_the_reference(data):
    """Every exponent, so subnormals of both formats, saturation, Inf and NaN."""
    n = data.draw(st.sampled_from([1, 7, 33, 4099]), "n")
    seed, version = (
        data.draw(st.integers(0, 2**63), "seed"),
        data.draw(st.integers(0, 9), "version"),
    )
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1), "values"))
    low, high = data.draw(
        st.sampled_from([(0, 256), (60, 120), (110, 146), (250, 256)]), "exponents"
    )
    drawn = rng.integers(1, 1 << 23, n) | (rng.integers(low, high, n) << 23)
    values = (drawn | (rng.integers(0, 2, n) << 31)).astype(np.uint32).view(np.float32)
    want = reference.round_float16_stochastic(
        values, reference.rounding_key(seed, 0, version), np.arange(n)
    )
    got = stored_by_ewc_step(values, seed, version, data.draw(st.sampled_from([1, 2]), "step"))
    assert same(got, want)
    assert np.array_equal(np.isfinite(got), np.isfinite(values))


@pytest.mark.parametrize("exponent", [0, -10, -14, -15, -20, -24, -26, -32], ids="2^{}".format)
@pytest.mark.parametrize("fraction", [0.03125, 0.3, 0.9])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_up_with_the_probability_of_the_part_cut_off(exponent, fraction, sign):
    """Also of float16's subnormals, whose unit is 2^-24, and of what lies below them."""
    unit = 2.0 ** max(exponent - 10, -24)
    low = np.floor(2.0**exponent / unit) * unit
    value = low + fraction * (unit if low else 2.0**exponent)
    part = (np.float64(np.float32(value)) - low) / unit
    n = 100_000
    rounded = reference.round_float16_stochastic(
        np.full(n, sign * value), reference.rounding_key(1, 2, 3), np.arange(n)
    )
    assert set(np.unique(sign * rounded)) <= {np.float32(low), np.float32(low + unit)}
    up = float((sign * rounded > low).mean())
    assert abs(up - part) < 5 * np.sqrt(part / n)


def test_stochastic_rounding_leaves_float16_values():
    finite = EVERY[np.isfinite(EVERY)].astype(np.float32)
    infinite = np.float32([np.inf, -np.inf])
    for seed in range(5):
        key = reference.rounding_key(seed, 0, 0)
        for values in (finite, infinite):
            rounded = reference.round_float16_stochastic(values, key, np.arange(values.size))
            assert bits(rounded) == bits(values)
    nan = np.uint32([0x7F800001, 0x7FC00000, 0xFFFFFFFF]).view(np.float32)
    assert bits(reference.round_float16_stochastic(nan, 1, np.arange(3))) == bits(nan)


def test_a_weight_saturates_and_never_becomes_inf():
    values = np.repeat(np.float32([65510, 65519.9, 65520, 65536, 7e4, 1e30, 3.4e38]), 50)
    for sign in (1, -1):
        assert (stored_by_ewc_step(sign * values, 3, 4) == sign * LARGEST).all()
    pool, _ = fill_pool(np.random.default_rng(0), 16, (8,), [2], "float16")
    pool.set(0, np.full((2, 16), LARGEST), np.full((8, 2), -LARGEST), 1.0)
    x, grad = np.full((1, 16), 1e-4, "f4"), np.full((1, 8), -1e-3, "f4")
    for _ in range(20):
        assert pool.adapt(x, grad, np.zeros(1, np.int32), 30.0).applied.all()
    A, B, _ = pool.get(0)
    assert np.isfinite(A).all()
    assert np.isfinite(B).all()
    assert np.abs(A).max() == LARGEST


def test_a_step_moves_a_weight_within_the_range():
    pool, before = fill_pool(np.random.default_rng(0), 16, (8,), [2], "float16")
    x, grad = np.full((1, 16), 10.0, "f4"), np.full((1, 8), 10.0, "f4")
    assert pool.adapt(x, grad, np.zeros(1, np.int32), 1.0).applied.all()
    moved = np.abs(pool.get(0)[0] - before[0].A[0])
    assert 10 < moved.max() < 3e4


@pytest.mark.parametrize("kind", ["numpy", "torch"])
@pytest.mark.parametrize("n", [None, 3])
def test_a_new_output_has_the_dtype_of_x(kind, n):
    pool, _ = fill_pool(np.random.default_rng(0), 16, (8,), [2])
    x = np.ones(16 if n is None else (n, 16), np.float16)
    A, B = np.ones((2, 16), np.float16), np.ones((8, 2), np.float16)
    if kind == "torch":
        x, A, B = (torch.from_numpy(a) for a in (x, A, B))
    made = [le.lora_delta(x, A, B, 1.0), pool.forward(x, np.zeros(n or 1, np.int32))]
    for y in made:
        assert type(y) is type(x)
        assert y.dtype == x.dtype
        assert tuple(y.shape) == ((8,) if n is None else (n, 8))
    assert (made[0] == 32).all()


def test_refusals_name_both_dtypes():
    A, B = np.ones((2, 16), np.float16), np.ones((8, 2), np.float16)
    x = np.ones((3, 16), np.float16)
    with pytest.raises(TypeError, match="out: expected float16, the dtype of x, got float32"):
        le.lora_delta(x, A, B, 1.0, out=np.ones((3, 8), np.float32))
    with pytest.raises(TypeError, match="B: expected float16, the dtype of A, got float32"):
        le.lora_delta(x, A, B.astype("f4"), 1.0)
    pool, _ = fill_pool(np.random.default_rng(0), 16, (8,), [2])
    ids = np.zeros(3, np.int32)
    with pytest.raises(TypeError, match="weights: expected float32, got float16"):
        pool.forward(x, ids, np.ones(3, np.float16))
    with pytest.raises(TypeError, match="ids: expected int32, got float16"):
        pool.forward(x, ids.astype(np.float16))
    with pytest.raises(TypeError, match="grad: expected float16, the dtype of x, got float32"):
        pool.adapt(x, np.ones((3, 8), "f4"), ids, 0.1)


def test_a_reference_pool_stores_the_same_bits():
    """The two backends round alike when a weight is added and when it learns."""
    from lora_engine.backends import reference as plain

    rng = np.random.default_rng(0)
    A, B = rng.standard_normal((2, 16)).astype("f4"), rng.standard_normal((8, 2)).astype("f4")
    ids, zeros = np.zeros(1, np.int32), (np.zeros((1, 16), "f4"), np.zeros((1, 8), "f4"))
    stored = []
    for backend in (_C, plain):
        pool = backend.Pool(16, [8], "float16", 0, 0, 0, 5)
        slot = pool.add([A], [B], 1.0)
        for _ in range(3):  # decay alone: exact in float32 and rounded by the generator
            pool.adapt(*zeros, ids, None, backend.Step(0.5, weight_decay=0.5))
        stored.append([bits(m[0]) for m in pool.get(slot)[:2]])
    assert stored[0] == stored[1]
