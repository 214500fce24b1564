"""The weights of an adapter that has learned nothing."""

from __future__ import annotations

import math

import numpy as np

from lora_engine.adapters.adapter import Array


def weights(
    rng: np.random.Generator, rank: int, in_features: int, out_features: int
) -> tuple[Array, Array]:
    """A [r, in] Kaiming-uniform (a = sqrt 5, as PEFT's), B [out, r] zero: its delta is zero."""
    bound = 1.0 / math.sqrt(in_features)
    A = rng.uniform(-bound, bound, (rank, in_features)).astype(np.float32)
    return A, np.zeros((out_features, rank), np.float32)
