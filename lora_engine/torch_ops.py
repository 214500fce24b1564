"""torch autograd over the ops. Imports torch; imported at first use."""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable


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
