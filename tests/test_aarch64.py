"""The library and its C tests on AArch64: cross-compiled, run by qemu-user."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from helpers_native import ROOT, build, call, install


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
    for program in ("aarch64-linux-gnu-gcc", "aarch64-linux-gnu-g++", "qemu-aarch64"):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed")
    folder = tmp_path_factory.mktemp("aarch64")
    settings = (
        f"CMAKE_TOOLCHAIN_FILE={ROOT / 'cmake' / 'aarch64.cmake'}",
        "CMAKE_BUILD_TYPE=Debug",
        "CMAKE_CXX_FLAGS_DEBUG=-O1",
    )
    package = install(folder, "LORA_ENGINE_CHECK=ON", *settings) / "lib" / "cmake" / "lora_engine"
    build(ROOT / "tests" / "c", folder / "tests", f"lora_engine_DIR={package}", *settings)
    return folder


def emulated(program: Path, isa: str) -> str:
    return call("qemu-aarch64", "-L", "/usr/aarch64-linux-gnu", program, LORA_ENGINE_ISA=isa)


@pytest.mark.parametrize("isa", ["generic", "neon"])
def test_c_tests(isa, programs):
    said = emulated(programs / "tests" / "tests", isa)
    assert f"instruction set: {isa}\n" in said
    assert said.endswith(" checks, 0 failed\n")


def test_every_op_against_plain_loops(programs):
    said = emulated(programs / "build" / "check", "neon")
    assert said.startswith("instruction set: neon\n")
    assert said.count(" cases, worst error ") == 11
