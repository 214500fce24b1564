"""Adapters on a frozen network, five tasks one after another: what EWC keeps, in both forms."""

from __future__ import annotations

import numpy as np
import pytest
from helpers_evidence import FULL, quiet

from lora_engine import reference
from lora_engine.evidence import adapters, measure
from lora_engine.evidence.consolidation import GAMMA, Consolidation

PROFILE = adapters.FULL if FULL else adapters.QUICK


@pytest.fixture(scope="module")
def result():
    with quiet() as progress:
        return adapters.run(progress, PROFILE)


def test_forgetting_is_halved_and_accuracy_gained_in_both_forms(result):
    assert sorted(result.outcomes) == ["delta", "factor"]
    assert adapters.check(result) == []


def test_what_falls_short_is_said(result):
    without = {
        form: outcome._replace(ewc=outcome.none) for form, outcome in result.outcomes.items()
    }
    said = adapters.check(result._replace(outcomes=without))
    assert [line.split(":")[0] for line in said] == ["factor", "factor", "delta", "delta"]


def test_each_seed_forgets_less(result):
    for outcome in result.outcomes.values():
        assert outcome.ewc.shape == outcome.none.shape == (PROFILE.seeds, 5, 5)
        assert (measure.forgetting(outcome.ewc) < measure.forgetting(outcome.none)).all()


def test_runs_side_by_side_start_and_learn_the_first_task_alike(result):
    """Before there is a record there is no penalty."""
    for outcome in result.outcomes.values():
        np.testing.assert_array_equal(outcome.ewc[:, 0], outcome.none[:, 0])


def test_gradients_are_those_of_each_samples_loss():
    bench = adapters.Bench(adapters.Setting("factor"), (0.0, 0.0), 2, validating=True)
    rng = np.random.default_rng(0)
    for slot in range(2):  # off zero, and another adapter in each slot and pool
        for pool in bench.pools:
            A, B, s = pool.get(slot)
            pool.set(slot, A, rng.standard_normal(B.shape).astype("f4") * 0.1, s)
    images, labels = rng.random((2, 3, 64), np.float32), rng.integers(0, 10, (2, 3))
    got = bench.gradients(images, labels).reshape(2, 2, 3, 100)
    z, _ = bench.forward(images)
    for lam, seed, i in np.ndindex(2, 2, 3):
        h, W2, b2 = z[lam, seed, i].astype("f8"), bench.W2[seed], bench.b2[seed, 0]

        def loss(h, W2=W2, b2=b2, label=labels[seed, i]):
            y = np.maximum(h, 0.0) @ W2 + b2
            return np.log(np.exp(y).sum()) - y[label]

        for j in np.flatnonzero(np.abs(h) > 1e-4)[::17]:
            step = np.zeros(100)
            step[j] = 1e-5
            slope = (loss(h + step) - loss(h - step)) / 2e-5
            assert got[lam, seed, i, j] == pytest.approx(slope, abs=1e-4)


@pytest.mark.parametrize("form", adapters.FORMS)
def test_records_of_two_tasks(form, monkeypatch):
    """What the EWC is given: means over samples, the old decayed at the boundary."""
    rng = np.random.default_rng(0)
    given = []
    bench = adapters.Bench(adapters.Setting(form, rank=2), (1.0,), 1, validating=True)
    held = Consolidation(bench.pools[0], 1.0, form)
    monkeypatch.setattr(held.ewc, "set", lambda slot, *record: given.append(record))
    A, B, s = bench.pools[0].get(0)
    B = rng.standard_normal(B.shape).astype("f4")
    bench.pools[0].set(0, A, B, s)
    tasks = []
    for n in (5, 9):
        x, g = (rng.standard_normal((n, m)).astype("f4") for m in (64, 100))
        for part in (slice(0, 2), slice(2, n)):
            held.observe(x[part], g[part], np.zeros(n, np.int32)[part])
        held.consolidate()
        tasks.append((x, g))
    if form == "factor":
        old, new = ([f / len(x) for f in reference.lora_fisher(x, g, A, B, s)] for x, g in tasks)
        want = [GAMMA * a + b for a, b in zip(old, new, strict=True)]
        for got, part in zip(given[1], want, strict=True):
            np.testing.assert_allclose(got, part, rtol=1e-4)
    else:
        old, new = (
            np.outer((g**2).mean(axis=0), (x**2).mean(axis=0)).astype("f8") for x, g in tasks
        )
        total, got = GAMMA * old + new, np.outer(*given[1]).astype("f8")
        np.testing.assert_allclose(got.sum(axis=0), total.sum(axis=0), rtol=1e-4)
        np.testing.assert_allclose(got.sum(axis=1), total.sum(axis=1), rtol=1e-4)
