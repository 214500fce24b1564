"""Learning on a device: the steps of a pool in a device's memory, and EWC for them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from lora_engine.backends.triton_arrays import (
    check_device,
    check_dtype,
    check_finite,
    check_output,
    check_overlap,
    check_shape,
    matrix,
    refuse,
    tensor,
)
from lora_engine.kernels import batched_adapt as kernels
from lora_engine.kernels.launch import INTERPRETED

if TYPE_CHECKING:
    from lora_engine.backends.triton_pool import Pool


class Step(NamedTuple):
    """As ``_C.Step``."""

    lr: float
    max_norm: float = 0.0
    lr_ratio: float = 1.0
    train_A: bool = True
    weight_decay: float = 0.0
    ewc: Any = None


def _single(value: float) -> np.float32:
    with np.errstate(over="ignore"):
        return np.float32(value)


def _checked(op: str, pool: Pool, step: Step) -> kernels.Step:
    """The step in the numbers that kernels take, computed in float32."""
    lr, ratio, decay = _single(step.lr), _single(step.lr_ratio), _single(step.weight_decay)
    with np.errstate(over="ignore"):
        lr_B = lr * ratio
        strongest = lr * max(np.float32(1), ratio) * decay
    for name, value in (
        ("lr", lr), ("lr_ratio", ratio), ("max_norm", _single(step.max_norm)),
        ("weight_decay", decay), ("lr * lr_ratio", lr_B), ("lr * weight_decay", strongest),
    ):  # fmt: skip
        check_finite(op, name, float(value))
        if value < 0:
            raise refuse(ValueError, op, name, "a number from 0", value)
    if step.ewc is not None and step.ewc.pool is not pool:
        raise refuse(ValueError, op, "ewc", "one made for this pool", "one of another")
    one = np.float32(1)
    return kernels.Step(
        lr_A=float(lr), lr_B=float(lr_B), decay_A=float(one - lr * decay),
        decay_B=float(one - lr_B * decay), max_norm=float(step.max_norm), train_A=step.train_A,
        seed=pool.seed, records=None if step.ewc is None else step.ewc.records(),
    )  # fmt: skip


def _samples(op: str, pool: Pool, x: Any, grad: Any) -> tuple[torch.Tensor, torch.Tensor]:
    rows = matrix(op, "x", x, None, pool.in_features)
    if rows.device != pool.device:
        where = f"a tensor on {pool.device}, where the pool is"
        raise refuse(ValueError, op, "x", where, rows.device)
    up = matrix(op, "grad", grad, rows.shape[0], sum(pool.outs), rows)
    check_dtype(op, "grad", up.dtype, rows.dtype, ", the dtype of x")
    return rows, up


def adapt(pool: Pool, x: Any, grad: Any, ids: Any, weights: Any, step: Step) -> Any:
    """uint8 [n], of x's kind: what became of each row."""
    op = "batched_adapt"
    with pool.lock:
        pool.raise_bad_id()
        rows, up = _samples(op, pool, x, grad)
        how = _checked(op, pool, step)
        batch = pool.batch(op, ids, weights, rows, False)
        outcomes = kernels.batched_adapt(pool.adapters, rows, up, batch.ids, batch.weights, how)
    return outcomes if isinstance(x, torch.Tensor) else outcomes.numpy()


def _read(made: kernels.Outcome) -> tuple[int, float]:
    """Of the first run: waits for the device."""
    outcome, norm = torch.stack([made.outcomes[0].double(), made.norms[0]]).tolist()
    return int(outcome), norm


def adapt_slot(pool: Pool, x: Any, grad: Any, slot: int, step: Step) -> tuple[int, float]:
    """(outcome, norm of the mean gradient)."""
    op = "batched_adapt"
    with pool.lock:
        rows, up = _samples(op, pool, x, grad)
        how = _checked(op, pool, step)
        ranks = pool.slot(op, slot).ranks
        if not rows.shape[0] or not any(ranks):
            return 0, 0.0
        return _read(kernels.adapt_slot(pool.adapters, rows, up, slot, how))


# ---- accumulated gradients: one flat buffer in the order of storage ----


def gradient_size(pool: Pool, slot: int) -> int:
    ranks = pool.slot("AdapterPool.gradient_size", slot).ranks
    return sum(r * (pool.in_features + out) for r, out in zip(ranks, pool.outs, strict=True))


def _buffer(op: str, pool: Pool, slot: int, gradient: Any) -> torch.Tensor:
    """The buffer as a tensor; an array stays where it is."""
    given = (
        torch.from_numpy(gradient)
        if isinstance(gradient, np.ndarray)
        else tensor(op, "gradient", gradient)
    )
    check_dtype(op, "gradient", given.dtype, torch.float32)
    check_shape(op, "gradient", given.unsqueeze(0), 1, gradient_size(pool, slot))
    if given.numel() > 1 and given.stride(0) != 1:
        raise refuse(ValueError, op, "gradient", "a contiguous array", f"stride {given.stride(0)}")
    return given


def gradient(
    pool: Pool, x: Any, grad: Any, slot: int, h: Any, gradient: Any
) -> tuple[int, float]:
    """(outcome, norm of the sum over rows), which is added to ``gradient`` where it is finite.

    h, A x where the caller kept it, saves nothing here: it is computed beside Bᵀ grad.
    """
    op = "AdapterPool.gradient"
    with pool.lock:
        rows, up = _samples(op, pool, x, grad)
        to = _buffer(op, pool, slot, gradient)
        check_output(op, "gradient", gradient, to)
        check_overlap(op, "gradient", to, "x", rows)
        check_overlap(op, "gradient", to, "grad", up)
        if not rows.shape[0]:
            return 0, 0.0
        made = torch.empty(to.numel(), dtype=torch.float32, device=pool.device)
        norm = float(kernels.gradient_of(pool.adapters, rows, up, slot, made))
        if not norm <= np.finfo(np.float32).max:
            return 2, norm
        to += made.to(to.device)
        return 1, norm


def apply(pool: Pool, gradient: Any, slot: int, scale: float, step: Step) -> tuple[int, float]:
    """A step with ``scale`` times an accumulated gradient; (outcome, its norm)."""
    op = "AdapterPool.apply"
    with pool.lock:
        how = _checked(op, pool, step)
        check_finite(op, "scale", scale)
        given = _buffer(op, pool, slot, gradient)
        if not given.numel():
            return 0, 0.0
        return _read(kernels.apply(pool.adapters, given.to(pool.device), slot, scale, how))
