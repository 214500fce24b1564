"""The latency of single calls: each is timed on its own, so that the rare slow ones are seen."""

from __future__ import annotations

from time import perf_counter, perf_counter_ns
from typing import Any

import numpy as np

from bench.case import Contender
from bench.paired import WARM_SECONDS

PERCENTILES = (50.0, 90.0, 99.0, 99.9)
FEWEST = 50
BINS_PER_DECADE = 20


def sample(contender: Contender, seconds: float, most: int = 200_000) -> np.ndarray:
    """Nanoseconds of single calls, for so many seconds or calls, at least FEWEST calls.

    The clock's own time, some 50 ns, is in each of them.
    """
    taken = np.empty(most, np.int64)
    call = contender.call
    with contender.mode():
        until = perf_counter() + WARM_SECONDS
        call()
        while perf_counter() < until:
            call()
        end = perf_counter_ns() + int(seconds * 1e9)
        count = 0
        while count < most:
            start = perf_counter_ns()
            call()
            stop = perf_counter_ns()
            taken[count] = stop - start
            count += 1
            if stop > end and count >= FEWEST:
                break
    return taken[:count]


def describe(nanoseconds: np.ndarray) -> dict[str, Any]:
    """Percentiles in microseconds and a histogram in bins of equal ratio.

    A percentile that too few calls support (fewer than ten beyond it) is None.
    """
    us = np.sort(nanoseconds) / 1e3
    rows: dict[str, Any] = {"calls": len(us), "max_us": round(float(us[-1]), 3)}
    for p in PERCENTILES:
        enough = p == 50.0 or len(us) * (100.0 - p) / 100.0 >= 10
        rows[f"p{p:g}_us"] = round(float(np.percentile(us, p)), 3) if enough else None
    low = np.floor(np.log10(max(us[0], 1e-3)) * BINS_PER_DECADE)
    high = np.ceil(np.log10(max(us[-1], 1e-3)) * BINS_PER_DECADE) + 1
    edges = 10.0 ** (np.arange(low, high + 1) / BINS_PER_DECADE)
    counts, _ = np.histogram(us, edges)
    rows["histogram"] = {
        "edges_us": [round(float(e), 5) for e in edges],
        "counts": counts.tolist(),
    }
    return rows
