"""Learning-rate schedules against torch's, warm-up, and what each needs."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch.optim import lr_scheduler as oracle

import lora_engine as le
from lora_engine.learning.schedules import SCHEDULES, Schedule

GAMMA, SIZE = 0.9, 4
NEEDS = {"lr_gamma": GAMMA, "lr_step_size": SIZE}


def made(name: str, total: int, warmup: int = 0) -> Schedule:
    return Schedule(name, warmup, total, GAMMA, SIZE)


def of_torch(name: str, optimizer: torch.optim.Optimizer, steps: int) -> oracle.LRScheduler:
    """Torch's schedule over that many steps, without warm-up."""
    match name:
        case "constant":
            return oracle.ConstantLR(optimizer, factor=1.0)
        case "linear":
            return oracle.PolynomialLR(optimizer, total_iters=steps, power=1.0)
        case "cosine":
            return oracle.CosineAnnealingLR(optimizer, T_max=steps)
        case "exponential":
            return oracle.ExponentialLR(optimizer, gamma=GAMMA)
        case "step":
            return oracle.StepLR(optimizer, step_size=SIZE, gamma=GAMMA)
    return oracle.OneCycleLR(optimizer, max_lr=1.0, total_steps=steps)


def rates(build, steps: int) -> list[float]:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = build(optimizer)
    found = []
    for _ in range(steps):
        found.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step() if len(found) < steps else None
    return found


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 10, 37])
@pytest.mark.parametrize("name", SCHEDULES)
def test_factors_are_those_of_torch(name, steps):
    want = rates(lambda optimizer: of_torch(name, optimizer, steps), steps)
    schedule = made(name, steps)
    assert [schedule(t) for t in range(steps)] == pytest.approx(want, rel=1e-12, abs=1e-15)


@pytest.mark.parametrize("warmup", [2, 5])
@pytest.mark.parametrize("name", [n for n in SCHEDULES if n != "one_cycle"])
def test_warm_up_is_torchs_linear_then_the_schedule(name, warmup):
    def build(optimizer):
        rise = oracle.LinearLR(optimizer, 1 / warmup, total_iters=warmup - 1)
        then = of_torch(name, optimizer, 20 - warmup)
        return oracle.SequentialLR(optimizer, [rise, then], milestones=[warmup])

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # SequentialLR's own use of epochs
        want = rates(build, 20)
    schedule = made(name, 20, warmup)
    assert [schedule(t) for t in range(20)] == pytest.approx(want, rel=1e-12, abs=1e-15)


@pytest.mark.parametrize("warmup", [1, 3])
@pytest.mark.parametrize("name", SCHEDULES)
def test_warm_up_rises_to_the_first_value(name, warmup):
    plain, warmed = made(name, 10), made(name, 10 + warmup, warmup)
    first = plain(0)
    assert [warmed(t) for t in range(warmup)] == pytest.approx(
        [first * (t + 1) / warmup for t in range(warmup)]
    )
    assert [warmed(warmup + t) for t in range(10)] == [plain(t) for t in range(10)]


@pytest.mark.parametrize(
    ("name", "last"), [("linear", 0.0), ("cosine", 0.0), ("one_cycle", 1 / 250_000)]
)
def test_the_last_value_holds_beyond_the_total(name, last):
    schedule = made(name, 10)
    assert [schedule(t) for t in (10, 11, 1000)] == pytest.approx([last] * 3, abs=1e-15)


def test_no_step_of_the_total_is_without_effect():
    for name in SCHEDULES:
        assert all(made(name, 30, 5)(t) > 0 for t in range(30)), name


@pytest.mark.parametrize(
    ("name", "field"),
    [(name, field) for name, shape in SCHEDULES.items() for field in shape.needs],
)
def test_what_a_schedule_needs_is_not_assumed(name, field):
    given = {"total_steps": 10, **NEEDS}
    le.TrainingConfig(lr_schedule=name, **given)
    with pytest.raises(ValueError, match=rf"^TrainingConfig: {field}: .* {name} needs, got None"):
        le.TrainingConfig(lr_schedule=name, **{**given, field: None})
