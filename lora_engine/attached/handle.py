"""Attached: adapters on a model, added, replaced and removed while it serves."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from lora_engine.adapters.adapter import Adapter
from lora_engine.adapters.micro_lora import MicroLoRA
from lora_engine.attached.layers import LayerState
from lora_engine.attached.matching import Model, kind_of
from lora_engine.attached.merging import Merged
from lora_engine.attached.model import (
    AttachedCheckpoint,
    AttachedGenerator,
    AttachedModel,
    checkpointed,
    names_of,
)
from lora_engine.attached.placement import Placed, Shelf, saved_of
from lora_engine.attached.rows import BASE, Calls, Name, NotCopied, Rows, mixture_of
from lora_engine.attached.weights import check_free, put_parameters, take_parameters

Source = str | os.PathLike[str] | MicroLoRA | Adapter
_KEPT = 32  # batches whose rows are kept, by their names


_classes: dict[tuple[type, type], Any] = {}


def attached_class(front: type, base: type) -> Any:
    """``base`` with ``front`` before it, under the name of ``base``."""
    if (front, base) in _classes:
        return _classes[front, base]
    # torch's own name would make the compiler take sizes in the layer, of tables, for constants.
    module = __name__ if base.__module__.startswith("torch.") else base.__module__
    names = {"__module__": module, "__qualname__": base.__qualname__}
    return _classes.setdefault((front, base), type(base.__name__, (front, base), names))


class Attached(NotCopied):
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
        self._merged = Merged()
        self._frozen: list[tuple[torch.nn.Parameter, bool]] = []
        self._add("attach", adapters)
        front = AttachedGenerator if hasattr(model, "generate") else AttachedModel
        self._base_class = type(model)
        self._checkpointed = checkpointed(model)
        for module in self._checkpointed:
            module._lora_calls = self.calls
            module.__class__ = attached_class(AttachedCheckpoint, type(module))
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
            _check_unmerged(op, name, self._merged)
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
        for name in placed:
            self._untrain(name, self._placed.get(name))
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

        def device(path: str) -> torch.device:
            found: torch.device = next(model.modules[path].parameters()).device
            return found

        slots = []
        for key, weights in adapter.modules.items():
            path = paths[key]
            kind = kind_of(model.modules[path])
            assert kind is not None  # as checked
            sizes = kind.sizes(model.modules[path])
            state = state_of(path)
            placement = self._shelf.placement(state.placements, sizes, adapter.dtype, device(path))
            slots.append((path, placement, weights))
        saved = (key.rpartition(".")[0] for key in saved_of(adapter))
        for key in (*adapter.embeddings, *adapter.biases, *saved):
            state_of(paths[key])
        return self._shelf.place(adapter, paths, slots, device)

    def _attach_layer(self, path: str, module: torch.nn.Module, state: LayerState) -> None:
        kind = kind_of(module)
        assert kind is not None
        module._lora = state  # type: ignore[assignment]
        module.__class__ = attached_class(kind, state.base_class)
        self._layers[path] = module
        if any(isinstance(m, torch.nn.TransformerEncoderLayer) for m in self._above(path)):
            # Its fast path reads the weights past forward, but not where there is a hook.
            state.hook = module.register_forward_pre_hook(_nothing)

    def _above(self, path: str) -> Iterable[torch.nn.Module]:
        """The modules that a path leads through."""
        steps = path.split(".")
        return (self.model.get_submodule(".".join(steps[:i])) for i in range(len(steps)))

    def remove(self, name: str) -> None:
        """Removes an adapter; a call that has begun with it ends with it.

        Where set_adapter had named it, alone or in a mixture, the base is served.
        """
        self._check_attached("Attached.remove")
        with self._shelf.lock:
            self._known("Attached.remove", name)
            _check_unmerged("Attached.remove", name, self._merged)
            self._untrain(name, self._placed[name])
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
        mixture = mixture_of("set_adapter", self._active, self._placed)
        by_torch = [p for p, _ in mixture if p.trained or p.dropout]
        self.calls.default = self._rows([mixture], True, by_torch) if mixture else None

    def _rows(
        self,
        mixtures: Sequence[Sequence[tuple[Placed, float]]],
        uniform: bool,
        by_torch: Iterable[Placed],
        repeat: int = 1,
    ) -> Rows | None:
        """by_torch: those that torch's own ops compute."""
        if not any(mixtures):
            return None
        by_torch = frozenset(by_torch)
        for placed in by_torch:
            placed.view()
        device = next((p.device for p in self.model.parameters()), torch.device("cpu"))
        return Rows(mixtures, uniform, device, by_torch, repeat)

    def rows_of(self, names: Any, batch: int | None, repeat: int = 1) -> Rows | None:
        """What a call's adapter_names, or with None set_adapter's choice, stand for; checked
        before it runs. None: the base alone."""
        if self._shelf.dropped:
            self._shelf.sweep()
        op = "adapter_names"
        grad, training = torch.is_grad_enabled(), self.model.training
        key: tuple[Any, ...] = (grad, training, repeat)
        if names is not None:
            names = names_of(op, names)
            if batch is not None and len(names) != batch:
                want = f"one for each of the {batch} rows"
                raise ValueError(f"{op}: expected {want}, got {len(names)}")
            key += tuple(n if isinstance(n, str) else _frozen(n) for n in names)
        if self._merged.adapters:
            if names is not None:
                _check_unmerged(op, next(iter(self._merged.adapters)), self._merged)
            return None
        kept = self._kept  # the one of now: who changes names makes a new one
        placed, active = self._placed, self._active
        if key in kept:
            return kept[key]
        wanted = [active] if names is None else names
        mixtures = [mixture_of(op, name, placed) for name in wanted]
        named = {p for mixture in mixtures for p, _ in mixture}
        by_torch = [p for p in named if (p.trained and grad) or (p.dropout and training)]
        rows = self._rows(mixtures, names is None, by_torch, repeat)
        if names is not None and rows is not None and grad:
            self.calls.recorded = True
        if len(kept) >= _KEPT:
            kept.clear()
        kept[key] = rows
        return rows

    # ---- training ----

    def parameters(self, name: str) -> list[torch.nn.Parameter]:
        """An adapter's weights as Parameters, layer by layer A [r, in] and B [out, r], then
        biases and modules_to_save: for a torch optimiser, which steps what is served in place.

        From then on the adapter is trained: calls under autograd record it, as PEFT's layers do
        (its dropout included, in train mode), and the model's parameters() has them too, but not
        its state_dict. The model's own weights are frozen, as get_peft_model does; detach puts
        their requires_grad back. A 16-bit adapter becomes float32 first, as with PEFT.

        A step is outside the old-or-new promise: a call at the same time may see some weights
        before it and some after. Where the adapter is replaced or removed they stay valid, zeroed,
        and train nothing that is served. Raises ValueError (name), TypeError (a pool that is not
        of the C++ core).
        """
        op = "Attached.parameters"
        self._check_attached(op)
        with self._shelf.lock:
            placed = self._known(op, name)
            if not placed.trained:
                if placed.adapter.dtype != "float32":
                    self._add(op, {name: replace(placed.now(), dtype="float32")})
                    placed = self._known(op, name)
                self._train(name, placed)
        self._shelf.sweep()
        return placed.weights.parameters()

    def _train(self, name: str, placed: Placed) -> None:
        for pool, slot in placed.slots.values():
            pool.view(slot)  # or TypeError
        weights = placed.view()
        check_free(self._layers, name, weights)
        if not self._frozen:
            self._frozen = [(p, p.requires_grad) for p in self.model.parameters()]
            for parameter, _ in self._frozen:
                parameter.requires_grad_(False)
        weights.train()
        put_parameters(self._layers, name, weights)
        self._changed()

    def _untrain(self, name: str, placed: Placed | None) -> None:
        if placed is not None and placed.trained:
            take_parameters(self._layers, name, placed.weights)

    # ---- merged into the base weights ----

    def merge(self, name: str) -> None:
        """Adds an adapter's deltas to the model's own weights, which then serve every row; its
        modules_to_save take the place of the model's.

        Until it is unmerged calls take no adapter_names, as with PEFT, set_adapter has no effect,
        and the model's state_dict is the merged one. The weights before are kept, at the cost of
        their memory. In float32, rounded once. Not while a call runs. Raises TypeError (packed
        weights, a bias that the layer has none for), ValueError (a weight that layers share, a
        sum that is not finite, merged already), changing nothing.
        """
        op = "Attached.merge"
        self._check_attached(op)
        with self._shelf.lock:
            placed = self._known(op, name)
            _check_unmerged(op, name, self._merged)
            self._merge(op, {**self._merged.adapters, name: placed})

    def unmerge(self, name: str) -> None:
        """Takes it out again: with none left merged, the model's weights to the bit."""
        op = "Attached.unmerge"
        self._check_attached(op)
        with self._shelf.lock:
            if name not in self._merged.adapters:
                names = ", ".join(self._merged.adapters) or "none"
                raise ValueError(f"{op}: name: expected a merged adapter ({names}), got {name!r}")
            self._merge(op, {k: p for k, p in self._merged.adapters.items() if k != name})

    def _merge(self, op: str, adapters: Mapping[str, Placed]) -> None:
        modules = dict(self.model.named_modules(remove_duplicate=False))
        self._merged.change(op, adapters, modules)
        self._changed()
        if adapters:
            self.calls.default = None

    # ---- out of the model ----

    def adapter(self, name: str) -> Adapter:
        """A copy of an adapter with its weights of now."""
        self._check_attached("Attached.adapter")
        with self._shelf.lock:
            return self._known("Attached.adapter", name).now()

    def save(self, name: str, folder: str | os.PathLike[str]) -> None:
        """An adapter as a PEFT folder; ``Adapter.save``."""
        self.adapter(name).save(folder)

    # ---- back to the model as it was ----

    def detach(self) -> None:
        """Gives the model back as it was before ``attach``: the same modules, classes, weights."""
        self._check_attached("Attached.detach")
        with self._shelf.lock:
            self._merge("Attached.detach", {})
            for name, placed in self._placed.items():
                self._untrain(name, placed)
            for parameter, required in self._frozen:
                parameter.requires_grad_(required)
            del self.model._lora_model
            self.model.__class__ = self._base_class
            for module in self._layers.values():
                state: Any = module._lora
                module.__class__ = state.base_class
                if state.hook is not None:
                    state.hook.remove()
                del module._lora
            for module in self._checkpointed:
                module.__class__ = module.__class__.__bases__[1]
                del module._lora_calls
            self._placed, self._layers = {}, {}
            self._active = None
            self._changed()
        self._shelf.sweep()


def _nothing(module: torch.nn.Module, args: Any) -> None:
    """A hook."""


def _frozen(name: Any) -> Any:
    return tuple(name.items()) if isinstance(name, Mapping) else name


def _check_unmerged(op: str, name: str, merged: Merged) -> None:
    if name in merged.adapters:
        raise ValueError(f"{op}: expected no merged adapter, got {name!r}: unmerge it first")
