"""Processes of the GPU suite: each with an end, and none is left when it comes."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any


def start(command: Sequence[str], **options: Any) -> subprocess.Popen[Any]:
    """In a group of its own, so that what it starts ends with it."""
    return subprocess.Popen(command, start_new_session=True, **options)


def stop(process: subprocess.Popen[Any]) -> None:
    """Ends a process, and those it started, unless it has ended."""
    if process.poll() is None:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        with suppress(subprocess.TimeoutExpired):
            process.wait(5.0)


def run(
    command: Sequence[str], seconds: float, cwd: Path, env: dict[str, str]
) -> tuple[int, list[str]]:
    """Its exit code and the lines it printed, those of stderr last; 124 and the command where it
    took longer, 127 where there is no such program."""
    try:
        process = start(
            command, cwd=cwd, env=env, text=True, errors="replace",
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
    except FileNotFoundError:
        return 127, [f"{command[0]} is not there"]
    try:
        printed = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        said = " ".join(command[:4])
        return 124, [f"{said} ... took more than {seconds:.0f} s and was stopped"]
    finally:
        stop(process)
        for pipe in (process.stdout, process.stderr):
            pipe.close()
    return process.returncode, [
        line for text in printed for line in text.splitlines() if line.strip()
    ]
