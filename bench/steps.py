"""Shared by the adapt cases: contenders that change the weights.

A step is checked at a learning rate that moves the weights by about their own
size, and timed at one so small that a million steps leave them finite.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from bench import check
from bench.case import Contender
from bench.paired import fastest

CHECKED_LR = 0.5
TIMED_LR = 1e-9


class Run(NamedTuple):
    """call: one step. weights: (A [n, r, in], B [n, out, r]) as they are now."""

    call: Callable[[], Any]
    weights: Callable[[], tuple[Any, Any]]


Spelling = Callable[[float], Run]  # of the learning rate


def contender(
    name: str,
    spellings: Mapping[str, Spelling],
    expected: tuple[check.Expected, check.Expected],
    inference: bool = False,
) -> Contender:
    """A contender from one or several spellings: all are checked, the fastest is timed."""

    def verify() -> None:
        for spelling, make in spellings.items():
            run = make(CHECKED_LR)
            run.call()
            for factor, got, want in zip("AB", run.weights(), expected, strict=True):
                check.require(f"{name}, {spelling}: {factor}", got, want)

    calls = {spelling: make(TIMED_LR).call for spelling, make in spellings.items()}
    best = fastest(calls, inference)
    return Contender(name, calls[best], verify, best, inference)
