"""nf4_linear: ``pytest bench/bench_nf4.py``."""

from typing import Any

from bench.cases_nf4 import CASES
from bench.parametrized import contenders


@contenders(CASES)
def bench_nf4(report: Any, case: Any, name: str) -> None:
    report(case, name)
