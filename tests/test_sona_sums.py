"""Fisher sums that a step adds to, slots freed together, steps to an anchor that adds nothing."""

from __future__ import annotations

import numpy as np
import pytest
from helpers import bits, f64
from helpers_sona import config, module, row, taught

import lora_engine as le
from lora_engine import ops
from lora_engine.learning.consolidation import STRATEGIES
from lora_engine.learning.factor_sums import FactorSums
from lora_engine.learning.sona import TOO_LARGE

IN, OUT = 37, 21


def _pool(n=3, rank=2):
    pool = le.AdapterPool(IN, OUT)
    for s in range(n):
        pool.add(0.3 * row(s, IN, rank), 0.3 * row(s + 9, rank, OUT), 2.0)
    return pool


@pytest.mark.parametrize("n", [None, 1, 5])
def test_a_step_and_its_sums_in_one_call(n):
    pool, same = _pool(), _pool()
    step = ops.make_step(pool._backend, 0.1, 1.0)
    x, g = row(1, IN, n), row(2, OUT, n)
    u, v = np.full((3, OUT), 0.5, np.float32), np.full((4, IN), 0.25, np.float32)
    got = pool._storage.adapt_slot_observed(x, g, 1, step, u, v)
    assert got == same._storage.adapt_slot(x, g, 1, step)
    assert bits(pool.get(1)[0]) == bits(same.get(1)[0])
    assert bits(pool.get(1)[1]) == bits(same.get(1)[1])
    for sums, samples, start in ((u, g, 0.5), (v, x, 0.25)):
        want = np.full(sums.shape, start)
        want[1] += (np.atleast_2d(samples).astype(np.float64) ** 2).sum(0)
        np.testing.assert_allclose(sums, want, rtol=1e-6)


def test_sums_of_a_step_that_is_refused_stay():
    pool = _pool()
    step = ops.make_step(pool._backend, 0.1, 1.0)
    u, v = np.zeros((3, OUT), np.float32), np.zeros((3, IN), np.float32)
    g = row(2, OUT)
    g[3] = np.nan
    assert pool._storage.adapt_slot_observed(row(1, IN), g, 1, step, u, v)[0] == ops.NOT_FINITE
    assert not u.any()
    assert not v.any()
    before = pool.get(2)
    for bad, text in (((u[:2], v), "u: expected"), ((u, v[:, :-1]), "v: expected"),
                      ((u.astype(np.float64), v), "u: expected")):  # fmt: skip
        with pytest.raises((ValueError, TypeError), match=text):
            pool._storage.adapt_slot_observed(row(1, IN), row(2, OUT), 2, step, *bad)
    assert bits(pool.get(2)[0]) == bits(before[0])
    assert pool.version(2) == 1


@pytest.mark.parametrize(("x_size", "grad_size"), [(1e20, 1e-20), (1e-20, 1e20), (1e14, 1e14)])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_sample_whose_squares_leave_float32(x_size, grad_size, strategy, tmp_path):
    """It is learned, said, and counts for no merge; others' are merged, and the state is kept."""
    sona = le.Sona(config(consolidation=strategy, ewc_lambda=0.0))
    taught(sona, sessions=2, samples=20)
    x, g = np.float32(x_size) * row(1), np.float32(grad_size) * row(2, 7)
    result = sona.instant_adapt(x, le.Feedback.from_gradient(g), session="large")
    assert result.applied
    fits = max(x_size, grad_size) < 1e15
    assert sona.stats().pending_samples == 40 + fits
    assert sona.stats().skipped == ({} if fits else {TOO_LARGE: 1})
    if not fits:
        assert np.abs(module(sona).held_out.samples()[0]).max() < 1e3
    assert all(np.isfinite(rows).all() for rows in module(sona).sums)
    sona.save(tmp_path)
    le.Sona(config(consolidation=strategy, ewc_lambda=0.0)).load(tmp_path)
    assert sona.background().samples_used == 40 + fits


def test_sums_that_are_inf_are_left_out_of_a_pass():
    sona = le.Sona(config())
    taught(sona, sessions=3, samples=20)
    m = module(sona)
    m.sums.v[m.served.fast[1].slot] = np.inf
    before = f64(sona.forward(row(0), session=1))
    result = sona.background()
    assert (result.samples_used, result.sessions) == (40, 2)
    assert sona.stats().pending_samples == (0 if result.applied else 40)
    assert before.any()
    assert np.allclose(sona.forward(row(0), session=1) - result.applied * sona.forward(row(0)),
                       before, atol=1e-5)  # fmt: skip
    taught(sona, sessions=3, samples=20)
    assert sona.background().samples_used >= 60


def test_remove_all_or_none():
    pool = _pool(150, 1)
    for bad, kind in (([3, 4, 3], ValueError), ([3, 150], IndexError)):
        with pytest.raises(kind, match=r"AdapterPool\.remove"):
            pool._storage.remove_all(np.array(bad, np.int32))
        assert len(pool) == 150
    pool.remove(7)
    with pytest.raises(IndexError, match="removed"):
        pool._storage.remove_all(np.array([6, 7], np.int32))
    assert len(pool) == 149
    pool.remove_all([s for s in range(150) if s not in (7, 80)])
    assert len(pool) == 1
    assert pool.ranks(80) == (1,)
    assert pool.add(row(0, IN, 1), row(1, 1, OUT), 1.0) == 7  # the oldest that is free


@pytest.mark.parametrize("rank", [1, 2, 3, 4, 7])
def test_an_anchor_that_adds_nothing(rank):
    """The step where only B's anchor is 0 is the one with both at 0, and pulls toward 0."""
    made = []
    for anchor_A in (row(5, IN, rank), np.zeros((rank, IN), np.float32)):
        pool = _pool(1, rank)
        ewc = le.EWC(pool, 3.0, form="delta")
        u, v = row(6, OUT) ** 2, row(7, IN) ** 2
        nothing = np.zeros((OUT, rank), np.float32)
        ewc._storage.restore(0, [u], [v], [anchor_A], [nothing])
        before = ewc.penalty()
        for i in range(3):
            pool.adapt(row(i, IN, 1), 1e-3 * row(i, OUT, 1), np.zeros(1, np.int32), 0.05, ewc=ewc)
        assert ewc.penalty() < 0.5 * before
        made.append(pool.get(0))
    assert bits(made[0][0]) == bits(made[1][0])
    assert bits(made[0][1]) == bits(made[1][1])


def test_factor_sums_grow_and_begin_anew():
    sums = FactorSums(IN, OUT)
    for slot in range(150):
        sums.begin(slot)
        sums.u[slot], sums.v[slot] = slot, 2 * slot
    sums.begin(200, (np.full(OUT, 7.0), np.full(IN, 9.0)))
    assert (sums.u[200] == 7).all()
    assert (sums.v[200] == 9).all()
    assert (sums.u[120] == 120).all()
    assert (sums.v[120] == 240).all()
    sums.begin(3)
    u, v = sums.over([1, 3, *range(100, 140)])
    assert np.array_equal(u, np.full(OUT, 1 + sum(range(100, 140))))
    assert np.array_equal(v, 2 * np.full(IN, 1 + sum(range(100, 140))))


def test_a_session_that_begins_again_counts_its_own_samples():
    sona = le.Sona(config())
    taught(sona, sessions=2, samples=20)
    assert sona.background().applied
    x, g = row(1), row(2, 7)
    sona.instant_adapt(x, le.Feedback.from_gradient(g), session=0)
    m = module(sona)
    slot = m.served.fast[0].slot
    np.testing.assert_allclose(m.sums.u[slot], g**2, rtol=1e-6)
    np.testing.assert_allclose(m.sums.v[slot], x**2, rtol=1e-6)
