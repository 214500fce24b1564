"""What the numbers were taken on: machine, instruction set, versions, threads, revision."""

from __future__ import annotations

import datetime
import os
import platform
import re
import subprocess
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import lora_engine as le
from bench.case import absent
from bench.machine import cache_bytes
from lora_engine import _C

PACKAGES = ("lora-engine", "numpy", "torch", "peft", "pytest-benchmark")
_FLAGS = re.compile(r"avx|fma|f16c|amx|asimd|sve|neon|bf16|vnni")


def one_thread_count() -> int:
    """Gives torch as many threads as the engine has; returns how many."""
    threads = le.get_num_threads()
    if not absent("torch"):
        import torch

        torch.set_num_threads(threads)
    return threads


def _cpuinfo(field: str) -> str:
    path = Path("/proc/cpuinfo")
    found = re.search(rf"^{field}\s*:\s*(.*)$", path.read_text(), re.M) if path.exists() else None
    return found[1] if found else ""


def _git(*args: str) -> str:
    folder = Path(__file__).parent
    try:
        run = subprocess.run(
            ["git", *args], cwd=folder, capture_output=True, text=True, check=False
        )
    except FileNotFoundError:
        return ""
    return run.stdout.strip()


def version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "absent: not installed"


def isa() -> str:
    """The instruction set that the engine uses."""
    found = re.search(r"using (\w+)", le.backends()["cpu"])
    return found[1] if found else "none"


def extension() -> dict[str, Any]:
    """The engine's binary; stale: some source is newer than it (an editable install
    is not rebuilt by itself)."""
    file = Path(_C.__file__)
    sources = Path(__file__).parents[1] / "csrc"
    newest = max((f.stat().st_mtime for f in sources.rglob("*.*")), default=0.0)
    built = file.stat().st_mtime
    return {"file": file.name, "built": _utc(built), "stale": newest > built}


def _utc(seconds: float) -> str:
    when = datetime.datetime.fromtimestamp(seconds, datetime.timezone.utc)
    return when.isoformat(timespec="seconds")


def describe() -> dict[str, Any]:
    """The head of the JSON file."""
    return {
        "date": _utc(time.time()),
        "git_revision": _git("rev-parse", "HEAD"),
        "git_dirty": bool(_git("status", "--porcelain")),
        "machine": {
            "cpu": _cpuinfo("model name") or platform.processor(),
            "architecture": platform.machine(),
            "cpus": len(os.sched_getaffinity(0)),
            "cache_bytes": cache_bytes(),
            "flags": sorted(f for f in _cpuinfo("flags").split() if _FLAGS.search(f)),
            "load_average": os.getloadavg()[0],
            "system": platform.platform(),
        },
        "backends": le.backends(),
        "isa": isa(),
        "extension": extension(),
        "threads": le.get_num_threads(),
        "versions": {"python": platform.python_version()} | {p: version(p) for p in PACKAGES},
    }
