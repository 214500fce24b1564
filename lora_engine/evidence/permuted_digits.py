"""Permuted digits: a network that learns five tasks one after another, and forgets or not.

Each task shuffles the pixels its own way (Goodfellow et al. 2013). The array ops carry it:
``fisher_accumulate`` at a task's end, ``ewc_step`` as the whole optimiser. Plain SGD is the
same step with a Fisher of zeros, L2 toward the anchor the same with ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from rich.progress import Progress, TaskID

import lora_engine as le
from lora_engine.demo_data import Digits, Floats
from lora_engine.evidence import network
from lora_engine.evidence.data import PIXELS, Task, permuted, split
from lora_engine.evidence.measure import Doubles, at_least, chosen, final

TASKS = 5
LEARNING_RATE, BATCH = 0.1, 32
NONE, L2, EWC, JOINT = "none", "best L2", "online EWC", "joint"
GAMMA = 0.95  # while lambda is chosen; FULL then chooses it too, and EWC has it as default


class Profile(NamedTuple):
    """How much is run. Settings are chosen on the first ``tuning_seeds`` of the seeds, on
    validation images; what is reported is measured on the test images of all seeds."""

    seeds: int = 5
    tuning_seeds: int = 3
    epochs: int = 20
    ewc_lambdas: Sequence[float] = (5.0, 10.0, 20.0, 40.0)
    gammas: Sequence[float] = (0.9, 0.95, 1.0)
    l2_lambdas: Sequence[float] = (0.01, 0.02, 0.05, 0.1)


FULL, QUICK = Profile(), Profile(2, 1, 10, (10.0, 20.0), (0.95,), (0.02, 0.05))


class Result(NamedTuple):
    """accuracy: of each method [seeds, tasks learned, tasks]; of joint training, which learns
    all at once, the last row only. validation: mean accuracy of each candidate."""

    accuracy: dict[str, Doubles]
    ewc_lambda: float
    gamma: float
    l2_lambda: float
    validation: dict[str, dict[float, float]]


class _Method(NamedTuple):
    name: str
    strength: float = 0.0
    gamma: float = GAMMA


def _tasks(seed: int, validating: bool) -> list[Task]:
    rng, plain = np.random.default_rng([1, seed]), split(seed, validating)
    return [permuted(plain, rng.permutation(PIXELS)) for _ in range(TASKS)]


def consolidate(
    method: _Method, net: network.Weights, digits: Digits, importance: Floats, anchor: Floats
) -> None:
    """The end of a task: F* <- gamma F* + F_hat, and the latest weights are the anchor.

    F_hat is a mean of squared per-sample gradients; the op squares, so it is given the root.
    """
    if method.name == EWC:
        mean = network.fisher(net, digits.images, digits.labels).flat
        le.fisher_accumulate(importance, np.sqrt(mean), method.gamma, 1.0)
    elif method.name == L2:
        importance[:] = 1.0
    anchor[:] = net.flat


def _learn(tasks: list[Task], seed: int, epochs: int, method: _Method) -> Doubles:
    """[tasks learned, tasks] accuracy; joint learns from all tasks' images mixed."""
    rng = np.random.default_rng([2, seed])
    net, gradient = network.new_network(rng), network.Weights()
    importance, anchor = np.zeros_like(net.flat), net.flat.copy()
    accuracy = np.full((TASKS, TASKS), np.nan)
    streams = [task.train for task in tasks]
    if method.name == JOINT:
        streams = [Digits(*(np.concatenate(part) for part in zip(*streams, strict=True)))]
    for learned, digits in enumerate(streams, start=TASKS - len(streams)):
        for batch in network.batches(digits, BATCH, epochs, rng):
            network.gradient(net, batch.images, batch.labels, gradient)
            le.ewc_step(net.flat, gradient.flat, importance, anchor, LEARNING_RATE, method.strength)
        consolidate(method, net, digits, importance, anchor)
        accuracy[learned, : learned + 1] = [
            network.accuracy(net, task.test) for task in tasks[: learned + 1]
        ]
    return accuracy


class _Runner(NamedTuple):
    profile: Profile
    progress: Progress
    bar: TaskID

    def measure(self, method: _Method, validating: bool) -> Doubles:
        """[seeds, tasks learned, tasks]."""
        runs = []
        for seed in range(self.profile.tuning_seeds if validating else self.profile.seeds):
            runs.append(_learn(_tasks(seed, validating), seed, self.profile.epochs, method))
            self.progress.update(self.bar, advance=1, note=method.name, refresh=True)
        return np.stack(runs)

    def score(self, method: _Method) -> float:
        """Mean accuracy on the validation images."""
        return float(final(self.measure(method, validating=True)).mean())


def run(progress: Progress, profile: Profile = FULL) -> Result:
    """Chooses lambda and gamma on validation images, then measures the four methods."""
    candidates = len(profile.ewc_lambdas) + len(profile.gammas) + len(profile.l2_lambdas)
    total = candidates * profile.tuning_seeds + 4 * profile.seeds
    runner = _Runner(profile, progress, progress.add_task("permuted digits", total=total, note=""))
    validation = {
        "ewc_lambda": {lam: runner.score(_Method(EWC, lam)) for lam in profile.ewc_lambdas},
        "l2_lambda": {lam: runner.score(_Method(L2, lam)) for lam in profile.l2_lambdas},
    }
    ewc_lambda, l2_lambda = (chosen(scores) for scores in validation.values())
    validation["gamma"] = {
        gamma: runner.score(_Method(EWC, ewc_lambda, gamma)) for gamma in profile.gammas
    }
    gamma = chosen(validation["gamma"])
    methods = (
        _Method(NONE), _Method(L2, l2_lambda), _Method(EWC, ewc_lambda, gamma), _Method(JOINT)
    )  # fmt: skip
    accuracy = {method.name: runner.measure(method, validating=False) for method in methods}
    return Result(accuracy, ewc_lambda, gamma, l2_lambda, validation)


def check(result: Result) -> list[str]:
    """What falls short of 15 points over no protection and 5 over the best L2; empty: nothing."""
    mean = {name: float(final(accuracy).mean()) for name, accuracy in result.accuracy.items()}
    over_none = at_least("online EWC over none", mean[EWC] - mean[NONE], 0.15)
    return over_none + at_least("online EWC over the best L2", mean[EWC] - mean[L2], 0.05)
