"""AdapterStore: kills, forks, a second process."""

from __future__ import annotations

import os
import time

import pytest
from helpers_files import run_python
from helpers_store import drawn, open_store, put, same

import lora_engine as le

# ---- kills ------------------------------------------------------------------

# Round by round a child gives 12 users (3 resident) adapters that hold one number in every place,
# and notes which number was flushed; it is killed at any moment.
KILL = """
import mmap, os, random, signal, sys, time, warnings
import numpy as np
import lora_engine as le

warnings.simplefilter("error")
folder, rounds, USERS = sys.argv[1], int(sys.argv[2]), 12
tried, flushed = (np.frombuffer(mmap.mmap(-1, 8 * USERS), np.int64) for _ in range(2))

def open_store():
    return le.AdapterStore(folder, 3, in_features=12, out_features=7)

def work(seed):
    rng = random.Random(seed)
    store = open_store()
    while True:
        some = rng.sample(range(USERS), 4)
        for i in some:
            slot = store.slot(f"user {i}")
            tried[i] += 1
            n = float(tried[i])
            store.pool.set(slot, np.full((2, 12), n, "f4"), np.full((7, 2), n, "f4"), n)
        before = tried.copy()
        if rng.random() < 0.5:
            store.flush()
            flushed[:] = before

def unfinished():
    names = [name for _, _, names in os.walk(folder) for name in names]
    return {name for name in names if "safetensors.tmp-" in name}

rng, cut, moved, lost = random.Random(0), 0, 0, 0
for n in range(rounds):
    before = unfinished()
    child = os.fork()
    if not child:
        work(n)
    time.sleep(rng.uniform(0.005, 0.1))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    cut += bool(unfinished() - before)
    with open_store() as store:
        for i in range(USERS):
            slot = store.slot(f"user {i}", create=False)
            found = 0
            if slot >= 0:
                A, B, found = store.pool.get(slot)
                assert (A == found).all() and (B == found).all(), (A, B, found)
            assert flushed[i] <= found <= tried[i], (i, flushed[i], found, tried[i])
            moved += found > flushed[i]
            lost += found < tried[i]
            tried[i] = flushed[i] = found
        assert not store.damaged
print(cut, moved, lost)
"""


def test_a_hundred_kills_lose_only_what_was_not_flushed_and_halve_nothing(tmp_path):
    done = run_python("-c", KILL, str(tmp_path / "store"), "100")
    assert done.returncode == 0, done.stderr
    cut, moved, lost = map(int, done.stdout.split())
    assert cut > 5  # they hit writes
    assert moved  # and some had been written without a flush
    assert lost


# ---- a second process, a fork -----------------------------------------------

OPEN = """
import sys, lora_engine as le
try:
    le.AdapterStore(sys.argv[1], in_features=12, out_features=7)
except le.StoreLocked as error:
    print(error.pid, error, sep="\\n")
"""


def test_a_second_process_is_told_who_holds_it(tmp_path):
    with open_store(tmp_path) as store:
        put(store, "a", 1)
        done = run_python("-c", OPEN, str(tmp_path / "store"))
        pid, message = done.stdout.splitlines()
        assert int(pid) == os.getpid()
        assert message == (
            f"AdapterStore: folder: expected one that is not open, got {tmp_path / 'store'}:"
            f" process {os.getpid()} holds it"
        )
        with pytest.raises(le.StoreLocked, match=f"process {os.getpid()} holds it"):
            open_store(tmp_path)
        assert same(store.pool.get(store.slot("a")), drawn(1))
    assert run_python("-c", OPEN, str(tmp_path / "store")).stdout == ""


def test_a_lock_that_a_dead_process_left_is_in_nobodys_way(tmp_path):
    open_store(tmp_path).close()
    (tmp_path / "store" / "lock").write_text(f"{os.getpid()}\n")
    open_store(tmp_path).close()


FORK = """
import os, sys, time, lora_engine as le
import numpy as np
store = le.AdapterStore(sys.argv[1], 2, in_features=12, out_features=7)
slot = store.slot("a")
store.pool.set(slot, np.ones((2, 12), "f4"), np.ones((7, 2), "f4"), 1.0)
store._residents.lock.acquire()  # as another thread may
child = os.fork()
if child:
    print(child, flush=True)
    os._exit(0)  # and the child lives on
nowhere = os.open(os.devnull, os.O_RDWR)
os.dup2(nowhere, 1)
os.dup2(nowhere, 2)
for call in (lambda: store.slot("a"), store.flush):
    try:
        call()
    except RuntimeError as error:
        assert "is a fork of" in str(error)
    else:
        os._exit(1)
store.close()
open(sys.argv[2], "w").close()
time.sleep(60)
"""


def test_a_fork_neither_uses_the_store_nor_holds_it(tmp_path):
    done = run_python("-c", FORK, str(tmp_path / "store"), str(tmp_path / "tried"))
    assert done.returncode == 0, done.stderr
    child = int(done.stdout)
    try:
        until = time.monotonic() + 30
        while not (tmp_path / "tried").exists():
            assert time.monotonic() < until
            os.kill(child, 0)
            time.sleep(0.01)
        with open_store(tmp_path) as store:  # its parent is dead, it is not
            assert store.slot("a", create=False) == -1  # the child has written nothing
        os.kill(child, 0)
    finally:
        os.kill(child, 9)
