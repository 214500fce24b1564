"""NumPy arrays and torch tensors in and out of the reference backend."""

from __future__ import annotations

from typing import Any

import numpy as np


def _read(array: Any) -> np.ndarray:
    """float64 of a NumPy array or torch tensor (bfloat16 included)."""
    if hasattr(array, "detach"):
        array = array.detach().double().numpy()
    return np.asarray(array, dtype=np.float64)


def _rows(array: Any) -> np.ndarray:
    values = _read(array)
    return values[None] if values.ndim == 1 else values


def _write(out: Any, values: np.ndarray) -> None:
    if hasattr(out, "detach"):
        import torch

        out.copy_(torch.from_numpy(np.ascontiguousarray(values)).reshape(out.shape))
    else:
        out[...] = values.reshape(out.shape)


def _result(x: Any, out: Any, delta: np.ndarray, accumulate: bool) -> Any:
    if out is None:
        shape = (delta.shape[1],) if x.ndim == 1 else delta.shape
        out = x.new_empty(shape) if hasattr(x, "detach") else np.empty(shape, dtype=x.dtype)
        accumulate = False
    if accumulate:
        delta = delta + _rows(out)
    _write(out, delta)
    return out
