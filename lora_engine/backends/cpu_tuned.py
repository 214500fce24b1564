"""What was measured of the C++ core on this CPU, taken over when it is first chosen.

Not at import, which must stay light, and not inside a call: ``backends.chosen`` runs once.
"""

from __future__ import annotations

import os
import platform
import re
from pathlib import Path
from typing import Any

from lora_engine import _C
from lora_engine.kernels import tuned

KEY = "cpu"
# All that a file can choose, the core's own first (csrc/context.h). No result depends on it.
BYTES_PER_THREAD = tuple(kib << 10 for kib in (192, 48, 96, 384, 768, 1536))
TILE_ROWS = (16, 4, 8, 32, 64)


def identity() -> dict[str, Any]:
    """What makes a CPU another one, as a file holds it."""
    path = Path("/proc/cpuinfo")
    text = path.read_text(errors="replace") if path.exists() else ""
    found = re.search(r"^model name\s*:\s*(.*)$", text, re.M)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    name = found[1] if found else platform.processor() or platform.machine()
    return {"kind": "cpu", "name": name, "isa": _C.isa() or "none", "cores": cores or 1}


def versions() -> dict[str, str]:
    """Of the engine, and the built core."""
    return {**tuned.versions(), "core": tuned.digest([Path(_C.__file__)])}


def _holds_a_cpus(place: Path) -> bool:
    try:
        return any(re.fullmatch(r"cpu-.*\.json", name) for name in os.listdir(place))
    except OSError:
        return False


def apply() -> None:
    """Reads the file where there is one, and sets the core."""
    if not any(map(_holds_a_cpus, tuned.folders())):
        return  # nothing is measured on any CPU: not worth asking which this is
    entry, path = tuned.choice(KEY, identity(), versions())
    if not entry:
        return
    size, rows = entry.get("bytes_per_thread"), entry.get("tile_rows")
    if len(entry) == 2 and size in BYTES_PER_THREAD and rows in TILE_ROWS:
        _C.set_tuning(int(size), int(rows))
        return
    tuned.refuse(path, f"{KEY}: {str(entry)[:200]} is no choice")
