"""Learning from quality alone: no label, no gradient, a number between 0 and 1 an answer.

A frozen network reads digits of which half the pixels are shuffled, and is often wrong. An
adapter on its last layer answers one request at a time with noise in the output, is told how
good the answer was, and learns by REINFORCE (Williams 1992). The rule behind the quality, here
whether the answer is right, stays hidden from it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from rich.progress import Progress, TaskID

import lora_engine as le
from lora_engine.demo_data import Digits, Floats
from lora_engine.evidence import network
from lora_engine.evidence.adapters import frozen_base
from lora_engine.evidence.data import CLASSES, partial_permutation, permuted, split
from lora_engine.evidence.measure import Doubles, at_least

MOVED = 32
RANK, ALPHA, MODULE = 8, 16.0, "classifier"
BATCH = 64  # requests whose mean gradient is one update
CHECKPOINTS, QUARTER = 20, 5
Setting = tuple[float, float]  # sigma, learning rate
SIGMA, LEARNING_RATE = 1.0, 0.08  # what FULL chooses


class Profile(NamedTuple):
    """How much is run. Settings are chosen by the quality served in the last quarter, noise
    included, with the validation split of the first ``tuning_seeds`` seeds."""

    seeds: int = 5
    tuning_seeds: int = 2
    requests: int = 30_000
    sigmas: Sequence[float] = (0.5, 1.0, 2.0)
    learning_rates: Sequence[float] = (0.04, 0.08, 0.16)


FULL, QUICK = Profile(), Profile(3, 1, 20_000, (SIGMA,), (0.04, LEARNING_RATE))


class Run(NamedTuple):
    """Mean quality: served [checkpoints] of the requests between checkpoints, their noise
    included; held_out [1 + checkpoints] without noise, on images nothing is learned from, the
    frozen base's first."""

    served: Doubles
    held_out: Doubles


class Result(NamedTuple):
    """The runs of all seeds as one: served and held_out [seeds, ...]; at the setting chosen, and
    what every setting (sigma, learning rate) served when it was tried."""

    served: Doubles
    held_out: Doubles
    requests: int
    sigma: float
    learning_rate: float
    validation: dict[Setting, float]


class Learner:
    """An adapter that serves with noise and learns from what its answers were worth."""

    def __init__(self, seed: int, sigma: float, learning_rate: float) -> None:
        config = le.MicroLoRAConfig(
            network.HIDDEN, CLASSES, rank=RANK, alpha=ALPHA, target_modules=(MODULE,), seed=seed
        )
        self.lora = le.MicroLoRA(config)
        self.sigma, self.learning_rate = sigma, learning_rate
        self._told = 0

    def serve(self, h: Floats) -> Floats:
        """What is added to the answer to one request, noise included."""
        return np.asarray(self.lora.forward(h, MODULE, explore=self.sigma))

    def learn(self, h: Floats, quality: float) -> None:
        """From what the last answer, for h, was worth."""
        self.lora.adapt(h, le.Feedback.from_quality(quality), MODULE)
        self._told += 1
        if self._told % BATCH == 0:
            self.lora.apply_updates(self.learning_rate)


class _World:
    """One seed's frozen network and images; what the images are is known to ``quality`` only."""

    def __init__(self, seed: int, validating: bool) -> None:
        clean = split(seed, validating)
        order = partial_permutation(MOVED, np.random.default_rng([8, seed]))
        self._net = frozen_base(clean.train, seed)
        self.stream, self.held_out = permuted(clean, order)

    def layer(self, digits: Digits) -> tuple[Floats, Floats]:
        """The last layer's inputs and its frozen outputs."""
        h = network.hidden(self._net, digits.images)
        return h, h @ self._net.W2.T + self._net.b2.T


def quality(outputs: Floats, labels: object) -> Doubles:
    """The hidden rule: 1 for a right answer, 0 for a wrong one."""
    return np.asarray(np.argmax(outputs, axis=-1) == labels, np.float64)


def _run(world: _World, seed: int, setting: Setting, requests: int) -> Run:
    """The life of one adapter."""
    rng, learner = np.random.default_rng([9, seed]), Learner(seed, *setting)
    (h, base), (h_held, base_held) = world.layer(world.stream), world.layer(world.held_out)

    def held_out() -> float:
        outputs = base_held + learner.lora.forward(h_held, MODULE)
        return float(quality(outputs, world.held_out.labels).mean())

    served, measured = [], [held_out()]
    for chunk in np.array_split(rng.integers(len(h), size=requests), CHECKPOINTS):
        qualities = []
        for i in chunk:
            q = float(quality(base[i] + learner.serve(h[i]), world.stream.labels[i]))
            learner.learn(h[i], q)
            qualities.append(q)
        served.append(np.mean(qualities))
        measured.append(held_out())
    return Run(np.array(served), np.array(measured))


def _measure(
    requests: int, seeds: int, setting: Setting, validating: bool, progress: Progress, bar: TaskID
) -> Run:
    """Stacked over seeds."""
    runs = []
    for seed in range(seeds):
        runs.append(_run(_World(seed, validating), seed, setting, requests))
        note = f"sigma {setting[0]:g}, lr {setting[1]:g}"
        progress.update(bar, advance=1, note=note, refresh=True)
    return Run(*(np.stack(part) for part in zip(*runs, strict=True)))


def run(progress: Progress, profile: Profile = FULL) -> Result:
    """Chooses sigma and the learning rate on validation images, then measures."""
    settings = [(sigma, lr) for sigma in profile.sigmas for lr in profile.learning_rates]
    total = len(settings) * profile.tuning_seeds + profile.seeds
    bar = progress.add_task("quality alone", total=total, note="")
    validation = {}
    for setting in settings:
        tried = _measure(profile.requests, profile.tuning_seeds, setting, True, progress, bar)
        validation[setting] = float(tried.served[:, -QUARTER:].mean())
    sigma, lr = max(validation, key=validation.__getitem__)
    served, held_out = _measure(profile.requests, profile.seeds, (sigma, lr), False, progress, bar)
    return Result(served, held_out, profile.requests, sigma, lr, validation)


def check(result: Result) -> list[str]:
    """What falls short of: held out, 10 points above the frozen base; served, 5 points from the
    first quarter to the last; and in the last, noise included, above the frozen base."""
    base, final = result.held_out[:, 0].mean(), result.held_out[:, -QUARTER:].mean()
    first, last = result.served[:, :QUARTER].mean(), result.served[:, -QUARTER:].mean()
    return [
        *at_least("held-out quality over the frozen base's", final - base, 0.10),
        *at_least("quality served, last quarter over first", last - first, 0.05),
        *at_least("quality served with noise, over the frozen base's", last - base, 0.0),
    ]
