"""The background pass of Sona: freeze the fast adapters, merge, judge, serve or drop the result."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import numpy as np

from lora_engine import ops
from lora_engine import reference_consolidation as low_rank
from lora_engine.learning import consolidation
from lora_engine.learning.sona_config import SonaConfig
from lora_engine.learning.sona_module import Array, Fast, Member, Module, Served

log = logging.getLogger(__name__)

THREADS = 2  # that a merge may use where one more is left to serving
SHORTEST_WAIT = 1e-3  # seconds between two calls of a Repeater
JOINED_RANKS = 4  # times the rank: that a session's adapter may grow to between two merges


class BackgroundResult(NamedTuple):
    """What a pass did. quality_delta: the loss on held-out samples before minus after, NaN
    where none were held out or it is none. note: why nothing was merged, or what was rejected."""

    applied: bool
    note: str
    samples_used: int
    sessions: int
    quality_delta: float


def consolidate(m: Module, config: SonaConfig) -> BackgroundResult:
    """One module's pass. While it works, sessions learn on in fresh fast adapters."""
    served, after = _freeze(m), None
    try:
        merged, sums = _waiting(m, served)
        samples = sum(fast.pending for fast in merged)
        if not samples:
            _unfreeze(m)
            return BackgroundResult(False, "no samples wait", 0, 0, float("nan"))
        after = _merged(m, config, served, merged)
        gain = _gain(m, served, after)
    except BaseException:
        if after is not None:
            _drop(m, after, served)
        _unfreeze(m)
        raise
    if gain is not None and not gain >= 0.0:
        _drop(m, after, served)
        _unfreeze(m)
        note = f"rejected: the loss on held-out samples would rise by {-gain:.4g}"
        if np.isnan(gain):
            note = "rejected: the loss on held-out samples is not a number"
        return BackgroundResult(False, note, samples, len(merged), gain)
    _serve(m, after, samples, sums)
    return BackgroundResult(True, "", samples, len(merged), float("nan") if gain is None else gain)


def together(results: Sequence[BackgroundResult]) -> BackgroundResult:
    """The passes of several modules as one: applied where one was."""
    gains = [r.quality_delta for r in results if not np.isnan(r.quality_delta)]
    notes = [r.note for r in results if r.note]
    applied = any(r.applied for r in results)
    return BackgroundResult(
        applied,
        "; ".join(dict.fromkeys(notes)) if not applied or len(results) > 1 else "",
        sum(r.samples_used for r in results),
        max(r.sessions for r in results),
        float(sum(gains)) if gains else float("nan"),
    )


def rollback(m: Module) -> bool:
    """Serves what was served before the last consolidation, with what was learned since on top."""
    with m.lock:
        if m.previous is None:
            return False
        (before, m.fisher, m.samples), m.previous = m.previous, None
        now, m.served = m.served, before._replace(fast=m.served.fast)
        m.pool.remove_all({*now.shared()} - {*before.shared()})
        _fold(m)
    return True


# ---- one step each ----------------------------------------------------------


def _freeze(m: Module) -> Served:
    with m.lock:
        served = m.served
        m.served = served._replace(fast={}, frozen=served.fast)
        return m.served


def _unfreeze(m: Module) -> None:
    """Sessions go on learning in the adapters that were frozen."""
    with m.lock:
        _fold(m)


def _fold(m: Module) -> None:
    """Puts what sessions learned beside a frozen adapter into it; the lock is held."""
    frozen, fast = m.served.frozen, m.served.fast
    both = frozen.keys() & fast.keys()
    joined = {session: _joined(m, frozen[session], fast[session]) for session in both}
    m.served = m.served._replace(fast={**frozen, **fast, **joined}, frozen={})
    m.pool.remove_all([part[session].slot for session in both for part in (frozen, fast)])


def _waiting(m: Module, served: Served) -> tuple[list[Fast], list[Array]]:
    """The frozen adapters with samples that wait, and their Fisher sums together.

    One whose sums are not finite would spoil the merge of all: its samples are left out.
    """
    found = [fast for fast in served.frozen.values() if fast.pending]
    sums = m.sums.over([one.slot for one in found])
    if all(np.isfinite(total).all() for total in sums):
        return found, sums
    with m.lock:
        for one in found:
            if not all(np.isfinite(rows[one.slot]).all() for rows in m.sums):
                log.warning("background: %d samples are left out: their sums are Inf", one.pending)
                m.sums.begin(one.slot)
                one.pending, one.quality = 0, 0.0
                if m.mean_inputs:
                    one.inputs.fill(0.0)
    return _waiting(m, served)


def _joined(m: Module, older: Fast, newer: Fast) -> Fast:
    """One adapter for two, in a slot of its own: of their ranks together, up to a bound."""
    (A, B, _), (more_A, more_B, _) = (m.pool.get(adapter.slot) for adapter in (older, newer))
    A, B = np.concatenate([A, more_A]), np.concatenate([B, more_B], axis=1)
    if len(A) > JOINED_RANKS * m.rank:
        A, B = _low_rank_sum(m, older.slot, [newer.slot], [1.0])
    made = m.fast_of(m.pool.add(A, B, m.scaling))
    m.hold(made.slot, A)
    m.sums.begin(made.slot)
    for rows in m.sums:
        np.add(rows[older.slot], rows[newer.slot], out=rows[made.slot])
    if m.mean_inputs:
        np.add(older.inputs, newer.inputs, out=made.inputs)
    made.quality = older.quality + newer.quality
    made.pending = older.pending + newer.pending
    return made


def _merged(m: Module, config: SonaConfig, served: Served, fast: list[Fast]) -> Served:
    """What would be served with the fast adapters merged, in slots of its own."""
    if config.consolidation == "ensemble":
        return _ensemble(m, config, served, fast)
    samples = np.array([adapter.pending for adapter in fast], np.float64)
    slots = [adapter.slot for adapter in fast]
    with m.lock:
        m.sums.begin(served.consolidated, m.fisher)
        u, v = m.sums  # rows that are merged stay as they are meanwhile
    done = consolidation.consolidate(
        m.pool,
        served.consolidated,
        slots,
        config.consolidation,
        quality=np.array([adapter.quality for adapter in fast]) / samples,
        samples=samples,
        base_samples=m.samples,
        u=u,
        v=v,
        summed=True,
        num_threads=max(1, min(THREADS, ops.get_num_threads() - 1)),
    )
    return Served(m.pool.add(done.A, done.B, done.scaling), {}, {}, served.members)


def _low_rank_sum(
    m: Module, base: int, slots: list[int], weights: list[float]
) -> tuple[Array, Array]:
    """D_0 + sum of weights_k D_k, cut to the rank: small sums only, in NumPy."""
    first, *parts = (low_rank.Delta(*m.pool.get(slot)) for slot in (base, *slots))
    merged = low_rank.svd_merge(first, parts, np.asarray(weights), m.rank, m.scaling)
    return merged.A.astype(np.float32), merged.B.astype(np.float32)


def _ensemble(m: Module, config: SonaConfig, served: Served, fast: list[Fast]) -> Served:
    """The fast adapters as members; those of least quality, beyond ensemble_size, are merged."""
    members = [*served.members, *(_member(adapter) for adapter in fast)]
    members.sort(key=lambda member: member.quality, reverse=True)
    kept, rest = members[: config.ensemble_size], members[config.ensemble_size :]
    A, B, _ = m.pool.get(served.consolidated)
    if rest:
        weights = [1.0 / len(rest)] * len(rest)
        A, B = _low_rank_sum(m, served.consolidated, [one.slot for one in rest], weights)
    copies = [one._replace(slot=m.pool.add(*m.pool.get(one.slot))) for one in kept]
    return Served(m.pool.add(A, B, m.scaling), {}, {}, tuple(copies))


def _member(adapter: Fast) -> Member:
    length = float(np.linalg.norm(adapter.inputs))
    direction = adapter.inputs / length if length else adapter.inputs
    return Member(adapter.slot, direction, adapter.quality / adapter.pending)


def _gain(m: Module, before: Served, after: Served) -> float | None:
    """The loss on held-out samples before minus after, of what a new session is served; None
    where none are held out."""
    x, target = m.held_out.samples()
    if not len(x):
        return None
    stranger: Hashable = object()
    losses = []
    for served in (before, after):
        gap = m.forward_by(served, x, stranger, None) - target
        losses.append(float(np.einsum("ij,ij->", gap, gap, dtype=np.float64)) / (2 * len(x)))
    return losses[0] - losses[1]


def _serve(m: Module, after: Served, n: int, sums: list[Array]) -> None:
    """Swaps the result of n samples in; what was served before stays for a rollback.

    In Python it is short: a request waits for the GIL as long.
    """
    u, v = ((total / n).astype(np.float32) for total in sums)
    before, forgotten = m.previous, m.forgotten()  # whose adapters go when all else is done
    with m.lock:
        now = m.served
        unmerged = {s: adapter for s, adapter in now.frozen.items() if not adapter.pending}
        merged = now.frozen
        if unmerged:
            merged = {s: adapter for s, adapter in merged.items() if adapter.pending}
        m.previous = (now._replace(fast={}, frozen=merged), m.fisher, m.samples)
        m.served = after._replace(fast=now.fast, frozen=unmerged)
        m.take_fisher(u, v, n, after.consolidated)
        _fold(m)
    m.pool.remove_all(forgotten)
    del before


def _drop(m: Module, after: Served, before: Served) -> None:
    m.pool.remove_all({*after.slots()} - {*before.slots()})


class Repeater:
    """Calls a function every so often in a thread of its own, from start to stop.

    An error that comes again and again is logged once, until a call gives something.
    """

    def __init__(self, call: Callable[[], Any], interval_ms: float) -> None:
        self._call, self._seconds = call, max(interval_ms / 1e3, SHORTEST_WAIT)
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        if self._thread is not None:
            raise RuntimeError("Sona.start: expected none to run, got one that runs")
        self._stop.clear()
        self._thread = threading.Thread(target=self._run, name="sona-background", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        thread, self._thread = self._thread, None
        if thread is not None:
            self._stop.set()
            thread.join()

    def _run(self) -> None:
        failed = ""
        while not self._stop.wait(self._seconds):
            try:
                if self._call() is not None:
                    failed = ""
            except Exception as error:  # serving and the next pass go on
                if failed != repr(error):
                    log.exception("background: a pass failed; what is served is as it was")
                failed = repr(error)
