"""Learning rates over the steps of a training run, as factors of the configured rate.

Step t counts from 0, w is the number of warm-up steps, T that of all steps, warm-up included.
A schedule is a shape f over the n = T - w steps after warm-up; during warm-up the factor rises
linearly to the shape's first value (Goyal et al. 2017, section 2.2):

    factor(t) = f(0) (t + 1) / w    for t < w
    factor(t) = f(t - w)            from then on

Beyond T the last value holds. Checked against ``torch.optim.lr_scheduler`` in the tests.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

ONE_CYCLE_RISE = 0.3  # part of the cycle in which the rate rises
ONE_CYCLE_START = 25.0  # the peak over the first rate
ONE_CYCLE_END = 1e4  # the first rate over the last


class Plan(NamedTuple):
    """What a shape may depend on: n, gamma and step_size, each 0 where no schedule needs it."""

    steps: int
    gamma: float
    step_size: int


def constant(t: int, plan: Plan) -> float:
    """1."""
    return 1.0


def linear(t: int, plan: Plan) -> float:
    """1 - t / n, and 0 from step n on (Goyal et al. 2017; Devlin et al. 2018, appendix A.2)."""
    return 1.0 - _progress(t, plan)


def cosine(t: int, plan: Plan) -> float:
    """(1 + cos(pi t / n)) / 2, without restarts (SGDR: Loshchilov & Hutter 2017, eq. 5)."""
    return 0.5 * (1.0 + math.cos(math.pi * _progress(t, plan)))


def exponential(t: int, plan: Plan) -> float:
    """gamma^t (as torch's ExponentialLR)."""
    return float(plan.gamma**t)


def step(t: int, plan: Plan) -> float:
    """gamma^floor(t / step_size) (He et al. 2016, section 3.4; as torch's StepLR)."""
    return float(plan.gamma ** (t // plan.step_size))


def one_cycle(t: int, plan: Plan) -> float:
    """From 1/25 up to 1 over the first 30% of the steps, then down to 1/250,000, each along half
    a cosine (1cycle: Smith & Topin 2018, section 3; as torch's OneCycleLR)."""
    first, last = 1.0 / ONE_CYCLE_START, 1.0 / (ONE_CYCLE_START * ONE_CYCLE_END)
    peak, end = ONE_CYCLE_RISE * plan.steps - 1.0, plan.steps - 1.0
    if t <= peak:
        return _half_cosine(first, 1.0, t / peak if peak else 1.0)
    return _half_cosine(1.0, last, (min(t, end) - peak) / (end - peak))


def _progress(t: int, plan: Plan) -> float:
    return min(1.0, t / plan.steps)


def _half_cosine(start: float, end: float, part: float) -> float:
    return end + (start - end) / 2.0 * (math.cos(math.pi * part) + 1.0)


class Shape(NamedTuple):
    """A schedule's shape, and the fields of the configuration that it cannot do without."""

    factor: Callable[[int, Plan], float]
    needs: tuple[str, ...] = ()


SCHEDULES = {
    "constant": Shape(constant),
    "linear": Shape(linear, ("total_steps",)),
    "cosine": Shape(cosine, ("total_steps",)),
    "exponential": Shape(exponential, ("lr_gamma",)),
    "step": Shape(step, ("lr_gamma", "lr_step_size")),
    "one_cycle": Shape(one_cycle, ("total_steps",)),
}


class Schedule:
    """The factor of every step of a schedule: ``schedule(t)``.

    name: one of SCHEDULES; its fields were checked (``TrainingConfig``).
    """

    def __init__(
        self,
        name: str,
        warmup_steps: int = 0,
        total_steps: int | None = None,
        lr_gamma: float | None = None,
        lr_step_size: int | None = None,
    ) -> None:
        self._shape = SCHEDULES[name].factor
        self._warmup = warmup_steps
        self._plan = Plan((total_steps or 0) - warmup_steps, lr_gamma or 0.0, lr_step_size or 0)

    def __call__(self, t: int) -> float:
        """The factor of step t, counted from 0."""
        if t < self._warmup:
            return self._shape(0, self._plan) * (t + 1) / self._warmup
        return self._shape(t - self._warmup, self._plan)
