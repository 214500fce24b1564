"""Feedback: what is known of an output after it was served, as a gradient."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from lora_engine.adapters.micro_lora import MicroLoRA


class Feedback(NamedTuple):
    """Made by ``from_gradient`` or ``from_target``."""

    gradient: Any = None
    target: Any = None
    base: Any = None
    weight: float = 1.0

    @classmethod
    def from_gradient(cls, gradient: Any) -> Feedback:
        """gradient = dL/dy [out] or [n, out], exact."""
        return cls(gradient)

    @classmethod
    def from_target(cls, y: Any, base: Any = None, weight: float = 1.0) -> Feedback:
        """L = weight/2 ‖base + delta - y‖², summed over features; y and base shaped like delta.

        base: what the frozen module put out; None counts as zeros. Raises
        ValueError for a weight that is negative or not finite.
        """
        if not (np.isfinite(weight) and weight >= 0):
            raise ValueError(f"Feedback.from_target: weight: expected 0 or more, got {weight}")
        return cls(None, y, base, weight)

    def output_gradient(self, lora: MicroLoRA, x: Any, module: str) -> Any:
        """dL/dy, shaped like the delta of x."""
        if self.gradient is not None:
            return self.gradient
        if self.target is None:
            raise ValueError("Feedback: expected one made by from_gradient or from_target, got none")
        delta = lora.forward(x.detach() if hasattr(x, "detach") else x, module)
        for name, value in (("y", self.target), ("base", self.base)):
            if value is not None and tuple(value.shape) != tuple(delta.shape):
                raise ValueError(
                    f"Feedback.from_target: {name}: expected shape {tuple(delta.shape)},"
                    f" got {tuple(value.shape)}"
                )
        gap = delta - self.target if self.base is None else delta + self.base - self.target
        return gap * self.weight
