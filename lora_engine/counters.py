"""What the engine did so far in this process, for whoever watches it."""

from __future__ import annotations

from typing import NamedTuple

from lora_engine import _C

TIMED_EVERY = 64  # LE_TIMED_EVERY


class OpCounters(NamedTuple):
    """calls: all, refused ones included. timed: how many of them were timed, one in TIMED_EVERY,
    drawn at random; seconds: what these took together; buckets: how many of them took up to 1, 2,
    4, ... 2^19 microseconds, and longer."""

    calls: int
    timed: int
    seconds: float
    buckets: tuple[int, ...]


class Counters(NamedTuple):
    """forward, adapt: of pools on the CPU (``AdapterPool.forward``, ``MicroLoRA.forward``, Sona
    and all that goes through them). skipped: rows whose step held NaN or Inf, so that nothing was
    learned. resident: adapters in pools now."""

    forward: OpCounters
    adapt: OpCounters
    skipped: int
    resident: int


def counters() -> Counters:
    """The counters of the C++ core since it was loaded, over all threads (``le_get_counters``).

    All zero in a core that was built with -DLORA_ENGINE_COUNTERS=OFF.
    """
    forward, adapt, skipped, resident = _C.counters()
    return Counters(_op(forward), _op(adapt), skipped, resident)


def _op(raw: tuple[int, int, float, list[int]]) -> OpCounters:
    calls, timed, seconds, buckets = raw
    return OpCounters(calls, timed, seconds, tuple(buckets))
