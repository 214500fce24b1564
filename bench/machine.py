"""How fast this machine moves bytes: read, and read + write in place, by cache level.

No kernel of ours is used, only those of torch and NumPy. All that fit are run; the
best run of the best one is the bandwidth. The best few of each kind also take part
in a case's rounds, so that the floor is measured beside what it is compared with.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np

from bench.case import Contender, Traffic, absent
from bench.paired import Times, calls_in, timed

L1, L2, L3, MEMORY = "L1", "L2", "L3", "memory"
READ, UPDATE = "read", "update"
SAMPLE_SECONDS = 0.001
PROBE_SECONDS = 0.12  # for each kernel
PROBES = 2  # kernels of a kind that take part in a case's rounds
REPEATED = 16 << 20  # bytes that are read in one call from a small array, to hide the call
REPEATED_SUMS = "torch repeated sums"
_CACHES = "/sys/devices/system/cpu/cpu0/cache"
_UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


def cache_bytes() -> dict[str, int]:
    """{"L1": ..., "L2": ..., "L3": ...} of the data caches of CPU 0, from /sys."""
    sizes = {}
    for folder in Path(_CACHES).glob("index*"):
        with suppress(OSError, ValueError, LookupError):  # a virtual machine's may say nothing
            if (folder / "type").read_text().strip() != "Instruction":
                size = (folder / "size").read_text().strip()
                level = "L" + (folder / "level").read_text().strip()
                sizes[level] = int(size[:-1]) * _UNITS[size[-1]]
    return dict(sorted(sizes.items()))


class Place(NamedTuple):
    """Where a working set lies: a level, and how many bytes to probe it with."""

    level: str
    size: int
    threads: int

    @property
    def label(self) -> str:
        return f"{self.level}, {self.threads} thread{'s' if self.threads > 1 else ''}"


def canonical(level: str, threads: int) -> Place:
    """The working set that stands for a level."""
    caches = cache_bytes()
    l1, l2 = caches.get("L1", 32 << 10), caches["L2"]
    l3 = caches.get("L3", l2)
    sizes = {L1: l1 // 2 * threads, L2: l2 // 2 * threads, L3: l3 // 4, MEMORY: 4 * l3}
    return Place(level, sizes[level], threads)


def place_of(footprint: int, threads: int) -> Place:
    """The level that holds the footprint; between half and twice the L3, where part of
    it stays in the cache, a probe of the same size instead."""
    caches = cache_bytes()
    l2, l3 = caches["L2"] * threads, caches.get("L3", 0)
    if footprint <= 0.75 * l2:
        return canonical(L2, threads)
    if footprint <= 0.5 * l3:
        return canonical(L3, threads)
    if footprint >= 2 * l3:
        return canonical(MEMORY, threads)
    return Place(f"L3/memory at {footprint / 1e6:.0f} MB", footprint, threads)


class Rate(NamedTuple):
    """Bytes a second, and the kernel that reached it."""

    bytes_per_s: float = 0.0
    kernel: str = ""


class Bandwidth(NamedTuple):
    """read: of bytes only read. update: of bytes read and written in place, both counted."""

    read: Rate = Rate()
    update: Rate = Rate()

    def floor_s(self, traffic: Traffic) -> float:
        """The least time in which the traffic can move."""
        read = traffic.read / self.read.bytes_per_s
        return read + traffic.changed / self.update.bytes_per_s


class Kernel(NamedTuple):
    """A call that moves so many bytes. kind: "read" or "update". threads: torch's."""

    kind: str
    name: str
    moved: int
    call: Callable[[], Any]
    threads: int = 0

    @property
    def contender(self) -> Contender:
        name = f"{self.kind} probe: {self.name}, {self.threads} threads"
        return Contender(name, self.call, torch_threads=self.threads)


def _numpy_kernels(array: Any) -> Iterator[Kernel]:
    one, size = np.float32(1), array.nbytes
    yield Kernel(READ, "numpy max", size, array.max)
    yield Kernel(
        UPDATE, "numpy multiply(out=)", 2 * size, lambda: np.multiply(array, one, out=array)
    )
    yield Kernel(UPDATE, "numpy negative(out=)", 2 * size, lambda: np.negative(array, out=array))


def _torch_kernels(array: Any, threads: int) -> Iterator[Kernel]:
    import torch

    size, t = array.nbytes, torch.from_numpy(array)
    total, half = torch.empty(()), t.numel() // 2
    low, high = t[:half], t[half : 2 * half]
    rows = t[: t.numel() // 4096 * 4096].view(-1, 4096)
    sums = torch.empty(len(rows))
    ones = torch.ones(4096)
    yield Kernel(READ, "torch sum", size, lambda: torch.sum(t, 0, out=total))
    yield Kernel(READ, "torch row sums", size, lambda: torch.sum(rows, 1, out=sums))
    yield Kernel(READ, "torch dot", size, lambda: torch.dot(low, high))
    yield Kernel(READ, "torch mv", size, lambda: torch.mv(rows, ones, out=sums))
    if size <= 1 << 20:
        part = t[: t.numel() // threads]  # each core reads it from its own cache
        times = REPEATED // part.nbytes
        many, repeated = part.expand(times, len(part)), torch.empty(times)
        moved = times * part.nbytes
        yield Kernel(READ, REPEATED_SUMS, moved, lambda: torch.sum(many, 1, out=repeated))
    yield Kernel(UPDATE, "torch mul_", 2 * size, lambda: t.mul_(1.0))
    yield Kernel(UPDATE, "torch neg_", 2 * size, lambda: t.neg_())


def kernels(place: Place) -> list[Kernel]:
    """All that move bytes at a place: on its threads, and on one, lest a busy core make
    two threads that wait for each other look like a slow memory. Of the L1 only those that read it
    many times in a call, as a call takes longer than to read it once."""
    if place.level == L1:
        every = kernels(place._replace(level=L2))
        return [k for k in every if k.name == REPEATED_SUMS and k.threads == place.threads]
    array = np.ones(place.size // 4, np.float32)
    found = list(_numpy_kernels(array))
    if absent("torch"):
        return found
    for threads in sorted({1, place.threads}):
        found += [k._replace(threads=threads) for k in _torch_kernels(array, threads)]
    return found


def best_seconds(call: Callable[[], Any]) -> float:
    """Seconds of the quickest sample within PROBE_SECONDS."""
    count = calls_in(call, SAMPLE_SECONDS)
    until, best = perf_counter() + PROBE_SECONDS, float("inf")
    while best == float("inf") or perf_counter() < until:
        best = min(best, timed(call, count))
    return best


def honest_floor(floor: float, quickest: float) -> tuple[float, str]:
    """(floor, note): the floor, unless our quickest run beat it; then that run's time."""
    if quickest >= floor:
        return floor, ""
    note = f"our quickest run took {quickest / floor:.2f} of the time that the measured"
    return quickest, note + " bandwidth gives: the measure was too low, and that run is the floor"


class Machine:
    """The bandwidths seen so far in this run: the highest of each counts."""

    def __init__(self) -> None:
        self.seen: dict[Place, Bandwidth] = {}

    def observe(self, place: Place) -> list[Kernel]:
        """Probes a place once more; returns the best kernels, PROBES of each kind."""
        rates: dict[str, list[tuple[Rate, Kernel]]] = {READ: [], UPDATE: []}
        for kernel in kernels(place):
            with kernel.contender.mode():
                rate = Rate(kernel.moved / best_seconds(kernel.call), kernel.name)
            rates[kernel.kind].append((rate, kernel))
            self.record(place, kernel.kind, rate)
        for found in rates.values():
            found.sort(key=lambda pair: pair[0], reverse=True)
        return [kernel for found in rates.values() for _, kernel in found[:PROBES]]

    def record(self, place: Place, kind: str, rate: Rate) -> None:
        """Keeps the highest rate of a place and kind."""
        known = self.seen.get(place, Bandwidth())
        highest = max(getattr(known, kind), rate)
        self.seen[place] = known._replace(**{kind: highest})

    def rates(self, place: Place, probes: Sequence[Kernel], times: Times) -> tuple[Any, Any]:
        """Bytes a second in each round, (read, update): the quicker kernel's of a kind."""
        best: dict[str, Any] = {READ: 0.0, UPDATE: 0.0}
        for kernel in probes:
            rates = kernel.moved / times[kernel.contender.name]
            best[kernel.kind] = np.maximum(best[kernel.kind], rates)
            self.record(place, kernel.kind, Rate(float(rates.max()), kernel.name))
        return best[READ], best[UPDATE]

    def levels(self, threads: int) -> None:
        """Probes every level, with one thread and with all."""
        for count in sorted({1, threads}):
            for level in (L1, L2, L3, MEMORY):
                self.observe(canonical(level, count))

    def report(self) -> list[dict[str, Any]]:
        """The rates in GB/s, for the JSON and the table's head; None: not measured."""
        return [
            {
                "level": place.level,
                "threads": place.threads,
                "probe_bytes": place.size,
                "read_gb_s": round(found.read.bytes_per_s / 1e9, 1),
                "read_kernel": found.read.kernel,
                "update_gb_s": round(found.update.bytes_per_s / 1e9, 1) or None,
                "update_kernel": found.update.kernel,
            }
            for place, found in self.seen.items()
        ]
