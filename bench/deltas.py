"""Shared by the forward cases: contenders that return deltas."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from bench import check
from bench.case import Contender
from bench.paired import fastest


def contender(
    name: str,
    spellings: Mapping[str, Callable[[], Any]],
    expected: check.Expected,
    reset: Callable[[], object] = lambda: None,
    inference: bool = False,
) -> Contender:
    """A contender from one or several spellings, each of which returns the output.

    Every spelling is checked, after ``reset`` of the buffers; the fastest is timed.
    """

    def verify() -> None:
        for spelling, call in spellings.items():
            reset()
            check.require(f"{name}, {spelling}", call(), expected)

    best = fastest(spellings, inference)
    return Contender(name, spellings[best], verify, best, inference)
