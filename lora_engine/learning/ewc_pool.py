"""EWC of one pool: the backend's records, and the moving averages that become them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from lora_engine import ops
from lora_engine.adapters.pool import AdapterPool
from lora_engine.learning.fisher_merge import merge_factors, merge_weights
from lora_engine.learning.moving_fisher import (
    MovingFactors,
    MovingFisher,
    MovingWeights,
    Pair,
)

if TYPE_CHECKING:
    from lora_engine.adapters.owners import I64

Record = tuple[list[Any], list[Any], list[Any], list[Any]]  # fisher, anchors A and B, by slice


class SlotState(NamedTuple):
    """What EWC keeps of a slot."""

    record: Record | None
    mean: Pair | None
    samples: int


class PoolEwc:
    """The half of ``EWC`` that knows slots. Its methods check what they are given.

    The pool's lock under which slots change hands is held while anything is read or written
    for a slot, so that it is of the adapter that was meant.
    """

    def __init__(
        self, pool: AdapterPool, ewc_lambda: float, form: str, gamma: float, fisher_samples: int
    ) -> None:
        self.pool, self.gamma = pool, gamma
        self._storage = pool._backend.Ewc(pool._storage, form, ewc_lambda)
        moving: type[MovingFisher] = MovingFactors if form == "delta" else MovingWeights
        self._merge = merge_factors if form == "delta" else merge_weights
        self._moving = moving(pool, fisher_samples)
        self._recorded: dict[int, int] = {}  # slots with a record, and whose they were
        self._changes: dict[int, int] = {}  # by slot: of the record, and of the average as a whole
        self._step: tuple[Any, Any] = (None, None)  # the last (lr, max_norm), and its step

    def step(self, lr: float, max_norm: float | None = None) -> Any:
        """The step of a learning rate under this penalty, kept for the next call."""
        kept, step = self._step
        if kept != (lr, max_norm):
            backend: Any = self.pool._backend
            step = ops.make_step(backend, lr, max_norm, ewc=self)  # type: ignore[arg-type]
            self._step = ((lr, max_norm), step)
        return step

    # ---- records ----

    def set(self, slot: int, first: Any, second: Any) -> None:
        with self.pool._pending_lock:
            self._storage.set(slot, self.pool._slices_of(first), self.pool._slices_of(second))
            self._now_recorded(slot)

    def remove(self, slot: int) -> None:
        with self.pool._pending_lock:
            self._storage.remove(slot)
            self._recorded.pop(slot, None)
            self._moving.forget(slot)
            self._changed(slot)

    def _now_recorded(self, slot: int) -> None:
        self._recorded[slot] = self.pool._owners.of_one(slot)
        self._changed(slot)

    def _changed(self, slot: int) -> None:
        self._changes[slot] = self._changes.get(slot, 0) + 1

    def _record(self, slot: int) -> Record | None:
        """A slot's record, if the adapter that is in it now has one."""
        if slot not in self._recorded:
            return None
        try:
            record: Record = self._storage.get(slot)
        except ValueError:  # it was of an earlier adapter
            return None
        return record

    def _check_in_use(self, slots: I64) -> None:
        bad = slots[self.pool._owners.of(slots) == 0]
        if len(bad):
            self.pool.version(int(bad[0]))  # raises IndexError

    # ---- samples ----

    def observe(self, x: Any, grad: Any, ids: I64) -> tuple[int, int]:
        """(samples taken, rows left out); ids int64 [n], -1 for none, or [] of all rows."""
        if not ids.ndim:
            return self._observe_slot(x, grad, int(ids))
        named = ids >= 0
        if not named.all():
            x, grad, ids = x[named], grad[named], ids[named]
        with self.pool._pending_lock:
            self._check_in_use(ids)
            refused = self._moving.observe(x, grad, ids)
        return len(ids) - refused, refused

    def _observe_slot(self, x: Any, grad: Any, slot: int) -> tuple[int, int]:
        if slot < 0:
            return 0, 0
        with self.pool._pending_lock:
            if not self.pool._owners.of_one(slot):
                self.pool.version(slot)  # raises IndexError
            refused = self._moving.observe_slot(x, grad, slot)
        return len(x) - refused, refused

    def consolidate(self, slots: list[int] | None) -> tuple[dict[int, int], list[int]]:
        """(samples of each slot that was consolidated, slots that observed nothing)."""
        with self.pool._pending_lock:
            if slots is None:
                observed = self._moving.slots().tolist()
                recorded = np.array(sorted(self._recorded), np.int64)
                owners = self.pool._owners.of(recorded).tolist()
                there = [s for s, o in zip(recorded.tolist(), owners, strict=True)
                         if o == self._recorded[s]]  # fmt: skip
                slots = sorted({*observed, *there})
            else:
                self._check_in_use(np.array(slots, np.int64))
            done = {}
            for slot in slots:
                samples = self._moving.samples(slot)
                if samples:
                    self._consolidate(slot)
                    done[slot] = samples
        return done, [slot for slot in slots if slot not in done]

    def _consolidate(self, slot: int) -> None:
        old = self._record(slot)
        fisher = self._merge(old[:2] if old else None, self._moving.mean(slot), self.gamma)
        self._storage.set(slot, *fisher)
        self._now_recorded(slot)
        self._moving.forget(slot)

    # ---- state ----

    def states(self) -> dict[int, SlotState]:
        """What is kept, by slot, all of one moment."""
        with self.pool._pending_lock:
            slots = sorted({*self._recorded, *self._moving.slots().tolist()})
            in_use = [slot for slot in slots if self.pool._owners.of_one(slot)]
            return {slot: self._state(slot) for slot in in_use}

    def version(self, slot: int) -> tuple[int, int]:
        """Differs after every change to what is kept of a slot."""
        with self.pool._pending_lock:
            return self._changes.get(slot, 0), self._moving.samples(slot)

    def state(self, slot: int) -> SlotState:
        """What is kept of a slot."""
        with self.pool._pending_lock:
            return self._state(slot)

    def put(self, slot: int, state: SlotState) -> None:
        """Replaces what is kept of a slot by a state that was checked."""
        self.remove(slot)
        with self.pool._pending_lock:
            self._put(slot, state)

    def _put(self, slot: int, state: SlotState) -> None:
        if state.record:
            self._storage.restore(slot, *state.record)
            self._now_recorded(slot)
        if state.mean:
            self._moving.put(slot, state.mean, state.samples)

    def _state(self, slot: int) -> SlotState:
        samples = self._moving.samples(slot)
        mean = self._moving.mean(slot) if samples else None
        return SlotState(self._record(slot), mean, samples)

    def load(self, states: dict[int, SlotState]) -> None:
        """Replaces everything by states that were checked."""
        with self.pool._pending_lock:
            self._check_in_use(np.array(sorted(states), np.int64))
            for slot in self._recorded:
                self._changed(slot)
                if self.pool._owners.of_one(slot):
                    self._storage.remove(slot)
            self._recorded.clear()
            self._moving.clear()
            for slot, state in states.items():
                self._put(slot, state)
