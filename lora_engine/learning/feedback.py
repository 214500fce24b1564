"""Feedback: what is known of an output after it was served, as a gradient."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from lora_engine import ops

if TYPE_CHECKING:
    from lora_engine.adapters.exploration import Trace
    from lora_engine.adapters.micro_lora import MicroLoRA


_new = tuple.__new__  # a third of the cost of the class's own constructor

NO_DIRECTION = "a quality without a trace or an output has no direction: nothing was learned"
FIRST_QUALITY = "the first quality sets the baseline: nothing was learned"
AS_EXPECTED = "the quality is the baseline: nothing was learned"
NO_DISTANCE = "the output is what was served: it has no direction, nothing was learned"


class Feedback(NamedTuple):
    """Made by ``from_gradient``, ``from_target`` or ``from_quality``."""

    gradient: Any = None
    target: Any = None
    base: Any = None
    weight: float = 1.0
    quality: Any = None  # float64 [n], or [1] for all rows
    output: Any = None
    trace: Any = None

    @classmethod
    def from_gradient(cls, gradient: Any) -> Feedback:
        """gradient = dL/dy [out] or [n, out], exact."""
        return _new(cls, (gradient, None, None, 1.0, None, None, None))

    @classmethod
    def from_target(cls, y: Any, base: Any = None, weight: float = 1.0) -> Feedback:
        """L = weight/2 ‖base + delta - y‖², summed over features; y and base shaped like delta.

        base: what the frozen module put out; None counts as zeros. Raises
        ValueError for a weight that is negative or not finite.
        """
        weight = float(weight)  # a NumPy scalar would widen the gradient
        if not 0.0 <= weight < math.inf:
            raise ValueError(f"Feedback.from_target: weight: expected 0 or more, got {weight}")
        return cls(None, y, base, weight)

    @classmethod
    def from_quality(
        cls, q: Any, output: Any = None, base: Any = None, trace: Trace | None = None
    ) -> Feedback:
        """How good an output was, in 0..1: a number, or one a row [n].

        With a trace of ``forward(explore=)``, or else this thread's last of the module (used
        once), and no output: L = -E[q] by REINFORCE (Williams 1992, with a baseline),
        dL/dy = -(q - b) noise / sigma.

        With output [out] or [n, out], what was put out in place of mu = base + delta:
        dL/dy = -(q - b) (output - mu) / ‖output - mu‖, a bounded heuristic that moves toward
        an output that was better than usual, and away from one that was worse.

        b: the adapter's and module's moving average of q (0.9), updated after use; the first
        call only sets it. Noise that nothing answers to would let an adapter grow without end:
        whoever takes a step that a quality has a part in clips its gradient, of A and B together
        and the mean over the rows, to a norm of 1. With neither trace nor output nothing can be
        learned but b, and the result says so.

        Raises TypeError, or ValueError for a q outside 0..1, and for both an output and a trace.
        """
        try:
            given = np.asarray(q.detach().double().cpu() if hasattr(q, "detach") else q)
        except ValueError:  # rows of different lengths
            given = np.array(None)
        if given.dtype.kind not in "biuf":
            raise TypeError(f"Feedback.from_quality: q: expected numbers, got {q!r}")
        quality = np.atleast_1d(given.astype(np.float64))
        if quality.ndim != 1 or not ((quality >= 0.0) & (quality <= 1.0)).all():
            raise ValueError(
                f"Feedback.from_quality: q: expected a number in 0..1, or [n] of them, got {q!r}"
            )
        if output is not None and trace is not None:
            raise ValueError("Feedback.from_quality: expected an output or a trace, got both")
        return cls(None, None, base, 1.0, quality, output, trace)

    @property
    def needs_trace(self) -> bool:
        """Whether it is a quality whose direction is to come from an earlier ``forward``."""
        return self.quality is not None and self.trace is None and self.output is None

    def output_gradient(self, lora: MicroLoRA, x: Any, module: str) -> Any:
        """dL/dy, shaped like the delta of x (of ``from_gradient``: as given)."""
        if self.gradient is not None:
            return self.gradient
        if self.target is None:
            raise ValueError(
                "Feedback: expected one of from_gradient, from_target or from_quality, got none"
            )
        gap = self._gap("from_target", "y", self.target, _served(lora, x, module))
        return gap * -self.weight

    def quality_gradient(
        self, lora: MicroLoRA, x: Any, module: str, baseline: float | None, trace: Trace | None
    ) -> tuple[Any, str]:
        """dL/dy of ``from_quality`` and "", or None and why there is none.

        trace: the one to use where neither a trace nor an output was given.
        """
        if not hasattr(x, "ndim"):
            got = type(x).__name__
            raise TypeError(f"adapt: x: expected a NumPy array or a torch tensor, got {got}")
        rows = x.shape[0] if x.ndim == 2 else 1
        if len(self.quality) not in (1, rows):
            raise ValueError(
                f"Feedback.from_quality: q: expected 1 or {rows} numbers, as x has rows,"
                f" got {len(self.quality)}"
            )
        if not rows:
            return None, ops.NO_ROWS
        direction, why = self._direction(lora, x, module, self.trace or trace)
        if direction is None:
            return None, why
        if baseline is None:
            return None, FIRST_QUALITY
        advantage = self.quality - baseline
        if not advantage.any():
            return None, AS_EXPECTED
        return direction * -_like(advantage, direction), ""

    def _direction(
        self, lora: MicroLoRA, x: Any, module: str, trace: Trace | None
    ) -> tuple[Any, str]:
        """Where a better quality than usual moves the output to, or None and why."""
        if self.output is not None:
            gap = self._gap("from_quality", "output", self.output, _served(lora, x, module))
            length = (gap * gap).sum(-1) ** 0.5
            if not bool((length > 0).any()):
                return None, NO_DISTANCE
            return gap / (length + (length == 0))[..., None], ""
        if trace is None:
            return None, NO_DIRECTION
        if trace.module != module:
            raise ValueError(
                f"Feedback.from_quality: trace: expected one of {module}, got {trace.module}"
            )
        want = (*x.shape[:-1], lora.config.shape(module)[1])
        if tuple(trace.noise.shape) != want:
            raise ValueError(
                f"Feedback.from_quality: trace: expected one of a forward with {want} out,"
                f" got {tuple(trace.noise.shape)}"
            )
        return trace.noise / trace.sigma, ""

    def _gap(self, made_by: str, name: str, value: Any, delta: Any) -> Any:
        """value - (base + delta)."""
        for argument, given in ((name, value), ("base", self.base)):
            if given is not None:
                _check_like(f"Feedback.{made_by}: {argument}: expected", given, delta)
        return value - delta if self.base is None else value - (delta + self.base)


def _served(lora: MicroLoRA, x: Any, module: str) -> Any:
    return lora.forward(x.detach() if hasattr(x, "detach") else x, module)


def _like(advantage: np.ndarray, direction: Any) -> Any:
    """[n] or [1], as the direction's kind and dtype, to be multiplied with its rows."""
    if isinstance(direction, np.ndarray):
        column: Any = advantage.astype(direction.dtype)
    else:
        import torch

        column = torch.from_numpy(advantage).to(direction.dtype)
    return column[:, None] if direction.ndim == 2 else column


def _check_like(where: str, value: Any, delta: Any) -> None:
    """Raises unless the value is data of the delta's kind, dtype and shape."""
    if not hasattr(value, "dtype") or hasattr(value, "detach") != hasattr(delta, "detach"):
        kind = "a torch tensor" if hasattr(delta, "detach") else "a NumPy array"
        raise TypeError(f"{where} {kind}, as x is, got {type(value).__name__}")
    if value.dtype != delta.dtype:
        raise TypeError(f"{where} {delta.dtype}, the dtype of x, got {value.dtype}")
    if value.shape != delta.shape:
        raise ValueError(f"{where} shape {tuple(delta.shape)}, got {tuple(value.shape)}")
    if getattr(value, "requires_grad", False):
        raise ValueError(f"{where} a tensor outside autograd, got one that requires grad")
