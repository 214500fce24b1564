"""What of an op's configuration is tuned, and how its launcher asks for it.

A choice is a NamedTuple of whole numbers, none of which is in the order in which a row is
summed: rows of a block, columns of a block, warps, stages. So it may be another for another
number of rows. The key holds everything else that decides what is best.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import torch
import triton

from . import tuned
from .launch import FLOATS, INTERPRETED, device_of

ROWS = (1, 16, 64, 256, 1024, 4096)  # what numbers of rows are rounded up to; the last, or more
_KEPT = 4096  # look-ups: the number of rows is part of them


def rows_bucket(n: int) -> int:
    return next((rows for rows in ROWS if n <= rows), ROWS[-1])


def rank_bucket(rank: int) -> int:
    """A power of two, from the ranks that one tile holds."""
    return max(1 << (rank - 1).bit_length(), 16)


def identity(index: int | None) -> dict[str, Any]:
    """What makes a device another one, as a file holds it."""
    device = device_of(index)
    name = "interpreter" if INTERPRETED else torch.cuda.get_device_name(index)
    return {"name": name, "arch": device.name, "processors": device.processors}


@cache
def _digest() -> str:
    return tuned.digest(Path(__file__).parent.glob("*.py"))


def versions() -> dict[str, str]:
    """Of the engine, torch, Triton, and the kernels' sources."""
    return {**tuned.versions(torch, triton), "kernels": _digest()}


def _text(value: Any) -> str:
    if isinstance(value, tuple):
        return "+".join(map(str, value))
    return FLOATS.get(value, str(value)) if isinstance(value, torch.dtype) else str(value)


class Tunable:
    """One op's choice.

    ``choose(index, n, *case)`` is what a launcher calls: device index, rows, then a value for
    each of ``fields``, in order ("rank" is rounded up). It gives what was measured, else
    ``heuristic(index, n, *case)``, the same for all numbers of rows that are rounded up alike;
    kept, so that a call after the first is one look-up.
    ``space(index, n, *case)``: all that may be chosen there; a file cannot choose anything else.
    """

    def __init__(
        self,
        op: str,
        fields: tuple[str, ...],
        heuristic: Callable[..., Any],
        space: Callable[..., tuple[Any, ...]],
    ) -> None:
        self.op, self.fields = op, fields
        self.heuristic, self.space = heuristic, space
        self.choose = lru_cache(maxsize=_KEPT)(self._choose)
        self._measured = cache(self._looked_up)
        self._forced: Any = None

    def key(self, n: int, *case: Any) -> str:
        """The entry in a file: no two cases that may differ share one."""
        values = zip(self.fields, case, strict=True)
        rounded = ((f, rank_bucket(v) if f == "rank" else v) for f, v in values)
        words = [f"{field}={_text(value)}" for field, value in rounded]
        return " ".join((self.op, *words, f"rows={rows_bucket(n)}"))

    def _choose(self, index: int | None, n: int, *case: Any) -> Any:
        if self._forced is not None:
            return self._forced
        return self._measured(index, rows_bucket(n), *case)

    def forget(self) -> None:
        """Looks everything up anew."""
        self.choose.cache_clear()
        self._measured.cache_clear()

    def _looked_up(self, index: int | None, n: int, *case: Any) -> Any:
        default = self.heuristic(index, n, *case)
        key = self.key(n, *case)
        entry, path = tuned.choice(key, identity(index), versions())
        if not entry:
            return default
        made = {name: entry.get(name) for name in default._fields}
        allowed = self.space(index, n, *case)
        if entry.keys() == made.keys() and all(type(value) is int for value in made.values()):
            choice = type(default)(**made)
            if choice in allowed:
                return choice
        tuned.refuse(path, f"{key}: {str(entry)[:200]} is no choice")
        return default

    @contextmanager
    def forced(self, choice: Any) -> Iterator[None]:
        """Makes every case take this choice: for the tuner, and one thread."""
        self.choose.cache_clear()
        self._forced = choice
        try:
            yield
        finally:
            self._forced = None
            self.choose.cache_clear()
