"""The NF4 ops of ``lora_engine._C`` on top of reference.py."""

from __future__ import annotations

from typing import Any

import numpy as np

from lora_engine import reference
from lora_engine.backends.reference_arrays import _read, _result, _rows, _write

_FLOATS = ("float32", "bfloat16", "float16")


def _check_float(op: str, name: str, array: Any) -> None:
    dtype = str(getattr(array, "dtype", type(array).__name__)).removeprefix("torch.")
    if dtype not in _FLOATS:
        raise TypeError(f"{op}: {name}: expected one of {', '.join(_FLOATS)}, got {dtype}")


def _check_shape(op: str, name: str, array: Any, shape: tuple[int, ...]) -> None:
    if tuple(array.shape) != shape:
        raise ValueError(f"{op}: {name}: expected shape {shape}, got {tuple(array.shape)}")


def _check_array(name: str, array: Any, dtype: type, size: int) -> None:
    if not isinstance(array, np.ndarray) or array.dtype != dtype:
        got = getattr(array, "dtype", type(array).__name__)
        raise TypeError(f"Nf4: {name}: expected {np.dtype(dtype)}, got {got}")
    _check_shape("Nf4", name, array, (size,))


class Nf4:
    """As ``_C.Nf4``: borrows the arrays of a packed matrix."""

    def __init__(
        self,
        packed: Any,
        rows: int,
        cols: int,
        blocksize: int,
        absmax: Any,
        nested_absmax: Any,
        nested_map: Any,
        nested_blocksize: int,
        nested_offset: float,
    ) -> None:
        blocks = -(-rows * cols // blocksize)
        _check_array("packed", packed, np.uint8, (rows * cols + 1) // 2)
        _check_array("absmax", absmax, np.float32 if nested_absmax is None else np.uint8, blocks)
        if nested_absmax is not None:
            count = -(-blocks // nested_blocksize)
            _check_array("nested_absmax", nested_absmax, np.float32, count)
            _check_array("nested_map", nested_map, np.float32, 256)
        self.rows, self.cols = rows, cols
        self._packed, self._blocksize, self._absmax = packed, blocksize, absmax
        self._nested = (nested_absmax, nested_map, nested_blocksize, nested_offset)

    def decoded(self) -> np.ndarray:
        absmax = self._absmax
        if self._nested[0] is not None:
            absmax = reference.double_dequantize(absmax, *self._nested)
        return reference.nf4_dequantize(self._packed, self.rows, self.cols, self._blocksize, absmax)


def nf4_encode(W: Any, blocksize: int) -> tuple[np.ndarray, np.ndarray]:
    _check_float("nf4_quantize", "W", W)
    if W.ndim != 2:
        raise ValueError(f"nf4_quantize: W: expected a matrix, got {W.ndim} dimensions")
    values = _read(W)
    if not np.isfinite(values).all():
        raise ValueError("nf4_quantize: W: expected finite numbers, got NaN or Inf")
    return reference.nf4_quantize(values, blocksize)


def nf4_decode(w: Nf4, out: Any) -> None:
    _check_float("nf4_dequantize", "out", out)
    _check_shape("nf4_dequantize", "out", out, (w.rows, w.cols))
    with np.errstate(over="ignore"):  # float16 ends at 65504
        _write(out, w.decoded())


def nf4_linear(
    x: Any, w: Nf4, bias: Any, pool: Any, ids: Any, weights: Any, out: Any, compute: Any
) -> Any:
    # Whatever the products are allowed to be rounded to, float64 is within it.
    if compute not in (None, "float32", "bfloat16"):
        raise ValueError(f"nf4_linear: compute: expected float32, bfloat16 or None, got {compute}")
    _check_float("nf4_linear", "x", x)
    rows = _rows(x)
    _check_shape("nf4_linear", "x", rows, (len(rows), w.cols))
    if bias is not None:
        _check_shape("nf4_linear", "bias", bias, (w.rows,))
    y = reference.nf4_linear(rows, w.decoded(), None if bias is None else _read(bias))
    if pool is not None:
        sizes = (pool.in_features, sum(pool.outs))
        if sizes != (w.cols, w.rows):
            raise ValueError(f"nf4_linear: pool: expected sizes {(w.cols, w.rows)}, got {sizes}")
        pool.forward(rows, ids, weights, y, True)
    return _result(x, out, y, False)


def nf4_linear_backward(grad: Any, w: Nf4, out: Any) -> Any:
    _check_float("nf4_linear", "grad", grad)
    rows = _rows(grad)
    _check_shape("nf4_linear", "grad", rows, (len(rows), w.rows))
    return _result(grad, out, rows @ w.decoded(), False)
