"""NF4 matrices in bitsandbytes' checkpoints: read, written, read back by bitsandbytes."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import bits
from helpers_files import contents, dead_pid, header_of, raw_safetensors, run_python
from helpers_nf4 import (
    BLOCKSIZES,
    COLS,
    NAME,
    ROWS,
    STATE,
    STORAGES,
    about,
    arrays,
    bitsandbytes,
    decode,
    matrix,
    same,
    state_dict,
)
from safetensors.numpy import load_file as load_numpy
from safetensors.numpy import save_file as save_numpy
from safetensors.torch import load_file, save_file

import lora_engine as le
from lora_engine import atomic
from lora_engine.quant import checkpoint
from lora_engine.safetensors_file import raw_of

pytestmark = pytest.mark.usefixtures("backend")

storages = pytest.mark.parametrize("storage", STORAGES)
double_quants = pytest.mark.parametrize("double_quant", [False, True], ids=["plain", "double"])


# ---- bitsandbytes' keys -----------------------------------------------------


@double_quants
@storages
def test_keys_round_trip_to_the_byte(storage, double_quant):
    theirs = state_dict(matrix(34, 96), 64, double_quant, storage)
    w = le.NF4Tensor.from_bitsandbytes(theirs, NAME)
    assert same(w.to_bitsandbytes(NAME), theirs)
    assert bits(w.to_float()) == bits(decode(theirs))
    renamed = w.to_bitsandbytes("x")
    assert list(renamed) == [key.replace(NAME, "x") for key in theirs]


@double_quants
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_it_makes_what_bitsandbytes_makes(dtype, double_quant):
    """Values on which neither reciprocals, means nor tables round differently."""
    W = (matrix(33, 93).sign() * torch.arange(1, 34)[:, None]).to(getattr(torch, dtype))
    theirs = state_dict(W, 64, double_quant)
    ours = le.nf4_quantize(W, 64, double_quant).to_bitsandbytes(NAME)
    if double_quant:
        offsets = [about(t)["nested_offset"] for t in (ours, theirs)]
        assert offsets[0] == pytest.approx(offsets[1], rel=1e-6)
        assert {**about(ours), "nested_offset": 0} == {**about(theirs), "nested_offset": 0}
        close = {f"{NAME}.absmax", f"{NAME}.nested_absmax", f"{NAME}.nested_quant_map"}
        for key in close:
            np.testing.assert_allclose(ours[key], theirs[key], rtol=1e-6, atol=0)
        exact = [k for k in theirs if k not in close | {NAME + STATE}]
        assert list(ours) == list(theirs)
        assert same({k: ours[k] for k in exact}, {k: theirs[k] for k in exact})
    else:
        assert same(ours, theirs)


@double_quants
@pytest.mark.parametrize("cols", COLS)
@pytest.mark.parametrize("rows", ROWS)
def test_bitsandbytes_matrices_decode_exactly(rows, cols, double_quant):
    W = matrix(rows, cols, "bfloat16")
    for blocksize in BLOCKSIZES if W.numel() < 1 << 14 else (64, 2048):
        theirs = state_dict(W, blocksize, double_quant)
        w = le.NF4Tensor.from_bitsandbytes(theirs, NAME)
        assert (w.shape, w.dtype, w.blocksize) == ((rows, cols), "bfloat16", blocksize)
        assert bits(w.to_float()) == bits(decode(theirs))


@double_quants
@storages
def test_bitsandbytes_reads_ours(storage, double_quant):
    """As a layer's parameter, decoded by bitsandbytes itself where it is right: whole blocks."""
    theirs = state_dict(matrix(32, 128), 64, double_quant, storage)
    ours = le.NF4Tensor.from_bitsandbytes(theirs, NAME).to_bitsandbytes(NAME)
    if storage == "uint8":
        ours = le.nf4_quantize(matrix(32, 128), 64, double_quant).to_bitsandbytes(NAME)
    stats = {key: value for key, value in ours.items() if key != NAME}
    weight = bitsandbytes.nn.Params4bit.from_prequantized(ours[NAME], stats, device="cpu")
    decoded = bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state)
    np.testing.assert_allclose(decoded.numpy(), decode(ours), rtol=3e-7, atol=0)


def test_numpy_keys_are_borrowed_and_given_back():
    theirs = arrays(state_dict(matrix(34, 96), 64, double_quant=True))
    before = {key: value.copy() for key, value in theirs.items()}
    w = le.NF4Tensor.from_bitsandbytes(theirs, NAME)
    w.to_float()
    back = w.to_bitsandbytes(NAME)
    assert same(back, before)
    assert same(theirs, before)
    assert all(np.shares_memory(back[key], theirs[key]) for key in theirs)
    assert all(value.flags.writeable for value in theirs.values())
    assert not any(value.flags.writeable for value in back.values())


@storages
def test_tensors_are_borrowed(storage):
    theirs = state_dict(matrix(34, 96), storage=storage)
    w = le.NF4Tensor.from_bitsandbytes(theirs, NAME)
    theirs[NAME].view(torch.uint8)[:] = 0x77
    assert (w.to_float() == 0).all()


def test_strided_and_misplaced_keys_are_read():
    theirs = arrays(state_dict(matrix(34, 96)))
    want = bits(decode(theirs))
    strided = {key: np.repeat(value, 3, axis=0)[::3] for key, value in theirs.items()}
    assert bits(le.NF4Tensor.from_bitsandbytes(strided, NAME).to_float()) == want
    odd = {k: np.frombuffer(b"x" + v.tobytes(), v.dtype, offset=1) for k, v in theirs.items()}
    odd[NAME] = odd[NAME][:, None]
    assert not odd[f"{NAME}.absmax"].flags.aligned
    assert checkpoint.numbers(raw_of(odd[f"{NAME}.absmax"], "")).flags.aligned
    assert bits(le.NF4Tensor.from_bitsandbytes(odd, NAME).to_float()) == want


# ---- files ------------------------------------------------------------------


@double_quants
@storages
def test_file_round_trip_changes_no_byte(storage, double_quant, tmp_path):
    """A checkpoint by safetensors itself: load one matrix, save it back, the same file."""
    file = tmp_path / "model.safetensors"
    other = {f"größe.{dtype}": torch.arange(7).to(dtype) for dtype in (
        torch.int64, torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int32,
        torch.int16, torch.int8, torch.bool, torch.float8_e4m3fn, torch.float8_e5m2,
        torch.complex64, torch.uint16, torch.uint32, torch.uint64)}  # fmt: skip
    theirs = state_dict(matrix(34, 96), 64, double_quant, storage)
    save_file({**other, **theirs}, file, metadata={"format": "pt"})
    before = file.read_bytes()
    w = le.NF4Tensor.load(file, NAME)
    assert bits(w.to_float()) == bits(decode(theirs))
    w.save(file, NAME)
    assert file.read_bytes() == before
    if storage == "bfloat16":
        assert same(w.to_bitsandbytes(NAME), theirs)
    else:
        assert same(w.to_bitsandbytes(NAME), arrays(theirs))


def test_save_keeps_the_rest_and_replaces_its_own(tmp_path):
    file = tmp_path / "model.safetensors"
    rest = {"model.q_proj.bias": np.arange(5, dtype="f4"), f"{NAME}.other": np.ones(3, "i8")}
    metadata = {"format": "pt", "b": "\u00e9", "a": "1"}
    save_numpy({**rest, NAME: np.ones((5, 5), "f4")}, file, metadata=metadata)
    w = le.nf4_quantize(matrix(5, 7).numpy(), double_quant=True)
    w.save(file, NAME)
    assert header_of(file.read_bytes())["__metadata__"] == metadata
    found = load_numpy(file)
    want = {**rest, **w.to_bitsandbytes(NAME)}
    assert same({k: found[k] for k in sorted(found)}, {k: want[k] for k in sorted(want)})
    plain = le.nf4_quantize(matrix(6, 8).numpy())  # leaves no nested keys behind
    plain.save(file, NAME)
    assert sorted(load_numpy(file)) == sorted({**rest, **plain.to_bitsandbytes(NAME)})
    assert bits(le.NF4Tensor.load(file, NAME).to_float()) == bits(plain.to_float())


def test_new_file_is_the_one_safetensors_writes(tmp_path):
    w = le.nf4_quantize(matrix(33, 93), double_quant=True)
    ours, theirs = tmp_path / "ours.safetensors", tmp_path / "theirs.safetensors"
    w.save(ours, NAME)
    save_file(w.to_bitsandbytes(NAME), theirs, metadata={"format": "pt"})
    assert ours.read_bytes() == theirs.read_bytes()
    assert same(load_file(ours), load_file(theirs))


def test_many_matrices_in_one_file(tmp_path):
    file = tmp_path / "model.safetensors"
    made = {f"layers.{i}.weight": le.nf4_quantize(matrix(3 + i, 40), 32, i % 2) for i in range(5)}
    for name, w in made.items():
        w.save(file, name)
    for name, w in made.items():
        assert bits(le.NF4Tensor.load(str(file), name).to_float()) == bits(w.to_float())


def test_load_reads_its_own_bytes_only(tmp_path):
    """A sparse file of 1 TB: whoever read or copied it whole would not come back."""
    own = arrays(state_dict(matrix(34, 96)))
    entries, at = {}, 0
    for key, value in own.items():
        dtype = {"uint8": "U8", "float32": "F32"}[str(value.dtype)]
        end = at + value.nbytes
        entries[key] = {"dtype": dtype, "shape": list(value.shape), "data_offsets": [at, end]}
        at = end
    entries["huge"] = {"dtype": "U8", "shape": [1 << 40], "data_offsets": [at, at + (1 << 40)]}
    file = tmp_path / "model.safetensors"
    head = raw_safetensors(entries, b"".join(value.tobytes() for value in own.values()))
    file.write_bytes(head)
    try:
        os.truncate(file, len(head) + (1 << 40))
    except OSError:
        pytest.skip("the disk has no sparse files of 1 TB")
    assert same(le.NF4Tensor.load(file, NAME).to_bitsandbytes(NAME), own)


def test_symlink_and_permissions_stay(tmp_path):
    blob, link = tmp_path / "blob", tmp_path / "model.safetensors"
    w = le.nf4_quantize(matrix(3, 8))
    w.save(blob, "a")
    blob.chmod(0o640)
    link.symlink_to(blob)
    w.save(link, "b")
    assert link.is_symlink()
    assert stat.S_IMODE(blob.stat().st_mode) == 0o640
    assert {key.split(".")[0] for key in load_file(blob)} == {"a", "b"}


# ---- saves that are cut short -----------------------------------------------


def test_failed_save_leaves_the_file(tmp_path, monkeypatch):
    file = tmp_path / "model.safetensors"
    le.nf4_quantize(matrix(3, 8)).save(file, "a")
    before = contents(tmp_path)

    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(atomic.os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        le.nf4_quantize(matrix(5, 8)).save(file, "b")
    monkeypatch.undo()
    assert contents(tmp_path) == before


def test_what_killed_saves_left_is_swept(tmp_path):
    file = tmp_path / "model.safetensors"
    dead = tmp_path / f".{file.name}.tmp-{dead_pid()}-ab"
    alive = tmp_path / f".{file.name}.tmp-{os.getpid()}-ab"
    other = tmp_path / f".other.tmp-{dead_pid()}-ab"
    for path in (dead, alive, other):
        path.write_bytes(b"half")
    le.nf4_quantize(matrix(3, 8)).save(file, "a")
    assert set(contents(tmp_path)) == {file.name, alive.name, other.name}


KILL = """
import os, random, signal, sys, time
import numpy as np
import lora_engine as le

file, rounds, patience = sys.argv[1], int(sys.argv[2]), time.monotonic() + 100
pair = [le.nf4_quantize(np.full((n, 300), n, "f4")) for n in (100, 333)]
pair[0].save(file, "rest")
pair[0].save(file, "w")
rng, killed, cut, seen = random.Random(0), 0, 0, set()
# On a busy machine few children come to save in their time: more of them, then.
while killed < rounds or ((cut < 5 or len(seen) < 2) and time.monotonic() < patience):
    killed += 1
    child = os.fork()
    if not child:
        while True:
            for each in reversed(pair):
                each.save(file, "w")
    time.sleep(rng.uniform(0.002, 0.03))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    cut += len(os.listdir(os.path.dirname(file))) > 1
    w = le.NF4Tensor.load(file, "w")
    assert (w.to_float() == w.shape[0]).all()
    seen.add(w.shape[0])
    assert (le.NF4Tensor.load(file, "rest").to_float() == 100).all()
pair[0].save(file, "w")
assert os.listdir(os.path.dirname(file)) == [os.path.basename(file)]
print(cut, len(seen))
"""


def test_kill_leaves_one_file_or_the_other(backend, tmp_path):
    """A child that saves two matrices in turn is killed at 30 moments or more."""
    file = str(tmp_path / "model.safetensors")
    ran = run_python("-c", KILL, file, "30", LORA_ENGINE_BACKEND=backend)
    assert ran.returncode == 0, ran.stderr
    cut, seen = map(int, ran.stdout.split())
    assert cut >= 5, "too few kills fell into a save"
    assert seen == 2


# ---- without torch ----------------------------------------------------------

NUMPY_ONLY = """
import sys
sys.modules["torch"] = None  # as if it were not installed
import numpy as np
import lora_engine as le

file, name = sys.argv[1:]
w = le.NF4Tensor.load(file, name)
before = open(file, "rb").read()
w.save(file, name)
assert open(file, "rb").read() == before
np.save(sys.stdout.buffer, w.to_float())
y = le.nf4_linear(np.ones((2, w.shape[1]), "f4"), w)
assert y.shape == (2, w.shape[0])
le.nf4_quantize(w.to_float(), double_quant=True).save(file, name)
"""


@storages
def test_files_need_no_torch(storage, backend, tmp_path):
    file, out = tmp_path / "model.safetensors", tmp_path / "out.npy"
    theirs = state_dict(matrix(34, 96), 64, True, storage)
    save_file(theirs, file)
    code = NUMPY_ONLY.replace("sys.stdout.buffer", repr(str(out)))
    ran = run_python("-c", code, str(file), NAME, LORA_ENGINE_BACKEND=backend)
    assert ran.returncode == 0, ran.stderr
    assert bits(np.load(out)) == bits(decode(theirs))


def test_json_is_kept_as_it_was_written(tmp_path):
    """Other spaces, other order of keys: the bytes are not ours to normalise."""
    theirs = state_dict(matrix(3, 8))
    said = about(theirs)
    text = json.dumps(dict(reversed(said.items())), indent=1).encode() + b"\n"
    theirs[NAME + STATE] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    file = Path(tmp_path) / "model.safetensors"
    w = le.NF4Tensor.from_bitsandbytes(theirs, NAME)
    w.save(file, NAME)
    assert same(le.NF4Tensor.load(file, NAME).to_bitsandbytes(NAME), arrays(theirs))
