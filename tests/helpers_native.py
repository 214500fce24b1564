"""What the tests of the C library share: CMake, compilers, an installed library."""

from __future__ import annotations

import os
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def tool(name: str) -> str:
    """A program that pip installed beside this Python, or one on PATH."""
    path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ["PATH"]])
    found = shutil.which(name, path=path)
    if found is None:
        pytest.fail(f"{name} is not installed")
    return found


def call(*command: str | Path, **env: str) -> str:
    """Runs a program; returns what it printed, both streams."""
    ran = subprocess.run(
        [str(part) for part in command],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env={**os.environ, **env},
    )  # fmt: skip
    assert ran.returncode == 0, f"{command}: {ran.returncode}\n{ran.stdout[-8000:]}"
    return ran.stdout


def build(source: Path, to: Path, *settings: str) -> Path:
    """Configures and builds a CMake project; settings: as in NAME=VALUE."""
    call(
        tool("cmake"), "-S", source, "-B", to, "-G", "Ninja",
        f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}", *[f"-D{setting}" for setting in settings],
    )  # fmt: skip
    call(tool("cmake"), "--build", to)
    return to


def install(to: Path, *settings: str) -> Path:
    """Builds the library without Python, and installs it into to/prefix."""
    folder = build(ROOT, to / "build", "CMAKE_DISABLE_FIND_PACKAGE_Python=ON", *settings)
    call(tool("cmake"), "--install", folder, "--prefix", to / "prefix")
    return to / "prefix"
