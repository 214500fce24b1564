"""Arena and tables of a pool on a device: blocks taken and given, growth, and who forbids it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

from lora_engine.backends.triton_arrays import DTYPES, refuse
from lora_engine.kernels.launch import cdiv
from lora_engine.kernels.storage import Adapters

ALIGNED = 16  # elements: where a slot's weights begin, for wide loads
SLOTS = 16  # of a pool without a capacity, at first


class Storage:
    """With a capacity and a max_rank everything is allocated at once and stays where it is;
    else arena and tables double when they are full, until a CUDA graph holds them.

    A captured graph keeps the addresses, the number of slots and the room for ranks that it
    was captured with. Nobody tells a pool that its graphs are gone, so it holds for good.
    """

    def __init__(
        self,
        in_features: int,
        outs: tuple[int, ...],
        dtype: str,
        capacity: int,
        max_rank: int,
        history: int,
        device: torch.device,
    ) -> None:
        self.in_features, self.outs, self.device = in_features, outs, device
        self.places = 1 + history  # blocks of a slot
        self.captured = False  # whether a graph holds what ``adapters`` names
        self._end = 0
        self._free: list[tuple[int, int]] = []  # (begin, end), ascending, with gaps between
        fixed = self.block_size((max_rank,) * len(outs)) if capacity and max_rank else 0
        self.fixed = fixed  # the size of every block, 0 where it is as large as its adapter
        self._max_rank = max_rank if fixed else 0
        elements = capacity * fixed * self.places
        self.adapters = self._tables(
            capacity or SLOTS, self._new((elements,), DTYPES[dtype]), self._max_rank
        )

    def _new(self, shape: tuple[int, ...], dtype: torch.dtype, fill: int = 0) -> torch.Tensor:
        size = math.prod(shape) * dtype.itemsize
        if size < 2**63:
            try:
                return torch.full(shape, fill, dtype=dtype, device=self.device)
            except RuntimeError as why:
                if self.device.type != "cpu" and not isinstance(why, torch.OutOfMemoryError):
                    raise  # not about memory; the CPU's allocator has no class of its own
        want = f"{size} bytes on {self.device}, for {list(shape)} of {dtype}"
        raise refuse(MemoryError, "AdapterPool", "memory", want, "less: state smaller limits")

    def _tables(self, slots: int, arena: torch.Tensor, max_rank: int) -> Adapters:
        shape = (slots, len(self.outs))
        firsts = np.cumsum([0, *self.outs])
        # Pinned: kernels write it, also in a graph's replay, and the host reads it without a wait.
        flag = torch.zeros(1, dtype=torch.int64, pin_memory=self.device.type == "cuda")
        history = self.places > 1
        return Adapters(
            arena=arena,
            offsets=self._new(shape, torch.int64),
            ranks=self._new(shape, torch.int32, -1),
            scalings=self._new((slots,), torch.float32),
            versions=self._new((slots,), torch.int64),
            epochs=self._new((slots,), torch.int64),
            previous=self._new(shape if history else (0, len(self.outs)), torch.int64, -1),
            kept=self._new((slots,), torch.int32),
            firsts=torch.tensor(firsts, dtype=torch.int32, device=self.device),
            flag=flag,
            in_features=self.in_features,
            outs=self.outs,
            max_rank=max_rank,
        )

    def starts(self, ranks: Sequence[int]) -> list[int]:
        """Where each slice begins in a block, and the block's end."""
        at = [0]
        for rank, out in zip(ranks, self.outs, strict=True):
            at.append(at[-1] + cdiv(rank * (self.in_features + out), ALIGNED) * ALIGNED)
        return at

    def block_size(self, ranks: Sequence[int]) -> int:
        return self.starts(ranks)[-1]

    def check_room(self, op: str, slots: int, ranks: tuple[int, ...], freed: int | None) -> None:
        """Raises RuntimeError where an adapter of these ranks needs more than a graph's memory.

        slots: issued with it. freed: the size of the blocks that it replaces.
        """
        if not self.captured:
            return
        a, size = self.adapters, self.fixed or self.block_size(ranks)
        there = self.places if size == freed else 0
        if size:
            there += sum((end - begin) // size for begin, end in self._free)
        end = self._end + max(self.places - there, 0) * size
        needs = [
            f"{name} {need} (has {has})"
            for name, need, has in (
                ("slots:", slots, a.ranks.shape[0]),
                ("rank:", max(ranks), a.max_rank),
                ("elements of memory:", end, a.arena.numel()),
            )
            if need > has
        ]
        if needs:
            sizes = f"{self.in_features}, {self.outs if len(self.outs) > 1 else self.outs[0]}"
            want = (
                "room, for a CUDA graph was captured with it and it cannot grow; state capacity"
                " and max_rank when you make it"
            )
            got = f"AdapterPool({sizes}), which needs {', '.join(needs)}"
            raise refuse(RuntimeError, op, "pool", want, got)

    def take(self, size: int) -> list[int]:
        """Blocks of that size for a slot; grows the arena where it is full, or changes nothing."""
        free, end, blocks = list(self._free), self._end, []
        for _ in range(self.places):
            fits = [i for i, (b, e) in enumerate(free) if e - b >= size > 0]
            if fits:
                i = min(fits, key=lambda i: free[i][1] - free[i][0])
                blocks.append(free[i][0])
                free[i] = free[i][0] + size, free[i][1]
                if free[i][0] == free[i][1]:
                    del free[i]
            else:
                blocks.append(end)
                end += size
        arena = self.adapters.arena
        if end > arena.numel():
            larger = self._new((max(2 * arena.numel(), end),), arena.dtype)
            larger[: arena.numel()] = arena
            self.adapters = self.adapters._replace(arena=larger)
        self._free, self._end = free, end
        return blocks

    def give(self, blocks: Sequence[int], size: int) -> None:
        """Zeroes blocks and frees them, one with what is free beside them."""
        if not size:
            return
        for begin in blocks:
            self.adapters.arena[begin : begin + size] = 0
        spans = sorted([*self._free, *((b, b + size) for b in blocks)])
        self._free = []
        for begin, end in spans:
            if self._free and self._free[-1][1] == begin:
                begin = self._free.pop()[0]
            self._free.append((begin, end))
        if self._free and self._free[-1][1] == self._end:
            self._end = self._free.pop()[0]

    def widen(self, ranks: tuple[int, ...]) -> None:
        """Makes room in working memory for an adapter of these ranks."""
        widest = max(self.adapters.max_rank, *ranks)
        if widest > self.adapters.max_rank:
            self.adapters = self.adapters._replace(max_rank=widest)

    def grow_tables(self, issued: int) -> None:
        """Makes room for one slot more than were issued."""
        old = self.adapters
        held = old.ranks.shape[0]
        if issued < held:
            return
        larger = self._tables(2 * held, old.arena, old.max_rank)
        for name in ("offsets", "ranks", "scalings", "versions", "epochs", "previous", "kept"):
            values = getattr(old, name)
            getattr(larger, name)[: values.shape[0]] = values
        self.adapters = larger._replace(firsts=old.firsts, flag=old.flag)
