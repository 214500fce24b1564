"""Pools and tensors for the tests of ``torch.ops.lora_engine``."""

from __future__ import annotations

import numpy as np
import torch
from helpers import fill_pool

import lora_engine.torch_ops  # noqa: F401  defines the ops

OPS = torch.ops.lora_engine
IN, OUT = 17, 9


def random(*shape, grad=False, seed=0):
    rng = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=rng).requires_grad_(grad)


def slots(*values):
    return torch.tensor(values, dtype=torch.int32)


def new_pool(ranks=(1, 3), out=OUT, seed=1, **options):
    return fill_pool(np.random.default_rng(seed), IN, (out,), list(ranks), **options).pool


IDS = slots(0, -1, 1, 0, 1)
