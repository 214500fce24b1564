"""Training over sets of samples: epochs, held-out loss, early stopping."""

from __future__ import annotations

import math
import operator
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from lora_engine import ops
from lora_engine.learning.training_samples import Imitation, TrainingSample, imitation
from lora_engine.progress import Bar, interrupts_held

if TYPE_CHECKING:
    from lora_engine.adapters.micro_lora import MicroLoRA
    from lora_engine.learning.pipeline import TrainingPipeline

FINISHED, TOTAL_STEPS, NO_IMPROVEMENT = "finished", "total_steps", "early stopping"
_VALIDATION_ROWS = 256


class TrainingHistory(NamedTuple):
    """What a train measured.

    losses: of each epoch, quality/2 ‖delta - output_embedding‖² before each row's step, mean
    over its rows. validation_losses: held out, the first before training, then after each epoch,
    those before a checkpoint too; empty without validation. best_epoch: whose weights remain,
    counted from 1 as they are, 0 for those before training. steps: taken in this call. samples:
    learned from; below_threshold and without_target: left out, and why. refused: rows of batches
    whose step was not taken, as the gradient held NaN or Inf or the step left the range. stopped:
    "finished", "total_steps" or "early stopping". note: why nothing was learned, "" where
    something was.
    """

    losses: tuple[float, ...]
    validation_losses: tuple[float, ...]
    best_epoch: int
    steps: int
    samples: int
    below_threshold: int
    without_target: int
    refused: int
    stopped: str
    note: str


class SampleOrder:
    """Which sample comes next: epoch e goes through the permutation that (seed, e) draws.

    No generator is carried along, so a checkpoint holds two numbers and whose samples they are.
    """

    def __init__(self, seed: int, epoch: int = 0, position: int = 0, digest: str = "") -> None:
        self.seed, self.epoch, self.position, self.digest = seed, epoch, position, digest

    def begin(self, data: Imitation, module: str) -> None:
        """Goes on in an epoch that was cut short, where it was one of the same samples."""
        digest = f"{module}: {data.digest()}"
        if self.position and digest != self.digest:
            self.end_epoch()
        self.digest = digest

    def rest(self, count: int) -> np.ndarray:
        """What is left of this epoch, as indices into the samples."""
        drawn = np.random.default_rng([self.seed, self.epoch]).permutation(count)
        rest: np.ndarray = drawn[self.position :]
        return rest

    def end_epoch(self) -> None:
        self.epoch += 1
        self.position = 0


class Best:
    """The weights with the lowest held-out loss so far, of a run on samples with this digest.

    losses: held out, the first before training; epoch: whose the weights are; weights: (A, B).
    """

    def __init__(
        self, digest: str = "", losses: Sequence[float] = (), epoch: int = 0,
        weights: tuple[Any, Any] | None = None,
    ) -> None:  # fmt: skip
        self.digest, self.losses, self.epoch, self.weights = digest, [*losses], epoch, weights

    def note(self, loss: float, lora: MicroLoRA, module: str) -> None:
        self.losses.append(loss)
        lowest = math.inf if self.weights is None else self.losses[self.epoch]
        if self.weights is None or loss < (lowest if math.isfinite(lowest) else math.inf):
            self.epoch = len(self.losses) - 1  # so never NaN over a number
            self.weights = lora.weights(module)[:2]

    @property
    def epochs_since(self) -> int:
        return len(self.losses) - 1 - self.epoch


class _Run:
    """One call of train: its samples, its sums."""

    def __init__(
        self, pipe: TrainingPipeline, lora: MicroLoRA, module: str, data: Imitation,
        held_out: Imitation | None,
    ) -> None:  # fmt: skip
        self.pipe, self.lora, self.module = pipe, lora, module
        self.data, self.held_out = data, held_out
        self.losses: list[float] = []
        self.best = Best()
        self.refused = 0
        self.first_step = self.measured = pipe.steps(module)
        if held_out is not None:
            digest = f"{module}: {data.digest()} {held_out.digest()}"
            cut = pipe._best is not None and pipe._best.digest == digest
            self.best = pipe._best if cut and pipe._best else Best(digest)
        pipe._best = self.best if held_out is not None else None

    def at_total_steps(self) -> bool:
        total = self.pipe.config.total_steps
        return total is not None and self.pipe.steps(self.module) >= total

    def gap(self, data: Imitation, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
        """(x, dL/dy, summed loss) of some samples."""
        x = np.stack([data.x[i] for i in rows])
        gap = self.lora.forward(x, self.module) - np.stack([data.target[i] for i in rows])
        quality = data.quality[rows]
        with np.errstate(over="ignore", invalid="ignore"):
            squares = np.square(gap, dtype=np.float64).sum(axis=1)
            loss = float((quality * squares).sum() / 2.0)
            return x, gap * quality[:, None], loss

    def batch(self, rows: np.ndarray) -> float:
        """Learns from some samples; their summed loss before the step."""
        pipe, m = self.pipe, self.lora._module(self.module)
        x, grad, loss = self.gap(self.data, rows)
        try:
            outcome, _ = pipe._accumulate(m, x, grad)
            if outcome == ops.APPLIED:
                pipe._protection.observe(x, grad, self.module)
                if pipe._step(m, self.module).taken:
                    return loss
            self.refused += len(rows)
        finally:
            m.clear()
        return loss

    def epoch(self, bar: Bar, interrupted: Callable[[], bool]) -> bool:
        """Goes through what is left of an epoch; False where it was cut short."""
        order, size = self.pipe._order, self.pipe.config.batch_size
        rest, total, rows = order.rest(len(self.data.x)), 0.0, 0
        for at in range(0, len(rest), size):
            if self.at_total_steps() or interrupted():
                break
            chunk = rest[at : at + size]
            total += self.batch(chunk)
            rows += len(chunk)
            order.position += len(chunk)
            bar.advance(len(chunk), total / rows)
        if rows:
            self.losses.append(total / rows)
        if rows < len(rest):
            return False
        order.end_epoch()
        return True

    def validate(self) -> None:
        """Measures the held-out loss, and keeps the weights if they are the best so far."""
        if self.held_out is None:
            return
        count, total = len(self.held_out.x), 0.0
        for at in range(0, count, _VALIDATION_ROWS):
            rows = np.arange(at, min(at + _VALIDATION_ROWS, count))
            total += self.gap(self.held_out, rows)[2]
        self.best.note(total / count, self.lora, self.module)
        self.measured = self.pipe.steps(self.module)

    def keep_best(self) -> None:
        """Puts the best weights back; EWC's records go with them, as set_weights drops those."""
        self.pipe._best = None
        last = not self.best.epochs_since and self.measured == self.pipe.steps(self.module)
        if self.best.weights is None or last:
            return
        protected = self.pipe._protection.state()
        self.lora.set_weights(self.module, *self.best.weights)
        self.pipe._protection.load_state(protected)

    def history(self, stopped: str) -> TrainingHistory:
        data, steps = self.data, self.pipe.steps(self.module) - self.first_step
        note = "" if steps else "no step was taken: nothing was learned"
        if not data.x:
            note = "no sample is left to imitate: nothing was learned"
        return TrainingHistory(
            tuple(self.losses), tuple(self.best.losses), self.best.epoch, steps, len(data.x),
            data.below_threshold, data.without_target, self.refused, stopped, note,
        )  # fmt: skip


def _count(name: str, value: Any, least: int) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        number = least - 1
    if number < least or isinstance(value, bool):
        raise ValueError(
            f"TrainingPipeline.train: {name}: expected a whole number from {least}, got {value!r}"
        )
    return number


def run(
    pipe: TrainingPipeline,
    lora: MicroLoRA,
    samples: Sequence[TrainingSample],
    module: str,
    epochs: int,
    validation: Sequence[TrainingSample] | None,
    patience: int | None,
    checkpoint: str | os.PathLike[str] | None,
) -> TrainingHistory:
    """``TrainingPipeline.train``."""
    op, threshold = "TrainingPipeline.train", pipe.config.quality_threshold
    m = lora._module(module)
    epochs = _count("epochs", epochs, 1)
    if patience is not None:
        patience = _count("patience", patience, 1)
        if validation is None:
            raise ValueError(f"{op}: patience: expected None without validation, got {patience}")
    if m.samples:
        raise ValueError(
            f"{op}: expected no gradients that wait, got {m.samples} rows in {module}: flush first"
        )
    shape = (m.pool.in_features, m.out)
    data = imitation(f"{op}: samples", samples, shape, threshold)
    held_out = None
    if validation is not None:
        held_out = imitation(f"{op}: validation", validation, shape, threshold)
        if not held_out.x:
            raise ValueError(f"{op}: validation: expected samples from {threshold} on, got none")
    if checkpoint is not None:
        parent = Path(os.path.realpath(checkpoint)).parent
        if not parent.is_dir():
            raise FileNotFoundError(f"{op}: checkpoint: expected a folder, got none at {parent}")
    this = _Run(pipe, lora, module, data, held_out)
    if not data.x:
        return this.history(FINISHED)
    pipe._order.begin(data, module)
    with interrupts_held() as interrupted:
        try:
            stopped = _epochs(this, epochs, patience, checkpoint, interrupted)
        finally:  # of an interrupt too, whose checkpoint goes on from the last weights
            this.keep_best()
        if checkpoint is not None:
            pipe.save(lora, checkpoint)
    return this.history(stopped)


def _epochs(
    this: _Run, epochs: int, patience: int | None, checkpoint: Any, interrupted: Callable[[], bool]
) -> str:
    """Trains; says what ended it. Raises KeyboardInterrupt between two batches."""
    total = epochs * len(this.data.x) - this.pipe._order.position
    with Bar(f"training {this.module}", total) as bar:
        if not this.best.losses:
            this.validate()
        for _ in range(epochs):
            if this.at_total_steps():
                return TOTAL_STEPS
            whole = this.epoch(bar, interrupted)
            if interrupted():
                if checkpoint is not None:
                    this.pipe.save(this.lora, checkpoint)
                raise KeyboardInterrupt
            this.validate()
            if not whole:
                return TOTAL_STEPS
            if patience is not None and this.best.epochs_since >= patience:
                return NO_IMPROVEMENT
            if checkpoint is not None:
                this.pipe.save(this.lora, checkpoint)
    return FINISHED
