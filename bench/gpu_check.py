"""Right or not, on the device: ‖out - ref‖ <= tol ‖magnitude‖, in float64, as the tests have it."""

from __future__ import annotations

from typing import Any

import torch

TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 1e-3}
STORED = {torch.float32: 2e-6, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}


def require(what: str, got: Any, want: Any, magnitude: Any, tolerance: float) -> None:
    """Raises AssertionError unless ``got`` is as wanted; NaN never is."""
    error = (got.double() - want).norm() / magnitude.double().norm()
    if not bool(error <= tolerance):
        raise AssertionError(
            f"{what}: wrong, so not timed: error {float(error):.2g}, allowed {tolerance:g}"
        )


def delta(x: Any, A: Any, B: Any, ids: Any, scaling: float) -> Any:
    """s B[id] (A[id] x) of each row, float64; A [slots, r, in], B [slots, out, r]."""
    y = torch.zeros(len(x), B.shape[1], dtype=torch.float64, device=x.device)
    for slot in ids.unique().tolist():
        rows = ids == slot
        y[rows] = scaling * (x[rows].double() @ A[slot].double().T) @ B[slot].double().T
    return y


def step(x: Any, grad: Any, A: Any, B: Any, scaling: float, lr: float) -> tuple[Any, Any]:
    """A [r, in] and B [out, r] after a step with the mean over rows, float64."""
    x, grad, A, B = x.double(), grad.double(), A.double(), B.double()
    share = scaling * lr / len(x)
    return A - share * (grad @ B).T @ x, B - share * grad.T @ (x @ A.T)
