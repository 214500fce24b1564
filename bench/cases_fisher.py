"""fisher_accumulate and lora_fisher, against torch's ops and torch.func's per-sample gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

import lora_engine as le
from bench import check, inputs
from bench.case import OURS, Case, Contender, Traffic
from bench.paired import fastest
from lora_engine import reference

ELEMENTS = 1 << 24
GAMMA, SCALE = 0.95, 0.05
SAMPLES, RANK = 256, 2
IN_PLACE = "torch mul_ + addcmul_"
PER_SAMPLE = "torch.func per-sample gradients"


def accumulate() -> list[Contender]:
    import torch

    rng = np.random.default_rng(0)
    F = rng.random(ELEMENTS, dtype=np.float32)
    g = rng.standard_normal(ELEMENTS, dtype=np.float32)
    values = reference.fisher_accumulate(F, g, GAMMA, SCALE)
    expected = check.Expected(values, values)  # of terms that are not negative

    def contender(name: str, spell: Callable[[Any, Any], Any]) -> Contender:
        to, gradient = inputs.tensor(F), inputs.tensor(g)

        def verify() -> None:
            to.copy_(torch.from_numpy(F))
            spell(to, gradient)
            check.require(name, to, expected)

        return Contender(name, lambda: spell(to, gradient), verify, inference=name != OURS)

    return [
        contender(OURS, lambda to, g: le.fisher_accumulate(to, g, GAMMA, SCALE)),
        contender(IN_PLACE, lambda to, g: to.mul_(GAMMA).addcmul_(g, g, value=SCALE)),
    ]


def _per_sample(
    x: Any, grad: Any, A: Any, B: Any, scaling: float
) -> dict[str, Callable[[], tuple[Any, Any]]]:
    """Every sample's gradient of <grad, s B A x>, squared, then summed."""
    from torch.func import grad as gradient
    from torch.func import vmap
    from torch.nn.functional import linear

    def spelling(loss: Callable[..., Any]) -> Callable[[], tuple[Any, Any]]:
        each = vmap(gradient(loss, argnums=(0, 1)), in_dims=(None, None, 0, 0))

        def call() -> tuple[Any, Any]:
            gA, gB = each(A, B, x, grad)
            return gA.square_().sum(0), gB.square_().sum(0)

        return call

    return {
        "grad of B @ (A @ x)": spelling(lambda A, B, x, up: scaling * (B @ (A @ x)) @ up),
        "grad of linear(linear(x, A), B)": spelling(
            lambda A, B, x, up: (scaling * linear(linear(x, A), B) * up).sum()
        ),
        "grad of (A @ x) @ (up @ B)": spelling(lambda A, B, x, up: scaling * (A @ x) @ (up @ B)),
    }


def fisher() -> list[Contender]:
    data = inputs.make(SAMPLES, RANK)
    arrays = data.x, data.grad, data.A[0], data.B[0]
    values = reference.lora_fisher(*arrays, data.scaling)
    sizes = reference.lora_fisher(*map(np.abs, arrays), data.scaling)
    expected = [check.Expected(*pair) for pair in zip(values, sizes, strict=True)]
    x, grad, A, B = map(inputs.tensor, arrays)

    def contender(name: str, spellings: dict[str, Callable[[], tuple[Any, Any]]]) -> Contender:
        def verify() -> None:
            for spelling, call in spellings.items():
                for factor, got, want in zip("AB", call(), expected, strict=True):
                    check.require(f"{name}, {spelling}: F_{factor}", got, want)

        best = fastest(spellings)
        return Contender(name, spellings[best], verify, best)

    ours = {"lora_fisher": lambda: le.lora_fisher(x, grad, A, B, data.scaling)}
    return [
        contender(OURS, ours),
        contender(PER_SAMPLE, _per_sample(x, grad, A, B, data.scaling)),
    ]


_ARRAY = ELEMENTS * inputs.ITEM
_ROWS, _WEIGHTS = inputs.row_bytes(SAMPLES), inputs.weight_bytes(1, RANK)
CASES = (
    Case(
        "fisher_accumulate",
        "16M float32",
        accumulate,
        faster={IN_PLACE: 1.5},
        within=1.2,
        traffic=Traffic(_ARRAY, 2 * _ARRAY, 2 * _ARRAY, threads=0),
        flops=4 * ELEMENTS,
    ),
    Case(
        "lora_fisher",
        "4096, r=2, 256 samples",
        fisher,
        faster={PER_SAMPLE: 20.0},
        within=2.0,
        # The sums are as large as the weights, and only written.
        traffic=Traffic(2 * _ROWS + _WEIGHTS, _WEIGHTS, 2 * _ROWS + 2 * _WEIGHTS, threads=0),
        flops=8 * RANK * inputs.FEATURES * SAMPLES,
    ),
)
