"""Attached: adapters on a model, added, replaced and removed while it serves."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch

from lora_engine.adapters.adapter import Adapter
from lora_engine.adapters.micro_lora import MicroLoRA
from lora_engine.attached.layers import LayerState
from lora_engine.attached.matching import Model, kind_of
from lora_engine.attached.model import AttachedGenerator, AttachedModel, names_of
from lora_engine.attached.placement import Placed, Shelf
from lora_engine.attached.rows import BASE, Calls, Name, Rows, mixture_of

Source = str | os.PathLike[str] | MicroLoRA | Adapter
_KEPT = 32  # batches whose rows are kept, by their names


_classes: dict[tuple[type, type], Any] = {}


def attached_class(front: type, base: type) -> Any:
    """``base`` with ``front`` before it, under the name of ``base``."""
    if (front, base) in _classes:
        return _classes[front, base]
    names = {"__module__": base.__module__, "__qualname__": base.__qualname__}
    return _classes.setdefault((front, base), type(base.__name__, (front, base), names))


class Attached:
    """The adapters of a model, by name. Made by ``lora_engine.attach``."""

    def __init__(self, model: torch.nn.Module, adapters: Mapping[str, Source]) -> None:
        if hasattr(model, "_lora_model"):
            raise ValueError(
                "attach: model: expected one that nothing is attached to, got an attached one:"
                " use the add of its handle, or detach that first"
            )
        self.model = model
        self.calls = Calls()
        self._shelf = Shelf()
        self._placed: Mapping[str, Placed] = {}  # exchanged whole
        self._layers: dict[str, torch.nn.Module] = {}  # attached modules by path
        self._active: Name = next(iter(adapters))
        self._kept: dict[Any, Rows | None] = {}
        self._add("attach", adapters)
        front = AttachedGenerator if hasattr(model, "generate") else AttachedModel
        self._base_class = type(model)
        model._lora_model = self  # type: ignore[assignment]
        model.__class__ = attached_class(front, self._base_class)

    def __repr__(self) -> str:
        model = type(self.model).__name__
        return f"Attached({model}, {len(self._layers)} layers, adapters={list(self._placed)})"

    @property
    def names(self) -> tuple[str, ...]:
        """Of the adapters, in the order they were added."""
        return tuple(self._placed)

    def _check_attached(self, op: str) -> None:
        if getattr(self.model, "_lora_model", None) is not self:
            raise RuntimeError(f"{op}: expected an attached model, got one that was detached")

    # ---- adapters in and out ----

    def add(self, name: str, adapter: Source) -> None:
        """Adds an adapter, or replaces the one of that name in one step.

        A call that has begun goes on with the one it began with, in all its layers. Raises what
        ``attach`` raises, changing nothing.
        """
        self._check_attached("Attached.add")
        with self._shelf.lock:
            self._add("Attached.add", {name: adapter})
        self._shelf.sweep()

    def _add(self, op: str, sources: Mapping[str, Source]) -> None:
        """Checks and places all, then shows all; or changes nothing."""
        model = Model(op, self.model)
        prepared = {}
        for name, source in sources.items():
            if not isinstance(name, str) or not name or name == BASE:
                raise ValueError(f"{op}: expected names other than {BASE}, got {name!r}")
            adapter = model.adapter(name, source)
            paths = model.paths(name, adapter)
            model.check(name, adapter, paths)
            self._check_free(op, model, paths)
            prepared[name] = adapter, paths
        states: dict[str, LayerState] = {}
        placed = {
            name: self._place(model, adapter, paths, states)
            for name, (adapter, paths) in prepared.items()
        }
        for path, state in states.items():
            self._attach_layer(path, model.modules[path], state)
        self._placed = {**self._placed, **placed}
        self._changed()

    def _check_free(self, op: str, model: Model, paths: Mapping[str, str]) -> None:
        for path in paths.values():
            state = getattr(model.modules[path], "_lora", None)
            if state is not None and state.calls is not self.calls:
                raise ValueError(
                    f"{op}: model: expected layers that nothing is attached to, got"
                    f" {path or 'the model'}: detach its handle first, or add to that"
                )

    def _place(
        self, model: Model, adapter: Adapter, paths: Mapping[str, str], new: dict[str, LayerState]
    ) -> Placed:
        def state_of(path: str) -> LayerState:
            state = getattr(model.modules[path], "_lora", None) or new.get(path)
            if state is None:
                module = model.modules[path]
                kind: Any = kind_of(module)
                packed = kind.packed(module, f"{model.op}: {path or 'the model'}")
                state = new[path] = LayerState(path, self.calls, type(module), packed)
            return state

        slots = []
        for key, weights in adapter.modules.items():
            path = paths[key]
            module: Any = model.modules[path]
            kind = kind_of(module)
            assert kind is not None  # as checked
            placement = self._shelf.placement(
                state_of(path).placements, kind.sizes(module), adapter.dtype, module.weight.device
            )
            slots.append((placement, weights))
        return self._shelf.place(adapter, paths, slots)

    def _attach_layer(self, path: str, module: torch.nn.Module, state: LayerState) -> None:
        kind = kind_of(module)
        assert kind is not None
        module._lora = state  # type: ignore[assignment]
        module.__class__ = attached_class(kind, state.base_class)
        self._layers[path] = module

    def remove(self, name: str) -> None:
        """Removes an adapter; a call that has begun with it ends with it.

        Where set_adapter had named it, alone or in a mixture, the base is served.
        """
        self._check_attached("Attached.remove")
        with self._shelf.lock:
            self._known("Attached.remove", name)
            active = self._active
            if active == name or (isinstance(active, Mapping) and name in active):
                self._active = None
            self._placed = {key: p for key, p in self._placed.items() if key != name}
            self._changed()
        self._shelf.sweep()

    def _known(self, op: str, name: str) -> Placed:
        if name not in self._placed:
            names = ", ".join(self._placed) or "none"
            raise ValueError(f"{op}: name: expected an attached adapter ({names}), got {name!r}")
        return self._placed[name]

    # ---- what rows name ----

    def set_adapter(self, name: Name) -> None:
        """What calls without adapter_names use for all rows: an adapter, a mixture
        {name: weight}, or None for the base."""
        self._check_attached("Attached.set_adapter")
        with self._shelf.lock:
            mixture_of("Attached.set_adapter: name", name, self._placed)
            self._active = dict(name) if isinstance(name, Mapping) else name
            self._changed()
        self._shelf.sweep()

    def _changed(self) -> None:
        """After any change to what names mean."""
        self._kept = {}
        self.calls.default = self._uniform()

    def _uniform(self) -> Rows | None:
        mixture = mixture_of("set_adapter", self._active, self._placed)
        return self._rows([mixture], True, 1) if mixture else None

    def _rows(self, mixtures: list[Any], uniform: bool, repeat: int) -> Rows:
        return Rows(mixtures, uniform, self._device(), frozenset(), repeat)

    def _device(self) -> torch.device:
        return next((p.device for p in self.model.parameters()), torch.device("cpu"))

    def rows_by_default(self) -> Rows | None:
        """What a call without adapter_names serves."""
        if self._shelf.dropped:
            self._shelf.sweep()
        return self.calls.default

    def rows_of(self, names: Any, batch: int | None, repeat: int = 1) -> Rows | None:
        """What a call's adapter_names stand for, checked before it runs; None: the base alone."""
        if self._shelf.dropped:
            self._shelf.sweep()
        op = "adapter_names"
        names = names_of(op, names)
        if batch is not None and len(names) != batch:
            raise ValueError(f"{op}: expected one for each of the {batch} rows, got {len(names)}")
        key = (repeat, *(n if isinstance(n, str) else _frozen(n) for n in names))
        kept = self._kept  # the one of now: who changes names makes a new one
        if key in kept:
            return kept[key]
        placed = self._placed
        mixtures = [mixture_of(op, name, placed) for name in names]
        rows = self._rows(mixtures, False, repeat) if any(mixtures) else None
        if len(kept) >= _KEPT:
            kept.clear()
        kept[key] = rows
        return rows

    # ---- back to the model as it was ----

    def detach(self) -> None:
        """Gives the model back as it was before ``attach``: the same modules, classes, weights."""
        self._check_attached("Attached.detach")
        with self._shelf.lock:
            del self.model._lora_model
            self.model.__class__ = self._base_class
            for module in self._layers.values():
                state: Any = module._lora
                module.__class__ = state.base_class
                del module._lora
            self._placed, self._layers = {}, {}
            self._active = None
            self._changed()
        self._shelf.sweep()


def _frozen(name: Any) -> Any:
    return tuple(name.items()) if isinstance(name, Mapping) else name
