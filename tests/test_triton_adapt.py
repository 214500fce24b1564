"""Op 3 on the Triton backend: gradients, steps, rounding, what is refused, order of rows."""

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
from helpers_triton import (  # noqa: F401  the fixture
    DEVICE,
    FULL,
    few,
    indices,
    interpreted,
    on_device,
    triton_backend,
)
from hypothesis import given
from hypothesis import strategies as st
from test_batched_adapt import ROUNDING, STEPS, step_error, weights_of
from test_batched_lora_delta import drawn_ids

import lora_engine as le
from lora_engine import reference

pytestmark = pytest.mark.usefixtures("triton_backend")

SIZES = st.sampled_from([1, 5, 127, 2049] if FULL else [1, 5, 127])


def applied(result) -> list[bool]:
    return np.asarray(result.applied.tolist()).tolist()


@pytest.mark.parametrize(("x_dtype", "w_dtype"), DTYPE_PAIRS)
@few
@given(data=st.data())
def test_matches_reference(x_dtype, w_dtype, data):
    n = data.draw(st.sampled_from([0, 1, 5, 70] if FULL else [0, 1, 5]), "n")
    k = data.draw(st.sampled_from([None, 1, 2]), "k")
    d_in = data.draw(SIZES, "in")
    slices = tuple(data.draw(st.lists(SIZES, min_size=1, max_size=3 if FULL else 2), "slices"))
    step = data.draw(STEPS, "step")
    kind = data.draw(st.sampled_from(kinds_of(x_dtype))) if DEVICE == "cpu" else "torch"
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
    if kind == "torch":
        x, grad = x.to(DEVICE), grad.to(DEVICE)
    ids = drawn_ids(rng, n, k, 3)
    weights = rng.uniform(0.5, 1.5, ids.shape).astype("f4") if data.draw(st.booleans()) else None
    result = pool.adapt(
        x, grad, indices(ids), weights=None if weights is None else on_device(weights), **step
    )

    want, learned = reference.batched_adapt(
        f64(x), f64(grad), before, slices, ids, reference.Step(**step), weights
    )
    assert applied(result) == learned.tolist()
    after = held.refresh()
    for slot, adapter in after.items():
        named = bool((ids == slot).any())
        assert pool.version(slot) == versions[slot] + named
        if not named:
            assert same(adapter, before[slot])
        assert step_error(adapter, want[slot], before[slot]) <= STORED[w_dtype]
        if history and named:
            pool.rollback(slot)
    if history:
        for slot, adapter in held.refresh().items():
            assert same(adapter, before[slot])


def same(a: reference.Adapter, b: reference.Adapter) -> bool:
    """Bit for bit."""
    return [bits(m) for m in weights_of(a)] == [bits(m) for m in weights_of(b)]


@pytest.mark.parametrize(
    ("ranks", "n", "w_dtype"),
    [([3, 17], 40, "float32"), ([33, 2], 17, "bfloat16")],
    ids=["n40", "n17"],
)
def test_many_rows_of_an_adapter_and_many_ranks(ranks, n, w_dtype):
    """Past the sizes at which rows and ranks are taken by groups."""
    rng = np.random.default_rng(11)
    held = fill_pool(rng, 130, (19,), ranks, w_dtype, seed=2)
    pool, before = held
    x, grad = on_device(rng.standard_normal((n, 130))), on_device(rng.standard_normal((n, 19)))
    ids = rng.integers(0, 2, (n, 1)).astype(np.int32)
    ids[3] = -1
    pool.adapt(x, grad, indices(ids), 0.1)
    want, _ = reference.batched_adapt(f64(x), f64(grad), before, (19,), ids, reference.Step(0.1))
    for slot, adapter in held.refresh().items():
        assert step_error(adapter, want[slot], before[slot]) <= STORED[w_dtype]


@pytest.mark.parametrize("slices", [(5,), (4, 3)], ids=["out5", "out4+3"])
def test_gradient_agrees_with_finite_differences(slices):
    """dL/dtheta of L = sum over rows of a nonlinear function of y, mixtures included; a row
    that names a slot twice counts once in the mean."""
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
    pool.adapt(on_device(x), on_device(grad), indices(ids), lr, weights=on_device(weights))
    after = held.refresh()
    for slot, rows in {0: 4, 1: 2}.items():  # distinct rows that name each slot
        for i, (old, new) in enumerate(
            zip(weights_of(before[slot]), weights_of(after[slot]), strict=True)
        ):
            learned = (f64(old) - f64(new)) / lr * rows
            numeric = np.empty_like(learned)
            for at in np.ndindex(*old.shape):
                values = []
                for sign in (1, -1):
                    moved = {
                        s: a._replace(A=[m.copy() for m in a.A], B=[m.copy() for m in a.B])
                        for s, a in before.items()
                    }
                    weights_of(moved[slot])[i][at] += sign * 1e-3
                    values.append(loss(moved))
                numeric[at] = (values[0] - values[1]) / 2e-3
            assert delta_error(learned, numeric, np.abs(numeric) + 1) < 1e-3


@pytest.mark.parametrize("bad", [np.nan, np.inf], ids=["nan", "inf"])
@pytest.mark.parametrize("where", ["x", "grad"])
@pytest.mark.parametrize("rows", [1, 9])
def test_a_gradient_that_is_not_finite_leaves_its_adapter(bad, where, rows):
    rng = np.random.default_rng(1)
    held = fill_pool(rng, 9, (4,), [2, 2, 2], history=1)
    pool, before = held
    batch = {
        "x": rng.standard_normal((2 + rows, 9)).astype("f4"),
        "grad": rng.standard_normal((2 + rows, 4)).astype("f4"),
    }
    ids = np.array([0, *[1] * rows, 2])
    batch[where][rows, 2] = bad  # the last row of slot 1
    with np.errstate(invalid="ignore"):
        result = pool.adapt(on_device(batch["x"]), on_device(batch["grad"]), indices(ids), 0.1)
    assert applied(result) == [True, *[False] * rows, True]
    if DEVICE == "cpu":
        assert f"{rows} rows" in result.note
        assert "NaN" in result.note
    after = held.refresh()
    assert [same(after[s], before[s]) for s in (0, 1, 2)] == [False, True, False]
    assert [pool.version(s) for s in (0, 1, 2)] == [2, 1, 2]
    with pytest.raises(ValueError, match="none kept"):
        pool.rollback(1)
    pool.rollback(2)
    assert same(held.refresh()[2], before[2])


def test_gradients_beyond_the_square_root_of_float32_are_finite():
    pool, before = fill_pool(np.random.default_rng(2), 9, (4,), [2])
    x, grad = on_device(np.full((1, 9), 1e30)), on_device(np.full((1, 4), 1e-30))
    assert applied(pool.adapt(x, grad, indices([0]), 1e-3)) == [True]
    assert bits(pool.get(0)[0]) != bits(before[0].A[0])


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
    x, grad = on_device(np.full((1, 9), 1e3)), on_device(np.full((1, 4), 1e3))
    assert applied(held.pool.adapt(x, grad, indices([0]), **step)) == [False]
    assert same(held.refresh()[0], held.adapters[0])


def test_rows_without_an_adapter_and_rank_0_are_reported():
    pool, _ = fill_pool(np.random.default_rng(3), 5, (4,), [2, 0])
    x, grad = on_device(np.ones((3, 5))), on_device(np.ones((3, 4)))
    result = pool.adapt(x, grad, indices([-1, 0, 1]), 0.1)
    assert applied(result) == [False, True, False]
    if DEVICE == "cpu":
        assert "2 rows: no adapter" in result.note


@pytest.mark.parametrize("bad", [7, -2, 1, 2**31 - 1])
def test_a_bad_id_teaches_nobody_and_is_told_to_the_next_call(bad):
    """Slot 1 was removed."""
    held = fill_pool(np.random.default_rng(4), 5, (4,), [2, 2])
    held.pool.remove(1)
    x, grad = on_device(np.ones((2, 5))), on_device(np.ones((2, 4)))
    arena = held.pool._storage.adapters.arena.clone()
    result = held.pool.adapt(x, grad, indices([bad, -1]), 0.1)
    assert applied(result) == [False, False]
    assert torch.equal(arena, held.pool._storage.adapters.arena)
    with pytest.raises(IndexError, match=f"got {bad}, which was taken for -1"):
        held.pool.adapt(x, grad, indices([0, 0]), 0.1)
    assert applied(held.pool.adapt(x, grad, indices([0, 0]), 0.1)) == [True, True]


def test_the_order_of_other_rows_changes_no_bit():
    rng = np.random.default_rng(4)
    ranks = [1, 2, 3, 8]
    x, grad = (
        rng.standard_normal((24, 150)).astype("f4"),
        rng.standard_normal((24, 50)).astype("f4"),
    )
    ids = np.array([*[0] * 11, *[1] * 5, *[2] * 6, 3, 3], np.int32)
    others = rng.permutation(24)
    others = np.concatenate([others[ids[others] == s] for s in (2, 0, 3, 1)])
    kept = np.sort([i for i in others if ids[i] == 0]), np.sort([i for i in others if ids[i] == 1])
    mixed = np.concatenate([np.stack([kept[0][:5], kept[1]], 1).ravel(), kept[0][5:],
                            np.flatnonzero(ids == 2), np.flatnonzero(ids == 3)])  # fmt: skip
    results = []
    for rows in (np.arange(24), mixed, *(np.flatnonzero(ids == s) for s in range(4))):
        held = fill_pool(np.random.default_rng(5), 150, (50,), ranks, "bfloat16", seed=3)
        held.pool.adapt(
            on_device(x[rows]), on_device(grad[rows]), indices(ids[rows]), 0.01, max_norm=1.0
        )
        results.append([[bits(m) for m in weights_of(a)] for a in held.refresh().values()])
    assert results[0] == results[1] == [results[2 + s][s] for s in range(4)]


@pytest.mark.parametrize(("dtype", "ulp"), [("bfloat16", 2.0**-8), ("float16", 2.0**-11)])
def test_rounding_is_the_reference_generator(dtype, ulp):
    """Weights so simple that the float32 step is exact: then every bit is set by the hash."""
    pool, _ = fill_pool(np.random.default_rng(0), 257, (65,), [3], dtype, seed=2**40 + 11)
    pool.set(0, np.ones((3, 257), "f4"), np.ones((65, 3), "f4"), 1.0)
    version = pool.version(0)
    zeros = on_device(np.zeros((1, 257))), on_device(np.zeros((1, 65)))
    pool.adapt(*zeros, indices([0]), 0.5, weight_decay=ulp / 4)
    want = np.full(3 * (257 + 65), np.float32(1.0 - ulp / 8))
    key = reference.rounding_key(2**40 + 11, 0, version)
    A, B, _ = pool.get(0)
    expected = ROUNDING[dtype](want, key, np.arange(want.size))
    assert bits(np.concatenate([A.ravel(), B.T.ravel()])) == bits(expected)
    assert set(np.unique(A)) == {np.float32(1.0 - ulp), np.float32(1.0)}


def test_the_second_slice_counts_its_elements_after_the_first():
    pool, _ = fill_pool(np.random.default_rng(0), 5, (3, 4), [(1, 2)], "bfloat16", seed=1)
    ones = (
        [np.ones((r, 5), "f4") for r in (1, 2)],
        [np.ones((o, r), "f4") for o, r in ((3, 1), (4, 2))],
    )
    pool.set(0, *ones, 1.0)
    version = pool.version(0)
    zeros = on_device(np.zeros((1, 5))), on_device(np.zeros((1, 7)))
    pool.adapt(*zeros, indices([0]), 0.5, weight_decay=2.0**-10)
    key = reference.rounding_key(1, 0, version)
    want = reference.round_bfloat16_stochastic(
        np.full(26, np.float32(1 - 2.0**-11)), key, np.arange(26)
    )
    A, B, _ = pool.get(0)
    got = np.concatenate([m.ravel() for a, b in zip(A, B, strict=True) for m in (a, b.T)])
    assert bits(got) == bits(want)


def test_many_users_in_one_call():
    rng = np.random.default_rng(6)
    users = 1000 if DEVICE == "cuda" else 200 if FULL else 20
    held = fill_pool(rng, 8, (4,), [2] * users)
    x, grad = (
        rng.standard_normal((users, 8)).astype("f4"),
        rng.standard_normal((users, 4)).astype("f4"),
    )
    ids = rng.permutation(users).astype(np.int32)
    assert all(applied(held.pool.adapt(on_device(x), on_device(grad), indices(ids), 0.1)))
    want, _ = reference.batched_adapt(x, grad, held.adapters, (4,), ids, reference.Step(0.1))
    for slot, adapter in held.refresh().items():
        assert step_error(adapter, want[slot], held.adapters[slot]) < STORED["float32"]


# ---- one slot: MicroLoRA's step, gradients that wait -------------------------


@pytest.mark.parametrize("n", [1, 12])
def test_a_gradient_that_waits_is_the_reference_and_is_applied(n):
    rng = np.random.default_rng(7)
    held = fill_pool(rng, 21, (5, 6), [(2, 9), (1, 1)])
    pool, before = held
    x, grad = on_device(rng.standard_normal((n, 21))), on_device(rng.standard_normal((n, 11)))
    for _ in range(2):
        pool.accumulate_gradient(0, x, grad)
    ids = np.zeros(n, np.int32)
    gA, gB = reference.slot_gradients(f64(x), f64(grad), before[0], (5, 6), 0, ids)
    got = pool.gradient(0)
    for have, mean in zip((*got[0], *got[1]), (*gA, *gB), strict=True):
        want = 2 * n * mean
        assert delta_error(have, want, np.abs(want)) < 2e-6
    assert pool.apply_updates(0.1, max_norm=1.0) == {0: ""}
    want = reference.step_adapter(before[0], gA, gB, reference.Step(0.1, 1.0))
    after = held.refresh()
    assert step_error(after[0], want, before[0]) < STORED["float32"]
    assert same(after[1], before[1])


def test_a_gradient_that_is_not_finite_is_left_out():
    pool, _ = fill_pool(np.random.default_rng(0), 9, (4,), [2])
    x, grad = on_device(np.ones((1, 9))), on_device(np.ones((1, 4)))
    pool.accumulate_gradient(0, x, grad)
    kept = pool.gradient(0)
    with np.errstate(invalid="ignore"):
        pool.accumulate_gradient(0, x, grad * float("nan"))
    assert bits(pool.gradient(0)[0]) == bits(kept[0])
    assert "1 gradients with NaN" in pool.apply_updates(0.1)[0]


@interpreted
def test_micro_lora_learns():
    config = le.MicroLoRAConfig(in_features=16, out_features=8, rank=2, seed=1)
    lora = le.MicroLoRA(config)
    rng = np.random.default_rng(0)
    x, target = rng.standard_normal(16).astype("f4"), rng.standard_normal(8).astype("f4")
    losses = []
    for _ in range(4):
        y = lora.forward(x, config.target_modules[0])
        losses.append(float(((y - target) ** 2).sum()))
        r = lora.adapt(x, le.Feedback.from_gradient(y - target), config.target_modules[0], lr=0.1)
        assert r.applied
        assert r.grad_norm > 0
    assert losses[-1] < losses[0]


def test_what_is_refused():
    pool, _ = fill_pool(np.random.default_rng(3), 16, (8,), [2])
    other, _ = fill_pool(np.random.default_rng(3), 16, (8,), [2])
    x, grad, ids = on_device(np.ones((2, 16))), on_device(np.ones((2, 8))), indices([0, 0])
    for kind, match, call in [
        (ValueError, r"x: expected shape \[n, 16\]", lambda: pool.adapt(grad, grad, ids, 0.1)),
        (ValueError, r"grad: expected shape \[2, 8\]", lambda: pool.adapt(x, grad[:1], ids, 0.1)),
        (TypeError, "grad: expected float32", lambda: pool.adapt(x, grad.half(), ids, 0.1)),
        (ValueError, "lr: expected a number from 0", lambda: pool.adapt(x, grad, ids, -0.1)),
        (ValueError, "lr: expected a finite number", lambda: pool.adapt(x, grad, ids, np.inf)),
        (ValueError, "lr_ratio: expected a finite",
         lambda: pool.adapt(x, grad, ids, 1e30, lr_ratio=1e30)),
        (ValueError, "ewc: expected one made for this pool",
         lambda: pool.adapt(x, grad, ids, 0.1, ewc=le.EWC(other, 1.0, form="factor"))),
        (IndexError, "slot: expected one of the pool's 1 slots",
         lambda: pool.accumulate_gradient(5, x, grad)),
    ]:  # fmt: skip
        with pytest.raises(kind, match=match):
            call()
    assert pool.version(0) == 1
