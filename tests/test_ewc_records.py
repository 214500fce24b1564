"""EWC's records and a slot's versions: what they belong to, on both backends."""

from __future__ import annotations

import numpy as np
import pytest
from helpers import bits, fill_pool

import lora_engine as le

pytestmark = pytest.mark.usefixtures("backend")


def test_a_record_does_not_outlive_its_adapter():
    """A slot reissued to another user, or set anew, is free of the old penalty."""
    rng = np.random.default_rng(2)
    pool, _ = fill_pool(rng, 16, (8,), [2, 2])
    ewc = le.EWC(pool, ewc_lambda=1e6, form="factor")
    for slot in (0, 1):
        ewc.set(slot, np.ones((2, 16), "f4"), np.ones((8, 2), "f4"))
    pool.remove(0)
    pool.set(1, *pool.get(1))
    assert ewc.penalty() == 0.0
    A, B = rng.standard_normal((2, 16)).astype("f4"), rng.standard_normal((8, 2)).astype("f4")
    assert pool.add(A, B, 1.0) == 0
    pool.set(1, A, B, 1.0)
    assert ewc.penalty() == 0.0
    plain, _ = fill_pool(rng, 16, (8,), [2, 2])
    for slot in (0, 1):
        plain.set(slot, A, B, 1.0)
    x, grad = rng.standard_normal((2, 16)).astype("f4"), rng.standard_normal((2, 8)).astype("f4")
    ids = np.array([0, 1], np.int32)
    pool.adapt(x, grad, ids, 0.1, ewc=ewc)
    plain.adapt(x, grad, ids, 0.1)
    for slot in (0, 1):
        assert bits(pool.get(slot)[1]) == bits(plain.get(slot)[1])


def test_a_record_follows_its_adapter_through_set_and_rollback():
    rng = np.random.default_rng(4)
    pool, before = fill_pool(rng, 16, (8,), [2], history=1)
    ewc = le.EWC(pool, ewc_lambda=1.0, form="factor")
    A, B = before[0].A[0] + 1, before[0].B[0] + 1
    ones = np.ones((2, 16), "f4"), np.ones((8, 2), "f4")
    pool.set(0, A, B, 1.0)
    ewc.set(0, *ones)  # of the second adapter
    pool.rollback(0)
    assert ewc.penalty() == 0.0  # the first has none
    ewc.set(0, *ones)
    pool.set(0, A, B, 1.0)
    assert ewc.penalty() == 0.0
    pool.rollback(0)
    pool.adapt(
        rng.standard_normal((1, 16)).astype("f4"), np.ones((1, 8), "f4"), np.zeros(1, "i4"), 0.1
    )
    assert ewc.penalty() > 0.0  # the record of the first came back with it


def test_a_record_is_free_of_the_rank_of_whoever_came_after():
    rng = np.random.default_rng(5)
    pool, _ = fill_pool(rng, 16, (8,), [2, 3])
    ewc = le.EWC(pool, ewc_lambda=1.0, form="factor")
    ewc.set(0, np.ones((2, 16), "f4"), np.ones((8, 2), "f4"))
    pool.set(0, *pool.get(1))
    assert ewc.penalty() == 0.0
    x, grad = np.ones((1, 16), "f4"), np.ones((1, 8), "f4")
    assert pool.adapt(x, grad, np.zeros(1, "i4"), 0.1, ewc=ewc).applied.all()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_versions_go_on_growing_in_a_slot_that_is_reissued(dtype):
    """They key the rounding: its bits would else come again in the next adapter."""
    pool, _ = fill_pool(np.random.default_rng(6), 16, (8,), [2, 2], dtype, history=1)
    given = pool.get(1)
    x, grad, ids = np.ones((1, 16), "f4"), np.ones((1, 8), "f4"), np.zeros(1, "i4")
    pool.adapt(x, grad, ids, 0.1)
    pool.rollback(0)
    assert pool.version(0) == 3
    for version in (4, 5):
        pool.remove(0)
        assert pool.add(*given) == 0
        assert pool.version(0) == version
    pool.set(0, *given)
    assert (pool.version(0), pool.version(1)) == (6, 1)
    pool.remove(1)
    pool.remove(0)
    assert [pool.add(*given), pool.add(*given)] == [1, 0]  # the first freed first
    assert (pool.version(0), pool.version(1)) == (7, 2)


@pytest.mark.parametrize("form", ["factor", "delta"])
@pytest.mark.parametrize(("slices", "ranks"), [((8,), 2), ((8, 5, 3), (2, 0, 1))], ids=str)
def test_a_record_is_read_and_put_back_to_the_bit(form, slices, ranks):
    rng = np.random.default_rng(7)
    pool, before = fill_pool(rng, 16, slices, [ranks, ranks])
    here = [m is not None for m in before[0].A]
    shapes = before[0].A, before[0].B
    if form == "delta":
        shapes = [np.empty(o) for o in slices], [np.empty(16)] * len(slices)
    given = [
        [rng.random(m.shape, "f4") if h else None for m, h in zip(part, here, strict=True)]
        for part in shapes
    ]
    ewc = le.EWC(pool, ewc_lambda=1.0, form=form)
    ewc._storage.set(0, *given)
    x, grad = np.ones((1, 16), "f4"), np.ones((1, sum(slices)), "f4")
    for _ in range(2):  # away from the anchor
        pool.adapt(x, grad, np.zeros(1, "i4"), 0.1, ewc=ewc)
    got = ewc._storage.get(0)
    for part, want in zip(got, (*given, before[0].A, before[0].B), strict=True):
        for a, b in zip(part, want, strict=True):
            assert (a is None) == (b is None)
            assert a is None or (a.dtype == np.float32 and bits(a) == bits(b))
    other = le.EWC(pool, ewc_lambda=1.0, form=form)
    with pytest.raises(ValueError, match="which has none"):
        other._storage.get(0)
    other._storage.restore(0, *got)
    assert other.penalty() == ewc.penalty() > 0.0
    other._storage.restore(1, *got)  # any weights may be an anchor
    assert other.penalty() > ewc.penalty()
    pool.remove(1)
    with pytest.raises(IndexError):
        other._storage.get(1)
    with pytest.raises(IndexError):
        other._storage.restore(1, *got)
