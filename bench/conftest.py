"""Fixtures: a contender of a case, checked and then timed by pytest-benchmark.

Each contender of each case is one benchmark, in the group of its case.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import pytest

from bench import environment
from bench.case import OURS, Case, Contender
from bench.machine import Machine, Place, honest_floor, place_of


@lru_cache(maxsize=1)
def _contenders(case: Case) -> dict[str, Contender]:
    try:
        return {c.name: c for c in case.build()}
    except ModuleNotFoundError as missing:
        return dict.fromkeys(case.names, Contender("", absent=str(missing)))


@pytest.fixture(scope="session")
def threads() -> int:
    return environment.one_thread_count()


@pytest.fixture(scope="session")
def machine() -> Machine:
    return Machine()


def pytest_benchmark_update_json(config: Any, benchmarks: Any, output_json: Any) -> None:
    output_json["lora_engine"] = environment.describe()


@pytest.fixture
def report(benchmark: Any, machine: Machine, threads: int) -> Callable[[Case, str], None]:
    """Times one contender, unless it is absent (skipped) or its output is wrong (failed)."""

    def run(case: Case, name: str) -> None:
        contender = _contenders(case)[name]
        if contender.absent:
            pytest.skip(contender.absent)
        contender.verify()
        benchmark.group, benchmark.name = case.name, name
        benchmark.extra_info["spelling"] = contender.spelling
        place = case.traffic and place_of(case.traffic.footprint, case.traffic.threads or threads)
        if name == OURS and place:
            machine.observe(place)
        with contender.mode():
            benchmark(contender.call)
        if name == OURS and place and benchmark.stats:
            machine.observe(place)
            benchmark.extra_info |= _floor(case, machine, place, benchmark.stats.stats)

    return run


def _floor(case: Case, machine: Machine, place: Place, stats: Any) -> dict[str, Any]:
    assert case.traffic
    bandwidth = machine.seen[place]
    floor, note = honest_floor(bandwidth.floor_s(case.traffic), stats.min)
    return {
        "bytes": case.traffic.total,
        "place": place.label,
        "read_gb_s": bandwidth.read.bytes_per_s / 1e9,
        "update_gb_s": bandwidth.update.bytes_per_s / 1e9,
        "floor_us": floor * 1e6,
        "achieved_over_floor": stats.median / floor,
        "best_over_floor": stats.min / floor,
        "note": note,
    }
