"""The ops of ``torch.ops.lora_engine`` that take a pool or a packed matrix: torch_library.py says
how."""

from __future__ import annotations

import contextlib
from typing import Any

import numpy as np
import torch
from torch.autograd.function import once_differentiable

from lora_engine import handles, ops
from lora_engine.adapters.pool import AdapterPool
from lora_engine.backends import backend_of
from lora_engine.quant.nf4 import NF4Tensor
from lora_engine.torch_library import Tensor, beside, define, defined, wide, written

# ---- what arguments stand for ----


def _pool(op: str, handle: int) -> AdapterPool:
    found: AdapterPool = handles.find(op, "pool", AdapterPool, handle)
    return found


def _checked(op: str, handle: int, version: Tensor, x: Tensor) -> AdapterPool:
    """The pool of a handle, and beside x a version tensor that could be of one."""
    pool = _pool(op, handle)
    if version.dtype is not torch.int64 or version.shape != (1,):
        dtype = str(version.dtype).removeprefix("torch.")
        raise ValueError(
            f"{op}: version: expected the pool's version_tensor, int64 [1],"
            f" got {dtype} {list(version.shape)}"
        )
    beside(op, x, version=version)
    return pool


# ---- deltas of a pool ----


def _versions_now(pool: AdapterPool, ids: Tensor) -> Tensor:
    """Of each id's slot, 0 for none."""
    storage = pool._storage
    if hasattr(storage, "adapters"):
        table = storage.adapters.versions
        held = table[ids.long().clamp(0, len(table) - 1)]
        return torch.where(ids < 0, torch.zeros_like(held), held)
    named, places = np.unique(ids.detach().numpy(), return_inverse=True)
    versions = np.zeros(len(named), np.int64)
    for i, slot in enumerate(named.tolist()):
        with contextlib.suppress(IndexError, TypeError):  # the op itself says so
            versions[i] = storage.version(slot) if slot != -1 else 0
    return torch.from_numpy(versions[places].reshape(ids.shape))


def _hold_to(op: str, dx: Tensor, pool: AdapterPool, then: Tensor, ids: Tensor) -> None:
    """Of a gradient that was computed with the adapters of now: refuses others than then."""
    changed = _versions_now(pool, ids) != then
    if not dx.is_cuda:
        if bool(changed.any()):
            raise RuntimeError(
                f"{op}: backward: expected the adapters of the forward pass,"
                " got adapters that were changed since"
            )
        return
    by_row = changed.reshape(changed.shape[0], -1).any(1, keepdim=True)
    rows = dx.unsqueeze(0) if dx.ndim == 1 else dx
    rows.masked_fill_(by_row, float("nan"))


def _batched(
    x: Tensor, pool: int, version: Tensor, ids: Tensor, weights: Tensor | None = None
) -> Any:
    storage = _checked("batched_lora_delta", pool, version, x)._storage
    beside("batched_lora_delta", x, ids=ids, weights=weights)
    return storage.forward(x, ids, weights, None, False)


def _batched_fake(x: Tensor, pool: int, version: Tensor, ids: Tensor, weights: Any = None) -> Any:
    return wide(x, _checked("batched_lora_delta", pool, version, x).out_features)


def _batched_recorded(
    x: Tensor, pool: int, version: Tensor, ids: Tensor, weights: Tensor | None = None
) -> Any:
    beside("batched_lora_delta", x, ids=ids)
    then = _versions_now(_checked("batched_lora_delta", pool, version, x), ids)
    return _batched(x, pool, version, ids, weights), then


def _batched_recorded_fake(
    x: Tensor, pool: int, version: Tensor, ids: Tensor, weights: Any = None
) -> Any:
    return _batched_fake(x, pool, version, ids), ids.new_empty(ids.shape, dtype=torch.int64)


def _batched_backward(
    grad: Tensor, pool: int, then: Tensor, ids: Tensor, weights: Tensor | None = None
) -> Any:
    op = "batched_lora_delta"
    found = _pool(op, pool)
    dx = found._storage.forward(grad, ids, weights, None, False, True)
    _hold_to(op, dx, found, then, ids)
    return dx


class _Batched(torch.autograd.Function):
    """dx_i = sum_j w_ij s_j A_jᵀ (B_jᵀ grad_i)."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, pool: int, version: Tensor, ids: Tensor, weights: Tensor | None
    ) -> Any:
        y, then = defined.batched_lora_delta_recorded(x, pool, version, ids, weights)
        ctx.pool = pool
        ctx.save_for_backward(then, ids, weights)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        then, ids, weights = ctx.saved_tensors
        dx = defined.batched_lora_delta_backward(grad, ctx.pool, then, ids, weights)
        return dx, None, None, None, None


# One op for both, as a compiler would move one that gives only what the backward pass needs to
# there, behind what is to be noticed.
define(
    "batched_lora_delta_recorded(Tensor x, int pool, Tensor version, Tensor ids,"
    " Tensor? weights=None) -> (Tensor, Tensor)",
    _batched_recorded,
    _batched_recorded_fake,
)
define(
    "batched_lora_delta_backward(Tensor grad, int pool, Tensor then, Tensor ids,"
    " Tensor? weights=None) -> Tensor",
    _batched_backward,
    lambda grad, pool, *batch: wide(grad, _pool("batched_lora_delta", pool).in_features),
)
define(
    "batched_lora_delta(Tensor x, int pool, Tensor version, Tensor ids, Tensor? weights=None)"
    " -> Tensor",
    _batched,
    _batched_fake,
    _Batched,
    ("x",),
)


def _batched_into(
    y: Tensor, x: Tensor, pool: int, version: Tensor, ids: Tensor, weights: Any = None
) -> None:
    storage = _checked("batched_lora_delta_", pool, version, x)._storage
    beside("batched_lora_delta_", x, y=y, ids=ids, weights=weights)
    storage.forward(x, ids, weights, y, True)
    written(y)


define(
    "batched_lora_delta_(Tensor(a!) y, Tensor x, int pool, Tensor version, Tensor ids,"
    " Tensor? weights=None) -> ()",
    _batched_into,
    lambda y, x, pool, version, ids, weights=None: None,
)


# ---- learning ----


def _batched_adapt(
    x: Tensor,
    grad: Tensor,
    pool: int,
    version: Tensor,
    ids: Tensor,
    lr: float,
    weights: Tensor | None = None,
    max_norm: float | None = None,
    lr_ratio: float = 1.0,
    train_A: bool = True,
    weight_decay: float = 0.0,
) -> Tensor:
    op = "batched_adapt"
    found = _checked(op, pool, version, x)
    beside(op, x, grad=grad, ids=ids, weights=weights)
    step = ops.make_step(found._backend, lr, max_norm, lr_ratio, train_A, weight_decay)
    outcomes = found._storage.adapt(x, grad, ids, weights, step)
    version.add_(1)
    return outcomes if isinstance(outcomes, Tensor) else torch.from_numpy(outcomes)


def _batched_adapt_fake(
    x: Tensor, grad: Tensor, pool: int, version: Tensor, ids: Tensor, *_: Any
) -> Tensor:
    _checked("batched_adapt", pool, version, x)
    return x.new_empty(ids.shape[:1], dtype=torch.uint8)


define(
    "batched_adapt(Tensor x, Tensor grad, int pool, Tensor(a!) version, Tensor ids, float lr,"
    " Tensor? weights=None, float? max_norm=None, float lr_ratio=1.0, bool train_A=True,"
    " float weight_decay=0.0) -> Tensor",
    _batched_adapt,
    _batched_adapt_fake,
)


# ---- NF4 ----


def _packed(handle: int) -> NF4Tensor:
    found: NF4Tensor = handles.find("nf4_linear", "w", NF4Tensor, handle)
    return found


def _of_nf4(x: Tensor, pool: int, version: Any, ids: Any, weights: Any = None) -> Any:
    """The pool of a call of nf4_linear, None for -1, or ValueError."""
    op = "nf4_linear"
    if pool == -1:
        if version is not None or ids is not None or weights is not None:
            raise ValueError(
                f"{op}: pool: expected a handle where version, ids or weights are given, got -1"
            )
        return None
    if version is None or ids is None:
        raise ValueError(f"{op}: version, ids: expected both with a pool, got none")
    beside(op, x, ids=ids, weights=weights)
    return _checked(op, pool, version, x)


def _nf4(
    x: Tensor,
    w: int,
    bias: Any = None,
    pool: int = -1,
    version: Any = None,
    ids: Any = None,
    weights: Any = None,
    compute: str | None = None,
) -> Any:
    found = _of_nf4(x, pool, version, ids, weights)
    return ops.nf4_linear(x.detach(), _packed(w), bias, found, ids, weights, None, compute)


def _nf4_fake(
    x: Tensor,
    w: int,
    bias: Any = None,
    pool: int = -1,
    version: Any = None,
    ids: Any = None,
    weights: Any = None,
    compute: Any = None,
) -> Any:
    _of_nf4(x, pool, version, ids, weights)
    return wide(x, _packed(w).shape[0])


def _nf4_recorded(
    x: Tensor,
    w: int,
    bias: Any,
    pool: int,
    version: Tensor,
    ids: Tensor,
    weights: Any = None,
    compute: str | None = None,
) -> Any:
    then = _versions_now(_of_nf4(x, pool, version, ids, weights), ids)
    return _nf4(x, w, bias, pool, version, ids, weights, compute), then


def _nf4_recorded_fake(x: Tensor, w: int, bias: Any, pool: int, *batch: Any) -> Any:
    ids = batch[1]
    return _nf4_fake(x, w, bias, pool, *batch), ids.new_empty(ids.shape, dtype=torch.int64)


def _nf4_backward(
    grad: Tensor, w: int, pool: int = -1, then: Any = None, ids: Any = None, weights: Any = None
) -> Any:
    op = "nf4_linear"
    backend = backend_of(grad)
    up = grad.reshape(-1, grad.shape[-1]) if grad.ndim > 2 else grad
    dx = backend.nf4_linear_backward(up, _packed(w).storage(backend), None)
    if pool != -1:
        found = _pool(op, pool)
        found._storage.forward(up, ids, weights, dx, True, True)
        _hold_to(op, dx, found, then, ids)
    return dx.reshape(*grad.shape[:-1], dx.shape[-1])


class _Nf4Linear(torch.autograd.Function):
    """dx = grad W + the deltas' part, dbias = the sum of grad over rows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: int, bias: Any, *of_pool: Any) -> Any:
        pool, version, ids, weights, compute = of_pool
        call = (x, w, bias, pool, version, ids, weights, compute)
        if pool == -1:
            y, then = defined.nf4_linear(*call), None
        else:
            y, then = defined.nf4_linear_recorded(*call)
        ctx.w, ctx.pool = w, pool
        ctx.bias = None if bias is None else (bias.shape, bias.dtype)
        ctx.save_for_backward(then, ids, weights)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        then, ids, weights = ctx.saved_tensors
        dx = dbias = None
        if ctx.needs_input_grad[0]:
            dx = defined.nf4_linear_backward(grad, ctx.w, ctx.pool, then, ids, weights)
        if ctx.needs_input_grad[2]:
            shape, dtype = ctx.bias
            dbias = grad.reshape(-1, grad.shape[-1]).float().sum(0).to(dtype).reshape(shape)
        return dx, None, dbias, None, None, None, None, None


define(
    "nf4_linear_recorded(Tensor x, int w, Tensor? bias, int pool, Tensor version, Tensor ids,"
    " Tensor? weights=None, str? compute=None) -> (Tensor, Tensor)",
    _nf4_recorded,
    _nf4_recorded_fake,
)
define(
    "nf4_linear_backward(Tensor grad, int w, int pool=-1, Tensor? then=None, Tensor? ids=None,"
    " Tensor? weights=None) -> Tensor",
    _nf4_backward,
    lambda grad, w, *of_pool: wide(grad, _packed(w).shape[1]),
)
define(
    "nf4_linear(Tensor x, int w, Tensor? bias=None, int pool=-1, Tensor? version=None,"
    " Tensor? ids=None, Tensor? weights=None, str? compute=None) -> Tensor",
    _nf4,
    _nf4_fake,
    _Nf4Linear,
    ("x", "bias"),
)
