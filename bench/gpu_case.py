"""What the GPU suite times: a case is one op at one shape, the bytes it must move, its contenders
and what is wanted. All of it is data that can be read without a GPU."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, NamedTuple

from bench.case import OURS, absent

DEVICE = "cuda"
FEATURES = 4096
ROTATE = 100e6  # bytes of distinct inputs that a rotation must go through, at least
MOST_SETS = 512


class Absent(Exception):
    """A peer that is not there, and why."""


def peer(module: str) -> Any:
    """The module of a peer, or Absent: not installed, or not for this machine."""
    package = module.split(".")[0]
    if why := absent(package):
        raise Absent(why)
    try:
        return import_module(module)
    except Exception as failed:  # of a library for another CUDA, say
        said = " ".join(f"{type(failed).__name__}: {failed}".split())[:200]
        raise Absent(f"{package} cannot be imported: {said}") from failed


class Timed(NamedTuple):
    """calls: the same work on each set of inputs in turn. check: given ``run``, which runs the
    calls once, raises AssertionError where the result is wrong."""

    calls: Sequence[Callable[[], Any]]
    check: Callable[[Callable[[], Any]], None]


@dataclass(frozen=True)
class Case:
    """nbytes: what one call must read and write, whoever makes it. contenders: each takes what
    ``make(sets)`` gives; ours is among them. expected_us: by the kernel's docstring, on an H200.
    within: the floor, achieved/floor wanted. faster: how many times a peer's speed. of_copy: the
    part of the copy's bandwidth. launches: the most of one call."""

    op: str
    shape: str
    tests: tuple[str, ...]
    nbytes: int
    make: Callable[[int], Any]
    contenders: Mapping[str, Callable[[Any], Timed]]
    expected_us: float | None = None
    within: float | None = None
    faster: Mapping[str, float] = field(default_factory=dict)
    of_copy: float | None = None
    launches: int | None = None

    @property
    def name(self) -> str:
        return f"{self.op}, {self.shape}"

    @property
    def sets(self) -> int:
        """How many sets of inputs are rotated over: more than ROTATE bytes of them."""
        return max(2, min(MOST_SETS, int(ROTATE // self.nbytes) + 1))

    @property
    def peers(self) -> tuple[str, ...]:
        return tuple(name for name in self.contenders if name != OURS)


# ---- bytes: each operand once, what is updated in place twice ----


def matrix(rows: int, item: int, features: int = FEATURES) -> int:
    return rows * features * item


def weights(adapters: int, rank: int, item: int) -> int:
    """A and B of 4096 features."""
    return adapters * rank * 2 * FEATURES * item


def delta_bytes(rows: int, adapters: int, rank: int, item: int) -> int:
    """Weights and x read; y read and written."""
    return weights(adapters, rank, item) + 3 * matrix(rows, item)


def adapt_bytes(rows: int, adapters: int, rank: int, item: int) -> int:
    """x and grad read, weights read and written."""
    return 2 * weights(adapters, rank, item) + 2 * matrix(rows, item)


def factor_bytes(adapters: int, rank: int) -> int:
    """Of EWC's records: F and anchors, float32."""
    return 2 * weights(adapters, rank, 4)


def delta_record_bytes(adapters: int, rank: int) -> int:
    """Of EWC's records in delta form: anchors, u and v, float32."""
    return adapters * (rank + 1) * 2 * FEATURES * 4


def packed_bytes(rows: int = FEATURES, cols: int = FEATURES, blocksize: int = 64) -> int:
    """Codes and absmax of an NF4 matrix."""
    return rows * cols // 2 + 4 * rows * cols // blocksize


def nf4_bytes(rows: int, item: int = 2) -> int:
    """The packed matrix and x read, y written."""
    return packed_bytes() + 2 * matrix(rows, item)


def fisher_bytes(rows: int, rank: int, item: int) -> int:
    """x, grad and the adapter read; F_A and F_B written, float32."""
    return 2 * matrix(rows, item) + weights(1, rank, item) + weights(1, rank, 4)
