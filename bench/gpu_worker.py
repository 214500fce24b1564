"""Measures cases in a process of its own, which a kernel may hang or break without the rest."""

from __future__ import annotations

import math
import multiprocessing
from collections.abc import Mapping
from typing import Any

from bench.case import OURS
from bench.gpu_case import Absent, Case
from bench.gpu_time import captured, interleaved, launches_of, probes, ratios, release, summary

PROBES = -1  # in place of a case's index


def measure(case: Case, found: Mapping[str, float]) -> dict[str, Any]:
    """The numbers of a row; raises where ours is wrong or fails."""
    import torch

    with torch.no_grad():
        data = case.make(case.sets)
        graphs, states, ours = {}, {}, None
        for name, build in case.contenders.items():
            try:
                timed = build(data)
                graphs[name] = captured(timed)
                ours = timed if name == OURS else ours
            except Absent as why:
                states[name] = {"status": "absent", "why": str(why)}
            except Exception as failed:
                if name == OURS:
                    raise
                states[name] = {"status": "failed", "why": said(failed)}
                torch.cuda.synchronize()  # raises where nothing can be timed any more
        times = interleaved(graphs)
        launches = launches_of(ours.calls[0])  # after the times: a profiler may stay attached
    return numbers(case, found, times, states, launches)


def numbers(
    case: Case,
    found: Mapping[str, float],
    times: Mapping[str, list[float]],
    states: Mapping[str, Any],
    launches: int | None,
) -> dict[str, Any]:
    """The row of times in microseconds a call; RuntimeError where they cannot be."""
    for name, values in times.items():
        if not all(math.isfinite(us) and us > 0 for us in values):
            raise RuntimeError(f"{name}: the events gave times that cannot be: {min(values):g} us")
    ours = summary(times[OURS])
    floor = case.nbytes / found["copy_gb_s"] / 1e3 + found["empty_kernel_us"]
    timed = {name: {"status": "measured", **summary(values)} for name, values in times.items()}
    return {
        "sets": case.sets,
        "rounds": len(times[OURS]),
        "floor_us": floor,
        "achieved_over_floor": ours["median"] / floor,
        "gb_s": case.nbytes / ours["median"] / 1e3,
        "launches": launches,
        "contenders": {name: timed.get(name) or states[name] for name in case.contenders},
        "ratios": {name: ratios(times, name, OURS) for name in times if name != OURS},
    }


def said(error: BaseException) -> str:
    """One line of an error."""
    return f"{type(error).__name__}: {error}".strip().splitlines()[0][:300]


def _broken() -> bool:
    """Whether the device takes no more work from this process."""
    import torch

    try:
        release()
        torch.cuda.synchronize()
        torch.ones(1, device="cuda").item()
    except Exception:
        return True
    return False


def serve(pipe: Any) -> None:
    """Answers indices of cases with rows, until the device is broken or None comes."""
    from bench.gpu_cases import CASES

    found: Mapping[str, float] = {}
    try:
        while (request := pipe.recv()) is not None:
            index, found = request
            row, why = None, ""
            try:
                row = probes() if index == PROBES else measure(CASES[index], found)
            except Exception as failed:
                why = said(failed)
            broken = _broken()
            pipe.send((row, why, broken))
            if broken:
                return
    except (EOFError, KeyboardInterrupt):
        return


class Worker:
    """Starts the process when it is asked, and anew after one that ended."""

    def __init__(self) -> None:
        self._process: Any = None
        self._pipe: Any = None

    def ask(self, index: int, found: Mapping[str, float], seconds: float) -> dict[str, Any]:
        """A row; RuntimeError with why there is none."""
        if self._process is None or not self._process.is_alive():
            context = multiprocessing.get_context("spawn")
            self._pipe, theirs = context.Pipe()
            self._process = context.Process(target=serve, args=(theirs,), daemon=True)
            self._process.start()
            theirs.close()
        try:
            self._pipe.send((index, found))
            if not self._pipe.poll(seconds):
                self.stop()
                raise RuntimeError(f"took more than {seconds:.0f} s and was stopped")
            row, why, broken = self._pipe.recv()
        except (EOFError, OSError) as gone:
            self.stop()
            raise RuntimeError("its process ended without an answer") from gone
        if broken:
            self.stop()
        if row is None:
            raise RuntimeError(why)
        return row

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.join(5.0)
            self._pipe.close()
            self._process = None
