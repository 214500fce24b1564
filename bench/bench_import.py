"""import lora_engine in fresh interpreters: ``pytest bench/bench_import.py``."""

from typing import Any

from bench.cases_import import CASES
from bench.parametrized import contenders


@contenders(CASES)
def bench_import(report: Any, case: Any, name: str) -> None:
    report(case, name)
