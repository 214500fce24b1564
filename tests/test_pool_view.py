"""AdapterPool.view: a slot's weights as tensors of its own memory, and how long they live."""

from __future__ import annotations

import gc

import numpy as np
import pytest
import torch
from helpers import DTYPES

import lora_engine as le
from lora_engine.backends import chosen

IN, OUT = 5, 4


def new_pool(dtype="float32", out=OUT, **options):
    return le.AdapterPool(IN, out, dtype=dtype, **options)


def full(a: float, b: float, rank: int = 2):
    return np.full((rank, IN), a, "f4"), np.full((OUT, rank), b, "f4"), 1.0


@pytest.mark.parametrize("dtype", DTYPES)
def test_it_is_the_slots_own_memory(dtype):
    pool = new_pool(dtype)
    A, B = np.arange(2.0 * IN).reshape(2, IN), np.arange(2.0 * OUT).reshape(OUT, 2)
    slot = pool.add(A.astype("f4"), B.astype("f4"), 1.0)
    a, b = pool.view(slot)
    assert a.dtype == b.dtype == getattr(torch, dtype)
    assert np.array_equal(a.float().numpy(), A)
    assert np.array_equal(b.float().numpy(), B)
    others = [pool.add(*full(1, 1)) for _ in range(300)]  # it does not move
    for other in others[::2]:
        pool.remove(other)
    a.fill_(3.0)
    b[1] = 2.0
    x = np.ones((1, IN), "f4")
    want = np.full((2, IN), 3.0) @ x[0] @ b.float().numpy().T
    assert np.array_equal(pool.forward(x, np.array([slot], "i4"))[0], want)
    pool.adapt(x, np.ones((1, OUT), "f4"), np.array([slot], "i4"), lr=0.5)
    assert np.array_equal(a.float().numpy(), pool.get(slot)[0])
    assert not np.array_equal(a.float().numpy(), np.full((2, IN), 3.0))


@pytest.mark.parametrize("change", ["set", "remove"])
def test_one_that_the_slot_has_no_more_is_zeroed_and_written_by_nobody(change):
    pool = new_pool()
    slot = pool.add(*full(1, 2))
    before = pool.nbytes
    a, b = pool.view(slot)
    again = pool.view(slot)[0]
    if change == "set":
        pool.set(slot, *full(5, 6))
    else:
        pool.remove(slot)
        assert pool.add(*full(5, 6)) == slot
    assert not a.any()
    assert not b.any()
    a.fill_(9.0)
    assert (again == 9.0).all()
    assert (pool.get(slot)[0] == 5.0).all()
    assert pool.nbytes > before
    del a, b
    gc.collect()
    assert pool.nbytes > before
    del again
    gc.collect()
    assert pool.nbytes == before


def test_it_outlives_the_pool():
    pool = new_pool()
    a, b = pool.view(pool.add(*full(1, 2)))
    del pool
    gc.collect()
    assert (a == 1).all()
    b.add_(1.0)
    assert (b == 3).all()


def test_slices_and_refusals(monkeypatch):
    pool = new_pool(out=(OUT, 3))
    A, B, _ = full(1, 2)
    slot = pool.add([A, None], [B, None], 1.0)
    (a, none), (b, nothing) = pool.view(slot)
    assert a.shape == (2, IN)
    assert b.shape == (OUT, 2)
    assert none is nothing is None
    pool.remove(slot)
    for bad in (slot, 7, -1):
        with pytest.raises(IndexError):
            pool.view(bad)
    monkeypatch.setenv("LORA_ENGINE_BACKEND", "reference")
    chosen.cache_clear()
    try:
        other = new_pool()
        with pytest.raises(TypeError, match=r"C\+\+ core, got lora_engine.backends.reference"):
            other.view(other.add(*full(1, 1)))
    finally:
        monkeypatch.undo()
        chosen.cache_clear()
