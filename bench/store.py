"""AdapterStore: a hit over a plain forward, a miss, and what files on disk cost either.

``python -m bench.store [--files 100000]``. 4096 features and rank 2 for a hit and a miss; then
a store of so many users of 64 features, written beforehand, against one of its residents alone.
A miss has a warm disk (the files were just written) and a victim that is on disk.
Microseconds: medians, and of the difference the median of paired rounds.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from itertools import count
from pathlib import Path
from time import perf_counter, thread_time
from typing import Any

import numpy as np

import lora_engine as le
from bench.case import Contender
from bench.paired import paired
from lora_engine.adapters import store_file
from lora_engine.adapters.store_file import Stored

RESIDENT, ROUNDS, MISSES = 64, 31, 2000


def _fill(folder: Path, users: int, width: int) -> None:
    """Users' files as a store writes them, but for the syncing: 1 ms each."""
    le.AdapterStore(folder, in_features=width, out_features=width).close()
    rng = np.random.default_rng(0)
    A, B = rng.random((2, width), np.float32), rng.random((width, 2), np.float32)
    for i in range(users):
        user = str(i)
        path = Path(store_file.path_of(f"{folder}/adapters", store_file.user_hash(user)))
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "wb") as file:
            file.writelines(store_file.encode(user, Stored([A], [B], 2.0, {}), "float32"))


def _hit(folder: Path, width: int) -> tuple[float, float]:
    """(us of a forward, us more where it asks for the slot of one of the residents)."""
    with le.AdapterStore(folder, RESIDENT, in_features=width, out_features=width) as store:
        x = np.ones((1, width), np.float32)
        slots = [store.slot(str(i)) for i in range(RESIDENT)]
        names = [str(i) for i in range(RESIDENT)]
        turns = count()

        def plain() -> None:
            i = next(turns) % RESIDENT
            store.pool.forward(x, np.array([slots[i]], np.int32))

        def asked() -> None:
            i = next(turns) % RESIDENT
            store.pool.forward(x, np.array([store.slot(names[i])], np.int32))

        times = paired([Contender("plain", plain), Contender("asked", asked)], ROUNDS).times
    more = np.median(times["asked"] - times["plain"])
    return float(np.median(times["plain"])) * 1e6, float(more) * 1e6


def _miss(folder: Path, users: int, width: int) -> tuple[float, float]:
    """us: (median, median of its CPU time)."""
    with le.AdapterStore(folder, RESIDENT, in_features=width, out_features=width) as store:
        wall, cpu = [], []
        for i in range(MISSES):
            user = str(i * 7919 % users)
            began, worked = perf_counter(), thread_time()
            store.slot(user)
            cpu.append(thread_time() - worked)
            wall.append(perf_counter() - began)
    return float(np.median(wall)) * 1e6, float(np.median(cpu)) * 1e6


def _in_folder(users: int, width: int, measure: Callable[[Path], Any]) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        _fill(Path(folder) / "store", users, width)
        return measure(Path(folder) / "store")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--files", type=int, default=100_000)
    files = parser.parse_args().files
    for users, width in ((1000, 4096), (RESIDENT + 1, 64), (files, 64)):

        def both(folder: Path, users: int = users, width: int = width) -> Any:
            return _hit(folder, width), _miss(folder, users, width)

        (plain, more), (wall, cpu) = _in_folder(users, width, both)
        print(
            f"{users} users, {width} features: forward {plain:.2f} us, with store.slot"
            f" {more:+.2f} us; miss {wall:.0f} us, {cpu:.0f} us of CPU time",
            flush=True,
        )


if __name__ == "__main__":
    main()
