"""How much slower Sona serves during a background pass: ``python -m bench.serving_during_pass``.

Requests come 1,000 a second whatever becomes of those before them (an open loop), each a forward
of one row at 4096 features for one of 1,000 sessions. A request's latency runs from when it was
due, so waiting counts; the sleep until then is in it too, with and without a pass. Quiet windows
and passes over 10,000 samples take turns, so that both see the same machine.
"""

from __future__ import annotations

import argparse
import threading
from time import perf_counter, sleep

import numpy as np

import lora_engine as le
from bench import cases_sona

INTERVAL = 1e-3  # seconds between two requests
WANTED = 1.5  # times the quiet p99


def serve(sona: le.Sona, x: np.ndarray, sessions: int, enough: threading.Event) -> list[float]:
    """Latencies in seconds of requests until ``enough``."""
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


def measure(passes: int, sessions: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Latencies of quiet requests and of those during passes, and the passes' times; seconds."""
    sona = cases_sona.make()
    x, _ = cases_sona.feedback()
    quiet: list[float] = []
    busy: list[float] = []
    times: list[float] = []
    for n in range(passes):
        cases_sona.teach(sona, sessions, seed=n)
        done = threading.Event()
        timer = threading.Timer(0.15, done.set)
        timer.start()
        quiet += serve(sona, x, sessions, done)
        done = threading.Event()

        def work(done: threading.Event = done) -> None:
            start = perf_counter()
            result = sona.background()
            times.append(perf_counter() - start)
            assert result.samples_used == cases_sona.SAMPLES, result
            done.set()

        thread = threading.Thread(target=work)
        thread.start()
        busy += serve(sona, x, sessions, done)
        thread.join()
    return np.array(quiet), np.array(busy), np.array(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--passes", type=int, default=30)
    parser.add_argument("--sessions", type=int, default=1000)
    options = parser.parse_args()
    quiet, busy, times = measure(options.passes, options.sessions)
    for name, taken in (("quiet", quiet), ("during passes", busy)):
        p50, p99 = np.percentile(taken, (50, 99)) * 1e6
        print(f"{name}: {len(taken):,} requests, p50 {p50:.0f} us, p99 {p99:.0f} us")
    ms = times * 1e3
    print(f"passes: first {ms[0]:.1f} ms, median {np.median(ms):.1f} ms, longest {ms.max():.1f} ms")
    ratio = np.percentile(busy, 99) / np.percentile(quiet, 99)
    print(f"p99 during passes / quiet p99: {ratio:.2f} (wanted: at most {WANTED})")


if __name__ == "__main__":
    main()
