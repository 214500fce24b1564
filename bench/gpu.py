"""python -m bench.gpu: tests, checks and times every op on this machine's CUDA GPU.

In under nine minutes, with no network: builds the core where it is not, runs the op tests on
the device, times each op as CUDA-graph replays against its peers, judges the design's targets,
and writes one JSON. bench/README.md says how to read it.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench import gpu_build, gpu_tests, gpu_warm
from bench.gpu_case import Case
from bench.gpu_table import graph_target, judge, markdown
from bench.gpu_time import Budget
from bench.gpu_worker import PROBES, Worker

RESULTS = Path(__file__).parent / "results"
BUILD_SECONDS = 180.0
TEST_SECONDS = 180.0  # collecting them and compiling for the cases included
TOTAL_SECONDS = 480.0  # no case begins after it
CASE_SECONDS = 90.0  # none lasts longer
LAST_SECONDS = 520.0  # nor any after this: judging and writing take seconds
Measure = Callable[[int, Mapping[str, float], float], dict[str, Any]]


class Progress:
    """A bar of rich's where it is there, else a line a step."""

    def __init__(self, steps: int, budget: Budget) -> None:
        self.steps, self.budget, self.done, self._bar = steps, budget, 0, None
        try:
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
            from rich.progress import Progress as Bar
        except ImportError:
            return
        if sys.stderr.isatty():
            from rich.console import Console

            columns = (
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("{task.description}"),
            )
            self._bar = Bar(*columns, console=Console(stderr=True))
            self._task = self._bar.add_task("", total=steps)
            self._bar.start()

    def say(self, text: str, advance: int = 0) -> None:
        self.done += advance
        if self._bar:
            self._bar.update(self._task, description=text, advance=advance)
        elif advance:
            at = f"[{self.budget.spent:4.0f} s] {self.done}/{self.steps}"
            print(f"{at} {text}", file=sys.stderr, flush=True)

    def stop(self) -> None:
        if self._bar:
            self._bar.stop()


def no_gpu() -> str:
    """Why nothing can be run here, or ""."""
    try:
        import torch
    except ImportError:
        return "torch is not installed"
    if not torch.cuda.is_available():
        return "torch sees no CUDA GPU"
    try:
        import triton  # noqa: F401
    except ImportError:
        return "triton is not installed"
    return ""


def refused(case: Case, tests: Mapping[str, Mapping[str, Any]]) -> str:
    """Why the times of a case may not be told: its op's tests are not green; or ""."""
    bad = {}
    for name in case.tests:
        status = tests.get(name, {}).get("status", gpu_tests.NOT_RUN)
        if status in (gpu_tests.RED, gpu_tests.NOT_RUN):
            bad[name] = status
    return ", ".join(f"{name}: {status}" for name, status in bad.items())


def limit(budget: Budget) -> float:
    """The seconds that a case may take which begins now."""
    return max(0.0, min(CASE_SECONDS, LAST_SECONDS - budget.spent))


def attempt(
    index: int,
    case: Case,
    tests: Mapping[str, Mapping[str, Any]],
    found: Mapping[str, float],
    budget: Budget,
    measure: Measure,
) -> dict[str, Any]:
    """The row of a case, whatever becomes of it."""
    row: dict[str, Any] = {
        "op": case.op, "shape": case.shape, "bytes": case.nbytes,
        "expected_us": case.expected_us, "contenders": {},
    }  # fmt: skip
    if not budget.left:
        return row | {"status": "left out", "why": f"{budget.seconds:.0f} s were over"}
    if why := refused(case, tests):
        return row | {"status": "refused", "why": why}
    slow = [t for t in case.tests if tests[t]["status"] == gpu_tests.UNFINISHED]
    note = {"note": f"tests unfinished: {', '.join(slow)}"} if slow else {}
    try:
        return row | note | measure(index, found, limit(budget)) | {"status": "measured"}
    except RuntimeError as failed:
        return row | note | {"status": "failed", "why": str(failed)}


def time_cases(
    cases: Sequence[Case], result: dict[str, Any], budget: Budget, measure: Measure,
    say: Callable[[str], None],
) -> None:  # fmt: skip
    """Fills ``result`` row by row, so that an interruption leaves what there is."""
    try:
        result["probes"] = measure(PROBES, {}, limit(budget))
    except RuntimeError as failed:
        result["rows"] += [
            {"op": c.op, "shape": c.shape, "bytes": c.nbytes, "expected_us": c.expected_us,
             "contenders": {}, "status": "failed", "why": f"no bandwidth measured: {failed}"}
            for c in cases
        ]  # fmt: skip
        return
    for index, case in enumerate(cases):
        row = attempt(index, case, result["tests"], result["probes"], budget, measure)
        result["rows"].append(row)
        say(f"{case.name}: {row['status']}")


def judged(cases: Iterable[Case], result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Every target of the design, with what was measured or why not."""
    rows = {(row["op"], row["shape"]): row for row in result["rows"]}
    none = {"status": "left out", "why": "interrupted"}
    copy = result.get("probes", {}).get("copy_gb_s", 0.0)
    found = [graph_target(result["tests"])]
    for case in cases:
        found += judge(case, rows.get((case.op, case.shape), none), copy)
    return [target._asdict() for target in found]


def describe() -> dict[str, Any]:
    """What the numbers were taken on."""
    import torch
    import triton

    from bench import environment

    properties = torch.cuda.get_device_properties(0)
    versions = {"triton": triton.__version__, "cuda": torch.version.cuda}
    for package in ("bitsandbytes", "pytest", "hypothesis"):
        versions[package] = environment.version(package)
    head = environment.describe()
    head["versions"] |= versions
    return head | {
        "gpu": {
            "name": properties.name,
            "driver": _driver(),
            "processors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "l2_bytes": getattr(properties, "L2_cache_size", None),
            "capability": ".".join(map(str, torch.cuda.get_device_capability(0))),
        }
    }


def _driver() -> str:
    command = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0")
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10.0)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return done.stdout.strip() or "unknown"


def strict(value: Any) -> Any:
    """As JSON has it: null for a number that is not finite."""
    if isinstance(value, Mapping):
        return {key: strict(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [strict(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write(path: Path, result: Mapping[str, Any]) -> None:
    from lora_engine.atomic import replace_file

    path.parent.mkdir(parents=True, exist_ok=True)
    data = (json.dumps(strict(result), indent=1, allow_nan=False) + "\n").encode()
    replace_file(path, lambda file: file.write(data))


def run(cases: Sequence[Case], budget: Budget, progress: Progress) -> dict[str, Any]:
    """Tests, then times; what there is when Ctrl-C comes."""
    result = {
        **describe(), "tests": {}, "tests_error": "", "kernels_in_cpp_registered": None,
        "rows": [], "targets": [], "interrupted": False,
    }  # fmt: skip
    worker = Worker()
    try:
        processes = max(2, min(16, len(os.sched_getaffinity(0)) - 1))
        tests = Budget(min(TEST_SECONDS, budget.left))
        with gpu_warm.beside(max(1, processes // 4), tests):
            result["tests"], why, result["kernels_in_cpp_registered"] = gpu_tests.run(
                gpu_build.FOLDER, processes - processes // 4, tests, progress.say
            )
        result["tests_error"] = why
        counts = [f"{n} {t['status']}" for n, t in result["tests"].items()]
        progress.say("tests: " + (why or ", ".join(counts)), 1)
        time_cases(cases, result, budget, worker.ask, lambda text: progress.say(text, 1))
    except KeyboardInterrupt:
        result["interrupted"] = True
    finally:
        worker.stop()
        progress.stop()
    result["targets"] = judged(cases, result)
    result["seconds"] = round(budget.spent, 1)
    return result


def exit_code(result: Mapping[str, Any]) -> int:
    """1 where a test was red or could not be collected, or ours was wrong, failed or was refused;
    what was left out, and a peer that failed, is no error."""
    red = any(t["status"] == gpu_tests.RED for t in result["tests"].values())
    bad = any(row["status"] in ("failed", "refused") for row in result["rows"])
    return int(red or bad or bool(result["tests_error"]))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__)
    parser.add_argument(
        "--out", type=Path, help="JSON file (default: bench/results/gpu-DEVICE.json)"
    )
    args = parser.parse_args(arguments)
    for forced in ("TRITON_INTERPRET", "LORA_ENGINE_BACKEND"):  # a GPU is what this is about
        os.environ.pop(forced, None)
    budget = Budget(TOTAL_SECONDS)
    if why := no_gpu():
        print(f"no GPU: {why}; nothing was run, nothing is claimed")
        return 0
    try:
        gpu_build.prepare(Budget(BUILD_SECONDS))
    except gpu_build.BuildError as failed:
        print(f"bench.gpu: {failed}", file=sys.stderr)
        return 1
    from bench.gpu_cases import CASES

    result = run(CASES, budget, Progress(len(CASES) + 1, budget))
    device = re.sub(r"[^a-z0-9]+", "-", result["gpu"]["name"].lower()).strip("-")
    out = args.out or RESULTS / f"gpu-{device}.json"
    write(out, result)
    print(*markdown(result), sep="\n")
    print(f"\n{result['seconds']:.0f} s; written to {out}")
    return exit_code(result)


if __name__ == "__main__":
    sys.exit(main())
