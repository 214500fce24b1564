"""The ops of ``lora_engine._C`` on top of reference.py, for LORA_ENGINE_BACKEND=reference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from lora_engine import reference
from lora_engine.backends.reference_arrays import _read, _result, _rows, _write
from lora_engine.backends.reference_ewc import Ewc
from lora_engine.backends.reference_nf4 import (  # noqa: F401  the registry looks here for them
    Nf4,
    nf4_decode,
    nf4_encode,
    nf4_linear,
    nf4_linear_backward,
)
from lora_engine.reference_ewc import delta_step


class Step(NamedTuple):
    """As ``_C.Step``."""

    lr: float
    max_norm: float = 0.0
    lr_ratio: float = 1.0
    train_A: bool = True
    weight_decay: float = 0.0
    ewc: Ewc | None = None


# How values are stored in a dtype: to nearest, and after a step.
_NEAREST: dict[str, Callable[[Any], Any]] = {
    "float32": np.float32,
    "bfloat16": reference.round_bfloat16,
    "float16": reference.round_float16,
}
_STOCHASTIC = {
    "bfloat16": reference.round_bfloat16_stochastic,
    "float16": reference.round_float16_stochastic,
}


def lora_delta(x: Any, A: Any, B: Any, scaling: float, out: Any, accumulate: bool) -> Any:
    delta = reference.lora_delta(_rows(x), _read(A), _read(B), scaling)
    return _result(x, out, delta, accumulate)


def ewc_step(
    theta: Any,
    grad: Any,
    fisher: Any,
    anchor: Any,
    lr: float,
    ewc_lambda: float,
    seed: int,
    version: int,
) -> None:
    values = reference.ewc_step(
        _read(theta), _read(grad), _read(fisher), _read(anchor), lr, ewc_lambda
    )
    stochastic = _STOCHASTIC.get(str(theta.dtype).removeprefix("torch."))
    if stochastic:
        key = reference.rounding_key(seed, 0, version)
        elements = np.arange(values.size).reshape(values.shape)
        values = stochastic(values, key, elements).astype(np.float64)
    _write(theta, values)


def fisher_accumulate(F: Any, g: Any, gamma: float, scale: float) -> None:
    _write(F, reference.fisher_accumulate(_read(F), _read(g), gamma, scale))


def _sums(like: Any, sums: tuple[np.ndarray, np.ndarray], out: Any) -> Any:
    if out is not None:
        for to, values in zip(out, sums, strict=True):
            _write(to, _read(to) + values.reshape(to.shape))
        return tuple(out)
    if hasattr(like, "detach"):
        import torch

        return tuple(torch.from_numpy(s).float() for s in sums)
    return tuple(s.astype(np.float32) for s in sums)


def lora_fisher(x: Any, grad: Any, A: Any, B: Any, scaling: float, segments: Any, out: Any) -> Any:
    offsets = None if segments is None else _read(segments).astype(np.int64)
    sums = reference.lora_fisher(_rows(x), _rows(grad), _read(A), _read(B), scaling, offsets)
    return _sums(x, sums, out)


def lora_fisher_factors(x: Any, grad: Any, out: Any) -> Any:
    return _sums(x, reference.lora_fisher_factors(_rows(x), _rows(grad)), out)


class _Slot(NamedTuple):
    """epoch: of the adapter this is a state of: add and set begin one, for the records of Ewc."""

    adapter: reference.Adapter
    version: int
    epoch: int
    previous: _Slot | None


class Pool:
    """As ``_C.Pool``: storage of many adapters, here in Python lists."""

    def __init__(
        self,
        in_features: int,
        out_features: list[int],
        dtype: str,
        capacity: int,
        max_rank: int,
        history: int,
        seed: int,
    ) -> None:
        if dtype not in _NEAREST:
            raise TypeError(
                f"AdapterPool: dtype: expected float32, bfloat16 or float16, got {dtype}"
            )
        self.in_features, self.outs, self.dtype = in_features, out_features, dtype
        self.capacity, self.max_rank = capacity, max_rank
        self.history, self.seed = history, seed
        self._slots: dict[int, _Slot] = {}
        self._issued = self._epochs = 0
        self._freed: list[tuple[int, int]] = []  # slots, and the versions they had

    # ---- storage ----

    def _stored(self, array: Any, like: tuple[int | None, int | None]) -> Any:
        if array is None:
            return None
        values = _read(array)
        if values.ndim != 2 or any(
            w not in (None, g) for w, g in zip(like, values.shape, strict=True)
        ):
            raise ValueError(f"AdapterPool: A, B: expected shape {like}, got {values.shape}")
        return _NEAREST[self.dtype](values.astype(np.float32))

    def _adapter(self, A: list[Any], B: list[Any], scaling: float) -> reference.Adapter:
        if len(A) != len(self.outs) or len(B) != len(self.outs):
            raise ValueError(f"AdapterPool: A, B: expected {len(self.outs)} slices, got {len(A)}")
        a = [self._stored(m, (None, self.in_features)) for m in A]
        b = [
            self._stored(m, (out, None if f is None else len(f)))
            for m, out, f in zip(B, self.outs, a, strict=True)
        ]
        if self.max_rank and any(m is not None and len(m) > self.max_rank for m in a):
            raise ValueError(f"AdapterPool: A: expected a rank of at most {self.max_rank}")
        return reference.Adapter(a, b, float(np.float32(scaling)))

    def _get(self, slot: int) -> _Slot:
        if slot not in self._slots:
            what = "which was removed" if 0 <= slot < self._issued else "which was never issued"
            raise IndexError(f"AdapterPool: slot: expected a slot in use, got {slot}, {what}")
        return self._slots[slot]

    def _new_epoch(self) -> int:
        self._epochs += 1
        return self._epochs

    def _change(self, slot: int, adapter: reference.Adapter, epoch: int) -> None:
        now = self._get(slot)
        kept = now._replace(previous=None) if self.history else None
        self._slots[slot] = _Slot(adapter, now.version + 1, epoch, kept)

    def add(self, A: list[Any], B: list[Any], scaling: float) -> int:
        adapter = self._adapter(A, B, scaling)
        if self.capacity and len(self._slots) >= self.capacity:
            raise ValueError("AdapterPool.add: pool: expected room, got a pool at its capacity")
        if self._freed:
            slot, version = self._freed.pop(0)
        else:
            slot, version, self._issued = self._issued, 0, self._issued + 1
        self._slots[slot] = _Slot(adapter, version + 1, self._new_epoch(), None)
        return slot

    def set(self, slot: int, A: list[Any], B: list[Any], scaling: float) -> None:
        self._change(slot, self._adapter(A, B, scaling), self._new_epoch())

    def get(self, slot: int) -> tuple[list[Any], list[Any], float]:
        adapter = self._get(slot).adapter
        A, B = ([None if m is None else m.copy() for m in f] for f in (adapter.A, adapter.B))
        return A, B, adapter.scaling

    def remove(self, slot: int) -> None:
        self._freed.append((slot, self._get(slot).version))
        del self._slots[slot]

    def ranks(self, slot: int) -> list[int]:
        return [0 if A is None else len(A) for A in self._get(slot).adapter.A]

    def version(self, slot: int) -> int:
        return self._get(slot).version

    def rollback(self, slot: int) -> None:
        now = self._get(slot)
        if not self.history or now.previous is None:
            raise ValueError("AdapterPool.rollback: slot: expected weights before the last change")
        self._slots[slot] = now.previous._replace(version=now.version + 1)

    def info(self) -> tuple[int, int, int]:
        size = sum(
            m.nbytes
            for s in self._slots.values()
            for m in (*s.adapter.A, *s.adapter.B)
            if m is not None
        )
        return len(self._slots), self._issued, size

    # ---- ops ----

    def _adapters(self, ids: np.ndarray) -> dict[int, reference.Adapter]:
        return {int(s): self._get(int(s)).adapter for s in np.unique(ids) if s != -1}

    def forward(
        self, x: Any, ids: Any, weights: Any, out: Any, accumulate: bool, transposed: bool = False
    ) -> Any:
        slots = np.asarray(ids)
        w = None if weights is None else np.asarray(weights)
        adapters, outs = self._adapters(slots), self.outs
        if transposed:
            adapters = {s: reference.transposed(a, outs) for s, a in adapters.items()}
            outs = [self.in_features]
        delta = reference.batched_lora_delta(_rows(x), adapters, outs, slots, w)
        return _result(x, out, delta, accumulate)

    def forward_slot(
        self, x: Any, slot: int, out: Any, accumulate: bool, transposed: bool, width: int
    ) -> Any:
        rows = _rows(x)
        adapter = self._get(slot).adapter
        if transposed:
            delta = reference.lora_delta(rows, adapter.B[0].T, adapter.A[0].T, adapter.scaling)
        else:
            ids = np.full(len(rows), slot)
            delta = reference.batched_lora_delta(rows, {slot: adapter}, self.outs, ids)
        return _result(x, out, delta, accumulate)

    def _apply(self, slot: int, gA: list[Any], gB: list[Any], step: Step) -> tuple[int, float]:
        now = self._get(slot)
        if not sum(g.size for g in (*gA, *gB) if g is not None):
            return 0, 0.0  # rank 0: nothing that could learn
        record = step.ewc.find(slot) if step.ewc else None
        values = reference.Step(
            step.lr,
            step.max_norm or None,
            step.lr_ratio,
            step.train_A,
            step.weight_decay,
            step.ewc.ewc_lambda if step.ewc else 0.0,
        )
        fisher: Any
        anchor: Any
        fisher, anchor = record or (None, None)
        if record and step.ewc and step.ewc.form == "delta":

            def stored(B: list[Any]) -> list[Any]:
                new = now.adapter._replace(B=B)
                return self._rounded(new, slot, now.version).B

            moved = delta_step(now.adapter, gA, gB, values, fisher, anchor, stored)
        else:
            moved = reference.step_adapter(now.adapter, gA, gB, values, fisher, anchor)
        learning = [g for g in (*(gA if step.train_A else []), *gB) if g is not None]
        norm = float(np.sqrt(sum((g**2).sum() for g in learning)))
        if moved is None:
            return 2, norm
        self._change(slot, self._rounded(moved, slot, now.version), now.epoch)
        return 1, norm

    def _rounded(self, adapter: reference.Adapter, slot: int, version: int) -> reference.Adapter:
        key = reference.rounding_key(self.seed, slot, version)
        first = 0

        def store(values: Any) -> Any:
            nonlocal first
            elements = np.arange(first, first + values.size).reshape(values.shape)
            first += values.size
            if self.dtype == "float32":
                return values.astype(np.float32)
            return _STOCHASTIC[self.dtype](values, key, elements)

        A, B = [], []
        for a, b in zip(adapter.A, adapter.B, strict=True):
            A.append(None if a is None else store(a))
            B.append(None if b is None else store(b.T).T)
        return reference.Adapter(A, B, adapter.scaling)

    def adapt(self, x: Any, grad: Any, ids: Any, weights: Any, step: Step) -> np.ndarray:
        slots = np.asarray(ids)
        w = None if weights is None else np.asarray(weights)
        outcomes = np.zeros(slots.shape, dtype=np.uint8)
        for slot, adapter in self._adapters(slots).items():
            gA, gB = reference.slot_gradients(
                _rows(x), _rows(grad), adapter, self.outs, slot, slots, w
            )
            outcomes[slots == slot] = self._apply(slot, gA, gB, step)[0]
        by_row: np.ndarray = outcomes if outcomes.ndim == 1 else outcomes.max(axis=1)
        return by_row

    def adapt_slot(self, x: Any, grad: Any, slot: int, step: Step) -> tuple[int, float]:
        rows = _rows(x)
        if not len(rows):
            return 0, 0.0
        ids = np.full(len(rows), slot)
        adapter = self._get(slot).adapter
        gA, gB = reference.slot_gradients(rows, _rows(grad), adapter, self.outs, slot, ids)
        return self._apply(slot, gA, gB, step)

    # ---- accumulated gradients: one flat buffer, A then the transpose of B ----

    def gradient_size(self, slot: int) -> int:
        a = self._get(slot).adapter
        return sum(m.size for m in (*a.A, *a.B) if m is not None)

    def gradient(self, x: Any, grad: Any, slot: int, h: Any, gradient: Any) -> tuple[int, float]:
        rows = _rows(x)
        if not len(rows):
            return 0, 0.0
        ids = np.full(len(rows), slot)
        adapter = self._get(slot).adapter
        gA, gB = reference.slot_gradients(rows, _rows(grad), adapter, self.outs, slot, ids)
        parts = [m.ravel() for a, b in zip(gA, gB, strict=True) if a is not None for m in (a, b.T)]
        total = np.concatenate(parts) * len(rows)
        norm = float(np.sqrt((total**2).sum()))
        if not np.isfinite(norm):
            return 2, norm
        gradient += total.astype(np.float32)
        return 1, norm

    def apply(self, gradient: Any, slot: int, scale: float, step: Step) -> tuple[int, float]:
        values, at = np.asarray(gradient, dtype=np.float64) * scale, 0
        gA: list[Any] = []
        gB: list[Any] = []
        for rank, out in zip(self.ranks(slot), self.outs, strict=True):
            mid, end = at + rank * self.in_features, at + rank * (self.in_features + out)
            gA.append(values[at:mid].reshape(rank, -1) if rank else None)
            gB.append(values[mid:end].reshape(rank, -1).T if rank else None)
            at = end
        return self._apply(slot, gA, gB, step)

    def shrink(self, x: Any, slot: int) -> np.ndarray:
        parts = [_rows(x) @ A.T for A in self._get(slot).adapter.A if A is not None]
        h: np.ndarray = np.concatenate(parts, axis=1).astype(np.float32)
        return h
