"""Fisher information against torch and torch.func: ``pytest bench/bench_fisher.py``."""

from typing import Any

from bench.cases_fisher import CASES
from bench.parametrized import contenders


@contenders(CASES)
def bench_fisher(report: Any, case: Any, name: str) -> None:
    report(case, name)
