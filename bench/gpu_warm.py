"""python -m bench.gpu_warm PART PARTS: has Triton compile what a part of the cases launch.

One call of each contender, on data of the shapes that are timed, in processes beside the tests:
the case that is timed later finds its kernels in Triton's cache, and peers' files in the system's.
"""

from __future__ import annotations

import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from bench import gpu_build, gpu_process
from bench.gpu_case import Absent, Case
from bench.gpu_time import Budget, release


def warm(case: Case) -> None:
    """What fails here is told where it is measured."""
    import torch

    with torch.no_grad():
        data = case.make(2)
        for build in case.contenders.values():
            try:
                build(data).calls[0]()
                torch.cuda.synchronize()
            except Absent:
                continue
            except Exception:
                traceback.print_exc()


def _start(part: int, parts: int) -> subprocess.Popen[Any]:
    command = (sys.executable, "-m", "bench.gpu_warm", str(part), str(parts))
    with open(gpu_build.FOLDER / f"warm-{part}.log", "wb") as log:
        return gpu_process.start(
            command, cwd=gpu_build.ROOT, env=gpu_build.environment(), stdin=subprocess.DEVNULL,
            stdout=log, stderr=subprocess.STDOUT,
        )  # fmt: skip


@contextmanager
def beside(parts: int, budget: Budget) -> Iterator[None]:
    """Runs so many processes beside the body, and on until the budget is spent; none is left."""
    running: list[subprocess.Popen[Any]] = []
    try:
        for part in range(parts):
            running.append(_start(part, parts))
        yield
        while budget.left and any(p.poll() is None for p in running):
            time.sleep(0.2)
    finally:
        for process in running:
            gpu_process.stop(process)


def main(part: int, parts: int) -> None:
    from bench.gpu_cases import CASES

    for case in CASES[part::parts]:
        try:
            warm(case)
            release()
        except Exception:  # no memory for its data, say
            traceback.print_exc()
        print(f"{time.process_time():.0f} s: {case.name}", flush=True)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
