"""Gradients that wait: summed over backward passes, applied as one step."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np

from lora_engine import ops


class PendingGradient:
    """The summed gradient of one slot. ``storage``: the pool's, of the backend."""

    def __init__(self, storage: Any, slot: int) -> None:
        self.storage, self.slot = storage, slot
        self.gradient: np.ndarray | None = None
        self.samples = 0
        self.refused = 0  # gradients with NaN or Inf, which were not added
        self.rated = False  # whether a quality has a part in it: the step is to be bounded
        self._lock = threading.Lock()

    def accumulate(
        self, x: Any, grad: Any, h: Any = None, rated: bool = False
    ) -> tuple[int, float, int]:
        """Adds a gradient to what waits, and gives (outcome, norm of its sum over rows, rows).

        h: A x where it was kept. rated: it is of a quality. A gradient with NaN or Inf is not
        added.
        """
        with self._lock:
            if self.gradient is None:
                size = self.storage.gradient_size(self.slot)
                self.gradient = np.zeros(size, np.float32)
            outcome, norm = self.storage.gradient(x, grad, self.slot, h, self.gradient)
            rows = x.shape[0] if x.ndim == 2 else 1
            if outcome == ops.APPLIED:
                self.samples += rows
                self.rated = self.rated or rated
            self.refused += outcome == ops.NOT_FINITE
        return outcome, norm, rows

    def apply(
        self, step: Any, direction: Callable[[np.ndarray], np.ndarray] | None = None
    ) -> tuple[int, float]:
        """A step with the mean of what waits, which is then dropped.

        direction: makes of that mean what the step goes along, both flat as ``gradient``.
        """
        with self._lock:
            if not self.samples:
                self.refused = 0
                return ops.NO_ADAPTER, 0.0
            gradient, scale = self.gradient, 1.0 / self.samples
            if direction is not None and gradient is not None:
                gradient, scale = direction(gradient * np.float32(scale)), 1.0
            result: tuple[int, float] = self.storage.apply(gradient, self.slot, scale, step)
            self._drop()
        return result

    def clear(self) -> None:
        """Drops what waits."""
        with self._lock:
            self._drop()

    def _drop(self) -> None:
        if self.gradient is not None:
            self.gradient.fill(0.0)
        self.samples = self.refused = 0
        self.rated = False
