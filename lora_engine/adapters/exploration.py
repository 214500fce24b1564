"""Exploration: noise on what is served, kept to learn from the quality it came to."""

from __future__ import annotations

import math
import threading
from typing import Any, NamedTuple

import numpy as np


class Trace(NamedTuple):
    """What a forward added to the delta: sigma * noise. noise: standard normal, shaped like the
    delta and of its kind and dtype."""

    module: str
    noise: Any
    sigma: float


class Explorer:
    """Draws noise, and keeps this thread's last trace of every module until it is used."""

    def __init__(self, seed: int) -> None:
        self._random = np.random.default_rng([seed & 0xFFFFFFFFFFFFFFFF, 1])
        self._lock = threading.Lock()
        self._last = threading.local()

    def explore(self, delta: Any, module: str, sigma: float) -> tuple[Any, Trace]:
        """The delta with sigma * noise added, in place where autograd does not record it."""
        shape = tuple(delta.shape)
        with self._lock:
            noise: Any = self._random.standard_normal(shape, dtype=np.float32)
        if isinstance(delta, np.ndarray):
            noise = noise.astype(delta.dtype, copy=False)
        else:
            import torch

            noise = torch.from_numpy(noise).to(delta.dtype)
        if getattr(delta, "requires_grad", False):
            delta = delta + sigma * noise
        else:
            delta += sigma * noise
        trace = Trace(module, noise, sigma)
        self._traces()[module] = trace
        return delta, trace

    def take(self, module: str) -> Trace | None:
        """This thread's last trace of the module, once."""
        return self._traces().pop(module, None)

    def _traces(self) -> dict[str, Trace]:
        try:
            traces: dict[str, Trace] = self._last.traces
        except AttributeError:
            traces = self._last.traces = {}
        return traces


def checked_sigma(op: str, explore: Any) -> float:
    """explore as a number above 0; raises TypeError, ValueError."""
    if isinstance(explore, bool) or not hasattr(explore, "__float__"):
        raise TypeError(f"{op}: explore: expected a number, got {explore!r}")
    sigma = float(explore)
    if not 0.0 < sigma < math.inf:
        raise ValueError(f"{op}: explore: expected a number above 0, got {explore!r}")
    return sigma


class Baseline:
    """A moving average of the qualities seen, 0.9 of it kept at each."""

    KEEP = 0.9

    def __init__(self, value: float | None = None) -> None:
        self.value = value

    def update(self, qualities: np.ndarray) -> None:
        """qualities [n]: one after the other; the first ever sets it."""
        value = self.value
        for quality in qualities.tolist():
            value = quality if value is None else self.KEEP * value + (1 - self.KEEP) * quality
        self.value = value
