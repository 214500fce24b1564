"""How the cost of an op grows: one of rows, rank, adapters, hidden size and threads changes at a
time, the others stay at BASE."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

import lora_engine as le
from bench import check
from bench.case import OURS, Contender, Traffic
from bench.machine import Machine, place_of
from bench.paired import paired, spread
from bench.steps import CHECKED_LR, TIMED_LR
from lora_engine import reference


class Point(NamedTuple):
    """One batch. Each row names one of the adapters, in turn; threads 0: all."""

    rows: int = 32
    rank: int = 8
    adapters: int = 32
    hidden: int = 4096
    threads: int = 0


class Op(NamedTuple):
    """build: ours, to be held to the reference. traffic: what must move at a point. axes: the
    sizes that it has."""

    build: Callable[[Point], Contender]
    traffic: Callable[[Point], Traffic]
    axes: tuple[str, ...]


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


# ---- ops ----------------------------------------------------------------------------------


class _Batch:
    """Adapters in a pool, rows that name them in turn."""

    def __init__(self, point: Point) -> None:
        rng = np.random.default_rng(0)
        n, hidden, rank = point.rows, point.hidden, point.rank

        def normal(*shape: int) -> Any:
            return rng.standard_normal(shape, dtype=np.float32)

        A = normal(point.adapters, rank, hidden) * np.float32(0.01)
        B = normal(point.adapters, hidden, rank) * np.float32(0.02)
        self.hidden, self.pool = hidden, le.AdapterPool(hidden, hidden)
        slots = [self.pool.add(a, b, 2.0) for a, b in zip(A, B, strict=True)]
        self.ids = np.array([slots[i % len(slots)] for i in range(n)], np.int32)
        self.x, self.grad, self.y = normal(n, hidden), normal(n, hidden), normal(n, hidden)
        self.weights = dict(zip(slots, zip(A, B, strict=True), strict=True))

    def adapters(self, sign: Callable[[Any], Any]) -> dict[int, reference.Adapter]:
        return {
            s: reference.Adapter([sign(self.weights[s][0])], [sign(self.weights[s][1])], 2.0)
            for s in set(self.ids.tolist())
        }


def _forward(point: Point) -> Contender:
    batch = _Batch(point)
    x, y, ids, pool = batch.x, batch.y, batch.ids, batch.pool

    def call() -> Any:
        return pool.forward(x, ids, out=y, accumulate=False)

    def delta(sign: Any) -> Any:
        return reference.batched_lora_delta(sign(x), batch.adapters(sign), [batch.hidden], ids)

    def verify() -> None:
        y.fill(np.nan)
        expected = check.Expected(delta(np.asarray), delta(np.abs))
        check.require(f"pool.forward, {point}", call(), expected)

    return Contender(OURS, call, verify)


def _adapt(point: Point) -> Contender:
    """Held to the reference once, as that step is then where the timed ones go on."""
    batch = _Batch(point)

    def step(lr: float) -> None:
        assert not batch.pool.adapt(batch.x, batch.grad, batch.ids, lr=lr).note

    def stepped(sign: Any, lr: float) -> dict[int, reference.Adapter]:
        x, grad = sign(batch.x), sign(batch.grad)
        after, _ = reference.batched_adapt(
            x, grad, batch.adapters(sign), [batch.hidden], batch.ids, reference.Step(lr=lr)
        )
        return after

    def verify() -> None:
        step(CHECKED_LR)
        # A magnitude is the step from absolute values, its sign turned.
        values, magnitudes = stepped(np.asarray, CHECKED_LR), stepped(np.abs, -CHECKED_LR)
        for slot, want in values.items():
            most = magnitudes[slot]
            for name, got, a, b in zip(
                "AB", batch.pool.get(slot)[:2], (want.A, want.B), (most.A, most.B), strict=True
            ):
                check.require(f"pool.adapt, {point}: {name}", got, check.Expected(a[0], b[0]))

    return Contender(OURS, lambda: step(TIMED_LR), verify)


def _nf4_linear(point: Point) -> Contender:
    rng = np.random.default_rng(0)
    w = le.nf4_quantize(rng.standard_normal((point.hidden, point.hidden), dtype=np.float32))
    x = rng.standard_normal((point.rows, point.hidden), dtype=np.float32)
    y = np.full_like(x, np.nan)

    def call() -> Any:
        return le.nf4_linear(x, w, out=y)

    def verify() -> None:
        W = w.to_float()
        expected = check.Expected(reference.nf4_linear(x, W), np.abs(x) @ np.abs(W).T)
        check.require(f"nf4_linear, {point}", call(), expected)

    return Contender(OURS, call, verify)


def _weights(point: Point, adapters: int) -> int:
    return adapters * 2 * point.rank * point.hidden * 4


def _forward_traffic(point: Point) -> Traffic:
    used, row = min(point.adapters, point.rows), point.rows * point.hidden * 4
    weights = _weights(point, used)
    return Traffic(weights + row, row, weights + 2 * row, point.threads)


def _adapt_traffic(point: Point) -> Traffic:
    used, row = min(point.adapters, point.rows), point.rows * point.hidden * 4
    weights = _weights(point, used)
    return Traffic(2 * row, 2 * weights, weights + 2 * row, point.threads)


def _nf4_traffic(point: Point) -> Traffic:
    packed, row = point.hidden**2 * 9 // 16, point.rows * point.hidden * 4
    return Traffic(packed + row, row, packed + 2 * row, point.threads)


OPS: dict[str, Op] = {
    "pool.forward": Op(_forward, _forward_traffic, tuple(AXES)),
    "pool.adapt": Op(_adapt, _adapt_traffic, tuple(AXES)),
    "nf4_linear": Op(_nf4_linear, _nf4_traffic, ("rows", "hidden", "threads")),
}


# ---- curves ---------------------------------------------------------------------------------


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
