"""AdapterPool as storage: slots, versions, history, memory."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
from helpers import bits, fill_pool

import lora_engine as le
from lora_engine import _C, reference


def adapter(rank=2, d_in=16, d_out=8, seed=0):
    rng = np.random.default_rng(seed)
    return (
        rng.standard_normal((rank, d_in)).astype("f4"),
        rng.standard_normal((d_out, rank)).astype("f4"),
        0.5,
    )


def test_get_returns_what_was_added():
    pool = le.AdapterPool(16, 8)
    A, B, s = adapter()
    slot = pool.add(A, B, s)
    got = pool.get(slot)
    assert (bits(got[0]), bits(got[1]), got[2]) == (bits(A), bits(B), s)
    got[0][:] = 0  # a copy
    assert bits(pool.get(slot)[0]) == bits(A)
    A[:] = 7  # was copied in
    assert not np.array_equal(pool.get(slot)[0], A)


def test_strided_and_bfloat16_factors_are_taken():
    pool = le.AdapterPool(16, 8, dtype="bfloat16")
    A, B, _ = adapter()
    first = pool.add(np.asfortranarray(A), np.repeat(B, 2, axis=1)[:, ::2], 1.0)
    second = pool.add(torch.from_numpy(A).bfloat16(), torch.from_numpy(B).bfloat16(), 1.0)
    for slot in (first, second):
        assert bits(pool.get(slot)[0]) == bits(reference.round_bfloat16(A))
        assert bits(pool.get(slot)[1]) == bits(reference.round_bfloat16(B))


def test_rounding_to_bfloat16_at_the_edges():
    values = np.array(
        [[0.0, -0.0, 1.0 + 2**-8, 1.0 + 3 * 2**-8, 3.3961776e38, 1e-40, -65504.5, 2**-126]], "f4"
    )
    pool = le.AdapterPool(8, 1, dtype="bfloat16")
    got = pool.get(pool.add(values, np.ones((1, 1), "f4"), 1.0))[0]
    want = torch.from_numpy(values).bfloat16().float()
    if _C.isa() == "avx512_bf16":  # the processor's conversion flushes what is subnormal
        assert (got[0, 5] == 0.0) or got[0, 5] == want[0, 5]
        got[0, 5] = want[0, 5]
    assert bits(got) == bits(want)


def test_freed_slots_are_reissued_oldest_first_and_zeroed():
    pool = le.AdapterPool(16, 8)
    slots = [pool.add(*adapter(seed=i)) for i in range(5)]
    for slot in (3, 0, 4):
        pool.remove(slots[slot])
    assert len(pool) == 2
    assert [pool.add(*adapter()) for _ in range(4)] == [3, 0, 4, 5]


def test_a_removed_slot_is_refused_everywhere():
    pool = le.AdapterPool(16, 8, history=1)
    slot = pool.add(*adapter())
    pool.remove(slot)
    x, y = np.ones((1, 16), "f4"), np.full((1, 8), 3.0, "f4")
    ids = np.array([slot], np.int32)
    calls = [
        lambda: pool.forward(x, ids, out=y),
        lambda: pool.adapt(x, y, ids, 0.1),
        lambda: pool.get(slot),
        lambda: pool.set(slot, *adapter()),
        lambda: pool.version(slot),
        lambda: pool.rollback(slot),
        lambda: pool.remove(slot),
    ]
    for call in calls:
        with pytest.raises(IndexError, match="removed"):
            call()
    assert (y == 3.0).all()


def test_versions_grow_with_every_change():
    pool = le.AdapterPool(16, 8, history=1)
    slot = pool.add(*adapter())
    seen = [pool.version(slot)]
    pool.set(slot, *adapter(rank=3))
    seen.append(pool.version(slot))
    pool.adapt(np.ones((1, 16), "f4"), np.ones((1, 8), "f4"), np.array([slot], np.int32), 0.1)
    seen.append(pool.version(slot))
    pool.rollback(slot)
    seen.append(pool.version(slot))
    pool.remove(slot)
    assert pool.add(*adapter()) == slot
    seen.append(pool.version(slot))
    assert seen == sorted(set(seen))


def test_rollback_brings_back_the_weights_before_the_last_change_once():
    pool = le.AdapterPool(16, 8, history=1)
    A, B, s = adapter()
    slot = pool.add(A, B, s)
    pool.set(slot, *adapter(rank=5, seed=1))
    pool.rollback(slot)
    assert bits(pool.get(slot)[0]) == bits(A)
    assert pool.get(slot)[2] == s
    with pytest.raises(ValueError, match="rollback"):
        pool.rollback(slot)
    for _ in range(3):
        before = pool.get(slot)
        pool.adapt(np.ones((1, 16), "f4"), np.ones((1, 8), "f4"), np.array([slot], np.int32), 0.1)
    pool.rollback(slot)
    assert bits(pool.get(slot)[1]) == bits(before[1])


def test_rollback_needs_history():
    pool = le.AdapterPool(16, 8)
    slot = pool.add(*adapter())
    with pytest.raises(ValueError, match="history=1"):
        pool.rollback(slot)


def test_limits():
    pool = le.AdapterPool(16, 8, capacity=2, max_rank=4)
    pool.add(*adapter())
    with pytest.raises(ValueError, match=r"A: expected a rank of at most 4, got 5"):
        pool.add(*adapter(rank=5))
    last = pool.add(*adapter(rank=4))
    with pytest.raises(ValueError, match="capacity of 2"):
        pool.add(*adapter())
    pool.remove(last)
    assert pool.add(*adapter()) == last
    for bad in (
        {"history": 2},
        {"capacity": 0},
        {"max_rank": -1},
        {"device": "cuda"},
        {"seed": -1},
    ):
        with pytest.raises(ValueError, match=next(iter(bad))):
            le.AdapterPool(16, 8, **bad)
    with pytest.raises(TypeError, match="dtype: expected float32, bfloat16 or float16"):
        le.AdapterPool(16, 8, dtype="float64")
    with pytest.raises(ValueError, match="in_features"):
        le.AdapterPool(0, 8)
    with pytest.raises(ValueError, match="out_features"):
        le.AdapterPool(8, ())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((1.5, 4), "in_features: expected a whole number, got 1.5"),
        ((4, 4.5), "out_features: expected a whole number, got 4.5"),
        ((4, "ab"), "out_features: expected a whole number, got 'a'"),
        (("a", 4), "in_features: expected a whole number, got 'a'"),
    ],
    ids=str,
)
def test_sizes_that_are_no_numbers(arguments, message):
    with pytest.raises(TypeError, match=message):
        le.AdapterPool(*arguments)


def test_a_scaling_that_is_no_number():
    A, B, _ = adapter()
    with pytest.raises(TypeError, match=r"AdapterPool\.add: scaling: expected a number, got 'a'"):
        le.AdapterPool(16, 8).add(A, B, "a")


def test_slices_may_come_as_an_array():
    assert le.AdapterPool(16, np.array([8, 4])).slices == (8, 4)


def test_slices_that_are_missing():
    pool = le.AdapterPool(16, (8, 4))
    A, B, _ = adapter()
    slot = pool.add([A, None], [B, None], 1.0)
    assert pool.ranks(slot) == (2, 0)
    got = pool.get(slot)
    assert got[0][1] is None
    assert got[1][1] is None
    assert bits(got[1][0]) == bits(B)
    with pytest.raises(ValueError, match="both or neither of slice 1"):
        pool.add([A, None], [B, B], 1.0)
    with pytest.raises(ValueError, match="at least one slice"):
        pool.add([None, None], [None, None], 1.0)
    with pytest.raises(ValueError, match="A: expected 2 slices, got 1"):
        pool.add([A], [B], 1.0)


def test_growth_moves_nothing_that_is_served():
    """Weights stay where they are while a thousand adapters are added."""
    rng = np.random.default_rng(0)
    pool, _ = fill_pool(rng, 16, (8,), [2])
    x, ids = rng.standard_normal((1, 16)).astype("f4"), np.zeros(1, np.int32)
    before = bits(pool.forward(x, ids))
    for i in range(1000):
        pool.add(*adapter(seed=i))
    assert bits(pool.forward(x, ids)) == before
    assert len(pool) == 1001


MEMORY = """
    import numpy as np, lora_engine as le
    def rss():
        for line in open("/proc/self/status"):
            if line.startswith("VmRSS"):
                return int(line.split()[1]) * 1024
    N, r, d = 20_000, 2, 4096
    pool = le.AdapterPool(d, d)
    A, B = np.full((r, d), 0.01, "f4"), np.full((d, r), 0.01, "f4")
    x = np.ones((64, d), "f4"); grad = np.ones((64, d), "f4"); y = np.zeros((64, d), "f4")
    first = [pool.add(A, B, 1.0) for _ in range(64)]
    pool.forward(x, np.array(first, "i4"), out=y); pool.adapt(x, grad, np.array(first, "i4"), 1e-9)
    before = rss() - 8 * N  # of the test's own slots
    slots = np.empty(2 * N, "i4")
    for i in range(N):
        slots[i] = slots[N + i] = pool.add(A, B, 1.0)
    user = (rss() - before) / N
    for start in range(0, N, 64):
        ids = slots[start:start + 64]
        pool.forward(x, ids, out=y, accumulate=False)
        assert pool.adapt(x, grad, ids, 1e-9).applied.all()
    assert abs(y[0, 0] - d * r * 0.01 * 0.01) < 1e-3
    print(user, pool.nbytes / len(pool), (rss() - before) / N)
"""


def test_memory_of_twenty_thousand_users():
    """64 KiB of weights and at most 256 bytes more, by the pool's count and the kernel's."""
    ran = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(MEMORY)], capture_output=True, text=True, check=True
    )
    added, counted, served = (float(v) for v in ran.stdout.split())
    weights = 2 * 2 * 4096 * 4
    assert weights <= counted <= weights + 256
    assert added <= weights + 256
    assert served <= weights + 256


def test_adds_and_removes_do_not_grow_the_pool():
    pool = le.AdapterPool(64, 64)
    A, B, s = adapter(2, 64, 64)
    pool.remove(pool.add(A, B, s))
    size = pool.nbytes
    for _ in range(2000):
        pool.remove(pool.add(A, B, s))
    assert pool.nbytes == size


@pytest.mark.parametrize("copying", [copy.deepcopy, pickle.dumps])
def test_a_pool_is_not_copied(copying):
    module = torch.nn.Linear(2, 2)
    module.pool = le.AdapterPool(4, 3)
    for thing in (module.pool, module):
        with pytest.raises(TypeError, match="AdapterPool: copy, pickle: expected adapters, got a"):
            copying(thing)


def test_a_device_of_torch():
    assert le.AdapterPool(4, 3, device=torch.device("cpu")).forward(
        torch.ones(1, 4), torch.tensor([-1], dtype=torch.int32)
    ).shape == (1, 3)
    for device, error in ((torch.device("meta"), ValueError), (3, TypeError)):
        with pytest.raises(error, match="AdapterPool: device: expected"):
            le.AdapterPool(4, 3, device=device)
