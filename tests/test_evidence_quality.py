"""An adapter that learns from the quality of its answers alone."""

from __future__ import annotations

import numpy as np
import pytest
from helpers_evidence import FULL, quiet

from lora_engine.evidence import quality

PROFILE = quality.FULL if FULL else quality.QUICK


@pytest.fixture(scope="module")
def result():
    with quiet() as progress:
        return quality.run(progress, PROFILE)


def test_quality_rises_clearly_above_the_frozen_base(result):
    assert quality.check(result) == []


def test_every_seed_gains(result):
    assert result.held_out.shape == (PROFILE.seeds, 1 + quality.CHECKPOINTS)
    assert result.served.shape == (PROFILE.seeds, quality.CHECKPOINTS)
    end = result.held_out[:, -quality.QUARTER :].mean(axis=1)
    assert (end > result.held_out[:, 0] + 0.02).all()


def test_what_falls_short_is_said(result):
    still = result._replace(
        held_out=np.full_like(result.held_out, 0.5), served=np.full_like(result.served, 0.4)
    )
    said = quality.check(still)
    assert len(said) == 3
    assert said[2].endswith("expected at least 0.0 points, got -10.0")


def test_settings_are_the_best_that_were_tried(result):
    chosen = (result.sigma, result.learning_rate)
    assert result.validation[chosen] == max(result.validation.values())
    assert not FULL or chosen == (quality.SIGMA, quality.LEARNING_RATE)


def test_good_and_bad_quality_move_the_output_opposite_ways():
    h = np.random.default_rng(0).random(100, np.float32)
    moved = {}
    for q in (1.0, 0.0):
        learner = quality.Learner(0, 1.0, 0.1)
        learner.serve(h)
        learner.learn(h, 0.5)  # sets the baseline
        noise = learner.serve(h)
        learner.learn(h, q)
        learner.lora.apply_updates(0.1)
        moved[q] = float(learner.lora.forward(h, quality.MODULE) @ noise)
    assert moved[1.0] > 0.01
    assert moved[0.0] == pytest.approx(-moved[1.0], rel=1e-5)


def test_an_update_comes_with_every_batch():
    learner, h = quality.Learner(0, 1.0, 0.1), np.random.default_rng(0).random(100, np.float32)
    for told in range(1, 2 * quality.BATCH + 1):
        learner.serve(h)
        before = learner.lora.forward(h, quality.MODULE)
        learner.learn(h, (told % 2) / 2)
        same = np.array_equal(learner.lora.forward(h, quality.MODULE), before)
        assert same == (told % quality.BATCH > 0)


def test_a_constant_quality_teaches_nothing():
    learner = quality.Learner(0, 1.0, 0.1)
    h = np.random.default_rng(0).random(100, np.float32)
    for _ in range(3 * quality.BATCH):
        learner.serve(h)
        learner.learn(h, 0.7)
    assert not learner.lora.forward(h, quality.MODULE).any()
