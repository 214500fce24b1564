"""Op 2 on the Triton backend against the reference, and what must not happen to other rows."""

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
    poisoned,
    strided,
)
from helpers_triton import (  # noqa: F401  the fixture
    DEVICE,
    FULL,
    few,
    indices,
    on_device,
    triton_backend,
)
from hypothesis import given
from hypothesis import strategies as st
from test_batched_lora_delta import MIXED_RANKS, drawn_ids

import lora_engine as le
from lora_engine import reference

pytestmark = pytest.mark.usefixtures("triton_backend")

WIDTHS = st.sampled_from([1, 2, 17, 64, 127, 130, 300])


@pytest.mark.parametrize(("x_dtype", "w_dtype"), DTYPE_PAIRS)
@few
@given(data=st.data())
def test_matches_reference(x_dtype, w_dtype, data):
    n = data.draw(st.sampled_from([0, 1, 3] if not FULL else [0, 1, 2, 5, 9, 33]), "n")
    k = data.draw(st.sampled_from([None, 2]), "k")
    d_in = data.draw(WIDTHS, "in")
    slices = tuple(data.draw(st.lists(WIDTHS, min_size=1, max_size=3 if FULL else 2), "slices"))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1), "seed"))
    ranks = [1, 2, 0, 5, 16]
    if len(slices) > 1:
        ranks = [(max(r, 1), *rng.choice([0, 1, 17], len(slices) - 1).tolist()) for r in ranks]
    pool, adapters = fill_pool(rng, d_in, slices, ranks, w_dtype, device=DEVICE)
    layout = [data.draw(st.sampled_from(LAYOUTS), name) for name in ("x", "out")]
    x = strided(on_device(rng.standard_normal((n, d_in)), x_dtype), layout[0])
    ids = drawn_ids(rng, n, k, len(ranks))
    w = rng.standard_normal(ids.shape).astype("f4") if data.draw(st.booleans()) else None
    given_ids, given_w = indices(ids), None if w is None else on_device(w)
    delta = reference.batched_lora_delta(f64(x), adapters, slices, ids, w)
    scale = batch_magnitude(x, adapters, slices, ids, w)

    y = strided(poisoned(x, n, sum(slices)), layout[1])
    assert pool.forward(x, given_ids, given_w, out=y, accumulate=False) is y
    assert delta_error(y, delta, scale) <= TOLERANCE[x_dtype]

    before = on_device(rng.standard_normal((n, sum(slices))), x_dtype)
    y = strided(before, layout[1])
    want = f64(before) + delta
    le.batched_lora_delta(x, pool, given_ids, given_w, out=y)
    assert delta_error(y, want, scale + np.abs(f64(before))) <= TOLERANCE[x_dtype]


@pytest.mark.parametrize("ids", [[-1] * 6, [0, -1, 1, -1, -1, 2], [0, 1, 2, 0, 1, 2]], ids=str)
def test_rows_without_an_adapter_keep_their_bits(ids):
    """With NaN in the last slot, which -1 must never be taken for."""
    rng = np.random.default_rng(0)
    pool, _ = fill_pool(rng, 50, (40,), [2, 3, 4], device=DEVICE)
    pool.add(np.full((2, 50), np.nan, "f4"), np.full((40, 2), np.nan, "f4"), 1.0)
    x = on_device(rng.standard_normal((6, 50)))
    before = on_device(rng.standard_normal((6, 40)))
    before[1, 3], before[3, 5] = float("nan"), -0.0
    y, index = before.clone(), indices(ids)
    pool.forward(x, index, out=y)
    untouched = index < 0
    assert bits(y[untouched]) == bits(before[untouched])
    assert (y[~untouched] != before[~untouched]).any(dim=1).all()
    y = poisoned(x, 6, 40)
    pool.forward(x, index, out=y, accumulate=False)
    assert (y[untouched] == 0).all()
    assert not torch.isnan(y).any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_mixed_ranks_in_one_batch(dtype):
    rng = np.random.default_rng(1)
    pool, adapters = fill_pool(rng, 257, (127,), MIXED_RANKS, dtype, device=DEVICE)
    ids = rng.permutation(np.arange(len(MIXED_RANKS)))
    x = on_device(rng.standard_normal((len(ids), 257)))
    y = pool.forward(x, indices(ids))
    ref = reference.batched_lora_delta(f64(x), adapters, (127,), ids)
    for slot in adapters:  # each rank by itself: a large one must not hide a small one's error
        rows = ids == slot
        scale = batch_magnitude(f64(x)[rows], adapters, (127,), ids[rows])
        assert delta_error(f64(y)[rows], ref[rows], scale) <= TOLERANCE["float32"]
    assert (y[indices(ids) == 0] == 0).all()  # rank 0


def test_nan_past_a_rank_is_never_read():
    """What lies behind an adapter of rank 1 is another's, full of NaN."""
    rng = np.random.default_rng(2)
    pool, adapters = fill_pool(rng, 33, (17,), [1], device=DEVICE)
    for _ in range(3):
        pool.add(np.full((16, 33), np.nan, "f4"), np.full((17, 16), np.nan, "f4"), 1.0)
    x = on_device(rng.standard_normal((3, 33)))
    ids = np.zeros(len(x), int)
    y = pool.forward(x, indices(ids))
    ref = reference.batched_lora_delta(f64(x), adapters, (17,), ids)
    assert delta_error(y, ref, batch_magnitude(x, adapters, (17,), ids)) <= TOLERANCE["float32"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_decode_and_prefill_give_a_row_the_same_bits(dtype):
    """A row alone, in a batch of 5 and in one of 300, where blocks hold 32 rows."""
    rng = np.random.default_rng(3)
    pool, adapters = fill_pool(rng, 515, (100,), [1, 2, 16], dtype, device=DEVICE)
    ids = np.repeat(drawn_ids(rng, 10, None, 3), 30)
    ids[5::7] = -1
    x = on_device(rng.standard_normal((300, 515)), dtype)
    w = on_device(rng.standard_normal(300))
    index = indices(ids)
    whole = pool.forward(x, index, w)
    ref = reference.batched_lora_delta(f64(x), adapters, (100,), ids, f64(w))
    scale = batch_magnitude(x, adapters, (100,), ids, f64(w))
    assert delta_error(whole, ref, scale) <= TOLERANCE[dtype]
    for rows in (slice(0, 5), slice(299, 300), slice(149, 152)):
        assert bits(pool.forward(x[rows], index[rows], w[rows])) == bits(whole[rows])
    if FULL:
        order = torch.from_numpy(rng.permutation(300)).to(DEVICE)
        assert bits(pool.forward(x[order], index[order], w[order])) == bits(whole[order])


def test_a_mixture_of_one_is_the_adapter():
    rng = np.random.default_rng(4)
    pool, _ = fill_pool(rng, 33, (20,), [1, 2, 5], device=DEVICE)
    ids = np.array([2, -1, 0])
    x, w = on_device(rng.standard_normal((3, 33))), on_device(rng.standard_normal(3))
    wide = indices(np.stack([np.full_like(ids, -1), ids], axis=1))
    want = bits(pool.forward(x, indices(ids), w))
    assert bits(pool.forward(x, wide, torch.stack([w, w], dim=1))) == want
    strided_ids = torch.stack([indices(ids)] * 3, dim=1)[:, 1]
    assert bits(pool.forward(x, strided_ids, torch.stack([w, w], dim=1)[:, 1])) == want


def test_unequal_slices_with_one_missing():
    rng = np.random.default_rng(6)
    slices = (96, 24, 24)
    pool, adapters = fill_pool(rng, 64, slices, [(4, 2, 0), (0, 1, 3)], device=DEVICE)
    ids = np.array([0, 1, -1, 1])
    x, y = on_device(rng.standard_normal((4, 64))), on_device(rng.standard_normal((4, 144)))
    before = y.clone()
    pool.forward(x, indices(ids), out=y)
    ref = f64(before) + reference.batched_lora_delta(f64(x), adapters, slices, ids)
    scale = np.abs(f64(before)) + batch_magnitude(x, adapters, slices, ids)
    assert delta_error(y, ref, scale) <= TOLERANCE["float32"]
    assert bits(y[0, 120:]) == bits(before[0, 120:])
    assert bits(y[1, :96]) == bits(before[1, :96])
    assert bits(y[2]) == bits(before[2])
    fresh = pool.forward(x, indices(ids), out=poisoned(x, 4, 144), accumulate=False)
    assert (fresh[0, 120:] == 0).all()


@pytest.mark.parametrize("slices", [(17,), (30, 7)], ids=str)
def test_transposed_is_the_gradient_of_x(slices):
    rng = np.random.default_rng(7)
    ranks = [2, 5] if len(slices) == 1 else [(2, 3), (1, 0)]
    pool, adapters = fill_pool(rng, 40, slices, ranks, device=DEVICE)
    ids = np.array([0, 1, -1, 1, 0])
    up = on_device(rng.standard_normal((5, sum(slices))))
    dx = pool._storage.forward(up, indices(ids), None, poisoned(up, 5, 40), False, True)
    turned = {s: reference.transposed(a, slices) for s, a in adapters.items()}
    want = reference.batched_lora_delta(f64(up), turned, (40,), ids)
    assert delta_error(dx, want, batch_magnitude(up, turned, (40,), ids)) <= TOLERANCE["float32"]


@pytest.mark.parametrize("bad", [3, 1000, -2, 1])
def test_a_bad_id_is_none_and_the_next_call_says_so(bad):
    """Slot 1 was removed; 3 was never issued."""
    rng = np.random.default_rng(8)
    pool, adapters = fill_pool(rng, 20, (9,), [2, 2, 2], device=DEVICE)
    pool.remove(1)
    x, before = on_device(rng.standard_normal((3, 20))), on_device(rng.standard_normal((3, 9)))
    y, ids = before.clone(), np.array([0, bad, 2])
    pool.forward(x, indices(ids), out=y)
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    ids[1] = -1
    ref = f64(before) + reference.batched_lora_delta(f64(x), adapters, (9,), ids)
    scale = np.abs(f64(before)) + batch_magnitude(x, adapters, (9,), ids)
    assert bits(y[1]) == bits(before[1])
    assert delta_error(y, ref, scale) <= TOLERANCE["float32"]
    with pytest.raises(IndexError, match=rf"ids: expected -1 or slots in use.*got {bad}"):
        pool.forward(x, indices(ids), out=y)
    pool.forward(x, indices(ids), out=y)  # said once


def test_an_adapter_overwritten_between_calls():
    rng = np.random.default_rng(5)
    pool, _ = fill_pool(rng, 30, (20,), [2, 3], device=DEVICE)
    x, ids = on_device(rng.standard_normal((2, 30))), indices([0, 1])
    before = pool.forward(x, ids)
    A, B = rng.standard_normal((5, 30)).astype("f4"), rng.standard_normal((20, 5)).astype("f4")
    pool.set(0, A, B, 0.25)
    after = pool.forward(x, ids)
    want = reference.lora_delta(f64(x)[:1], A, B, 0.25)
    assert delta_error(after[:1], want, np.ones((1, 20))) < 1e-5
    assert bits(after[1:]) == bits(before[1:])
