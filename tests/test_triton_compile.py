"""Every kernel that a launcher can choose compiles for every device, without one.

No registers in memory, shared memory within the device's limit, matrix instructions
where they are meant. The full profile compiles for every device, the other for two of them;
it also compiles each for odd shapes, and all that a tuned file can choose.
"""

from __future__ import annotations

import ast
import inspect
import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from threading import Lock, local
from types import ModuleType
from typing import Any

import pytest
import torch
from helpers_kernels import GATED, MODULES, variants_of
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

from lora_engine.kernels.launch import DEVICES, INTERPRETED, device_of

FULL = os.environ.get("LORA_ENGINE_TEST_PROFILE") == "full"
PLAIN = (False, True) if FULL else (False,)
# Of NVIDIA's the one with least shared memory; the others under ``make full``, for time.
GATES = list(DEVICES) if FULL else ["sm_80", "gfx942"]
CASES = [(name, device) for name in GATED for device in GATES]

WORKER = Path(__file__).with_name("compile_kernels.py")
KINDS = (JITFunction, InterpretedFunction)
Answers = list[Future[dict[str, Any]]]


class Compilers:
    """A process a core, kept over many compilations; started anew where one died."""

    def __init__(self, cache: Path, script: Path = WORKER) -> None:
        self.script = script
        self.environment = {**os.environ, "TRITON_CACHE_DIR": str(cache)}
        self.environment.pop("TRITON_INTERPRET", None)
        self.threads = ThreadPoolExecutor(min(len(os.sched_getaffinity(0)), 16))
        self.own = local()
        self.lock = Lock()  # a process is in started, or none is started any more
        self.started: list[subprocess.Popen] = []
        self.closed = False

    def submit(self, module: str, device: str, index: int, plain: bool) -> Future[dict[str, Any]]:
        job = {"module": module, "device": device, "index": index, "plain": plain, "tuned": FULL}
        return self.threads.submit(self._run, job)

    def _run(self, job: dict[str, Any]) -> dict[str, Any]:
        process = getattr(self.own, "process", None)
        if process is None:
            process = self.own.process = self._start()
        begun = time.monotonic()
        line = ""
        with suppress(BrokenPipeError):
            process.stdin.write(json.dumps(job) + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
        if line:
            return {**json.loads(line), "seconds": time.monotonic() - begun}
        self.own.process = None
        end = process.wait()
        why = "took too long" if end == -signal.SIGALRM else f"ended the compiler with {end}"
        return {"problems": [why], "seconds": time.monotonic() - begun}

    def _start(self) -> subprocess.Popen:
        with self.lock:
            if self.closed:
                raise RuntimeError("closed while a compiler was to be started")
            process = subprocess.Popen(
                [sys.executable, str(self.script)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env=self.environment,
                text=True,
                start_new_session=True,  # a group of its own, to end with what it started
            )
            self.started.append(process)
        return process

    def close(self) -> None:
        """Leaves no process behind, whatever they were at."""
        with self.lock:
            self.closed = True
        self.threads.shutdown(wait=False, cancel_futures=True)
        for process in self.started:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        self.threads.shutdown()
        for process in self.started:
            process.communicate()


@pytest.fixture(scope="module")
def answers(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[tuple[str, str], Answers]]:
    """Of each case that was selected; all are queued at once, so that no core waits."""
    name = test_every_variant_compiles.__name__
    items = [i for i in request.session.items if getattr(i, "originalname", None) == name]
    wanted = [item.callspec.params["case"] for item in items]
    compilers = Compilers(tmp_path_factory.mktemp("triton"))
    try:
        yield {
            (module, device): [
                compilers.submit(module, device, index, plain)
                for index, _ in enumerate(variants_of(module, DEVICES[device], FULL))
                for plain in PLAIN
            ]
            for module, device in wanted
        }
    finally:
        compilers.close()


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_every_variant_compiles(
    case: tuple[str, str],
    answers: dict[tuple[str, str], Answers],
    capsys: pytest.CaptureFixture[str],
) -> None:
    module, device = case
    names = [v.name for v in variants_of(module, DEVICES[device], FULL) for _ in PLAIN]
    assert len(set(names)) * len(PLAIN) == len(names), "two variants of one name"
    found = [future.result() for future in answers[case]]
    with capsys.disabled():
        seconds = sum(answer["seconds"] for answer in found)
        print(f"\n{module} {device}: {len(found)} in {seconds:.0f} s ", end="", flush=True)
    wrong = [
        f"{name}{' (odd shape)' if i % len(PLAIN) else ''}: {', '.join(answer['problems'])}"
        for i, (name, answer) in enumerate(zip(names, found, strict=True))
        if answer["problems"]
    ]
    wrong += of_other_instructions(found)
    if wrong:
        pytest.fail(f"{module} on {device}:\n" + "\n".join(wrong), pytrace=False)


# Of a delta, whose order of summation must be a row's own, in every tiling of rows.
DELTA = re.compile(r"((?:batched_lora_delta|lora_delta|nf4_linear)-\w+-\w+)-\d+(?:-[\dx]+)?-(\w+)")


def of_other_instructions(found: list[dict[str, Any]]) -> list[str]:
    """Tilings of a delta that multiply with other instructions than the first of its kernel."""
    seen: dict[Any, Any] = {}
    wrong = []
    for answer in found:
        named = DELTA.fullmatch(answer.get("variant", ""))
        if named and not answer["problems"]:
            first = seen.setdefault(named.groups(), answer["matrix"])
            if answer["matrix"] != first:
                wrong.append(f"{answer['variant']}: {answer['matrix']}, another tiling {first}")
    return wrong


def jitted(module: ModuleType) -> dict[str, Any]:
    """The kernels and their helpers that a file defines."""
    found = {name: fn for name, fn in vars(module).items() if isinstance(fn, KINDS)}
    return {name: fn for name, fn in found.items() if fn.fn.__module__ == module.__name__}


def called(module: ModuleType) -> set[Any]:
    """What the kernels of a file call."""
    names = set()
    for fn in jitted(module).values():
        body = ast.parse(textwrap.dedent(inspect.getsource(fn.fn)))
        names |= {node.id for node in ast.walk(body) if isinstance(node, ast.Name)}
    return {fn for name, fn in vars(module).items() if name in names and isinstance(fn, KINDS)}


def launched(module: ModuleType) -> set[Any]:
    """Kernels that the file passes to launch() by their name."""
    nodes = ast.walk(ast.parse(inspect.getsource(module)))
    names = {
        call.args[0].id
        for call in nodes
        if isinstance(call, ast.Call)
        and getattr(call.func, "id", getattr(call.func, "attr", None)) == "launch"
        and call.args
        and isinstance(call.args[0], ast.Name)
    }
    return {fn for name, fn in jitted(module).items() if name in names}


@pytest.mark.parametrize("device", DEVICES)
def test_every_kernel_is_a_variant(device: str) -> None:
    gated = {v.fn for name in GATED for v in MODULES[name].variants(DEVICES[device])}
    helpers = {fn for module in MODULES.values() for fn in called(module)}
    missing = [
        f"{file}.{name}"
        for file, module in MODULES.items()
        for name, fn in jitted(module).items()
        if fn not in gated and (fn not in helpers or fn in launched(module))
    ]
    assert not missing, f"not in variants(), and not a helper of another kernel: {missing}"


FAILS = """
import json, os, signal, sys, time
for line in sys.stdin:
    index = json.loads(line)["index"]
    if index == 1:
        os._exit(3)
    if index == 2:
        signal.alarm(1)
    if index >= 2:
        time.sleep(600)
    print(json.dumps({"problems": []}), flush=True)
"""


def test_a_compiler_that_dies_or_hangs_is_told_and_ended(tmp_path: Path) -> None:
    script = tmp_path / "fails.py"
    script.write_text(FAILS)
    compilers = Compilers(tmp_path, script)
    try:
        futures = [compilers.submit("m", "sm_90", index, False) for index in (0, 1, 0, 2, 0)]
        assert [future.result()["problems"] for future in futures] == [
            [], ["ended the compiler with 3"], [], ["took too long"], [],
        ]  # fmt: skip
        for _ in range(40):  # more than there are processes
            compilers.submit("m", "sm_90", 3, False)
        begun = time.monotonic()
    finally:
        compilers.close()
    assert time.monotonic() - begun < 60
    assert all(process.returncode is not None for process in compilers.started)


def test_closed_while_compilers_are_being_started(tmp_path: Path) -> None:
    script = tmp_path / "hangs.py"
    script.write_text("import time\ntime.sleep(600)\n")
    begun = time.monotonic()
    for pause in (0, 0.001, 0.002, 0.004, 0.008):
        compilers = Compilers(tmp_path, script)
        futures = [compilers.submit("m", "sm_90", 0, False) for _ in range(40)]
        time.sleep(pause)
        compilers.close()
        assert all(future.done() for future in futures)
        assert all(process.returncode is not None for process in compilers.started)
    assert time.monotonic() - begun < 60


@pytest.mark.skipif(not INTERPRETED, reason="launches are checked in the interpreter")
def test_a_launch_that_is_no_variant_fails() -> None:
    module = MODULES["lora_delta"]
    variant = next(iter(module.variants(device_of(None))))
    pointers = (torch.zeros(1, dtype=torch.int8),) * len(variant.pointers)
    with pytest.raises(AssertionError, match="no variant: _shrink"):
        module.launch(
            variant.fn, (0, 1, 1), pointers, (1,), variant.shape, variant.constants, variant.config
        )
