"""pool.forward of 64 rows on 64 adapters: ``pytest bench/bench_batched.py``."""

from typing import Any

from bench.cases_batched import CASES
from bench.parametrized import contenders


@contenders(CASES)
def bench_batched(report: Any, case: Any, name: str) -> None:
    report(case, name)
