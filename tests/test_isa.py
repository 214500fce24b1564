"""Which instruction set runs, and the op tests under each."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lora_engine import _C

TESTS = Path(__file__).parent
OP_TESTS = (
    "test_lora_delta.py",
    "test_batched_lora_delta.py",
    "test_batched_adapt.py",
    "test_ewc.py",
    "test_float16.py",
    "test_fisher.py",
    "test_nf4_linear.py",
    "test_nf4_autograd.py",
)
BUILT = _C.isas_built()


def run(isa: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True, text=True, env=os.environ | {"LORA_ENGINE_ISA": isa}, cwd=TESTS.parent,
    )  # fmt: skip


def cpu_flags() -> set[str]:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith(("flags", "Features")):
            return set(line.split(":")[1].split())
    return set()


def test_the_best_this_cpu_has_is_chosen():
    if os.environ.get("LORA_ENGINE_ISA"):
        pytest.skip("LORA_ENGINE_ISA forces a choice")
    flags = cpu_flags()
    best = "generic"
    if {"avx2", "fma", "f16c"} <= flags:
        best = "avx2"
    if {"avx512f", "avx512bw", "avx512dq", "avx512vl"} <= flags:
        best = "avx512"
        if "avx512_bf16" in flags:
            best = "avx512_bf16"
    if "asimd" in flags:  # AArch64
        best = "neon"
    assert _C.isa() == best
    assert BUILT["generic"]


@pytest.mark.parametrize("isa", BUILT)
def test_op_tests_under(isa):
    if not BUILT[isa]:
        pytest.skip(f"this CPU does not have {isa}")
    if os.environ.get("LORA_ENGINE_ISA"):
        pytest.skip("LORA_ENGINE_ISA forces a choice")
    which = run(isa, "-c", "from lora_engine import _C; print(_C.isa())")
    assert which.stdout.strip() == isa
    if isa == _C.isa():
        return  # this very run
    ran = run(isa, "-m", "pytest", "-q", "-x", *[str(TESTS / name) for name in OP_TESTS])
    assert ran.returncode == 0, ran.stdout[-4000:]
    assert " passed" in ran.stdout


@pytest.mark.parametrize("isa", [name for name, there in BUILT.items() if not there] or ["-"])
def test_one_the_cpu_lacks_fails_loudly(isa):
    if isa == "-":
        pytest.skip("this CPU has every instruction set that was built")
    ran = run(isa, "-c", "import lora_engine as le; le.AdapterPool(4, 4)")
    assert ran.returncode != 0
    assert f"LORA_ENGINE_ISA={isa}: this CPU does not have it" in ran.stderr
