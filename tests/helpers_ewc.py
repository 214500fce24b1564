"""What the tests of EWC share: pools to learn in, and its formulas written out."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from helpers import f64, fill_pool

from lora_engine import reference
from lora_engine.backends import chosen

FORMS = ("factor", "delta")
BACKENDS = ["reference", "cpu"]


@pytest.fixture(scope="module", params=BACKENDS)
def ewc_backend(request):
    """Runs a module's tests on the backends whose records can be read."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LORA_ENGINE_BACKEND", request.param)
        chosen.cache_clear()
        yield request.param
    chosen.cache_clear()


def samples(rng: np.random.Generator, n: int, width: int, out: int) -> tuple[Any, Any]:
    """x [n, width] and grad [n, out] of samples that are not alike."""
    scale = rng.uniform(0.3, 3.0, (n, 1))
    return (
        (scale * rng.standard_normal((n, width))).astype("f4"),
        (rng.standard_normal((n, out)) / scale).astype("f4"),
    )


def average(parts: list[np.ndarray], horizon: int) -> np.ndarray:
    """sum d^(n-1-i) q_i (1-d) / (1-dⁿ): the moving average over its own start's correction."""
    decay, mean = 1 - 1 / horizon, np.zeros_like(f64(parts[0]))
    for part in parts:
        mean = decay * mean + (1 - decay) * f64(part)
    return mean / (1 - decay ** len(parts))


def one_sample(form: str, adapter: Any, slices: Any, x: Any, grad: Any) -> tuple[list, list]:
    """What one row says, by slice: (F_A, F_B), or (u, v)."""
    first, second, at = [], [], 0
    for A, B, out in zip(adapter.A, adapter.B, slices, strict=True):
        up = grad[None, at : at + out]
        at += out
        pair: Any = (None, None)
        if A is not None and form == "factor":
            pair = reference.lora_fisher(x[None], up, A, B, adapter.scaling)
        elif A is not None:
            pair = reference.lora_fisher_factors(x[None], up)
        first.append(pair[0])
        second.append(pair[1])
    return first, second


def expected(
    form: str, adapter: Any, slices: Any, x: Any, grad: Any, horizon: int
) -> tuple[list, list]:
    """The average over rows, by slice."""
    rows = [one_sample(form, adapter, slices, *row) for row in zip(x, grad, strict=True)]
    return tuple(  # type: ignore[return-value]
        [
            None if rows[0][i][s] is None else average([r[i][s] for r in rows], horizon)
            for s in range(len(slices))
        ]
        for i in (0, 1)
    )


def matrix_of(form: str, first: Any, second: Any) -> list[np.ndarray]:
    """What a record stands for, by slice: F of A and of B in one, or u vᵀ."""
    if form == "delta":
        return [np.outer(f64(u), f64(v)) for u, v in zip(first, second, strict=True)]
    return [
        np.concatenate([f64(a).ravel(), f64(b).ravel()]) for a, b in zip(first, second, strict=True)
    ]


def close(got: Any, want: Any, tolerance: float = 3e-6) -> bool:
    return all(
        np.linalg.norm(f64(g) - f64(w)) <= tolerance * np.linalg.norm(f64(w))
        for g, w in zip(got, want, strict=True)
    )


def record(ewc: Any, slot: int) -> tuple[Any, Any, Any, Any]:
    """A slot's record: Fisher information and anchors, by slice."""
    found = ewc._pools[ewc.target]._storage.get(slot)
    return tuple(list(part) for part in found)  # type: ignore[return-value]


def small_pool(seed: int = 0, slots: int = 3, **options: Any) -> Any:
    return fill_pool(np.random.default_rng(seed), 12, (7,), [2] * slots, **options)
