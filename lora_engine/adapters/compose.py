"""Composing adapters: one after another, or side by side."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from lora_engine.adapters.micro_lora import MicroLoRA

Composed = Callable[[Any, str], Any]


def _check(op: str, adapters: Sequence[Any], x: Any = None, module: str | None = None) -> None:
    if not adapters:
        raise ValueError(f"{op}: adapters: expected at least one, got none")
    for i, lora in enumerate(adapters):
        if not isinstance(lora, MicroLoRA):
            raise TypeError(f"{op}: adapters[{i}]: expected a MicroLoRA, got {type(lora).__name__}")


def _check_shapes(op: str, adapters: Sequence[MicroLoRA], module: str, square: bool) -> None:
    shapes = []
    for i, lora in enumerate(adapters):
        if module not in lora.config.target_modules:
            known = ", ".join(lora.config.target_modules)
            raise ValueError(
                f"{op}: module: expected one of {known} (adapters[{i}]), got {module!r}"
            )
        shapes.append(lora.config.shape(module))
    for i, (d_in, d_out) in enumerate(shapes):
        want = (shapes[0][0],) * 2 if square else shapes[0]
        if (d_in, d_out) != want:
            raise ValueError(
                f"{op}: adapters[{i}]: {module}: expected (in, out) = {want}, got {(d_in, d_out)}"
            )


def compose_sequential(adapters: Sequence[MicroLoRA]) -> Composed:
    """f(x, module): x <- x + delta_i(x) for each adapter in turn; returns the last x.

    x [in] or [n, in], NumPy or torch, is not changed; modules must map a size to itself. An
    adapter sees what those before it made of x: order matters. Raises ValueError, TypeError.
    """
    op, loras = "compose_sequential", tuple(adapters)
    _check(op, loras)

    def composed(x: Any, module: str) -> Any:
        _check_shapes(op, loras, module, square=True)
        for lora in loras:
            x = x + lora.forward(x, module)
        return x

    return composed


def compose_parallel(adapters: Sequence[MicroLoRA]) -> Composed:
    """f(x, module): the mean of the deltas, 1/n sum_i delta_i(x), [out] or [n, out].

    x [in] or [n, in], NumPy or torch. Raises ValueError (no adapters, a module that one lacks,
    shapes that differ), TypeError.
    """
    op, loras = "compose_parallel", tuple(adapters)
    _check(op, loras)

    def composed(x: Any, module: str) -> Any:
        _check_shapes(op, loras, module, square=False)
        total = loras[0].forward(x, module)
        for lora in loras[1:]:
            total = total + lora.forward(x, module)
        return total / len(loras)

    return composed
