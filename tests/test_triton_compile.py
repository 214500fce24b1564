"""Every kernel that a launcher can choose compiles for every device, without one.

No registers in memory, shared memory within the device's limit, matrix instructions
where they are meant. The full profile also compiles each for odd shapes.
"""

from __future__ import annotations

import ast
import inspect
import json
import os
import pkgutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from threading import local
from types import ModuleType
from typing import Any

import pytest
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

import lora_engine.kernels
from lora_engine.kernels.launch import DEVICES

FILES = sorted({m.name for m in pkgutil.iter_modules(lora_engine.kernels.__path__)})
MODULES = {name: import_module(f"lora_engine.kernels.{name}") for name in FILES}
GATED = [name for name, module in MODULES.items() if hasattr(module, "variants")]
PLAIN = (False, True) if os.environ.get("LORA_ENGINE_TEST_PROFILE") == "full" else (False,)
CASES = [(name, device) for name in GATED for device in DEVICES]

KINDS = (JITFunction, InterpretedFunction)
Answers = list[Future[dict[str, Any]]]


class Compilers:
    """A process a core, kept over many compilations; started anew where one died."""

    def __init__(self, cache: Path) -> None:
        self.environment = {**os.environ, "TRITON_CACHE_DIR": str(cache)}
        self.environment.pop("TRITON_INTERPRET", None)
        self.threads = ThreadPoolExecutor(min(len(os.sched_getaffinity(0)), 16))
        self.own = local()
        self.started: list[subprocess.Popen] = []

    def submit(self, module: str, device: str, index: int, plain: bool) -> Future[dict[str, Any]]:
        job = {"module": module, "device": device, "index": index, "plain": plain}
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
        process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("compile_kernels.py"))],
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
    items = [getattr(item, "callspec", None) for item in request.session.items]
    wanted = [item.params["case"] for item in items if item and "case" in item.params]
    compilers = Compilers(tmp_path_factory.mktemp("triton"))
    try:
        yield {
            (module, device): [
                compilers.submit(module, device, index, plain)
                for index, _ in enumerate(MODULES[module].variants(DEVICES[device]))
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
    names = [v.name for v in MODULES[module].variants(DEVICES[device]) for _ in PLAIN]
    assert len(set(names)) * len(PLAIN) == len(names), "two variants of one name"
    found = [future.result() for future in answers[case]]
    with capsys.disabled():
        seconds = sum(answer["seconds"] for answer in found)
        print(f"{module} {device}: {len(found)} compiled, {seconds:.0f} s ", end="", flush=True)
    wrong = [
        f"{name}{' (odd shape)' if i % len(PLAIN) else ''}: {', '.join(answer['problems'])}"
        for i, (name, answer) in enumerate(zip(names, found, strict=True))
        if answer["problems"]
    ]
    if wrong:
        pytest.fail(f"{module} on {device}:\n" + "\n".join(wrong), pytrace=False)


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
