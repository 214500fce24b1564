"""What the tests of MicroLoRA and its files share: made adapters, raw files, child processes."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import lora_engine as le
from lora_engine import reference

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
STATE = "lora_engine_state.safetensors"


def trained(d_in: int = 6, d_out: int = 5, draw: int = 0, **config: Any) -> le.MicroLoRA:
    """A MicroLoRA whose A and B are both drawn, so that it changes something."""
    config.setdefault("target_modules", ("q",))
    lora = le.MicroLoRA(le.MicroLoRAConfig(d_in, d_out, **config))
    redraw(lora, draw)
    return lora


def redraw(lora: le.MicroLoRA, draw: int) -> None:
    rng = np.random.default_rng([1, draw])
    for name in lora.config.target_modules:
        A, B = (rng.standard_normal(w.shape).astype("f4") for w in lora.weights(name)[:2])
        lora.set_weights(name, A, B)


def weight_bits(lora: le.MicroLoRA) -> dict[str, tuple[bytes, bytes, float]]:
    """The bits of every module's A and B, and its scaling."""
    found = {}
    for name in lora.config.target_modules:
        A, B, scaling = lora.weights(name)
        found[name] = (A.tobytes(), B.tobytes(), scaling)
    return found


def mean_gradients(
    x: np.ndarray, grad: np.ndarray, A: np.ndarray, B: np.ndarray, scaling: float
) -> tuple[np.ndarray, np.ndarray]:
    """The reference's (gA, gB), mean over the rows; a vector is one row."""
    x, grad = np.atleast_2d(x), np.atleast_2d(grad)
    gA, gB = reference.adapter_gradients(x, grad, A, B, scaling)
    return gA / len(x), gB / len(x)


def step_error(
    lora: le.MicroLoRA,
    module: str,
    before: tuple[np.ndarray, np.ndarray, float],
    x: np.ndarray,
    grad: np.ndarray,
    lr: float,
) -> float:
    """How far the weights now are from the reference's step, over the sizes of its terms."""
    A, B, s = before
    steps = mean_gradients(x, grad, A, B, s)
    sizes = mean_gradients(np.abs(x), np.abs(grad), np.abs(A), np.abs(B), abs(s))
    after = lora.weights(module)
    errors = [
        np.linalg.norm(now - (was - lr * g)) / np.linalg.norm(np.abs(was) + lr * size)
        for now, was, g, size in zip(after[:2], (A, B), steps, sizes, strict=True)
    ]
    return float(max(errors))


def raw_safetensors(
    entries: dict[str, Any], payload: bytes = b"", metadata: Any = ..., header: bytes | None = None
) -> bytes:
    """A file with that header, right or wrong; metadata: left out where it is ``...``."""
    if header is None:
        whole = {} if metadata is ... else {"__metadata__": metadata}
        header = json.dumps({**whole, **entries}).encode()
    return struct.pack("<Q", len(header)) + header + payload


def header_of(data: bytes) -> dict[str, Any]:
    """The JSON header of safetensors bytes."""
    (length,) = struct.unpack("<Q", data[:8])
    return dict(json.loads(data[8 : 8 + length]))


def edit_config(folder: Path, **changes: Any) -> None:
    """Changes keys of a folder's adapter_config.json."""
    path = folder / CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def quietly(call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """PEFT's and torch's own warnings are not ours to fail on."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return call(*args, **kwargs)


def run_python(*args: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Runs Python in a process of its own; an environment value of "" unsets it."""
    whole = {**os.environ, **env}
    for name in [name for name, value in env.items() if not value]:
        del whole[name]
    return subprocess.run(
        [sys.executable, *args], env=whole, capture_output=True, text=True, timeout=120, check=False
    )


A_KEY, B_KEY = (f"base_model.model.q.lora_{which}.weight" for which in "AB")
FILES = {CONFIG, WEIGHTS, STATE}


def saved(tmp_path: Path, lora: le.MicroLoRA | None = None) -> Path:
    folder = tmp_path / "adapter"
    (lora or trained()).save(folder)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {entry.name: entry.read_bytes() for entry in folder.iterdir() if entry.is_file()}


def steps_of(lora: le.MicroLoRA) -> dict[str, int]:
    return {name: m.steps for name, m in lora._modules.items()}


OWN, KEPT = weight_bits(trained()), weight_bits(trained(draw=9))


def check_refusal(error: pytest.ExceptionInfo, source: str) -> None:
    assert str(error.value).startswith(source), error.value
    assert len(str(error.value)) < 1000


def dead_pid() -> int:
    """The id of a process that is no more."""
    process = subprocess.Popen([sys.executable, "-S", "-c", ""])
    process.wait()
    return process.pid


def load_dropping(folder: Path, why: str) -> le.MicroLoRA:
    """Loads a folder whose state file must be dropped, and say so."""
    with pytest.warns(UserWarning, match=rf"^engine state dropped: .*{why}") as caught:
        lora = le.MicroLoRA.load(folder)
    assert Path(caught[0].filename) == Path(__file__)  # it points at who called load
    assert STATE in str(caught[0].message)
    return lora
