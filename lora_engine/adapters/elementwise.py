"""Merging by elements: trimming, dropping, electing signs. NumPy float arrays of one shape."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]


def least_kept(magnitudes: Floats, density: float) -> float:
    """The smallest magnitude among the int(density n) largest of n; reorders ``magnitudes``."""
    flat = magnitudes.reshape(-1)
    kept = int(density * flat.size)
    if kept == 0:
        return float("inf")
    flat.partition(flat.size - kept)
    return float(flat[flat.size - kept])


def trim(x: Floats, density: float) -> Floats:
    """x with all but its int(density n) largest magnitudes at 0 (TIES: Yadav et al. 2023).

    Magnitudes equal to the smallest that is kept are kept too.
    """
    return x if density >= 1 else np.where(np.abs(x) >= least_kept(np.abs(x), density), x, 0)


def drop(x: Floats, density: float, rng: np.random.Generator) -> Floats:
    """Each element kept with probability density, over density, else 0 (DARE: Yu et al. 2024)."""
    if density >= 1:
        return x
    kept = rng.random(x.shape, np.float32) < np.float32(density)
    return np.where(kept, x / np.float32(density), np.float32(0))


def weighted_sum(tensors: Sequence[Floats], weights: Sequence[float]) -> Floats:
    """sum_i w_i t_i (task arithmetic: Ilharco et al. 2023)."""
    total = np.zeros(tensors[0].shape, np.float64)
    for tensor, weight in zip(tensors, weights, strict=True):
        total += weight * tensor.astype(np.float64)
    return total.astype(np.float32)


def elected_mean(tensors: Sequence[Floats], weights: Sequence[float], majority: str) -> Floats:
    """Elect a sign for each element, then average what agrees with it (TIES).

    The sign is that of sum_i sign(w_i) t_i ("total") or of sum_i sign(w_i t_i) ("frequency"),
    0 counting as +; the mean is over the tensors that have the sign, of w_i t_i.
    """
    votes = np.zeros(tensors[0].shape, np.float32)
    for t, w in zip(tensors, weights, strict=True):
        votes += np.sign(w) * (np.sign(t) if majority == "frequency" else t)
    elected = np.where(votes >= 0, np.float32(1), np.float32(-1))
    total, count = np.zeros_like(votes), np.zeros_like(votes)
    for t, w in zip(tensors, weights, strict=True):
        agrees = np.sign(w) * np.sign(t) == elected
        total += np.where(agrees, np.float32(w) * t, np.float32(0))
        count += agrees
    mean: Floats = total / np.maximum(count, 1)
    return mean
