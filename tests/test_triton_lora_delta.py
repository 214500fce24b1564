"""Op 1 on the Triton backend against the reference."""

from __future__ import annotations

import numpy as np
import pytest
from helpers import (
    DTYPE_PAIRS,
    LAYOUTS,
    TOLERANCE,
    bits,
    delta_error,
    f64,
    magnitude,
    poisoned,
    strided,
)
from helpers_triton import few, on_device, triton_backend  # noqa: F401  the fixture
from hypothesis import given
from hypothesis import strategies as st

import lora_engine as le
from lora_engine import reference

pytestmark = pytest.mark.usefixtures("triton_backend")

WIDTHS = st.sampled_from([1, 2, 17, 127, 130, 300, 1030])


@pytest.mark.parametrize(("x_dtype", "w_dtype"), DTYPE_PAIRS)
@few
@given(data=st.data())
def test_matches_reference(x_dtype, w_dtype, data):
    n = data.draw(st.sampled_from([0, 1, 17, 70]), "n")
    r = data.draw(st.sampled_from([0, 1, 2, 3, 8, 17]), "r")
    d_in, d_out = data.draw(WIDTHS, "in"), data.draw(WIDTHS, "out")
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1), "seed"))
    layout = [data.draw(st.sampled_from(LAYOUTS)) for _ in range(4)]
    x = strided(on_device(rng.standard_normal((n, d_in)), x_dtype), layout[0])
    A = strided(on_device(rng.standard_normal((r, d_in)), w_dtype), layout[1])
    B = strided(on_device(rng.standard_normal((d_out, r)), w_dtype), layout[2])
    want, size = reference.lora_delta(f64(x), f64(A), f64(B), 0.7), magnitude(x, A, B, 0.7)

    y = strided(poisoned(x, n, d_out), layout[3])
    assert le.lora_delta(x, A, B, 0.7, out=y) is y
    assert delta_error(y, want, size) <= TOLERANCE[x_dtype]
    assert bits(le.lora_delta(x, A, B, 0.7)) == bits(y)

    before = f64(y)
    le.lora_delta(x, A, B, -0.7, out=y, accumulate=True)
    assert delta_error(y, before - want, size + np.abs(before)) <= TOLERANCE[x_dtype]


@pytest.mark.parametrize(("n", "r", "d_in", "d_out"), [(1, 256, 2049, 127), (3, 1, 1030, 2049)])
def test_large_sizes(n, r, d_in, d_out):
    rng = np.random.default_rng(0)
    x, A, B = (on_device(rng.standard_normal(s)) for s in ((n, d_in), (r, d_in), (d_out, r)))
    y = le.lora_delta(x, A, B, 0.5)
    want = reference.lora_delta(f64(x), f64(A), f64(B), 0.5)
    assert delta_error(y, want, magnitude(x, A, B, 0.5)) <= TOLERANCE["float32"]


@pytest.mark.parametrize("x_dtype", ["bfloat16", "float16"])
def test_numbers_of_one_sign_keep_their_precision(x_dtype):
    """No sum cancels, so what products of float32 weights lose would show."""
    rng = np.random.default_rng(5)
    x = on_device(rng.uniform(1, 2, (3, 300)), x_dtype)
    A, B = on_device(rng.uniform(1, 2, (5, 300))), on_device(rng.uniform(1, 2, (40, 5)))
    want = reference.lora_delta(f64(x), f64(A), f64(B), 0.01)
    error = delta_error(le.lora_delta(x, A, B, 0.01), want, magnitude(x, A, B, 0.01))
    assert error <= TOLERANCE[x_dtype] / 2


def test_a_vector_is_one_row():
    rng = np.random.default_rng(1)
    x, A, B = (on_device(rng.standard_normal(s)) for s in ((20,), (2, 20), (7, 2)))
    y = le.lora_delta(x, A, B, 1.0)
    assert y.shape == (7,)
    assert bits(y) == bits(le.lora_delta(x[None], A, B, 1.0))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_row_does_not_depend_on_its_batch(dtype):
    """Across the two tilings, of up to 64 rows and of more."""
    rng = np.random.default_rng(2)
    x = on_device(rng.standard_normal((100, 515)), dtype)
    A, B = (
        on_device(rng.standard_normal((5, 515)), dtype),
        on_device(rng.standard_normal((33, 5)), dtype),
    )
    whole = le.lora_delta(x, A, B, 1.0)
    for rows in (slice(0, 64), slice(99, 100)):
        assert bits(le.lora_delta(x[rows], A, B, 1.0)) == bits(whole[rows])


def test_nan_stays_in_its_row():
    rng = np.random.default_rng(3)
    x, A, B = (on_device(rng.standard_normal(s)) for s in ((20, 40), (3, 40), (9, 3)))
    x[7, 5] = float("nan")
    y = f64(le.lora_delta(x, A, B, 1.0))
    assert np.isnan(y[7]).all()
    assert np.isfinite(np.delete(y, 7, 0)).all()
