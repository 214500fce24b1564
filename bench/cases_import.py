"""import lora_engine against import numpy: whole fresh interpreters."""

from __future__ import annotations

import subprocess
import sys

from bench.case import OURS, Case, Contender


def _imports(name: str, module: str) -> Contender:
    def run(code: str) -> None:
        subprocess.run([sys.executable, "-c", code], check=True)

    def check() -> None:
        run(f"import sys, {module}; assert 'torch' not in sys.modules, 'torch came along'")

    return Contender(name, lambda: run(f"import {module}"), check, f"python -c 'import {module}'")


def build() -> list[Contender]:
    return [_imports(OURS, "lora_engine"), _imports("numpy", "numpy")]


CASES = (Case("import lora_engine", "fresh interpreter", build, extra_ms={"numpy": 50.0}),)
