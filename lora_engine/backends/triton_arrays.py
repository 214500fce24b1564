"""Arguments of the Triton backend: what is given becomes checked tensors on one device.

Under Triton's interpreter the device is the CPU, and NumPy arrays are taken too.
"""

from __future__ import annotations

from numbers import Real
from typing import Any, NamedTuple

import numpy as np
import torch

from lora_engine.kernels.launch import FLOATS, INTERPRETED, device_of

NAMES = {dtype: str(dtype).removeprefix("torch.") for dtype in FLOATS}
DTYPES = {name: dtype for dtype, name in NAMES.items()}
_ANY_FLOAT = "float32, bfloat16 or float16"


def refuse(kind: type[Exception], op: str, name: str, expected: str, got: Any) -> Exception:
    return kind(f"{op}: {name}: expected {expected}, got {got}")


def tensor(op: str, name: str, array: Any) -> torch.Tensor:
    """The tensor itself, or a NumPy array's memory as one; on a device the kernels run on."""
    if isinstance(array, torch.Tensor):
        if array.requires_grad and torch.is_grad_enabled():
            raise refuse(
                ValueError, op, name, "a tensor outside autograd",
                "one that requires grad: wrap the call in torch.no_grad() or pass tensor.detach()",
            )  # fmt: skip
        if array.layout != torch.strided:
            raise refuse(TypeError, op, name, "a dense tensor", array.layout)
        wanted = "cpu" if INTERPRETED else "cuda"
        if array.device.type != wanted:
            why = ", as the interpreter runs there" if INTERPRETED else ""
            raise refuse(
                ValueError, op, name, f"a tensor on {wanted}{why}", f"one on {array.device}"
            )
        device_of(array.device.index)  # or RuntimeError
        _check_memory(op, name, array)
        return array.detach() if array.requires_grad else array
    if not isinstance(array, np.ndarray):
        got = type(array).__name__
        raise refuse(TypeError, op, name, "a NumPy array or a torch tensor", got)
    if not INTERPRETED:
        raise refuse(ValueError, op, name, "a tensor on cuda", "a NumPy array")
    return _borrowed(op, name, array)


def _check_memory(op: str, name: str, array: torch.Tensor) -> None:
    """Refuses tensors whose memory is not there, or does not hold their values."""
    try:
        there = bool(array.data_ptr()) or not array.numel()
    except RuntimeError:  # of a fake tensor
        there = False
    if not there:
        raise refuse(ValueError, op, name, "an array with memory", "one without")
    if array.is_neg():
        got = "a tensor with the negative bit set: pass tensor.resolve_neg()"
        raise refuse(ValueError, op, name, "plain memory", got)


def _shareable(array: np.ndarray) -> bool:
    """Whether torch can take the memory as it is."""
    strides = all(s >= 0 and not s % array.itemsize for s in array.strides)
    return strides and array.flags.writeable and array.flags.aligned


def _borrowed(op: str, name: str, array: np.ndarray) -> torch.Tensor:
    """A NumPy array's memory as a tensor; where torch cannot share it, a copy."""
    if isinstance(array, np.ma.MaskedArray):
        raise refuse(TypeError, op, name, "a plain array", "a masked one")
    if not array.dtype.isnative:
        raise refuse(ValueError, op, name, "native byte order", array.dtype)
    try:
        return torch.from_numpy(array if _shareable(array) else array.copy())
    except TypeError:
        raise refuse(TypeError, op, name, _ANY_FLOAT, array.dtype) from None


def check_dtype(
    op: str, name: str, got: torch.dtype, expected: torch.dtype, because: str = ""
) -> None:
    if got != expected:
        text = str(expected).removeprefix("torch.") + because
        raise refuse(TypeError, op, name, text, str(got).removeprefix("torch."))


def check_float(op: str, name: str, got: torch.dtype) -> None:
    if got not in FLOATS:
        raise refuse(TypeError, op, name, _ANY_FLOAT, str(got).removeprefix("torch."))


def check_device(op: str, name: str, got: torch.Tensor, like: torch.Tensor, of: str) -> None:
    if got.device != like.device:
        raise refuse(ValueError, op, name, f"a tensor on {like.device}, where {of} is", got.device)


_LARGEST = float(np.finfo(np.float32).max)


def check_finite(op: str, name: str, value: Any) -> None:
    """Of numbers that kernels take as float32."""
    if not isinstance(value, Real):
        raise refuse(TypeError, op, name, "a number", type(value).__name__)
    if not abs(float(value)) <= _LARGEST:
        raise refuse(ValueError, op, name, "a finite number", value)


def check_shape(op: str, name: str, got: torch.Tensor, rows: int | None, cols: int | None) -> None:
    """Of a matrix; None: any."""
    if got.ndim != 2 or rows not in (None, got.shape[0]) or cols not in (None, got.shape[1]):
        want = f"[{'n' if rows is None else rows}, {'any' if cols is None else cols}]"
        raise refuse(ValueError, op, name, f"shape {want}", list(got.shape))


def matrix(
    op: str,
    name: str,
    array: Any,
    rows: int | None = None,
    cols: int | None = None,
    like: torch.Tensor | None = None,
    of: str = "x",
) -> torch.Tensor:
    """A checked float matrix, a vector being one row, on the device of ``like``, argument of."""
    given = tensor(op, name, array)
    check_float(op, name, given.dtype)
    given = given.unsqueeze(0) if given.ndim == 1 else given
    check_shape(op, name, given, rows, cols)
    if like is not None:
        check_device(op, name, given, like, of)
    return given


class Extent(NamedTuple):
    """Where a tensor lies: first byte, end, and bytes from row to row of a matrix."""

    low: int
    high: int
    row: int


def _extent(t: torch.Tensor) -> Extent:
    size = t.element_size()
    last = sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True))
    row = t.stride(0) * size if t.ndim == 2 else 0
    return Extent(t.data_ptr(), t.data_ptr() + (last + 1) * size, row)


def _columns_of_one_matrix(a: torch.Tensor, b: torch.Tensor, ea: Extent, eb: Extent) -> bool:
    """Whether both run over the rows of one matrix, in columns of their own."""
    if ea.row != eb.row or not ea.row or a.stride(1) != 1 or b.stride(1) != 1:
        return False
    width_a, width_b = a.shape[1] * a.element_size(), b.shape[1] * b.element_size()
    gap = (eb.low - ea.low) % ea.row
    return gap >= width_a and gap + width_b <= ea.row


def check_overlap(op: str, name: str, out: torch.Tensor, other_name: str, other: Any) -> None:
    """Refuses an output that shares memory with an input (None: there is none)."""
    if other is None or not out.numel() or not other.numel() or out.device != other.device:
        return
    a, b = _extent(out), _extent(other)
    if a.high <= b.low or b.high <= a.low or _columns_of_one_matrix(out, other, a, b):
        return
    raise refuse(ValueError, op, name, "memory of its own", f"memory shared with {other_name}")


def check_output(op: str, name: str, given: Any, out: torch.Tensor) -> None:
    """Refuses what cannot be written, or holds one element at two places of the result."""
    if isinstance(given, np.ndarray):
        if not given.flags.writeable:
            raise refuse(ValueError, op, name, "a writable array", "a read-only one")
        if not _shareable(given):
            got = f"strides {given.strides} at {given.ctypes.data % given.itemsize} bytes past one"
            raise refuse(ValueError, op, name, "whole elements, forward in memory", got)
    if not out.numel():
        return
    sizes = sorted((s, n) for n, s in zip(out.shape, out.stride(), strict=True) if n > 1)
    reach = 1
    for stride, n in sizes:
        if stride < reach:
            strides = list(out.stride())
            raise refuse(ValueError, op, name, "each element at its own address", strides)
        reach = (n - 1) * stride + reach


class Output(NamedTuple):
    """rows [n, cols] to write, and what the caller gets back."""

    rows: torch.Tensor
    result: Any


def output(op: str, x: Any, rows: torch.Tensor, out: Any, cols: int) -> Output:
    """The checked ``out``, or a new one of x's kind, dtype and number of dimensions."""
    if out is None:
        made = torch.empty((rows.shape[0], cols), dtype=rows.dtype, device=rows.device)
        result = made[0] if x.ndim == 1 else made
        return Output(made, result if isinstance(x, torch.Tensor) else result.numpy())
    to = matrix(op, "out", out, rows.shape[0], cols, rows)
    check_dtype(op, "out", to.dtype, rows.dtype, ", the dtype of x")
    check_output(op, "out", out, to)
    check_overlap(op, "out", to, "x", rows)
    return Output(to, out)


class Ids(NamedTuple):
    """Slots of each row [n, k] int32, and their weights [n, k] float32 or None."""

    slots: torch.Tensor
    weights: torch.Tensor | None


def ids_and_weights(op: str, ids: Any, weights: Any, x: torch.Tensor) -> Ids:
    slots = tensor(op, "ids", ids)
    check_dtype(op, "ids", slots.dtype, torch.int32)
    check_device(op, "ids", slots, x, "x")
    if slots.ndim not in (1, 2) or slots.shape[0] != x.shape[0]:
        want = f"one a row of x, [{x.shape[0]}] or [{x.shape[0]}, k]"
        raise refuse(ValueError, op, "ids", want, f"shape {list(slots.shape)}")
    w = None
    if weights is not None:
        w = tensor(op, "weights", weights)
        check_dtype(op, "weights", w.dtype, torch.float32)
        check_device(op, "weights", w, x, "x")
        if w.shape != slots.shape:
            raise refuse(
                ValueError, op, "weights", f"the shape of ids, {list(slots.shape)}", list(w.shape)
            )
        w = w.unsqueeze(1) if w.ndim == 1 else w
    return Ids(slots.unsqueeze(1) if slots.ndim == 1 else slots, w)
