"""Sona's instant feedback and its background pass: ``pytest bench/bench_sona.py``."""

from typing import Any

from bench.cases_sona import CASES
from bench.parametrized import contenders


@contenders(CASES)
def bench_sona(report: Any, case: Any, name: str) -> None:
    report(case, name)
