"""Merging sessions' adapters: each strategy against dense float64, and the C++ pass against it."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from helpers import bits

import lora_engine as le
from lora_engine import reference_consolidation as reference
from lora_engine.learning import consolidation
from lora_engine.learning.consolidation import consolidate, ensemble, strategy_weights

MERGING = tuple(s for s in consolidation.STRATEGIES if s != "ensemble")
PRECISE = {"max_sweeps": 100, "tolerance": 1e-8}


def drawn(rng, in_features, out, rank, scaling=1.0):
    """A delta of singular values that fall, as learned ones do."""
    A = rng.standard_normal((rank, in_features)) / np.sqrt(in_features)
    B = rng.standard_normal((out, rank)) * 0.5 ** np.arange(rank)
    return reference.Delta(A.astype("f4"), B.astype("f4"), scaling)


def dense(delta):
    return delta.scaled() @ np.float64(delta.A)


def filled(rng, in_features, out, ranks, dtype="float32"):
    """A pool, and what is in it: slot 0 the base."""
    pool = le.AdapterPool(in_features, out, dtype=dtype)
    for rank in ranks:
        pool.add(*drawn(rng, in_features, out, rank, float(rng.uniform(0.5, 2))))
    return pool, [reference.Delta(*pool.get(slot)) for slot in range(len(ranks))]


def fishers(rng, count, in_features, out):
    """Factors that differ from session to session, by orders of magnitude within one."""
    return tuple((rng.uniform(0, 1, (count, n)) ** 6 * 3).astype("f4") for n in (out, in_features))


def best(T, rank):
    U, S, Vt = np.linalg.svd(T)
    return (U[:, :rank] * S[:rank]) @ Vt[:rank]


def gap(got, want):
    return np.linalg.norm(got - want) / np.linalg.norm(want)


def settings(rng, K, in_features, out):
    u, v = fishers(rng, K + 1, in_features, out)
    return {
        "quality": rng.uniform(0.1, 1, K), "samples": rng.integers(1, 40, K),
        "base_samples": 5.0, "u": u, "v": v,
    }  # fmt: skip


# ---- what the strategies weigh --------------------------------------------------------


def test_strategy_weights():
    quality, samples = [0.5, 1.0, 0.25, 0.9, 0.1, 0.95], [4, 1, 4, 2, 0, 2]
    assert np.allclose(strategy_weights("average", quality, samples), 1 / 6)
    worth = np.multiply(quality, samples)
    assert np.allclose(strategy_weights("quality_weighted", quality, samples), worth / worth.sum())
    assert strategy_weights("best_only", quality, samples).tolist() == [0, 0.5, 0, 0, 0, 0.5]
    assert np.allclose(strategy_weights("ewc_merge", quality, samples), worth)
    assert strategy_weights("best_only", [0.2], [1]).tolist() == [1.0]
    assert strategy_weights("quality_weighted", [0, 0], [3, 3]).tolist() == [0, 0]


# ---- the formulas in the reference ------------------------------------------------------


@pytest.mark.parametrize("rank", [1, 3, 7])
def test_svd_merge_is_the_dense_one(rank):
    rng = np.random.default_rng(0)
    base, *parts = (drawn(rng, 9, 8, r, s) for r, s in ((2, 0.5), (1, 2.0), (3, -1.0)))
    T = dense(base) + 0.3 * dense(parts[0]) + 0.7 * dense(parts[1])
    merged = reference.svd_merge(base, parts, np.array([0.3, 0.7]), rank, scaling=2.0)
    got = dense(reference.Delta(merged.A, merged.B, 2.0))
    assert merged.A.shape == (rank, 9)
    assert gap(got, best(T, rank)) < 1e-12
    content = (merged.B**2).sum(0) > 0
    assert np.allclose((merged.A**2).sum(1)[content], (merged.B**2).sum(0)[content])
    assert np.linalg.matrix_rank(merged.A) == rank  # what is without content can learn


def ewc_case(rng, K=3, in_features=11, out=9):
    base, *parts = (drawn(rng, in_features, out, 2, s) for s in rng.uniform(0.5, 2, K + 1))
    u, v = fishers(rng, K + 1, in_features, out)
    return base, parts, rng.uniform(0.5, 3, K + 1), np.float64(u), np.float64(v)


def test_ewc_objective_is_the_dense_one():
    rng = np.random.default_rng(1)
    base, parts, w, u, v = ewc_case(rng)
    D = drawn(rng, 11, 9, 2, 1.5)
    targets = [dense(base), *(dense(base) + dense(p) for p in parts)]
    want = sum(
        w[k] * (np.outer(u[k], v[k]) * (dense(D) - T) ** 2).sum() for k, T in enumerate(targets)
    )
    assert reference.ewc_objective(base, parts, w, u, v, D) == pytest.approx(want, rel=1e-4)


@pytest.mark.parametrize("seed", range(5))
def test_ewc_merge_falls_with_every_solve_and_ends_where_nothing_is_gained(seed):
    rng = np.random.default_rng(seed)
    case = ewc_case(rng)
    merged = reference.ewc_merge(*case, 2, 0.5, 500, 1e-12)
    assert len(merged.objectives) > 4
    assert all(b <= a * (1 + 1e-12) for a, b in pairwise(merged.objectives))
    at = reference.ewc_objective(*case, reference.Delta(merged.A, merged.B, 0.5))
    assert at == pytest.approx(merged.objectives[-1], rel=1e-9)
    for name in ("A", "B"):
        for _ in range(20):
            moved = merged._replace(
                **{
                    name: getattr(merged, name)
                    + 1e-3 * rng.standard_normal(getattr(merged, name).shape)
                }
            )
            delta = reference.Delta(moved.A, moved.B, 0.5)
            assert reference.ewc_objective(*case, delta) > at


def test_ewc_merge_of_equal_weights_everywhere_is_the_svd():
    base, parts, _, u, v = ewc_case(np.random.default_rng(2))
    w = np.array([0.0, 1.0, 2.0, 3.0])
    ones = np.ones_like(u), np.ones_like(v)
    merged = reference.ewc_merge(base, parts, w, *ones, 2, max_sweeps=500, tolerance=1e-14)
    want = reference.svd_merge(base, parts, w[1:] / 6, 2)
    assert gap(merged.B @ merged.A, want.B @ want.A) < 1e-5


# ---- the C++ pass -------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", MERGING)
@pytest.mark.parametrize(("dtype", "shape"), [
    ("float32", (257, 129)), ("bfloat16", (64, 300)), ("float16", (300, 31)), ("float32", (5, 4)),
])  # fmt: skip
def test_pool_merges_as_the_reference(strategy, dtype, shape):
    rng = np.random.default_rng(3)
    pool, deltas = filled(rng, *shape, [3, 2, 1, 4, 2], dtype)
    given = settings(rng, 4, *shape)
    got = consolidate(pool, 0, [1, 2, 3, 4], strategy, **given, rank=2, **PRECISE)
    base, *parts = deltas
    weights = strategy_weights(strategy, given["quality"], given["samples"])
    D = dense(reference.Delta(got.A, got.B, got.scaling))
    if strategy != "ewc_merge":
        T = dense(base) + sum(w * dense(p) for w, p in zip(weights, parts, strict=True))
        assert gap(D, best(T, 2)) < 2e-5
        return
    case = base, parts, np.array([5.0, *weights]), given["u"], given["v"]
    want = reference.ewc_merge(*case, 2, **PRECISE)
    ours = reference.ewc_objective(*case, reference.Delta(got.A, got.B, got.scaling))
    assert ours <= want.objectives[-1] * (1 + 1e-3)
    svd = reference.svd_merge(base, parts, weights / weights.sum(), 2)
    assert ours < 0.9 * reference.ewc_objective(*case, reference.Delta(svd.A, svd.B))


@pytest.mark.parametrize("strategy", MERGING)
def test_pools_elsewhere_merge_by_the_reference(strategy, monkeypatch):
    rng = np.random.default_rng(12)
    pool, _ = filled(rng, 30, 40, [2, 1, 3])
    given = settings(rng, 2, 30, 40)
    ours = consolidate(pool, 0, [1, 2], strategy, **given, **PRECISE)
    monkeypatch.setattr(pool, "_backend", object())  # one without consolidate, as on a GPU
    got = consolidate(pool, 0, [1, 2], strategy, **given, **PRECISE)
    assert got.versions == ours.versions
    assert gap(got.B @ got.A, ours.B @ ours.A) < 1e-3


@pytest.mark.parametrize("elsewhere", [False, True])
def test_sums_and_how_many_are_as_good_as_means(elsewhere, monkeypatch):
    rng = np.random.default_rng(17)
    pool, _ = filled(rng, 30, 40, [2, 1, 3])
    given = settings(rng, 2, 30, 40)
    if elsewhere:
        monkeypatch.setattr(pool, "_backend", object())
    want = consolidate(pool, 0, [1, 2], **given, **PRECISE)
    for factor in (given["u"], given["v"]):
        factor[1:] *= given["samples"][:, None].astype("f4")
    got = consolidate(pool, 0, [1, 2], **given, summed=True, **PRECISE)
    assert gap(got.B @ got.A, want.B @ want.A) < 1e-4
    other = consolidate(pool, 0, [1, 2], **given, **PRECISE)
    assert gap(other.B @ other.A, want.B @ want.A) > 1e-2


def test_a_large_merge_in_memory_that_was_used_before_is_the_same():
    """Above 8 MiB a side the memory is kept, with what was in it."""
    rng = np.random.default_rng(18)
    pool, _ = filled(rng, 4096, 4096, [2] * 241)
    given = settings(rng, 240, 4096, 4096)
    slots = np.arange(1, 241)
    first = consolidate(pool, 0, slots, **given, max_sweeps=1)
    for factor in (given["u"], given["v"]):
        factor *= 4.0
    consolidate(pool, 0, slots[::-1], **given, max_sweeps=1)
    for factor in (given["u"], given["v"]):
        factor /= 4.0
    again = consolidate(pool, 0, slots, **given, max_sweeps=1)
    assert bits(again.A) == bits(first.A)
    assert bits(again.B) == bits(first.B)


@pytest.mark.parametrize("strategy", ["average", "ewc_merge"])
def test_many_more_terms_than_are_carried(strategy):
    """K = 60: the stack's rank is far above what the iteration holds, so it has to converge."""
    rng = np.random.default_rng(4)
    pool, (base, *parts) = filled(rng, 300, 200, [2] * 61)
    given = settings(rng, 60, 300, 200)
    got = consolidate(pool, 0, range(1, 61), strategy, **given, **PRECISE)
    D = reference.Delta(got.A, got.B, got.scaling)
    weights = strategy_weights(strategy, given["quality"], given["samples"])
    if strategy == "average":
        T = dense(base) + sum(dense(p) for p in parts) / 60
        assert np.linalg.norm(T - dense(D)) < (1 + 1e-4) * np.linalg.norm(T - best(T, 2))
        return
    case = base, parts, np.array([5.0, *weights]), given["u"], given["v"]
    want = reference.ewc_merge(*case, 2, **PRECISE).objectives[-1]
    assert reference.ewc_objective(*case, D) < want * 1.001
    # Fewer sweeps are worse, and still better than none.
    few = consolidate(pool, 0, range(1, 61), strategy, **given, max_sweeps=1, tolerance=0.0)
    assert few.sweeps == 1
    assert reference.ewc_objective(*case, D) < reference.ewc_objective(
        *case, reference.Delta(few.A, few.B, few.scaling)
    )


@pytest.mark.parametrize("strategy", MERGING)
def test_merge_of_equals_is_what_they_are(strategy):
    rng = np.random.default_rng(5)
    pool = le.AdapterPool(70, 90)
    pool.add(np.ones((2, 70), "f4"), np.zeros((90, 2), "f4"), 0.5)
    one = drawn(rng, 70, 90, 2, 1.5)
    for _ in range(3):
        pool.add(*one)
    given = settings(rng, 3, 70, 90) | {"base_samples": 0.0}
    got = consolidate(pool, 0, [1, 2, 3], strategy, **given, **PRECISE)
    # ewc_merge: the pull toward the base shows where the factors weigh next to nothing.
    most = 1e-4 if strategy == "ewc_merge" else 1e-5
    assert gap(dense(reference.Delta(got.A, got.B, got.scaling)), dense(one)) < most


def test_each_strategy_changes_the_weights_its_own_way():
    rng = np.random.default_rng(6)
    pool, (base, *_) = filled(rng, 120, 90, [2] * 8)
    given = settings(rng, 7, 120, 90)
    deltas = [dense(base)]
    for strategy in MERGING:
        got = consolidate(pool, 0, range(1, 8), strategy, **given, **PRECISE)
        deltas.append(dense(reference.Delta(got.A, got.B, got.scaling)))
    for i, first in enumerate(deltas):
        assert all(gap(first, other) > 0.05 for other in deltas[i + 1 :])


def test_what_nothing_weighs_keeps_the_base():
    rng = np.random.default_rng(7)
    pool, (base, *_) = filled(rng, 13, 10, [2, 2, 2])
    given = settings(rng, 2, 13, 10)
    given["u"][:, 2:5] = 0  # these rows of D
    given["v"][:, :3] = 0  # and these columns
    # Of full rank nothing else stands in the way.
    got = consolidate(pool, 0, [1, 2], "ewc_merge", **given, rank=10, **PRECISE)
    D, D0 = dense(reference.Delta(got.A, got.B, got.scaling)), dense(base)
    assert gap(D[2:5], D0[2:5]) < 0.02
    assert gap(D[:, :3], D0[:, :3]) < 0.02
    assert gap(D[5:, 3:], D0[5:, 3:]) > 0.1
    for name in "uv":
        given[name][:] = 0
    got = consolidate(pool, 0, [1, 2], "ewc_merge", **given, **PRECISE)
    assert gap(dense(reference.Delta(got.A, got.B, got.scaling)), D0) < 2e-4


def test_what_no_session_is_worth_keeps_the_base_and_zeros_stay_zero():
    rng = np.random.default_rng(8)
    pool, (base, *_) = filled(rng, 40, 30, [2, 2])
    got = consolidate(pool, 0, [1], "quality_weighted", quality=[0.0], samples=[9])
    assert gap(dense(reference.Delta(got.A, got.B, got.scaling)), dense(base)) < 1e-6
    for slot in (0, 1):
        pool.set(slot, np.ones((2, 40), "f4"), np.zeros((30, 2), "f4"), 1.0)
    got = consolidate(pool, 0, [1], "average", quality=[1.0], samples=[9], rank=3)
    assert not got.B.any()
    assert np.allclose(got.A @ got.A.T, np.eye(3), atol=1e-5)  # can learn


def test_threads_and_repeats_give_the_same_bits():
    rng = np.random.default_rng(9)
    pool, _ = filled(rng, 3000, 1500, [2] * 20)
    given = settings(rng, 19, 3000, 1500)
    results = [
        consolidate(pool, 0, range(1, 20), "ewc_merge", **given, num_threads=threads)
        for threads in (1, 2, 2)
    ]
    for other in results[1:]:
        assert other.A.tobytes() == results[0].A.tobytes()
        assert other.B.tobytes() == results[0].B.tobytes()


def test_versions_are_those_that_were_merged_and_nothing_changes():
    rng = np.random.default_rng(10)
    pool, before = filled(rng, 16, 12, [2, 1, 3])
    pool.set(2, *before[1])
    got = consolidate(pool, 0, [2, 1], "average", quality=[1, 1], samples=[1, 1])
    assert got.versions == (pool.version(0), pool.version(2), pool.version(1)) == (1, 2, 1)
    assert np.array_equal(pool.get(0)[0], before[0].A)
    pool.set(0, got.A, got.B, got.scaling)
    assert gap(dense(reference.Delta(*pool.get(0))), dense(reference.Delta(*got[:3]))) == 0


# ---- ensemble -------------------------------------------------------------------------------


def test_ensemble_serves_the_mixture():
    rng = np.random.default_rng(11)
    pool, deltas = filled(rng, 24, 10, [2, 1, 3, 2])
    means = rng.standard_normal((3, 24)).astype("f4")
    x = np.concatenate([3e30 * means[:2], rng.standard_normal((2, 24))]).astype("f4")
    x[3] = 0
    ids, weights = ensemble(x, 0, [1, 2, 3], means, temperature=0.2)
    units = np.float64(x) / np.maximum(np.linalg.norm(np.float64(x), axis=1, keepdims=True), 1e-9)
    cosines = units @ (means / np.linalg.norm(means, axis=1, keepdims=True)).T
    powers = np.exp(cosines / 0.2)
    assert np.allclose(weights[:, 1:], powers / powers.sum(1, keepdims=True), atol=1e-5)
    assert weights[0].argmax() == 0
    assert weights[0, 1:].argmax() == 0
    assert weights[1, 1:].argmax() == 1
    assert np.allclose(weights[3, 1:], 1 / 3)
    got = pool.forward(x[2:], ids[2:], weights[2:])
    want = [sum(w * dense(d) @ row for w, d in zip(ws, deltas, strict=True))
            for ws, row in zip(weights[2:], x[2:], strict=True)]  # fmt: skip
    assert np.allclose(got, want, atol=1e-4)
    alone = ensemble(x[0], 0, [], np.zeros((0, 24)))
    assert alone[0].tolist() == [[0]]
    assert alone[1].tolist() == [[1.0]]
