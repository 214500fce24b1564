"""Contenders of fisher_accumulate, lora_fisher, lora_fisher_factors and ewc_step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

import lora_engine as le
from bench import gpu_check as check
from bench.gpu_adapters import SCALING, Rows, normal
from bench.gpu_case import DEVICE, Timed

Make = Callable[[int], Any]
GAMMA, SCALE = 0.95, 0.05
LR, LAMBDA = 0.01, 3.0


def flat(elements: int, dtype: torch.dtype, parts: int) -> Make:
    """Sets of so many tensors of elements that are 0 or more."""

    def make(sets: int) -> list[tuple[torch.Tensor, ...]]:
        torch.manual_seed(0)
        return [
            tuple(normal(elements, dtype=dtype).abs() for _ in range(parts)) for _ in range(sets)
        ]

    return make


def ewc_inputs(elements: int, dtype: torch.dtype) -> Make:
    """theta, grad of dtype; Fisher and anchor float32."""

    def make(sets: int) -> list[tuple[torch.Tensor, ...]]:
        given, fixed = (flat(elements, d, 2)(sets) for d in (dtype, torch.float32))
        return [(*a, *b) for a, b in zip(given, fixed, strict=True)]

    return make


def _in_place(
    what: str,
    data: list[tuple[torch.Tensor, ...]],
    call: Callable[..., Any],
    expected: Callable[..., torch.Tensor],
    tolerance: float,
) -> Timed:
    """The first tensor of a set is changed."""
    start = data[0][0].clone()

    def right(run: Callable[[], Any]) -> None:
        data[0][0].copy_(start)
        want = expected(*(t.double() for t in data[0]))
        run()
        check.require(what, data[0][0], want, want, tolerance)
        data[0][0].copy_(start)

    return Timed([lambda t=tensors: call(*t) for tensors in data], right)


# ---- fisher_accumulate ----


def _accumulated(F: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
    return GAMMA * F + SCALE * g * g


def accumulate_ours(data: Any) -> Timed:
    call = lambda F, g: le.fisher_accumulate(F, g, GAMMA, SCALE)  # noqa: E731
    return _in_place("lora_engine", data, call, _accumulated, check.TOLERANCE[data[0][0].dtype])


def accumulate_torch(data: Any) -> Timed:
    call = lambda F, g: F.mul_(GAMMA).addcmul_(g, g, value=SCALE)  # noqa: E731
    return _in_place(
        "torch mul_ + addcmul_", data, call, _accumulated, 2 * check.TOLERANCE[data[0][0].dtype]
    )


# ---- ewc_step ----


def _proximal(theta: Any, grad: Any, fisher: Any, anchor: Any) -> Any:
    pull = 2 * LAMBDA * LR * fisher
    return (theta - LR * grad + pull * anchor) / (1 + pull)


def step_ours(data: Any) -> Timed:
    call = lambda *tensors: le.ewc_step(*tensors, LR, LAMBDA)  # noqa: E731
    return _in_place("lora_engine", data, call, _proximal, check.STORED[data[0][0].dtype])


def step_torch(data: Any) -> Timed:
    call = lambda *tensors: tensors[0].copy_(_proximal(*tensors))  # noqa: E731
    return _in_place("torch eager", data, call, _proximal, check.STORED[data[0][0].dtype])


# ---- lora_fisher, lora_fisher_factors ----


def _pairs(
    what: str, data: Rows, call: Callable[[int, Any], Any], shapes: tuple[Any, Any], want: Any
) -> Timed:
    """Calls that add a pair of sums to outputs of their own."""
    outs = [tuple(torch.zeros(s, device=DEVICE) for s in shapes) for _ in data.each]

    def right(run: Callable[[], Any]) -> None:
        for out in outs[0]:
            out.zero_()
        run()
        # A peer squares what 16 bits hold of h and g.
        tolerance = 8 * check.TOLERANCE[data.x[0].dtype]
        for got, expected in zip(outs[0], want, strict=True):
            check.require(what, got, expected, expected, tolerance)

    return Timed([lambda i=i: call(i, outs[i]) for i in data.each], right)


def _fisher(x: Any, grad: Any, A: Any, B: Any) -> tuple[Any, Any]:
    h, g, s = x @ A.T, grad @ B, SCALING**2
    return s * (g * g).T @ (x * x), s * (grad * grad).T @ (h * h)


def _fisher_pairs(what: str, data: Rows, call: Callable[[int, Any], Any]) -> Timed:
    doubles = [t[0].double() for t in (data.x, data.grad, data.A, data.B)]
    return _pairs(what, data, call, (data.A[0].shape, data.B[0].shape), _fisher(*doubles))


def fisher_ours(data: Rows) -> Timed:
    def call(i: int, out: Any) -> None:
        le.lora_fisher(data.x[i], data.grad[i], data.A[i], data.B[i], SCALING, out=out)

    return _fisher_pairs("lora_engine", data, call)


def fisher_torch(data: Rows) -> Timed:
    def call(i: int, out: Any) -> None:
        made = _fisher(data.x[i], data.grad[i], data.A[i], data.B[i])
        for to, sums in zip(out, made, strict=True):
            to.add_(sums)

    return _fisher_pairs("torch eager", data, call)


def _factors(x: Any, grad: Any) -> tuple[Any, Any]:
    return (grad * grad).sum(0), (x * x).sum(0)


def _factor_pairs(what: str, data: Rows, call: Callable[[int, Any], Any]) -> Timed:
    want = _factors(data.x[0].double(), data.grad[0].double())
    return _pairs(what, data, call, tuple(w.shape for w in want), want)


def factors_ours(data: Rows) -> Timed:
    def call(i: int, out: Any) -> None:
        le.lora_fisher_factors(data.x[i], data.grad[i], out=out)

    return _factor_pairs("lora_engine", data, call)


def factors_torch(data: Rows) -> Timed:
    def call(i: int, out: Any) -> None:
        for to, sums in zip(out, _factors(data.x[i], data.grad[i]), strict=True):
            to.add_(sums)

    return _factor_pairs("torch eager", data, call)
