"""TrainingConfig: its defaults, and what it refuses by name."""

from __future__ import annotations

import math
from dataclasses import FrozenInstanceError

import numpy as np
import pytest

import lora_engine as le

BAD = {
    "learning_rate": [0.0, -1.0, math.nan, math.inf, "1", None, True, 1e39],
    "ewc_lambda": [-1.0, math.nan, math.inf, "1", False],
    "ewc_form": ["dense", "", None, 1],
    "quality_threshold": [-0.1, 1.1, math.nan, None, "0.5", True],
    "fisher_samples": [0, -1, 1.0, None, True],
    "online_ewc_gamma": [-0.1, 1.5, math.nan, None],
    "optimizer": ["adam", "SGD", None, 1],
    "lr_schedule": ["cyclic", "onecycle", None, 0],
    "warmup_steps": [-1, 1.5, None, True],
    "total_steps": [0, -1, 2.0, "3"],
    "lr_gamma": [-0.1, 1.1, math.nan, "1"],
    "lr_step_size": [0, 1.5],
    "batch_size": [0, -1, 1.0, None, True],
    "max_grad_norm": [0.0, -1.0, math.nan, math.inf, "1"],
    "weight_decay": [-1.0, math.nan, None],
    "seed": [-1, 1.0, None, 2**63],
}


@pytest.mark.parametrize(
    ("name", "value"),
    [(name, value) for name, values in BAD.items() for value in values],
    ids=lambda v: repr(v)[:30],
)
def test_bad_value_names_its_field(name, value):
    with pytest.raises(ValueError, match=rf"^TrainingConfig: {name}: expected .*, got "):
        le.TrainingConfig(**{name: value})


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("optimizer", "sgd, adamw"),
        ("lr_schedule", "constant, linear, cosine, exponential, step, one_cycle"),
        ("ewc_form", "factor, delta"),
    ],
)
def test_unknown_name_is_told_what_there_is(name, known):
    with pytest.raises(ValueError, match=f"expected one of {known}, got 'what'"):
        le.TrainingConfig(**{name: "what"})


def test_warm_up_leaves_steps_to_the_schedule():
    le.TrainingConfig(warmup_steps=3, total_steps=4)
    with pytest.raises(ValueError, match="warmup_steps: expected fewer than the 4 total_steps"):
        le.TrainingConfig(warmup_steps=4, total_steps=4)


def test_defaults_are_those_of_the_design():
    c = le.TrainingConfig()
    assert (c.learning_rate, c.ewc_form, c.quality_threshold, c.fisher_samples) == (
        1e-3, "delta", 0.5, 100,
    )  # fmt: skip
    assert (c.online_ewc_gamma, c.optimizer, c.lr_schedule, c.warmup_steps, c.total_steps) == (
        0.95, "sgd", "constant", 0, None,
    )  # fmt: skip
    assert (c.batch_size, c.max_grad_norm, c.weight_decay) == (1, 1.0, 0.0)


def test_values_of_numpy_become_pythons():
    c = le.TrainingConfig(learning_rate=np.float32(0.5), batch_size=np.int64(4))
    assert (type(c.learning_rate), type(c.batch_size)) == (float, int)
    with pytest.raises(FrozenInstanceError):
        c.seed = 1  # type: ignore[misc]
