"""What the NF4 tests share: bitsandbytes' own layers, and a decoder of their bytes."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch

bitsandbytes = pytest.importorskip("bitsandbytes", reason="bitsandbytes has no wheel for this CPU")
# On such a CPU it computes in bfloat16 whatever is asked, and packs the weights anew.
bitsandbytes.nn.modules.has_avx512bf16 = lambda: False

STATE = ".quant_state.bitsandbytes__nf4"
NAME = "model.q_proj.weight"
STORAGES = ("uint8", "bfloat16", "float16", "float32")
BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
ROWS, COLS = (1, 2, 32, 33, 288), (16, 32, 64, 93, 96, 128, 1234, 4304)


def matrix(rows: int, cols: int, dtype: str = "float32", draw: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1000 * rows + cols + draw)
    return torch.randn(rows, cols, generator=generator).to(getattr(torch, dtype))


def state_dict(
    W: torch.Tensor, blocksize: int = 64, double_quant: bool = False, storage: str = "uint8"
) -> dict[str, torch.Tensor]:
    """What bitsandbytes' Linear4bit saves for W, under NAME."""
    layer = bitsandbytes.nn.Linear4bit(W.shape[1], W.shape[0], bias=False, quant_type="nf4")
    layer.weight = bitsandbytes.nn.Params4bit(
        W.clone(),
        requires_grad=False,
        blocksize=blocksize,
        compress_statistics=double_quant,
        quant_type="nf4",
        quant_storage=getattr(torch, storage),
        module=layer,
    )
    saved = layer.to("cpu").state_dict(prefix=NAME.removesuffix("weight"))
    return {name: torch.Tensor(t) if t.is_floating_point() else t for name, t in saved.items()}


def arrays(tensors: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    return {name: tensor.numpy() for name, tensor in tensors.items()}


def flat_bytes(tensor: Any) -> np.ndarray:
    if isinstance(tensor, torch.Tensor):
        tensor = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
    return np.ascontiguousarray(tensor).reshape(-1).view(np.uint8)


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    """Names in order, dtypes, shapes and bytes."""
    return list(a) == list(b) and all(
        str(a[k].dtype) == str(b[k].dtype)
        and tuple(a[k].shape) == tuple(b[k].shape)
        and flat_bytes(a[k]).tobytes() == flat_bytes(b[k]).tobytes()
        for k in a
    )


def about(tensors: dict[str, Any], name: str = NAME) -> dict[str, Any]:
    """The JSON of a matrix."""
    return dict(json.loads(flat_bytes(tensors[name + STATE]).tobytes()))


def decode(tensors: dict[str, Any], name: str = NAME) -> np.ndarray:
    """The matrix from its keys, element by element, as the format says. bitsandbytes'
    own decoding on a CPU is wrong where K % 16 == 0 and K is no multiple of the block."""
    said = about(tensors, name)
    rows, cols = said["shape"]
    i = np.arange(rows * cols)
    packed = flat_bytes(tensors[name])
    codes = flat_bytes(tensors[f"{name}.quant_map"]).view("f4")
    nibble = (packed[i // 2] >> np.where(i % 2 == 0, 4, 0)) & 15
    block = i // said["blocksize"]
    if "nested_offset" in said:
        table = flat_bytes(tensors[f"{name}.nested_quant_map"]).view("f4")
        nested = flat_bytes(tensors[f"{name}.nested_absmax"]).view("f4")
        scale = table[flat_bytes(tensors[f"{name}.absmax"])[block]] * nested[block // 256]
        scale = scale + np.float32(said["nested_offset"])
    else:
        scale = flat_bytes(tensors[f"{name}.absmax"]).view("f4")[block]
    assert scale.dtype == np.float32
    return (codes[nibble] * scale).reshape(rows, cols)
