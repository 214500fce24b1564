"""AdapterPool: the weights of many adapters, served and taught in one call."""

from __future__ import annotations

import operator
import sys
import threading
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from lora_engine import handles, ops
from lora_engine.adapters.owners import Owners
from lora_engine.adapters.pending import PendingGradient
from lora_engine.backends import chosen

if TYPE_CHECKING:
    from lora_engine.learning.ewc import EWC


_REMOVED = 64  # slots at a time, of ``remove_all``


def _number(op: str, value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        got = f"AdapterPool.{op}: scaling: expected a number, got {value!r}"
        raise TypeError(got) from None


def _size(name: str, value: Any) -> int:
    try:
        return operator.index(value)
    except TypeError:
        got = f"AdapterPool: {name}: expected a whole number, got {value!r}"
        raise TypeError(got) from None


def _backend_of(device: Any) -> tuple[Any, tuple[Any, ...]]:
    """The backend for a pool on that device, and the device where its Pool takes one."""
    torch = sys.modules.get("torch")  # who has a device of it has imported it
    if torch is not None and isinstance(device, torch.device):
        device = str(device)
    if device is not None and not isinstance(device, str):
        raise TypeError(
            f"AdapterPool: device: expected a name, a torch.device or None, got {device!r}"
        )
    try:
        backend = chosen((device or "").split(":")[0] == "cuda")
    except RuntimeError as why:
        raise ValueError(f"AdapterPool: device: expected cpu, got {device}: {why}") from None
    if hasattr(backend, "pool_device"):
        return backend, (backend.pool_device(device),)
    if device not in (None, "cpu"):
        raise ValueError(f"AdapterPool: device: expected cpu, got {device}")
    return backend, ()


class AdapterPool:
    """Slots for adapters of one shape, each of a rank of its own.

    in_features: length of x. out_features: length of y, or a tuple for several
    slices whose outputs are concatenated (q, k, v in one call). dtype: how the
    weights are stored, "float32", "bfloat16" or "float16" (rounded to nearest when
    added, so beyond 65504 to Inf in float16; stochastically when adapted, keyed
    (seed, slot, version, element), and then never to Inf).
    device: where the weights are, "cpu" or "cuda" ("cuda:1", ...; or a torch.device), with x, ids
    and outputs beside them; None: the CPU, or what LORA_ENGINE_BACKEND=triton computes on.
    capacity, max_rank: limits, default none; on a GPU both together fix the storage, which
    else doubles when it is full, but raises RuntimeError once a CUDA graph was captured with
    the pool, which has to outlive the graph. history=1 keeps the weights before the last
    change, for ``rollback``, at twice the memory.

    On a GPU ids are not read by the host, but where autograd records ``nf4_linear``: a slot
    that is out of range or removed counts as -1, and the next call that uses the pool raises
    IndexError. A pool is used on one stream at a time; who uses several orders them (by
    events), as with any tensor.

    Safe to use from several threads: a forward sees an adapter as it was before
    or after an adapt, never in between.

    It is neither copied nor pickled, nor is a module that holds one.

    Raises ValueError (shape, range), TypeError (dtype), MemoryError.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int | Sequence[int],
        dtype: str = "float32",
        device: Any = None,
        capacity: int | None = None,
        max_rank: int | None = None,
        history: int = 0,
        seed: int = 0,
    ) -> None:
        if history not in (0, 1):
            raise ValueError(f"AdapterPool: history: expected 0 or 1, got {history}")
        for name, limit in (("capacity", capacity), ("max_rank", max_rank)):
            if limit is not None and limit < 1:
                raise ValueError(f"AdapterPool: {name}: expected at least 1 or None, got {limit}")
        if seed < 0:
            raise ValueError(f"AdapterPool: seed: expected 0 or more, got {seed}")
        self._sliced = isinstance(out_features, (Sequence, np.ndarray))
        self.in_features = _size("in_features", in_features)
        slices = (
            out_features if isinstance(out_features, (Sequence, np.ndarray)) else [out_features]
        )
        self.slices: tuple[int, ...] = tuple(_size("out_features", out) for out in slices)
        self.out_features = sum(self.slices)
        self.dtype = str(dtype)
        self._backend, where = _backend_of(device)
        self._storage = self._backend.Pool(
            self.in_features,
            list(self.slices),
            self.dtype,
            capacity or 0,
            max_rank or 0,
            history,
            seed,
            *where,
        )
        self._handle: Any = None
        self._pending: dict[int, PendingGradient] = {}
        # Of _pending and _owners, and held while a slot changes hands: a gradient that waits
        # is applied to the adapter that it is of, or to none.
        self._pending_lock = threading.Lock()
        self._owners = Owners()
        self._history = bool(history)

    def __len__(self) -> int:
        """Adapters in the pool."""
        return int(self._storage.info()[0])

    def __repr__(self) -> str:
        shape = f"{self.in_features}, {self.slices if self._sliced else self.out_features}"
        return (
            f"AdapterPool({shape}, dtype={self.dtype!r}): {len(self)} adapters, {self.nbytes} bytes"
        )

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError(
            "AdapterPool: copy, pickle: expected adapters, got a pool: add what get(slot) gives"
            " to another pool, or save it as a file of adapters, and make the pool anew"
        )

    @property
    def nbytes(self) -> int:
        """Bytes the pool has allocated: weights, bookkeeping, gradients that wait."""
        with self._pending_lock:
            waiting = sum(
                w.gradient.nbytes for w in self._pending.values() if w.gradient is not None
            )
        return int(self._storage.info()[2]) + waiting

    # ---- for torch.ops.lora_engine ----

    @property
    def handle(self) -> Any:
        """The tensor that stands for this pool in ``torch.ops.lora_engine``, while it lives.

        Empty, beside the weights; its sizes say whose it is, in this process. Made at first use,
        which imports torch and its compiler and defines the ops: read it once before
        torch.compile traces what uses it.
        """
        if self._handle is None:
            from lora_engine import torch_ops  # noqa: F401  defines the ops

            device = getattr(self._storage, "device", "cpu")
            self._handle = handles.issue("AdapterPool.handle", self, self.out_features, device)
        return self._handle

    # ---- adapters in and out ----

    def _slices_of(self, matrix: Any) -> list[Any]:
        return list(matrix) if self._sliced else [matrix]

    def add(self, A: Any, B: Any, scaling: float) -> int:
        """Copies an adapter in and returns its slot; freed slots are reissued oldest first.

        A [r, in], B [out, r], scaling = alpha / r; of a pool of several slices,
        lists of A and of B, None for a missing slice. Raises ValueError where a
        shape does not fit or the pool is at its capacity.
        """
        s = _number("add", scaling)
        slot = int(self._storage.add(self._slices_of(A), self._slices_of(B), s))
        with self._pending_lock:
            self._owners.begin(slot)
        return slot

    def set(self, slot: int, A: Any, B: Any, scaling: float) -> None:
        """Replaces a slot's adapter, of any rank, in one step for those who read it."""
        s = _number("set", scaling)
        with self._pending_lock:
            self._storage.set(slot, self._slices_of(A), self._slices_of(B), s)
            self._owners.begin(slot, self.version(slot) if self._history else None)
            self._pending.pop(slot, None)

    def get(self, slot: int) -> tuple[Any, Any, float]:
        """Copies of (A, B, scaling), as NumPy float32; lists of A and B with several slices."""
        A, B, scaling = self._storage.get(slot)
        return (A, B, scaling) if self._sliced else (A[0], B[0], scaling)

    def view(self, slot: int) -> Any:
        """(A [r, in], B [out, r]) as torch tensors of the slot's own memory; lists of both, None
        for a missing slice, with several slices.

        Of a pool on the CPU in the C++ core; TypeError for another. Who writes to them does so
        outside the old-or-new promise: a forward meanwhile may read some weights before and some
        after. They never move, whatever else is added. After ``set``, ``remove`` and
        ``rollback`` (and an ``adapt`` with history=1) they are the slot's no longer: ``set`` and
        ``remove`` zero them, and the memory is kept, with the pool, until the last of them is
        gone.
        """
        if not hasattr(self._storage, "view"):
            kind = type(self._storage).__module__
            raise TypeError(f"AdapterPool.view: pool: expected one of the C++ core, got {kind}")
        pairs = [pair or (None, None) for pair in self._storage.view(slot)]
        A = [a for a, _ in pairs]
        B = [None if bt is None else bt.t() for _, bt in pairs]
        return (A, B) if self._sliced else (A[0], B[0])

    def remove(self, slot: int) -> None:
        """Zeroes the slot's memory and frees it. Raises IndexError if it is not in use."""
        with self._pending_lock:
            self._storage.remove(slot)
            self._owners.end(slot)
            self._pending.pop(slot, None)

    def remove_all(self, slots: Iterable[int]) -> None:
        """``remove`` of many slots, each once, without the GIL on the CPU."""
        left = list(slots)
        for at in range(0, len(left), _REMOVED):  # between them others take the lock
            some = left[at : at + _REMOVED]
            with self._pending_lock:
                if hasattr(self._storage, "remove_all"):
                    self._storage.remove_all(np.array(some, np.int32))
                else:
                    for slot in some:
                        self._storage.remove(slot)
                for slot in some:
                    self._owners.end(slot)
                    self._pending.pop(slot, None)

    def ranks(self, slot: int) -> tuple[int, ...]:
        """The rank of each slice, 0 for a missing one."""
        return tuple(self._storage.ranks(slot))

    def version(self, slot: int) -> int:
        """A number that grows with every change to the slot."""
        return int(self._storage.version(slot))

    def rollback(self, slot: int) -> None:
        """Brings back the weights before the last change, once (needs history=1)."""
        with self._pending_lock:
            version = self.version(slot)
            self._storage.rollback(slot)
            self._owners.rolled_back(slot, version)
            self._pending.pop(slot, None)

    def forward(
        self, x: Any, ids: Any, weights: Any = None, out: Any = None, accumulate: bool = True
    ) -> Any:
        """``batched_lora_delta`` with this pool."""
        return self._storage.forward(x, ids, weights, out, accumulate)

    def adapt(
        self,
        x: Any,
        grad: Any,
        ids: Any,
        lr: float,
        *,
        weights: Any = None,
        max_norm: float | None = None,
        lr_ratio: float = 1.0,
        train_A: bool = True,
        weight_decay: float = 0.0,
        ewc: EWC | None = None,
    ) -> ops.BatchedAdaptResult:
        """``batched_adapt`` with this pool."""
        return ops.batched_adapt(
            x, grad, self, ids, lr,
            weights=weights, max_norm=max_norm, lr_ratio=lr_ratio, train_A=train_A,
            weight_decay=weight_decay, ewc=ewc,
        )  # fmt: skip

    # ---- gradients from a backward pass (nf4_linear on torch tensors) ----

    def accumulate_gradient(self, slot: int, x: Any, grad: Any, version: int | None = None) -> None:
        """Adds the gradient of one slot, summed over rows, to what ``apply_updates`` applies.

        x [n, in], grad = dL/dy [n, out] of x's dtype. A gradient with NaN or Inf
        is left out, and ``apply_updates`` says so. version: that of the forward pass;
        RuntimeError where the slot was changed since. Raises IndexError (slot).
        """
        with self._pending_lock:
            now = self.version(slot)
            if version not in (None, now):
                raise RuntimeError(
                    f"AdapterPool.accumulate_gradient: slot: expected the weights of version"
                    f" {version}, got version {now} of slot {slot}"
                )
            waiting = self._pending.get(slot)
            if waiting is None:
                waiting = self._pending[slot] = PendingGradient(self._storage, slot)
            waiting.accumulate(x, grad)

    def gradient(self, slot: int) -> tuple[Any, Any] | None:
        """Copies of (dL/dA, dL/dB) as accumulated so far, summed over rows; None if none was.

        NumPy float32, shaped as ``get`` gives A and B.
        """
        with self._pending_lock:
            ranks = self.ranks(slot)
            waiting = self._pending.get(slot)
            if waiting is None or waiting.gradient is None or not waiting.samples:
                return None
            flat, at = waiting.gradient.copy(), 0
        gA: list[Any] = []
        gB: list[Any] = []
        for rank, out in zip(ranks, self.slices, strict=True):
            middle, end = at + rank * self.in_features, at + rank * (self.in_features + out)
            missing = self._sliced and not rank
            gA.append(None if missing else flat[at:middle].reshape(rank, self.in_features))
            gB.append(None if missing else flat[middle:end].reshape(rank, out).T)
            at = end
        return (gA, gB) if self._sliced else (gA[0], gB[0])

    def apply_updates(
        self,
        lr: float,
        *,
        max_norm: float | None = None,
        lr_ratio: float = 1.0,
        train_A: bool = True,
        weight_decay: float = 0.0,
        ewc: EWC | None = None,
    ) -> dict[int, str]:
        """One step for each slot with the mean of its accumulated gradient, then cleared.

        Returns, for each slot that had one, "" or why nothing was learned. The
        options are those of ``batched_adapt``.
        """
        step = ops.make_step(self._backend, lr, max_norm, lr_ratio, train_A, weight_decay, ewc)
        notes = {}
        with self._pending_lock:
            for slot, waiting in sorted(self._pending.items()):
                refused = waiting.refused
                outcome, _ = waiting.apply(step)
                left_out = f"{refused} gradients with NaN or Inf were left out" if refused else ""
                notes[slot] = ops.NOTES[outcome] if outcome == ops.NOT_FINITE else left_out
            self._pending.clear()
        return notes

    def clear_updates(self) -> None:
        """Drops the gradients that wait."""
        with self._pending_lock:
            self._pending.clear()
