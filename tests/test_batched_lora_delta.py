"""Op 2 against the reference, and what must not happen to rows beside the point."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers import (
    DTYPE_PAIRS,
    DTYPES,
    LAYOUTS,
    TOLERANCE,
    batch_magnitude,
    bits,
    delta_error,
    f64,
    fill_pool,
    kinds_of,
    poisoned,
    strided,
    to_dtype,
)
from hypothesis import given
from hypothesis import strategies as st

import lora_engine as le
from lora_engine import reference

SIZES = st.sampled_from([1, 2, 7, 8, 16, 17, 33, 64, 127, 130, 300])
MIXED_RANKS = [0, 1, 2, 3, 8, 17, 64, 256]


def drawn_ids(rng: np.random.Generator, n: int, k: int | None, slots: int) -> np.ndarray:
    """Zipf-tailed, with -1 interleaved, and a slot that may come twice in a row."""
    shape = (n,) if k is None else (n, k)
    return (np.minimum(rng.zipf(1.5, shape), slots + 1) - 2).astype(np.int32)


@pytest.mark.parametrize(("x_dtype", "w_dtype"), DTYPE_PAIRS)
@given(data=st.data())
def test_matches_reference(x_dtype, w_dtype, data):
    n = data.draw(st.sampled_from([0, 1, 2, 5, 16, 33, 70]), "n")
    k = data.draw(st.sampled_from([None, 1, 2, 3]), "k")
    d_in = data.draw(SIZES, "in")
    slices = tuple(data.draw(st.lists(SIZES, min_size=1, max_size=3), "slices"))
    kind = data.draw(st.sampled_from(kinds_of(x_dtype)))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1), "seed"))
    ranks = [
        tuple(int(r) for r in rng.choice([0, 1, 2, 3, 4, 9, 32], len(slices)))
        if len(slices) > 1
        else r
        for r in (1, 2, 0, 5, 16)
    ]
    ranks = [r if not isinstance(r, tuple) or any(r) else (1, *r[1:]) for r in ranks]
    pool, adapters = fill_pool(rng, d_in, slices, ranks, w_dtype)
    layout = [data.draw(st.sampled_from(LAYOUTS), name) for name in ("x", "out")]
    x = strided(to_dtype(rng.standard_normal((n, d_in)), x_dtype, kind), layout[0])
    ids = drawn_ids(rng, n, k, len(ranks))
    weights = rng.standard_normal(ids.shape).astype("f4") if data.draw(st.booleans()) else None

    def as_kind(a):
        return a if a is None or kind == "numpy" else torch.from_numpy(a)

    delta = reference.batched_lora_delta(f64(x), adapters, slices, ids, weights)
    scale = batch_magnitude(x, adapters, slices, ids, weights)

    y = strided(poisoned(x, n, sum(slices)), layout[1])
    assert pool.forward(x, as_kind(ids), as_kind(weights), out=y, accumulate=False) is y
    assert delta_error(y, delta, scale) <= TOLERANCE[x_dtype]
    assert bits(le.batched_lora_delta(x, pool, as_kind(ids), as_kind(weights))) == bits(y)

    before = to_dtype(rng.standard_normal((n, sum(slices))), x_dtype, kind)
    y = strided(before, layout[1])
    want = f64(before) + delta
    pool.forward(x, as_kind(ids), as_kind(weights), out=y)
    assert delta_error(y, want, scale + np.abs(f64(before))) <= TOLERANCE[x_dtype]


@pytest.mark.parametrize("ids", [[-1] * 6, [0, -1, 1, -1, -1, 2], [0, 1, 2, 0, 1, 2]], ids=str)
def test_rows_without_an_adapter_keep_their_bits(ids):
    """With NaN in the last slot, which -1 must never be taken for."""
    rng = np.random.default_rng(0)
    pool, _ = fill_pool(rng, 50, (40,), [2, 3, 4])
    pool.add(np.full((2, 50), np.nan, "f4"), np.full((40, 2), np.nan, "f4"), 1.0)
    x = rng.standard_normal((6, 50)).astype("f4")
    before = rng.standard_normal((6, 40)).astype("f4")
    before[1, 3] = np.nan
    before[3, 5] = -0.0
    y = before.copy()
    index = np.array(ids, np.int32)
    pool.forward(x, index, out=y)
    untouched = index < 0
    assert bits(y[untouched]) == bits(before[untouched])
    assert np.isfinite(y[~untouched][~np.isnan(before[~untouched])]).all()
    assert (y[~untouched] != before[~untouched]).any(axis=1).all()
    y = np.full((6, 40), np.nan, "f4")
    pool.forward(x, index, out=y, accumulate=False)
    assert (y[untouched] == 0).all()
    assert np.isfinite(y).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [None, 3])
def test_layout_of_ids_and_weights_changes_no_bit(dtype, k):
    rng = np.random.default_rng(8)
    pool, _ = fill_pool(rng, 33, (20,), [1, 2, 5], dtype)
    ids = drawn_ids(rng, 12, k, 3)
    weights = rng.standard_normal(ids.shape).astype("f4")
    x = to_dtype(rng.standard_normal((12, 33)), dtype)

    def views(a):
        yield np.repeat(a, 2, axis=0)[::2]
        yield a[::-1].copy()[::-1]
        yield np.asfortranarray(a)
        yield torch.from_numpy(np.repeat(a, 3, axis=-1))[..., ::3]

    want = bits(pool.forward(x, ids, weights))
    for i, w in zip(views(ids), views(weights), strict=True):
        assert bits(pool.forward(x, i, w)) == want


@pytest.mark.parametrize("dtype", DTYPES)
def test_mixed_ranks_in_one_batch(dtype):
    rng = np.random.default_rng(1)
    pool, adapters = fill_pool(rng, 2049, (127,), MIXED_RANKS, dtype)
    ids = rng.permutation(np.repeat(np.arange(len(MIXED_RANKS)), 3)).astype(np.int32)
    x = rng.standard_normal((len(ids), 2049)).astype("f4")
    y = pool.forward(x, ids)
    ref = reference.batched_lora_delta(x, adapters, (127,), ids)
    for slot in adapters:  # each rank by itself: a large one must not hide a small one's error
        rows = ids == slot
        scale = batch_magnitude(x[rows], adapters, (127,), ids[rows])
        assert delta_error(y[rows], ref[rows], scale) <= TOLERANCE["float32"]
    assert (y[ids == 0] == 0).all()  # rank 0


@pytest.mark.parametrize(("adapters", "rows"), [(1, 0), (1, 1), (1, 300), (1024, 1024)])
def test_one_and_a_thousand_adapters(adapters, rows):
    rng = np.random.default_rng(2)
    pool, held = fill_pool(rng, 64, (48,), [2] * adapters)
    ids = rng.permutation(np.arange(rows) % adapters).astype(np.int32)
    x = rng.standard_normal((rows, 64)).astype("f4")
    y = pool.forward(x, ids)
    ref = reference.batched_lora_delta(x, held, (48,), ids)
    assert delta_error(y, ref, batch_magnitude(x, held, (48,), ids)) <= TOLERANCE["float32"]


@pytest.mark.parametrize("k", [None, 3])
def test_a_row_does_not_depend_on_its_batch(k, threads):
    rng = np.random.default_rng(3)
    pool, _ = fill_pool(rng, 515, (131,), [1, 2, 3, 16, 40])
    ids = drawn_ids(rng, 61, k, 5)
    weights = rng.standard_normal(ids.shape).astype("f4")
    x = rng.standard_normal((61, 515)).astype("f4")
    whole = pool.forward(x, ids, weights)
    for count in (1, 2):
        threads(count)
        assert bits(pool.forward(x, ids, weights)) == bits(whole)
    order = rng.permutation(61)
    assert bits(pool.forward(x[order], ids[order], weights[order])) == bits(whole[order])
    for i in range(61):
        assert bits(pool.forward(x[i : i + 1], ids[i : i + 1], weights[i : i + 1])) == bits(
            whole[[i]]
        )
    if k is None:  # a column of -1 beside it makes it a mixture of one
        wide = np.stack([ids, np.full_like(ids, -1)], axis=1)
        assert bits(pool.forward(x, wide, np.stack([weights, weights], axis=1))) == bits(whole)


def test_many_bytes_on_two_threads(threads):
    """Beyond the thread threshold, in whole tiles and (few rows, large rank) split ones."""
    rng = np.random.default_rng(4)
    pool, adapters = fill_pool(rng, 4096, (4096,), [16] * 8 + [256])
    for ids in (np.arange(8).repeat(5), np.array([8]), np.array([8, -1, 0])):
        index = ids.astype(np.int32)
        x = rng.standard_normal((len(ids), 4096)).astype("f4")
        threads(1)
        one = pool.forward(x, index)
        threads(2)
        assert bits(pool.forward(x, index)) == bits(one)
        ref = reference.batched_lora_delta(x, adapters, (4096,), index)
        assert delta_error(one, ref, batch_magnitude(x, adapters, (4096,), index)) <= 1e-6


def test_an_adapter_overwritten_between_calls():
    rng = np.random.default_rng(5)
    pool, _ = fill_pool(rng, 30, (20,), [2, 3])
    x, ids = rng.standard_normal((2, 30)).astype("f4"), np.array([0, 1], np.int32)
    before = pool.forward(x, ids)
    A, B = rng.standard_normal((5, 30)).astype("f4"), rng.standard_normal((20, 5)).astype("f4")
    pool.set(0, A, B, 0.25)
    after = pool.forward(x, ids)
    assert delta_error(after[:1], reference.lora_delta(x[:1], A, B, 0.25), np.ones((1, 20))) < 1e-5
    assert bits(after[1:]) == bits(before[1:])


def test_unequal_slices_with_one_missing():
    """q, k, v of grouped-query attention, v not adapted."""
    rng = np.random.default_rng(6)
    slices = (96, 24, 24)
    pool, adapters = fill_pool(rng, 64, slices, [(4, 2, 0), (0, 1, 3)])
    ids = np.array([0, 1, -1, 1], np.int32)
    x = rng.standard_normal((4, 64)).astype("f4")
    y = rng.standard_normal((4, 144)).astype("f4")
    before = y.copy()
    pool.forward(x, ids, out=y)
    ref = before + reference.batched_lora_delta(x, adapters, slices, ids)
    scale = np.abs(before) + batch_magnitude(x, adapters, slices, ids)
    assert delta_error(y, ref, scale) <= TOLERANCE["float32"]
    assert bits(y[0, 120:]) == bits(before[0, 120:])
    assert bits(y[1, :96]) == bits(before[1, :96])
    assert bits(y[2]) == bits(before[2])
    fresh = pool.forward(x, ids, out=np.full((4, 144), np.nan, "f4"), accumulate=False)
    assert (fresh[0, 120:] == 0).all()


def test_columns_of_one_matrix_are_no_overlap():
    """x and y as halves of one buffer, as a runtime may keep them."""
    rng = np.random.default_rng(7)
    pool, _ = fill_pool(rng, 16, (16,), [2])
    both = rng.standard_normal((5, 32)).astype("f4")
    x = both[:, :16].copy()
    ids = np.zeros(5, np.int32)
    pool.forward(both[:, :16], ids, out=both[:, 16:], accumulate=False)
    assert bits(both[:, :16]) == bits(x)
    assert bits(both[:, 16:]) == bits(pool.forward(x, ids))
