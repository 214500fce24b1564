"""Makes ``import lora_engine`` work from a bare checkout, with what is there and no network.

Wheels in the folder that LORA_ENGINE_WHEELS names are installed into build/gpu/site first. The
Python files are always the checkout's; the core is that of a wheel of lora_engine, or the one
built here before, or CMake builds it: that needs cmake, a C++17 compiler, Python's headers, NumPy
and nanobind.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
from importlib import metadata
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

from bench import gpu_process
from bench.gpu_time import Budget

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "build" / "gpu"
SITE = FOLDER / "site"
WHEELS = "LORA_ENGINE_WHEELS"
NEEDS = "cmake, a C++17 compiler, Python's headers, NumPy and nanobind >= 3.1"
# No torch: it takes long to import, and says nothing about whether the engine is there.
PROBE = """
import lora_engine
from importlib.util import find_spec
if not find_spec("lora_engine.kernels.launch"):
    raise SystemExit("there is no lora_engine.kernels")
"""


class BuildError(Exception):
    """What was tried, what it said, and what is needed."""


def environment() -> dict[str, str]:
    """For processes that import from this checkout."""
    paths = [str(ROOT), str(SITE), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in paths if p)}


def _run(budget: Budget, *command: str) -> str:
    """What went wrong, or ""."""
    code, said = gpu_process.run(command, budget.left, ROOT, environment())
    return "" if code == 0 else "\n".join(said[-8:]) or f"{command[0]} failed"


def missing(budget: Budget) -> str:
    """Why the engine cannot be imported, or ""."""
    return _run(budget, sys.executable, "-c", PROBE)


def _install_wheels(budget: Budget) -> None:
    folder = os.environ.get(WHEELS)
    if not folder:
        return
    wheels = sorted(str(p) for p in Path(folder).glob("*.whl"))
    if not wheels:
        raise BuildError(f"{WHEELS}={folder}: no wheels are there")
    shutil.rmtree(SITE, ignore_errors=True)  # what other wheels left
    why = _run(
        budget, sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps",
        "--target", str(SITE), *wheels,
    )  # fmt: skip
    if why:
        raise BuildError(f"{WHEELS}: pip could not install the wheels:\n{why}")


def _link_kernels() -> None:
    """In a checkout the kernels are beside the package; a wheel has them inside."""
    link = ROOT / "lora_engine" / "kernels"
    if not link.exists():
        link.unlink(missing_ok=True)  # one that leads nowhere
        link.symlink_to("../kernels")


def _place(core: Path) -> None:
    """Beside the checkout's Python files, at once: another process may run the one before."""
    shutil.copy2(core, FOLDER / core.name)
    os.replace(FOLDER / core.name, ROOT / "lora_engine" / core.name)


def _take_core() -> str:
    """Places the core of an installed wheel; why it cannot be had, or ""."""
    named = (SITE / "lora_engine" / f"_C{suffix}" for suffix in EXTENSION_SUFFIXES)
    core = next((file for file in named if file.exists()), None)
    if core is None:
        return "there is no wheel of lora_engine for this Python"
    ours = re.search(r'^version = "(.*)"', (ROOT / "pyproject.toml").read_text(), re.M)
    found = [d.version for d in metadata.distributions(name="lora-engine", path=[str(SITE)])]
    if not ours or found != [ours[1]]:
        return f"the wheel is of lora_engine {', '.join(found)}, this checkout is another version"
    stub = SITE / "lora_engine" / "_C.pyi"
    if not stub.exists() or stub.read_bytes() != (ROOT / "lora_engine" / "_C.pyi").read_bytes():
        return "the wheel of lora_engine was built from other sources: its core offers other calls"
    _place(core)
    return ""


def _build(budget: Budget, no_wheel: str) -> None:
    made = FOLDER / f"core-{sys.implementation.cache_tag}"
    for command in (
        ("cmake", "-S", str(ROOT), "-B", str(made), "-DLORA_ENGINE_PYTHON=ON",
         "-DCMAKE_BUILD_TYPE=Release", f"-DPython_EXECUTABLE={sys.executable}"),
        ("cmake", "--build", str(made), "--target", "_C", "--parallel", str(os.cpu_count() or 1)),
    ):  # fmt: skip
        if why := _run(budget, *command):
            raise BuildError(
                f"the core could not be built:\n{why}\nneeded: {NEEDS}; or wheels of lora_engine"
                f" and what is missing, in a folder that {WHEELS} names ({no_wheel})"
            )
    for file in made.glob("_C.*.so"):
        _place(file)


def prepare(budget: Budget) -> None:
    """Afterwards this process and those with ``environment()`` import lora_engine; raises
    BuildError where that cannot be had, or not within the budget."""
    try:
        FOLDER.mkdir(parents=True, exist_ok=True)
        _install_wheels(budget)
        sys.path[:0] = [str(ROOT), str(SITE)]  # as environment() has it
        no_wheel = _take_core() if os.environ.get(WHEELS) else f"{WHEELS} is not set"
        if not missing(budget):
            return
        _link_kernels()
        if missing(budget):
            _build(budget, no_wheel)
    except OSError as failed:
        raise BuildError(f"the checkout cannot be prepared: {failed}") from failed
    if why := missing(budget):
        raise BuildError(f"lora_engine cannot be imported:\n{why}")
