"""Fisher information of the task at hand: a moving average over its samples, a slot each.

One row is a sample, and its own gradient is squared (never that of a batch's mean). Over the n
samples that a slot has seen, in their order and with decay d = 1 - 1 / fisher_samples,

    mean = sum_i d^(n-1-i) q_i / sum_i d^(n-1-i),

the exponential moving average divided by 1 - dⁿ (bias correction: Adam, Kingma and Ba 2015,
algorithm 1). Form "delta": q = (grad∘grad, x∘x); "factor": the squares of the sample's
gradients of B and A (``lora_fisher``).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from lora_engine import ops
from lora_engine.adapters.pool import AdapterPool

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from lora_engine.adapters.owners import I64

    F32 = NDArray[np.float32]
    F64 = NDArray[np.float64]
Pair = tuple[list[Any], list[Any]]  # by slice, None for one that is missing

_CHUNK = 1 << 22  # elements of x and grad that are squared at a time


class _Rows(NamedTuple):
    """Samples sorted by slot, and what becomes of the averages: keep * mean + part * q."""

    x: F32
    grad: F32
    part: F32  # by sample
    keep: F32  # by slot
    starts: I64
    ends: I64


class MovingFisher:
    """The averages of a pool's slots, one row of ``_means`` each.

    Of another adapter than is in the slot now they count as none. Callers hold the pool's
    lock under which slots change hands.
    """

    def __init__(self, pool: AdapterPool, fisher_samples: int) -> None:
        self.pool = pool
        self.decay = 1.0 - 1.0 / fisher_samples
        self._chunk = max(_CHUNK // (pool.in_features + pool.out_features), 1)
        self.clear()

    def clear(self) -> None:
        """Forgets all, and the memory."""
        self._place: I64 = np.zeros(0, np.int64)  # by slot: its row, -1 for none
        self._slot: I64 = np.zeros(0, np.int64)  # by row: its slot, -1 for none
        self._owner: I64 = np.zeros(0, np.int64)
        self._samples: I64 = np.zeros(0, np.int64)

    # ---- rows ----

    def rows(self, slots: I64) -> I64:
        """Rows of slots, -1 where the adapter that is in the slot now was not observed."""
        if not len(self._slot):
            return np.full(len(slots), -1)
        known = slots < len(self._place)
        rows = np.where(known, self._place[np.where(known, slots, 0)], -1)
        current = self._owner[rows] == self.pool._owners.of(slots)
        found: I64 = np.where((rows >= 0) & current & (self._samples[rows] > 0), rows, -1)
        return found

    def slots(self) -> I64:
        """Slots whose adapter was observed, ascending."""
        named = np.sort(self._slot[self._slot >= 0])
        found: I64 = named[self.rows(named) >= 0]
        return found

    def samples(self, slot: int) -> int:
        """Samples of the adapter that is in the slot now."""
        row = self._row(slot)
        return int(self._samples[row]) if row >= 0 else 0

    def _row(self, slot: int) -> int:
        return int(self.rows(np.array([slot]))[0])

    def forget(self, slot: int) -> None:
        """The slot's average starts anew."""
        if slot < len(self._place) and self._place[slot] >= 0:
            self._slot[self._place[slot]] = -1
            self._place[slot] = -1
            if (self._slot < 0).all():
                self.clear()

    def _rows_for(self, slots: I64) -> I64:
        """Rows of slots, made where there are none; those of earlier adapters start anew."""
        if slots[-1] >= len(self._place):
            larger = np.full(max(2 * len(self._place), int(slots[-1]) + 1), -1)
            larger[: len(self._place)] = self._place
            self._place = larger
        new = slots[self._place[slots] < 0]
        free = np.flatnonzero(self._slot < 0)
        if len(new) > len(free):
            self._grow(max(2 * len(self._slot), len(self._slot) + len(new) - len(free)))
            free = np.flatnonzero(self._slot < 0)
        self._place[new] = free[: len(new)]
        self._slot[free[: len(new)]] = new
        self._owner[free[: len(new)]] = 0
        rows: I64 = self._place[slots]
        owners = self.pool._owners.of(slots)
        self._samples[rows[self._owner[rows] != owners]] = 0
        self._owner[rows] = owners
        return rows

    def _grow(self, rows: int) -> None:
        more = rows - len(self._slot)
        self._slot = np.concatenate([self._slot, np.full(more, -1)])
        self._owner = np.concatenate([self._owner, np.zeros(more, np.int64)])
        self._samples = np.concatenate([self._samples, np.zeros(more, np.int64)])

    # ---- averages ----

    def observe(self, x: F32, grad: F32, ids: I64) -> int:
        """Takes samples of slots in use; how many were left out for their gradient."""
        refused = 0
        for at in range(0, len(ids), self._chunk):
            rows = slice(at, at + self._chunk)
            some = x[rows], grad[rows], ids[rows]
            good = _finite(*some[:2])
            if not good.all():
                refused += len(good) - int(np.count_nonzero(good))
                some = some[0][good], some[1][good], some[2][good]
            refused += self._fold(*some)
        return refused

    def observe_slot(self, x: F32, grad: F32, slot: int) -> int:
        """``observe`` of rows of one slot, in a third of the time for one row."""
        refused = 0
        for at in range(0, len(x), self._chunk):
            rows, up = x[at : at + self._chunk], grad[at : at + self._chunk]
            good = _finite(rows, up)
            if not good.all():
                refused += len(good) - int(np.count_nonzero(good))
                rows, up = rows[good], up[good]
            if len(rows):
                refused += self._fold_slot(rows, up, slot)
        return refused

    def _fold(self, x: F32, grad: F32, ids: I64) -> int:
        if not len(ids):
            return 0
        if (ids[1:] < ids[:-1]).any():
            order = np.argsort(ids, kind="stable")
            x, grad, ids = x[order], grad[order], ids[order]
        slots, starts, counts = np.unique(ids, return_index=True, return_counts=True)
        rows, ends = self._rows_for(slots), starts + counts
        before = self._samples[rows]
        total = self._weight(before + counts)
        age = np.repeat(ends, counts) - 1 - np.arange(len(ids))
        part = self.decay**age / np.repeat(total, counts)
        keep = self.decay**counts * self._weight(before) / total
        batch = _Rows(x, grad, part.astype(np.float32), keep.astype(np.float32), starts, ends)
        overflowed = self._add(rows, slots, batch)
        self._samples[rows] = np.where(overflowed, before, before + counts)
        return int(counts[overflowed].sum())

    def _fold_slot(self, x: F32, grad: F32, slot: int) -> int:
        row = self._place[slot] if slot < len(self._place) else -1
        if row < 0 or self._owner[row] != self.pool._owners.of_one(slot):
            row = self._rows_for(np.array([slot]))[0]
        n, before = len(x), int(self._samples[row])
        total = self._weight(before + n)
        part = (self.decay ** np.arange(n - 1, -1, -1) / total).astype(np.float32)
        keep = np.float32(self.decay**n * self._weight(before) / total)
        if not self._add_slot(int(row), slot, x, grad, part, keep):
            return n
        self._samples[row] = before + n
        return 0

    def _weight(self, samples: Any) -> Any:
        """sum of d^i over so many samples."""
        if self.decay == 1.0:  # 1 / fisher_samples is below what float64 tells from 0
            return samples * 1.0
        return (1.0 - self.decay**samples) / (1.0 - self.decay)

    def _add(self, rows: I64, slots: I64, batch: _Rows) -> NDArray[np.bool_]:
        """Folds a batch in; true for a slot that it was left out of, as it would overflow."""
        raise NotImplementedError

    def _add_slot(
        self, row: int, slot: int, x: F32, grad: F32, part: F32, keep: np.float32
    ) -> bool:
        """Folds samples of one slot in; False where they were left out."""
        raise NotImplementedError

    def mean(self, slot: int) -> Pair:
        """Of an observed slot, by slice: as the second arguments of ``EWC.set``; float32."""
        raise NotImplementedError

    def put(self, slot: int, mean: Pair, samples: int) -> None:
        """An average as ``mean`` gave it."""
        row = int(self._rows_for(np.array([slot]))[0])
        self._samples[row] = samples
        self._put(row, slot, mean)

    def _put(self, row: int, slot: int, mean: Pair) -> None:
        raise NotImplementedError


class MovingFactors(MovingFisher):
    """Form "delta": u [out] of all slices, then v [in]; 4 (in + out) bytes a slot."""

    def clear(self) -> None:
        super().clear()
        self._means: F32 = np.zeros((0, self.pool.out_features + self.pool.in_features), np.float32)

    def _grow(self, rows: int) -> None:
        super()._grow(rows)
        larger = np.zeros((rows, self._means.shape[1]), np.float32)
        larger[: len(self._means)] = self._means
        self._means = larger

    def _add(self, rows: I64, slots: I64, batch: _Rows) -> NDArray[np.bool_]:
        squares = np.concatenate([batch.grad, batch.x], axis=1)
        np.square(squares, out=squares)
        squares *= batch.part[:, None]
        sums = squares
        if len(rows) < len(squares):
            sums = np.add.reduceat(squares, batch.starts, axis=0)
        fresh = self._samples[rows] == 0
        kept = np.where(fresh[:, None], np.float32(0), self._means[rows]) * batch.keep[:, None]
        self._means[rows] = kept + sums
        return np.zeros(len(rows), bool)

    def _add_slot(
        self, row: int, slot: int, x: F32, grad: F32, part: F32, keep: np.float32
    ) -> bool:
        mean = self._means[row]
        mean *= keep if self._samples[row] else np.float32(0)
        at = 0
        for rows in (grad, x):
            squares = rows * rows
            squares *= part[:, None]
            sums = squares[0] if len(squares) == 1 else squares.sum(axis=0)
            mean[at : at + len(sums)] += sums
            at += len(sums)
        return True

    def mean(self, slot: int) -> Pair:
        values = self._means[self._row(slot)]
        *u, v = np.split(values, np.cumsum(self.pool.slices))
        there = [bool(rank) for rank in self.pool.ranks(slot)]
        first = [part.copy() if here else None for part, here in zip(u, there, strict=True)]
        return first, [v.copy() if here else None for here in there]

    def _put(self, row: int, slot: int, mean: Pair) -> None:
        ends = np.cumsum([0, *self.pool.slices])
        self._means[row] = 0.0
        for part, begin, end in zip(mean[0], ends[:-1], ends[1:], strict=True):
            if part is not None:
                self._means[row, begin:end] = part
        for v in mean[1]:
            if v is not None:
                self._means[row, ends[-1] :] = v


class MovingWeights(MovingFisher):
    """Form "factor": F_A and F_B shaped as the slot's A and B; 4 r (in + out) bytes a slot."""

    def clear(self) -> None:
        super().clear()
        self._means: list[Pair] = []

    def _grow(self, rows: int) -> None:
        super()._grow(rows)
        self._means += [([], []) for _ in range(rows - len(self._means))]

    def forget(self, slot: int) -> None:
        if slot < len(self._place) and self._place[slot] >= 0:
            self._means[self._place[slot]] = ([], [])
        super().forget(slot)

    def _add(self, rows: I64, slots: I64, batch: _Rows) -> NDArray[np.bool_]:
        overflowed = np.zeros(len(rows), bool)
        for i, (row, slot) in enumerate(zip(rows.tolist(), slots.tolist(), strict=True)):
            its = slice(batch.starts[i], batch.ends[i])
            overflowed[i] = not self._add_slot(
                row, slot, batch.x[its], batch.grad[its], batch.part[its], batch.keep[i]
            )
        return overflowed

    def _add_slot(
        self, row: int, slot: int, x: F32, grad: F32, part: F32, keep: np.float32
    ) -> bool:
        # The squares of scaled gradients are those of the gradients, weighted.
        first, second = self._fisher(slot, x, grad * np.sqrt(part)[:, None])
        if not all(np.isfinite(F).all() for F in (*first, *second) if F is not None):
            return False
        if self._samples[row]:
            for mine, theirs in zip(self._means[row], (first, second), strict=True):
                for mean, F in zip(mine, theirs, strict=True):
                    if F is not None:
                        F += keep * mean
        self._means[row] = (first, second)
        return True

    def _fisher(self, slot: int, x: F32, grad: F32) -> Pair:
        """(F_A, F_B) by slice, summed over the samples."""
        A, B, scaling = self.pool._storage.get(slot)
        first: list[Any] = []
        second: list[Any] = []
        ends = np.cumsum([0, *self.pool.slices])
        for a, b, begin, end in zip(A, B, ends[:-1], ends[1:], strict=True):
            if a is None or not len(a):
                first.append(None)
                second.append(None)
                continue
            rows, up, a, b = self._beside_the_pool(x, grad[:, begin:end], a, b)
            F_A, F_B = ops.lora_fisher(rows, up, a, b, scaling)
            first.append(_to_host(F_A))
            second.append(_to_host(F_B))
        return first, second

    def _beside_the_pool(self, *arrays: Any) -> Any:
        device = getattr(self.pool._storage, "device", "cpu")
        if str(device) == "cpu":
            return arrays
        import torch

        return [torch.from_numpy(np.ascontiguousarray(a)).to(device) for a in arrays]

    def mean(self, slot: int) -> Pair:
        first, second = self._means[self._row(slot)]
        return (
            [None if F is None else F.copy() for F in first],
            [None if F is None else F.copy() for F in second],
        )

    def _put(self, row: int, slot: int, mean: Pair) -> None:
        self._means[row] = (
            [None if F is None else F.copy() for F in mean[0]],
            [None if F is None else F.copy() for F in mean[1]],
        )


def _finite(x: F32, grad: F32) -> NDArray[np.bool_]:
    """Rows whose gradient of ΔW has a finite squared norm, ‖grad xᵀ‖²."""
    with np.errstate(over="ignore", invalid="ignore"):
        norms = np.einsum("ij,ij->i", x, x) * np.einsum("ij,ij->i", grad, grad)
    finite: NDArray[np.bool_] = np.isfinite(norms)
    return finite


def _to_host(array: Any) -> Any:
    return array.cpu().numpy() if hasattr(array, "detach") else array
