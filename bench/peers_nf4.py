"""What others do with the same packed bytes: bitsandbytes, onnxruntime, dense torch."""

from __future__ import annotations

from collections.abc import Callable
from itertools import cycle
from typing import Any

from bench.case import absent
from lora_engine import NF4Tensor

BITSANDBYTES = "bitsandbytes"
PACKED = "bitsandbytes packed (AVX512-BF16)"
ONNXRUNTIME = "onnxruntime MatMulBnb4"


def rotating(calls: list[Callable[[], Any]]) -> Callable[[], Any]:
    """Calls one after the other, and again from the first."""
    if len(calls) == 1:
        return calls[0]
    turn = cycle(calls)
    return lambda: next(turn)()


def dense(W: Any, x: Any, copies: int) -> Callable[[], Any]:
    """torch's linear on the dequantised matrix, in x's dtype."""
    import torch

    out = torch.empty(len(x), len(W), dtype=x.dtype)
    weights = [W.to(x.dtype, copy=True).t() for _ in range(copies)]
    return rotating([lambda w=w: torch.mm(x, w, out=out) for w in weights])  # type: ignore[misc]


def packed_missing() -> str:
    """Why bitsandbytes' packed path cannot run here, or ""."""
    if why := absent("bitsandbytes"):
        return why
    import torch

    there = torch.cpu._is_avx512_bf16_supported()
    return "" if there else "this CPU has no AVX512-BF16"


def bitsandbytes(w: NF4Tensor, x: Any, packed: bool) -> Callable[[], Any]:
    """bitsandbytes' Linear4bit on the same bytes."""
    import torch
    from bitsandbytes.nn import Linear4bit, Params4bit

    rows, cols = w.shape
    layer = Linear4bit(cols, rows, bias=False, compute_dtype=x.dtype, quant_type="nf4")
    state = {
        name: torch.from_numpy(value.copy()) for name, value in w.to_bitsandbytes("weight").items()
    }
    stored = state.pop("weight")
    layer.weight = Params4bit.from_prequantized(stored, state, device="cpu")
    layer.eval() if packed else layer.train()
    return lambda: layer(x)


def onnxruntime(w: NF4Tensor, x: Any, threads: int) -> Callable[[], Any]:
    """onnxruntime's MatMulBnb4 on the same bytes, float32."""
    from onnx import TensorProto, helper, numpy_helper
    from onnxruntime import InferenceSession, SessionOptions

    rows, cols = w.shape
    parts = {name: numpy_helper.np.asarray(a) for name, a in w.to_bitsandbytes("w").items()}
    node = helper.make_node(
        "MatMulBnb4", ["x", "codes", "absmax"], ["y"], domain="com.microsoft",
        K=cols, N=rows, block_size=w.blocksize, quant_type=1,
    )  # fmt: skip
    graph = helper.make_graph(
        [node],
        "nf4_linear",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", cols])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", rows])],
        [
            numpy_helper.from_array(parts["w"].reshape(-1), "codes"),
            numpy_helper.from_array(parts["w.absmax"], "absmax"),
        ],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=9)
    options = SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    feed = {"x": x.numpy()}
    return lambda: session.run(None, feed)[0]
