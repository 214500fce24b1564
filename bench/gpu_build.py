"""Makes ``import lora_engine`` work from a bare checkout, with what is there and no network.

Wheels in the folder that LORA_ENGINE_WHEELS names are installed into build/gpu/site first. Where
the core is not built for this Python, CMake builds it: that needs cmake, a C++17 compiler,
Python's headers, NumPy and nanobind.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "build" / "gpu"
SITE = FOLDER / "site"
WHEELS = "LORA_ENGINE_WHEELS"
NEEDS = "cmake, a C++17 compiler, Python's headers, NumPy and nanobind >= 3.1"


class BuildError(Exception):
    """What was tried, what it said, and what is needed."""


def environment() -> dict[str, str]:
    """For processes that import from this checkout."""
    paths = [str(ROOT), str(SITE), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in paths if p)}


def _run(*command: str) -> str:
    """What went wrong, or ""."""
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=environment(), capture_output=True, text=True, check=False
        )
    except FileNotFoundError:
        return f"{command[0]} is not there"
    lines = (done.stderr or done.stdout).strip().splitlines()
    return "" if done.returncode == 0 else "\n".join(lines[-8:]) or f"{command[0]} failed"


def missing() -> str:
    """Why the engine cannot be imported, or ""."""
    return _run(sys.executable, "-c", "import lora_engine, lora_engine.kernels.launch")


def _install_wheels() -> None:
    folder = os.environ.get(WHEELS)
    if not folder:
        return
    wheels = sorted(str(p) for p in Path(folder).glob("*.whl"))
    if not wheels:
        raise BuildError(f"{WHEELS}={folder}: no wheels are there")
    why = _run(
        sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--upgrade",
        "--target", str(SITE), *wheels,
    )  # fmt: skip
    if why:
        raise BuildError(f"{WHEELS}: pip could not install the wheels:\n{why}")


def _link_kernels() -> None:
    """In a checkout the kernels are beside the package; a wheel has them inside."""
    link = ROOT / "lora_engine" / "kernels"
    if not link.exists():
        link.symlink_to("../kernels")


def _build() -> None:
    made = FOLDER / f"core-{sys.implementation.cache_tag}"
    for command in (
        ("cmake", "-S", str(ROOT), "-B", str(made), "-DLORA_ENGINE_PYTHON=ON",
         "-DCMAKE_BUILD_TYPE=Release", f"-DPython_EXECUTABLE={sys.executable}"),
        ("cmake", "--build", str(made), "--target", "_C", "--parallel", str(os.cpu_count() or 1)),
    ):  # fmt: skip
        if why := _run(*command):
            raise BuildError(
                f"the core could not be built:\n{why}\nneeded: {NEEDS}; or wheels of lora_engine"
                f" and what is missing, in a folder that {WHEELS} names"
            )
    for file in made.glob("_C.*.so"):
        shutil.copy2(file, ROOT / "lora_engine" / file.name)


def prepare() -> None:
    """Afterwards this process and those with ``environment()`` import lora_engine; raises
    BuildError where that cannot be had."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    _install_wheels()
    for path in (str(SITE), str(ROOT)):
        if path not in sys.path:
            sys.path.insert(0, path)
    if not missing():
        return
    _link_kernels()
    if missing():
        _build()
    if why := missing():
        raise BuildError(f"lora_engine cannot be imported:\n{why}")
