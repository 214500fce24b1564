"""Whose each slot of a pool is, for what is kept of an adapter outside the pool."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    I64 = NDArray[np.int64]


class Owners:
    """A number for each adapter that is or was in a slot, never used twice; 0: the slot is free.

    Known on the host for many slots at once, without asking a device. Whoever calls holds the
    lock under which slots change hands.
    """

    def __init__(self) -> None:
        self._now: I64 = np.zeros(0, np.int64)
        self._made_at: dict[int, int] = {}  # by slot: the version that ``set`` began
        self._issued = 0

    def of(self, slots: I64) -> I64:
        """Of slots from 0 on; 0 also for those that were never issued."""
        known = slots < len(self._now)
        owners: I64 = np.where(known, self._now[np.where(known, slots, 0)], 0)
        return owners

    def of_one(self, slot: int) -> int:
        """``of`` a single slot."""
        return int(self._now[slot]) if 0 <= slot < len(self._now) else 0

    def begin(self, slot: int, version: int | None = None) -> None:
        """Another adapter is in the slot. version: where a rollback can undo it, the slot's."""
        if slot >= len(self._now):
            larger = np.zeros(max(2 * len(self._now), slot + 1), np.int64)
            larger[: len(self._now)] = self._now
            self._now = larger
        self._issued += 1
        self._now[slot] = self._issued
        self._made_at.pop(slot, None)
        if version is not None:
            self._made_at[slot] = version

    def end(self, slot: int) -> None:
        """The slot is free."""
        self._now[slot] = 0
        self._made_at.pop(slot, None)

    def rolled_back(self, slot: int, version: int) -> None:
        """version: before the rollback. One that undoes a ``set`` makes it another adapter's."""
        if version <= self._made_at.get(slot, -1):
            self.begin(slot)
