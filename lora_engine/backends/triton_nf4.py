"""The NF4 ops of ``lora_engine._C`` as Triton kernels."""

from __future__ import annotations

import contextlib
from typing import Any

import numpy as np
import torch

from lora_engine import reference
from lora_engine.backends.triton_arrays import (
    check_device,
    check_float,
    check_output,
    check_overlap,
    check_shape,
    matrix,
    output,
    refuse,
    tensor,
)
from lora_engine.backends.triton_pool import Pool, pool_device
from lora_engine.kernels import nf4 as _nf4
from lora_engine.kernels import nf4_linear as _linear
from lora_engine.kernels.launch import INTERPRETED
from lora_engine.kernels.nf4 import Packed

_MOST = 1 << 36  # elements: blocks are then counted in 31 bits


def _part(name: str, array: Any, dtype: type, size: int) -> np.ndarray:
    """A checked part of a packed matrix."""
    if not isinstance(array, np.ndarray) or array.dtype != dtype:
        got = getattr(array, "dtype", type(array).__name__)
        raise refuse(TypeError, "Nf4", name, str(np.dtype(dtype)), got)
    if array.size != size:
        raise refuse(ValueError, "Nf4", name, f"{size} elements", array.size)
    if not array.flags.c_contiguous:
        raise refuse(ValueError, "Nf4", name, "contiguous memory", f"strides {array.strides}")
    return array.reshape(-1)


def _log2(name: str, value: int, least: int, most: int) -> int:
    if value not in (1 << i for i in range(least, most + 1)):
        want = f"a power of two from {1 << least} to {1 << most}"
        raise refuse(ValueError, "Nf4", name, want, value)
    return value.bit_length() - 1


def _shared(array: np.ndarray) -> torch.Tensor:
    """Its memory as a tensor, or a copy where torch could write to what is read-only."""
    return torch.from_numpy(array if array.flags.writeable else array.copy())


class Nf4:
    """As ``_C.Nf4``: borrows the arrays of a packed matrix, and holds a copy on each device
    where it was used."""

    def __init__(
        self,
        packed: Any,
        rows: int,
        cols: int,
        blocksize: int,
        absmax: Any,
        nested_absmax: Any = None,
        nested_map: Any = None,
        nested_blocksize: int = 0,
        nested_offset: float = 0.0,
    ) -> None:
        if rows < 1 or cols < 1 or rows > _MOST // cols:
            want = "rows and cols from 1, 2^36 elements at most"
            raise refuse(ValueError, "Nf4", "shape", want, [rows, cols])
        self.rows, self.cols = rows, cols
        self._shift = _log2("blocksize", blocksize, 5, 12)
        blocks = -(-rows * cols // blocksize)
        self._packed = _part("packed", packed, np.uint8, (rows * cols + 1) // 2)
        self._nested, self._offset = -1, 0.0
        self._steps: np.ndarray | None = None
        self._map = np.zeros(256, np.float32)
        if nested_map is None:
            self._scales = _part("absmax", absmax, np.float32, blocks)
        else:
            self._nested = _log2("nested_blocksize", nested_blocksize, 0, 30)
            self._offset = float(np.float32(nested_offset))
            self._steps = _part("absmax", absmax, np.uint8, blocks)
            count = -(-blocks // nested_blocksize)
            self._scales = _part("nested_absmax", nested_absmax, np.float32, count)
            self._map = _part("nested_map", nested_map, np.float32, 256)
        self._on: dict[torch.device, Packed] = {}

    def on(self, device: torch.device) -> Packed:
        """The matrix on that device: copied there at first use."""
        held = self._on.get(device)
        if held is None:
            codes = _shared(self._packed).to(device)
            table = np.concatenate([reference.NF4_CODES, self._map])
            held = self._on[device] = Packed(
                codes,
                _shared(self._scales).to(device),
                codes if self._steps is None else _shared(self._steps).to(device),
                torch.from_numpy(table).to(device),
                self.rows, self.cols, self._shift, self._nested, self._offset,
            )  # fmt: skip
        return held


def _on_device(op: str, name: str, array: Any) -> torch.Tensor:
    """The tensor, or a copy on the default device of what is in the host's memory."""
    if INTERPRETED or (isinstance(array, torch.Tensor) and array.is_cuda):
        return tensor(op, name, array)
    if isinstance(array, torch.Tensor):
        return array.to(pool_device(None))
    if not isinstance(array, np.ndarray):
        got = type(array).__name__
        raise refuse(TypeError, op, name, "a NumPy array or a torch tensor", got)
    return torch.from_numpy(np.ascontiguousarray(array)).to(pool_device(None))


def nf4_encode(W: Any, blocksize: int) -> tuple[np.ndarray, np.ndarray]:
    op = "nf4_quantize"
    dtype = str(getattr(W, "dtype", type(W).__name__)).removeprefix("torch.")
    if dtype not in ("float32", "bfloat16", "float16"):
        raise refuse(TypeError, op, "W", "float32, bfloat16 or float16", dtype)
    w = _on_device(op, "W", W)
    check_shape(op, "W", w, None, None)
    if not bool(torch.isfinite(w).all()):
        raise refuse(ValueError, op, "W", "finite numbers", "NaN or Inf")
    packed = torch.empty((w.numel() + 1) // 2, dtype=torch.uint8, device=w.device)
    blocks = -(-w.numel() // blocksize)
    absmax = torch.empty(blocks, dtype=torch.float32, device=w.device)
    _nf4.quantise(w, blocksize, packed, absmax)
    return packed.cpu().numpy(), absmax.cpu().numpy()


def nf4_decode(w: Nf4, out: Any) -> None:
    op = "nf4_dequantize"
    host = not INTERPRETED and not (isinstance(out, torch.Tensor) and out.is_cuda)
    to = _host(op, out) if host else tensor(op, "out", out)
    check_float(op, "out", to.dtype)
    check_shape(op, "out", to, w.rows, w.cols)
    check_output(op, "out", out, to)
    there = torch.empty_like(to, device=pool_device(None)) if host else to
    packed = w.on(there.device)
    check_overlap(op, "out", there, "w", packed.codes)
    quiet = np.errstate(over="ignore") if INTERPRETED else contextlib.nullcontext()
    with quiet:  # float16 ends at 65504
        _nf4.dequantise(packed, there)
    if host:
        to.copy_(there)


def _host(op: str, out: Any) -> torch.Tensor:
    """An array in the host's memory as a tensor that shares it."""
    if isinstance(out, torch.Tensor):
        return out
    if not isinstance(out, np.ndarray):
        got = type(out).__name__
        raise refuse(TypeError, op, "out", "a NumPy array or a torch tensor", got)
    if any(s < 0 for s in out.strides):
        raise refuse(ValueError, op, "out", "strides that torch can take", out.strides)
    return torch.from_numpy(out)


def _packed(op: str, w: Any, x: torch.Tensor) -> Packed:
    if not isinstance(w, Nf4):
        got = type(w).__name__
        raise refuse(TypeError, op, "w", "a matrix packed by the triton backend", got)
    return w.on(x.device)


def _bias(op: str, bias: Any, rows: int, x: torch.Tensor) -> torch.Tensor | None:
    if bias is None:
        return None
    given = tensor(op, "bias", bias)
    check_float(op, "bias", given.dtype)
    given = given[0] if given.ndim == 2 and given.shape[0] == 1 else given
    if given.shape != (rows,):
        raise refuse(ValueError, op, "bias", f"shape [out] = [{rows}]", list(given.shape))
    check_device(op, "bias", given, x, "x")
    return given


def nf4_linear(
    x: Any, w: Nf4, bias: Any, pool: Any, ids: Any, weights: Any, out: Any, compute: str | None
) -> Any:
    op = "nf4_linear"
    if compute not in (None, "float32", "bfloat16"):
        raise refuse(ValueError, op, "compute", "float32, bfloat16 or None", compute)
    rows = matrix(op, "x", x, None, w.cols)
    packed = _packed(op, w, rows)
    to = output(op, x, rows, out, w.rows)
    b = _bias(op, bias, w.rows, rows)
    for name, other in (("w", packed.codes), ("bias", b)):
        check_overlap(op, "out", to.rows, name, other)
    if pool is None:
        _linear.nf4_linear(rows, packed, _linear.Target(to.rows, b), compute)
        return to.result
    if not isinstance(pool, Pool):
        want = f"a pool on {rows.device}, where x is"
        raise refuse(ValueError, op, "pool", want, "one of another backend")
    sizes = [pool.in_features, sum(pool.outs)]
    if sizes != [w.cols, w.rows]:
        raise refuse(ValueError, op, "pool", f"one of [in, out] = {[w.cols, w.rows]}", sizes)
    with pool.lock:
        pool.raise_bad_id()
        batch = pool.batch(op, ids, weights, rows, False)
        for name, other in (("ids", batch.ids), ("weights", batch.weights)):
            check_overlap(op, "out", to.rows, name, other)
        _linear.nf4_linear(rows, packed, _linear.Target(to.rows, b, batch), compute)
    return to.result


def nf4_linear_backward(grad: Any, w: Nf4, out: Any) -> Any:
    op = "nf4_linear"
    rows = matrix(op, "grad", grad, None, w.rows)
    packed = _packed(op, w, rows)
    to = output(op, grad, rows, out, w.cols)
    check_overlap(op, "out", to.rows, "w", packed.codes)
    _linear.nf4_linear_backward(rows, packed, to.rows)
    return to.result
