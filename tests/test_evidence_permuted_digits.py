"""Permuted digits, one task after another: what online EWC keeps, and what that is made of."""

from __future__ import annotations

import numpy as np
import pytest
from helpers_evidence import FULL, quiet

from lora_engine.evidence import data, measure, network
from lora_engine.evidence import permuted_digits as experiment

PROFILE = experiment.FULL if FULL else experiment.QUICK


@pytest.fixture(scope="module")
def result():
    with quiet() as progress:
        return experiment.run(progress, PROFILE)


def test_online_ewc_beats_no_protection_and_the_best_l2(result):
    assert experiment.check(result) == []


def test_what_falls_short_is_said(result):
    accuracy = result.accuracy
    worse = {**accuracy, experiment.EWC: accuracy[experiment.L2]}
    said = experiment.check(result._replace(accuracy=worse))
    assert "online EWC over the best L2: expected at least 5.0 points, got 0.0" in said


def test_each_seed_keeps_more_with_ewc(result):
    mean = {name: measure.final(accuracy) for name, accuracy in result.accuracy.items()}
    assert (mean[experiment.EWC] > mean[experiment.NONE] + 0.05).all()
    assert (mean[experiment.JOINT] > mean[experiment.EWC]).all()
    forgotten = {
        name: measure.forgetting(accuracy)
        for name, accuracy in result.accuracy.items()
        if name != experiment.JOINT
    }
    assert (forgotten[experiment.EWC] < 0.7 * forgotten[experiment.NONE]).all()


def test_settings_are_the_best_of_their_validation(result):
    for setting, scores in result.validation.items():
        assert scores[getattr(result, setting)] == max(scores.values())
    assert result.gamma == experiment.GAMMA


def test_accuracies_are_of_all_tasks_learned_so_far(result):
    for name, accuracy in result.accuracy.items():
        assert accuracy.shape == (PROFILE.seeds, experiment.TASKS, experiment.TASKS)
        if name != experiment.JOINT:
            later = np.triu(np.ones(accuracy.shape[1:], bool), 1)
            assert np.isnan(accuracy[:, later]).all()
            assert not np.isnan(accuracy[:, ~later]).any()


def test_fisher_is_the_mean_of_squared_per_sample_gradients():
    rng = np.random.default_rng(0)
    net, one = network.new_network(rng), network.Weights()
    x, labels = rng.random((5, 64), np.float32), rng.integers(0, 10, 5)
    squares = [
        network.gradient(net, x[i : i + 1], labels[i : i + 1], one).flat.astype("f8") ** 2
        for i in range(5)
    ]
    got = network.fisher(net, x, labels).flat
    np.testing.assert_allclose(got, np.mean(squares, axis=0), rtol=1e-4, atol=1e-9)


def test_gradient_of_the_network_is_that_of_its_loss():
    rng = np.random.default_rng(1)
    net = network.new_network(rng)
    x, labels = rng.random((3, 64), np.float32), np.array([1, 0, 9])
    want = network.gradient(net, x, labels, network.Weights()).flat.copy()

    def loss():
        y = network.logits(net, x).astype("f8")
        return float((np.log(np.exp(y).sum(axis=1)) - y[np.arange(3), labels]).mean())

    for direction in rng.standard_normal((5, len(want))).astype("f4"):
        before, ends = net.flat.copy(), []
        for sign in (1, -1):
            net.flat[:] = before + np.float32(sign * 1e-4) * direction
            ends.append(loss())
        net.flat[:] = before
        slope = (ends[0] - ends[1]) / 2e-4
        assert slope == pytest.approx(float(want @ direction), rel=0.02, abs=0.02)


def test_parts_of_the_data_are_disjoint():
    final, choosing = data.split(3, validating=False), data.split(3, validating=True)
    sizes = [len(part.labels) for task in (final, choosing) for part in task]
    assert sizes == [1300, 497, 1040, 260]
    np.testing.assert_array_equal(
        np.concatenate([choosing.train.images, choosing.test.images]), final.train.images
    )
    everything = np.concatenate([final.train.images, final.test.images])
    assert len(np.unique(everything, axis=0)) == 1797


def test_partial_permutations_move_few_pixels():
    rng = np.random.default_rng(0)
    orders = [data.partial_permutation(16, rng) for _ in range(20)]
    for order in orders:
        np.testing.assert_array_equal(np.sort(order), np.arange(64))
    assert 8 < np.mean([(order != np.arange(64)).sum() for order in orders]) <= 16


def test_measures_by_hand():
    accuracy = np.full((1, 3, 3), np.nan)
    accuracy[0][np.tril_indices(3)] = [0.9, 0.5, 0.8, 0.3, 0.6, 0.9]
    assert measure.final(accuracy) == pytest.approx(0.6)
    assert measure.forgetting(accuracy) == pytest.approx((0.6 + 0.2) / 2)
    assert measure.so_far(accuracy) == pytest.approx(np.array([[0.9, 0.65, 0.6]]))
    assert measure.points(np.array([0.5, 0.6])) == "55.0 ± 7.1"
