"""AdapterPool on the Triton backend: parts of test_pool.py, and what is a device's own."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch
from helpers import bits, f64, fill_pool
from helpers_triton import (  # noqa: F401  the fixture
    DEVICE,
    indices,
    interpreted,
    on_device,
    triton_backend,
)
from test_pool import (  # noqa: F401  run here on the Triton backend
    adapter,
    test_a_scaling_that_is_no_number,
    test_adds_and_removes_do_not_grow_the_pool,
    test_freed_slots_are_reissued_oldest_first_and_zeroed,
    test_get_returns_what_was_added,
    test_rollback_needs_history,
    test_slices_that_are_missing,
    test_strided_and_bfloat16_factors_are_taken,
)

import lora_engine as le

pytestmark = pytest.mark.usefixtures("triton_backend")


def storage_of(pool):
    return pool._storage.adapters


def test_growth_keeps_every_adapter():
    pool = le.AdapterPool(16, 8, device=DEVICE)
    held = {pool.add(*adapter(rank=1 + i % 5, seed=i)): i for i in range(70)}
    for slot, i in held.items():
        A, B, s = adapter(rank=1 + i % 5, seed=i)
        got = pool.get(slot)
        assert (bits(got[0]), bits(got[1]), got[2]) == (bits(A), bits(B), s)
    x = on_device(np.ones((2, 16)))
    y = pool.forward(x, indices([3, 69]))
    for row, i in enumerate((3, 69)):
        A, B, s = adapter(rank=1 + i % 5, seed=i)
        assert np.allclose(f64(y)[row], s * (B @ A.sum(1)), rtol=1e-5)


def test_a_stated_capacity_moves_nothing_and_holds_any_ranks():
    """What a captured graph needs: every address stays, whatever comes and goes."""
    pool = le.AdapterPool(16, (8, 4), capacity=6, max_rank=5, device=DEVICE)
    before = [t.data_ptr() for t in storage_of(pool) if isinstance(t, torch.Tensor)]
    width = storage_of(pool).max_rank
    rng = np.random.default_rng(0)

    def add(r):
        A, B = np.ones((r, 16), "f4"), np.ones((8, r), "f4")
        return pool.add([A, None], [B, None], 1.0)

    slots = [add(1 + i % 5) for i in range(6)]
    for _ in range(20):
        gone = slots.pop(rng.integers(6))
        pool.remove(gone)
        slots.append(add(int(rng.integers(1, 6))))
    with pytest.raises(ValueError, match="capacity of 6"):
        add(1)
    assert [t.data_ptr() for t in storage_of(pool) if isinstance(t, torch.Tensor)] == before
    assert storage_of(pool).max_rank == width == 5


def test_memory_that_is_freed_serves_other_ranks():
    pool = le.AdapterPool(16, 8, history=1, device=DEVICE)
    slots = [pool.add(*adapter(rank=1)) for _ in range(4)]
    for rank in range(2, 30):
        for slot in slots:
            pool.set(slot, *adapter(rank=rank, seed=slot))
    needed = 4 * 2 * 29 * (16 + 8)
    assert storage_of(pool).arena.numel() <= 3 * needed
    for slot in slots:
        assert bits(pool.get(slot)[0]) == bits(adapter(rank=29, seed=slot)[0])
        pool.remove(slot)
    assert not storage_of(pool).arena.any()


@pytest.mark.parametrize("change", ["add", "set", "rollback"])
def test_no_memory_left_changes_nothing(change, monkeypatch):
    pool = le.AdapterPool(16, 8, history=1, device=DEVICE)
    A, B, s = adapter()
    slot = pool.add(A, B, s)
    pool.set(slot, *adapter(rank=1, seed=1))
    before, storage = pool.get(slot), pool._storage._storage
    calls = {
        "add": lambda: pool.add(*adapter(rank=90)),
        "set": lambda: pool.set(slot, *adapter(rank=90)),
        "rollback": lambda: pool.rollback(slot),
    }

    def full(*_):
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(storage, "_new", full)
        patch.setattr(storage, "_free", [])
        patch.setattr(storage, "_end", storage.adapters.arena.numel())
        with pytest.raises(MemoryError):
            calls[change]()
    assert bits(pool.get(slot)[0]) == bits(before[0])
    assert len(pool) == 1
    other = pool.add(*adapter(rank=1, seed=5))
    assert other == 1
    y = pool.forward(on_device(np.ones((2, 16))), indices([slot, other]))
    want = [s * B @ A.sum(1) for A, B, s in (before, adapter(1, seed=5))]
    assert np.allclose(f64(y), want, rtol=1e-4)


def test_remove_works_beside_a_bad_id():
    pool = le.AdapterPool(16, 8, device=DEVICE)
    slot = pool.add(*adapter())
    pool.forward(on_device(np.ones((1, 16))), indices([2**31 - 1]))
    pool.remove(slot)
    with pytest.raises(IndexError, match="got 2147483647"):
        pool.add(*adapter())
    assert pool.add(*adapter()) == slot


def test_remove_zeroes_the_memory():
    pool = le.AdapterPool(16, 8, history=1, device=DEVICE)
    slot = pool.add(*adapter())
    pool.set(slot, *adapter(seed=1))
    pool.remove(slot)
    assert not storage_of(pool).arena.any()


def test_set_and_rollback_change_ranks():
    pool = le.AdapterPool(16, 8, history=1, device=DEVICE)
    A, B, s = adapter()
    slot = pool.add(A, B, s)
    version = pool.version(slot)
    pool.set(slot, *adapter(rank=5, seed=1))
    assert pool.ranks(slot) == (5,)
    pool.rollback(slot)
    got = pool.get(slot)
    assert (bits(got[0]), bits(got[1]), got[2]) == (bits(A), bits(B), s)
    assert pool.version(slot) == version + 2
    with pytest.raises(ValueError, match="rollback"):
        pool.rollback(slot)


def test_a_removed_slot_is_refused_by_the_host():
    pool = le.AdapterPool(16, 8, history=1, device=DEVICE)
    slot = pool.add(*adapter())
    pool.remove(slot)
    for call in (pool.get, pool.version, pool.ranks, pool.rollback, pool.remove):
        with pytest.raises(IndexError, match="removed"):
            call(slot)
    with pytest.raises(IndexError, match="removed"):
        pool.set(slot, *adapter())
    with pytest.raises(IndexError, match="one of the pool's 1 slots, got 7"):
        pool.get(7)


def test_what_does_not_fit_is_refused_and_changes_nothing():
    pool = le.AdapterPool(16, 8, max_rank=4, device=DEVICE)
    A, B, s = adapter()
    slot = pool.add(A, B, s)
    for bad, error, message in (
        ((A[:, :9], B, s), ValueError, r"A: expected shape \[r, 16\], got \[2, 9\]"),
        ((A, B[:3], s), ValueError, r"B: expected shape \[8, r\], got \[3, 2\]"),
        ((A, B[:, :1], s), ValueError, r"B: expected shape \[8, 2\], the rank of A, got \[8, 1\]"),
        ((A, B, float("nan")), ValueError, "scaling: expected a finite number"),
        (adapter(rank=5), ValueError, "A: expected a rank of at most 4, got 5"),
        ((A.astype("f8"), B, s), TypeError, "A: expected float32, bfloat16 or float16"),
        ((A.astype("u2"), B, s), TypeError, "A: expected float32, bfloat16 or float16"),
    ):
        with pytest.raises(error, match=message):
            pool.set(slot, *bad)
    assert bits(pool.get(slot)[0]) == bits(A)
    assert pool.version(slot) == 1


def test_forward_beside_changes_sees_one_adapter_or_the_other():
    """What one call enqueues, no other call comes between."""
    pool = le.AdapterPool(16, 8, device=DEVICE)
    ones = np.ones((2, 16), "f4"), np.ones((8, 2), "f4")
    slot = pool.add(*ones, 1.0)
    x, ids = on_device(np.ones((1, 16))), indices([slot])
    stop = threading.Event()

    def change():
        while not stop.is_set():
            for factor in (2, 1):
                pool.set(slot, ones[0] * factor, ones[1] * factor, 1.0)

    thread = threading.Thread(target=change)
    thread.start()
    try:
        seen = {float(pool.forward(x, ids)[0, 0]) for _ in range(10)}
    finally:
        stop.set()
        thread.join()
    assert seen <= {32.0, 128.0}


@interpreted
def test_numpy_arrays_are_taken_by_the_interpreter():
    rng = np.random.default_rng(1)
    pool, _ = fill_pool(rng, 16, (8,), [2])
    x, ids = rng.standard_normal((2, 16)).astype("f4"), np.array([0, -1], np.int32)
    y = pool.forward(x, ids)
    assert isinstance(y, np.ndarray)
    assert bits(y) == bits(pool.forward(torch.from_numpy(x), torch.from_numpy(ids)))


def test_a_pool_that_cannot_be_allocated_is_a_memory_error():
    with pytest.raises(MemoryError, match=r"^AdapterPool: memory: expected \d+ bytes on .*\[\d+\]"):
        le.AdapterPool(2**20, 2**20, capacity=2**14, max_rank=2**10, device=DEVICE)
    with pytest.raises(MemoryError, match=r"AdapterPool: memory: expected .* smaller limits"):
        le.AdapterPool(2**30, 2**30, capacity=2**40, max_rank=2**10, device=DEVICE)


def test_a_device_of_torch():
    pool = le.AdapterPool(4, 3, device=torch.device(DEVICE))
    assert pool._storage.adapters.arena.device.type == torch.device(DEVICE).type
    with pytest.raises(ValueError, match="device: expected"):
        le.AdapterPool(4, 3, device=torch.device("meta"))
