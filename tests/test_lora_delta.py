"""Op 1 against the reference: drawn shapes, dtypes, layouts."""

from __future__ import annotations

import numpy as np
import pytest
from helpers import (
    DTYPE_PAIRS,
    KINDS,
    LAYOUTS,
    TOLERANCE,
    bits,
    delta_error,
    f64,
    kinds_of,
    magnitude,
    poisoned,
    strided,
    to_dtype,
)
from hypothesis import given
from hypothesis import strategies as st

import lora_engine as le
from lora_engine import reference

SIZES = st.sampled_from([1, 2, 3, 7, 8, 15, 16, 17, 31, 33, 63, 64, 65, 127, 128, 200, 257, 2049])
RANKS = st.sampled_from([0, 1, 2, 3, 4, 5, 8, 17, 64, 256])


@pytest.mark.parametrize(("x_dtype", "w_dtype"), DTYPE_PAIRS)
@given(data=st.data())
def test_matches_reference(x_dtype, w_dtype, data):
    n = data.draw(st.sampled_from([0, 1, 2, 3, 5, 16, 17, 40]), "n")
    d_in, d_out, r = data.draw(SIZES, "in"), data.draw(SIZES, "out"), data.draw(RANKS, "r")
    kind = data.draw(st.sampled_from(kinds_of(x_dtype, w_dtype)))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1), "seed"))
    layout = [data.draw(st.sampled_from(LAYOUTS), name) for name in ("x", "A", "B", "out")]
    x = strided(to_dtype(rng.standard_normal((n, d_in)), x_dtype, kind), layout[0])
    A = strided(to_dtype(rng.standard_normal((r, d_in)), w_dtype, kind), layout[1])
    B = strided(to_dtype(rng.standard_normal((d_out, r)), w_dtype, kind), layout[2])
    scaling = data.draw(st.sampled_from([1.0, -0.5, 2.0, 0.0]), "scaling")
    delta, scale = (
        reference.lora_delta(f64(x), f64(A), f64(B), scaling),
        magnitude(x, A, B, scaling),
    )

    y = strided(poisoned(x, n, d_out), layout[3])
    assert le.lora_delta(x, A, B, scaling, out=y) is y
    assert delta_error(y, delta, scale) <= TOLERANCE[x_dtype]
    assert bits(le.lora_delta(x, A, B, scaling)) == bits(y)

    before = to_dtype(rng.standard_normal((n, d_out)), x_dtype, kind)
    y = strided(before, layout[3])
    want = f64(before) + delta
    le.lora_delta(x, A, B, scaling, out=y, accumulate=True)
    assert delta_error(y, want, scale + np.abs(f64(before))) <= TOLERANCE[x_dtype]


@pytest.mark.parametrize("kind", KINDS)
def test_vector_is_one_row(kind):
    rng = np.random.default_rng(0)
    x, A, B = (
        to_dtype(rng.standard_normal(s), "float32", kind) for s in ((1, 33), (2, 33), (9, 2))
    )
    y = le.lora_delta(x[0], A, B, 1.5)
    assert tuple(y.shape) == (9,)
    assert bits(y) == bits(le.lora_delta(x, A, B, 1.5))


@pytest.mark.parametrize("rank", [1, 2, 3, 16, 64])
def test_row_does_not_depend_on_its_batch(rank, threads):
    rng = np.random.default_rng(rank)
    x = rng.standard_normal((37, 515)).astype("f4")
    A, B = (
        rng.standard_normal((rank, 515)).astype("f4"),
        rng.standard_normal((259, rank)).astype("f4"),
    )
    whole = le.lora_delta(x, A, B, 1.0)
    for count in (1, 2):
        threads(count)
        assert bits(le.lora_delta(x, A, B, 1.0)) == bits(whole)
    order = rng.permutation(37)
    assert bits(le.lora_delta(x[order], A, B, 1.0)) == bits(whole[order])
    for i in range(37):
        assert bits(le.lora_delta(x[i : i + 1], A, B, 1.0)) == bits(whole[i : i + 1])


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("rank", [1, 2, 4, 16])
@pytest.mark.parametrize("n", [8, 17])
def test_many_rows_of_unusual_strides(n, rank, order):
    """A without columns, A and B of one row or column again and again, backwards, and B a part of a
    wider array, for rows enough to share the weights."""
    rng = np.random.default_rng(rank)

    def normal(*shape):
        return rng.standard_normal(shape).astype("f4")

    def check(x, A, B):
        y = np.full((len(x), len(B)), np.nan, np.float32)
        le.lora_delta(x, A, B, 1.5, out=y)
        want = reference.lora_delta(x, A, B, 1.5)
        assert delta_error(y, want, magnitude(x, A, B, 1.5)) <= TOLERANCE["float32"]

    B = np.array(normal(33, rank), order=order)
    none = le.lora_delta(np.zeros((n, 0), "f4"), np.zeros((rank, 0), "f4"), B, 1.5)
    assert none.shape == (n, 33)
    assert not none.any()
    x, A = normal(n, 1000), normal(rank, 1000)
    check(x, np.broadcast_to(A[:1], A.shape), B)
    check(x, A[::-1], B[::-1, ::-1])
    check(x, A, np.broadcast_to(B[:, :1], B.shape))
    wide = np.array(normal(99, rank), order=order)
    check(x, A, wide[33:66])


@pytest.mark.parametrize("order", ["C", "F"])
def test_large_single_row_is_the_same_on_two_threads(order, threads):
    """Large enough for one row's inside to be dealt out to threads."""
    rng = np.random.default_rng(3)
    x = rng.standard_normal((1, 4097)).astype("f4")
    A = rng.standard_normal((256, 4097)).astype("f4")
    B = np.array(rng.standard_normal((3001, 256)), "f4", order=order)
    threads(1)
    one = le.lora_delta(x, A, B, 0.7)
    threads(2)
    assert bits(le.lora_delta(x, A, B, 0.7)) == bits(one)
    want = reference.lora_delta(x, A, B, 0.7)
    assert delta_error(one, want, magnitude(x, A, B, 0.7)) <= TOLERANCE["float32"]


def test_nan_stays_in_its_row():
    x = np.ones((3, 8), np.float32)
    x[1, 2] = np.nan
    y = le.lora_delta(x, np.ones((2, 8), np.float32), np.ones((5, 2), np.float32), 1.0)
    assert np.isnan(y[1]).all()
    assert (y[[0, 2]] == 16).all()
