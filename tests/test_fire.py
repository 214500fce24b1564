"""The C tests under sanitizers and valgrind, and fuzzing; `make fire` takes its time over it."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from helpers_native import ROOT, build, call, install

from lora_engine import _C

C_TESTS = ROOT / "tests" / "c"
LONG = os.environ.get("LORA_ENGINE_TEST_PROFILE") == "full"
STRESS, FUZZ = ("60", "600") if LONG else ("3", "8")  # seconds
FORKS = "200" if LONG else "40"
FLAGS = {
    "address": "-fsanitize=address,undefined -fno-sanitize-recover=all",
    "thread": "-fsanitize=thread",
    # vptr and function need clang's C++ runtime, which programs of C are not linked with.
    "fuzzer": "-fsanitize=fuzzer-no-link,address,undefined -fno-sanitize=vptr,function"
    " -fno-sanitize-recover=all",
}


def need(program: str) -> str:
    found = shutil.which(program)
    if found is None:
        pytest.skip(f"{program} is not installed")
    return found


def instrumented(folder: Path, name: str) -> Path:
    """The library and its C tests, both compiled so; of clang for its fuzzer, else of cc."""
    flags = f"-O1 {FLAGS[name]}"
    compilers = ["CMAKE_CXX_COMPILER=clang++"] if name == "fuzzer" else []
    settings = ["CMAKE_BUILD_TYPE=Debug", "LORA_ENGINE_ISAS=generic", f"CMAKE_CXX_FLAGS={flags}"]
    if not LONG and name != "thread":  # the kernels' files take clang two minutes with it
        settings.append("LORA_ENGINE_ISA_OPTIONS=-fno-sanitize=undefined")
    prefix = install(folder, *settings, *compilers)
    of_tests = ["CMAKE_C_COMPILER=clang", "LORA_ENGINE_FUZZ=ON"] if name == "fuzzer" else []
    package = prefix / "lib" / "cmake" / "lora_engine"
    return build(
        C_TESTS, folder / "tests", f"lora_engine_DIR={package}", "CMAKE_BUILD_TYPE=Debug",
        f"CMAKE_C_FLAGS={flags}", *of_tests,
    )  # fmt: skip


@pytest.fixture(scope="module")
def with_address(tmp_path_factory):
    name = "fuzzer" if shutil.which("clang++") else "address"
    return instrumented(tmp_path_factory.mktemp(name), name)


@pytest.fixture(scope="module")
def with_thread(tmp_path_factory):
    return instrumented(tmp_path_factory.mktemp("thread"), "thread")


def last_lines(*command: str | Path, **env: str) -> str:
    """What a program said in the end, shown by `make fire`."""
    said = "\n".join(call(*command, **env).splitlines()[-3:])
    print(said)
    return said


def test_address_and_undefined_behaviour(with_address):
    assert last_lines(with_address / "tests").endswith(" checks, 0 failed")
    assert last_lines(with_address / "stress", STRESS).endswith("\n0 torn")
    assert last_lines(with_address / "forks", FORKS).endswith(" forks, 0 failed")


@pytest.mark.parametrize("target", ["import", "nf4"])
def test_fuzzed(target, with_address, tmp_path):
    need("clang++")
    program = with_address / f"fuzz_{target}"
    # A long run goes on from what earlier ones found.
    kept = (ROOT / "build" / "corpus" if LONG else tmp_path) / target
    kept.mkdir(parents=True, exist_ok=True)
    arguments = [f"-max_total_time={FUZZ}", "-max_len=2048", "-timeout=10", "-rss_limit_mb=1024"]
    found = f"-artifact_prefix={kept}-"
    said = last_lines(program, *arguments, found, kept, C_TESTS / "corpus" / target)
    assert "Done " in said


def test_threads(with_thread):
    assert last_lines(with_thread / "tests").endswith(" checks, 0 failed")
    assert last_lines(with_thread / "stress", STRESS).endswith("\n0 torn")


def test_valgrind(tmp_path):
    valgrind = need("valgrind")
    package = Path(_C.__file__).parent / "lib" / "cmake" / "lora_engine"
    programs = build(C_TESTS, tmp_path, f"lora_engine_DIR={package}")
    said = last_lines(
        valgrind, "-q", "--leak-check=full", "--errors-for-leak-kinds=definite,possible",
        "--error-exitcode=9", programs / "tests", LORA_ENGINE_ISA="generic",
    )  # fmt: skip
    assert said.endswith(" checks, 0 failed")
