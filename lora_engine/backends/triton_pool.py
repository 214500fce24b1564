"""The pool of ``lora_engine._C`` in a device's memory."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from lora_engine.backends import triton_adapt as adapting
from lora_engine.backends.reference import Step
from lora_engine.backends.triton_arrays import (
    DTYPES,
    check_finite,
    check_overlap,
    ids_and_weights,
    matrix,
    output,
    refuse,
)
from lora_engine.backends.triton_storage import ALIGNED, Storage
from lora_engine.kernels.batched_lora_delta import Batch, batched_lora_delta, shrink
from lora_engine.kernels.launch import INTERPRETED, capturing, cdiv
from lora_engine.kernels.storage import Adapters


def pool_device(device: str | None) -> torch.device:
    """Where a pool of that device is; None: where the kernels run."""
    runs_on = "cpu" if INTERPRETED else "cuda"
    name = device or runs_on
    if name.split(":")[0] != runs_on:
        raise refuse(ValueError, "AdapterPool", "device", runs_on, device)
    try:
        return torch.empty(0, device=name).device  # with its index
    except RuntimeError as why:
        raise refuse(
            ValueError, "AdapterPool", "device", "one that is there", f"{device}: {why}"
        ) from None


class Weights(NamedTuple):
    """Of one adapter: flat, slice by slice A and the transpose of B; the rank of each slice."""

    flat: torch.Tensor
    ranks: tuple[int, ...]
    scaling: float
    epoch: int


class _Slot(NamedTuple):
    """What the host knows of a slot in use. replaced: what ``set`` put aside, with history."""

    blocks: list[int]  # of the arena: the weights, and with history those before an adapt
    size: int
    ranks: tuple[int, ...]
    epoch: int
    replaced: Weights | None


def _host(array: Any, op: str, name: str) -> torch.Tensor:
    """Weights to be copied in, from wherever they are."""
    if isinstance(array, np.ndarray):
        array = torch.from_numpy(np.array(array)) if array.dtype.kind == "f" else array
    if not isinstance(array, torch.Tensor) or array.dtype not in DTYPES.values():
        got = getattr(array, "dtype", type(array).__name__)
        raise refuse(TypeError, op, name, "float32, bfloat16 or float16", got)
    return array.detach()


class Pool:
    """As ``_C.Pool``: slots in one arena, with tables that kernels read.

    With a capacity and a max_rank everything is allocated at once and stays where it is, and
    no grid, size or address of a launch depends on which adapters there are: a captured graph
    replays any. Else arena and tables double when they are full; once a graph was captured
    that raises RuntimeError. Slot ids are checked on the device: a bad one counts as -1, and
    the next call of the host raises IndexError.
    """

    def __init__(
        self,
        in_features: int,
        out_features: Sequence[int],
        dtype: str,
        capacity: int,
        max_rank: int,
        history: int,
        seed: int,
        device: torch.device,
    ) -> None:
        op = "AdapterPool"
        if dtype not in DTYPES:
            raise refuse(TypeError, op, "dtype", "float32, bfloat16 or float16", dtype)
        for name, size in (
            ("in_features", in_features),
            *(("out_features", o) for o in out_features),
        ):
            if not 1 <= size < 2**31:
                raise refuse(ValueError, op, name, "1 to 2^31 - 1", size)
        if not out_features:
            raise refuse(ValueError, op, "out_features", "at least one slice", 0)
        self.in_features, self.outs = in_features, tuple(out_features)
        self.dtype, self.capacity, self.max_rank = dtype, capacity, max_rank
        self.history, self.seed = history, seed
        self.device = device
        self.lock = threading.RLock()  # what one call enqueues, no other call comes between
        self._slots: dict[int, _Slot] = {}
        self._freed: list[int] = []
        self._issued = self._epochs = 0
        self._names = torch.empty(0, dtype=torch.int32, device=device)
        self._storage = Storage(in_features, self.outs, dtype, capacity, max_rank, history, device)

    @property
    def adapters(self) -> Adapters:
        """What kernels read."""
        return self._storage.adapters

    def check_uncaptured(self, op: str) -> None:
        """Refuses what the host keeps account of: a replay would do it again without it."""
        if capturing(self.device):
            want = "none that is being captured: it is not part of a graph"
            raise refuse(RuntimeError, op, "stream", want, "a capture")

    # ---- adapters in and out ----

    def _read(self, op: str, A: list[Any], B: list[Any], scaling: float) -> Weights:
        """The adapter as it will be stored; refuses what does not fit."""
        for name, factors in (("A", A), ("B", B)):
            if len(factors) != len(self.outs):
                raise refuse(ValueError, op, name, f"{len(self.outs)} slices", len(factors))
        if all(a is None and b is None for a, b in zip(A, B, strict=True)):
            raise refuse(ValueError, op, "A, B", "at least one slice", "none")
        check_finite(op, "scaling", scaling)
        ranks, parts = [], []
        for s, (a, b, out) in enumerate(zip(A, B, self.outs, strict=True)):
            if (a is None) != (b is None):
                raise refuse(ValueError, op, "A, B", f"both or neither of slice {s}", "one")
            if a is None:
                ranks.append(0)
                continue
            a, b = _host(a, op, "A"), _host(b, op, "B")
            for name, got, axis, size in (("A", a, 1, self.in_features), ("B", b, 0, out)):
                if got.ndim != 2 or got.shape[axis] != size:
                    want = f"[r, {size}]" if axis else f"[{size}, r]"
                    raise refuse(ValueError, op, name, f"shape {want}", list(got.shape))
            if b.shape[1] != a.shape[0]:
                want = f"shape [{out}, {a.shape[0]}], the rank of A"
                raise refuse(ValueError, op, "B", want, list(b.shape))
            if self.max_rank and a.shape[0] > self.max_rank:
                raise refuse(ValueError, op, "A", f"a rank of at most {self.max_rank}", a.shape[0])
            ranks.append(a.shape[0])
            part = torch.cat([a.float().reshape(-1), b.float().T.reshape(-1).to(a.device)])
            parts.append(part.to(self.device, DTYPES[self.dtype]))
        return Weights(self._spaced(parts), tuple(ranks), float(scaling), 0)

    def _spaced(self, parts: list[torch.Tensor]) -> torch.Tensor:
        """Parts one after another, each from a multiple of ALIGNED on."""
        pad = torch.nn.functional.pad
        return torch.cat([pad(p, (0, -p.numel() % ALIGNED)) for p in parts])

    def _place(
        self, slot: int, blocks: list[int], weights: Weights, replaced: Weights | None
    ) -> None:
        """Writes an adapter and what kernels read of it, into blocks that are the slot's."""
        storage = self._storage
        size, used = self._size(weights), weights.flat.numel()
        storage.widen(weights.ranks)
        a = self.adapters
        a.arena[blocks[0] : blocks[0] + used] = weights.flat
        a.arena[blocks[0] + used : blocks[0] + size] = 0
        epoch = weights.epoch
        if not epoch:
            self._epochs += 1
            epoch = self._epochs
        starts = storage.starts(weights.ranks)[:-1]
        begin = torch.tensor(starts, dtype=torch.int64, device=self.device)
        a.offsets[slot] = begin + blocks[0]
        if self.history:
            a.previous[slot] = begin + blocks[1]
        a.ranks[slot] = torch.tensor(weights.ranks, dtype=torch.int32, device=self.device)
        a.scalings[slot] = weights.scaling
        a.epochs[slot] = epoch
        a.kept[slot] = 0
        a.versions[slot] += 1
        self._slots[slot] = _Slot(blocks, size, weights.ranks, epoch, replaced)

    def _size(self, weights: Weights) -> int:
        """Of an adapter's blocks."""
        return self._storage.fixed or weights.flat.numel()

    def _replace(self, slot: int, weights: Weights, replaced: Weights | None) -> None:
        """Another adapter in a slot: in its blocks, or in new ones before these are freed."""
        held = self._slots[slot]
        if self._size(weights) == held.size:
            self._place(slot, held.blocks, weights, replaced)
        else:
            self._place(slot, self._storage.take(self._size(weights)), weights, replaced)
            self._storage.give(held.blocks, held.size)

    def slot(self, op: str, slot: int) -> _Slot:
        """What the host knows of a slot in use, or IndexError."""
        self.raise_bad_id()
        return self._known(op, slot)

    def _known(self, op: str, slot: int) -> _Slot:
        held = self._slots.get(slot)
        if held is None:
            removed = 0 <= slot < self._issued
            want = "a slot in use" if removed else f"one of the pool's {self._issued} slots"
            raise refuse(
                IndexError, op, "slot", want, f"{slot}, which was removed" if removed else slot
            )
        return held

    def epochs(self) -> dict[int, int]:
        """Of the adapters in the pool, by slot."""
        return {slot: held.epoch for slot, held in self._slots.items()}

    def _weights(self, slot: int, block: int, ranks: tuple[int, ...]) -> Weights:
        flat = self.adapters.arena[block : block + self._storage.block_size(ranks)].clone()
        scaling = float(self.adapters.scalings[slot])
        return Weights(flat, ranks, scaling, self._slots[slot].epoch)

    def add(self, A: list[Any], B: list[Any], scaling: float) -> int:
        op = "AdapterPool.add"
        with self.lock:
            self.check_uncaptured(op)
            self.raise_bad_id()
            weights = self._read(op, A, B, scaling)
            if self.capacity and len(self._slots) >= self.capacity:
                got = f"a pool at its capacity of {self.capacity}"
                raise refuse(ValueError, op, "pool", "room for an adapter", got)
            storage = self._storage
            storage.check_room(op, self._issued + (not self._freed), weights.ranks, None)
            if not self._freed:
                storage.grow_tables(self._issued)
            blocks = storage.take(self._size(weights))
            slot = self._freed[0] if self._freed else self._issued
            self._place(slot, blocks, weights, None)
            if self._freed:
                del self._freed[0]
            else:
                self._issued += 1
            return slot

    def set(self, slot: int, A: list[Any], B: list[Any], scaling: float) -> None:
        op = "AdapterPool.set"
        with self.lock:
            self.check_uncaptured(op)
            held = self.slot(op, slot)
            weights = self._read(op, A, B, scaling)
            self._storage.check_room(op, self._issued, weights.ranks, held.size)
            replaced = self._weights(slot, held.blocks[0], held.ranks) if self.history else None
            self._replace(slot, weights, replaced)

    def rollback(self, slot: int) -> None:
        op = "AdapterPool.rollback"
        with self.lock:
            self.check_uncaptured(op)
            held = self.slot(op, slot)
            if not self.history:
                raise refuse(ValueError, op, "pool", "history=1", "a pool made with history=0")
            weights = held.replaced
            if bool(self.adapters.kept[slot]):
                weights = self._weights(slot, held.blocks[1], held.ranks)
            if weights is None:
                got = f"none kept for slot {slot}"
                raise refuse(ValueError, op, "slot", "weights before the last change", got)
            self._storage.check_room(op, self._issued, weights.ranks, held.size)
            self._replace(slot, weights, None)

    def remove(self, slot: int) -> None:
        op = "AdapterPool.remove"
        with self.lock:
            self.check_uncaptured(op)
            held = self._known(op, slot)
            self.adapters.ranks[slot] = -1
            self._storage.give(held.blocks, held.size)
            del self._slots[slot]
            self._freed.append(slot)

    def get(self, slot: int) -> tuple[list[Any], list[Any], float]:
        op = "AdapterPool.get"
        with self.lock:
            self.check_uncaptured(op)
            held = self.slot(op, slot)
            weights = self._weights(slot, held.blocks[0], held.ranks)
        values, at = weights.flat.float().cpu().numpy(), 0
        A: list[Any] = []
        B: list[Any] = []
        for rank, out in zip(held.ranks, self.outs, strict=True):
            middle, end = at + rank * self.in_features, at + rank * (self.in_features + out)
            missing = not rank and len(self.outs) > 1
            A.append(None if missing else values[at:middle].reshape(rank, self.in_features).copy())
            B.append(None if missing else values[middle:end].reshape(rank, out).T.copy())
            at += cdiv(end - at, ALIGNED) * ALIGNED
        return A, B, weights.scaling

    def ranks(self, slot: int) -> list[int]:
        return list(self.slot("AdapterPool.ranks", slot).ranks)

    def version(self, slot: int) -> int:
        self.check_uncaptured("AdapterPool.version")
        self.slot("AdapterPool.version", slot)
        return int(self.adapters.versions[slot])

    def info(self) -> tuple[int, int, int]:
        tensors = [t for t in self.adapters if isinstance(t, torch.Tensor)]
        return len(self._slots), self._issued, sum(t.numel() * t.element_size() for t in tensors)

    # ---- ops ----

    def raise_bad_id(self) -> None:
        """Raises IndexError for a bad id that a kernel met in an earlier call."""
        flag = self.adapters.flag
        if flag[0]:
            got = int(flag[0]) >> 1
            flag.zero_()
            raise refuse(
                IndexError, "AdapterPool", "ids", "-1 or slots in use in the calls before",
                f"{got}, which was taken for -1",
            )  # fmt: skip

    def batch(self, op: str, ids: Any, weights: Any, x: torch.Tensor, transposed: bool) -> Batch:
        """Checked ids and weights with this pool's tables."""
        if x.device != self.device:
            where = f"a tensor on {self.device}, where the pool is"
            raise refuse(ValueError, op, "x", where, x.device)
        given = ids_and_weights(op, ids, weights, x)
        if capturing(self.device):
            self._storage.captured = True
        return Batch(self.adapters, given.slots, given.weights, transposed)

    def forward(
        self, x: Any, ids: Any, weights: Any, out: Any, accumulate: bool, transposed: bool = False
    ) -> Any:
        op = "batched_lora_delta"
        with self.lock:
            self.raise_bad_id()
            widths = self.in_features, sum(self.outs)
            rows = matrix(op, "x", x, None, widths[transposed])
            batch = self.batch(op, ids, weights, rows, transposed)
            to = output(op, x, rows, out, widths[not transposed])
            for name, other in (("ids", batch.ids), ("weights", batch.weights)):
                check_overlap(op, "out", to.rows, name, other)
            batched_lora_delta(rows, batch, to.rows, accumulate and out is not None)
            return to.result

    def _all_of(self, op: str, slot: int, n: int) -> torch.Tensor:
        """ids that name one slot n times, without a copy of each."""
        if slot >= self._names.numel():
            if capturing(self.device):
                want = "a call with this slot before the capture: this one copies from the host"
                raise refuse(RuntimeError, op, "stream", want, "a capture")
            names = torch.arange(self.adapters.ranks.shape[0], dtype=torch.int32)
            self._names = names.to(self.device)
        return self._names[slot].expand(n)

    def forward_slot(
        self, x: Any, slot: int, out: Any, accumulate: bool, transposed: bool, width: int
    ) -> Any:
        op = "MicroLoRA.forward"
        self.slot(op, slot)
        n = x.shape[0] if getattr(x, "ndim", 1) == 2 else 1
        return self.forward(x, self._all_of(op, slot, n), None, out, accumulate, transposed)

    def adapt(self, x: Any, grad: Any, ids: Any, weights: Any, step: Step) -> Any:
        return adapting.adapt(self, x, grad, ids, weights, step)

    def adapt_slot(self, x: Any, grad: Any, slot: int, step: Step) -> tuple[int, float]:
        return adapting.adapt_slot(self, x, grad, slot, step)

    def gradient_size(self, slot: int) -> int:
        return adapting.gradient_size(self, slot)

    def gradient(self, x: Any, grad: Any, slot: int, h: Any, gradient: Any) -> tuple[int, float]:
        return adapting.gradient(self, x, grad, slot, h, gradient)

    def apply(self, gradient: Any, slot: int, scale: float, step: Step) -> tuple[int, float]:
        return adapting.apply(self, gradient, slot, scale, step)

    def shrink(self, x: Any, slot: int) -> Any:
        """h = A x [n, sum of ranks] float32."""
        op = "AdapterPool.shrink"
        with self.lock:
            ranks = self.slot(op, slot).ranks
            rows = matrix(op, "x", x, None, self.in_features)
            batch = self.batch(op, self._all_of(op, slot, rows.shape[0]), None, rows, False)
            partial, splits = shrink(rows, batch)
            n, each = rows.shape[0], batch.rank_stride
            held = partial[: n * splits * len(ranks) * each].view(n, splits, len(ranks), each)
            parts = [held[:, :, s, :r].sum(1) for s, r in enumerate(ranks) if r]
            h = torch.cat(parts, 1) if parts else rows.new_zeros((n, 0), dtype=torch.float32)
        return h if isinstance(x, torch.Tensor) else h.numpy()
