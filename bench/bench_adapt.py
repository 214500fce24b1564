"""lora.adapt of one row: ``pytest bench/bench_adapt.py``."""

from typing import Any

from bench.cases_adapt import CASES
from bench.parametrized import contenders


@contenders(CASES)
def bench_adapt(report: Any, case: Any, name: str) -> None:
    report(case, name)
