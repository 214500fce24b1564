"""Op 7 in factor form: the array op, and inside the fused step."""

from __future__ import annotations

import numpy as np
import pytest
from helpers import (
    DTYPES,
    LAYOUTS,
    STORED,
    TOLERANCE,
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

import lora_engine as le
from lora_engine import reference


@pytest.mark.parametrize("dtype", DTYPES)
@given(data=st.data())
def test_step_matches_reference(dtype, data):
    shape = data.draw(st.sampled_from([(0, 4), (1, 1), (3, 127), (2, 2049), (5, 16)]), "shape")
    kind = data.draw(st.sampled_from(kinds_of(dtype)))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1), "seed"))
    lr, lam = (
        data.draw(st.sampled_from([0.0, 0.01, 1.0])),
        data.draw(st.sampled_from([0.0, 0.5, 1e4])),
    )
    layouts = [data.draw(st.sampled_from(LAYOUTS)) for _ in range(4)]
    theta, grad = (to_dtype(rng.standard_normal(shape), dtype, kind) for _ in range(2))
    fisher = to_dtype(rng.uniform(0, 3, shape), "float32", kind)
    anchor = to_dtype(rng.standard_normal(shape), "float32", kind)
    theta, grad, fisher, anchor = (
        strided(a, layout) for a, layout in zip((theta, grad, fisher, anchor), layouts, strict=True)
    )
    want = reference.ewc_step(f64(theta), f64(grad), f64(fisher), f64(anchor), lr, lam)
    kept = [bits(a) for a in (grad, fisher, anchor)]
    le.ewc_step(theta, grad, fisher, anchor, lr, lam, seed=5, version=9)
    assert delta_error(theta, want, np.abs(want) + 1) <= (
        TOLERANCE[dtype] if dtype == "float32" else STORED[dtype]
    )
    assert [bits(a) for a in (grad, fisher, anchor)] == kept


def test_one_dimension_and_an_enormous_lambda():
    theta, anchor = np.array([5.0, 1.0, -3.0], "f4"), np.array([1.0, 1.0, 1.0], "f4")
    fisher = np.array([1.0, 0.0, 1e3], "f4")
    le.ewc_step(theta, np.zeros(3, "f4"), fisher, anchor, 0.1, 1e12)
    assert np.allclose(theta, [1.0, 1.0, 1.0], atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("slices", [(11,), (7, 4)], ids=["out11", "out7+4"])
@pytest.mark.parametrize("rows", [1, 3])
def test_fused_step_matches_reference(dtype, slices, rows):
    rng = np.random.default_rng(0)
    sliced = len(slices) > 1
    held = fill_pool(rng, 33, slices, [(2, 1) if sliced else 2] * 2, dtype)
    pool, before = held
    lam = 0.8
    ewc = le.EWC(pool, ewc_lambda=lam, form="factor")
    F_A = [rng.uniform(0, 2, m.shape).astype("f4") for m in before[0].A]
    F_B = [rng.uniform(0, 2, m.shape).astype("f4") for m in before[0].B]
    ewc.set(0, F_A if sliced else F_A[0], F_B if sliced else F_B[0])
    ids = np.repeat([0, 1], rows).astype(np.int32)
    x = rng.standard_normal((2 * rows, 33)).astype("f4")
    grad = rng.standard_normal((2 * rows, sum(slices))).astype("f4")
    step = reference.Step(0.05, 1.0, 2.0, True, 0.1, lam)
    current = before
    for _ in range(2):  # the second step starts off the anchor
        want = {}
        for slot in (0, 1):
            gA, gB = reference.slot_gradients(x, grad, current[slot], slices, slot, ids)
            record = ((F_A, F_B), before[0]) if slot == 0 else (None, None)
            want[slot] = reference.step_adapter(current[slot], gA, gB, step, *record)
        pool.adapt(x, grad, ids, 0.05, max_norm=1.0, lr_ratio=2.0, weight_decay=0.1, ewc=ewc)
        current = held.refresh()
        for slot in (0, 1):
            for got, ref in zip(
                (*current[slot].A, *current[slot].B), (*want[slot].A, *want[slot].B), strict=True
            ):
                assert delta_error(got, ref, np.abs(ref) + 1) <= STORED[dtype]
    penalty = lam * sum(
        float((F * (f64(a) - f64(b)) ** 2).sum())
        for F, a, b in zip(
            (*F_A, *F_B), (*current[0].A, *current[0].B), (*before[0].A, *before[0].B), strict=True
        )
    )
    assert ewc.penalty() == pytest.approx(penalty, rel=1e-6)


def test_a_strong_penalty_holds_the_adapter_at_its_anchor():
    rng = np.random.default_rng(1)
    pool, before = fill_pool(rng, 16, (8,), [2])
    ewc = le.EWC(pool, ewc_lambda=1e6, form="factor")
    ewc.set(0, np.ones((2, 16), "f4"), np.ones((8, 2), "f4"))
    for _ in range(50):
        x, grad = (
            rng.standard_normal((1, 16)).astype("f4"),
            rng.standard_normal((1, 8)).astype("f4"),
        )
        pool.adapt(x, grad, np.zeros(1, np.int32), 0.1, ewc=ewc)
    assert np.abs(pool.get(0)[1] - before[0].B[0]).max() < 1e-3
    free, _ = fill_pool(np.random.default_rng(1), 16, (8,), [2])
    for _ in range(50):
        free.adapt(x, grad, np.zeros(1, np.int32), 0.1)
    assert np.abs(free.get(0)[1] - before[0].B[0]).max() > 0.1


def test_what_is_refused():
    pool, _ = fill_pool(np.random.default_rng(3), 16, (8,), [2])
    other, _ = fill_pool(np.random.default_rng(3), 16, (8,), [2])
    ewc = le.EWC(pool, ewc_lambda=1.0, form="factor")
    with pytest.raises(
        ValueError, match=r"EWC\.set: fisher_A: expected shape .*2, 16.*got \[3, 16\]"
    ):
        ewc.set(0, np.ones((3, 16), "f4"), np.ones((8, 2), "f4"))
    with pytest.raises(ValueError, match=r"fisher_B: expected finite values of 0 or more, got -1"):
        ewc.set(0, np.ones((2, 16), "f4"), -np.ones((8, 2), "f4"))
    with pytest.raises(IndexError, match="slot"):
        ewc.set(5, np.ones((2, 16), "f4"), np.ones((8, 2), "f4"))
    with pytest.raises(ValueError, match="ewc_lambda"):
        le.EWC(pool, ewc_lambda=-1.0, form="factor")
    with pytest.raises(ValueError, match="form: expected factor or delta"):
        le.EWC(pool, ewc_lambda=1.0, form="dense")
    with pytest.raises(ValueError, match="ewc: expected one made for this pool"):
        other.adapt(
            np.ones((1, 16), "f4"), np.ones((1, 8), "f4"), np.zeros(1, np.int32), 0.1, ewc=ewc
        )
    with pytest.raises(ValueError, match="ewc_step: fisher: expected shape"):
        le.ewc_step(
            np.zeros(3, "f4"), np.zeros(3, "f4"), np.zeros(2, "f4"), np.zeros(3, "f4"), 0.1, 1.0
        )
    theta = np.zeros(3, "f4")
    with pytest.raises(ValueError, match="theta: expected memory of its own"):
        le.ewc_step(theta, theta, np.zeros(3, "f4"), np.zeros(3, "f4"), 0.1, 1.0)
    assert ewc.penalty() == 0.0
