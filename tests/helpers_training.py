"""What the tests of TrainingPipeline share: a pipeline that has begun, drawn samples."""

from __future__ import annotations

from typing import Any

import numpy as np
from helpers_files import trained

import lora_engine as le

TARGET = le.Feedback.from_target


def started(
    lora: le.MicroLoRA | None = None, **config: Any
) -> tuple[le.MicroLoRA, le.TrainingPipeline]:
    lora = lora or trained(7, 5, rank=2)
    pipe = le.TrainingPipeline(le.TrainingConfig(**config))
    pipe.init_for_lora(lora)
    return lora, pipe


def drawn(count: int, seed: int = 0, d_in: int = 7, d_out: int = 5) -> list[Any]:
    rng = np.random.default_rng(seed)
    return [
        (rng.standard_normal(d_in, dtype="f4"), rng.standard_normal(d_out, dtype="f4"))
        for _ in range(count)
    ]


def samples(count: int, seed: int = 0, quality: float | None = None) -> list[le.TrainingSample]:
    """Samples for the module of ``started``, of drawn qualities from 0.5 on unless given."""
    rng = np.random.default_rng([2, seed])
    drawn_quality = rng.uniform(0.5, 1.0, count)
    return [
        le.TrainingSample(x, y, float(q) if quality is None else quality)
        for (x, y), q in zip(drawn(count, seed), drawn_quality, strict=True)
    ]
