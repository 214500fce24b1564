"""How many floating-point operations a second this machine makes: square matrix products of
the libraries that are there, none of ours. The best run of the best one is the rate."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from bench.case import Contender, absent
from bench.machine import best_seconds

SIZE = 1024


class FlopRate(NamedTuple):
    """dtype: of the operands; sums are float32. Operations a second, by how many threads."""

    dtype: str
    threads: int
    flops_per_s: float
    kernel: str


def _products(dtype: str, threads: int) -> Iterator[Contender]:
    if absent("torch"):
        if dtype == "float32":  # on as many threads as NumPy's BLAS takes
            a = np.ones((SIZE, SIZE), np.float32)
            out = np.empty_like(a)
            yield Contender("numpy matmul", lambda: np.matmul(a, a, out=out))
        return
    import torch

    t = torch.ones((SIZE, SIZE), dtype=getattr(torch, dtype))
    result = torch.empty_like(t)
    yield Contender("torch mm", lambda: torch.mm(t, t, out=result), torch_threads=threads)


def rates(threads: int) -> list[FlopRate]:
    """The rates of float32 and bfloat16 products, on one thread and on all."""
    found = []
    for dtype in ("float32", "bfloat16"):
        for count in sorted({1, threads}):
            for contender in _products(dtype, count):
                with contender.mode():
                    seconds = best_seconds(contender.call)
                found.append(FlopRate(dtype, count, 2.0 * SIZE**3 / seconds, contender.name))
    return found


def report(found: list[FlopRate]) -> list[dict[str, Any]]:
    """The rates in GFLOP/s, for the JSON."""
    return [
        {
            "dtype": r.dtype,
            "threads": r.threads,
            "gflop_s": round(r.flops_per_s / 1e9, 1),
            "kernel": r.kernel,
        }
        for r in found
    ]
