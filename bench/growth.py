"""How the cost of ``pool.forward`` grows: one of rows, rank, adapters, hidden size and threads
changes at a time, the others stay at BASE."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

import lora_engine as le
from bench import check
from bench.case import OURS, Contender, Traffic
from bench.machine import Machine, place_of
from bench.paired import paired, spread
from lora_engine import reference


class Point(NamedTuple):
    """One batch. Each row names one of the adapters, in turn; threads 0: all."""

    rows: int = 32
    rank: int = 8
    adapters: int = 32
    hidden: int = 4096
    threads: int = 0

    @property
    def traffic(self) -> Traffic:
        used = min(self.adapters, self.rows)
        weights = used * 2 * self.rank * self.hidden * 4
        row = self.rows * self.hidden * 4
        kept = self.adapters * 2 * self.rank * self.hidden * 4 if used == self.adapters else weights
        return Traffic(weights + row, 2 * row, kept + 2 * row, self.threads)


BASE = Point()
AXES: dict[str, tuple[int, ...]] = {
    "rows": (1, 4, 16, 64, 256),
    "rank": (1, 2, 4, 8, 16, 32, 64),
    "adapters": (1, 4, 32, 128, 1024),
    "hidden": (256, 1024, 4096, 8192),
    "threads": (1, 2, 4, 8, 16, 32, 64),
}
QUICK = {
    "rows": (1, 16, 64),
    "rank": (1, 8, 64),
    "adapters": (1, 32, 128),
    "hidden": (256, 4096),
    "threads": (1, 2),
}


def points(quick: bool, threads: int) -> Iterator[tuple[str, int, Point]]:
    """(axis, value, point). With more adapters than rows the rows grow with them."""
    for axis, values in (QUICK if quick else AXES).items():
        for value in values:
            if axis == "threads" and value > threads:
                continue
            point = BASE._replace(**{axis: value})
            yield (
                axis,
                value,
                point._replace(rows=max(point.rows, point.adapters))
                if (axis == "adapters")
                else point,
            )


def _contender(point: Point) -> Contender:
    """Ours, held to the reference."""
    rng = np.random.default_rng(0)
    n, hidden, rank = point.rows, point.hidden, point.rank

    def normal(*shape: int) -> Any:
        return rng.standard_normal(shape, dtype=np.float32)

    A = normal(point.adapters, rank, hidden) * np.float32(0.01)
    B = normal(point.adapters, hidden, rank) * np.float32(0.02)
    pool = le.AdapterPool(hidden, hidden)
    slots = [pool.add(a, b, 2.0) for a, b in zip(A, B, strict=True)]
    x, y = normal(n, hidden), np.zeros((n, hidden), np.float32)
    ids = np.array([slots[i % len(slots)] for i in range(n)], np.int32)

    def call() -> Any:
        return pool.forward(x, ids, out=y, accumulate=False)

    def delta(sign: Any) -> Any:
        used = {s: reference.Adapter([sign(A[s])], [sign(B[s])], 2.0) for s in set(ids.tolist())}
        return reference.batched_lora_delta(sign(x), used, [hidden], ids)

    def verify() -> None:
        y.fill(np.nan)
        expected = check.Expected(delta(np.asarray), delta(np.abs))
        check.require(f"pool.forward, {point}", call(), expected)

    return Contender(OURS, call, verify)


def measure(axis: str, value: int, point: Point, machine: Machine, rounds: int) -> dict[str, Any]:
    """One point of a curve: median time, and the byte floor by the bandwidth of this run."""
    threads = le.get_num_threads()
    le.set_num_threads(point.threads or threads)
    try:
        contender = _contender(point)
        row: dict[str, Any] = {"axis": axis, "value": value, **point._asdict()}
        try:
            contender.verify()
        except AssertionError as wrong:
            return row | {"wrong": str(wrong)}
        times = paired([contender], rounds, budget=3.0).times[OURS]
    finally:
        le.set_num_threads(threads)
    traffic = point.traffic
    place = place_of(traffic.footprint, point.threads or threads)
    if place not in machine.seen:
        machine.observe(place)
    s = spread(times)
    return row | {
        "median_us": round(s.median * 1e6, 3),
        "p10_us": round(s.p10 * 1e6, 3),
        "p90_us": round(s.p90 * 1e6, 3),
        "floor_us": round(machine.seen[place].floor_s(traffic) * 1e6, 3),
    }
