"""Whole numbers that stand for pools and packed matrices where only numbers can go: in the
graphs of torch.compile, which know no Python object."""

from __future__ import annotations

import itertools
import weakref
import zlib
from typing import Any

_numbers = itertools.count(1)  # never reused: a freed object's handle finds nothing
_living: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()


def issue(thing: Any, sizes: tuple[int, ...]) -> int:
    """A new handle of an object, which it keeps no longer than others do.

    It also tells the sizes apart, which torch.compile takes the shape of a result from: its
    caches on disk know a graph by the numbers in it, and serve other processes.
    """
    key = f"{type(thing).__name__} {sizes}".encode()
    handle = next(_numbers) << 32 | zlib.crc32(key)
    _living[handle] = thing
    return handle


def find(op: str, argument: str, kind: type, handle: int) -> Any:
    """What a handle stands for; ValueError where it was freed or is of another kind."""
    thing = _living.get(handle)
    if isinstance(thing, kind):
        return thing
    got = "nothing that is still there" if thing is None else f"a {type(thing).__name__}"
    raise ValueError(
        f"{op}: {argument}: expected the handle of a living {kind.__name__},"
        f" got {handle}, that of {got}"
    )
