"""What consolidation refuses: before anything is written, naming argument, expected and got."""

from __future__ import annotations

import threading

import numpy as np
import pytest

import lora_engine as le
from lora_engine import _C
from lora_engine.learning.consolidation import consolidate, ensemble

IN, OUT = 12, 10


@pytest.fixture
def pool():
    rng = np.random.default_rng(0)
    pool = le.AdapterPool(IN, OUT)
    for _ in range(4):
        pool.add(rng.random((2, IN), dtype="f4"), rng.random((OUT, 2), dtype="f4"), 1.0)
    pool.remove(3)
    return pool


def given(**changes):
    rng = np.random.default_rng(1)
    options = {
        "base": 0, "slots": [1, 2], "strategy": "ewc_merge", "quality": [0.5, 1.0],
        "samples": [3, 4], "u": rng.random((3, OUT), dtype="f4"),
        "v": rng.random((3, IN), dtype="f4"),
    }  # fmt: skip
    return options | changes


def with_value(shape, value):
    array = np.ones(shape, "f4")
    array[2, 1] = value
    return array


NAMES = "ewc_merge, average, quality_weighted, best_only, ensemble"
ANYWHERE = [
    ({"strategy": "mean"}, ValueError, f"strategy: expected one of {NAMES}, got 'mean'"),
    ({"strategy": ["average"]}, ValueError, "strategy: expected one of"),
    ({"strategy": "ensemble"}, ValueError, "expected one that merges, got ensemble"),
    ({"slots": [], "quality": [], "samples": []}, ValueError, "slots: expected at least one"),
    ({"slots": [1]}, ValueError, "slots: expected as many as quality has, 2"),
    ({"quality": [0.5, 1.1]}, ValueError, "quality: expected values of 0 to 1"),
    ({"quality": [0.5, np.nan]}, ValueError, "quality: expected values of 0 to 1"),
    ({"samples": [3, -1]}, ValueError, "samples: expected values of 0 to 3.4"),
    ({"samples": [3]}, ValueError, r"samples: expected shape \(2,\), got \(1,\)"),
    ({"u": None}, ValueError, "u, v: expected Fisher factors for ewc_merge"),
    ({"slots": [1, 1]}, ValueError, "slots: expected each slot once"),
    ({"slots": [0, 1]}, ValueError, "slots: expected each slot once"),
    ({"slots": [1, 3]}, IndexError, "slot"),
    ({"slots": [1, 4]}, IndexError, "slot"),
    ({"slots": [1, -1]}, IndexError, "slot"),
    ({"base": 9}, IndexError, "slot"),
    ({"rank": 0}, ValueError, "rank: expected 1 to"),
    ({"rank": -1}, ValueError, "rank: expected 1 to"),
    ({"rank": 11}, ValueError, "rank: expected 1 to"),
    ({"u": with_value((3, OUT), np.nan)}, ValueError, "u: expected finite values"),
    ({"v": with_value((3, IN), np.inf)}, ValueError, "v: expected finite values"),
    ({"v": with_value((3, IN), -1.0)}, ValueError, "v: expected .*0 or more"),
    ({"u": np.ones((2, OUT), "f4")}, ValueError, "u: expected a row for each slot"),
]
CORE = [
    ({"u": np.ones((3, IN), "f4")}, ValueError, r"u: expected shape .* got \[3, 12\]"),
    ({"u": np.ones((3, OUT))}, TypeError, "u: expected float32, got float64"),
    ({"max_sweeps": 0}, ValueError, "max_sweeps: expected at least 1, got 0"),
    ({"tolerance": -1.0}, ValueError, "tolerance: expected 0 or more"),
    ({"tolerance": np.nan}, ValueError, "tolerance: expected a finite number"),
    ({"num_threads": 0}, ValueError, "num_threads: expected at least 1, got 0"),
    ({"base_samples": -1.0}, ValueError, "weights: expected finite values of 0 or more, got -1"),
    ({"base_samples": np.nan}, ValueError, "weights: expected finite values of 0 or more"),
]


@pytest.mark.parametrize(("changes", "error", "words"), ANYWHERE + CORE)
def test_refusals(pool, changes, error, words):
    before = pool.get(0)
    with pytest.raises(error, match=words):
        consolidate(pool, **given(**changes))
    assert np.array_equal(pool.get(0)[0], before[0])


@pytest.mark.parametrize(("changes", "error", "words"), ANYWHERE)
def test_refusals_of_pools_elsewhere(pool, monkeypatch, changes, error, words):
    monkeypatch.setattr(pool, "_backend", object())  # one without consolidate, as on a GPU
    with pytest.raises(error, match=words):
        consolidate(pool, **given(**changes))


def test_refusals_leave_the_outputs_alone(pool):
    A, B = np.full((2, IN), 7, "f4"), np.full((OUT, 2), 7, "f4")
    slots, weights = np.array([1, 2], "i4"), np.ones(3, "f4")
    u, v = with_value((3, OUT), 1.0), with_value((3, IN), np.nan)
    for changes in (
        {"v": v}, {"v": None}, {"scaling": 0.0}, {"scaling": np.inf}, {"A": np.ones((3, IN), "f4")},
        {"B": A}, {"A": np.broadcast_to(np.ones(IN, "f4"), (2, IN))}, {"weights": np.ones(2, "f4")},
        {"slots": np.array([], "i4")}, {"samples": np.array([1, 0, 1], "f4")},
        {"samples": np.array([1, np.nan, 1], "f4")}, {"samples": np.ones(2, "f4")},
    ):  # fmt: skip
        arguments = {
            "pool": pool._storage, "base": 0, "slots": slots, "weights": weights, "u": u, "v": u,
            "samples": None, "rank": 2, "scaling": 1.0, "max_sweeps": 3, "tolerance": 0.1,
            "num_threads": 1, "A": A, "B": B,
        } | {"v": np.ones((3, IN), "f4")} | changes  # fmt: skip
        with pytest.raises(ValueError, match=r"^consolidate: "):
            _C.consolidate(**arguments)
    assert (A == 7).all()
    assert (B == 7).all()
    with pytest.raises(ValueError, match="pool: expected a pointer, got NULL"):
        _C.consolidate(**(arguments | {"pool": None, "slots": slots}))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_finite_are_refused(pool, value):
    A, B, scaling = pool.get(2)
    A[1, 3] = value
    pool.set(2, A, B, scaling)
    with pytest.raises(
        ValueError, match="slots: expected finite weights, got NaN or Inf in slot 2"
    ):
        consolidate(pool, **given())


@pytest.mark.parametrize("strategy", ["average", "ewc_merge"])
def test_a_merge_beyond_float32_is_refused_and_a_large_one_is_right(pool, strategy):
    options = given(strategy=strategy, base_samples=0.0)
    for a, b in ((1e15, 1e-12), (1e-12, 1e15), (1e30, 1e30)):
        for slot in range(3):
            pool.set(slot, np.full((2, IN), a, "f4"), np.full((OUT, 2), b, "f4"), 1.0)
        if a < b or b < a:
            got = consolidate(pool, **options)
            assert np.allclose(got.B @ got.A, 4 * a * b, rtol=1e-3)
    with pytest.raises(ValueError, match="expected a merge that float32 holds"):
        consolidate(pool, **options)


def test_a_pool_of_several_slices_is_refused():
    pool = le.AdapterPool(IN, (4, 6))
    A, B = np.ones((2, IN), "f4"), [np.ones((n, 2), "f4") for n in (4, 6)]
    for _ in range(3):
        pool.add([A, A], B, 1.0)
    with pytest.raises(ValueError, match="pool: expected a pool of one slice, got 2"):
        consolidate(pool, **given(strategy="average"))


def test_slots_may_learn_while_they_are_merged():
    """Each is merged as it was before a step or after it, so the merge stays between the two."""
    pool = le.AdapterPool(300, 200)
    ones = np.ones((1, 300), "f4"), np.ones((200, 1), "f4")
    for _ in range(9):
        pool.add(*ones, 1.0)
    stop = threading.Event()

    def change():
        for i in range(100_000):
            pool.set(1 + i % 8, ones[0], ones[1] * (1 + i % 2), 1.0)
            if stop.is_set():
                return

    thread = threading.Thread(target=change)
    thread.start()
    try:
        for _ in range(30):
            got = consolidate(
                pool, 0, range(1, 9), "average", quality=np.ones(8), samples=np.ones(8)
            )
            D = got.scaling * got.B @ got.A
            assert np.ptp(D) < 1e-4
            assert 2 - 1e-4 < D[0, 0] < 3 + 1e-4
    finally:
        stop.set()
        thread.join()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (([[1.0, 2.0]], 0, [1], [[1.0, 2.0, 3.0]]), "mean_inputs: expected shape"),
        (([[1.0, 2.0]], 0, [1, 2], [[1.0, 2.0]]), "mean_inputs: expected shape"),
        (([[1.0, np.nan]], 0, [1], [[1.0, 2.0]]), "x: expected finite values"),
        (([[1.0, 2.0]], 0, [1], [[1.0, np.inf]]), "mean_inputs: expected finite values"),
        (([[1.0, 2.0]], 0, [1], [[1.0, 2.0]], 0.0), "temperature: expected a number above 0"),
        (([[1.0, 2.0]], 0, [1], [[1.0, 2.0]], np.nan), "temperature: expected a number above 0"),
        ((np.ones((1, 1, 2)), 0, [1], [[1.0, 2.0]]), "mean_inputs: expected shape"),
    ],
)
def test_ensemble_refusals(arguments, words):
    with pytest.raises(ValueError, match=words):
        ensemble(*arguments)
