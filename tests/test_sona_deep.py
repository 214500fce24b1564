"""The deep run of Sona."""

from __future__ import annotations

import numpy as np
import pytest
from helpers import f64
from helpers_sona import IN, OUT, config, module, row, samples_of, served

import lora_engine as le
from lora_engine.learning import deep


def test_deep_run_learns_over_the_threshold():
    sona = le.Sona(config(deep_lr=0.05, deep_epochs=30, deep_batch_size=8))
    good = np.outer(row(1, OUT), row(2)) * 0.2
    samples = samples_of(good) + samples_of(-5 * good, n=30, quality=0.2, seed=3)
    result = sona.deep_optimize(samples)
    assert result.applied, result.note
    assert (result.samples_used, result.held_out) == (48, 12)
    assert result.quality_delta > 0
    x = row(9, n=50)
    want = f64(x) @ good.T
    assert np.linalg.norm(f64(sona.forward(x)) - want) < 0.5 * np.linalg.norm(want)
    assert sona.rollback()
    assert not served(sona).any()


def test_deep_run_that_is_worse_is_rejected():
    sona = le.Sona(config(deep_lr=1e3, max_grad_norm=1e6, deep_epochs=2))
    result = sona.deep_optimize(samples_of(np.ones((OUT, IN))))
    assert not result.applied
    assert "rejected" in result.note
    assert not served(sona).any()
    assert len(module(sona).pool) == 1
    assert sona.stats().deep_rejected == 1


def test_deep_run_whose_losses_are_no_numbers(monkeypatch):
    """It says so, rather than a rise that nobody measured; one that moves nothing says that."""
    sona = le.Sona(config(deep_epochs=2))
    losses = iter([1.0, np.inf, np.nan])
    monkeypatch.setattr(deep, "_loss", lambda *_: next(losses))
    result = sona.deep_optimize(samples_of(np.ones((OUT, IN))))
    assert not result.applied
    assert np.isnan(result.quality_delta)
    assert result.note == "rejected: the loss on held-out samples is not a number"
    monkeypatch.setattr(deep, "_loss", lambda *_: 1.0)
    result = sona.deep_optimize(samples_of(np.ones((OUT, IN))))
    assert (result.applied, result.quality_delta) == (False, 0.0)
    assert result.note == "rejected: the loss on held-out samples would be as before"
    losses = iter([1.0, 3.0, 1.5])
    monkeypatch.setattr(deep, "_loss", lambda *_: next(losses))
    result = sona.deep_optimize(samples_of(np.ones((OUT, IN))))
    assert (result.applied, result.quality_delta) == (False, -0.5)
    assert result.note == "rejected: the loss on held-out samples would rise by 0.5"


def test_deep_run_on_samples_whose_squares_leave_float32():
    """They are learned from, and no part of the Fisher information."""
    sona = le.Sona(config(deep_lr=1e19, deep_epochs=1))
    wide = samples_of(1e20 * np.ones((OUT, IN)), n=40)
    result = sona.deep_optimize(wide)
    assert result.applied, result.note
    assert not any(part.any() for part in module(sona).fisher)
    assert served(sona).any()


def test_deep_run_of_too_few():
    sona = le.Sona(config(deep_trigger_threshold=1.0))
    sona.instant_adapt(row(0), le.Feedback.from_target(row(1, OUT)))
    result = sona.deep_optimize(samples_of(np.ones((OUT, IN)), n=40, quality=0.4))
    assert not result.applied
    assert result.note == "0 of 40 samples can be learned from, fewer than 5"
    assert sona.should_trigger_deep()  # nothing was trained: nothing is counted
    assert sona.stats().accumulated_quality == 1.0
    assert (sona.stats().deep_count, sona.stats().deep_rejected) == (0, 0)


def test_deep_trigger_is_summed_quality_of_applied_samples():
    sona = le.Sona(config(deep_trigger_threshold=3.0))
    for i in range(6):
        assert not sona.should_trigger_deep()
        sona.instant_adapt(row(i), le.Feedback.from_target(row(i, OUT)), quality=0.5)
    assert sona.stats().accumulated_quality == pytest.approx(3.0)
    assert sona.should_trigger_deep()
    nan = np.full(IN, np.nan, np.float32)
    sona.instant_adapt(nan, le.Feedback.from_gradient(row(1, OUT)), quality=1.0)
    assert sona.stats().accumulated_quality == pytest.approx(3.0)
    sona.deep_optimize(samples_of(np.ones((OUT, IN))))
    assert not sona.should_trigger_deep()
