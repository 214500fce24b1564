"""Right or not: outputs against lora_engine.reference, in the error measure of the design.

‖out - ref‖ <= tol ‖ |s||x||A|ᵀ|B|ᵀ + |y| ‖, tol 1e-6 for float32; the magnitude of
a step is likewise the step taken with absolute values. Peers are held to the same.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from bench.inputs import Inputs
from lora_engine import reference
from lora_engine.reference import Adapter
from lora_engine.reference_ewc import delta_step

F64 = NDArray[np.float64]
TOLERANCE = 1e-6


class Expected(NamedTuple):
    """Reference values, and the magnitudes that the error is measured by."""

    values: F64
    magnitude: F64
    tolerance: float = TOLERANCE


def require(what: str, got: Any, expected: Expected) -> None:
    """Raises AssertionError where ``got`` (array or tensor) is not as expected."""
    values = np.asarray(got, dtype=np.float64).reshape(expected.values.shape)
    error = np.linalg.norm(values - expected.values) / np.linalg.norm(expected.magnitude)
    if not error <= expected.tolerance:
        raise AssertionError(
            f"{what}: wrong, so not timed: error {error:.2g}, allowed {expected.tolerance:g}"
        )


def delta(data: Inputs, accumulate: bool) -> Expected:
    """The rows' deltas [n, out], added to y where ``accumulate``."""

    def forward(x: Any, A: Any, B: Any, y: Any) -> F64:
        adapters = {i: Adapter([A[i]], [B[i]], data.scaling) for i in range(len(A))}
        total = reference.batched_lora_delta(x, adapters, [data.features], data.ids)
        return total + y if accumulate else total

    return Expected(
        forward(data.x, data.A, data.B, data.y),
        forward(abs(data.x), abs(data.A), abs(data.B), abs(data.y)),
    )


class Penalty(NamedTuple):
    """EWC's part of a step, slot by slot: Fisher information and anchors.

    first and second: shaped like A and B, in the delta form u [out] and v [in].
    """

    ewc_lambda: float
    form: str
    first: Any
    second: Any
    anchor_A: Any
    anchor_B: Any


def _step(data: Inputs, row: int, sign: float, lr: float, penalty: Penalty | None) -> Adapter:
    """One row's adapter after a step; with sign -1, the step's magnitude.

    In the delta form that of the plain step: the penalty only draws back from it.
    """
    use = abs if sign < 0 else np.asarray
    slot = int(data.ids[row])
    adapter = Adapter([use(data.A[slot])], [use(data.B[slot])], data.scaling)
    x, grad = use(data.x[row : row + 1]), use(data.grad[row : row + 1])
    gA, gB = reference.slot_gradients(x, grad, adapter, [data.features], slot, [slot])
    fisher = anchor = None
    step = reference.Step(lr=lr, ewc_lambda=penalty.ewc_lambda if penalty else 0.0)
    if penalty and (penalty.form == "factor" or sign > 0):
        fisher = ([penalty.first[slot]], [penalty.second[slot]])
        at = [use(penalty.anchor_A[slot])], [use(penalty.anchor_B[slot])]
        anchor = Adapter(*at, data.scaling)
    if penalty and anchor and penalty.form == "delta":
        made = delta_step(adapter, gA, gB, step, fisher, anchor)
        assert made is not None
        return made
    after = reference.step_adapter(adapter, [sign * gA[0]], [sign * gB[0]], step, fisher, anchor)
    assert after is not None
    return after


def step(data: Inputs, lr: float, penalty: Penalty | None = None) -> tuple[Expected, Expected]:
    """A [n, r, in] and B [n, out, r] after one step."""
    order = np.argsort(data.ids)
    values = [_step(data, int(row), 1.0, lr, penalty) for row in order]
    magnitudes = [_step(data, int(row), -1.0, lr, penalty) for row in order]
    return (
        Expected(np.stack([a.A[0] for a in values]), np.stack([a.A[0] for a in magnitudes])),
        Expected(np.stack([a.B[0] for a in values]), np.stack([a.B[0] for a in magnitudes])),
    )
