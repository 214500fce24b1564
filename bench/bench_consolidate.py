"""The background pass over sessions: ``pytest bench/bench_consolidate.py``."""

from typing import Any

from bench.cases_consolidate import CASES
from bench.parametrized import contenders


@contenders(CASES)
def bench_consolidate(report: Any, case: Any, name: str) -> None:
    report(case, name)
