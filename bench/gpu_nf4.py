"""Contenders of the NF4 ops, 4096 x 4096 in blocks of 64."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch

import lora_engine as le
from bench import gpu_check as check
from bench.gpu_adapters import SCALING, normal, pool_of, rows
from bench.gpu_case import DEVICE, FEATURES, Timed, peer
from lora_engine.kernels import nf4 as kernels

RANK = 16


class Matrices:
    """Packed matrices, a set each, with rows x, grad and outputs y; dense ones where asked for."""

    def __init__(self, n: int, sets: int, dtype: torch.dtype) -> None:
        torch.manual_seed(0)
        W = [normal(FEATURES, FEATURES, scale=0.02) for _ in range(sets)]
        self.w = [le.nf4_quantize(w) for w in W]
        self.x = [normal(n, FEATURES, dtype=dtype) for _ in self.w]
        self.y = [torch.empty_like(x) for x in self.x]
        self.each, self.dtype = range(sets), dtype

    @cached_property
    def dense(self) -> list[torch.Tensor]:
        made = [torch.empty(FEATURES, FEATURES, dtype=self.dtype, device=DEVICE) for _ in self.w]
        for w, to in zip(self.w, made, strict=True):
            le.nf4_dequantize(w, out=to)
        return made


def matrices(n: int, dtype: torch.dtype = torch.bfloat16) -> Callable[[int], Matrices]:
    return lambda sets: Matrices(n, sets, dtype)


def _products(
    what: str,
    data: Matrices,
    calls: list[Callable[[], Any]],
    transposed: bool = False,
    y: dict[int, torch.Tensor] | None = None,
) -> Timed:
    """Calls that overwrite ``data.y`` with x Wᵀ, or with x W; or put new tensors into ``y``."""
    W = torch.as_tensor(data.w[0].to_float()).to(DEVICE).double()
    W = W if transposed else W.T
    x = data.x[0].double()
    # bfloat16 rounds each weight of a dense matrix, too.
    want, magnitude = x @ W, x.abs() @ W.abs()

    made = {0: data.y[0]} if y is None else y

    def right(run: Callable[[], Any]) -> None:
        if 0 in made:
            made[0].fill_(float("nan"))
        run()
        check.require(what, made[0], want, magnitude, check.TOLERANCE[data.dtype])

    return Timed(calls, right)


def linear_ours(data: Matrices) -> Timed:
    calls = [lambda i=i: le.nf4_linear(data.x[i], data.w[i], out=data.y[i]) for i in data.each]
    return _products("lora_engine", data, calls)


def linear_dense(data: Matrices) -> Timed:
    weights = [w.T for w in data.dense]
    calls = [lambda i=i: torch.mm(data.x[i], weights[i], out=data.y[i]) for i in data.each]
    return _products("dense torch", data, calls)


def linear_bitsandbytes(data: Matrices) -> Timed:
    nn = peer("bitsandbytes.nn")

    def layer(w: le.NF4Tensor) -> Any:
        made = nn.Linear4bit(
            FEATURES, FEATURES, bias=False, compute_dtype=data.dtype, quant_type="nf4"
        )
        parts = {k: torch.as_tensor(v).clone() for k, v in w.to_bitsandbytes("weight").items()}
        stored = parts.pop("weight")
        made.weight = nn.Params4bit.from_prequantized(stored, parts, device=DEVICE)
        return made.eval()

    layers = [layer(w) for w in data.w]
    y: dict[int, torch.Tensor] = {}  # as returned: a copy would be one more kernel to time

    def call(i: int) -> None:
        y[i] = layers[i](data.x[i])

    return _products("bitsandbytes", data, [lambda i=i: call(i) for i in data.each], y=y)


def linear_with_adapters(data: Matrices) -> Timed:
    """Eight rows or more, each eighth on an adapter of its own."""
    n = len(data.x[0])
    adapters = rows(n, 8, RANK, data.dtype)(len(data.w))
    pool = pool_of(adapters)
    W = torch.as_tensor(data.w[0].to_float()).to(DEVICE).double().T
    x = data.x[0].double()
    want = x @ W + check.delta(data.x[0], adapters.A, adapters.B, adapters.ids[0], SCALING)
    magnitude = x.abs() @ W.abs()

    def right(run: Callable[[], Any]) -> None:
        data.y[0].fill_(float("nan"))
        run()
        check.require("lora_engine", data.y[0], want, magnitude, check.TOLERANCE[data.dtype])

    calls = [
        lambda i=i: le.nf4_linear(
            data.x[i], data.w[i], pool=pool, ids=adapters.ids[i], out=data.y[i]
        )
        for i in data.each
    ]
    return Timed(calls, right)


def backward_ours(data: Matrices) -> Timed:
    from lora_engine.backends import triton

    packed = [w.storage(triton) for w in data.w]
    calls = [
        lambda i=i: triton.nf4_linear_backward(data.x[i], packed[i], data.y[i]) for i in data.each
    ]
    return _products("lora_engine", data, calls, transposed=True)


def backward_dense(data: Matrices) -> Timed:
    calls = [lambda i=i: torch.mm(data.x[i], data.dense[i], out=data.y[i]) for i in data.each]
    return _products("dense torch", data, calls, transposed=True)


# ---- the format ----


def _decoded(what: str, data: Matrices, call: Callable[[int, Any], Any]) -> Timed:
    """Calls that write a dense matrix of their own."""
    outs = [torch.empty(FEATURES, FEATURES, dtype=data.dtype, device=DEVICE) for _ in data.w]
    want = torch.as_tensor(data.w[0].to_float()).to(DEVICE).to(data.dtype)

    def right(run: Callable[[], Any]) -> None:
        outs[0].fill_(float("nan"))
        run()
        if not torch.equal(outs[0], want):
            raise AssertionError(f"{what}: other bits than the reference's")

    return Timed([lambda i=i: call(i, outs[i]) for i in data.each], right)


def dequantize_ours(data: Matrices) -> Timed:
    return _decoded("lora_engine", data, lambda i, to: le.nf4_dequantize(data.w[i], out=to))


def dequantize_torch(data: Matrices) -> Timed:
    """Both nibbles looked up in a table, times the absmax of their blocks."""
    from lora_engine.backends import triton

    packed = [w.storage(triton).on(data.x[0].device) for w in data.w]
    codes = packed[0].table[:16]

    def call(i: int, to: torch.Tensor) -> None:
        p = packed[i]
        pairs = torch.stack((p.codes >> 4, p.codes & 15), -1).view(-1, 1 << p.shift)
        to.copy_((codes[pairs.int()] * p.scales[:, None]).view(p.rows, p.cols))

    return _decoded("torch eager", data, call)


def quantize_ours(data: Matrices) -> Timed:
    """The kernels alone: the public op copies its result to the host."""
    W = [normal(FEATURES, FEATURES, scale=0.02) for _ in data.w]
    packed = [torch.empty(FEATURES**2 // 2, dtype=torch.uint8, device=DEVICE) for _ in W]
    absmax = [torch.empty(FEATURES**2 // 64, device=DEVICE) for _ in W]
    on_host = le.nf4_quantize(W[0].cpu()).to_bitsandbytes("w")["w"]
    want = torch.as_tensor(on_host).to(DEVICE).view(-1)

    def right(run: Callable[[], Any]) -> None:
        packed[0].zero_()
        run()
        if not torch.equal(packed[0], want):
            raise AssertionError("lora_engine: other bytes than the C++ core's")

    calls = [lambda i=i: kernels.quantise(W[i], 64, packed[i], absmax[i]) for i in data.each]
    return Timed(calls, right)
