"""The end of a task for the adapters of a pool: what mattered is recorded, the anchor moves."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

import lora_engine as le
from lora_engine.demo_data import Floats

Record = tuple[Floats, Floats]
GAMMA = 0.95  # what permuted_digits.py chooses on validation images


class Consolidation:
    """A pool's EWC and what its slots have recorded so far; a row is a sample."""

    def __init__(self, pool: le.AdapterPool, ewc_lambda: float, form: str) -> None:
        self.ewc, self._pool, self._form = le.EWC(pool, ewc_lambda, form=form), pool, form
        self._records: dict[int, Record] = {}

    def consolidate(self, x: Floats, grad: Floats, ids: NDArray[np.int32]) -> None:
        """F* <- gamma F* + the mean over the task's samples, of each slot that ids name; its
        weights now are the anchor."""
        for slot in np.unique(ids).tolist():
            rows = ids == slot
            record = self._mean(slot, x[rows], grad[rows])
            if slot in self._records:
                record = self._add(self._records[slot], record)
            self._records[slot] = record
            self.ewc.set(slot, *record)

    def _mean(self, slot: int, x: Floats, grad: Floats) -> Record:
        if self._form == "delta":
            sums = le.lora_fisher_factors(x, grad)
        else:
            sums = le.lora_fisher(x, grad, *self._pool.get(slot))
        first, second = (np.float32(1 / len(x)) * part for part in sums)
        return first, second

    def _add(self, old: Record, new: Record) -> Record:
        """gamma old + new; in the delta form, where that is no product of two vectors any more,
        the product that has its row and column sums."""
        decay = np.float32(GAMMA)
        if self._form == "factor":
            return decay * old[0] + new[0], decay * old[1] + new[1]
        rows = decay * old[0] * old[1].sum() + new[0] * new[1].sum()
        columns = decay * old[1] * old[0].sum() + new[1] * new[0].sum()
        return rows, columns / max(columns.sum(), np.finfo(np.float32).tiny)
