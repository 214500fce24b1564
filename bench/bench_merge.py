"""Merging adapters: ``pytest bench/bench_merge.py``."""

from typing import Any

from bench.cases_merge import CASES
from bench.parametrized import contenders


@contenders(CASES)
def bench_merge(report: Any, case: Any, name: str) -> None:
    report(case, name)
