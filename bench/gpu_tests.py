"""Runs the op tests on the device, in several processes, and says which files are green."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from bench import gpu_build, gpu_process
from bench.gpu_time import Budget

TESTS = gpu_build.ROOT / "tests"
# Of the interpreter or of no device: nothing of them says whether an op is right on a GPU.
EXCLUDED = {"test_triton_compile", "test_triton_launch", "test_triton_tuning"}
# Needs no GPU: it looks torch's symbols up at run time, in a torch that may be tested here alone.
DISPATCH, REGISTERED = "test_torch_dispatch", "test_registered_in_the_core"
# What libraries warn of on that machine says nothing about an op.
PYTEST = (sys.executable, "-u", "-m", "pytest", "-p", "no:cacheprovider", "-W", "default")
GREEN, RED, UNFINISHED, NOT_RUN = "green", "red", "unfinished", "not run"
_LINE = re.compile(r"^(?:tests/)?(test_\w+)\.py::(\S.*?) (PASSED|FAILED|ERROR|SKIPPED|XFAIL)\b")
_ID = re.compile(r"^(?:tests/)?(test_\w+\.py::.+)$")
_REASON = re.compile(r"^(?:FAILED|ERROR) (?:tests/)?(test_\w+)\.py(?:::\S+)?(?: - (.*))?$")


def files() -> list[str]:
    found = (p.stem for p in TESTS.glob("test_triton_*.py") if p.stem not in EXCLUDED)
    return [*sorted(found), DISPATCH]


def environment() -> dict[str, str]:
    """Of pytest alone: the tests need no plugin, and one that is there may break them."""
    return {**gpu_build.environment(), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTEST_ADDOPTS": ""}


def collect(names: Iterable[str], seconds: float) -> tuple[list[str], str]:
    """Ids of the tests, and why some file has none."""
    if absent := [name for name in ("pytest", "hypothesis") if not find_spec(name)]:
        return [], f"{' and '.join(absent)} not installed"
    command = (*PYTEST, "--collect-only", "-q", *(f"{name}.py" for name in names))
    code, said = gpu_process.run(command, seconds, TESTS, environment())
    ids = [match[1] for line in said if (match := _ID.match(line))]
    if code == 0 and ids:
        return ids, ""
    told = [line for line in said if not _ID.match(line)]
    return ids, "not all tests were collected: " + " / ".join(told[-4:])[:1000]


def shards(ids: Sequence[str], count: int) -> list[list[str]]:
    """About ``count`` parts, each of one file: a kernel that breaks the device for its process
    fails no test of another op. Within a file they are dealt out in turn, as neighbours take
    alike."""
    by_file: dict[str, list[str]] = {}
    for test in ids:
        by_file.setdefault(file_of(test), []).append(test)
    parts = []
    for own in by_file.values():
        share = max(1, round(count * len(own) / len(ids)))
        parts += [own[i::share] for i in range(share)]
    return parts


def file_of(test: str) -> str:
    return test.split("::")[0].removesuffix(".py").split("/")[-1]


def summarise(
    ids: Iterable[str], output: str, crashed: Iterable[str] = ()
) -> dict[str, dict[str, Any]]:
    """By file: status, counts and what failed, from what pytest -v printed.

    crashed: files of processes that ended by themselves before their tests did.
    """
    found: dict[str, dict[str, Any]] = {}
    for test in ids:
        counts = {"tests": 0, "passed": 0, "failed": 0, "skipped": 0, "failures": []}
        found.setdefault(file_of(test), counts)["tests"] += 1
    kinds = {"PASSED": "passed", "XFAIL": "passed", "SKIPPED": "skipped"}
    for line in output.splitlines():
        if match := _LINE.match(line):
            name, test, outcome = match.groups()
            kind = kinds.get(outcome, "failed")
            found[name][kind] += 1
            if kind == "failed":
                found[name]["failures"].append(test)
        elif (match := _REASON.match(line)) and match[2]:
            found[match[1]].setdefault("reasons", []).append(match[2][:300])
    for name in crashed:
        found[name]["failed"] += 1
        found[name]["failures"].append("the process ended before its tests did")
    for counts in found.values():
        counts["status"] = _status(counts)
    return found


def _status(counts: dict[str, Any]) -> str:
    if counts["failed"]:
        return RED
    if counts["passed"] + counts["skipped"] < counts["tests"]:
        return UNFINISHED
    return GREEN if counts["passed"] else NOT_RUN


def registered(output: str) -> bool | None:
    """Whether lora_delta's kernels in C++ are what torch calls; None where its test did not end."""
    match = re.search(rf"{DISPATCH}\.py::{REGISTERED} (PASSED|FAILED)", output)
    return match[1] == "PASSED" if match else None


def run(
    folder: Path, processes: int, budget: Budget, progress: Callable[[str], None]
) -> tuple[dict[str, dict[str, Any]], str, bool | None]:
    """Status by file, why a file is not among them, and whether the kernels in C++ are
    registered. Stops the processes it started when the budget is spent, and on an exception."""
    ids, why = collect(files(), budget.left)
    if not ids:
        return {}, why, None
    folder.mkdir(parents=True, exist_ok=True)
    parts = shards(ids, processes)
    logs = [folder / f"tests-{i}.log" for i in range(len(parts))]
    running: list[subprocess.Popen[bytes]] = []
    try:
        for part, log in zip(parts, logs, strict=True):
            running.append(_start(part, log))
        while any(p.poll() is None for p in running) and budget.left:
            time.sleep(1.0)
            progress(f"tests: {_counted(logs)} of {len(ids)}")
        crashed = {
            file_of(part[0])
            for part, p in zip(parts, running, strict=True)
            if p.poll() not in (None, 0, 1)  # running; as pytest ends: all passed, some failed
        }
    finally:
        for process in running:
            gpu_process.stop(process)
    output = "\n".join(_read(log) for log in logs)
    return summarise(ids, output, crashed), why, registered(output)


def _start(part: Sequence[str], log: Path) -> subprocess.Popen[bytes]:
    command = (*PYTEST, "-v", "--tb=short", "--color=no", *part)
    with open(log, "wb") as file:
        return gpu_process.start(
            command, cwd=TESTS, env=environment(), stdin=subprocess.DEVNULL, stdout=file,
            stderr=subprocess.STDOUT,
        )  # fmt: skip


def _read(log: Path) -> str:
    return log.read_text(errors="replace")


def _counted(logs: Iterable[Path]) -> int:
    return sum(bool(_LINE.match(line)) for log in logs for line in _read(log).splitlines())
