"""The ops of ``torch.ops.lora_engine`` that take a pool: torch_library.py says how."""

from __future__ import annotations

import contextlib
from typing import Any

import numpy as np
import torch
from torch.autograd.function import once_differentiable

from lora_engine import handles, ops
from lora_engine.adapters.pool import AdapterPool
from lora_engine.torch_library import Tensor, beside, define, defined, wide, written

# ---- what arguments stand for ----


def pool_of(op: str, number: int) -> AdapterPool:
    found: AdapterPool = handles.find(op, "pool", AdapterPool, number)
    return found


def number_of_pool(op: str, pool: Tensor) -> Any:
    """The number in a handle, in a trace a symbol; ValueError for another tensor."""
    return handles.number_of(op, "pool", AdapterPool, pool)


def _pool(op: str, pool: Tensor) -> AdapterPool:
    return pool_of(op, number_of_pool(op, pool))


# ---- deltas of a pool ----


def versions_now(pool: AdapterPool, ids: Tensor) -> Tensor:
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


def hold_to(op: str, dx: Tensor, pool: AdapterPool, then: Tensor, ids: Tensor) -> None:
    """Of a gradient that was computed with the adapters of now: refuses others than then."""
    changed = versions_now(pool, ids) != then
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


def _batched(x: Tensor, pool: Tensor, ids: Tensor, weights: Tensor | None = None) -> Any:
    storage = _pool("batched_lora_delta", pool)._storage
    beside("batched_lora_delta", x, ids=ids, weights=weights)
    return storage.forward(x, ids, weights, None, False)


def _batched_fake(x: Tensor, pool: Tensor, ids: Tensor, weights: Any = None) -> Any:
    number_of_pool("batched_lora_delta", pool)
    return wide(x, pool.shape[2])


def _batched_recorded(x: Tensor, pool: Tensor, ids: Tensor, weights: Tensor | None = None) -> Any:
    beside("batched_lora_delta", x, ids=ids)
    then = versions_now(_pool("batched_lora_delta", pool), ids)
    return _batched(x, pool, ids, weights), then


def _batched_recorded_fake(x: Tensor, pool: Tensor, ids: Tensor, weights: Any = None) -> Any:
    return _batched_fake(x, pool, ids), ids.new_empty(ids.shape, dtype=torch.int64)


def _batched_backward(
    grad: Tensor,
    pool: int,
    in_features: int,
    then: Tensor,
    ids: Tensor,
    weights: Tensor | None = None,
) -> Any:
    op = "batched_lora_delta"
    found = pool_of(op, pool)
    dx = found._storage.forward(grad, ids, weights, None, False, True)
    hold_to(op, dx, found, then, ids)
    return dx


class _Batched(torch.autograd.Function):
    """dx_i = sum_j w_ij s_j A_jᵀ (B_jᵀ grad_i)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, pool: Tensor, ids: Tensor, weights: Tensor | None) -> Any:
        y, then = defined.batched_lora_delta_recorded(x, pool, ids, weights)
        ctx.sizes = number_of_pool("batched_lora_delta", pool), x.shape[-1]
        ctx.save_for_backward(then, ids, weights)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        then, ids, weights = ctx.saved_tensors
        dx = defined.batched_lora_delta_backward(grad, *ctx.sizes, then, ids, weights)
        return dx, None, None, None


# One op for both, as a compiler would move one that gives only what the backward pass needs to
# there, behind what is to be noticed.
define(
    "batched_lora_delta_recorded(Tensor x, Tensor pool, Tensor ids, Tensor? weights=None)"
    " -> (Tensor, Tensor)",
    _batched_recorded,
    _batched_recorded_fake,
)
# The pool by its number: autograd holds a saved tensor to be as it was, and an adapt writes the
# handle.
define(
    "batched_lora_delta_backward(Tensor grad, SymInt pool, SymInt in_features, Tensor then,"
    " Tensor ids, Tensor? weights=None) -> Tensor",
    _batched_backward,
    lambda grad, pool, in_features, *batch: wide(grad, in_features),
)
define(
    "batched_lora_delta(Tensor x, Tensor pool, Tensor ids, Tensor? weights=None) -> Tensor",
    _batched,
    _batched_fake,
    _Batched,
    ("x",),
)


def _batched_into(y: Tensor, x: Tensor, pool: Tensor, ids: Tensor, weights: Any = None) -> None:
    storage = _pool("batched_lora_delta_", pool)._storage
    beside("batched_lora_delta_", x, y=y, ids=ids, weights=weights)
    storage.forward(x, ids, weights, y, True)
    written(y)


def _batched_into_fake(y: Tensor, x: Tensor, pool: Tensor, *batch: Any) -> None:
    number_of_pool("batched_lora_delta_", pool)


define(
    "batched_lora_delta_(Tensor(a!) y, Tensor x, Tensor pool, Tensor ids, Tensor? weights=None)"
    " -> ()",
    _batched_into,
    _batched_into_fake,
)


# ---- learning ----


def _batched_adapt(
    x: Tensor,
    grad: Tensor,
    pool: Tensor,
    ids: Tensor,
    lr: float,
    weights: Tensor | None = None,
    max_norm: float | None = None,
    lr_ratio: float = 1.0,
    train_A: bool = True,
    weight_decay: float = 0.0,
) -> Tensor:
    op = "batched_adapt"
    found = _pool(op, pool)
    beside(op, x, grad=grad, ids=ids, weights=weights)
    step = ops.make_step(found._backend, lr, max_norm, lr_ratio, train_A, weight_decay)
    outcomes = found._storage.adapt(x, grad, ids, weights, step)
    return outcomes if isinstance(outcomes, Tensor) else torch.from_numpy(outcomes)


def _batched_adapt_fake(x: Tensor, grad: Tensor, pool: Tensor, ids: Tensor, *_: Any) -> Tensor:
    number_of_pool("batched_adapt", pool)
    return x.new_empty(ids.shape[:1], dtype=torch.uint8)


define(
    "batched_adapt(Tensor x, Tensor grad, Tensor(a!) pool, Tensor ids, float lr,"
    " Tensor? weights=None, float? max_norm=None, float lr_ratio=1.0, bool train_A=True,"
    " float weight_decay=0.0) -> Tensor",
    _batched_adapt,
    _batched_adapt_fake,
)
