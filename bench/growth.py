"""How the cost of an op grows: one of rows, rank, adapters, hidden size and threads changes at a
time, the others stay at BASE."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import lora_engine as le
from bench.case import OURS
from bench.growth_ops import OPS, Point
from bench.machine import Machine, place_of
from bench.paired import paired, spread

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


class Place(NamedTuple):
    """A point of an op's curve."""

    op: str
    axis: str
    value: int
    point: Point


def points(quick: bool, threads: int) -> Iterator[Place]:
    """All of them. With more adapters than rows the rows grow with them."""
    for op, (_, _, axes) in OPS.items():
        for axis in axes:
            for value in (QUICK if quick else AXES)[axis]:
                if axis == "threads" and value > threads:
                    continue
                point = BASE._replace(**{axis: value})
                if axis == "adapters":
                    point = point._replace(rows=max(point.rows, point.adapters))
                yield Place(op, axis, value, point)


def measure(place: Place, machine: Machine, rounds: int) -> dict[str, Any]:
    """Median time, and the byte floor by the bandwidth of this run. Raises AssertionError where
    the output is wrong."""
    point = place.point
    threads = le.get_num_threads()
    le.set_num_threads(point.threads or threads)
    try:
        contender = OPS[place.op].build(point)
        contender.verify()
        times = paired([contender], rounds, budget=3.0).times[OURS]
    finally:
        le.set_num_threads(threads)
    traffic = OPS[place.op].traffic(point)
    memory = place_of(traffic.footprint, point.threads or threads)
    if memory not in machine.seen:
        machine.observe(memory)
    s = spread(times)
    return {
        "median_us": round(s.median * 1e6, 3),
        "p10_us": round(s.p10 * 1e6, 3),
        "p90_us": round(s.p90 * 1e6, 3),
        "floor_us": round(machine.seen[memory].floor_s(traffic) * 1e6, 3),
    }
