"""torch autograd over the ops. Imports torch; imported at first use. Also defines
``torch.ops.lora_engine`` (torch_library.py, torch_pool_ops.py, torch_nf4_op.py)."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch.autograd.function import once_differentiable

from lora_engine import torch_nf4_op, torch_pool_ops  # noqa: F401  define the ops
from lora_engine.backends import backend_of


def _rows(x: torch.Tensor) -> torch.Tensor:
    return x.flatten(0, -2) if x.ndim > 2 else x


class _MicroLoRADelta(torch.autograd.Function):
    """y = scaling B (A x); the backward pass gives dL/dx = scaling Aᵀ (Bᵀ dL/dy) and
    adds the gradients of A and B to the module's pending ones."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, module: Any, recompute: bool) -> torch.Tensor:
        x = x.detach()
        rows = _rows(x)
        ctx.module = module
        ctx.version = module.pool.version(module.slot)
        ctx.h = None if recompute else module.storage.shrink(rows, module.slot)
        ctx.save_for_backward(x)
        y = module.storage.forward_slot(rows, module.slot, None, False, False, module.out)
        result: torch.Tensor = y.reshape(*x.shape[:-1], module.out)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        m = ctx.module
        if m.pool.version(m.slot) != ctx.version:
            raise RuntimeError(
                "MicroLoRA.forward: backward: expected the weights of the forward pass,"
                " got weights that were changed since"
            )
        (x,) = ctx.saved_tensors
        rows, up = _rows(x), grad.reshape(-1, m.out).to(x.dtype)
        m.accumulate(rows, up, ctx.h)
        dx = m.storage.forward_slot(up, m.slot, None, False, True, x.shape[-1])
        return dx.reshape(x.shape), None, None


def micro_lora_delta(x: torch.Tensor, module: Any, recompute: bool) -> torch.Tensor:
    """The delta of one MicroLoRA module, recorded by autograd."""
    result: torch.Tensor = _MicroLoRADelta.apply(x, module, recompute)  # type: ignore[no-untyped-call]
    return result


class _Nf4Linear(torch.autograd.Function):
    """y = x Wᵀ + bias + deltas; the backward pass gives dL/dx = dL/dy W + the deltas' part,
    dL/dbias, and adds the gradients of the adapters to the pool's pending ones."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        bias: torch.Tensor | None,
        w: Any,
        pool: Any,
        ids: Any,
        weights: Any,
        compute: str | None,
    ) -> torch.Tensor:
        x = x.detach()
        ctx.w, ctx.pool = w, pool
        ctx.ids, ctx.weights = _copy(ids), _copy(weights)
        ctx.bias_shape = None if bias is None else bias.shape
        ctx.save_for_backward(x)
        storage = None if pool is None else pool._storage
        ctx.versions = {} if pool is None else _versions(pool, ctx.ids)
        bias = None if bias is None else bias.detach()
        backend = backend_of(x)
        result: torch.Tensor = backend.nf4_linear(
            x, w.storage(backend), bias, storage, ids, weights, None, compute
        )
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        (x,) = ctx.saved_tensors
        pool = ctx.pool
        if pool is not None and _versions(pool, ctx.ids) != ctx.versions:
            raise RuntimeError(
                "nf4_linear: backward: expected the adapters of the forward pass,"
                " got adapters that were changed since"
            )
        dx = dbias = None
        if ctx.needs_input_grad[0]:
            backend = backend_of(grad)
            dx = backend.nf4_linear_backward(grad, ctx.w.storage(backend), None)
            if pool is not None:
                ids, weights = _beside(ctx.ids, grad), _beside(ctx.weights, grad)
                pool._storage.forward(grad, ids, weights, dx, True, True)
        if ctx.needs_input_grad[1]:
            dbias = grad.sum(0).reshape(ctx.bias_shape)
        for slot, version in ctx.versions.items():
            rows, scale = (
                None if part is None else part.to(grad.device)
                for part in _rows_of(slot, ctx.ids, ctx.weights)
            )
            up = grad[rows] if scale is None else (grad[rows] * scale[:, None]).to(grad.dtype)
            pool.accumulate_gradient(slot, x[rows], up, version)
        return dx, dbias, None, None, None, None, None


def _copy(array: Any) -> np.ndarray | None:
    """As a NumPy array of its own, so that a caller may reuse the one it gave."""
    if isinstance(array, torch.Tensor):
        array = array.cpu().numpy()
    return None if array is None else np.array(array)


def _beside(array: np.ndarray | None, x: torch.Tensor) -> Any:
    """The array, as a tensor on x's device where that is no CPU."""
    if array is None or x.device.type == "cpu":
        return array
    return torch.from_numpy(array).to(x.device)


def _tensor(array: Any) -> Any:
    """A NumPy array as a tensor; whatever else as it is."""
    if not isinstance(array, np.ndarray):
        return array
    return torch.from_numpy(array if array.flags.writeable else array.copy())


def _versions(pool: Any, ids: Any) -> dict[int, int]:
    """Of the slots that ids name, ascending."""
    try:
        return {int(s): pool.version(int(s)) for s in np.unique(ids) if s != -1}
    except (IndexError, TypeError):
        return {}  # ids that are none: the op says so


def _rows_of(slot: int, ids: Any, weights: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The rows that name a slot, and the weight each gives it (None: one)."""
    named = ids == slot
    by_row = named if named.ndim == 1 else named.any(axis=1)
    rows = torch.from_numpy(np.flatnonzero(by_row))
    if weights is None and (named.ndim == 1 or int(named.sum()) == len(rows)):
        return rows, None
    w = named.astype(np.float32) if weights is None else np.where(named, weights, 0)
    total = w if w.ndim == 1 else w.sum(axis=1)
    return rows, torch.from_numpy(total.astype(np.float32))[rows]


def recording() -> bool:
    """Whether autograd records."""
    return torch.is_grad_enabled()


def detached(value: Any) -> Any:
    """A tensor outside autograd; whatever else as it is."""
    return value.detach() if isinstance(value, torch.Tensor) else value


def nf4_linear(
    x: torch.Tensor,
    bias: torch.Tensor | None,
    w: Any,
    pool: Any,
    ids: Any,
    weights: Any,
    out: Any,
    compute: str | None,
) -> torch.Tensor:
    """``ops.nf4_linear`` of x [in] or [n, in], recorded by autograd."""
    if out is not None:
        raise ValueError("nf4_linear: out: expected None where x or bias requires grad")
    if getattr(weights, "requires_grad", False):
        raise ValueError(
            "nf4_linear: weights: expected a tensor outside autograd, got one that requires"
            " grad: gradients are those of x, bias and the adapters"
        )
    x, bias = _tensor(x), _tensor(bias)
    rows = x.unsqueeze(0) if x.ndim == 1 else x
    y: torch.Tensor = _Nf4Linear.apply(rows, bias, w, pool, ids, weights, compute)  # type: ignore[no-untyped-call]
    return y.squeeze(0) if x.ndim == 1 else y
