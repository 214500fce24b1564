"""The C tests of tests/c, built against the installed library."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from helpers_native import ROOT, build, call

from lora_engine import _C

C_TESTS = ROOT / "tests" / "c"


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
    package = Path(_C.__file__).parent / "lib" / "cmake" / "lora_engine"
    return build(C_TESTS, tmp_path_factory.mktemp("c"), f"lora_engine_DIR={package}")


@pytest.mark.parametrize("isa", [name for name, there in _C.isas_built().items() if there])
def test_every_function_from_c(isa, programs):
    said = call(programs / "tests", LORA_ENGINE_ISA=isa)
    assert f"instruction set: {isa}\n" in said
    checks, failed = map(int, re.search(r"(\d+) checks, (\d+) failed", said).groups())
    assert checks > 9000
    assert failed == 0


def test_memory_runs_out(programs):
    """Every allocation of every call fails once; a million adds and removes."""
    said = call(programs / "memory")
    assert int(re.search(r"(\d+) allocations failed", said)[1]) > 400
    assert said.endswith(", 0 failed\n")


def test_threads_on_shared_slots(programs):
    said = call(programs / "stress", "2")
    assert said.endswith("\n0 torn\n")


def test_forks_meanwhile(programs):
    assert call(programs / "forks") == "200 forks, 0 failed\n"


@pytest.mark.parametrize("target", ["import", "nf4"])
def test_the_corpus(target, programs):
    inputs = sorted((C_TESTS / "corpus" / target).iterdir())
    assert call(programs / f"fuzz_{target}", *inputs) == f"{len(inputs)} inputs\n"


def test_the_c_tests_call_every_function():
    header = (ROOT / "csrc" / "include" / "lora_engine.h").read_text()
    declared = set(re.findall(r"^LE_API [^(]*?\b(le_\w+)\(", header, re.MULTILINE))
    text = "".join(path.read_text() for path in C_TESTS.glob("*.c"))
    assert {name for name in declared if f"{name}(" not in text} == set()
