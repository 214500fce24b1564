"""Op 7 in delta form, in the C++ core: the fused step against the reference."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from helpers import DTYPES, LAYOUTS, STORED, bits, f64, fill_pool, strided, to_dtype
from hypothesis import given
from hypothesis import strategies as st
from test_batched_adapt import step_error

import lora_engine as le
from lora_engine import reference
from lora_engine.reference_ewc import delta_penalty, delta_step

RANKS = st.sampled_from([1, 2, 3, 4, 5, 8, 17])
SIZES = st.sampled_from([1, 3, 9, 33, 127, 400])


def factors(rng, slices, d_in, here):
    """u and v of each slice, None for a missing one."""
    u = [
        rng.uniform(0, 2, out).astype("f4") if h else None
        for out, h in zip(slices, here, strict=True)
    ]
    v = [rng.uniform(0, 2, d_in).astype("f4") if h else None for h in here]
    return u, v


class Learning:
    """A pool of two slots, some rows, and a record for slot 0."""

    def __init__(self, rng, d_in, slices, ranks, dtype, lam, **options):
        self.held = fill_pool(rng, d_in, slices, [ranks, ranks], dtype, seed=7, **options)
        self.pool, self.slices, self.lam = self.held.pool, slices, lam
        self.anchor = self.held.adapters[0]
        self.u, self.v = factors(rng, slices, d_in, [m is not None for m in self.anchor.A])
        self.ewc = le.EWC(self.pool, ewc_lambda=lam, form="delta")
        self.record()
        self.x = rng.standard_normal((5, d_in)).astype("f4")
        self.grad = rng.standard_normal((5, sum(slices))).astype("f4")
        self.ids = np.array([0, 1, 0, -1, 0], np.int32)

    def record(self):
        sliced = len(self.slices) > 1
        self.ewc.set(0, *((self.u, self.v) if sliced else (self.u[0], self.v[0])))

    def penalty(self):
        now, total = self.held.refresh()[0], 0.0
        for s, (a, b) in enumerate(zip(now.A, now.B, strict=True)):
            if a is not None:
                star = self.anchor
                total += delta_penalty(
                    a, b, star.A[s], star.B[s], self.u[s], self.v[s], now.scaling, self.lam
                )
        return total

    def errors(self, x=None, grad=None, **options):
        """One step, and how far each slot is from the reference's.

        The block of A sees B as it was stored: the reference is given the bits of the core's.
        """
        before = self.held.refresh()
        self.pool.adapt(
            self.x if x is None else x, self.grad if grad is None else grad,
            self.ids if x is None or isinstance(x, np.ndarray) else torch.from_numpy(self.ids),
            ewc=self.ewc, **options,
        )  # fmt: skip
        after, step = self.held.refresh(), reference.Step(**options, ewc_lambda=self.lam)
        wants = []
        for slot in (0, 1):
            g = reference.slot_gradients(
                f64(self.x if x is None else x), f64(self.grad if grad is None else grad),
                before[slot], self.slices, slot, self.ids,
            )  # fmt: skip
            if slot:
                wants.append(reference.step_adapter(before[slot], *g, step))
            else:
                made = delta_step(
                    before[0], *g, step, (self.u, self.v), self.anchor, lambda _: after[0].B
                )
                B = delta_step(before[0], *g, step, (self.u, self.v), self.anchor).B
                wants.append(made._replace(B=B))
        return [step_error(after[s], wants[s], before[s]) for s in (0, 1)]


@pytest.mark.parametrize("dtype", DTYPES)
@given(data=st.data())
def test_fused_step_matches_reference(dtype, data):
    slices = tuple(data.draw(st.lists(SIZES, min_size=1, max_size=3), "slices"))
    d_in, rank = data.draw(SIZES, "in"), data.draw(RANKS, "rank")
    ranks = rank if len(slices) == 1 else (rank, *[0, 2][: len(slices) - 1])
    lam = data.draw(st.sampled_from([0.0, 0.3, 20.0, 20_000.0]), "lambda")
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1), "seed"))
    learning = Learning(
        rng, d_in, slices, ranks, dtype, lam, history=data.draw(st.sampled_from([0, 1]))
    )
    layout, kind = data.draw(st.sampled_from(LAYOUTS)), data.draw(st.sampled_from(DTYPES))
    x, grad = (strided(to_dtype(a, kind), layout) for a in (learning.x, learning.grad))
    options = {
        "lr": data.draw(st.sampled_from([0.0, 0.01, 0.3]), "lr"),
        "max_norm": data.draw(st.sampled_from([None, 1.0])),
        "lr_ratio": data.draw(st.sampled_from([1.0, 4.0])),
        "train_A": data.draw(st.booleans()),
        "weight_decay": data.draw(st.sampled_from([0.0, 0.1])),
    }
    for _ in range(2):  # the second step starts off the anchor
        assert max(learning.errors(x, grad, **options)) <= STORED[dtype]
    assert learning.ewc.penalty() == pytest.approx(learning.penalty(), rel=1e-5, abs=1e-30)


@pytest.mark.parametrize("lam", [0.01, 0.1, 300.0, 1e9, 1e18])
@pytest.mark.parametrize("pulls", [True, False])
def test_two_ranks_under_a_gentle_and_a_strong_pull(lam, pulls):
    """Where it can be, it is solved without an eigenbasis; an anchored B of 0 pulls at nothing."""
    learning = Learning(np.random.default_rng(3), 127, (131,), 2, "float32", lam)
    if not pulls:
        A, B, scaling = learning.pool.get(0)
        learning.pool.set(0, A, 0 * B, scaling)
        learning.anchor = learning.held.refresh()[0]
        learning.record()
    for _ in range(3):
        assert max(learning.errors(lr=0.05, weight_decay=0.1)) <= STORED["float32"]


@pytest.mark.parametrize("lam", [10.0, 10_000.0])
@pytest.mark.parametrize("rank", [1, 2, 3, 8])
def test_penalty_falls_step_by_step_however_large_lambda(lam, rank):
    """c = 2 lambda up to 20,000, from other weights of the same adapter, without a gradient."""
    learning = Learning(np.random.default_rng(0), 33, (40,), rank, "float32", lam)
    mine = np.zeros(5, np.int32)
    for _ in range(2):  # away from the anchor, without the penalty
        learning.pool.adapt(learning.x, learning.grad, mine, 0.02)
    values = [learning.ewc.penalty()]
    zeros = np.zeros((1, 33), "f4"), np.zeros((1, 40), "f4"), np.zeros(1, np.int32)
    for _ in range(20):
        learning.pool.adapt(*zeros, 0.05, ewc=learning.ewc)
        values.append(learning.ewc.penalty())
    floor = 1e-10 * values[0]  # of what float32 weights can express
    assert all(b < a or b < floor for a, b in pairwise(values))
    assert values[-1] < 0.5 * values[0]


def test_the_penalty_and_the_way_back_are_those_of_delta_w():
    """(B G, G^-1 A) has the penalty of (B, A)."""
    rng = np.random.default_rng(1)
    learning = Learning(rng, 33, (40,), 3, "float32", 5.0)
    moved = 2 * learning.anchor.A[0], learning.anchor.B[0] - 1
    G = rng.standard_normal((3, 3)) + 2 * np.eye(3)
    values = []
    for A, B in (moved, (np.linalg.solve(G, moved[0]), moved[1] @ G)):
        slot = learning.pool.add(A.astype("f4"), B.astype("f4"), learning.anchor.scaling)
        star = learning.anchor.A, learning.anchor.B
        ewc = le.EWC(learning.pool, ewc_lambda=5.0, form="delta")
        ewc._storage.restore(slot, learning.u, learning.v, *star)
        values.append(ewc.penalty())
    assert values[1] == pytest.approx(values[0], rel=1e-4)
    assert values[0] > 1.0


def test_without_a_pull_it_is_the_plain_step_to_the_bit():
    learning = Learning(np.random.default_rng(2), 33, (40,), 2, "bfloat16", 0.0)
    plain = fill_pool(np.random.default_rng(2), 33, (40,), [2, 2], "bfloat16", seed=7)
    learning.pool.adapt(learning.x, learning.grad, learning.ids, 0.1, ewc=learning.ewc)
    plain.pool.adapt(learning.x, learning.grad, learning.ids, 0.1)
    for a, b in zip(learning.pool.get(0)[:2], plain.pool.get(0)[:2], strict=True):
        assert bits(a) == bits(b)


@pytest.mark.parametrize("rank", [2, 17])
def test_a_factor_without_some_direction(rank):
    """B = 0, then B of rank one: the matrix of A's block has eigenvalues of 0."""
    rng = np.random.default_rng(3)
    learning = Learning(rng, 33, (40,), rank, "float32", 1e4)
    A, _, scaling = learning.pool.get(0)
    learning.pool.set(0, A, np.zeros((40, rank), "f4"), scaling)
    learning.anchor = learning.held.refresh()[0]
    learning.record()
    for _ in range(3):
        assert max(learning.errors(lr=0.05)) <= STORED["float32"]


@pytest.mark.parametrize("lam", [1e12, 3e38])
@pytest.mark.parametrize("rank", [2, 5])
def test_an_absurd_lambda_pins_the_adapter_to_its_delta(lam, rank):
    learning = Learning(np.random.default_rng(4), 33, (40,), rank, "float32", lam)
    star = learning.anchor
    for _ in range(3):
        learning.pool.adapt(learning.x, learning.grad, learning.ids, 0.05, ewc=learning.ewc)
    now = learning.held.refresh()[0]
    want = star.B[0] @ star.A[0]
    assert np.abs(now.B[0] @ now.A[0] - want).max() <= 1e-4 * np.abs(want).max()


@pytest.mark.parametrize("slices", [(40,), (4, 36)], ids=str)
def test_a_gradient_that_waited_takes_the_penalty_too(slices):
    ranks = 3 if len(slices) == 1 else (0, 3)
    learning = Learning(np.random.default_rng(5), 33, slices, ranks, "float32", 0.8)
    before, mine = learning.held.refresh()[0], learning.ids == 0
    x, grad = learning.x[mine], learning.grad[mine]
    learning.pool.accumulate_gradient(0, x, grad)
    assert learning.pool.apply_updates(0.05, max_norm=1.0, ewc=learning.ewc) == {0: ""}
    g = reference.slot_gradients(x, grad, before, slices, 0, np.zeros(len(x), np.int32))
    step = reference.Step(0.05, 1.0, ewc_lambda=0.8)
    want = delta_step(before, *g, step, (learning.u, learning.v), learning.anchor)
    assert step_error(learning.held.refresh()[0], want, before) <= STORED["float32"]


def test_the_same_bits_for_any_thread_count():
    results = []
    threads = le.get_num_threads()
    try:
        for count in (1, 2, 5):
            le.set_num_threads(count)
            rng = np.random.default_rng(6)
            pool, before = fill_pool(rng, 257, (300,), [3] * 40, "bfloat16", seed=3)
            ewc = le.EWC(pool, ewc_lambda=3.0, form="delta")
            for slot in before:
                ewc.set(slot, rng.random(300, "f4"), rng.random(257, "f4"))
            x, grad = (rng.standard_normal((80, n)).astype("f4") for n in (257, 300))
            for _ in range(2):
                pool.adapt(x, grad, rng.integers(0, 40, 80).astype("i4"), 0.05, ewc=ewc)
            results.append([bits(m) for slot in before for m in pool.get(slot)[:2]])
    finally:
        le.set_num_threads(threads)
    assert results[0] == results[1] == results[2]


def test_a_gradient_that_is_not_finite_leaves_the_adapter_alone():
    learning = Learning(np.random.default_rng(7), 33, (40,), 2, "float32", 1.0)
    before, version = learning.pool.get(0), learning.pool.version(0)
    learning.grad[0, 3] = np.nan
    result = learning.pool.adapt(learning.x, learning.grad, learning.ids, 0.1, ewc=learning.ewc)
    assert result.applied.tolist() == [False, True, False, False, False]
    assert learning.pool.version(0) == version
    for a, b in zip(learning.pool.get(0)[:2], before[:2], strict=True):
        assert bits(a) == bits(b)


def test_what_is_refused():
    pool, _ = fill_pool(np.random.default_rng(8), 16, (8,), [2])
    ewc = le.EWC(pool, 1.0, form="delta")
    u, v, A, B = np.ones(8, "f4"), np.ones(16, "f4"), np.ones((2, 16), "f4"), np.ones((8, 2), "f4")
    restore = ewc._storage.restore
    for kind, match, call in [
        (ValueError, r"EWC\.set: u: expected shape \[out\] = \[1, 8\], got \[16\]",
         lambda: ewc.set(0, v, u)),
        (ValueError, r"v: expected finite values of 0 or more, got nan",
         lambda: ewc.set(0, u, v * np.nan)),
        (TypeError, "u: expected float32, got float64", lambda: ewc.set(0, u.astype("f8"), v)),
        (IndexError, r"EWC\.set: slot", lambda: ewc.set(5, u, v)),
        (IndexError, r"EWC\.get: slot", lambda: ewc._storage.get(5)),
        (ValueError, r"EWC\.get: slot: .* slot 0, which has none", lambda: ewc._storage.get(0)),
        (ValueError, r"EWC\.restore: anchor_A: expected shape \[r, in\] = \[2, 16\]",
         lambda: restore(0, [u], [v], [A.T], [B])),
        (ValueError, r"EWC\.restore: anchor_B: expected finite values, got inf",
         lambda: restore(0, [u], [v], [A], [B * np.inf])),
        (ValueError, r"EWC\.restore: u: expected 1 slices, got 0",
         lambda: restore(0, [], [v], [A], [B])),
        (ValueError, "form: expected factor or delta, got dense",
         lambda: le.EWC(pool, 1.0, form="dense")),
    ]:  # fmt: skip
        with pytest.raises(kind, match=match):
            call()
    assert ewc.penalty() == 0.0
