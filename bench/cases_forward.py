"""One row: NumPy against NumPy, torch against torch eager and PEFT, and as an op of torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

import lora_engine as le
from bench import check, deltas, inputs
from bench.case import OURS, Case, Contender, Traffic, peer

RANK = 2
MODULE = "q_proj"
TRANSPOSED_NUMPY = "NumPy, B stored as Bᵀ"
TRANSPOSED_TORCH = "torch, B stored as Bᵀ"
DIRECT = "le.lora_delta"


def numpy_spellings(data: inputs.Inputs) -> dict[str, Callable[[], Any]]:
    x, A, B, s = data.x[0], data.A[0], data.B[0], data.scaling
    h, y = np.empty(RANK, np.float32), np.empty_like(x)

    def plain() -> Any:
        return (x @ A.T) @ B.T * s

    def small_scale() -> Any:
        return (x @ A.T * s) @ B.T

    def preallocated() -> Any:
        np.matmul(A, x, out=h)
        np.multiply(h, s, out=h)
        return np.matmul(B, h, out=y)

    return {
        "(x @ A.T) @ B.T * s": plain,
        "(x @ A.T * s) @ B.T": small_scale,
        "matmul(out=)": preallocated,
    }


def numpy_transposed(data: inputs.Inputs) -> dict[str, Callable[[], Any]]:
    """With B kept as Bᵀ [r, out], which suits BLAS and is not how adapters come."""
    x, A, Bt, s = data.x[0], data.A[0], np.ascontiguousarray(data.B[0].T), data.scaling
    h, y = np.empty(RANK, np.float32), np.empty_like(x)

    def preallocated() -> Any:
        np.matmul(A, x, out=h)
        np.multiply(h, s, out=h)
        return np.matmul(h, Bt, out=y)

    return {"(x @ A.T * s) @ Bt": lambda: (x @ A.T * s) @ Bt, "matmul(out=)": preallocated}


def torch_spellings(data: inputs.Inputs) -> dict[str, Callable[[], Any]]:
    import torch
    from torch.nn.functional import linear

    x, A, B = inputs.tensor(data.x[0]), inputs.tensor(data.A[0]), inputs.tensor(data.B[0])
    s = data.scaling
    h, y = torch.empty(RANK), torch.empty(inputs.FEATURES)

    def linears() -> Any:
        return linear(linear(x, A), B) * s

    def matmuls() -> Any:
        return (x @ A.T) @ B.T * s

    def small_scale() -> Any:
        return (x @ A.T * s) @ B.T

    def preallocated() -> Any:
        torch.mv(A, x, out=h)
        return torch.mv(B, h.mul_(s), out=y)

    def fused_scale() -> Any:
        torch.mv(A, x, out=h)
        return torch.addmv(y, B, h, beta=0, alpha=s, out=y)

    return {
        "F.linear twice": linears,
        "(x @ A.T) @ B.T * s": matmuls,
        "(x @ A.T * s) @ B.T": small_scale,
        "mv(out=)": preallocated,
        "addmv(out=)": fused_scale,
    }


def torch_transposed(data: inputs.Inputs) -> dict[str, Callable[[], Any]]:
    """As ``numpy_transposed``."""
    import torch

    x, A = inputs.tensor(data.x[0]), inputs.tensor(data.A[0])
    Bt, s = inputs.tensor(data.B[0]).t().contiguous(), data.scaling
    h, y = torch.empty(RANK), torch.empty(inputs.FEATURES)

    def preallocated() -> Any:
        torch.mv(A, x, out=h)
        return torch.addmv(y, Bt.t(), h, beta=0, alpha=s, out=y)

    return {"(x @ A.T * s) @ Bt": lambda: (x @ A.T * s) @ Bt, "addmv(out=)": preallocated}


def peft_layer(data: inputs.Inputs) -> dict[str, Callable[[], Any]]:
    """The part of PEFT's layer that is not the base layer: dropout, A, B, scale."""
    import peft
    import torch

    linear = torch.nn.utils.skip_init(torch.nn.Linear, inputs.FEATURES, inputs.FEATURES, bias=False)
    config = peft.LoraConfig(
        r=RANK, lora_alpha=int(data.scaling * RANK), target_modules=[MODULE], lora_dropout=0.0
    )
    model = peft.inject_adapter_in_model(config, torch.nn.ModuleDict({MODULE: linear}))
    layer: Any = model.get_submodule(MODULE).requires_grad_(False).eval()
    layer.lora_A["default"].weight.copy_(inputs.tensor(data.A[0]))
    layer.lora_B["default"].weight.copy_(inputs.tensor(data.B[0]))
    name, x = "default", inputs.tensor(data.x[0])

    def call() -> Any:
        h = layer.lora_A[name](layer.lora_dropout[name](x))
        return layer.lora_B[name](h) * layer.scaling[name]

    return {"lora_B(lora_A(dropout(x))) * scaling": call}


def numpy_case() -> list[Contender]:
    data = inputs.make(1, RANK)
    expected = check.delta(data, accumulate=False)
    lora = inputs.make_lora(data, MODULE)
    x, y = data.x[0], np.empty_like(data.x[0])
    return [
        deltas.contender(
            OURS,
            {"forward(out=)": lambda: lora.forward(x, MODULE, out=y)},
            expected,
            reset=lambda: y.fill(np.nan),
        ),
        deltas.contender("NumPy", numpy_spellings(data), expected),
        deltas.contender(TRANSPOSED_NUMPY, numpy_transposed(data), expected),
    ]


def torch_case() -> list[Contender]:
    import torch

    data = inputs.make(1, RANK)
    expected = check.delta(data, accumulate=False)
    lora = inputs.make_lora(data, MODULE)
    x, y = inputs.tensor(data.x[0]), torch.empty(inputs.FEATURES)

    def ours() -> Any:
        return lora.forward(x, MODULE, out=y)

    def with_peer(name: str, spellings: Any) -> Contender:
        return deltas.contender(name, spellings(data), expected, inference=True)

    return [
        deltas.contender(
            OURS, {"forward(out=)": ours}, expected, lambda: y.fill_(np.nan), inference=True
        ),
        with_peer("torch eager", torch_spellings),
        with_peer(TRANSPOSED_TORCH, torch_transposed),
        peer("PEFT's layer", "peft", lambda: with_peer("PEFT's layer", peft_layer)),
    ]


def op_case() -> list[Contender]:
    """``torch.ops.lora_engine.lora_delta``: torch's dispatcher and a new output come on top."""
    import torch

    import lora_engine.torch_ops  # noqa: F401  defines the op

    data = inputs.make(1, RANK)
    expected = check.delta(data, accumulate=False)
    x, A, s = inputs.tensor(data.x), inputs.tensor(data.A[0]), data.scaling
    B = inputs.tensor(data.B[0])

    def contender(name: str, spellings: dict[str, Callable[[], Any]]) -> Contender:
        return deltas.contender(name, spellings, expected, inference=True)

    op = torch.ops.lora_engine.lora_delta

    return [
        contender(OURS, {"torch.ops": lambda: op(x, A, B, s)}),
        contender("torch eager", torch_spellings(data)),
        contender(TRANSPOSED_TORCH, torch_transposed(data)),
        contender(DIRECT, {"le.lora_delta(x, A, B, s)": lambda: le.lora_delta(x, A, B, s)}),
    ]


_TRAFFIC = Traffic(
    read=inputs.weight_bytes(1, RANK) + inputs.row_bytes(1),
    changed=inputs.row_bytes(1),  # y is overwritten
    footprint=inputs.weight_bytes(1, RANK) + 2 * inputs.row_bytes(1),
    threads=1,
)
CASES = (
    Case(
        "lora.forward(x, m, out=y), NumPy",
        "4096, r=2, one row",
        numpy_case,
        faster={"NumPy": 2.5, TRANSPOSED_NUMPY: None},
        traffic=_TRAFFIC,
        flops=4 * RANK * inputs.FEATURES,
    ),
    Case(
        "lora.forward(x, m, out=y), torch",
        "4096, r=2, one row",
        torch_case,
        faster={"torch eager": 3.5, TRANSPOSED_TORCH: None, "PEFT's layer": 3.5},
        traffic=_TRAFFIC,
        flops=4 * RANK * inputs.FEATURES,
    ),
    Case(
        "torch.ops.lora_engine.lora_delta",
        "4096, r=2, one row",
        op_case,
        # The aim is 4 us where torch eager takes 7.3.
        faster={"torch eager": 1.8, TRANSPOSED_TORCH: None, DIRECT: None},
        traffic=_TRAFFIC,
        flops=4 * RANK * inputs.FEATURES,
    ),
)
