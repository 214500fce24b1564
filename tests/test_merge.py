"""merge_adapters: sums of deltas, ranks, what is kept bit by bit, what is refused."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from helpers_merge import delta, deltas, gap, random_adapter

import lora_engine as le
from lora_engine.adapters.adapter import LoraWeights
from lora_engine.adapters.merge import merge
from lora_engine.adapters.merge_inputs import METHODS, PRUNING

SUMS = ("svd", "cat", "linear")
# Methods that prune nothing at this density.
WHOLE = {m: {"density": 1.0} if m in PRUNING else {} for m in METHODS}


def test_sums_are_exact_over_ranks_scalings_signs_and_modules_that_only_some_have():
    a = random_adapter(1, {"q": 3, "v": 2}, 2.0)
    b = random_adapter(2, {"q": 5, "k": 4}, -0.25)
    c = random_adapter(3, {"q": 1, "k": 2, "v": 7}, 1.5)
    pairs = [(a, 0.6), (b, -1.7), (c, 1e-3)]
    for method in (*SUMS, "dare_linear", "magnitude_prune"):
        merged = le.merge_adapters(pairs, method=method, **WHOLE[method])
        assert sorted(merged.modules) == ["k", "q", "v"]
        for name, got in deltas(merged).items():
            want = sum(w * delta(x.modules[name]) for x, w in pairs if name in x.modules)
            assert gap(got, want) < 2e-7, (method, name)
    assert len(merged.modules["q"].A) == 9
    # The small adapter among large ones is not lost in their rounding.
    without = sum(w * delta(x.modules["q"]) for x, w in pairs[:2])
    assert gap(delta(merged.modules["q"]) - without, 1e-3 * delta(c.modules["q"])) < 1e-3


@pytest.mark.parametrize("method", METHODS)
def test_one_adapter_of_weight_1_is_itself(method):
    a = random_adapter(1, {"q": 3, "v": 2}, 0.7)
    a = replace(a, biases={"q": np.ones(20, "f4")}, peft_config={"r": 3, "x": [1]}, dtype="float16")
    merged = le.merge_adapters([(a, 1.0)], method=method, **WHOLE[method])
    assert merged.peft_config == a.peft_config
    assert merged.dtype == "float16"
    assert merged.biases["q"].tobytes() == a.biases["q"].tobytes()
    for name, lora in a.modules.items():
        got = merged.modules[name]
        assert got.A.tobytes() == lora.A.tobytes()
        assert got.B.tobytes() == lora.B.tobytes()
        assert got.scaling == lora.scaling


@pytest.mark.parametrize("method", METHODS)
def test_an_adapter_with_itself_is_itself(method):
    a = random_adapter(1, {"q": 3, "v": 2}, 0.7)
    mean = "ties" in method  # averages what agrees, times the weight
    weight = 1.0 if mean else 0.5
    merged = le.merge_adapters([(a, weight), (a, weight)], method=method, **WHOLE[method])
    for name, lora in a.modules.items():
        assert gap(delta(merged.modules[name]), delta(lora)) < 2e-7
        rank = len(merged.modules[name].A)
        assert rank == (2 * len(lora.A) if method == "cat" else len(lora.A))


def test_what_cancels_leaves_a_zero_adapter():
    a = random_adapter(1, {"q": 3})
    merged = le.merge_adapters([(a, 1.0), (a, -1.0)])
    assert not delta(merged.modules["q"]).any()
    assert merged.modules["q"].A.shape == (1, 24)


def test_the_difference_of_near_equal_adapters_is_not_lost():
    """Stacked factors that are all but parallel: what is wanted is what sets them apart."""
    a = random_adapter(1, {"q": 3})
    lora = a.modules["q"]
    for step in (1e-3, 1e-5):
        moved = lora.A + np.float32(step) * random_adapter(2, {"q": 3}).modules["q"].A
        b = le.Adapter({"q": lora._replace(A=moved)})
        want = delta(b.modules["q"]) - delta(lora)
        merged = le.merge_adapters([(b, 1.0), (a, -1.0)])
        assert gap(delta(merged.modules["q"]), want) < 1e-6
        assert len(merged.modules["q"].A) == 3


@pytest.mark.parametrize("shape", [(24, 20), (7, 300), (1, 5)], ids=str)
def test_svd_cut_to_a_rank_is_the_nearest(shape):
    parts = [(random_adapter(i, {"q": 4}, 0.5, shape), 1.0 - 0.4 * i) for i in range(4)]
    want = sum(w * delta(a.modules["q"]) for a, w in parts)
    U, S, Vt = np.linalg.svd(want)
    for rank in (1, 3, 100):
        merged = merge(parts, rank=rank)
        lora = merged.adapter.modules["q"]
        k = min(rank, 16, *shape)
        assert (len(lora.A), lora.scaling) == (k, 1.0)
        assert gap(delta(lora), (U[:, :k] * S[:k]) @ Vt[:k]) < 1e-6
        assert merged.modules[0].error == pytest.approx(
            np.linalg.norm(S[k:]) / np.linalg.norm(S), abs=1e-7
        )
        norms = np.linalg.norm(lora.A, axis=1), np.linalg.norm(lora.B, axis=0)
        assert np.allclose(*norms, rtol=1e-5)  # neither factor is the larger


def test_a_cut_of_one_adapter():
    a = random_adapter(1, {"q": 5, "v": 2}, 0.5)
    merged = merge([(a, 1.0)], rank=3)
    assert [m.rank for m in merged.modules] == [3, 2]
    assert merged.modules[0].error > 0.1
    assert merged.adapter.modules["v"].A.tobytes() == a.modules["v"].A.tobytes()
    S = np.linalg.svd(delta(a.modules["q"]), compute_uv=False)
    left = np.linalg.norm(delta(a.modules["q"]) - delta(merged.adapter.modules["q"]))
    assert left == pytest.approx(np.linalg.norm(S[3:]), rel=1e-5)


def test_inputs_are_adapters_and_micro_loras_and_none_is_changed():
    lora = le.MicroLoRA(le.MicroLoRAConfig(24, 20, rank=2, target_modules=("q",)))
    A, _, scaling = lora.weights("q")
    B = np.random.default_rng(0).standard_normal((20, 2)).astype("f4")
    lora.set_weights("q", A, B)
    a = random_adapter(1, {"q": 3})
    before = [w.copy() for w in (*a.modules["q"][:2], A, B)]
    merged = le.merge_adapters([(a, 0.5), (lora, 2.0)])
    want = 0.5 * delta(a.modules["q"]) + 2.0 * scaling * B.astype("f8") @ A
    assert gap(delta(merged.modules["q"]), want) < 2e-7
    for old, new in zip(before, (*a.modules["q"][:2], *lora.weights("q")[:2]), strict=True):
        assert old.tobytes() == new.tobytes()


# ---- biases -----------------------------------------------------------------


def with_bias(adapter: le.Adapter, seed: int) -> le.Adapter:
    drawn = np.random.default_rng(seed).standard_normal(20).astype("f4")
    return replace(adapter, modules={"q": adapter.modules["q"]._replace(bias_delta=drawn)})


def test_biases_of_deltas_are_merged_by_the_method():
    a, b = (with_bias(random_adapter(i, {"q": 3}), i) for i in (1, 2))
    biases = [x.modules["q"].bias_delta for x in (a, b)]
    for method in SUMS:
        got = le.merge_adapters([(a, 0.6), (b, -0.4)], method=method).modules["q"].bias_delta
        assert np.allclose(got, 0.6 * biases[0] - 0.4 * biases[1], atol=1e-7)
    got = le.merge_adapters([(a, 1.0), (b, 1.0)], method="ties", density=1.0)
    same = biases[0] * biases[1] > 0
    larger = np.where(np.abs(biases[0]) > np.abs(biases[1]), *biases)
    want = np.where(same, (biases[0] + biases[1]) / 2, larger)
    assert np.allclose(got.modules["q"].bias_delta, want, atol=1e-7)
    half = le.merge_adapters([(a, 1.0), (b, 1.0)], method="magnitude_prune", density=0.5)
    assert np.count_nonzero(half.modules["q"].bias_delta) < 20
    alone = le.merge_adapters([(a, 3.0), (random_adapter(3, {"k": 1}), 1.0)])
    assert np.allclose(alone.modules["q"].bias_delta, 3 * biases[0], atol=1e-6)


def test_whole_biases_need_weights_that_sum_to_one():
    a = replace(random_adapter(1, {"q": 3}), biases={"q": np.full(20, 2.0, "f4")})
    b = replace(random_adapter(2, {"q": 3}), biases={"q": np.full(20, -1.0, "f4")})
    assert np.allclose(le.merge_adapters([(a, 1.5), (b, -0.5)]).biases["q"], 3.5)
    with pytest.raises(ValueError, match=r"bias of q: expected a sum of 1.*got 1\.2"):
        le.merge_adapters([(a, 0.6), (b, 0.6)])
    with pytest.raises(ValueError, match=r"adapters\[1\]: bias of q: expected whole biases in all"):
        le.merge_adapters([(a, 0.6), (random_adapter(2, {"q": 3}), 0.4)])


# ---- refusals ---------------------------------------------------------------

A = random_adapter(1, {"q": 3, "v": 2})
NAN = le.Adapter({"q": A.modules["q"]._replace(B=np.full((20, 3), np.nan, "f4"))})


@pytest.mark.parametrize(
    ("pairs", "options", "error", "message"),
    [
        ([], {}, ValueError, "adapters: expected at least one"),
        ([(A, 0.0)], {}, ValueError, "adapters: expected at least one of a weight that is not 0"),
        ([A], {}, TypeError, "adapters: expected pairs"),
        ([(A, "1")], {}, ValueError, r"adapters\[0\]: weight: expected a finite number, got '1'"),
        ([(A, float("nan"))], {}, ValueError, "weight: expected a finite number, got nan"),
        ([(3, 1.0)], {}, TypeError, "expected an Adapter, a MicroLoRA or a folder, got int"),
        ([(A, 1.0)], {"method": "mean"}, ValueError, "method: expected one of svd, .*got 'mean'"),
        ([(A, 1.0)], {"rank": 0}, ValueError, "rank: expected a whole number of at least 1"),
        ([(A, 1.0)], {"rank": 2, "method": "cat"}, ValueError, "rank: expected None for cat"),
        ([(A, 1.0)], {"density": 0.5}, ValueError, "density: expected None for svd"),
        ([(A, 1.0)], {"method": "ties"}, ValueError, "density: expected a number above 0.*None"),
        (
            [(A, 1.0)], {"method": "ties", "density": 0.0}, ValueError,
            "density: expected a number above 0",
        ),
        (
            [(A, 1.0)], {"majority_sign_method": "sum"}, ValueError,
            "majority_sign_method: expected total or frequency",
        ),
        ([(A, 1.0)], {"seed": -1}, ValueError, "seed: expected a whole number"),
        (
            [(A, 1.0), (random_adapter(2, {"v": 2}, 1.0, (24, 21)), 1.0)], {}, ValueError,
            r"adapters\[1\]: v: expected \(in, out\) = \(24, 20\) as in adapters\[0\], got \(24",
        ),
        (
            [(A, 1.0), (le.Adapter({}, A.modules), 1.0)], {}, ValueError,
            r"adapters\[1\]: q: expected linear as in adapters\[0\], got embedding",
        ),
        ([(A, 1.0), (NAN, 1.0)], {}, ValueError, r"adapters\[1\]: q: expected finite numbers"),
        (
            [(A, 1.0), (random_adapter(2, {"v": 3}), 1.0)], {"method": "ties", "density": 0.5},
            ValueError, r"adapters\[1\]: v: expected rank 2 as in adapters\[0\].*got rank 3",
        ),
        ([(A, 1e39), (A, 1e30)], {"method": "cat"}, ValueError, "expected a sum within float32"),
    ],
)  # fmt: skip
def test_refusals(pairs, options, error, message):
    with pytest.raises(error, match=f"merge_adapters: .*{message}"):
        le.merge_adapters(pairs, **options)


def test_what_one_adapter_draws_does_not_depend_on_the_others_modules():
    a, b = random_adapter(1, {"q": 3, "v": 2}), random_adapter(2, {"q": 3, "k": 4})
    options = {"method": "dare_linear", "density": 0.5}
    both = le.merge_adapters([(a, 1.0), (b, 1.0)], **options)
    alone = le.merge_adapters([(a, 1.0)], **options)
    again = le.merge_adapters([(a, 1.0)], **options, seed=1)
    assert both.modules["v"].A.tobytes() == alone.modules["v"].A.tobytes()
    assert again.modules["v"].A.tobytes() != alone.modules["v"].A.tobytes()


def test_terms_are_pruned_and_never_more():
    lora = LoraWeights(np.arange(1, 25, dtype="f4")[None] / 8, np.ones((20, 1), "f4"), 1.0)
    merged = le.merge_adapters(
        [(le.Adapter({"q": lora}), 1.0)], method="magnitude_prune", density=0.25
    )
    got = delta(merged.modules["q"])
    rows = np.count_nonzero(np.abs(got).max(axis=1) > 1e-6)
    columns = np.count_nonzero(np.abs(got).max(axis=0) > 1e-6)
    assert (rows, columns) == (20, 6)  # B's elements are equal: all are kept
    assert np.allclose(got[0, -6:], np.arange(19, 25) / 8, rtol=1e-6)
