"""Tuning the C++ core: rows that share a pass over an adapter, bytes worth a thread.

Both hold for every op and shape, so they are measured over all shapes given together. The
bits of a result depend on neither, and a candidate that changes one is dropped.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from time import perf_counter

import numpy as np

import lora_engine as le
from lora_engine import _C, reference
from lora_engine.backends import cpu_tuned
from lora_engine.tuning.search import Job
from lora_engine.tuning.shapes import Shape

ROWS = (1, 4, 16, 64)
TOLERANCE = 1e-6
CANDIDATES = tuple(  # the core's own first
    {"bytes_per_thread": size, "tile_rows": rows}
    for size in cpu_tuned.BYTES_PER_THREAD
    for rows in cpu_tuned.TILE_ROWS
)
Timer = Callable[[Callable[[], object]], float]


def best_seconds(call: Callable[[], object], blocks: int = 7, least: float = 0.004) -> float:
    """Of the quickest of some blocks of calls: others' work on the machine only adds to it."""
    call()
    count, best = 1, float("inf")
    while blocks:
        start = perf_counter()
        for _ in range(count):
            call()
        took = perf_counter() - start
        if took < least:
            count *= 2
        else:
            best, blocks = min(best, took / count), blocks - 1
    return best


class _Case:
    """A delta of some rows, all of one adapter."""

    def __init__(self, shape: Shape, rank: int, rows: int) -> None:
        rng = np.random.default_rng(0)
        self.x = rng.standard_normal((rows, shape.in_features), dtype=np.float32)
        self.A = rng.standard_normal((rank, shape.in_features), dtype=np.float32)
        self.B = rng.standard_normal((rank, shape.out_features), dtype=np.float32).T
        self.y = np.empty((rows, shape.out_features), np.float32)

    def call(self) -> None:
        _C.lora_delta(self.x, self.A, self.B, 1.0, self.y, False)

    def values(self) -> np.ndarray:
        self.y.fill(np.nan)
        self.call()
        return self.y.copy()

    def error(self, values: np.ndarray) -> float:
        """In the measure of the reference's promise."""
        gap = values - reference.lora_delta(self.x, self.A, self.B, 1.0)
        size = reference.lora_delta(abs(self.x), abs(self.A), abs(self.B), 1.0)
        return float(np.linalg.norm(gap) / np.linalg.norm(size))


class CpuTrial:
    """All the shapes, one after the other; the time is the geometric mean."""

    def __init__(self, shapes: Sequence[Shape], ranks: Sequence[int], timer: Timer) -> None:
        self.cases = [_Case(s, r, n) for s in shapes for r in ranks for n in ROWS]
        self.timer = timer
        self.heuristics = self._values(CANDIDATES[0])

    def _values(self, choice: dict[str, int]) -> list[np.ndarray]:
        self._set(choice)
        try:
            return [case.values() for case in self.cases]
        finally:
            self._reset()

    def problem(self, choice: dict[str, int]) -> str:
        found = self._values(choice)
        error = float(np.max([c.error(v) for c, v in zip(self.cases, found, strict=True)]))
        if not error <= TOLERANCE:
            return f"error {error:.2g}, allowed {TOLERANCE:g}"
        pairs = zip(found, self.heuristics, strict=True)
        if any(v.tobytes() != was.tobytes() for v, was in pairs):
            return "other bits than the heuristic's: it changes the order of a row's sum"
        return ""

    def seconds(self, choice: dict[str, int]) -> float:
        self._set(choice)
        try:
            times = [self.timer(case.call) for case in self.cases]
        finally:
            self._reset()
        return float(np.exp(np.mean(np.log(times))))

    @staticmethod
    def _set(choice: dict[str, int]) -> None:
        _C.set_tuning(choice["bytes_per_thread"], choice["tile_rows"])

    @staticmethod
    def _reset() -> None:
        _C.set_tuning(0, 0)


def job(shapes: Sequence[Shape], ranks: Sequence[int], timer: Timer = best_seconds) -> Job:
    """The one job of a CPU."""
    words = " ".join(map(str, shapes)), " ".join(map(str, ranks))
    case = f"{cpu_tuned.KEY} float32 {words[0]} rank {words[1]} threads {le.get_num_threads()}"
    return Job(cpu_tuned.KEY, case, CANDIDATES, lambda: CpuTrial(shapes, ranks, timer))
