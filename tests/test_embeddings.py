"""The hosts of examples/, in C, C++, Node, Python without our binding, Rust: the same bits."""

from __future__ import annotations

import os
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers_native import ROOT, call

from lora_engine import _C

EXAMPLES = ROOT / "examples"
LIB = Path(_C.__file__).parent / "lib"
INCLUDE = LIB.parent / "include"
IN, OUT, ROWS, STEPS = 96, 80, 4, 25


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """What PEFT saves: one module of rank 5, the keys with its prefix, metadata."""
    from safetensors.numpy import save_file

    rng = np.random.default_rng(9)
    path = tmp_path_factory.mktemp("adapter") / "adapter_model.safetensors"
    tensors = {
        "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": (5, IN),
        "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight": (OUT, 5),
    }
    arrays = {key: rng.standard_normal(s, dtype="f4") / 8 for key, s in tensors.items()}
    save_file(arrays, path, metadata={"format": "pt"})
    return path


@pytest.fixture(scope="module")
def expected(adapter):
    """The same through the package: MicroLoRA's pool, NumPy."""
    from safetensors.numpy import load_file

    import lora_engine as le

    A, B = (tensor for _, tensor in sorted(load_file(adapter).items()))
    pool = le.AdapterPool(IN, OUT)
    slot = pool.add(A, B, 2.0)
    state, digest = 1, 2166136261

    def draw(rows, cols):
        nonlocal state
        values = np.empty(rows * cols, "f4")
        for i in range(len(values)):
            state = (state * 1664525 + 1013904223) % (1 << 32)
            values[i] = ((state >> 8) % 33 - 16) / 16
        return values.reshape(rows, cols)

    def fnv1a(data):
        nonlocal digest
        for byte in data:
            digest = (digest ^ byte) * 16777619 % (1 << 32)

    ids = np.full(ROWS, slot, "i4")
    for _ in range(STEPS):
        x, target = draw(ROWS, IN), draw(ROWS, OUT)
        y = pool.forward(x, ids)
        fnv1a(y.tobytes())
        assert pool.adapt(x, y - target, ids, lr=0.001, max_norm=1.0).applied.all()
    A, B, _ = pool.get(slot)
    header = (
        '{"base_model.model.served.lora_A.weight":{"dtype":"F32","shape":[5,96],'
        '"data_offsets":[0,1920]},"base_model.model.served.lora_B.weight":{"dtype":"F32",'
        '"shape":[80,5],"data_offsets":[1920,3520]}}'
    )
    header += " " * (-len(header) % 8)
    fnv1a(len(header).to_bytes(8, "little") + header.encode() + A.tobytes() + B.tobytes())
    return f"digest {digest:08x}\n"


def compiled(compiler: str, source: str | Path, to: Path) -> Path:
    call(
        compiler, *(["-std=c++17"] if compiler == "c++" else []), "-O1", "-Wall", "-Wextra",
        "-Werror", "-pthread", EXAMPLES / source, f"-I{INCLUDE}", f"-L{LIB}",
        f"-Wl,-rpath,{LIB}", "-llora_engine", "-o", to,
    )  # fmt: skip
    return to


def test_c(adapter, expected, tmp_path):
    assert call(compiled("cc", "c/host.c", tmp_path / "host"), adapter) == expected


def test_the_server_of_the_docs(tmp_path):
    text = (ROOT / "docs" / "embedding.md").read_text(encoding="utf-8")
    (program,) = re.findall(r"```c\n(.*?)```", text, re.DOTALL)
    (tmp_path / "server.c").write_text(program, encoding="utf-8")
    assert call(compiled("cc", tmp_path / "server.c", tmp_path / "s")) == "learned: 1 0 1\n"


def test_cpp(adapter, expected, tmp_path):
    host = compiled("c++", "cpp/host.cpp", tmp_path / "host")
    assert call(host, adapter) == expected
    with pytest.raises(AssertionError, match="expected a safetensors file, got 0 bytes"):
        call(host, "/dev/null")


def test_a_host_that_lends_its_threads(adapter, expected, tmp_path):
    said = call(compiled("c++", "cpp/lend_threads.cpp", tmp_path / "host"), adapter).splitlines()
    assert f"{said[-1]}\n" == expected or f"{said[0]}\n" == expected
    runs = next(line for line in said if "lent" in line)
    assert int(runs.rsplit(" ", 1)[1]) >= STEPS


def test_python_without_the_package(adapter, expected):
    """-I -S: no site-packages, so no lora_engine and no NumPy."""
    host = EXAMPLES / "python" / "host.py"
    assert call(sys.executable, "-I", "-S", host, LIB / "liblora_engine.so", adapter) == expected


def test_node(adapter, expected, tmp_path):
    if not shutil.which("npm"):
        pytest.skip("Node is not installed")
    host = shutil.copytree(EXAMPLES / "node", tmp_path / "node")
    call("npm", "ci", "--prefix", host, "--no-audit", "--no-fund", "--ignore-scripts")
    assert call("node", host / "host.mjs", LIB / "liblora_engine.so", adapter) == expected


def test_rust(adapter, expected, tmp_path):
    cargo = shutil.which("cargo", path=f"{os.environ['PATH']}:{Path.home()}/.cargo/bin")
    if not cargo:
        pytest.skip("cargo is not installed")
    env = {"LORA_ENGINE_LIB_DIR": str(LIB), "CARGO_TARGET_DIR": str(tmp_path / "target")}
    manifest = EXAMPLES / "rust" / "Cargo.toml"
    call(cargo, "build", "--quiet", "--offline", "--locked", "--manifest-path", manifest, **env)
    assert call(tmp_path / "target" / "debug" / "host", adapter) == expected
