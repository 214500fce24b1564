"""Task boundaries found in the stream of feedback: losses that are higher than they were."""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections.abc import Mapping
from math import exp
from statistics import NormalDist
from typing import Any

import numpy as np

# Shifts, in standard deviations of the ranks' normal scores, that the test is made for.
_SHIFTS = (0.5, 1.0, 2.0)
_normal = NormalDist()


class _Ranks:
    """One sequence of samples ranked against those before it, and what it speaks for."""

    def __init__(self, age: int) -> None:
        self.values: list[float] = []  # sorted
        self.age = age
        self.evidence = [0.0] * len(_SHIFTS)

    def restart(self) -> None:
        self.values.clear()
        self.age = 0
        self.evidence = [0.0] * len(_SHIFTS)

    def take(self, value: float, uniform: float) -> None:
        first, last = bisect_left(self.values, value), bisect_right(self.values, value)
        rank = first + uniform * (last - first + 1)
        z = _normal.inv_cdf(min(max(rank / (len(self.values) + 1), 1e-12), 1 - 1e-12))
        insort(self.values, value)
        self.age += 1
        self.evidence = [
            (1.0 + r) * exp(shift * z - shift * shift / 2)
            for r, shift in zip(self.evidence, _SHIFTS, strict=True)
        ]


class TaskBoundary:
    """Says when the losses of a stream, one number a sample, have become higher.

    false_alarms: the rate a sample that is allowed; between false alarms lie 1 / false_alarms
    samples or more in the mean, whatever the distribution of the losses, if they are
    exchangeable (independent and alike) within a task. window: samples that are compared with.

    A sample's rank among the r before it, ties broken at random, is uniform and independent of
    the ranks before it (Vovk, Gammerman and Shafer 2005, chapter 8): p. With z the normal
    quantile of p, e = exp(shift z - shift² / 2) has mean 1, and the Shiryaev-Roberts statistic
    R <- (1 + R) e, less the number of samples, is a martingale. So the mean of R over shifts
    of 0.5, 1 and 2 standard deviations reaches 1 / false_alarms after at least that many
    samples in the mean (e-detectors: Shin, Ramdas and Rinaldo 2024). Two sequences
    of ranks, half a window apart, each begin anew after a window, and their mean decides:
    so half a window or more is there to compare with.

    A shift of one standard deviation of normal losses takes some 20 samples to notice, of half
    a deviation some 80, if it is noticed at all.

    Only higher values are looked for, since losses that learning lowers are no new task;
    qualities are given as 1 - quality. Memory: 16 bytes a sample of the window and more.
    Raises ValueError for a window < 20 or false_alarms outside 0..0.1.
    """

    def __init__(self, window: int = 400, false_alarms: float = 1e-4) -> None:
        if window < 20:
            raise ValueError(f"TaskBoundary: window: expected at least 20, got {window}")
        if not 0.0 < false_alarms <= 0.1:
            raise ValueError(
                f"TaskBoundary: false_alarms: expected a rate in 0..0.1, got {false_alarms}"
            )
        self.window, self.false_alarms = int(window), float(false_alarms)
        self._draw_from(0)
        self._restart()

    def _draw_from(self, drawn: int) -> None:
        """Ties are broken as after so many numbers."""
        numbers = np.random.PCG64(0)
        numbers.advance(drawn)
        self._random, self._drawn = np.random.Generator(numbers), drawn

    def _restart(self) -> None:
        """A new task: nothing is known of its losses."""
        self._ranks = (_Ranks(0), _Ranks(self.window // 2))

    def update(self, values: Any) -> list[int]:
        """Takes losses in their order; where among them a new task was noticed.

        values: a number, or numbers [n]. Empty while the task goes on; after an alarm the
        comparison begins anew with the next sample. Raises ValueError for NaN and Inf and
        more dimensions, taking none.
        """
        losses = np.asarray(
            values.detach().cpu() if hasattr(values, "detach") else values, np.float64
        )
        if losses.ndim > 1:
            raise ValueError(
                f"TaskBoundary.update: values: expected shape [n], got {list(losses.shape)}"
            )
        losses = losses.reshape(-1)
        if not np.isfinite(losses).all():
            raise ValueError("TaskBoundary.update: values: expected finite numbers, got NaN or Inf")
        uniform = self._random.random((len(losses), 2)).tolist()
        self._drawn += 2 * len(losses)
        return [
            i
            for i, (loss, u) in enumerate(zip(losses.tolist(), uniform, strict=True))
            if self._take(loss, u)
        ]

    def _take(self, loss: float, uniform: list[float]) -> bool:
        total = 0.0
        for ranks, u in zip(self._ranks, uniform, strict=True):
            if ranks.age >= self.window:
                ranks.restart()
            ranks.take(loss, u)
            total += sum(ranks.evidence)
        if total * self.false_alarms < len(_SHIFTS) * len(self._ranks):
            return False
        self._restart()
        return True

    # ---- state ----

    def state(self) -> dict[str, np.ndarray]:
        """What is known of the stream, as arrays, copies: for ``load_state`` of one with the
        same window, which then goes on to the same alarms."""
        return {
            "values": np.array([v for ranks in self._ranks for v in ranks.values], np.float64),
            "lengths": np.array([len(ranks.values) for ranks in self._ranks], np.int64),
            "ages": np.array([ranks.age for ranks in self._ranks], np.int64),
            "evidence": np.array([ranks.evidence for ranks in self._ranks], np.float64),
            "drawn": np.array([self._drawn], np.int64),
        }

    def load_state(self, state: Mapping[str, np.ndarray]) -> None:
        """Replaces what is known by what ``state`` gave.

        Raises ValueError for anything that ``state`` of this window does not give, changing
        nothing.
        """
        shapes = {"lengths": (2,), "ages": (2,), "evidence": (2, len(_SHIFTS)), "drawn": (1,)}
        if state.keys() != {*shapes, "values"}:
            raise ValueError(
                "TaskBoundary.load_state: state: expected the keys of TaskBoundary.state"
            )
        for name, array in state.items():
            kind = "f8" if name in ("values", "evidence") else "i8"
            good = isinstance(array, np.ndarray) and array.dtype == np.dtype(kind)
            shape = shapes.get(name, (int(np.sum(state["lengths"])),))
            if not good or array.shape != shape or not np.isfinite(array).all():
                raise ValueError(f"TaskBoundary.load_state: {name}: expected finite {kind} {shape}")
        parts = np.split(state["values"], state["lengths"][:1])
        ages, lengths = state["ages"], state["lengths"]
        if (
            (lengths < 0).any() or (lengths > ages).any() or (ages > self.window).any()
            or state["drawn"][0] < 0 or (state["evidence"] < 0).any()
            or any((np.diff(part) < 0).any() for part in parts)
        ):  # fmt: skip
            raise ValueError(
                f"TaskBoundary.load_state: state: expected one of a window of {self.window}"
            )
        self._ranks = (_Ranks(0), _Ranks(0))
        for i, ranks in enumerate(self._ranks):
            ranks.values, ranks.age = parts[i].tolist(), int(ages[i])
            ranks.evidence = state["evidence"][i].tolist()
        self._draw_from(int(state["drawn"][0]))
