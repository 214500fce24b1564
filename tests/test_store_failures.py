"""AdapterStore: full disks, damage, threads."""

from __future__ import annotations

import errno
import json
import os
import threading
import time

import numpy as np
import pytest
from helpers_store import drawn, file_of, open_store, put, same

import lora_engine as le
from lora_engine import atomic
from lora_engine.adapters import store_file
from lora_engine.adapters.store_file import Shape, Stored

# ---- a full disk ------------------------------------------------------------


class FullDisk:
    """``atomic.replace_file`` that has no room for an adapter while ``full``."""

    def __init__(self, monkeypatch):
        self.full, self._write = False, atomic.replace_file
        monkeypatch.setattr(atomic, "replace_file", self)

    def __call__(self, path, write):
        if self.full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        self._write(path, write)


@pytest.fixture
def disk(monkeypatch):
    return FullDisk(monkeypatch)


def test_on_a_full_disk_what_has_changed_stays_and_the_error_surfaces(disk, tmp_path):
    store = open_store(tmp_path, 3)
    put(store, "clean", 0)
    store.flush()
    disk.full = True
    for i, user in enumerate("ab"):
        put(store, user, i)
    slots = [store.slot(user) for user in "ab"]
    with pytest.raises(OSError, match=r"2 of 2 changed adapters stay resident.*No space") as full:
        store.flush()
    assert full.value.errno == errno.ENOSPC
    put(store, "c", 2)  # in the place of the clean one
    for attempt in (lambda: store.slot("clean"), lambda: store.slot("new"), store.close):
        with pytest.raises(OSError, match="No space left"):
            attempt()
    assert [store.slot(user) for user in "ab"] == slots
    assert all(same(store.pool.get(store.slot(u)), drawn(i)) for i, u in enumerate("abc"))
    disk.full = False
    assert store.flush() == 3
    assert same(store.pool.get(store.slot("clean")), drawn(0))
    store.close()
    with open_store(tmp_path) as again:
        assert all(same(again.pool.get(again.slot(u)), drawn(i)) for i, u in enumerate("abc"))


def test_what_the_background_could_not_write_is_told_at_a_miss(disk, tmp_path):
    store = open_store(tmp_path, 8)
    disk.full = True
    put(store, "a", 1)
    for user in "bcdefgh":
        store.slot(user)
    store.slot("i")  # makes room, and has the next to leave written
    store._residents._sweep.result()
    with pytest.warns(UserWarning, match=r"No space left.*stays resident"):
        [store.slot(user) for user in "jklm"]
    assert same(store.pool.get(store.slot("a")), drawn(1))
    disk.full = False
    store.close()
    with open_store(tmp_path) as again:
        assert same(again.pool.get(again.slot("a")), drawn(1))


# ---- damage -----------------------------------------------------------------


def write_other(**changes):
    """An adapter's file with a digest that is right, and something else that is not."""
    A, B, scaling = drawn(1)
    content = {"user": "a", "A": [A], "B": [B], "scaling": scaling, "state": {}, "dtype": "float32"}
    user, A, B, scaling, state, dtype = {**content, **changes}.values()
    return b"".join(store_file.encode(user, Stored(A, B, scaling, state), dtype))


def nan_at_the_end(array):
    array.reshape(-1)[-1] = np.nan
    return array


DAMAGE = {
    "empty": (lambda data: b"", "expected safetensors, got 0 bytes"),
    "cut": (lambda data: data[:-1], "expected offsets in"),
    "longer": (lambda data: data + b"\0", "expected safetensors of"),
    "noise": (lambda data: bytes(range(256)), "header: expected at most"),
    "no metadata": (lambda data: data.replace(b"__metadata__", b"__metadatA__"), "__metadatA__"),
    "header bomb": (lambda data: b"\xff" * 8 + data[8:], "header: expected at most"),
    "another user": (lambda data: write_other(user="b"), "user: expected 'a', got 'b'"),
    "shape": (lambda data: write_other(A=[drawn(1)[0][:, 1:]]), r"lora_A.0: expected .*\[2, 12\]"),
    "ranks": (lambda data: write_other(B=[drawn(1, 3)[1]]), r"lora_B.0: expected .*\[7, 2\]"),
    "dtype": (lambda data: write_other(dtype="float16"), "lora_A.0: expected float32"),
    "no B": (lambda data: write_other(B=[None]), "lora_B.0: missing"),
    "nothing": (lambda data: write_other(A=[None], B=[None]), "lora_A.0: missing"),
    "second slice": (
        lambda data: write_other(A=[drawn(1)[0]] * 2, B=[drawn(1)[1]] * 2),
        "lora_A.1: expected no such key",
    ),
    "NaN": (lambda data: write_other(A=[nan_at_the_end(drawn(1)[0])]), "lora_A.0: expected finite"),
    "scaling": (lambda data: write_other(scaling=float("inf")), "scaling: expected a finite"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_user_whose_file_is_damaged_is_served_the_base_and_reported(kind, tmp_path):
    change, why = DAMAGE[kind]
    with open_store(tmp_path) as store:
        put(store, "a", 1)
        put(store, "b", 2)
    path = file_of(tmp_path, "a")
    damaged = change(path.read_bytes())
    path.write_bytes(damaged)
    with open_store(tmp_path) as store:
        with pytest.warns(UserWarning, match=f"user 'a' is served the base: .*{why}"):
            assert store.slot("a") == -1
        assert list(store.damaged) == ["a"]
        assert str(path) in store.damaged["a"]
        with store.slots(["a", "b"]) as ids:  # told once
            assert ids[0] == -1
            assert same(store.pool.get(int(ids[1])), drawn(2))
            x = np.ones((2, 12), "f4")
            y = store.pool.forward(x, ids)
            assert not y[0].any()
            assert store.pool.adapt(x, np.ones((2, 7), "f4"), ids, lr=0.1).applied.tolist() == [
                False,
                True,
            ]
        store.flush()
        assert path.read_bytes() == damaged  # for whoever wants to mend it
        assert store.remove("a")
        assert not store.damaged
        put(store, "a", 3)
    with open_store(tmp_path) as store:
        assert same(store.pool.get(store.slot("a")), drawn(3))


def test_every_flipped_bit_is_noticed():
    data = bytearray(write_other(state={"x": np.ones(3, np.float32)}))
    shape = Shape(12, (7,), "float32")
    (A,), (B,), scaling, _ = store_file.decode(bytes(data), "a", shape, "f")
    assert same((A, B, scaling), drawn(1))
    for at in range(len(data)):
        data[at] ^= 1 << at % 8
        with pytest.raises(le.FormatError, match=r"^f: "):
            store_file.decode(bytes(data), "a", shape, "f")
        data[at] ^= 1 << at % 8


def test_files_that_changed_places_serve_nobody_anothers_adapter(tmp_path):
    with open_store(tmp_path) as store:
        put(store, "a", 1)
        put(store, "b", 2)
    a, b = (file_of(tmp_path, user) for user in "ab")
    content = a.read_bytes()
    a.write_bytes(b.read_bytes())
    b.write_bytes(content)
    with open_store(tmp_path) as store:
        for user in "ab":
            with pytest.warns(UserWarning, match="user: expected"):
                assert store.slot(user) == -1


@pytest.mark.parametrize("kind", ["pipe", "folder"])
def test_what_is_no_plain_file_is_damage(kind, tmp_path):
    with open_store(tmp_path) as store:
        path = file_of(tmp_path, "a")
        path.parent.mkdir(parents=True)
        os.mkfifo(path) if kind == "pipe" else path.mkdir()
        with pytest.warns(UserWarning, match="expected a plain file"):
            assert store.slot("a") == -1


def test_what_cannot_be_read_raises_and_is_read_again(monkeypatch, tmp_path):
    with open_store(tmp_path, 1) as store:
        put(store, "a", 1)
        store.slot("b")

        def fail(path: str) -> bytes:
            raise OSError(errno.EIO, "Input/output error", path)

        with monkeypatch.context() as broken:
            broken.setattr(store_file, "read", fail)
            with pytest.raises(OSError, match="Input/output error"):
                store.slot("a")
        assert not store.damaged
        assert same(store.pool.get(store.slot("a")), drawn(1))


# ---- the store's own settings -----------------------------------------------


@pytest.mark.parametrize(
    "other",
    [{"in_features": 13}, {"out_features": 8}, {"out_features": (7, 1)}, {"dtype": "float16"}],
)
def test_a_store_of_another_shape_is_refused_and_let_go(other, tmp_path):
    with open_store(tmp_path) as store:
        put(store, "a", 1)
    (name,) = other
    with pytest.raises(ValueError, match=f"^AdapterStore: {name}: expected .* as in .*store.json"):
        open_store(tmp_path, **other)
    with open_store(tmp_path) as store:
        assert same(store.pool.get(store.slot("a")), drawn(1))


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("", "expected JSON"),
        ("[]", "expected a JSON object"),
        ('{"format": 2}', "format: expected 1, got 2"),
        (" " * (1 << 17), "expected at most 65536 bytes"),
        (None, "expected these adapters' settings, got none"),
    ],
)
def test_damaged_settings_are_refused(text, match, tmp_path):
    with open_store(tmp_path) as store:
        put(store, "a", 1)
    settings = tmp_path / "store" / "store.json"
    good = settings.read_text()
    settings.unlink()
    if text is not None:
        settings.write_text(text)
    with pytest.raises(le.FormatError, match=rf"^{settings}: {match}"):
        open_store(tmp_path)
    settings.write_text(good)
    open_store(tmp_path).close()
    assert json.loads(good) == {"format": 1, "in_features": 12, "out_features": [7],
                                "dtype": "float32"}  # fmt: skip


# ---- threads ----------------------------------------------------------------


def test_eight_threads_hit_evict_and_teach_and_no_step_is_lost_or_anothers(tmp_path):
    """Every step moves its own user's B by one number, in all of its places."""
    users, steps = 48, 60
    taught = np.zeros((8, users), int)
    errors: list[BaseException] = []
    x, grad = np.zeros((1, 12), "f4"), -np.ones((1, 7), "f4")
    x[0, 0] = 1.0

    def teach(thread: int, store: le.AdapterStore) -> None:
        rng = np.random.default_rng(thread)
        try:
            for _ in range(steps):
                some = rng.choice(users, 2, replace=False)
                with store.slots([f"u{i}" for i in some]) as ids:
                    for i, slot in zip(some, ids, strict=True):
                        assert store.pool.get(int(slot))[0][1, 0] == i  # whose it is
                        store.pool.adapt(x, grad, np.array([slot]), lr=1.0, train_A=False)
                        taught[thread, i] += 1
        except BaseException as error:
            errors.append(error)

    with open_store(tmp_path, 20) as store:
        for i in range(users):
            A = np.zeros((2, 12), "f4")
            A[0, 0], A[1, 0] = 1.0, i
            store.pool.set(store.slot(f"u{i}"), A, np.zeros((7, 2), "f4"), 1.0)
        threads = [threading.Thread(target=teach, args=(n, store)) for n in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not errors, errors
    with open_store(tmp_path, 20) as store:
        for i in range(users):
            B = store.pool.get(store.slot(f"u{i}"))[1]
            assert (B[:, 0] == taught[:, i].sum()).all()
    assert (taught.sum(axis=0) > 0).all()


def test_a_user_whom_many_ask_for_at_once_is_read_once(monkeypatch, tmp_path):
    with open_store(tmp_path, 2) as store:
        put(store, "a", 1)
    reads, read = [], store_file.read

    def slow(path: str) -> bytes | None:
        reads.append(path)
        time.sleep(0.05)
        return read(path)

    monkeypatch.setattr(store_file, "read", slow)
    with open_store(tmp_path, 2) as store:
        slots: list[int] = []
        threads = [threading.Thread(target=lambda: slots.append(store.slot("a"))) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(slots) == 8
        assert len(set(slots)) == len(reads) == len(store.pool) == 1
