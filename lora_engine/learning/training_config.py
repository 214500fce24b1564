"""TrainingConfig: how a TrainingPipeline trains."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from dataclasses import dataclass
from numbers import Real
from typing import Any

from lora_engine.learning.ewc import EWC_LAMBDA, FISHER_SAMPLES, GAMMA
from lora_engine.learning.optimizers import OPTIMIZERS
from lora_engine.learning.schedules import SCHEDULES

EWC_FORMS = ("factor", "delta")
_MAX = 3.4028234663852886e38  # float32's; NaN is beyond it too


@dataclass(frozen=True)
class TrainingConfig:
    """learning_rate: the schedule's largest. ewc_lambda: strength of the EWC penalty, None or 0
    for none; ewc_form, fisher_samples (horizon of the moving average) and online_ewc_gamma: of
    ``EWC``, whose defaults the experiments in lora_engine/evidence choose (adapters.py,
    permuted_digits.py). quality_threshold: ``train`` leaves out samples below it; it never
    filters feedback. optimizer: "sgd" or "adamw". lr_schedule: "constant", "linear", "cosine",
    "exponential", "step" or "one_cycle", after warmup_steps; total_steps, warm-up included, is
    what linear, cosine and one_cycle need, lr_gamma what exponential and step need, and step
    also lr_step_size (``learning/schedules.py`` has the formulas). batch_size: rows whose
    gradients are averaged for one step. max_grad_norm: over a module's gA and gB together, None
    for no clipping. weight_decay: decoupled, theta (1 - lr weight_decay). seed: of the sample
    order.

    Raises ValueError for a value of another kind or out of range, and for a schedule that
    lacks a field.
    """

    learning_rate: float = 1e-3
    ewc_lambda: float | None = EWC_LAMBDA
    ewc_form: str = "delta"
    quality_threshold: float = 0.5
    fisher_samples: int = FISHER_SAMPLES
    online_ewc_gamma: float = GAMMA
    optimizer: str = "sgd"
    lr_schedule: str = "constant"
    warmup_steps: int = 0
    total_steps: int | None = None
    lr_gamma: float | None = None
    lr_step_size: int | None = None
    batch_size: int = 1
    max_grad_norm: float | None = 1.0
    weight_decay: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        self._number("learning_rate", 0.0, _MAX)
        self._check("learning_rate", self.learning_rate > 0.0, "a number above 0")
        self._number("ewc_lambda", 0.0, _MAX, optional=True)
        self._one_of("ewc_form", EWC_FORMS)
        self._number("quality_threshold", 0.0, 1.0)
        self._whole("fisher_samples", 1)
        self._number("online_ewc_gamma", 0.0, 1.0)
        self._one_of("optimizer", OPTIMIZERS)
        self._one_of("lr_schedule", SCHEDULES)
        self._whole("warmup_steps", 0)
        self._whole("total_steps", 1, optional=True)
        self._number("lr_gamma", 0.0, 1.0, optional=True)
        self._whole("lr_step_size", 1, optional=True)
        self._whole("batch_size", 1)
        self._number("max_grad_norm", 0.0, _MAX, optional=True)
        self._check("max_grad_norm", self.max_grad_norm != 0.0, "a number above 0 or None")
        self._number("weight_decay", 0.0, _MAX)
        self._whole("seed", 0)
        for name in SCHEDULES[self.lr_schedule].needs:
            given = getattr(self, name) is not None
            self._check(name, given, f"a value, which the schedule {self.lr_schedule} needs")
        if self.total_steps is not None:
            fits = self.warmup_steps < self.total_steps
            self._check("warmup_steps", fits, f"fewer than the {self.total_steps} total_steps")

    def _check(self, name: str, ok: bool, expected: str) -> None:
        if not ok:
            got = repr(getattr(self, name))[:200]
            raise ValueError(f"TrainingConfig: {name}: expected {expected}, got {got}")

    def _one_of(self, name: str, known: Iterable[str]) -> None:
        names = tuple(known)
        self._check(name, getattr(self, name) in names, f"one of {', '.join(names)}")

    def _number(self, name: str, low: float, high: float, optional: bool = False) -> None:
        value: Any = getattr(self, name)
        if value is None and optional:
            return
        limits = "of at least 0" if high == _MAX else f"from {low:g} to {high:g}"
        expected = f"a number {limits}" + (" or None" if optional else "")
        self._check(name, isinstance(value, Real) and not isinstance(value, bool), expected)
        self._check(name, low <= value <= high, expected)
        object.__setattr__(self, name, float(value))

    def _whole(self, name: str, low: int, optional: bool = False) -> None:
        value: Any = getattr(self, name)
        if value is None and optional:
            return
        expected = f"a whole number from {low}" + (" or None" if optional else "")
        self._check(name, hasattr(value, "__index__") and not isinstance(value, bool), expected)
        number = operator.index(value)
        self._check(name, low <= number < 2**63, expected)
        object.__setattr__(self, name, number)
