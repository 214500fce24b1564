"""Where attached adapters are: their slots in pools that layers of one shape share."""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from lora_engine.adapters.adapter import Adapter, LoraWeights
from lora_engine.adapters.pool import AdapterPool
from lora_engine.attached.weights import Biases, Factors, Saved, Weights

Tensor = torch.Tensor
_FIRST = 64  # numbers that a table has room for at first; it doubles


class Placement:
    """A layer's part of one pool: the slot here of each adapter, by the adapter's number.

    table: int32, the slot of each number, -1 for an adapter that does not name this layer; at 0,
    which stands for none, always -1. slots: the same on the host.
    """

    def __init__(self, pool: AdapterPool, numbers: int, device: torch.device) -> None:
        self.pool, self.handle = pool, pool.handle
        self.slots: dict[int, int] = {}
        self.table = self._new(numbers, device)

    def _new(self, numbers: int, device: torch.device) -> Tensor:
        with torch.inference_mode(False):
            table = torch.full((numbers,), -1, dtype=torch.int32, device=device)
        torch._dynamo.maybe_mark_dynamic(table, 0)  # one that grew compiles nothing anew
        return table

    def make_room(self, numbers: int) -> None:
        larger = self._new(numbers, self.table.device)
        larger[: len(self.table)] = self.table
        self.table = larger

    def put(self, number: int, slot: int) -> None:
        self.table[number] = slot
        self.slots[number] = slot

    def take(self, number: int) -> None:
        self.table[number] = -1
        self.pool.remove(self.slots.pop(number))


class Placed:
    """An adapter in an attached model: its number, and what each layer has of it.

    slots: by path, where its factors are. weights: the same, and what is in no pool, as torch
    tensors. When nobody holds it, neither the handle nor a call that began with it, its number
    and its slots are free again.
    """

    def __init__(
        self,
        adapter: Adapter,
        number: int,
        paths: Mapping[str, str],
        device: Callable[[str], torch.device],
    ) -> None:
        self.number, self.adapter, self.paths = number, _outline(adapter), paths
        self.dropout = float(adapter.peft_config.get("lora_dropout") or 0.0)
        self.slots: dict[str, tuple[AdapterPool, int]] = {}
        self.weights = Weights()
        self._viewed = False
        for key, w in adapter.embeddings.items():
            A, B = (_tensor(f, device(paths[key])) for f in (w.A, w.B))
            self.weights.factors[paths[key]] = Factors(A, B, w.scaling)
        own = {paths[key]: bias for key, bias in adapter.biases.items()}
        lora = {paths[key]: w for key, w in adapter.modules.items() if w.bias_delta is not None}
        lora_biases = {  # lora_B's, as training steps them
            paths[key]: adapter.lora_biases.get(key, w.bias_delta / np.float32(w.scaling))
            for key, w in adapter.modules.items()
            if w.bias_delta is not None
        }
        for path in dict.fromkeys([*own, *lora]):
            to = device(path)
            whole = _tensor(own[path], to) if path in own else None
            part = _tensor(lora_biases[path], to) if path in lora else None
            scaling = lora[path].scaling if path in lora else 1.0
            self.weights.biases[path] = Biases(whole, part, scaling)
        self._saved: dict[str, tuple[str, str]] = {}  # by key: path, "weight" or "bias"
        for key in saved_of(adapter):
            module, _, name = key.rpartition(".")
            path = paths[module]
            self._saved[key] = path, name
            values = _tensor(adapter.modules_to_save[key], device(path))
            setattr(self.weights.saved.setdefault(path, Saved()), name, values)

    @property
    def trained(self) -> bool:
        return self.weights.trained

    def view(self) -> Weights:
        """All weights as tensors, those in pools as views of their slots (copies of them, where
        the pool is not of the C++ core: they are not trained)."""
        if not self._viewed:
            with torch.inference_mode(False):  # they outlive the call, and may be trained
                self._view()
            self._viewed = True
        return self.weights

    def _view(self) -> None:
        for path, (pool, slot) in self.slots.items():
            try:
                A, B = pool.view(slot)
            except TypeError:
                A, B = (torch.from_numpy(np.array(f)) for f in pool.get(slot)[:2])
            scaling = pool.get(slot)[2]
            self.weights.factors[path] = Factors(A, B, scaling)

    def now(self) -> Adapter:
        """The adapter with its weights of now."""
        modules, embeddings, biases, lora_biases = {}, {}, {}, {}
        for key, w in self.adapter.modules.items():
            A, B, _ = self.slots[self.paths[key]][0].get(self.slots[self.paths[key]][1])
            bias = self.weights.biases.get(self.paths[key])
            if bias is None or bias.lora is None:
                modules[key] = w._replace(A=A, B=B)
            else:
                lora_biases[key] = _array(bias.lora)
                modules[key] = LoraWeights(A, B, w.scaling, lora_biases[key] * w.scaling)
        for key, w in self.adapter.embeddings.items():
            factors = self.weights.factors[self.paths[key]]
            embeddings[key] = w._replace(A=_array(factors.A), B=_array(factors.B))
        for key in self.adapter.biases:
            own = self.weights.biases[self.paths[key]].own
            assert own is not None
            biases[key] = _array(own)
        saved = {
            key: _array(getattr(self.weights.saved[path], name))
            for key, (path, name) in self._saved.items()
        }
        return replace(
            self.adapter, modules=modules, embeddings=embeddings, biases=biases,
            lora_biases=lora_biases, modules_to_save={**self.adapter.modules_to_save, **saved},
        )  # fmt: skip


def saved_of(adapter: Adapter) -> list[str]:
    """The modules_to_save that stand in for the base's weights, by parameter; without those that
    PEFT writes of an adapted layer, which ``attach`` takes where they are the base's."""
    adapted = adapter.modules.keys() | adapter.embeddings.keys()
    return [key for key in adapter.modules_to_save if key.rpartition(".")[0] not in adapted]


def _outline(adapter: Adapter) -> Adapter:
    """The adapter without what is kept elsewhere."""
    none = np.zeros((0, 0), np.float32)
    kept = adapter.modules_to_save.keys() - saved_of(adapter)
    return replace(
        adapter,
        modules={k: LoraWeights(none, none, w.scaling) for k, w in adapter.modules.items()},
        embeddings={k: LoraWeights(none, none, w.scaling) for k, w in adapter.embeddings.items()},
        biases=dict.fromkeys(adapter.biases, none),
        modules_to_save={
            key: v if key in kept else none for key, v in adapter.modules_to_save.items()
        },
    )


def _tensor(array: Any, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.from_numpy(np.array(array, np.float32)).to(device)


def _array(tensor: Tensor) -> Any:
    return tensor.detach().float().cpu().numpy().copy()


class Shelf:
    """All pools and numbers of one attached model. Its lock is held by whoever changes either."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.pools: dict[tuple[Any, ...], AdapterPool] = {}
        self._next = 1  # a number; 0 is none
        self._room = _FIRST  # of every table: a layer is also asked for numbers it has no slot of
        self._placements: weakref.WeakSet[Placement] = weakref.WeakSet()  # layers hold them
        self._free: deque[int] = deque()
        self.dropped: deque[tuple[int, list[Placement]]] = deque()

    def placement(
        self,
        placements: dict[str, Placement],
        sizes: tuple[int, int],
        dtype: str,
        device: torch.device,
    ) -> Placement:
        """Of a layer's placements the one for adapters of a dtype, made at first use."""
        if dtype not in placements:
            key = (*sizes, dtype, device)
            if key not in self.pools:
                self.pools[key] = AdapterPool(*sizes, dtype=dtype, device=device)
            placements[dtype] = Placement(self.pools[key], self._room, device)
            self._placements.add(placements[dtype])
        return placements[dtype]

    def place(
        self,
        adapter: Adapter,
        paths: Mapping[str, str],
        slots: Iterable[tuple[str, Placement, LoraWeights]],
        device: Callable[[str], torch.device],
    ) -> Placed:
        """Copies an adapter's factors in; all of them, or none."""
        self.sweep()
        number = self._free.popleft() if self._free else self._next
        self._next = max(self._next, number + 1)
        if self._next > self._room:
            self._room *= 2
            for placement in self._placements:
                placement.make_room(self._room)
        placed = Placed(adapter, number, paths, device)
        done: list[Placement] = []
        weakref.finalize(placed, self.dropped.append, (number, done)).atexit = False
        for path, placement, weights in slots:
            slot = placement.pool.add(weights.A, weights.B, weights.scaling)
            placement.put(number, slot)
            placed.slots[path] = placement.pool, slot
            done.append(placement)
        return placed

    def sweep(self) -> None:
        """Frees the slots of adapters that nobody holds any more.

        Not done where they are dropped, which may be anywhere, also inside a pool's own lock.
        """
        if not self.dropped:
            return
        with self.lock:
            while self.dropped:
                number, placements = self.dropped.popleft()
                for placement in placements:
                    placement.take(number)
                self._free.append(number)
