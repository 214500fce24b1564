"""Samples that no step is judged by: what Sona keeps aside to judge a consolidation."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

Array = np.ndarray


class HeldOut:
    """The last few of one in ten samples: inputs, and where a step of 1 would move the output.

    Of each ten samples in turn one is drawn, by a hash of the seed and the number of the ten:
    whoever takes turns with others is held out as often as they are, and two numbers say where
    it goes on.
    """

    EVERY = 10
    _TENS = 1000  # that are drawn for at a time

    def __init__(self, size: int, in_features: int, out_features: int, seed: Sequence[int]) -> None:
        self.x = np.zeros((size, in_features), np.float32)
        self.target = np.zeros((size, out_features), np.float32)
        self._seed = [*seed]
        self._drawn, self._places = -1, b""
        self._ten, self._next = range(0), -1  # samples of a ten, and which of them is held out
        self.clear()

    def clear(self) -> None:
        """Holds nothing, and draws as at first."""
        self.count = 0  # rows held out so far
        self.seen = 0  # samples so far, held out or not

    def is_next(self) -> bool:
        """Whether the next sample is to be held out; the caller counts it in ``seen``."""
        if self.seen not in self._ten:
            self._begin(self.seen // self.EVERY)
        return self.seen == self._next

    def _begin(self, ten: int) -> None:
        if ten // self._TENS != self._drawn:
            self._drawn = ten // self._TENS
            drawn = np.random.default_rng([*self._seed, self._drawn])
            self._places = drawn.integers(self.EVERY, size=self._TENS, dtype=np.uint8).tobytes()
        first = ten * self.EVERY
        self._ten = range(first, first + self.EVERY)
        self._next = first + self._places[ten % self._TENS]

    def add(self, x: Array, target: Array) -> None:
        """x [n, in] and target [n, out], or one of each."""
        if x.ndim == 1:
            x, target = x[None], target[None]
        for i in range(len(x)):
            at = self.count % len(self.x)
            self.x[at], self.target[at] = x[i], target[i]
            self.count += 1

    def samples(self) -> tuple[Array, Array]:
        """x [n, in] and targets [n, out] of what is held."""
        n = min(self.count, len(self.x))
        return self.x[:n].copy(), self.target[:n].copy()
