"""batched_adapt of 256 users, plain and with EWC: ``pytest bench/bench_pool_adapt.py``."""

from typing import Any

from bench.cases_pool_adapt import CASES
from bench.parametrized import contenders


@contenders(CASES)
def bench_pool_adapt(report: Any, case: Any, name: str) -> None:
    report(case, name)
