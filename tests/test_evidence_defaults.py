"""The configurations' defaults are what the experiments choose."""

from __future__ import annotations

import inspect

from helpers_evidence import quiet  # noqa: F401  skips where what the demo needs is missing

import lora_engine as le
from lora_engine.evidence import adapters, many_users, permuted_digits, quality


def test_defaults_are_those_that_the_experiments_state():
    ewc = inspect.signature(le.EWC).parameters
    training, sona, setting = le.TrainingConfig(), le.SonaConfig(), adapters.Setting("delta")
    assert ewc["ewc_lambda"].default == adapters.EWC_LAMBDA
    assert ewc["gamma"].default == permuted_digits.GAMMA
    assert (training.ewc_lambda, training.online_ewc_gamma) == (
        adapters.EWC_LAMBDA, permuted_digits.GAMMA,
    )  # fmt: skip
    assert (sona.ewc_lambda, sona.ewc_gamma) == (adapters.EWC_LAMBDA, permuted_digits.GAMMA)
    assert training.fisher_samples == ewc["fisher_samples"].default
    assert training.ewc_form == ewc["form"].default == "delta"
    assert (sona.deep_lr, sona.deep_epochs, sona.deep_batch_size) == (
        adapters.LEARNING_RATE, setting.epochs, setting.batch,
    )  # fmt: skip


def test_what_is_stated_lies_inside_what_is_tried():
    """A choice at a grid's edge says little: the next value was not tried."""
    full, users = adapters.FULL, many_users.FULL
    for value, tried in (
        (adapters.EWC_LAMBDA, full.factor_lambdas),
        (adapters.EWC_LAMBDA, full.delta_lambdas),
        (adapters.EWC_LAMBDA, users.lambdas),
        (adapters.LEARNING_RATE, full.learning_rates),
        (quality.SIGMA, quality.FULL.sigmas),
        (quality.LEARNING_RATE, quality.FULL.learning_rates),
    ):
        assert value in tried
        assert min(tried) < value < max(tried)
    assert permuted_digits.GAMMA in permuted_digits.FULL.gammas
