"""The delta form of EWC in the reference: what the formulas promise."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from lora_engine import reference
from lora_engine.reference_ewc import delta_penalty, delta_step

OUT, IN, RANK = 7, 9, 3


def drawn(rng, rank=RANK):
    A, B = rng.standard_normal((rank, IN)), rng.standard_normal((OUT, rank))
    return reference.Adapter([A], [B], 0.7)


def fisher(rng):
    return rng.uniform(0, 2, OUT), rng.uniform(0, 2, IN)


def penalty(adapter, anchor, u, v, lam):
    return delta_penalty(
        adapter.A[0], adapter.B[0], anchor.A[0], anchor.B[0], u, v, adapter.scaling, lam
    )


def test_penalty_is_the_weighted_square_of_the_change_of_delta_w():
    rng = np.random.default_rng(0)
    now, anchor, (u, v) = drawn(rng), drawn(rng), fisher(rng)
    gap = 0.7 * (now.B[0] @ now.A[0] - anchor.B[0] @ anchor.A[0])
    assert penalty(now, anchor, u, v, 0.3) == pytest.approx(0.3 * float((u @ gap**2) @ v))


def test_penalty_is_the_same_for_other_factors_of_the_same_delta_w():
    rng = np.random.default_rng(1)
    now, anchor, (u, v) = drawn(rng), drawn(rng), fisher(rng)
    G = rng.standard_normal((RANK, RANK))
    other = reference.Adapter([np.linalg.inv(G) @ now.A[0]], [now.B[0] @ G], 0.7)
    assert penalty(other, anchor, u, v, 1.0) == pytest.approx(penalty(now, anchor, u, v, 1.0))


@pytest.mark.parametrize("c", [0.0, 0.1, 20.0, 20_000.0])
def test_each_block_solves_its_proximal_problem(c):
    """The gradient of g·theta + P + |theta - old|² / 2 lr vanishes, P's by differences."""
    rng = np.random.default_rng(2)
    old, anchor, (u, v) = drawn(rng), drawn(rng), fisher(rng)
    g = drawn(rng)
    step = reference.Step(0.05, lr_ratio=3.0, ewc_lambda=c / 2)
    new = delta_step(old, g.A, g.B, step, ([u], [v]), anchor)
    for block, lr in (("B", 0.15), ("A", 0.05)):
        at = new._replace(A=old.A) if block == "B" else new
        theta, grad = getattr(at, block)[0], getattr(g, block)[0]
        slope = grad + (theta - getattr(old, block)[0]) / lr
        for i in np.ndindex(theta.shape):
            ends = []
            for sign in (1, -1):
                moved = theta.copy()
                moved[i] += sign * 1e-3  # P is a quadratic in a block: differences are exact
                ends.append(penalty(at._replace(**{block: [moved]}), anchor, u, v, c / 2))
            slope[i] += (ends[0] - ends[1]) / 2e-3
        assert np.abs(slope).max() < 1e-7 * (1 + c * np.abs(u).max() * np.abs(v).max())


@pytest.mark.parametrize("c", [1.0, 100.0, 20_000.0])
def test_penalty_falls_step_by_step_however_large_lambda(c):
    rng = np.random.default_rng(3)
    now, anchor, (u, v) = drawn(rng), drawn(rng), fisher(rng)
    zero = reference.Adapter([np.zeros((RANK, IN))], [np.zeros((OUT, RANK))], 0.7)
    step = reference.Step(0.1, ewc_lambda=c / 2)
    values = [penalty(now, anchor, u, v, c / 2)]
    for _ in range(30):
        now = delta_step(now, zero.A, zero.B, step, ([u], [v]), anchor)
        values.append(penalty(now, anchor, u, v, c / 2))
    assert all(b <= a + 1e-9 * values[0] for a, b in pairwise(values))
    assert values[-1] < 0.5 * values[0]


def test_without_a_penalty_it_is_the_plain_step():
    rng = np.random.default_rng(4)
    now, anchor, g, (u, v) = drawn(rng), drawn(rng), drawn(rng), fisher(rng)
    step = reference.Step(0.1, 1.0, 2.0, True, 0.2, 0.0)
    got = delta_step(now, g.A, g.B, step, ([u], [v]), anchor)
    want = reference.step_adapter(now, g.A, g.B, step)
    assert np.allclose(got.A[0], want.A[0], atol=1e-12)
    assert np.allclose(got.B[0], want.B[0], atol=1e-12)


def test_frozen_a_missing_slices_and_rank_0():
    rng = np.random.default_rng(5)
    now, g, (u, v) = drawn(rng), drawn(rng), fisher(rng)
    none = reference.Adapter([None, now.A[0]], [None, now.B[0]], 0.7)
    step = reference.Step(0.1, train_A=False, ewc_lambda=1.0)
    got = delta_step(none, [None, *g.A], [None, *g.B], step, ([None, u], [None, v]), none)
    assert got.A[0] is None
    assert np.array_equal(got.A[1], now.A[0])
    assert np.abs(got.B[1] - now.B[0]).max() > 0.01
    empty = drawn(rng, 0)
    got = delta_step(empty, empty.A, empty.B, step, ([u], [v]), empty)
    assert got.B[0].shape == (OUT, 0)


def test_a_gradient_that_is_not_finite_gives_no_step():
    rng = np.random.default_rng(6)
    now, g, (u, v) = drawn(rng), drawn(rng), fisher(rng)
    g.B[0][0, 0] = np.nan
    assert delta_step(now, g.A, g.B, reference.Step(0.1), ([u], [v]), now) is None
