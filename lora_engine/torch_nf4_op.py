"""``torch.ops.lora_engine.nf4_linear``: torch_library.py says how an op is defined."""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from lora_engine import handles, ops
from lora_engine.backends import backend_of
from lora_engine.quant.nf4 import NF4Tensor
from lora_engine.torch_library import Tensor, beside, define, defined, wide
from lora_engine.torch_pool_ops import hold_to, number_of_pool, pool_of, versions_now

_OP = "nf4_linear"


def _packed(number: int) -> NF4Tensor:
    found: NF4Tensor = handles.find(_OP, "w", NF4Tensor, number)
    return found


def _number_of_w(w: Tensor) -> Any:
    return handles.number_of(_OP, "w", NF4Tensor, w)


def _number_of_pool(x: Tensor, pool: Any, ids: Any, weights: Any = None) -> Any:
    """Of the pool of a call, None where there is none, or ValueError."""
    if pool is None:
        if ids is not None or weights is not None:
            raise ValueError(f"{_OP}: pool: expected a handle with ids or weights, got none")
        return None
    if ids is None:
        raise ValueError(f"{_OP}: ids: expected a tensor with a pool, got none")
    beside(_OP, x, ids=ids, weights=weights)
    return number_of_pool(_OP, pool)


def _nf4(
    x: Tensor,
    w: Tensor,
    bias: Any = None,
    pool: Any = None,
    ids: Any = None,
    weights: Any = None,
    compute: str | None = None,
) -> Any:
    number = _number_of_pool(x, pool, ids, weights)
    found = None if number is None else pool_of(_OP, number)
    matrix = _packed(_number_of_w(w))
    # Of its own shape at once: autograd refuses to write to a view that a Function returned.
    out = wide(x, matrix.shape[0]) if x.ndim > 2 else None
    return ops.nf4_linear(x.detach(), matrix, bias, found, ids, weights, out, compute)


def _nf4_fake(
    x: Tensor,
    w: Tensor,
    bias: Any = None,
    pool: Any = None,
    ids: Any = None,
    weights: Any = None,
    compute: Any = None,
) -> Any:
    _number_of_pool(x, pool, ids, weights)
    _number_of_w(w)
    return wide(x, w.shape[2])


def _nf4_recorded(
    x: Tensor,
    w: Tensor,
    bias: Any,
    pool: Tensor,
    ids: Tensor,
    weights: Any = None,
    compute: str | None = None,
) -> Any:
    then = versions_now(pool_of(_OP, _number_of_pool(x, pool, ids, weights)), ids)
    return _nf4(x, w, bias, pool, ids, weights, compute), then


def _nf4_recorded_fake(x: Tensor, w: Tensor, bias: Any, pool: Tensor, ids: Tensor, *of: Any) -> Any:
    then = ids.new_empty(ids.shape, dtype=torch.int64)
    return _nf4_fake(x, w, bias, pool, ids, *of), then


def _nf4_backward(
    grad: Tensor,
    w: int,
    in_features: int,
    pool: int | None = None,
    then: Any = None,
    ids: Any = None,
    weights: Any = None,
) -> Any:
    backend = backend_of(grad)
    up = grad.reshape(-1, grad.shape[-1]) if grad.ndim > 2 else grad
    dx = backend.nf4_linear_backward(up, _packed(w).storage(backend), None)
    if pool is not None:
        found = pool_of(_OP, pool)
        found._storage.forward(up, ids, weights, dx, True, True)
        hold_to(_OP, dx, found, then, ids)
    return dx.reshape(*grad.shape[:-1], dx.shape[-1])


class _Nf4Linear(torch.autograd.Function):
    """dx = grad W + the deltas' part, dbias = the sum of grad over rows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, bias: Any, *of_pool: Any) -> Any:
        pool, ids, weights, compute = of_pool
        call = (x, w, bias, pool, ids, weights, compute)
        number = _number_of_pool(x, pool, ids, weights)
        if number is None:
            y, then = defined.nf4_linear(*call), None
        else:
            y, then = defined.nf4_linear_recorded(*call)
        ctx.sizes = _number_of_w(w), x.shape[-1], number
        ctx.bias = None if bias is None else (bias.shape, bias.dtype)
        ctx.save_for_backward(then, ids, weights)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        dx = dbias = None
        if ctx.needs_input_grad[0]:
            dx = defined.nf4_linear_backward(grad, *ctx.sizes, *ctx.saved_tensors)
        if ctx.needs_input_grad[2]:
            shape, dtype = ctx.bias
            dbias = grad.reshape(-1, grad.shape[-1]).float().sum(0).to(dtype).reshape(shape)
        return dx, None, dbias, None, None, None, None


define(
    "nf4_linear_recorded(Tensor x, Tensor w, Tensor? bias, Tensor pool, Tensor ids,"
    " Tensor? weights=None, str? compute=None) -> (Tensor, Tensor)",
    _nf4_recorded,
    _nf4_recorded_fake,
)
define(
    "nf4_linear_backward(Tensor grad, SymInt w, SymInt in_features, SymInt? pool=None,"
    " Tensor? then=None, Tensor? ids=None, Tensor? weights=None) -> Tensor",
    _nf4_backward,
    lambda grad, w, in_features, *of_pool: wide(grad, in_features),
)
define(
    "nf4_linear(Tensor x, Tensor w, Tensor? bias=None, Tensor? pool=None, Tensor? ids=None,"
    " Tensor? weights=None, str? compute=None) -> Tensor",
    _nf4,
    _nf4_fake,
    _Nf4Linear,
    ("x", "bias"),
)
