"""What the tests of Sona share: a small one, taught by several sessions."""

from __future__ import annotations

import numpy as np
from helpers import f64

import lora_engine as le

IN, OUT = 12, 7


def config(**changes):
    micro = le.MicroLoRAConfig(IN, OUT, rank=2, alpha=4.0, target_modules=("q",))
    options = {"instant_lr": 0.05, "background_min_samples": 1, "background_interval_ms": 0.0}
    return le.SonaConfig(**{"micro_lora": micro, **options, **changes})


def row(seed, width=IN, n=None):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((n, width) if n else width).astype(np.float32)


def taught(sona, sessions=3, samples=150, scale=0.3):
    """Every session learns toward a map of its own; the same for all with scale 0."""
    shared = np.outer(row(99, OUT), row(98)).astype(np.float64) * 0.3
    for s in range(sessions):
        own = shared + scale * np.outer(row(s, OUT), row(s + 50)) * 0.3
        for i in range(samples):
            x = row(1000 * s + i)
            y = (own @ x).astype(np.float32)
            result = sona.instant_adapt(x, le.Feedback.from_target(y), session=s)
            assert result.applied, result.note
    return shared


def served(sona, session=None, seed=7, n=5):
    return f64(sona.forward(row(seed, n=n), session=session))


def module(sona):
    return sona._modules["q"]


def samples_of(matrix, n=60, quality=0.9, seed=0):
    return [le.TrainingSample(x, (matrix @ x).astype(np.float32), quality) for x in row(seed, n=n)]
