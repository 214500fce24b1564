"""How much slower Sona serves during a background pass: ``python -m bench.serving_during_pass``.

Requests come 1,000 a second whatever becomes of those before them (an open loop), each a forward
of one row at 4096 features for one of 1,000 sessions. A request's latency runs from when it was
due, so waiting counts; the sleep until then is in it too, with and without a pass. Windows take
turns, so that all see the same machine: nothing else runs; a pass over 10,000 samples; NumPy adds
to an array larger than the caches, for what any work on another core costs here.
"""

from __future__ import annotations

import argparse
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from time import perf_counter, sleep
from typing import NamedTuple

import numpy as np
from rich.progress import track

import lora_engine as le
from bench import cases_sona

INTERVAL = 1e-3  # seconds between two requests
WINDOW = 0.1  # seconds, about as long as a pass
WANTED = 1.5  # times the quiet p99
LARGER = 24 << 20  # float32 of the array that NumPy works on

Latencies = list[float]


class Windows(NamedTuple):
    """Latencies by window, and the passes' times; seconds."""

    quiet: list[Latencies]
    during: list[Latencies]
    beside: list[Latencies]
    passes: list[float]


def serve(sona: le.Sona, x: np.ndarray, sessions: int, enough: threading.Event) -> Latencies:
    """Requests until ``enough``."""
    taken, due = [], perf_counter() + INTERVAL
    while not enough.is_set():
        early = due - perf_counter()
        if early > 0:
            sleep(early)
        i = len(taken)
        sona.forward(x[i % len(x)], session=i % sessions)
        taken.append(perf_counter() - due)
        due += INTERVAL
    return taken


def measure(passes: int, sessions: int) -> Windows:
    sona = cases_sona.make()
    x, _ = cases_sona.feedback()
    large = np.zeros(LARGER, np.float32)
    found = Windows([], [], [], [])

    def work() -> None:
        start = perf_counter()
        result = sona.background()
        found.passes.append(perf_counter() - start)
        assert result.samples_used == cases_sona.SAMPLES, result

    def add() -> None:
        end = perf_counter() + WINDOW
        while perf_counter() < end:
            np.add(large, 1, out=large)

    def served_during(call: Callable[[], None]) -> Latencies:
        enough = threading.Event()
        with ThreadPoolExecutor(1) as other:
            done = other.submit(call)
            done.add_done_callback(lambda _: enough.set())
            taken = serve(sona, x, sessions, enough)
            done.result()
        return taken

    for n in track(range(passes), description="passes", auto_refresh=False):
        cases_sona.teach(sona, sessions, seed=n)
        found.quiet.append(served_during(partial(sleep, WINDOW)))
        found.during.append(served_during(work))
        found.beside.append(served_during(add))
    return found


def p99(window: Latencies) -> float:
    return float(np.percentile(window, 99))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--passes", type=int, default=60)
    parser.add_argument("--sessions", type=int, default=1000)
    options = parser.parse_args()
    found = measure(options.passes, options.sessions)
    kinds = {"quiet": found.quiet, "during passes": found.during, "beside NumPy": found.beside}
    for name, windows in kinds.items():
        together = np.concatenate(windows)
        p50, high = np.percentile(together, (50, 99)) * 1e6
        ratio = np.median([p99(a) / p99(b) for a, b in zip(windows, found.quiet, strict=True)])
        print(
            f"{name}: {len(together):,} requests, p50 {p50:.0f} us, p99 {high:.0f} us;"
            f" a window's p99 over that of the quiet one before it: median {ratio:.2f}"
        )
    ms = np.array(found.passes) * 1e3
    print(f"passes: first {ms[0]:.1f} ms, median {np.median(ms):.1f} ms, longest {ms.max():.1f} ms")
    print(f"wanted during passes: at most {WANTED} times the quiet p99")


if __name__ == "__main__":
    main()
