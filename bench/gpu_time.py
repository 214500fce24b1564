"""Timing on a GPU: CUDA-graph replays, contenders in turn; the copy and the empty kernel."""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable, Mapping, Sequence
from time import monotonic
from typing import Any

import numpy as np

from bench.gpu_case import Timed

ROUNDS = 31
SAMPLE_MS = 3.0
MOST_NODES = 1024
COPY_BYTES = 1 << 30


class Budget:
    """Seconds since the start, and whether a case may still begin."""

    def __init__(self, seconds: float, clock: Callable[[], float] = monotonic) -> None:
        self.seconds, self.clock, self.begun = seconds, clock, clock()

    @property
    def spent(self) -> float:
        return self.clock() - self.begun

    @property
    def left(self) -> float:
        return max(0.0, self.seconds - self.spent)


def summary(values: Sequence[float]) -> dict[str, float]:
    """Median, 10th and 90th percentile."""
    p10, median, p90 = (float(np.percentile(values, p)) for p in (10, 50, 90))
    return {"median": median, "p10": p10, "p90": p90}


def ratios(times: Mapping[str, Sequence[float]], name: str, base: str) -> dict[str, float]:
    """How many times as long ``name`` takes as ``base``: of the ratios of each round."""
    return summary([a / b for a, b in zip(times[name], times[base], strict=True)])


class Graph:
    """The calls of a contender, captured one after the other."""

    def __init__(self, calls: Sequence[Callable[[], Any]]) -> None:
        import torch

        self.count = len(calls)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for call in calls:  # compiles, copies to the device, fills caches
                call()
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        self.graph = torch.cuda.CUDAGraph()
        gc.collect()
        gc.disable()  # what it would free meanwhile, an old graph say, breaks a capture
        try:
            with torch.cuda.graph(self.graph):
                for call in calls:
                    call()
        finally:
            gc.enable()
        self.replays = max(1, round(SAMPLE_MS / max(self._sample(1) * self.count / 1e3, 1e-3)))

    def replay(self) -> None:
        self.graph.replay()

    def _sample(self, replays: int) -> float:
        """Microseconds a call, over so many replays."""
        import torch

        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.replay()
        begin.record()
        for _ in range(replays):
            self.replay()
        end.record()
        end.synchronize()
        return 1e3 * begin.elapsed_time(end) / (replays * self.count)

    def sample(self) -> float:
        return self._sample(self.replays)


def interleaved(graphs: Mapping[str, Any], rounds: int = ROUNDS) -> dict[str, list[float]]:
    """Microseconds a call of each, A B C, C B A, ..."""
    times: dict[str, list[float]] = {name: [] for name in graphs}
    for i in range(rounds):
        for name in graphs if i % 2 == 0 else reversed(graphs):
            times[name].append(graphs[name].sample())
    return times


def captured(timed: Timed) -> Graph:
    """A graph of a contender that was right both called and replayed."""
    timed.check(lambda: [call() for call in timed.calls])
    graph = Graph(timed.calls)
    timed.check(graph.replay)
    return graph


def launches_of(call: Callable[[], Any]) -> int | None:
    """Kernels, copies and fills of one call; None where the profiler cannot count them."""
    import torch
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    try:
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            call()
            torch.cuda.synchronize()
        return sum(event.device_type == DeviceType.CUDA for event in profiler.events()) or None
    except Exception:  # a machine without CUPTI, say: the times do not need it
        return None


def probes() -> dict[str, float]:
    """Bytes a second of a copy, read and written both counted, and an empty kernel in a graph."""
    import torch

    from bench.gpu_baseline import empty

    a, b = (torch.randn(COPY_BYTES // 4, device="cuda") for _ in range(2))
    copy = Graph([lambda: b.copy_(a), lambda: a.copy_(b)])
    empties = Graph([lambda: empty[(1,)]()] * MOST_NODES)
    times = interleaved({"copy": copy, "empty": empties})
    found = {
        "copy_gb_s": 2 * COPY_BYTES / statistics.median(times["copy"]) / 1e3,
        "empty_kernel_us": statistics.median(times["empty"]),
    }
    del copy, empties
    release()
    return found


def release() -> None:
    """Gives memory back between cases."""
    import torch

    gc.collect()
    torch.cuda.empty_cache()
