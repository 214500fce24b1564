"""Adapters on a frozen network that learn clean digits, then four views with 16 pixels shuffled.

Runs that differ in seed and lambda go side by side: a seed is a slot, a lambda a pool. So every
step is one forward and one adapt a pool, and all start from the same weights and see the same
images in the same order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from rich.progress import Progress

import lora_engine as le
from lora_engine.demo_data import Digits, Floats, Ints, loss_gradient
from lora_engine.evidence import network
from lora_engine.evidence.data import CLASSES, PIXELS, Task, partial_permutation, permuted, split
from lora_engine.evidence.measure import Doubles, at_least, chosen, final, forgetting

TASKS, MOVED = 5, 16
BASE_EPOCHS, BASE_BATCH, BASE_LEARNING_RATE = 20, 32, 0.1
SCALING = 2.0
FORMS = ("factor", "delta")
# What FULL chooses, lambda in both forms: the defaults of EWC, TrainingConfig and SonaConfig; the
# learning rate is SonaConfig's of a deep run, which has as many epochs and samples a step.
EWC_LAMBDA, LEARNING_RATE = 30.0, 0.1
Slots = NDArray[np.int32]
Lambdas = tuple[float, ...]


class Setting(NamedTuple):
    """How adapters learn a task."""

    form: str
    rank: int = 4
    batch: int = 32
    epochs: int = 10
    learning_rate: float = LEARNING_RATE


class Profile(NamedTuple):
    """How much is run. Settings are chosen on validation images of the first ``tuning_seeds``
    seeds; what is reported is measured on the test images of all."""

    seeds: int = 5
    tuning_seeds: int = 3
    epochs: int = 10
    learning_rates: Sequence[float] = (0.05, 0.1, 0.2)
    factor_lambdas: Lambdas = (3.0, 10.0, 30.0, 100.0, 300.0)
    delta_lambdas: Lambdas = (10.0, 30.0, 100.0, 300.0, 1000.0)


FULL, QUICK = Profile(), Profile(2, 1, 5, (LEARNING_RATE,), (10.0, 30.0), (30.0, 100.0))


class Outcome(NamedTuple):
    """Of one form: accuracy without and with EWC [seeds, tasks learned, tasks]."""

    none: Doubles
    ewc: Doubles
    ewc_lambda: float
    validation: dict[float, float]


class Result(NamedTuple):
    """outcomes: of each form. learning_rate: the best without protection, on validation."""

    outcomes: dict[str, Outcome]
    learning_rate: float
    learning_rates: dict[float, float]


def _tasks(seed: int, validating: bool) -> list[Task]:
    rng, clean = np.random.default_rng([3, seed]), split(seed, validating)
    return [clean] + [permuted(clean, partial_permutation(MOVED, rng)) for _ in range(TASKS - 1)]


def frozen_base(clean: Digits, seed: int) -> network.Weights:
    """The network of one seed, trained on clean digits and then frozen."""
    rng = np.random.default_rng([4, seed])
    net, gradient = network.new_network(rng), network.Weights()
    for batch in network.batches(clean, BASE_BATCH, BASE_EPOCHS, rng):
        step = network.gradient(net, batch.images, batch.labels, gradient).flat
        net.flat -= np.float32(BASE_LEARNING_RATE) * step
    return net


class Bench:
    """The frozen networks of several seeds, and a pool of adapters a lambda on their first
    layers. Arrays are [lambdas, seeds, n, ...]; of images and labels [seeds, n, ...]."""

    def __init__(self, setting: Setting, lambdas: Lambdas, seeds: int, validating: bool) -> None:
        self.setting, self.seeds = setting, seeds
        self.tasks = [_tasks(seed, validating) for seed in range(seeds)]
        nets = [frozen_base(tasks[0].train, seed) for seed, tasks in enumerate(self.tasks)]
        self.W1, self.b1, self.W2, self.b2 = (
            np.stack([getattr(net, name).T for net in nets]) for name in ("W1", "b1", "W2", "b2")
        )
        self.pools = [self._new_pool() for _ in lambdas]
        self.penalties = [
            le.EWC(pool, lam, form=setting.form) if lam else None
            for pool, lam in zip(self.pools, lambdas, strict=True)
        ]
        self.orders = [np.random.default_rng([6, seed]) for seed in range(seeds)]

    def _new_pool(self) -> le.AdapterPool:
        rank, bound = self.setting.rank, PIXELS**-0.5
        pool = le.AdapterPool(PIXELS, network.HIDDEN, capacity=self.seeds, max_rank=rank)
        for seed in range(self.seeds):
            rng = np.random.default_rng([5, seed])
            A = rng.uniform(-bound, bound, (rank, PIXELS)).astype(np.float32)
            pool.add(A, np.zeros((network.HIDDEN, rank), np.float32), SCALING)
        return pool

    def _rows(self, images: Floats) -> tuple[Floats, Slots]:
        """All seeds' images as rows, and each row's slot."""
        ids = np.repeat(np.arange(self.seeds, dtype=np.int32), images.shape[1])
        return np.asarray(images.reshape(-1, PIXELS)), ids

    def forward(self, images: Floats) -> tuple[Floats, Floats]:
        """The first layer's outputs with each pool's deltas, and the logits."""
        x, ids = self._rows(images)
        base = (images @ self.W1 + self.b1).reshape(len(x), -1)
        z = np.stack([pool.forward(x, ids, out=base.copy()) for pool in self.pools])
        z = z.reshape(len(self.pools), *images.shape[:2], -1)
        return z, np.maximum(z, 0.0) @ self.W2 + self.b2

    def gradients(self, images: Floats, labels: Ints) -> Floats:
        """dL/dz of each sample's own cross-entropy, [lambdas, seeds * n, 100]."""
        z, y = self.forward(images)
        truth = np.broadcast_to(labels, y.shape[:-1]).ravel()
        g = loss_gradient(y.reshape(-1, CLASSES), truth).reshape(y.shape)
        back = (g @ self.W2.transpose(0, 2, 1)) * (z > 0)
        return np.asarray(back.reshape(len(self.pools), -1, network.HIDDEN))

    def learn(self, task: int, progressed: Callable[[], None]) -> None:
        """One task by every pool, whose EWC sees every sample, then its end."""
        trains = [tasks[task].train for tasks in self.tasks]
        setting = self.setting
        streams = [
            network.batches(train, setting.batch, setting.epochs, rng)
            for train, rng in zip(trains, self.orders, strict=True)
        ]
        for batch in zip(*streams, strict=True):
            images, labels = (np.stack(part) for part in zip(*batch, strict=True))
            x, ids = self._rows(images)
            gradients = self.gradients(images, labels)
            for pool, ewc, g in zip(self.pools, self.penalties, gradients, strict=True):
                if ewc:
                    ewc.observe(x, g, ids)
                result = pool.adapt(x, g, ids, setting.learning_rate, ewc=ewc)
                if not result.applied.all():
                    raise RuntimeError(f"adapters: {setting}: {result.note}")
            progressed()
        for ewc in self.penalties:
            if ewc:
                ewc.consolidate()

    def accuracy(self, task: int) -> Doubles:
        """[lambdas, seeds] on images that nothing learns from."""
        tests = [tasks[task].test for tasks in self.tasks]
        images, labels = (np.stack(part) for part in zip(*tests, strict=True))
        return np.asarray((self.forward(images)[1].argmax(axis=-1) == labels).mean(axis=-1))


def measure(
    setting: Setting, lambdas: Lambdas, seeds: int, validating: bool, progress: Progress
) -> Doubles:
    """[lambdas, seeds, tasks learned, tasks]; lambda 0: no protection."""
    bench = Bench(setting, lambdas, seeds, validating)
    steps = TASKS * setting.epochs * -(-len(bench.tasks[0][0].train.labels) // setting.batch)
    name = f"rank {setting.rank}, batch {setting.batch}, {setting.form}"
    note = "choosing" if validating else "measuring"
    bar = progress.add_task(name, total=steps, note=note)
    accuracy = np.full((len(lambdas), seeds, TASKS, TASKS), np.nan)
    for learned in range(TASKS):
        bench.learn(learned, lambda: progress.update(bar, advance=1))
        for task in range(learned + 1):
            accuracy[:, :, learned, task] = bench.accuracy(task)
        progress.refresh()
    return accuracy


def scores(lambdas: Lambdas, accuracy: Doubles) -> dict[float, float]:
    """Mean accuracy over tasks and seeds of each lambda."""
    return {lam: float(final(each).mean()) for lam, each in zip(lambdas, accuracy, strict=True)}


def run(progress: Progress, profile: Profile = FULL, forms: Sequence[str] = FORMS) -> Result:
    """Chooses the learning rate that serves no protection best, then for each form lambda."""
    tuning = (profile.tuning_seeds, True, progress)
    learning_rates = {}
    for lr in profile.learning_rates:
        setting = Setting("factor", epochs=profile.epochs, learning_rate=lr)
        learning_rates[lr] = scores((0.0,), measure(setting, (0.0,), *tuning))[0.0]
    lr, outcomes = chosen(learning_rates), {}
    for form in forms:
        setting = Setting(form, epochs=profile.epochs, learning_rate=lr)
        lambdas = profile.factor_lambdas if form == "factor" else profile.delta_lambdas
        validation = scores(lambdas, measure(setting, lambdas, *tuning))
        pair = (0.0, chosen(validation))
        none, ewc = measure(setting, pair, profile.seeds, False, progress)
        outcomes[form] = Outcome(none, ewc, pair[1], validation)
    return Result(outcomes, lr, learning_rates)


def check(result: Result) -> list[str]:
    """What falls short of forgetting halved and 2 points more accuracy; empty: nothing."""
    missed = []
    for form, outcome in result.outcomes.items():
        gain = float(final(outcome.ewc).mean() - final(outcome.none).mean())
        kept = float(forgetting(outcome.none).mean() / 2 - forgetting(outcome.ewc).mean())
        missed += at_least(f"{form}: accuracy with EWC over none", gain, 0.02)
        missed += at_least(f"{form}: half of the forgetting, less that with EWC", kept, 0.0)
    return missed
