"""Memory and parameters beside time: what one adapter, or one 4-bit matrix, costs to keep."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np

import lora_engine as le
from bench import check
from bench.case import Contender
from bench.inputs import FEATURES
from bench.paired import paired, spread
from lora_engine import reference

ADAPTERS = 64  # over which the bytes of a pool are averaged
TOLERANCE = 1e-6  # x and y are float32, and weights are taken as they are stored


class Built(NamedTuple):
    """parameters, and the bytes that keep them; call: one row's forward, [1, out]; expected: what
    it gives by the reference, from the weights as they are stored."""

    parameters: int
    bytes: int
    call: Callable[[], Any]
    expected: check.Expected
    inference: bool = False


class Variant(NamedTuple):
    name: str
    build: Callable[[], Built]


def _normal(*shape: int) -> Any:
    return np.random.default_rng(shape[0]).standard_normal(shape, dtype=np.float32)


def _delta(x: Any, A: Any, B: Any, scaling: float) -> check.Expected:
    values = reference.lora_delta(x, A, B, scaling)
    magnitude = reference.lora_delta(np.abs(x), np.abs(A), np.abs(B), abs(scaling))
    return check.Expected(values, magnitude, TOLERANCE)


def _product(x: Any, W: Any, tolerance: float = TOLERANCE) -> check.Expected:
    return check.Expected(reference.nf4_linear(x, W), np.abs(x) @ np.abs(W).T, tolerance)


def _pool(dtype: str, rank: int) -> Built:
    pool = le.AdapterPool(FEATURES, FEATURES, dtype=dtype)
    empty = pool.nbytes
    A, B, x = _normal(rank, FEATURES), _normal(FEATURES, rank), _normal(1, FEATURES)
    for _ in range(ADAPTERS):
        pool.add(A, B, 2.0)
    y, ids = np.empty_like(x), np.zeros(1, np.int32)
    stored = [np.asarray(_float32(m)) for m in pool.get(0)[:2]]
    return Built(
        2 * rank * FEATURES,
        (pool.nbytes - empty) // ADAPTERS,
        lambda: pool.forward(x, ids, out=y, accumulate=False),
        _delta(x, *stored, 2.0),
    )


def _float32(array: Any) -> Any:
    return array.float().numpy() if hasattr(array, "detach") else array.astype(np.float32)


def _int8(rank: int) -> Built:
    lora = le.Int8LoRA.from_weights(_normal(rank, FEATURES), _normal(FEATURES, rank), 2.0)
    x = _normal(1, FEATURES)
    y = np.empty_like(x)
    return Built(
        2 * rank * FEATURES,
        lora.nbytes,
        lambda: lora.forward(x, out=y),
        _delta(x, *lora.dequantize()),
    )


def _vera(rank: int) -> Built:
    A, B, x = _normal(rank, FEATURES), _normal(FEATURES, rank), _normal(1, FEATURES)
    vera = le.Vera({"q_proj": (FEATURES, FEATURES)}, rank, A=A, B=B)
    vera.set_vectors("q_proj", np.linspace(-1, 1, FEATURES), np.linspace(-1, 1, rank))
    b, d = vera.modules["q_proj"][:2]
    y = np.empty_like(x)
    return Built(
        b.size + d.size,
        b.nbytes + d.nbytes,
        lambda: vera.forward(x, "q_proj", out=y),
        _delta(x, *vera.weights("q_proj")),
    )


def _nf4(double_quant: bool) -> Built:
    w = le.nf4_quantize(_normal(FEATURES, FEATURES), double_quant=double_quant)
    x = _normal(1, FEATURES)
    y = np.empty_like(x)
    return Built(
        FEATURES * FEATURES,
        w.nbytes,
        lambda: le.nf4_linear(x, w, out=y),
        _product(x, w.to_float()),
    )


def _dense(dtype: str) -> Built:
    import torch

    W = torch.randn(FEATURES, FEATURES, dtype=getattr(torch, dtype))
    x = torch.randn(1, FEATURES, dtype=W.dtype)
    expected = _product(x.float().numpy(), W.float().numpy(), 4e-3 if dtype == "bfloat16" else 1e-5)
    size = W.numel() * W.element_size()
    return Built(W.numel(), size, lambda: torch.nn.functional.linear(x, W).float(), expected, True)


VARIANTS = (
    *(
        Variant(f"LoRA r={rank}, {dtype}", partial(_pool, dtype, rank))
        for rank in (2, 16)
        for dtype in ("float32", "bfloat16", "float16")
    ),
    *(Variant(f"Int8LoRA r={rank}", partial(_int8, rank)) for rank in (2, 16)),
    Variant("VeRA r=256 (all modules share 8 MB)", partial(_vera, 256)),
    Variant("NF4 4096x4096", partial(_nf4, False)),
    Variant("NF4 4096x4096, double quantisation", partial(_nf4, True)),
    Variant("dense 4096x4096, torch float32", partial(_dense, "float32")),
    Variant("dense 4096x4096, torch bfloat16", partial(_dense, "bfloat16")),
)


def measure(variant: Variant, rounds: int) -> dict[str, Any]:
    """One row of the table. Raises AssertionError where the output is wrong."""
    built = variant.build()
    contender = Contender(variant.name, built.call, inference=built.inference)
    with contender.mode():
        check.require(variant.name, built.call(), built.expected)
    times = paired([contender], rounds, budget=2.0).times
    return {
        "variant": variant.name,
        "parameters": built.parameters,
        "bytes": built.bytes,
        "bits_per_parameter": round(8 * built.bytes / built.parameters, 2),
        "forward_us": round(spread(times[variant.name]).median * 1e6, 3),
    }
