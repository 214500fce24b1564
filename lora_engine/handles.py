"""Tensors that stand for pools and packed matrices where only tensors can go: in the graphs of
torch.compile, which know no Python object.

A handle is empty, [number, 0, width]: the number of what it stands for is a size, which a compiler
takes for an input of the graph, where it would make a constant of a plain number; so one graph
serves a pool in each layer. The width is that of a result.
"""

from __future__ import annotations

import os
import weakref
from typing import Any

_living: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()


def issue(op: str, thing: Any, width: int, device: Any) -> Any:
    """A new handle of an object, which it keeps no longer than others do.

    Its number is drawn from 2^56: no other process, nor this one later, has it for another
    object, and a number that went into a file finds nothing there.
    """
    import torch

    if torch.compiler.is_compiling():
        raise RuntimeError(f"{op}: expected to be read once before it is traced")
    number = 2 + int.from_bytes(os.urandom(7), "little")  # 0 and 1 are never left open
    with torch.inference_mode(False):
        # The first stride is 0 for those who allocate by strides, as opcheck does.
        handle = torch.empty_strided(
            (number, 0, width), (0, width, 1), dtype=torch.int64, device=device
        )
    torch._dynamo.maybe_mark_dynamic(handle, 0)  # else the first graph is of this number only
    _living[number] = thing
    return handle


def find(op: str, argument: str, kind: type, number: int) -> Any:
    """What a number stands for; ValueError where it was freed or is of another kind."""
    thing = _living.get(number)
    if isinstance(thing, kind):
        return thing
    got = "nothing that is still there" if thing is None else f"a {type(thing).__name__}"
    raise ValueError(
        f"{op}: {argument}: expected the handle of a living {kind.__name__} of this process,"
        f" got that of {got}"
    )


def number_of(op: str, argument: str, kind: type, handle: Any) -> Any:
    """The number of a handle; ValueError for another tensor."""
    sizes = handle.shape
    if len(sizes) == 3 and not sizes[1]:
        return sizes[0]
    raise ValueError(
        f"{op}: {argument}: expected the handle of a {kind.__name__}, got a tensor {list(sizes)}"
    )
