"""The data that every contender of a case is given."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

import lora_engine as le

F32 = NDArray[np.float32]
FEATURES = 4096
ITEM = 4  # bytes of a float32


class Inputs(NamedTuple):
    """n rows, each with an adapter of its own: A [n, r, in], B [n, out, r], ids a permutation."""

    x: F32
    grad: F32
    y: F32
    A: F32
    B: F32
    scaling: float
    ids: NDArray[np.int32]

    @property
    def features(self) -> int:
        return int(self.x.shape[1])


def weight_bytes(rows: int, rank: int) -> int:
    """Bytes of the weights of ``make(rows, rank)``."""
    return rows * 2 * rank * FEATURES * ITEM


def row_bytes(rows: int) -> int:
    """Bytes of x, of grad or of y."""
    return rows * FEATURES * ITEM


def make(rows: int, rank: int, seed: int = 0, features: int = FEATURES) -> Inputs:
    """Random inputs, float32."""
    rng = np.random.default_rng(seed)

    def normal(*shape: int) -> F32:
        return rng.standard_normal(shape, dtype=np.float32)

    return Inputs(
        x=normal(rows, features),
        grad=normal(rows, features) * np.float32(0.01),
        y=normal(rows, features),
        A=normal(rows, rank, features) * np.float32(0.01),
        B=normal(rows, features, rank) * np.float32(0.02),
        scaling=2.0,
        ids=rng.permutation(rows).astype(np.int32),
    )


def make_pool(data: Inputs) -> le.AdapterPool:
    """A pool that holds adapter i in slot i."""
    pool = le.AdapterPool(data.features, data.features)
    for slot, (A, B) in enumerate(zip(data.A, data.B, strict=True)):
        assert pool.add(A, B, data.scaling) == slot
    return pool


def make_lora(data: Inputs, module: str) -> le.MicroLoRA:
    """A MicroLoRA whose module holds adapter 0."""
    rank = data.A.shape[1]
    config = le.MicroLoRAConfig(
        data.features, data.features, rank=rank, alpha=data.scaling * rank, target_modules=(module,)
    )
    lora = le.MicroLoRA(config)
    lora.set_weights(module, data.A[0], data.B[0])
    return lora


def tensor(array: NDArray[Any]) -> Any:
    """A torch tensor of its own with the array's values."""
    import torch

    return torch.from_numpy(array.copy())
