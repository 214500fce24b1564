"""Adapters on a frozen network, five tasks one after another: what EWC keeps, in both forms."""

from __future__ import annotations

import numpy as np
import pytest
from helpers_evidence import FULL, quiet

from lora_engine.evidence import adapters, measure

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


def test_the_stated_settings_are_chosen(result):
    """By the full profile; in the small one lambda is as good as the best, to 1.5 points."""
    for outcome in result.outcomes.values():
        best = max(outcome.validation.values())
        assert outcome.validation[adapters.EWC_LAMBDA] > best - 0.015
        assert not FULL or outcome.ewc_lambda == adapters.EWC_LAMBDA
    assert result.learning_rate == adapters.LEARNING_RATE


@pytest.mark.parametrize("form", adapters.FORMS)
def test_every_sample_is_observed_before_its_step(form):
    """The products' own EWC, fed the stream of a task, has what is asked of it."""
    setting = adapters.Setting(form, rank=2, epochs=1)
    bench = adapters.Bench(setting, (0.0, 1.0), 2, validating=True)
    twin = adapters.Bench(setting, (1.0,), 2, validating=True)
    seen = twin.penalties[0]
    adapt, pool = twin.pools[0].adapt, twin.pools[0]

    def once(x, g, ids, lr, ewc):
        seen.observe(x, g, ids)
        return adapt(x, g, ids, lr, ewc=ewc)

    twin.penalties = [None]
    pool.adapt = once
    for one in (bench, twin):
        one.learn(0, lambda: None)
    assert bench.penalties[0] is None
    seen.consolidate()
    want, got = seen.state(), bench.penalties[1].state()
    assert want.keys() == got.keys()
    for key in want:
        np.testing.assert_array_equal(got[key], want[key])
