"""How much slower Sona serves during a background pass: ``python -m bench.serving_during_pass``.

Requests come 1,000 a second whatever becomes of those before them (an open loop), each a forward
of one row at 4096 features for one of 1,000 sessions. A request's latency runs from when it was
due, so waiting counts; the sleep until then is in it too, with and without a pass. Windows of a
tenth of a second take turns, so that all see the same machine: nothing else runs; NumPy adds to an
array larger than the caches, for what any work on another core costs here (these two in changing
order); a pass over 10,000 samples. A p99 is of all requests of a kind; the ratio of a window's own
p99 to that of the quiet one beside it is what a single bad minute of the machine moves least.
"""

from __future__ import annotations

import argparse
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from time import perf_counter, sleep

import numpy as np
from rich.progress import track

import lora_engine as le
from bench import cases_sona
from bench.machine import cache_bytes

INTERVAL = 1e-3  # seconds between two requests
WINDOW = 0.1  # seconds, about as long as a pass
WANTED = 1.5  # times the quiet p99
LARGER = 3  # times the L3: the array that NumPy works on

Latencies = list[float]
QUIET, BESIDE, DURING = "quiet", "beside NumPy", "during passes"


class Requests:
    """Those of one Sona: sessions in turn, from window to window."""

    def __init__(self, sona: le.Sona, sessions: int) -> None:
        self.sona, self.sessions, self.count = sona, sessions, 0
        self.x, _ = cases_sona.feedback()

    def serve(self, enough: threading.Event) -> Latencies:
        """Until ``enough``."""
        taken, due = [], perf_counter() + INTERVAL
        while not enough.is_set():
            early = due - perf_counter()
            if early > 0:
                sleep(early)
            i = self.count
            self.sona.forward(self.x[i % len(self.x)], session=i % self.sessions)
            taken.append(perf_counter() - due)
            due += INTERVAL
            self.count += 1
        return taken

    def during(self, call: Callable[[], None]) -> Latencies:
        """While another thread is in a call."""
        enough = threading.Event()
        with ThreadPoolExecutor(1) as other:
            done = other.submit(call)
            done.add_done_callback(lambda _: enough.set())
            taken = self.serve(enough)
            done.result()
        return taken


def measure(turns: int, sessions: int) -> tuple[dict[str, list[Latencies]], list[float]]:
    """Latencies by kind and window, and the passes' times; seconds."""
    sona = cases_sona.make()
    requests = Requests(sona, sessions)
    large = np.zeros(LARGER * cache_bytes().get("L3", 1 << 25) // 4, np.float32)
    found: dict[str, list[Latencies]] = {QUIET: [], BESIDE: [], DURING: []}
    passes: list[float] = []

    def add() -> None:
        end = perf_counter() + WINDOW
        while perf_counter() < end:
            np.add(large, 1, out=large)

    def work() -> None:
        start = perf_counter()
        result = sona.background()
        passes.append(perf_counter() - start)
        assert result.applied, result
        assert result.samples_used == cases_sona.SAMPLES, result

    controls: list[tuple[str, Callable[[], None]]]
    controls = [(QUIET, partial(sleep, WINDOW)), (BESIDE, add)]
    for n in track(range(turns), description="passes", auto_refresh=False):
        cases_sona.teach(sona, sessions, seed=n)
        for kind, call in (*controls[:: 1 if n % 2 else -1], (DURING, work)):
            found[kind].append(requests.during(call))
    return found, passes


def p99(window: Latencies) -> float:
    return float(np.percentile(window, 99))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--passes", type=int, default=60)
    parser.add_argument("--sessions", type=int, default=1000)
    options = parser.parse_args()
    found, passes = measure(options.passes, options.sessions)
    quiet = np.percentile(np.concatenate(found[QUIET]), 99)
    for kind, windows in found.items():
        together = np.concatenate(windows)
        p50, high = np.percentile(together, (50, 99))
        line = (
            f"{kind}: {len(together):,} requests, p50 {p50 * 1e6:.0f} us, p99 {high * 1e6:.0f} us"
        )
        if kind != QUIET:
            ratio = np.median([p99(a) / p99(b) for a, b in zip(windows, found[QUIET], strict=True)])
            line += f", {high / quiet:.2f} times the quiet one (window by window: {ratio:.2f})"
        print(line)
    ms = np.array(passes) * 1e3
    print(f"passes: first {ms[0]:.1f} ms, median {np.median(ms):.1f} ms, longest {ms.max():.1f} ms")
    print(f"wanted during passes: at most {WANTED} times the quiet p99")


if __name__ == "__main__":
    main()
