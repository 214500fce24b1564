"""lora.adapt of one row, torch tensors, against torch by hand and torch autograd + SGD."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lora_engine as le
from bench import check, inputs, steps
from bench.case import OURS, Case, Contender, Traffic

RANK = 2
MODULE = "q_proj"
BY_HAND = "torch by hand"
AUTOGRAD = "torch autograd + SGD"


def ours(data: inputs.Inputs) -> steps.Spelling:
    def make(lr: float) -> steps.Run:
        lora = inputs.make_lora(data, MODULE)
        x, g = inputs.tensor(data.x[0]), inputs.tensor(data.grad[0])

        def call() -> None:
            r = lora.adapt(x, le.Feedback.from_gradient(g), MODULE, lr=lr)
            assert r.applied

        return steps.Run(call, lambda: lora.weights(MODULE)[:2])

    return make


def by_hand(data: inputs.Inputs) -> dict[str, steps.Spelling]:
    """The gradients' outer products added to the weights in place, no autograd."""
    import torch

    def spelling(update: Callable[..., Any]) -> steps.Spelling:
        def make(lr: float) -> steps.Run:
            x, g = inputs.tensor(data.x[0]), inputs.tensor(data.grad[0])
            A, B = inputs.tensor(data.A[0]), inputs.tensor(data.B[0])
            Bt, h, p = B.t(), torch.empty(RANK), torch.empty(RANK)
            alpha = -lr * data.scaling

            def call() -> None:
                torch.mv(A, x, out=h)
                torch.mv(Bt, g, out=p)
                update(B, g, h, alpha)
                update(A, p, x, alpha)

            return steps.Run(call, lambda: (A, B))

        return make

    return {
        "addr_": spelling(lambda W, u, v, alpha: W.addr_(u, v, alpha=alpha)),
        "addmm_": spelling(lambda W, u, v, alpha: W.addmm_(u[:, None], v[None], alpha=alpha)),
        "add_(outer)": spelling(lambda W, u, v, alpha: W.add_(torch.outer(u, v), alpha=alpha)),
    }


def autograd(data: inputs.Inputs) -> dict[str, steps.Spelling]:
    import torch
    from torch.nn.functional import linear

    def spelling(**options: bool) -> steps.Spelling:
        def make(lr: float) -> steps.Run:
            x, g = inputs.tensor(data.x[0]), inputs.tensor(data.grad[0])
            A = inputs.tensor(data.A[0]).requires_grad_()
            B = inputs.tensor(data.B[0]).requires_grad_()
            sgd = torch.optim.SGD([A, B], lr=lr, **options)

            def call() -> None:
                (linear(linear(x, A), B) * data.scaling).backward(g)
                sgd.step()
                sgd.zero_grad()

            return steps.Run(call, lambda: (A.detach(), B.detach()))

        return make

    return {
        "SGD()": spelling(),
        "SGD(foreach=True)": spelling(foreach=True),
        "SGD(fused=True)": spelling(fused=True),
    }


def build() -> list[Contender]:
    data = inputs.make(1, RANK)
    expected = check.step(data, steps.CHECKED_LR)
    return [
        steps.contender(OURS, {"adapt(lr=)": ours(data)}, expected),
        steps.contender(BY_HAND, by_hand(data), expected, inference=True),
        steps.contender(AUTOGRAD, autograd(data), expected),
    ]


_WEIGHTS, _ROW = inputs.weight_bytes(1, RANK), inputs.row_bytes(1)
CASES = (
    Case(
        "lora.adapt(x, fb, m, lr=...)",
        "4096, r=2, one row",
        build,
        faster={BY_HAND: 8.0, AUTOGRAD: 40.0},
        traffic=Traffic(2 * _ROW, 2 * _WEIGHTS, _WEIGHTS + 2 * _ROW, threads=1),
        flops=8 * RANK * inputs.FEATURES,
    ),
)
