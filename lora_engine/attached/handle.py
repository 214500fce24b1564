"""Attached: adapters on a model, added, replaced and removed while it serves."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch

from lora_engine.adapters.adapter import Adapter
from lora_engine.adapters.micro_lora import MicroLoRA
from lora_engine.attached.classes import put_before
from lora_engine.attached.layers import LayerState
from lora_engine.attached.matching import Model, is_sequence_first, kind_of
from lora_engine.attached.merging import MergedBase
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


class Attached(NotCopied):
    """The adapters of a model, by name. Made by ``lora_engine.attach``."""

    def __init__(self, model: torch.nn.Module, adapters: Mapping[str, Source]) -> None:
        self.model = model
        self.calls = Calls()
        self._shelf = Shelf()
        self._placed: Mapping[str, Placed] = {}  # exchanged whole
        self._layers: dict[str, torch.nn.Module] = {}  # attached modules by path
        self._active: Name = next(iter(adapters))
        self._kept: dict[Any, Rows] = {}
        self._merged = MergedBase()
        self._frozen: list[tuple[torch.nn.Parameter, bool]] = []
        self._changes = ExitStack()  # of modules, which closing it takes back
        try:
            self._add("attach", adapters)
            for module in checkpointed(model):
                put_before(self._changes, module, AttachedCheckpoint, "_lora_calls", self.calls)
            front = AttachedGenerator if hasattr(model, "generate") else AttachedModel
            put_before(self._changes, model, front, "_lora_model", self)
        except BaseException:
            self._changes.close()
            raise

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
        model.check_free(self.calls)
        prepared = {}
        for name, source in sources.items():
            if not isinstance(name, str) or not name or name == BASE:
                raise ValueError(f"{op}: expected names other than {BASE}, got {name!r}")
            _check_unmerged(op, name, self._merged)
            adapter = model.adapter(name, source)
            paths = model.paths(name, adapter)
            model.check(name, adapter, paths)
            prepared[name] = adapter, paths
        states: dict[str, LayerState] = {}
        placed = {
            name: self._place(model, adapter, paths, states)
            for name, (adapter, paths) in prepared.items()
        }
        with ExitStack() as changes:
            for path, state in states.items():
                self._attach_layer(changes, path, model.modules[path], state)
            self._changes.push(changes.pop_all())
        self._layers.update((path, model.modules[path]) for path in states)
        for name in placed:
            self._untrain(name, self._placed.get(name))
        self._placed = {**self._placed, **placed}
        self._changed()

    def _place(
        self, model: Model, adapter: Adapter, paths: Mapping[str, str], new: dict[str, LayerState]
    ) -> Placed:
        def state_of(path: str) -> LayerState:
            state = getattr(model.modules[path], "_lora", None) or new.get(path)
            if state is None:
                module = model.modules[path]
                kind: Any = kind_of(module)
                packed = kind.packed(module, f"{model.op}: {path or 'the model'}")
                state = new[path] = LayerState(path, self.calls, packed)
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

    def _attach_layer(
        self, changes: ExitStack, path: str, module: torch.nn.Module, state: LayerState
    ) -> None:
        kind = kind_of(module)
        assert kind is not None
        put_before(changes, module, kind, "_lora", state)
        above = list(self._above(path))
        state.sequence_first = any(map(is_sequence_first, above))
        if any(isinstance(m, torch.nn.TransformerEncoderLayer) for m in above):
            # Its fast path reads the weights past forward, but not where there is a hook.
            changes.callback(module.register_forward_pre_hook(_nothing).remove)

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
        active = None if self._merged.adapters else self._active
        mixture = mixture_of("set_adapter", active, self._placed)
        by_torch = [p for p, _ in mixture if p.trained or p.dropout]
        self.calls.default = self._rows([mixture], True, by_torch)

    def _rows(
        self,
        mixtures: Sequence[Sequence[tuple[Placed, float]]],
        uniform: bool,
        by_torch: Iterable[Placed],
        repeat: int = 1,
    ) -> Rows:
        """by_torch: those that torch's own ops compute."""
        by_torch = frozenset(by_torch)
        for placed in by_torch:
            placed.view()
        device = next((p.device for p in self.model.parameters()), torch.device("cpu"))
        with torch.inference_mode(False):  # they are kept
            return Rows(mixtures, uniform, device, by_torch, repeat)

    def rows_of(self, names: Any, batch: int | None, repeat: int = 1) -> Rows:
        """What a call's adapter_names, or with None set_adapter's choice, stand for; checked
        before it runs."""
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
            return self.calls.default
        kept = self._kept  # the one of now: who changes names makes a new one
        placed, active = self._placed, self._active
        if key in kept:
            return kept[key]
        if names is not None:
            self._check_batch_first(op)
        wanted = [active] if names is None else names
        mixtures = [mixture_of(op, name, placed) for name in wanted]
        named = {p for mixture in mixtures for p, _ in mixture}
        by_torch = [p for p in named if (p.trained and grad) or (p.dropout and training)]
        rows = self._rows(mixtures, names is None, by_torch, repeat)
        if len(kept) >= _KEPT:
            kept.clear()
        kept[key] = rows
        return rows

    def _check_batch_first(self, op: str) -> None:
        for path, module in self._layers.items():
            state: Any = module._lora
            if state.sequence_first:
                raise ValueError(
                    f"{op}: expected layers whose dimension 0 is the batch, got {path}, of a module"
                    " with batch_first=False: use set_adapter, or batch_first=True"
                )

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
            self._changes.close()
            self._placed, self._layers = {}, {}
            self._active = None
            self._changed()
        self._shelf.sweep()


def _nothing(module: torch.nn.Module, args: Any) -> None:
    """A hook."""


def _frozen(name: Any) -> Any:
    return tuple(name.items()) if isinstance(name, Mapping) else name


def _check_unmerged(op: str, name: str, merged: MergedBase) -> None:
    if name in merged.adapters:
        raise ValueError(f"{op}: expected no merged adapter, got {name!r}: unmerge it first")
