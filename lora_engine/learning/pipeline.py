"""TrainingPipeline: a MicroLoRA taught from feedback and samples, step by step."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from lora_engine import ops
from lora_engine.adapters.micro_lora import QUALITY_MAX_NORM, MicroLoRA
from lora_engine.learning import checkpoint as checkpoints
from lora_engine.learning import training
from lora_engine.learning.feedback import Feedback
from lora_engine.learning.feedback_buffer import FeedbackBuffer
from lora_engine.learning.optimizers import F32, OPTIMIZERS, norm_of
from lora_engine.learning.protection import Protection
from lora_engine.learning.schedules import Schedule
from lora_engine.learning.training import Best, SampleOrder, TrainingHistory
from lora_engine.learning.training_config import TrainingConfig
from lora_engine.learning.training_samples import TrainingSample

if TYPE_CHECKING:
    from lora_engine.adapters.micro_lora import _Module

_RATE_IS_ZERO = "the learning rate is 0 at step {}: the batch was dropped"


class TrainStepResult(NamedTuple):
    """What a train_step did.

    applied: the gradient was taken, else ``note`` says why not. loss: mean over the rows, before
    the step, of feedback that defines one (``Feedback.from_target``), else None. grad_norm: of
    the module's gradient, the mean over what the batch holds so far. stepped: the batch was
    full and a step was taken, with that learning_rate. new_task: the boundary fired.
    """

    applied: bool
    note: str
    loss: float | None
    grad_norm: float
    stepped: bool
    learning_rate: float | None
    new_task: bool


class BufferResult(NamedTuple):
    """What became of the feedback of a buffer; notes: why some was not applied, each once."""

    applied: int
    refused: int
    notes: tuple[str, ...]


class _Step(NamedTuple):
    """A batch that ended: whether its step was taken, why not, and with which rate."""

    taken: bool
    note: str
    learning_rate: float | None


@dataclass
class _Track:
    """Where a module stands: steps taken, and what the optimizer keeps for it."""

    steps: int
    kept: dict[str, F32] = field(default_factory=dict)


class TrainingPipeline:
    """Batches, optimizer, learning rate, EWC and checkpoints around a MicroLoRA.

    boundary: a detector of new tasks (``TaskBoundary``) that sees one number of each train_step,
    1 - quality where there is one, else the loss, else the gradient's norm, and starts a new
    task where it fires. Give it a stream of one kind of feedback. It is in no checkpoint.

    Each module has its own batch, optimizer state and number of steps; the learning rate of a
    step is the schedule's at that number. One thread trains at a time, while any number serve;
    from other threads feedback comes through a ``FeedbackBuffer``.

    Raises TypeError for a config of another kind.
    """

    def __init__(self, config: Any = None, boundary: Any = None) -> None:
        config = TrainingConfig() if config is None else config
        if not isinstance(config, TrainingConfig):
            got = type(config).__name__
            raise TypeError(f"TrainingPipeline: config: expected a TrainingConfig, got {got}")
        if boundary is not None and not hasattr(boundary, "update"):
            got = type(boundary).__name__
            raise TypeError(f"TrainingPipeline: boundary: expected a TaskBoundary, got {got}")
        self.config = config
        self._boundary = boundary
        self._optimizer = OPTIMIZERS[config.optimizer]()
        self._schedule = Schedule(
            config.lr_schedule,
            config.warmup_steps,
            config.total_steps,
            config.lr_gamma,
            config.lr_step_size,
        )
        self._lora: MicroLoRA | None = None

    def init_for_lora(self, lora: Any) -> None:
        """Begins anew with this MicroLoRA: step 0, no moments, nothing protected.

        Gradients that waited in it are dropped. Raises TypeError.
        """
        if not isinstance(lora, MicroLoRA):
            got = type(lora).__name__
            raise TypeError(
                f"TrainingPipeline.init_for_lora: lora: expected a MicroLoRA, got {got}"
            )
        self._protection = Protection(lora, self.config)
        self._tracks = {}
        for name, m in lora._modules.items():
            m.clear()
            self._tracks[name] = _Track(0, self._optimizer.start(m.storage.gradient_size(m.slot)))
        self._order = SampleOrder(self.config.seed)
        self._best: Best | None = None  # of a train that was cut short
        self._lora = lora

    def _check_lora(self, op: str, lora: MicroLoRA) -> None:
        if self._lora is None or lora is not self._lora:
            was = "none was given" if self._lora is None else "another"
            raise ValueError(
                f"TrainingPipeline.{op}: lora: expected the one of init_for_lora, got {was}"
            )

    def steps(self, module: str) -> int:
        """Steps taken so far in a module."""
        if self._lora is None:
            raise ValueError("TrainingPipeline.steps: expected init_for_lora first")
        self._lora._module(module)
        return self._tracks[module].steps

    def learning_rate(self, module: str) -> float:
        """That of a module's next step."""
        return self.config.learning_rate * self._schedule(self.steps(module))

    # ---- a step at a time ---------------------------------------------------

    def train_step(
        self, lora: MicroLoRA, x: Any, feedback: Feedback, module: str
    ) -> TrainStepResult:
        """Learns from feedback on the output of ``lora.forward(x, module)``.

        x [in] or [n, in]. The gradient joins the module's batch; once that holds batch_size
        rows, a step is taken with their mean. Feedback by quality is learned from as
        ``MicroLoRA.adapt`` does, whatever the quality: to filter it would bias it. Raises
        ValueError and TypeError, changing nothing.
        """
        self._check_lora("train_step", lora)
        m = lora._module(module)
        if not isinstance(feedback, Feedback):
            raise TypeError(
                "TrainingPipeline.train_step: feedback: expected a Feedback,"
                f" got {type(feedback).__name__}"
            )
        rated, why = feedback.gradient is None and feedback.quality is not None, ""
        if rated:
            grad, why = lora._quality_gradient(x, feedback, module, m)
        else:
            grad = feedback.output_gradient(lora, x, module)
        outcome, norm = ops.NO_ADAPTER, 0.0
        if grad is not None:
            outcome, norm = self._accumulate(m, x, grad, rated)
            why = ops.NO_ROWS if outcome == ops.NO_ADAPTER else ops.NOTES[outcome]
        if rated:
            lora._rate(feedback, module, m)
        if outcome != ops.APPLIED:
            return TrainStepResult(False, why, None, norm, False, None, False)
        loss = _loss(feedback, grad)
        new_task = self._new_task_at(_surprise(feedback, loss, norm))
        self._protection.observe(x, grad, module)
        if m.samples < self.config.batch_size:
            return TrainStepResult(True, "", loss, norm, False, None, new_task)
        step = self._step(m, module)
        return TrainStepResult(
            step.taken, step.note, loss, norm, step.taken, step.learning_rate, new_task
        )

    def _accumulate(self, m: _Module, x: Any, grad: Any, rated: bool = False) -> tuple[int, float]:
        """Adds to a module's batch: (outcome, norm of the mean of what it holds)."""
        if self._lora is not None and self._lora._dropout:
            x = self._lora._dropped(x, m)
        outcome, norm, _ = m.accumulate(x, grad, rated=rated)
        if outcome == ops.APPLIED:
            m.steps += 1
        return outcome, norm / max(m.samples, 1)

    def _new_task_at(self, value: float) -> bool:
        """Whether the boundary fires. The row that told is of the new task, and learned after."""
        if self._boundary is None or not self._boundary.update(value):
            return False
        self._protection.consolidate()
        return True

    def _step(self, m: _Module, module: str) -> _Step:
        """A step with the mean of a module's batch."""
        config, track = self.config, self._tracks[module]
        lr = self.learning_rate(module)
        if lr == 0.0:
            m.clear()
            return _Step(False, _RATE_IS_ZERO.format(track.steps), lr)
        first = self._optimizer.preconditions
        kept = track.kept
        max_norm = config.max_grad_norm
        if m.rated:
            max_norm = QUALITY_MAX_NORM if max_norm is None else min(max_norm, QUALITY_MAX_NORM)

        def direction(gradient: F32) -> F32:
            nonlocal kept
            norm = norm_of(gradient)
            if max_norm is not None and norm > max_norm:
                gradient *= np.float32(max_norm / norm)
            along, kept = self._optimizer.direction(gradient, track.kept, track.steps)
            return along

        step = ops.make_step(
            m.pool._backend,
            lr,
            None if first else max_norm,
            weight_decay=config.weight_decay,
            ewc=self._protection.of(m),
        )
        outcome, _ = m.apply(step, direction if first else None)
        if outcome != ops.APPLIED:
            return _Step(False, ops.NOTES[outcome], lr)
        track.kept = kept
        track.steps += 1
        return _Step(True, "", lr)

    def flush(self, lora: MicroLoRA) -> int:
        """A step for each module whose batch is not full, with the mean of what it holds.

        Returns how many steps were taken. Raises ValueError for another lora.
        """
        self._check_lora("flush", lora)
        waiting = [(m, name) for name, m in lora._modules.items() if m.samples]
        return sum(self._step(m, name).taken for m, name in waiting)

    def train_buffer(self, lora: MicroLoRA, buffer: FeedbackBuffer) -> BufferResult:
        """A train_step for all that waits in a buffer, oldest first.

        What does not fit is left out and said; it stops nothing else.
        """
        self._check_lora("train_buffer", lora)
        applied = refused = 0
        notes: dict[str, None] = {}
        for item in buffer.drain():
            try:
                result = self.train_step(lora, *item)
                done, note = result.applied, result.note
            except (TypeError, ValueError) as error:
                done, note = False, str(error)
            applied += done
            refused += not done
            if note:
                notes[note] = None
        return BufferResult(applied, refused, tuple(notes))

    # ---- tasks --------------------------------------------------------------

    def start_new_task(self, lora: MicroLoRA) -> bool:
        """Ends a task: what the batches hold is learned, then EWC consolidates and anchors.

        Steps, moments and learning rate go on. Returns whether anything was consolidated:
        False without EWC, or where it observed nothing. Raises ValueError for another lora.
        """
        self._check_lora("start_new_task", lora)
        self.flush(lora)
        return self._protection.consolidate()

    # ---- whole sets of samples ----------------------------------------------

    def train(
        self,
        lora: MicroLoRA,
        samples: Sequence[TrainingSample],
        *,
        module: str,
        epochs: int = 1,
        validation: Sequence[TrainingSample] | None = None,
        patience: int | None = None,
        checkpoint: str | os.PathLike[str] | None = None,
    ) -> TrainingHistory:
        """Learns to imitate samples: L = quality / 2 ‖delta - output_embedding‖².

        Each epoch goes through the samples of at least quality_threshold in an order that seed
        and epoch fix, a step a batch, the last of an epoch maybe smaller. With total_steps it
        ends there. validation: samples held out, whose loss is measured before and after each
        epoch; the best weights of all are what remains, on Ctrl-C too, and after ``patience``
        epochs without an improvement training stops. checkpoint: saved after each epoch and on
        Ctrl-C, which ends the batch under way before it raises KeyboardInterrupt; the next call
        with the same samples then finishes that epoch first. A checkpoint loaded goes on from
        the last weights, with the best so far, to the same bits as if never cut.

        Raises ValueError, TypeError and FileNotFoundError, changing nothing: what does not fit,
        NaN, quality outside 0..1, no validation sample over the threshold, gradients that wait
        in a batch, no folder to save a checkpoint in.
        """
        self._check_lora("train", lora)
        return training.run(self, lora, samples, module, epochs, validation, patience, checkpoint)

    # ---- checkpoints --------------------------------------------------------

    def save(self, lora: MicroLoRA, path: str | os.PathLike[str]) -> None:
        """Everything that the next steps depend on, as one safetensors file, replaced whole.

        Weights, optimizer moments, steps, gradients that wait, baselines of qualities, noise of
        ``forward(explore=)``, EWC, the order of the samples, the best weights of a ``train``.
        Raises OSError, and ValueError for another lora.
        """
        self._check_lora("save", lora)
        checkpoints.save(self, lora, path)

    def load(self, lora: MicroLoRA, path: str | os.PathLike[str]) -> None:
        """Goes on where ``save`` was, to the same bits. Calls init_for_lora.

        Raises, changing nothing, ValueError for a checkpoint of another configuration of the
        pipeline or the MicroLoRA, FormatError for a damaged one, FileNotFoundError.
        """
        checkpoints.load(self, lora, path)


def _surprise(feedback: Feedback, loss: float | None, norm: float) -> float:
    """What rises where a task is new, of each kind of feedback."""
    quality = getattr(feedback, "quality", None)
    if quality is not None:
        return 1.0 - float(np.mean(quality))
    return norm if loss is None else loss


def _loss(feedback: Feedback, grad: Any) -> float | None:
    """weight/2 ‖base + delta - y‖², mean over the rows, from its gradient."""
    if feedback.target is None:
        return None
    if not feedback.weight:
        return 0.0
    rows = grad.shape[0] if grad.ndim == 2 else 1
    if isinstance(grad, np.ndarray):
        squared = float(np.sum(np.square(grad, dtype=np.float64)))
    else:
        squared = float(grad.double().square().sum())
    return squared / (2.0 * feedback.weight * rows)
