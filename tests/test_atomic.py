"""Saves that are cut short: kills, errors, races."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers import delta_error, f64, magnitude
from helpers_files import (
    CONFIG,
    KEPT,
    OWN,
    STATE,
    WEIGHTS,
    contents,
    dead_pid,
    run_python,
    saved,
    trained,
    weight_bits,
)

import lora_engine as le
from lora_engine import atomic, reference

# ---- saves that are cut short -----------------------------------------------


without_exchange = pytest.mark.parametrize("exchange", [True, False], ids=["exchange", "fallback"])


@pytest.fixture
def exchange_or_not(exchange, monkeypatch):
    if not exchange:
        monkeypatch.setattr(atomic, "_exchange", lambda a, b: False)
    return exchange


KILL = """
import os, random, signal, sys, time, warnings
import lora_engine as le
from helpers_files import trained, weight_bits
from lora_engine import atomic

warnings.simplefilter("error", UserWarning)
folder, rounds = sys.argv[1], int(sys.argv[2])
if sys.argv[3] == "fallback":
    atomic._exchange = lambda a, b: False
pair = [trained(draw=i, rank=i + 1, alpha=float(i + 1), seed=i) for i in range(2)]
want = [(weight_bits(each), each.config) for each in pair]
pair[0].save(folder)
with open(folder + "/notes.txt", "w") as file:
    file.write("kept")
parent, rng, cut, gone, seen = os.path.dirname(folder), random.Random(0), 0, 0, set()
for _ in range(rounds):
    child = os.fork()
    if not child:
        while True:
            for each in reversed(pair):
                each.save(folder)
    time.sleep(rng.uniform(0.002, 0.03))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    cut += len(os.listdir(parent)) > 1
    gone += not os.path.exists(folder)
    loaded = le.MicroLoRA.load(folder)
    seen.add(want.index((weight_bits(loaded), loaded.config)))
    with open(folder + "/notes.txt") as file:
        assert file.read() == "kept"
    pair[0].save(folder)
    assert len(os.listdir(parent)) == 1, os.listdir(parent)
print(cut, gone, len(seen))
"""


@pytest.mark.parametrize("exchange", ["exchange", "fallback"])
def test_kill_leaves_one_adapter_or_the_other(exchange, tmp_path):
    """A child that saves two adapters in turn is killed at 40 moments."""
    ran = run_python(
        "-c", KILL, str(tmp_path / "adapter"), "40", exchange, PYTHONPATH=str(Path(__file__).parent)
    )
    assert ran.returncode == 0, ran.stderr
    cut, _, seen = map(int, ran.stdout.split())
    assert cut >= 10, "too few kills fell into a save"
    assert seen == 2


WRITER = """
import sys
from helpers_files import trained
pair = [trained(draw=i, rank=i + 1, alpha=float(i + 1), seed=i) for i in range(2)]
for i in range(int(sys.argv[2])):
    pair[i % 2].save(sys.argv[1])
"""


def test_load_beside_saves_sees_one_adapter_or_the_other(tmp_path):
    """Config, weights and state are of one save, whenever the folder is exchanged."""
    folder = tmp_path / "adapter"
    pair = [trained(draw=i, rank=i + 1, alpha=float(i + 1), seed=i) for i in range(2)]
    want = [(weight_bits(each), each.config) for each in pair]
    pair[0].save(folder)
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    seen = []
    with subprocess.Popen([sys.executable, "-c", WRITER, str(folder), "120"], env=env) as writer:
        while writer.poll() is None:
            loaded = le.MicroLoRA.load(folder)  # a dropped state is a warning, hence an error
            seen.append(want.index((weight_bits(loaded), loaded.config)))
    assert writer.returncode == 0
    assert min(seen.count(0), seen.count(1)) > 10


@without_exchange
@pytest.mark.parametrize("name", [CONFIG, WEIGHTS, STATE])
def test_load_that_a_save_overtakes_begins_anew(name, exchange_or_not, tmp_path, monkeypatch):
    """The folder is replaced, and the old one cleared away, just before one file is read."""
    newer = trained(draw=9, rank=3, alpha=1.5, seed=4)
    folder = saved(tmp_path)
    read_at, saves = atomic._read_at, []

    def overtaken(handle, wanted, limit):
        if wanted == name and not saves:
            saves.append(newer.save(folder))
        return read_at(handle, wanted, limit)

    monkeypatch.setattr(atomic, "_read_at", overtaken)
    loaded = le.MicroLoRA.load(folder)
    assert (weight_bits(loaded), loaded.config) == (weight_bits(newer), newer.config)


@without_exchange
def test_leftovers_of_a_dead_saver_are_swept(exchange_or_not, tmp_path):
    folder = saved(tmp_path)
    gone = tmp_path / f".adapter.tmp-{dead_pid()}-0"
    alive = tmp_path / f".adapter.tmp-{os.getppid()}-0"
    other = tmp_path / f".adapter2.tmp-{dead_pid()}-0"
    aside = tmp_path / ".adapter.old"
    for left in (gone, alive, other, aside):
        left.mkdir()
        (left / WEIGHTS).write_bytes(b"half")
    trained(draw=9).save(folder)
    assert set(os.listdir(tmp_path)) == {"adapter", alive.name, other.name}
    assert weight_bits(le.MicroLoRA.load(folder)) == KEPT


@without_exchange
@pytest.mark.parametrize("at", [0, 1, 2])
@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError, OSError])
def test_interrupted_write_leaves_the_old(exchange_or_not, at, error, tmp_path, monkeypatch):
    folder = saved(tmp_path)
    (folder / "notes.txt").write_text("kept")
    before = contents(folder)
    calls = []

    def write(path, data):
        calls.append(path.name)
        path.write_bytes(data[: len(data) // 2])
        if len(calls) > at:
            raise error("cut short")

    monkeypatch.setattr(atomic, "write_file", write)
    with pytest.raises(error, match="cut short"):
        trained(draw=9).save(folder)
    assert len(calls) == at + 1
    assert contents(folder) == before
    with pytest.raises(error, match="cut short"):
        trained(draw=9).save(tmp_path / "new")
    assert os.listdir(tmp_path) == ["adapter"]


@without_exchange
@pytest.mark.parametrize("at", [0, 1])
def test_interrupted_rename_leaves_the_old(exchange_or_not, at, tmp_path, monkeypatch):
    folder = saved(tmp_path)
    before = contents(folder)
    rename, calls = os.rename, []

    def interrupted(a, b):
        calls.append(b)
        if len(calls) == at + 1:
            raise KeyboardInterrupt
        rename(a, b)

    monkeypatch.setattr(os, "rename", interrupted)
    if exchange_or_not:
        trained(draw=9).save(folder)
        assert not calls
        return
    with pytest.raises(KeyboardInterrupt):
        trained(draw=9).save(folder)
    assert contents(folder) == before
    assert os.listdir(tmp_path) == ["adapter"]


def test_fallback_replaces_and_recovers(tmp_path, monkeypatch):
    monkeypatch.setattr(atomic, "_exchange", lambda a, b: False)
    folder = saved(tmp_path)
    (folder / "notes.txt").write_text("kept")
    trained(draw=9).save(folder)
    assert weight_bits(le.MicroLoRA.load(folder)) == KEPT
    assert os.listdir(tmp_path) == ["adapter"]
    for finish in (lambda: None, lambda: trained(draw=9).save(folder)):
        folder.rename(tmp_path / ".adapter.old")  # as a kill between the two renames leaves it
        finish()
        assert weight_bits(le.MicroLoRA.load(folder)) == KEPT
        assert (folder / "notes.txt").read_text() == "kept"
        assert os.listdir(tmp_path) == ["adapter"]


def test_recovery_prefers_the_folder_that_is_there(tmp_path):
    folder = saved(tmp_path)
    shutil.copytree(folder, tmp_path / ".adapter.old")
    trained(draw=9).save(tmp_path / "other")
    shutil.copy(tmp_path / "other" / WEIGHTS, tmp_path / ".adapter.old" / WEIGHTS)
    assert weight_bits(le.MicroLoRA.load(folder)) == OWN


@pytest.mark.parametrize(
    ("code", "falls_back"),
    [(errno.EINVAL, True), (errno.ENOSYS, True), (errno.EPERM, True), (errno.EIO, False)],
    ids=lambda v: errno.errorcode[v] if v in errno.errorcode and v is not True else "",
)
def test_system_without_exchange(code, falls_back, tmp_path, monkeypatch):
    import ctypes

    class Library:
        @staticmethod
        def renameat2(*args):
            ctypes.set_errno(code)
            return -1

    folder = saved(tmp_path)
    before = contents(folder)
    monkeypatch.setattr(ctypes, "CDLL", lambda *args, **kwargs: Library)
    if falls_back:
        trained(draw=9).save(folder)
        assert weight_bits(le.MicroLoRA.load(folder)) == KEPT
    else:
        with pytest.raises(OSError, match="adapter") as caught:
            trained(draw=9).save(folder)
        assert caught.value.errno == code
        assert contents(folder) == before
    assert os.listdir(tmp_path) == ["adapter"]


@pytest.mark.parametrize("exists", [True, False], ids=["old", "new"])
def test_parent_that_cannot_be_written(exists, tmp_path, monkeypatch):
    """Root may write anywhere, so the refusal is played."""
    folder = tmp_path / "adapter"
    if exists:
        trained().save(folder)
    before = contents(folder) if exists else None

    def refuse(path, *args):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(os, "mkdir", refuse)
    with pytest.raises(PermissionError, match=r"Permission denied: .*adapter"):
        trained(draw=9).save(folder)
    assert (contents(folder) if folder.exists() else None) == before
    assert os.listdir(tmp_path) == (["adapter"] if exists else [])


def test_two_threads_may_save_one_folder(tmp_path):
    import threading

    folder = saved(tmp_path)
    (folder / "notes.txt").write_text("kept")
    errors = []

    def save(draw):
        try:
            lora = trained(draw=draw)
            for _ in range(20):
                lora.save(folder)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=save, args=(draw,)) for draw in (0, 9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert weight_bits(le.MicroLoRA.load(folder)) in (OWN, KEPT)
    assert (folder / "notes.txt").read_text() == "kept"
    assert os.listdir(tmp_path) == ["adapter"]


def test_loaded_folder_serves_like_the_saved(tmp_path):
    lora = trained()
    loaded = le.MicroLoRA.load(saved(tmp_path, lora))
    x = np.random.default_rng(0).standard_normal((3, 6)).astype("f4")
    A, B, s = lora.weights("q")
    out = np.full((3, 5), np.nan, "f4")
    loaded.forward(x, "q", out=out)
    assert delta_error(out, reference.lora_delta(x, A, B, s), magnitude(f64(x), A, B, s)) <= 1e-6
