"""Forward and adapt from several threads; fork; the thread pool."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import bits, fill_pool

import lora_engine as le

D = 4096


def run_threads(*bodies, seconds=1.5):
    """Runs each body(stop) on a thread; raises what one raised."""
    stop, errors = threading.Event(), []

    def guard(body):
        try:
            body(stop)
        except BaseException as error:
            errors.append(error)
            stop.set()

    threads = [threading.Thread(target=guard, args=(body,)) for body in bodies]
    for t in threads:
        t.start()
    until = time.monotonic() + seconds
    while any(t.is_alive() for t in threads) and time.monotonic() < until and not stop.is_set():
        time.sleep(0.01)
    stop.set()
    for t in threads:
        t.join(30)
        assert not t.is_alive()
    if errors:
        raise errors[0]


def constant_pool(value: float, **options) -> le.AdapterPool:
    """A slot whose delta of ones is the same number in every column."""
    pool = le.AdapterPool(D, D, **options)
    pool.add(*constant(value))
    return pool


def constant(value: float):
    return np.full((2, D), value, "f4"), np.full((D, 2), value, "f4"), 1.0


@pytest.mark.parametrize("rows", [1, 40])
def test_forward_sees_the_old_weights_or_the_new(rows):
    """One thread sets and rolls back; a mixed result would hold two numbers."""
    pool = constant_pool(1.0, history=1)
    x, ids = np.ones((rows, D), "f4"), np.zeros(rows, np.int32)
    seen = set()

    def serve(stop):
        y = np.empty((rows, D), "f4")
        while not stop.is_set():
            pool.forward(x, ids, out=y, accumulate=False)
            values = np.unique(y)
            assert len(values) == 1
            seen.add(float(values[0]))

    def change(stop):
        while not stop.is_set():
            pool.set(0, *constant(2.0))
            time.sleep(1e-4)
            pool.rollback(0)
            time.sleep(1e-4)

    run_threads(serve, serve, change)
    old_and_new = {2.0 * D, 8.0 * D}
    assert seen <= old_and_new if rows == 1 else seen == old_and_new


def test_forward_while_another_adapts_the_same_slot():
    """decay alone: A and B shrink by the same known factors, so every state is known."""
    pool = constant_pool(1.0)
    x, grad = np.ones((1, D), "f4"), np.zeros((1, D), "f4")
    ids = np.zeros(1, np.int32)
    states, factor = [np.float32(1.0)], np.float32(1.0) - np.float32(0.5) * np.float32(2.0**-9)
    while len(states) < 200_000 and states[-1] > 1e-12:
        states.append(states[-1] * factor)
    whole = {float(np.float32(2 * D) * v * v): i for i, v in enumerate(states)}
    last = [0]

    def serve(stop):
        y = np.empty((1, D), "f4")
        while not stop.is_set():
            pool.forward(x, ids, out=y, accumulate=False)
            values = np.unique(y)
            assert len(values) == 1
            near = min(whole, key=lambda v: abs(v - float(values[0])))
            assert abs(near - float(values[0])) <= 1e-4 * near  # one state is 0.2 % off the next
            assert whole[near] >= last[0] - 1  # time runs forward
            last[0] = whole[near]

    def learn(stop):
        for _ in range(400):
            if stop.is_set():
                return
            assert pool.adapt(x, grad, ids, 0.5, weight_decay=2.0**-9).applied.all()

    run_threads(serve, learn)
    assert pool.version(0) > 100


def test_different_slots_adapt_in_parallel_to_the_same_bits():
    rng = np.random.default_rng(0)
    x, grad = rng.standard_normal((8, 512)).astype("f4"), rng.standard_normal((8, 256)).astype("f4")
    ids = [np.full(8, slot, np.int32) for slot in range(4)]

    def taught(parallel):
        held = fill_pool(np.random.default_rng(1), 512, (256,), [2, 3, 4, 5], "bfloat16")

        def teach(slot):
            return lambda stop: [held.pool.adapt(x, grad, ids[slot], 0.01) for _ in range(50)]

        if parallel:
            run_threads(*[teach(s) for s in range(4)], seconds=20)
        else:
            for s in range(4):
                teach(s)(None)
        return [bits(m) for a in held.refresh().values() for m in (*a.A, *a.B)]

    assert taught(True) == taught(False)


def test_adds_and_removes_while_others_serve():
    """No request may get another user's weights: each slot's number names its user."""
    pool = le.AdapterPool(64, 64)

    def tagged(tag):
        return np.full((1, 64), float(tag), "f4"), np.ones((64, 1), "f4"), 1.0

    keep = [pool.add(*tagged(i)) for i in range(1, 9)]
    x, ids = np.ones((8, 64), "f4"), np.array(keep, np.int32)

    def serve(stop):
        while not stop.is_set():
            y = pool.forward(x, ids)
            assert (y == 64.0 * np.arange(1, 9, dtype="f4")[:, None]).all()

    def churn(stop):
        tag = 100
        while not stop.is_set():
            slot = pool.add(*tagged(tag))
            y = pool.forward(x[:1], np.array([slot], np.int32))
            assert (y == 64.0 * tag).all()
            pool.remove(slot)
            tag += 1

    run_threads(serve, serve, churn, churn)
    assert len(pool) == 8


def test_mixtures_of_the_same_slots_in_any_order_do_not_deadlock():
    rng = np.random.default_rng(2)
    pool, _ = fill_pool(rng, 64, (64,), [2] * 6)
    x = rng.standard_normal((30, 64)).astype("f4")

    def serve(seed):
        ids = np.random.default_rng(seed).integers(-1, 6, (30, 4)).astype(np.int32)
        return lambda stop: [pool.forward(x, ids) for _ in iter(lambda: not stop.is_set(), False)]

    def learn(stop):
        ids = np.arange(30, dtype=np.int32) % 6
        while not stop.is_set():
            pool.adapt(x, x, ids, 1e-6)

    run_threads(serve(0), serve(1), learn, learn)
    assert pool.version(0) > 1


FORK = """
    import os, sys, threading, time
    import numpy as np, lora_engine as le
    le.set_num_threads(2)
    pool = le.AdapterPool(2048, 2048)
    slots = [pool.add(np.ones((8, 2048), "f4"), np.ones((2048, 8), "f4"), 1.0) for _ in range(16)]
    ids = np.array(slots, "i4"); x = np.ones((16, 2048), "f4")
    want = pool.forward(x, ids)
    stop = False
    def serve():
        y = np.empty_like(want)
        while not stop:
            pool.forward(x, ids, out=y, accumulate=False)
            pool.adapt(x, x * 0, ids, 1e-3)
    threads = [threading.Thread(target=serve) for _ in range(2)]
    for t in threads: t.start()
    for i in range(15):
        child = os.fork()
        if child == 0:
            ok = np.array_equal(pool.forward(x, ids), want)       # on a pool of its own
            ok = ok and pool.adapt(x, x * 0, ids, 1e-3).applied.all()
            ok = ok and pool.add(np.ones((8, 2048), "f4"), np.ones((2048, 8), "f4"), 1.0) == 16
            os._exit(0 if ok else 1)
        _, status = os.waitpid(child, 0)
        assert status == 0, status
    stop = True
    for t in threads: t.join()
    assert np.array_equal(pool.forward(x, ids), want)
    print("forked", 15)
"""


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_fork_while_other_threads_serve_and_learn():
    ran = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(FORK)],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert ran.stdout.strip() == "forked 15", ran.stderr


def test_long_work_lets_other_python_threads_run():
    rng = np.random.default_rng(3)
    pool, _ = fill_pool(rng, 4096, (4096,), [64])
    x, ids = rng.standard_normal((256, 4096)).astype("f4"), np.zeros(256, np.int32)
    ticks = []

    def tick(stop):
        while not stop.is_set():
            ticks.append(time.perf_counter())
            time.sleep(0)

    inside = []

    def serve(stop):
        for _ in range(20):
            start = time.perf_counter()
            pool.forward(x, ids)
            inside.append((start, time.perf_counter()))
        stop.set()

    run_threads(tick, serve, seconds=30)
    middle = [t for t in ticks for a, b in inside if a + (b - a) * 0.25 < t < a + (b - a) * 0.75]
    assert len(middle) > 20


def cpu_seconds() -> float:
    t = os.times()
    return t.user + t.system


def test_idle_workers_park(threads):
    threads(2)
    rng = np.random.default_rng(4)
    pool, _ = fill_pool(rng, 4096, (4096,), [16] * 16)
    x, ids = rng.standard_normal((16, 4096)).astype("f4"), np.arange(16, dtype=np.int32)
    for _ in range(5):
        pool.forward(x, ids)
    time.sleep(0.01)
    before = cpu_seconds()
    time.sleep(0.5)
    assert cpu_seconds() - before < 0.1


def test_default_thread_count_is_the_affinity():
    code = """if True:
        import os
        os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])
        import lora_engine as le
        print(le.get_num_threads())"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "1"


def test_torch_path_takes_torchs_thread_count(threads):
    """Worker CPU time: with torch at one thread, one thread works, whatever ours is."""
    threads(2)
    rng = np.random.default_rng(5)
    pool, _ = fill_pool(rng, 4096, (4096,), [64] * 8)
    x = torch.from_numpy(rng.standard_normal((64, 4096)).astype("f4"))
    ids = torch.arange(64, dtype=torch.int32) % 8

    mine = str(threading.get_native_id())

    def cpu_milliseconds(task):
        return int((task / "schedstat").read_text().split()[0]) / 1e6

    def busy(count):
        before_torch = torch.get_num_threads()
        torch.set_num_threads(count)
        try:
            tasks = [t for t in Path("/proc/self/task").iterdir() if t.name != mine]
            used = {t: cpu_milliseconds(t) for t in tasks}
            for _ in range(60):
                pool.forward(x, ids)
            return sum(cpu_milliseconds(t) - before for t, before in used.items())
        finally:
            torch.set_num_threads(before_torch)

    pool.forward(x, ids)
    one, two = busy(1), busy(2)
    assert two > 5 * max(one, 0.2)


EXIT = """
    import threading, time
    import numpy as np, lora_engine as le
    pool = le.AdapterPool(1024, 1024)
    pool.add(np.ones((8, 1024), "f4"), np.ones((1024, 8), "f4"), 1.0)
    x, ids = np.ones((256, 1024), "f4"), np.zeros(256, "i4")
    def serve():
        while True:
            pool.forward(x, ids)
    for _ in range(2):
        threading.Thread(target=serve, daemon=True).start()
    time.sleep(0.3)
    print("done")
"""


def test_the_interpreter_may_end_while_daemon_threads_are_in_a_call():
    for _ in range(3):
        ran = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(EXIT)],
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert (ran.returncode, ran.stdout.strip()) == (0, "done"), ran.stderr


def test_adapt_never_teaches_the_next_owner_of_a_slot():
    """A slot removed while an adapt is under way is reissued at once: its new weights
    must stay. The adapt that was under way began before the add, and none follows."""
    rng = np.random.default_rng(6)
    x = rng.standard_normal((40 * 60, 512)).astype("f4")
    ids = np.repeat(np.arange(40), 60).astype(np.int32)
    A, B = np.ones((8, 512), "f4"), np.ones((512, 8), "f4")
    inside = turn = 0
    while turn < 30 or (inside == 0 and turn < 600):  # a busy machine needs more turns
        pool, _ = fill_pool(rng, 512, (512,), [8] * 40)
        learner = threading.Thread(target=lambda pool=pool: pool.adapt(x, x, ids, 1e-3))
        learner.start()
        while learner.is_alive() and pool.version(0) == 1:
            time.sleep(1e-5)  # until the call is under way: slot 0 is taught first
        time.sleep(turn % 10 * 1e-4)
        turn += 1
        alive = learner.is_alive()
        pool.remove(39)  # the last to be taught
        assert pool.add(A, B, 1.0) == 39
        inside += alive and learner.is_alive()
        learner.join()
        assert bits(pool.get(39)[0]) == bits(A)
        assert bits(pool.get(39)[1]) == bits(B)
    assert inside > 0


def test_get_beside_set_of_another_rank_is_one_adapter_or_the_other():
    pool = le.AdapterPool(64, (32, 16))
    one = ([np.full((2, 64), 2, "f4"), None], [np.full((32, 2), 2, "f4"), None], 2.0)
    other = ([np.full((5, 64), 5, "f4")] * 2, [np.full((o, 5), 5, "f4") for o in (32, 16)], 5.0)
    slot = pool.add(*one)

    def change(stop):
        while not stop.is_set():
            pool.set(slot, *other)
            pool.set(slot, *one)

    def read(stop):
        while not stop.is_set():
            A, B, scaling = pool.get(slot)
            assert all((m == scaling).all() for m in (*A, *B) if m is not None)
            assert (A[1] is None) == (scaling == 2.0)

    run_threads(change, read, read, seconds=1.0)
