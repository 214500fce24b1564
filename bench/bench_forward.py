"""lora.forward of one row: ``pytest bench/bench_forward.py``."""

from typing import Any

from bench.cases_forward import CASES
from bench.parametrized import contenders


@contenders(CASES)
def bench_forward(report: Any, case: Any, name: str) -> None:
    report(case, name)
