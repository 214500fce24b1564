"""Samples and slot ids as arrays on the host."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

_FLOATS = ("float32", "float16", "bfloat16")


def _host(op: str, name: str, array: Any) -> np.ndarray:
    """A NumPy array or tensor of a float dtype, as float32 on the host."""
    if isinstance(array, np.ndarray) and array.dtype == np.float32:
        return array
    if not hasattr(array, "detach") and not isinstance(array, np.ndarray):
        got = type(array).__name__
        raise TypeError(f"{op}: {name}: expected a NumPy array or a torch tensor, got {got}")
    dtype = str(array.dtype).removeprefix("torch.")
    if dtype not in _FLOATS:
        raise TypeError(f"{op}: {name}: expected float32, bfloat16 or float16, got {dtype}")
    if hasattr(array, "detach"):
        values: np.ndarray = array.detach().float().cpu().numpy()
        return values
    as_float32: np.ndarray = array.astype(np.float32, copy=False)
    return as_float32


def rows(
    op: str, name: str, array: Any, width: int, count: int | None = None
) -> NDArray[np.float32]:
    """The rows [n, width] of a matrix or vector."""
    values = _host(op, name, array)
    if values.ndim == 1:
        values = values[None]
    if values.ndim != 2 or values.shape[1] != width or count not in (None, len(values)):
        want = f"[{'n' if count is None else count}, {width}]"
        raise ValueError(f"{op}: {name}: expected shape {want}, got {list(np.shape(array))}")
    return values


def slots(op: str, ids: Any) -> NDArray[np.int64]:
    """Whole numbers from -1 on, of any shape."""
    values = np.asarray(ids.detach().cpu() if hasattr(ids, "detach") else ids)
    if values.dtype.kind not in "iu" and values.size:
        raise TypeError(f"{op}: ids: expected whole numbers, got {values.dtype}")
    found = values.astype(np.int64)
    if (found < -1).any():
        raise IndexError(f"{op}: ids: expected a slot or -1, got {int(found.min())}")
    return found
