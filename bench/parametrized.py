"""Cases as pytest parameters."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest

from bench.case import Case


def contenders(cases: Iterable[Case]) -> Any:
    """A mark that makes a test of every contender of every case, case by case."""
    params = [
        pytest.param(case, name, id=f"{case.name}: {name}") for case in cases for name in case.names
    ]
    return pytest.mark.parametrize(("case", "name"), params)
