"""How an attached module's class is exchanged: for one with another before it, until detached."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch

from lora_engine.attached.model import AttachedModel, forward_with_names

_classes: dict[tuple[type, type], Any] = {}


def attached_class(front: type, base: type) -> Any:
    """``base`` with ``front`` before it, under the name of ``base``."""
    if (front, base) in _classes:
        return _classes[front, base]
    # torch's own name would make the compiler take sizes in the layer, of tables, for constants.
    module = __name__ if base.__module__.startswith("torch.") else base.__module__
    names: dict[str, Any] = {"__module__": module, "__qualname__": base.__qualname__}
    if issubclass(front, AttachedModel):
        names["forward"] = forward_with_names(base)
    return _classes.setdefault((front, base), type(base.__name__, (front, base), names))


def put_before(
    changes: ExitStack, module: torch.nn.Module, front: type, attribute: str, value: Any
) -> None:
    """A class before a module's own, with what it needs to know, until the changes are closed."""
    base = type(module)
    setattr(module, attribute, value)
    changes.callback(delattr, module, attribute)
    module.__class__ = attached_class(front, base)
    changes.callback(setattr, module, "__class__", base)
