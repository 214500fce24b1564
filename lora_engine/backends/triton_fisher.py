"""Ops 5 and 6 of the Triton backend: Fisher information."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from lora_engine.backends.triton_arrays import (
    check_device,
    check_dtype,
    check_finite,
    check_output,
    check_overlap,
    matrix,
    refuse,
    tensor,
)
from lora_engine.kernels import fisher_accumulate as _fisher_accumulate
from lora_engine.kernels import lora_fisher as _lora_fisher
from lora_engine.kernels import lora_fisher_factors as _lora_fisher_factors
from lora_engine.kernels.launch import INTERPRETED


def fisher_accumulate(F: Any, g: Any, gamma: float, scale: float) -> None:
    op = "fisher_accumulate"
    to = matrix(op, "F", F)
    of = matrix(op, "g", g, to.shape[0], to.shape[1], to, "F")
    check_output(op, "F", F, to)
    check_overlap(op, "F", to, "g", of)
    check_finite(op, "gamma", gamma)
    check_finite(op, "scale", scale)
    _fisher_accumulate.fisher_accumulate(to, of, float(gamma), float(scale))


class _Sums(NamedTuple):
    """Two outputs [rows, cols] to write or add to, and what the caller gets back."""

    first: torch.Tensor
    second: torch.Tensor
    result: tuple[Any, Any]


def _sums(
    op: str,
    x: Any,
    rows: torch.Tensor,
    out: Any,
    shapes: Mapping[str, tuple[int, ...]],
    inputs: dict[str, torch.Tensor | None],
) -> _Sums:
    """New float32 ones of x's kind, or the checked pair; ``shapes``: of each, by name."""
    if out is None:
        made = [torch.empty(s, dtype=torch.float32, device=rows.device) for s in shapes.values()]
        given = [t if isinstance(x, torch.Tensor) else t.numpy() for t in made]
        return _Sums(made[0], made[1], (given[0], given[1]))
    names = list(shapes)
    if not isinstance(out, (tuple, list)) or len(out) != 2:
        pair = f"a pair of arrays ({', '.join(names)})"
        raise refuse(TypeError, op, "out", pair, type(out).__name__)
    tensors = []
    for (name, shape), array in zip(shapes.items(), out, strict=True):
        to = tensor(op, name, array)
        if to.dtype not in (torch.float32, torch.float64):
            got = str(to.dtype).removeprefix("torch.")
            raise refuse(TypeError, op, name, "float64 or float32", got)
        if to.shape != shape:
            raise refuse(ValueError, op, name, f"shape {list(shape)}", list(to.shape))
        check_device(op, name, to, rows, "x")
        check_output(op, name, array, to)
        for other_name, other in inputs.items():
            check_overlap(op, name, to, other_name, other)
        tensors.append(to)
    check_overlap(op, names[1], tensors[1], names[0], tensors[0])
    return _Sums(tensors[0], tensors[1], (out[0], out[1]))


def _segments(op: str, segments: Any, rows: torch.Tensor) -> torch.Tensor | None:
    """Offsets of samples; their values are checked where reading them is no wait."""
    if segments is None:
        return None
    offsets = tensor(op, "segments", segments)
    check_dtype(op, "segments", offsets.dtype, torch.int32)
    check_device(op, "segments", offsets, rows, "x")
    if offsets.ndim != 1 or not offsets.shape[0]:
        got = f"shape {list(offsets.shape)}"
        raise refuse(ValueError, op, "segments", "offsets [S+1], at least one", got)
    if INTERPRETED:
        _check_offsets(op, offsets.tolist(), rows.shape[0])
    return offsets


def _check_offsets(op: str, offsets: list[int], n: int) -> None:
    if offsets[0] != 0:
        raise refuse(ValueError, op, "segments", "0 first", offsets[0])
    for i in range(1, len(offsets)):
        if offsets[i] < offsets[i - 1]:
            got = f"{offsets[i]} after {offsets[i - 1]} at {i}"
            raise refuse(ValueError, op, "segments", "ascending offsets", got)
    if offsets[-1] != n:
        raise refuse(ValueError, op, "segments", f"the number of rows last, {n}", offsets[-1])


def _x_and_grad(
    op: str, x: Any, grad: Any, cols: int | None = None, up: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    rows = matrix(op, "x", x, None, cols)
    upstream = matrix(op, "grad", grad, rows.shape[0], up, rows)
    check_dtype(op, "grad", upstream.dtype, rows.dtype, ", the dtype of x")
    return rows, upstream


def lora_fisher(
    x: Any, grad: Any, A: Any, B: Any, scaling: float, segments: Any, out: Any
) -> tuple[Any, Any]:
    """On a GPU the values of ``segments`` are not read, which would be a wait: offsets outside
    the rows there are count as the nearest row, a descending pair as an empty sample."""
    op = "lora_fisher"
    a = matrix(op, "A", A)
    b = matrix(op, "B", B, None, a.shape[0], a, "A")
    check_dtype(op, "B", b.dtype, a.dtype, ", the dtype of A")
    rows, up = _x_and_grad(op, x, grad, a.shape[1], b.shape[0])
    check_device(op, "A", a, rows, "x")
    check_finite(op, "scaling", scaling)
    offsets = _segments(op, segments, rows)
    shapes = {"F_A": (a.shape[0], a.shape[1]), "F_B": (b.shape[0], b.shape[1])}
    inputs = {"x": rows, "grad": up, "A": a, "B": b, "segments": offsets}
    to = _sums(op, x, rows, out, shapes, inputs)
    _lora_fisher.lora_fisher(
        rows, up, a, b, float(scaling), offsets, to.first, to.second, out is not None
    )
    return to.result


def lora_fisher_factors(x: Any, grad: Any, out: Any) -> tuple[Any, Any]:
    op = "lora_fisher_factors"
    rows, up = _x_and_grad(op, x, grad)
    shapes = {"u": (up.shape[1],), "v": (rows.shape[1],)}
    to = _sums(op, x, rows, out, shapes, {"x": rows, "grad": up})
    _lora_fisher_factors.lora_fisher_factors(rows, up, to.first, to.second, out is not None)
    return to.result
