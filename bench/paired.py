"""Paired, interleaved timing: blocks of calls A B C, C B A, A B C, ...

A round in which our threads had to wait for a CPU that someone else held says
nothing, so it is repeated: rounds are chosen by the waiting, never by the times.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from bench.case import Contender

BLOCK_SECONDS = 0.006
# Before each block: the caches hold the contender's data again, and the threads
# that a peer's runtime left spinning have gone to sleep.
WARM_SECONDS = 0.004
BUDGET_SECONDS = 30.0
FEWEST_ROUNDS = 15
QUIET = 0.05  # seconds of waiting for a CPU, all threads together, per second timed

Times = dict[str, NDArray[np.float64]]  # seconds a call, one number a round


class Timing(NamedTuple):
    """times: of the rounds kept. taken: rounds in all. waited: the most that a block
    of a kept round waited for a CPU, as a part of its time (median over rounds)."""

    times: Times
    taken: int
    waited: float

    @property
    def noisy(self) -> bool:
        return self.waited > QUIET


class Spread(NamedTuple):
    median: float
    p10: float
    p90: float


def spread(values: NDArray[np.float64]) -> Spread:
    return Spread(*(float(np.percentile(values, p)) for p in (50, 10, 90)))


def timed(call: Callable[[], Any], count: int) -> float:
    """Seconds a call, over ``count`` of them."""
    start = perf_counter()
    for _ in range(count):
        call()
    return (perf_counter() - start) / count


def calls_in(call: Callable[[], Any], seconds: float) -> int:
    """How many calls take about that long, at least one."""
    call()
    count = 1
    while (took := timed(call, count) * count) < seconds / 4:
        count *= 2
    return max(1, round(count * seconds / took))


def waiting_seconds() -> float:
    """What this process's threads have waited for a CPU so far (Linux; else 0)."""
    total = 0
    for file in Path("/proc/self/task").glob("*/schedstat"):
        try:
            total += int(file.read_text().split()[1])
        except OSError:  # the thread ended
            continue
    return total / 1e9


def _block(contender: Contender, count: int) -> tuple[float, float]:
    """(seconds a call, waiting as a part of the time)."""
    with contender.mode():
        until = perf_counter() + WARM_SECONDS
        contender.call()
        while perf_counter() < until:
            contender.call()
        before = waiting_seconds()
        seconds = timed(contender.call, count)
        return seconds, (waiting_seconds() - before) / (seconds * count)


def paired(contenders: Sequence[Contender], rounds: int, budget: float = BUDGET_SECONDS) -> Timing:
    """Times contenders that take turns, until so many quiet rounds are had or the
    budget (seconds) is spent; then the quietest rounds, at least FEWEST_ROUNDS."""
    counts = {}
    for c in contenders:
        with c.mode():
            counts[c.name] = calls_in(c.call, BLOCK_SECONDS)
    taken: list[dict[str, tuple[float, float]]] = []
    quiet, fewest = 0, min(rounds, FEWEST_ROUNDS)
    start = perf_counter()
    while quiet < rounds and (len(taken) < fewest or perf_counter() - start < budget):
        turn = contenders if len(taken) % 2 == 0 else reversed(contenders)
        taken.append({c.name: _block(c, counts[c.name]) for c in turn})
        quiet += _waited(taken[-1]) <= QUIET
    kept = sorted(taken, key=_waited)[: max(quiet, fewest)]
    times = {c.name: np.array([r[c.name][0] for r in kept]) for c in contenders}
    return Timing(times, len(taken), float(np.median([_waited(r) for r in kept])))


def _waited(blocks: Mapping[str, tuple[float, float]]) -> float:
    return max(waited for _, waited in blocks.values())


def ratio(times: Times, name: str, base: str) -> Spread:
    """How many times as long ``name`` takes as ``base``: of the ratios of each round."""
    return spread(times[name] / times[base])


def fastest(spellings: Mapping[str, Callable[[], Any]], inference: bool = False) -> str:
    """The spelling with the lowest median, of a few rounds."""
    runs = [Contender(name, call, inference=inference) for name, call in spellings.items()]
    if len(runs) == 1:
        return runs[0].name
    times = paired(runs, rounds=9, budget=3.0).times
    return min(times, key=lambda name: float(np.median(times[name])))
