"""Where attached adapters are: their slots in pools that layers of one shape share."""

from __future__ import annotations

import math
import threading
import weakref
from collections import deque
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from lora_engine.adapters.adapter import Adapter, LoraWeights
from lora_engine.adapters.pool import AdapterPool

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

    def put(self, number: int, slot: int) -> None:
        if number >= len(self.table):
            larger = self._new(2 * max(number, len(self.table)), self.table.device)
            larger[: len(self.table)] = self.table
            self.table = larger
        self.table[number] = slot
        self.slots[number] = slot

    def take(self, number: int) -> None:
        self.table[number] = -1
        self.pool.remove(self.slots.pop(number))


class Placed:
    """An adapter in an attached model: its number, and what each layer has of it.

    biases: by path, what is added to the layer's own bias. embeddings: by path, (A [r, rows],
    B [dim, r], scaling). When nobody holds it, neither the handle nor a call that began with it,
    its number and its slots are free again.
    """

    def __init__(self, adapter: Adapter, number: int, paths: Mapping[str, str]) -> None:
        self.number = number
        self.peft_config = adapter.peft_config
        self.dtype = adapter.dtype
        self.paths = paths  # the model's path of each of the adapter's
        self.scalings = {paths[key]: w.scaling for key, w in adapter.modules.items()}
        self.biases: dict[str, Tensor] = {}
        self.embeddings: dict[str, tuple[Tensor, Tensor, float]] = {}
        self.dropout = float(adapter.peft_config.get("lora_dropout") or 0.0)


class Shelf:
    """All pools and numbers of one attached model. Its lock is held by whoever changes either."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.pools: dict[tuple[Any, ...], AdapterPool] = {}
        self._next = 1  # a number; 0 is none
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
            room = _FIRST * 2 ** max(0, math.ceil(math.log2(self._next / _FIRST)))
            placements[dtype] = Placement(self.pools[key], room, device)
        return placements[dtype]

    def place(
        self,
        adapter: Adapter,
        paths: Mapping[str, str],
        slots: Iterable[tuple[Placement, LoraWeights]],
    ) -> Placed:
        """Copies an adapter's factors in; all of them, or none."""
        self.sweep()
        number = self._free.popleft() if self._free else self._next
        self._next = max(self._next, number + 1)
        placed = Placed(adapter, number, paths)
        done: list[Placement] = []
        weakref.finalize(placed, self.dropped.append, (number, done)).atexit = False
        for placement, weights in slots:
            slot = placement.pool.add(weights.A, weights.B, weights.scaling)
            placement.put(number, slot)
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
