"""python -m bench.instructions: instructions of the C++ ops at fixed shapes, counted by callgrind.

Counts do not depend on what else the machine does: a change is seen exactly. They are of one
instruction set and one compiler, and are compared with those in bench/results/ of the same.

    python -m bench.instructions            # compares; exit 1 where an op takes over 1 % more
    python -m bench.instructions --write    # keeps the counts of this build
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from bench.environment import isa

SOURCE = Path(__file__).with_name("instructions.c")
RESULTS = Path(__file__).parent / "results"
ROOT = Path(__file__).parents[1]
CALLS = (2, 6)  # their difference is of calls in steady state
GAIN, LOSS = 0.99, 1.01
VALGRIND_KNOWS = ("generic", "avx2", "neon")  # no AVX-512


class Missing(RuntimeError):
    """A tool that is not here; says which."""


def _tool(name: str, package: str) -> str:
    found = shutil.which(name)
    if found is None:
        raise Missing(f"{name} is not installed (Debian's package {package}): nothing was counted")
    return found


def library_flags() -> list[str]:
    """What the compiler needs to build against the installed library."""
    asked = [sys.executable, "-m", "lora_engine", "--include-dir", "--libs"]
    found = subprocess.run(asked, capture_output=True, text=True, check=True).stdout
    include, libs = found.splitlines()
    return [f"-I{include}", *libs.split()]


def build(folder: Path) -> Path:
    """The program of instructions.c against the installed library."""
    program = folder / "instructions"
    compiler = os.environ.get("CC") or _tool("cc", "gcc")
    subprocess.run(
        [compiler, "-O2", "-Wall", "-Wextra", str(SOURCE), "-o", str(program), *library_flags()],
        check=True,
    )  # fmt: skip
    return program


def _counted(program: Path, op: str, calls: int, instruction_set: str) -> int:
    run = subprocess.run(
        [_tool("valgrind", "valgrind"), "--tool=callgrind", "--callgrind-out-file=/dev/null",
         str(program), op, str(calls)],
        env=os.environ | {"LORA_ENGINE_ISA": instruction_set}, capture_output=True, text=True,
        check=True,
    )  # fmt: skip
    found = re.search(r"Collected : (\d+)", run.stderr)
    if found is None:
        raise RuntimeError(f"valgrind told no count: {run.stderr[-500:]}")
    return int(found[1])


def count(program: Path, instruction_set: str) -> dict[str, float]:
    """Instructions a call of each op, in steady state."""
    ops = subprocess.run([program], capture_output=True, text=True, check=True).stdout.splitlines()
    few, many = CALLS

    def more(op: str) -> int:
        return _counted(program, op, many, instruction_set) - _counted(
            program, op, few, instruction_set
        )

    return {op: more(op) / (many - few) for op in ops}


def compiler_of_core() -> str:
    """The compiler that built the core, as it signed it."""
    from lora_engine import _C

    found = re.search(
        rb"GCC: \([^)]*\) [\d.]+|clang version [\d.]+", Path(_C.__file__).read_bytes()
    )
    return found[0].decode() if found else "unknown"


class Compared(NamedTuple):
    lines: list[str]
    lost: bool


def compare(kept: dict[str, Any], now: dict[str, Any]) -> Compared:
    """What changed, exactly; lost where an op takes over 1 % more instructions, or is gone."""
    for key in ("isa", "compiler"):
        if kept[key] != now[key]:
            why = f"not compared: {key}: expected {kept[key]!r}, that of the kept counts,"
            return Compared([f"{why} got {now[key]!r}"], False)
    lines, lost = [], False
    for op, before in kept["instructions"].items():
        after = now["instructions"].get(op)
        if after is None:
            lines.append(f"{op}: no longer counted")
            lost = True
        elif after != before:
            factor = after / before
            lost |= factor > LOSS
            word = "LOST" if factor > LOSS else "gained" if factor < GAIN else "changed"
            lines.append(f"{word}: {op}: {before:.0f} -> {after:.0f} instructions ({factor:.3f}x)")
    lines += [f"{op}: new" for op in now["instructions"] if op not in kept["instructions"]]
    same = sum(now["instructions"].get(op) == n for op, n in kept["instructions"].items())
    return Compared([*lines, f"{same} of {len(kept['instructions'])} ops unchanged"], lost)


def measure() -> dict[str, Any]:
    """Counts of the installed library, with what they are of. Raises Missing."""
    instruction_set = isa() if isa() in VALGRIND_KNOWS else "avx2"
    with tempfile.TemporaryDirectory() as folder:
        counts = count(build(Path(folder)), instruction_set)
    return {"isa": instruction_set, "compiler": compiler_of_core(), "instructions": counts}


def kept_file(instruction_set: str) -> Path:
    return RESULTS / f"instructions-{instruction_set}.json"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.instructions")
    parser.add_argument("--write", action="store_true", help="keep the counts of this build")
    args = parser.parse_args()
    try:
        now = measure()
    except Missing as why:
        print(why)
        return 0
    file = kept_file(now["isa"])
    if args.write:
        file.write_text(json.dumps(now, indent=1) + "\n")
        print(f"written: {file.relative_to(ROOT)}")
        return 0
    if not file.exists():
        print(f"not compared: no counts of {now['isa']} are kept; --write keeps these")
        return 0
    result = compare(json.loads(file.read_text()), now)
    print(*result.lines, sep="\n")
    return 1 if result.lost else 0


if __name__ == "__main__":
    sys.exit(main())
