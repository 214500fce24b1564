"""Adapter folders: round trips, the state file, where a folder may lie."""

from __future__ import annotations

import errno
import json
import os
import stat
from pathlib import Path

import numpy as np
import pytest
from helpers_files import (
    FILES,
    KEPT,
    OWN,
    STATE,
    WEIGHTS,
    contents,
    dead_pid,
    header_of,
    load_dropping,
    raw_safetensors,
    saved,
    steps_of,
    trained,
    weight_bits,
)

import lora_engine as le
from lora_engine import atomic

# ---- round trips ------------------------------------------------------------

CASES = {
    "r2": {},
    "r1-dropout-seed": {"rank": 1, "alpha": 2.5, "dropout": 0.25, "seed": 2**64 - 1},
    "r3-rslora": {"rank": 3, "alpha": 7.0, "use_rslora": True, "gradient_checkpointing": True},
    "shapes": {"target_modules": ("b", "a", "c"), "shapes": {"a": (3, 5), "c": (6, 11)}},
    "names": {"target_modules": ("model.layers.0.q_proj", "größe.投影", "lora_A.weight", "a b")},
}
cases = pytest.mark.parametrize("case", CASES)


@cases
def test_folder_round_trip(case, tmp_path):
    lora = trained(**CASES[case])
    folder = saved(tmp_path, lora)
    assert set(contents(folder)) == FILES
    loaded = le.MicroLoRA.load(folder)
    assert loaded.config == lora.config
    assert weight_bits(loaded) == weight_bits(lora)


@cases
def test_bytes_round_trip(case):
    lora, other = trained(**CASES[case]), trained(draw=9, **CASES[case])
    assert weight_bits(other) != weight_bits(lora)
    data = lora.export_weights()
    other.import_weights(data)
    assert weight_bits(other) == weight_bits(lora)
    names = {
        f"base_model.model.{name}.lora_{which}.weight"
        for name in lora.config.target_modules
        for which in "AB"
    }
    assert set(header_of(data)) - {"__metadata__"} == names


@pytest.mark.parametrize(
    "form", [bytes, bytearray, memoryview, lambda b: memoryview(bytearray(b * 2))[: len(b)]],
    ids=["bytes", "bytearray", "memoryview", "memoryview-of-part"],
)  # fmt: skip
def test_import_takes_any_bytes(form):
    lora, other = trained(), trained(draw=9)
    other.import_weights(form(lora.export_weights()))
    assert weight_bits(other) == weight_bits(lora)


def test_import_of_something_else_is_a_type_error():
    for data in ("text", 3, None, np.zeros(8, "u1"), [1, 2]):
        with pytest.raises(TypeError, match="data: expected bytes, got"):
            trained().import_weights(data)


def test_import_drops_what_waits():
    lora = trained()
    lora.adapt(np.ones(6, "f4"), le.Feedback.from_gradient(np.ones(5, "f4")), "q")
    lora.import_weights(trained(draw=9).export_weights())
    assert lora.apply_updates(lr=0.1).note == "nothing was accumulated"
    assert weight_bits(lora) == weight_bits(trained(draw=9))


@cases
def test_same_adapter_gives_the_same_bytes(case, tmp_path):
    lora = trained(**CASES[case])
    assert lora.export_weights() == trained(**CASES[case]).export_weights()
    first = contents(saved(tmp_path / "1", lora))
    assert contents(saved(tmp_path / "2", trained(**CASES[case]))) == first
    again = le.MicroLoRA.load(tmp_path / "1" / "adapter")
    assert contents(saved(tmp_path / "3", again)) == first
    assert first[WEIGHTS] == lora.export_weights()


def test_steps_survive_and_dropout_goes_on(tmp_path):
    """A loaded adapter draws the masks that the saved one would have drawn."""
    lora = trained(dropout=0.5, seed=3)
    x, feedback = np.ones((2, 6), "f4"), le.Feedback.from_gradient(np.ones((2, 5), "f4"))
    for _ in range(3):
        assert lora.adapt(x, feedback, "q", lr=0.1).applied
    loaded = le.MicroLoRA.load(saved(tmp_path, lora))
    fresh = trained(dropout=0.5, seed=3)
    fresh.import_weights(lora.export_weights())
    for each in (lora, loaded, fresh):
        assert each.adapt(x, feedback, "q", lr=0.1).applied
    assert weight_bits(loaded) == weight_bits(lora)
    assert weight_bits(fresh) != weight_bits(lora)


# ---- the state file ---------------------------------------------------------


def stepped(**config) -> le.MicroLoRA:
    lora = trained(seed=5, **config)
    x, feedback = np.ones((2, 6), "f4"), le.Feedback.from_gradient(np.ones((2, 5), "f4"))
    assert lora.adapt(x, feedback, "q", lr=0.1).applied
    return lora


def test_state_of_other_weights_is_dropped(tmp_path):
    folder = saved(tmp_path, stepped())
    (folder / WEIGHTS).write_bytes(trained(draw=9).export_weights())
    lora = load_dropping(folder, "it belongs to other weights")
    assert weight_bits(lora) == weight_bits(trained(draw=9))
    assert steps_of(lora) == {"q": 0}
    assert lora.config.seed == 0


def test_folder_without_state_loads(tmp_path):
    lora = stepped()
    folder = saved(tmp_path, lora)
    (folder / STATE).unlink()
    loaded = le.MicroLoRA.load(folder)
    assert weight_bits(loaded) == weight_bits(lora)
    assert steps_of(loaded) == {"q": 0}


COUNT = {"q": {"dtype": "I64", "shape": [1], "data_offsets": [0, 8]}}


def state(digest: str, **own) -> bytes:
    """A state file of those weights."""
    return raw_safetensors(
        COUNT, bytes(8), {"lora_engine": json.dumps({"weights_sha256": digest, **own})}
    )


def counts(digest: str, dtype: str, shape: list[int], payload: bytes) -> bytes:
    entries = {"q": {"dtype": dtype, "shape": shape, "data_offsets": [0, len(payload)]}}
    own = json.dumps({"weights_sha256": digest})
    return raw_safetensors(entries, payload, {"lora_engine": own})


STATES = {
    "empty": b"",
    "random": bytes(range(256)),
    "no-metadata": lambda d: raw_safetensors(COUNT, bytes(8)),
    "null-metadata": lambda d: raw_safetensors(COUNT, bytes(8), None),
    "text-metadata": lambda d: raw_safetensors(COUNT, bytes(8), {"lora_engine": "{"}),
    "list-metadata": lambda d: raw_safetensors(COUNT, bytes(8), {"lora_engine": "[]"}),
    "deep-metadata": lambda d: raw_safetensors(COUNT, bytes(8), {"lora_engine": "[" * 100_000}),
    "negative-count": lambda d: counts(d, "I64", [1], b"\xff" * 8),
    "nan-count": lambda d: counts(d, "F64", [1], np.float64(np.nan).tobytes()),
    "matrix-of-counts": lambda d: counts(d, "I64", [1, 1], bytes(8)),
    "no-count": lambda d: counts(d, "I64", [0], b""),
    "seed-too-large": lambda d: state(d, seed=2**64),
    "seed-negative": lambda d: state(d, seed=-1),
    "seed-text": lambda d: state(d, seed="1"),
    "checkpointing-text": lambda d: state(d, gradient_checkpointing="false"),
}


def digest_of(folder: Path) -> str:
    """What the state file says of the weights."""
    own = header_of((folder / STATE).read_bytes())["__metadata__"]["lora_engine"]
    return json.loads(own)["weights_sha256"]


@pytest.mark.parametrize("what", STATES)
def test_damaged_state_is_dropped(what, tmp_path):
    lora = stepped()
    folder = saved(tmp_path, lora)
    made = STATES[what]
    (folder / STATE).write_bytes(made(digest_of(folder)) if callable(made) else made)
    loaded = load_dropping(folder, "")
    assert weight_bits(loaded) == weight_bits(lora)
    assert steps_of(loaded) == {"q": 0}
    assert loaded.config.seed == 0


def test_state_of_unknown_modules_is_no_harm(tmp_path):
    folder = saved(tmp_path, trained())
    entries = {
        name: {"dtype": "I64", "shape": [1], "data_offsets": [8 * i, 8 * i + 8]}
        for i, name in enumerate(("other", "q"))
    }
    own = {"lora_engine": json.dumps({"weights_sha256": digest_of(folder)})}
    (folder / STATE).write_bytes(raw_safetensors(entries, np.array([3, 4]).tobytes(), own))
    assert steps_of(le.MicroLoRA.load(folder)) == {"q": 4}


# ---- where a folder may lie -------------------------------------------------


@pytest.mark.parametrize("name", ["plain", "größe 投影", "u[1]*?", "-rf", "a.tmp-1-b", ".hidden"])
def test_folder_names(name, tmp_path):
    folder = tmp_path / "deep" / name
    trained(draw=9).save(folder)
    (tmp_path / "deep" / f".{name}.tmp-{dead_pid()}-x").mkdir()
    trained().save(str(folder) + "/")
    assert os.listdir(tmp_path / "deep") == [name]  # the leftover is swept, whatever the name
    assert weight_bits(le.MicroLoRA.load(str(folder) + "/")) == OWN


def test_relative_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trained().save("a")
    trained(draw=9).save("./b/../a/")
    assert set(os.listdir(tmp_path)) - {"b"} == {"a"}
    assert weight_bits(le.MicroLoRA.load("a")) == KEPT


def test_link_to_a_folder_stays_a_link(tmp_path):
    trained().save(tmp_path / "real")
    (tmp_path / "link").symlink_to("real")
    trained(draw=9).save(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    for name in ("link", "real"):
        assert weight_bits(le.MicroLoRA.load(tmp_path / name)) == KEPT
    assert sorted(os.listdir(tmp_path)) == ["link", "real"]
    (tmp_path / "new").symlink_to("made-later")
    trained().save(tmp_path / "new")
    assert weight_bits(le.MicroLoRA.load(tmp_path / "made-later")) == OWN


def test_working_folder_is_refused(tmp_path, monkeypatch):
    """To replace it would leave this process, and the shell above it, nowhere."""
    folder = saved(tmp_path)
    (folder / "sub").mkdir()
    before = contents(folder)
    for here, target in [(folder, "."), (folder, folder), (folder / "sub", ".."), (folder, "/")]:
        monkeypatch.chdir(here)
        with pytest.raises(ValueError, match="working folder"):
            trained(draw=9).save(target)
    assert contents(folder) == before
    assert os.listdir(tmp_path) == ["adapter"]


def test_file_in_the_folders_place_is_kept(tmp_path):
    (tmp_path / "a").write_text("mine")
    with pytest.raises(OSError, match="Not a directory"):
        trained().save(tmp_path / "a")
    assert (tmp_path / "a").read_text() == "mine"
    assert os.listdir(tmp_path) == ["a"]


def test_whatever_else_lies_in_the_folder_is_kept(tmp_path):
    folder = saved(tmp_path)
    (folder / "notes.txt").write_text("notes")
    (folder / "sub" / "deeper").mkdir(parents=True)
    (folder / "sub" / "deeper" / "weights.bin").write_bytes(b"\1\2\3")
    (folder / "sub" / "up").symlink_to("../notes.txt")
    (folder / "dangling").symlink_to("nowhere")
    (tmp_path / "elsewhere").mkdir()
    (folder / "link").symlink_to(tmp_path / "elsewhere")
    os.mkfifo(folder / "pipe")
    inodes = [(folder / n).stat().st_ino for n in ("notes.txt", "sub/deeper/weights.bin")]
    for draw in (9, 0):
        trained(draw=draw).save(folder)
    names = {"notes.txt", "sub", "dangling", "link", "pipe"}
    assert set(os.listdir(folder)) == FILES | names
    assert os.readlink(folder / "dangling") == "nowhere"
    assert os.readlink(folder / "link") == str(tmp_path / "elsewhere")
    assert os.readlink(folder / "sub" / "up") == "../notes.txt"
    assert stat.S_ISFIFO((folder / "pipe").lstat().st_mode)
    assert (folder / "notes.txt").read_text() == "notes"
    # The same files, not copies: a folder of checkpoints costs nothing.
    after = [(folder / n).stat().st_ino for n in ("notes.txt", "sub/deeper/weights.bin")]
    assert after == inodes
    assert sorted(os.listdir(tmp_path)) == ["adapter", "elsewhere"]


def test_files_are_copied_where_there_are_no_hard_links(tmp_path, monkeypatch):
    folder = saved(tmp_path)
    (folder / "sub").mkdir()
    (folder / "sub" / "file").write_text("kept")
    (folder / "notes.txt").write_text("kept too")
    (folder / "dangling").symlink_to("nowhere")

    def refuse(*args, **kwargs):
        raise OSError(errno.EPERM, "no hard links here")

    monkeypatch.setattr(os, "link", refuse)
    trained(draw=9).save(folder)
    assert (folder / "sub" / "file").read_text() == "kept"
    assert (folder / "notes.txt").read_text() == "kept too"
    assert os.readlink(folder / "dangling") == "nowhere"
    assert weight_bits(le.MicroLoRA.load(folder)) == KEPT


def test_permissions_are_kept(tmp_path):
    folder = saved(tmp_path)
    for mode in (0o700, 0o750, 0o2775):
        folder.chmod(mode)
        trained(draw=9).save(folder)
        assert stat.S_IMODE(folder.stat().st_mode) == mode


@pytest.mark.parametrize("mask", [0o022, 0o077], ids=oct)
def test_new_folder_has_the_umask(mask, tmp_path):
    before = os.umask(mask)
    try:
        folder = saved(tmp_path)
    finally:
        os.umask(before)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o777 & ~mask
    for name in FILES:
        assert stat.S_IMODE((folder / name).stat().st_mode) == 0o666 & ~mask


@pytest.mark.parametrize("where", ["", "/sub", "/sub/deeper"], ids=["itself", "sub", "deeper"])
def test_folder_with_a_mount_in_it_is_refused(where, tmp_path, monkeypatch):
    """To clear the old folder away would empty what is mounted there."""
    folder = tmp_path / "a b"
    trained().save(folder)
    before = contents(folder)
    point = os.fsencode(f"{folder}{where}").replace(b" ", rb"\040")
    lines = b"22 27 0:21 / /proc rw - proc proc rw\n36 35 98:0 / %s rw - ext4 /dev/x rw\n" % point
    read = Path.read_bytes
    monkeypatch.setattr(
        Path, "read_bytes", lambda p: lines if str(p) == "/proc/self/mountinfo" else read(p)
    )
    with pytest.raises(OSError, match="mount points") as caught:
        trained(draw=9).save(folder)
    assert caught.value.errno == errno.EBUSY
    assert caught.value.filename == str(folder)
    assert contents(folder) == before
    trained(draw=9).save(tmp_path / "a")  # a longer name beside it is no matter
    trained(draw=9).save(tmp_path / "a b c")


def test_mounts_of_this_machine_are_seen():
    assert atomic._has_mounts(Path("/proc"))
    assert atomic._has_mounts(Path("/"))
    assert not atomic._has_mounts(Path("/proc/self"))
