"""Memory and parameters beside time: what one adapter, or one 4-bit matrix, costs to keep."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

import lora_engine as le
from bench.case import Contender, absent
from bench.inputs import FEATURES
from bench.paired import paired, spread

ADAPTERS = 64  # over which the bytes of a pool are averaged


def _pool(dtype: str, rank: int) -> tuple[str, int, int, Callable[[], Any]]:
    pool = le.AdapterPool(FEATURES, FEATURES, dtype=dtype)
    empty = pool.nbytes
    rng = np.random.default_rng(0)
    A = rng.standard_normal((rank, FEATURES), dtype=np.float32)
    B = rng.standard_normal((FEATURES, rank), dtype=np.float32)
    for _ in range(ADAPTERS):
        pool.add(A, B, 2.0)
    x = rng.standard_normal((1, FEATURES), dtype=np.float32)
    y, ids = np.empty_like(x), np.zeros(1, np.int32)
    label = f"LoRA r={rank}, {dtype}"
    size = (pool.nbytes - empty) // ADAPTERS

    def call() -> Any:
        return pool.forward(x, ids, out=y, accumulate=False)

    return label, 2 * rank * FEATURES, size, call


def _int8(rank: int) -> tuple[str, int, int, Callable[[], Any]]:
    rng = np.random.default_rng(0)
    A = rng.standard_normal((rank, FEATURES), dtype=np.float32)
    lora = le.Int8LoRA.from_weights(A, np.ascontiguousarray(A.T), 2.0)
    x = rng.standard_normal((1, FEATURES), dtype=np.float32)
    y = np.empty_like(x)
    return f"Int8LoRA r={rank}", 2 * rank * FEATURES, lora.nbytes, lambda: lora.forward(x, out=y)


def _vera(rank: int) -> tuple[str, int, int, Callable[[], Any]]:
    rng = np.random.default_rng(0)
    A = rng.standard_normal((rank, FEATURES), dtype=np.float32)
    vera = le.Vera({"q_proj": (FEATURES, FEATURES)}, rank, A=A, B=np.ascontiguousarray(A.T))
    b, d = vera.modules["q_proj"][:2]
    x = rng.standard_normal((1, FEATURES), dtype=np.float32)
    y = np.empty_like(x)
    shared = (vera.A.nbytes + vera.B.nbytes) / 1e6
    label = f"VeRA r={rank} (all share {shared:.0f} MB)"
    return label, b.size + d.size, b.nbytes + d.nbytes, lambda: vera.forward(x, "q_proj", out=y)


def _nf4(double_quant: bool) -> tuple[str, int, int, Callable[[], Any]]:
    rng = np.random.default_rng(0)
    W = rng.standard_normal((FEATURES, FEATURES), dtype=np.float32)
    w = le.nf4_quantize(W, double_quant=double_quant)
    x = rng.standard_normal((1, FEATURES), dtype=np.float32)
    y = np.empty_like(x)
    label = "NF4 4096x4096" + (", double quantisation" if double_quant else "")
    return label, FEATURES * FEATURES, w.nbytes, lambda: le.nf4_linear(x, w, out=y)


def _dense(dtype: str) -> tuple[str, int, int, Callable[[], Any]]:
    import torch

    W = torch.randn(FEATURES, FEATURES, dtype=getattr(torch, dtype))
    x = torch.randn(1, FEATURES, dtype=W.dtype)
    size = W.numel() * W.element_size()

    def call() -> Any:
        return torch.nn.functional.linear(x, W)

    return f"dense 4096x4096, torch {dtype}", W.numel(), size, call


def variants() -> Iterator[Callable[[], tuple[str, int, int, Callable[[], Any]]]]:
    """Builders of (name, parameters, bytes, one row's forward)."""
    for rank in (2, 16):
        for dtype in ("float32", "bfloat16", "float16"):
            yield lambda d=dtype, r=rank: _pool(d, r)  # type: ignore[misc]
    for rank in (2, 16):
        yield lambda r=rank: _int8(r)  # type: ignore[misc]
    yield lambda: _vera(256)
    yield lambda: _nf4(False)
    yield lambda: _nf4(True)
    if not absent("torch"):
        yield lambda: _dense("float32")
        yield lambda: _dense("bfloat16")


def measure(build: Callable[[], Any], rounds: int) -> dict[str, Any]:
    """One row of the table."""
    label, parameters, size, call = build()
    times = paired([Contender(label, call, inference="torch" in label)], rounds, budget=2.0).times
    return {
        "variant": label,
        "parameters": parameters,
        "bytes": size,
        "bits_per_parameter": round(8 * size / parameters, 2),
        "forward_us": round(spread(times[label]).median * 1e6, 3),
    }
