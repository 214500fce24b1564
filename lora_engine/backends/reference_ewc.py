"""The records of EWC in the reference backend."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from lora_engine import reference
from lora_engine.backends.reference_arrays import _read
from lora_engine.reference_ewc import delta_penalty

if TYPE_CHECKING:
    from lora_engine.backends.reference import Pool


def _shaped(name: str, given: list[Any], like: list[Any]) -> list[Any]:
    """Copies of the arrays given, checked to be shaped like others; None where those are."""
    made: list[Any] = []
    for g, f in zip(given, like, strict=True):
        if f is not None and f.size and np.shape(g) != f.shape:
            raise ValueError(f"EWC.set: {name}: expected shape {f.shape}, got {np.shape(g)}")
        made.append(None if f is None else np.array(_read(g)) if f.size else np.zeros(f.shape))
    return made


class Ewc:
    """As ``_C.Ewc``."""

    def __init__(self, pool: Pool, form: str, ewc_lambda: float) -> None:
        if form not in ("factor", "delta"):
            raise ValueError(f"EWC: form: expected factor or delta, got {form}")
        self.pool, self.form, self.ewc_lambda = pool, form, ewc_lambda
        self._records: dict[int, tuple[Any, int]] = {}  # and the epoch each was made at

    def set(self, slot: int, first: list[Any], second: list[Any]) -> None:
        adapter = self.pool._get(slot).adapter
        self.restore(slot, first, second, adapter.A, adapter.B)

    def restore(
        self, slot: int, first: list[Any], second: list[Any], A: list[Any], B: list[Any]
    ) -> None:
        now = self.pool._get(slot)
        like = now.adapter
        u: list[Any] = like.A
        v: list[Any] = like.B
        if self.form == "delta":
            here = [f is not None for f in like.A]
            u = [np.empty(o) if h else None for o, h in zip(self.pool.outs, here, strict=True)]
            v = [np.empty(self.pool.in_features) if h else None for h in here]
        fisher = _shaped("fisher", first, u), _shaped("fisher", second, v)
        anchor = _shaped("anchor", A, like.A), _shaped("anchor", B, like.B)
        self._records[slot] = (fisher, reference.Adapter(*anchor, like.scaling)), now.epoch

    def get(self, slot: int) -> tuple[list[Any], ...]:
        self.pool._get(slot)
        record = self.find(slot)
        if record is None:
            raise ValueError(
                f"EWC.get: slot: expected one with a record, got slot {slot}, which has none"
            )
        (first, second), anchor = record
        missing = [not rank for rank in self.pool.ranks(slot)]
        return tuple(
            [None if m else f.astype(np.float32) for f, m in zip(part, missing, strict=True)]
            for part in (first, second, anchor.A, anchor.B)
        )

    def find(self, slot: int) -> Any:
        """(fisher, anchor) of the adapter that is in the slot now, or None."""
        record, epoch = self._records.get(slot, (None, 0))
        held = self.pool._slots.get(slot)
        return record if held and held.epoch == epoch else None

    def remove(self, slot: int) -> None:
        self._records.pop(slot, None)

    def penalty(self) -> float:
        total = 0.0
        for slot in self._records:
            if (record := self.find(slot)) is None:
                continue
            (first, second), anchor = record
            now = self.pool._get(slot).adapter
            for s, (A, B) in enumerate(zip(now.A, now.B, strict=True)):
                if A is None:
                    continue
                if self.form == "delta":
                    total += delta_penalty(
                        A, B, anchor.A[s], anchor.B[s], first[s], second[s], now.scaling, 1.0
                    )
                else:
                    total += float((first[s] * (_read(A) - _read(anchor.A[s])) ** 2).sum())
                    total += float((second[s] * (_read(B) - _read(anchor.B[s])) ** 2).sum())
        return self.ewc_lambda * total
