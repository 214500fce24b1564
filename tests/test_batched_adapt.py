"""Op 3 against the reference and finite differences; rounding, refusals, determinism."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers import (
    DTYPE_PAIRS,
    LAYOUTS,
    STORED,
    bits,
    delta_error,
    f64,
    fill_pool,
    kinds_of,
    strided,
    to_dtype,
)
from hypothesis import given
from hypothesis import strategies as st
from test_batched_lora_delta import SIZES, drawn_ids

from lora_engine import reference

STEPS = st.fixed_dictionaries(
    {"lr": st.sampled_from([0.1, 0.003])},
    optional={
        "max_norm": st.sampled_from([0.5, 1e6]),
        "lr_ratio": st.sampled_from([4.0, 16.0]),
        "train_A": st.just(False),
        "weight_decay": st.sampled_from([0.1]),
    },
)


def weights_of(adapter: reference.Adapter) -> list[np.ndarray]:
    return [m for m in (*adapter.A, *adapter.B) if m is not None]


def step_error(got: reference.Adapter, want: reference.Adapter, before: reference.Adapter) -> float:
    """The gap over the size of weights and step together."""
    gap = sum(
        np.linalg.norm(f64(g) - w) ** 2
        for g, w in zip(weights_of(got), weights_of(want), strict=True)
    )
    size = sum(
        np.linalg.norm(np.abs(w) + np.abs(f64(w) - b)) ** 2
        for w, b in zip(weights_of(want), weights_of(before), strict=True)
    )
    return float(np.sqrt(gap / size)) if size else 0.0


@pytest.mark.parametrize(("x_dtype", "w_dtype"), DTYPE_PAIRS)
@given(data=st.data())
def test_matches_reference(x_dtype, w_dtype, data):
    n = data.draw(st.sampled_from([0, 1, 2, 5, 70]), "n")
    k = data.draw(st.sampled_from([None, 1, 2]), "k")
    d_in = data.draw(SIZES, "in")
    slices = tuple(data.draw(st.lists(SIZES, min_size=1, max_size=3), "slices"))
    step = data.draw(STEPS, "step")
    kind = data.draw(st.sampled_from(kinds_of(x_dtype)))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1), "seed"))
    ranks = (
        [1, 2, 5]
        if len(slices) == 1
        else [(1, *[0, 2][: len(slices) - 1]), (3,) * len(slices), (2, *[1, 0][: len(slices) - 1])]
    )
    history = data.draw(st.sampled_from([0, 1]), "history")
    held = fill_pool(rng, d_in, slices, ranks, w_dtype, history=history, seed=7)
    pool, before = held
    versions = {slot: pool.version(slot) for slot in before}
    x, grad = (
        strided(
            to_dtype(rng.standard_normal((n, w)), x_dtype, kind),
            data.draw(st.sampled_from(LAYOUTS)),
        )
        for w in (d_in, sum(slices))
    )
    ids = drawn_ids(rng, n, k, 3)
    weights = rng.uniform(0.5, 1.5, ids.shape).astype("f4") if data.draw(st.booleans()) else None
    index, w = (
        (torch.from_numpy(ids), None if weights is None else torch.from_numpy(weights))
        if kind == "torch"
        else (ids, weights)
    )
    result = pool.adapt(x, grad, index, weights=w, **step)

    want, applied = reference.batched_adapt(
        f64(x), f64(grad), before, slices, ids, reference.Step(**step), weights
    )
    assert result.applied.tolist() == applied.tolist()
    after = held.refresh()
    for slot, adapter in after.items():
        named = bool((ids == slot).any())
        assert pool.version(slot) == versions[slot] + named
        if not named:
            assert all(
                bits(a) == bits(b)
                for a, b in zip(weights_of(adapter), weights_of(before[slot]), strict=True)
            )
        assert step_error(adapter, want[slot], before[slot]) <= STORED[w_dtype]
        if history and named:
            pool.rollback(slot)
    if history:
        for slot, adapter in held.refresh().items():
            assert all(
                bits(a) == bits(b)
                for a, b in zip(weights_of(adapter), weights_of(before[slot]), strict=True)
            )


@pytest.mark.parametrize("slices", [(5,), (4, 3)], ids=["out5", "out4+3"])
def test_gradient_agrees_with_finite_differences(slices):
    """dL/dtheta of L = sum over rows of a nonlinear function of y, mixtures included."""
    rng = np.random.default_rng(0)
    outs = sum(slices)
    held = fill_pool(rng, 6, slices, [(2,) * len(slices) if len(slices) > 1 else 2] * 2)
    pool, before = held
    x = rng.standard_normal((5, 6)).astype("f4")
    ids = np.array([[0, 1], [0, -1], [1, 0], [-1, -1], [0, 0]], np.int32)
    weights = rng.uniform(0.5, 1.5, ids.shape).astype("f4")
    shift = rng.standard_normal((5, outs))

    def loss(adapters):
        y = reference.batched_lora_delta(x, adapters, slices, ids, weights)
        return float(np.cosh(y * 0.3 + shift).sum())

    y = reference.batched_lora_delta(x, before, slices, ids, weights)
    grad = (0.3 * np.sinh(y * 0.3 + shift)).astype("f4")
    lr = 1e-2
    pool.adapt(x, grad, ids, lr, weights=weights)
    after = held.refresh()
    rows = {0: 4, 1: 2}  # distinct rows that name each slot
    for slot, count in rows.items():
        for old, new in zip(weights_of(before[slot]), weights_of(after[slot]), strict=True):
            learned = (f64(old) - f64(new)) / lr * count
            numeric = np.empty_like(learned)
            for at in np.ndindex(*old.shape):
                values = []
                for sign in (1, -1):
                    moved = {
                        s: reference.Adapter(
                            [f64(m).copy() for m in a.A], [f64(m).copy() for m in a.B], a.scaling
                        )
                        for s, a in before.items()
                    }
                    place = next(i for i, m in enumerate(weights_of(before[slot])) if m is old)
                    weights_of(moved[slot])[place][at] += sign * 1e-4
                    values.append(loss(moved))
                numeric[at] = (values[0] - values[1]) / 2e-4
            assert delta_error(learned, numeric, np.abs(numeric) + 1) < 1e-3


@pytest.mark.parametrize("bad", [np.nan, np.inf], ids=["nan", "inf"])
@pytest.mark.parametrize("where", ["x", "grad"])
@pytest.mark.parametrize("rows", [1, 3])
def test_a_gradient_that_is_not_finite_leaves_its_adapter(bad, where, rows):
    rng = np.random.default_rng(1)
    held = fill_pool(rng, 9, (4,), [2, 2, 2], history=1)
    pool, before = held
    x, grad = (
        rng.standard_normal((3 * rows, 9)).astype("f4"),
        rng.standard_normal((3 * rows, 4)).astype("f4"),
    )
    ids = np.repeat(np.arange(3), rows).astype(np.int32)
    {"x": x, "grad": grad}[where][rows, 2] = bad  # the first row of slot 1
    result = pool.adapt(x, grad, ids, 0.1)
    assert result.applied.tolist() == [True] * rows + [False] * rows + [True] * rows
    assert f"{rows} rows" in result.note
    assert "NaN" in result.note
    after = held.refresh()
    assert [
        bits(a) == bits(b) for a, b in zip(weights_of(after[1]), weights_of(before[1]), strict=True)
    ] == [True, True]
    assert bits(after[0].B[0]) != bits(before[0].B[0])
    assert [pool.version(s) for s in (0, 1, 2)] == [2, 1, 2]


def test_gradients_beyond_the_square_root_of_float32_are_finite():
    rng = np.random.default_rng(2)
    pool, before = fill_pool(rng, 9, (4,), [2])
    x = np.full((1, 9), 1e30, "f4")
    assert pool.adapt(x, np.full((1, 4), 1e-30, "f4"), np.zeros(1, np.int32), 1e-3).applied.all()
    assert bits(pool.get(0)[0]) != bits(before[0].A[0])


def test_a_row_without_an_adapter_is_reported():
    pool, _ = fill_pool(np.random.default_rng(3), 5, (4,), [2])
    x, grad = np.ones((2, 5), "f4"), np.ones((2, 4), "f4")
    result = pool.adapt(x, grad, np.array([-1, 0], np.int32), 0.1)
    assert result.applied.tolist() == [False, True]
    assert "no adapter" in result.note


def test_same_bits_for_any_thread_count_and_order_of_other_rows(threads):
    rng = np.random.default_rng(4)
    x, grad = (
        rng.standard_normal((200, 700)).astype("f4"),
        rng.standard_normal((200, 500)).astype("f4"),
    )
    ids = rng.integers(0, 16, 200).astype(np.int32)
    results = []
    for count in (1, 2, 2):
        threads(count)
        held = fill_pool(
            np.random.default_rng(5), 700, (500,), [1, 2, 3, 8] * 4, "bfloat16", seed=3
        )
        held.pool.adapt(x, grad, ids, 0.01, max_norm=1.0)
        results.append([bits(m) for a in held.refresh().values() for m in weights_of(a)])
    alone = fill_pool(np.random.default_rng(5), 700, (500,), [1, 2, 3, 8] * 4, "bfloat16", seed=3)
    for slot in range(16):  # the rows of each slot, without the others
        mine = ids == slot
        alone.pool.adapt(x[mine], grad[mine], ids[mine], 0.01, max_norm=1.0)
    results.append([bits(m) for a in alone.refresh().values() for m in weights_of(a)])
    assert results[0] == results[1] == results[2] == results[3]


ROUNDING = {
    "bfloat16": reference.round_bfloat16_stochastic,
    "float16": reference.round_float16_stochastic,
}


@pytest.mark.parametrize(("dtype", "ulp"), [("bfloat16", 2.0**-8), ("float16", 2.0**-11)])
def test_rounding_is_the_reference_generator(dtype, ulp):
    """Weights so simple that the float32 step is exact: then every bit is set by the hash."""
    pool, _ = fill_pool(np.random.default_rng(0), 257, (65,), [3], dtype, seed=11)
    pool.set(0, np.ones((3, 257), "f4"), np.zeros((65, 3), "f4"), 1.0)
    grad = np.zeros((1, 65), "f4")
    version = pool.version(0)
    pool.adapt(np.zeros((1, 257), "f4"), grad, np.zeros(1, np.int32), 0.5, weight_decay=ulp / 4)
    want = np.float32(1.0) * np.float32(1.0 - ulp / 8)
    key = reference.rounding_key(11, 0, version)
    A, B, _ = pool.get(0)
    expected = ROUNDING[dtype](np.full(3 * 257, want), key, np.arange(3 * 257))
    assert bits(A.ravel()) == bits(expected)
    assert set(np.unique(A)) == {np.float32(1.0 - ulp), np.float32(1.0)}
    assert (B == 0).all()


@pytest.mark.parametrize(("dtype", "size"), [("bfloat16", 1e-3), ("float16", 1e-4)])
def test_16_bits_learn_what_plain_rounding_loses(dtype, size):
    """100 small steps on weights near 1 (anchors.md): plain rounding moves them by 0."""
    pool, _ = fill_pool(np.random.default_rng(0), 512, (8,), [1], dtype)
    pool.set(0, np.ones((1, 512), "f4"), np.ones((8, 1), "f4"), 1.0)
    x = np.ones((1, 512), "f4")
    for _ in range(100):
        _, B, _ = pool.get(0)
        gA_unit = float(B.sum())  # gA = (Bᵀ grad) x with grad = 1: scaled to a step of `size`
        pool.adapt(x, np.ones((1, 8), "f4"), np.zeros(1, np.int32), size / gA_unit, lr_ratio=0.0)
    moved = 1.0 - float(pool.get(0)[0].mean())
    assert 80 * size < moved < 120 * size
    nearest = {"bfloat16": reference.round_bfloat16, "float16": reference.round_float16}[dtype]
    assert float(nearest(np.float32(1.0 - size))) == 1.0


@pytest.mark.parametrize(("dtype", "ulp"), [("bfloat16", 2.0**-7), ("float16", 2.0**-10)])
def test_stochastic_rounding_is_unbiased(dtype, ulp):
    values = np.full(200_000, np.float32(1.0 + 0.3 * ulp))
    rounded = ROUNDING[dtype](values, reference.rounding_key(1, 2, 3), np.arange(values.size))
    up = float((rounded > 1.0).mean())
    assert abs(up - 0.3) < 0.005


def test_ten_thousand_users_in_one_call():
    rng = np.random.default_rng(6)
    held = fill_pool(rng, 32, (16,), [2] * 10_000)
    x, grad = (
        rng.standard_normal((10_000, 32)).astype("f4"),
        rng.standard_normal((10_000, 16)).astype("f4"),
    )
    ids = rng.permutation(10_000).astype(np.int32)
    assert held.pool.adapt(x, grad, ids, 0.1).applied.all()
    want, _ = reference.batched_adapt(
        x[:50], grad[:50], held.adapters, (16,), ids[:50], reference.Step(0.1)
    )
    for slot in ids[:50]:
        got = held.pool.get(int(slot))
        assert delta_error(got[1], want[int(slot)].B[0], np.abs(want[int(slot)].B[0])) < 2e-6


@pytest.mark.parametrize(
    ("dtype", "step"),
    [
        ("float32", {"lr": 1e35}),
        ("float32", {"lr": 1e20, "lr_ratio": 1e18}),
        ("float16", {"lr": 1.0}),
        ("float16", {"lr": 1e-4, "lr_ratio": 1e4}),
    ],
    ids=str,
)
def test_a_step_beyond_the_range_leaves_its_adapter(dtype, step):
    held = fill_pool(np.random.default_rng(8), 9, (4,), [2], dtype)
    x, grad = np.full((1, 9), 1e3, "f4"), np.full((1, 4), 1e3, "f4")
    result = held.pool.adapt(x, grad, np.zeros(1, np.int32), **step)
    assert result.applied.tolist() == [False]
    after = held.refresh()[0]
    assert bits(after.A[0]) == bits(held.adapters[0].A[0])
    assert bits(after.B[0]) == bits(held.adapters[0].B[0])


def test_an_adapter_of_rank_0_learns_nothing_and_says_so():
    pool, _ = fill_pool(np.random.default_rng(9), 9, (4,), [0])
    result = pool.adapt(np.ones((1, 9), "f4"), np.ones((1, 4), "f4"), np.zeros(1, np.int32), 0.1)
    assert result.applied.tolist() == [False]
