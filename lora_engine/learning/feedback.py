"""Feedback: what is known of an output after it was served, as a gradient."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from lora_engine.adapters.micro_lora import MicroLoRA


_new = tuple.__new__  # a third of the cost of the class's own constructor


class Feedback(NamedTuple):
    """Made by ``from_gradient`` or ``from_target``."""

    gradient: Any = None
    target: Any = None
    base: Any = None
    weight: float = 1.0

    @classmethod
    def from_gradient(cls, gradient: Any) -> Feedback:
        """gradient = dL/dy [out] or [n, out], exact."""
        return _new(cls, (gradient, None, None, 1.0))

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

    def output_gradient(self, lora: MicroLoRA, x: Any, module: str) -> Any:
        """dL/dy, shaped like the delta of x (of ``from_gradient``: as given)."""
        if self.gradient is not None:
            return self.gradient
        if self.target is None:
            raise ValueError("Feedback: expected one of from_gradient or from_target, got none")
        delta = lora.forward(x.detach() if hasattr(x, "detach") else x, module)
        for name, value in (("y", self.target), ("base", self.base)):
            if value is not None:
                _check_like(name, value, delta)
        gap = delta - self.target if self.base is None else delta + self.base - self.target
        return gap * self.weight


def _check_like(name: str, value: Any, delta: Any) -> None:
    """Raises unless the value is data of the delta's kind, dtype and shape."""
    where = f"Feedback.from_target: {name}: expected"
    if not hasattr(value, "dtype") or hasattr(value, "detach") != hasattr(delta, "detach"):
        kind = "a torch tensor" if hasattr(delta, "detach") else "a NumPy array"
        raise TypeError(f"{where} {kind}, as x is, got {type(value).__name__}")
    if value.dtype != delta.dtype:
        raise TypeError(f"{where} {delta.dtype}, the dtype of x, got {value.dtype}")
    if value.shape != delta.shape:
        raise ValueError(f"{where} shape {tuple(delta.shape)}, got {tuple(value.shape)}")
    if getattr(value, "requires_grad", False):
        raise ValueError(f"{where} a tensor outside autograd, got one that requires grad")
