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


class Noise(NamedTuple):
    """Where a PCG64 generator stands in its sequence."""

    state: int  # 128 bits
    has_uint32: int  # whether half of a 64-bit number is left
    uinteger: int  # that half


_NOISE = dict(zip(Noise._fields, (128, 1, 32), strict=True))  # bits of each


def checked_noise(source: str, state: Any) -> Noise:
    """What ``Explorer.state`` gave; raises ValueError for anything else."""
    if not isinstance(state, dict) or state.keys() != _NOISE.keys():
        raise ValueError(f"{source}: expected {', '.join(_NOISE)}")
    for name, bits in _NOISE.items():
        value = state[name]
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 1 << bits:
            raise ValueError(f"{source}: {name}: expected a number of {bits} bits")
    return Noise(**state)


def is_quality(value: Any) -> bool:
    """Whether a value from a file is a number in 0..1."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0.0 <= value <= 1.0


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

    def last(self, module: str) -> Trace | None:
        """This thread's last trace of the module, until it is taken."""
        return self._traces().get(module)

    def take(self, module: str) -> None:
        """Forgets this thread's last trace of the module."""
        self._traces().pop(module, None)

    def state(self) -> dict[str, int]:
        """Where the noise stands, for ``go_on``; not the traces, which are of a thread."""
        with self._lock:
            now = self._random.bit_generator.state
        return {name: int({**now, **now["state"]}[name]) for name in _NOISE}

    def go_on(self, noise: Noise) -> None:
        """Draws what ``checked_noise`` was given the state of next."""
        with self._lock:
            now: Any = self._random.bit_generator.state
            now["state"]["state"] = noise.state
            now["has_uint32"], now["uinteger"] = noise.has_uint32, noise.uinteger
            self._random.bit_generator.state = now

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
