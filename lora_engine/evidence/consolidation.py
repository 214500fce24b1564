"""The end of a task for the adapters of a pool: what mattered is recorded, the anchor moves."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

import lora_engine as le
from lora_engine.demo_data import Floats

Record = tuple[Floats, Floats]
GAMMA = 0.95  # what permuted_digits.py chooses on validation images


class Consolidation:
    """A pool's EWC, what its slots have recorded, and what they saw of the task at hand."""

    def __init__(self, pool: le.AdapterPool, ewc_lambda: float, form: str) -> None:
        self.ewc, self._pool, self._form = le.EWC(pool, ewc_lambda, form=form), pool, form
        self._records: dict[int, Record] = {}
        self._seen: dict[int, tuple[Record, int]] = {}

    def observe(self, x: Floats, grad: Floats, ids: NDArray[np.int32]) -> None:
        """Adds samples, a row each, to what their slots saw: sums of per-sample squares."""
        order = np.argsort(ids, kind="stable")
        slots, starts = np.unique(ids[order], return_index=True)
        for slot, rows in zip(slots.tolist(), np.split(order, starts[1:]), strict=True):
            sums, count = self._seen.get(slot, (None, 0))
            if self._form == "delta":
                sums = le.lora_fisher_factors(x[rows], grad[rows], out=sums)
            else:
                sums = le.lora_fisher(x[rows], grad[rows], *self._pool.get(slot), out=sums)
            self._seen[slot] = sums, count + len(rows)

    def consolidate(self) -> None:
        """The task's end: F* <- gamma F* + the mean over its samples, of each slot that saw any;
        its weights now are the anchor."""
        for slot, (sums, count) in self._seen.items():
            first, second = (np.float32(1 / count) * part for part in sums)
            record = first, second
            if slot in self._records:
                record = self._add(self._records[slot], record)
            self._records[slot] = record
            self.ewc.set(slot, *record)
        self._seen.clear()

    def _add(self, old: Record, new: Record) -> Record:
        """gamma old + new; in the delta form, where that is no product of two vectors any more,
        the product that has its row and column sums."""
        decay = np.float32(GAMMA)
        if self._form == "factor":
            return decay * old[0] + new[0], decay * old[1] + new[1]
        rows = decay * old[0] * old[1].sum() + new[0] * new[1].sum()
        columns = decay * old[1] * old[0].sum() + new[1] * new[0].sum()
        return rows, columns / max(columns.sum(), np.finfo(np.float32).tiny)
