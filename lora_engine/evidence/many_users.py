"""A thousand users with two tasks each in one pool: what each of them forgets, with EWC and
without, and how long a round for all of them takes.

A user's task is a view of the digits with 16 pixels shuffled. Every round each user sends a few
images: one forward for all, one observe for the EWC, and one adapt from the labels.
"""

from __future__ import annotations

from collections.abc import Sequence
from time import perf_counter
from typing import NamedTuple

import numpy as np
from rich.progress import Progress, TaskID

import lora_engine as le
from lora_engine.demo_data import Digits, Floats, Ints, loss_gradient
from lora_engine.evidence import network
from lora_engine.evidence.adapters import Slots, frozen_base
from lora_engine.evidence.data import PIXELS, partial_permutation, split
from lora_engine.evidence.measure import Doubles, at_least

TASKS, MOVED = 2, 16
RANK, SCALING = 2, 2.0
IMAGES = 4  # of a user in a round
LEARNING_RATE = 0.1


class Profile(NamedTuple):
    """How much is run. lambda is chosen on other users, with validation images."""

    users: int = 1000
    tuning_users: int = 100
    rounds: int = 150  # of a task
    held_out: int = 100  # images that each user's accuracy is counted on
    lambdas: Sequence[float] = (1.0, 3.0, 10.0, 30.0, 100.0)


FULL, QUICK = Profile(), Profile(200, 50, 100, 60, (3.0, 30.0))


class Run(NamedTuple):
    """accuracy [users, 3]: of the first task when it was learned, then after the second; of the
    second. seconds [rounds, 3]: forward, adapt, observe of a round of all users."""

    accuracy: Doubles
    seconds: Doubles

    @property
    def forgetting(self) -> Doubles:
        """[users]: what was lost of the first task."""
        return np.asarray(self.accuracy[:, 0] - self.accuracy[:, 1])

    @property
    def mean(self) -> float:
        """Accuracy over both tasks in the end."""
        return float(self.accuracy[:, 1:].mean())


class Result(NamedTuple):
    """Without and with EWC, lambda and the mean accuracy of each that was tried."""

    none: Run
    ewc: Run
    ewc_lambda: float
    validation: dict[float, float]


class _Crowd:
    """Users of one frozen network: views [users, tasks, 64] are orders of the pixels."""

    def __init__(self, users: int, seed: int, validating: bool) -> None:
        rng = np.random.default_rng([11, seed])
        self.stream, self.test = split(0, validating)
        self.views = np.stack(
            [[partial_permutation(MOVED, rng) for _ in range(TASKS)] for _ in range(users)]
        )
        self._net = frozen_base(self.stream, 0)
        self.pool = le.AdapterPool(PIXELS, network.HIDDEN, capacity=users, max_rank=RANK)
        bound = PIXELS**-0.5
        for _ in range(users):
            A = rng.uniform(-bound, bound, (RANK, PIXELS)).astype(np.float32)
            self.pool.add(A, np.zeros((network.HIDDEN, RANK), np.float32), SCALING)

    def seen(self, images: Floats, task: int) -> Floats:
        """images [users, n, 64] as their users see them, as rows."""
        views = np.broadcast_to(self.views[:, task, None], images.shape)
        return np.take_along_axis(images, views, axis=2).reshape(-1, PIXELS)

    def first_layer(self, x: Floats) -> Floats:
        """Its frozen outputs."""
        return np.asarray(x @ self._net.W1.T + self._net.b1.T)

    def logits(self, z: Floats) -> Floats:
        """From the first layer's outputs with the deltas."""
        return np.asarray(np.maximum(z, 0.0) @ self._net.W2.T + self._net.b2.T)

    def gradient(self, z: Floats, labels: Ints) -> Floats:
        """dL/dz of each row's cross-entropy."""
        return np.asarray((loss_gradient(self.logits(z), labels) @ self._net.W2) * (z > 0))

    def accuracy(self, task: int, digits: Digits) -> Doubles:
        """[users], on the same images for all."""
        users, n = len(self.views), len(digits.labels)
        right = np.zeros(users)
        for image, label in zip(digits.images, digits.labels, strict=True):
            x = self.seen(np.broadcast_to(image, (users, 1, PIXELS)), task)
            z = self.pool.forward(x, np.arange(users, dtype=np.int32), out=self.first_layer(x))
            right += self.logits(z).argmax(axis=1) == label
        return right / n


def _round(
    crowd: _Crowd, x: Floats, labels: Ints, ids: Slots, ewc: le.EWC | None
) -> tuple[float, float, float]:
    """Serves and learns from one batch of everybody's; the seconds of forward, adapt, observe."""
    z, start = crowd.first_layer(x), perf_counter()
    crowd.pool.forward(x, ids, out=z)
    forward = perf_counter() - start
    gradient = crowd.gradient(z, labels)
    start = perf_counter()
    if ewc:
        ewc.observe(x, gradient, ids)
    observe, start = perf_counter() - start, perf_counter()
    result = crowd.pool.adapt(x, gradient, ids, LEARNING_RATE, ewc=ewc)
    adapt = perf_counter() - start
    if not result.applied.all():
        raise RuntimeError(f"many users: {result.note}")
    return forward, adapt, observe


def _run(
    crowd: _Crowd, ewc_lambda: float, profile: Profile, progress: Progress, bar: TaskID
) -> Run:
    """Both tasks of every user, one after the other; lambda 0: no protection."""
    users, rng = len(crowd.views), np.random.default_rng(12)
    ids = np.repeat(np.arange(users, dtype=np.int32), IMAGES)
    ewc = le.EWC(crowd.pool, ewc_lambda) if ewc_lambda else None
    count = profile.held_out
    test = Digits(crowd.test.images[:count], crowd.test.labels[:count])
    seconds, after = [], []
    for task in range(TASKS):
        for turn in range(profile.rounds):
            drawn = rng.integers(len(crowd.stream.labels), size=(users, IMAGES))
            x = crowd.seen(crowd.stream.images[drawn], task)
            seconds.append(_round(crowd, x, crowd.stream.labels[drawn].ravel(), ids, ewc))
            progress.update(bar, advance=1, refresh=turn % 10 == 0)
        if ewc:
            ewc.consolidate()
        after += [crowd.accuracy(seen, test) for seen in range(task + 1)]
    return Run(np.stack(after, axis=1), np.array(seconds))


def run(progress: Progress, profile: Profile = FULL) -> Result:
    """Chooses lambda on the tuning users, then measures all others with it and without."""
    total = TASKS * profile.rounds * (len(profile.lambdas) + 2)
    bar = progress.add_task("many users", total=total, note="")
    validation = {}
    for lam in profile.lambdas:
        crowd = _Crowd(profile.tuning_users, 1, validating=True)
        validation[lam] = _run(crowd, lam, profile, progress, bar).mean
    best = max(validation, key=validation.__getitem__)
    none, ewc = (
        _run(_Crowd(profile.users, 0, validating=False), lam, profile, progress, bar)
        for lam in (0.0, best)
    )
    return Result(none, ewc, best, validation)


def check(result: Result) -> list[str]:
    """What falls short of forgetting halved over the users, and no accuracy lost."""
    none, ewc = result.none, result.ewc
    kept = float(none.forgetting.mean() / 2 - ewc.forgetting.mean())
    return [
        *at_least("half of the forgetting, less that with EWC", kept, 0.0),
        *at_least("accuracy over both tasks, with EWC over none", ewc.mean - none.mean, 0.0),
    ]
