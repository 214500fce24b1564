"""merge_adapters against PEFT's add_weighted_adapter, and where PEFT's is not what it says."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from helpers_merge import adapter_of, deltas, gap, peft_deltas, peft_model

import lora_engine as le

SAME = {"a": {"r": 4, "lora_alpha": 6}, "b": {"r": 4, "lora_alpha": 1}, "c": {"r": 4}}
MIXED = {
    "a": {"r": 3, "lora_alpha": 6, "rank_pattern": {"second": 5}},
    "b": {"r": 2, "lora_alpha": 9, "target_modules": ["first", "emb"]},
    "c": {"r": 4, "alpha_pattern": {"first": 2}, "target_modules": ["second", "first"]},
}


def merged_by_peft(model, weights, method, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.add_weighted_adapter(
            list(weights), list(weights.values()), "merged", combination_type=method, **options
        )
    return peft_deltas(model, "merged")


def merged_by_us(model, weights, method, **options):
    pairs = [(adapter_of(model, name), weight) for name, weight in weights.items()]
    return le.merge_adapters(pairs, method=method, **options)


def check_equal(got: le.Adapter, want: dict[str, np.ndarray], tolerance: float = 3e-6) -> None:
    ours = deltas(got)
    assert sorted(ours) == sorted(want)
    for name, expected in want.items():
        assert gap(ours[name], expected) < tolerance, name


@pytest.mark.parametrize("weights", [(0.6, 0.4, 0.3), (0.6, -1.4, 2.0)], ids=["mean", "negative"])
@pytest.mark.parametrize("configs", [SAME, MIXED], ids=["same", "mixed"])
@pytest.mark.parametrize(
    ("method", "rank"), [("svd", None), ("svd", 3), ("cat", None)], ids=["svd", "svd-3", "cat"]
)
def test_sums(method, rank, configs, weights):
    model = peft_model(configs)
    given = dict(zip("abc", weights, strict=True))
    options = {"svd_rank": rank or 20} if method == "svd" else {}
    got = merged_by_us(model, given, method, rank=rank)
    check_equal(got, merged_by_peft(model, given, method, **options))


@pytest.mark.parametrize("majority", ["total", "frequency"])
@pytest.mark.parametrize("configs", [SAME, MIXED], ids=["same", "mixed"])
@pytest.mark.parametrize("density", [0.2, 0.75, 1.0])
def test_ties_of_deltas(density, configs, majority):
    model = peft_model(configs)
    weights = {"a": 0.9, "b": 1.3, "c": 0.6}
    options = {"density": density, "majority_sign_method": majority}
    for rank in (3, None):
        got = merged_by_us(model, weights, "ties_svd", rank=rank, **options)
        model = peft_model(configs)
        largest = {"first": 4, "second": 5, "emb": 3} if configs is MIXED else {}
        for name, lora in {**got.modules, **got.embeddings}.items():
            k = rank or largest.get(name, 4)
            assert len(lora.A) == k
            want = merged_by_peft(peft_model(configs), weights, "ties_svd", svd_rank=k, **options)
            assert gap(deltas(got)[name], want[name]) < 3e-5


@pytest.mark.parametrize("majority", ["total", "frequency"])
@pytest.mark.parametrize("density", [0.3, 1.0])
def test_ties_of_factors(density, majority):
    model = peft_model(SAME)
    weights = {"a": 0.9, "b": 1.3, "c": 0.6}
    options = {"density": density, "majority_sign_method": majority}
    got = merged_by_us(model, weights, "ties", **options)
    check_equal(got, merged_by_peft(model, weights, "ties", **options))


def test_dare_ties_drops_as_peft_does_given_the_same_draws(monkeypatch):
    from lora_engine.adapters import elementwise, merge

    model = peft_model(SAME)
    weights = {"a": 0.9, "b": 1.3, "c": 0.6}
    kept = {}

    def drop(x, density, rng):
        out = elementwise.drop(x, density, rng)
        kept[x.tobytes()] = out != 0
        return out

    monkeypatch.setattr(merge, "drop", drop)
    got = merged_by_us(model, weights, "dare_ties", density=0.6)
    rates = [mask.mean() for mask in kept.values()]
    assert abs(np.mean(rates) - 0.6) < 0.04

    from peft.utils import merge_utils

    def random_pruning(tensor, density, rescale):
        return tensor * torch.from_numpy(kept[tensor.numpy().tobytes()]) / density

    monkeypatch.setattr(merge_utils, "random_pruning", random_pruning)
    check_equal(got, merged_by_peft(model, weights, "dare_ties", density=0.6))


def test_dare_linear_is_unbiased():
    model = peft_model(SAME)
    weights = {"a": 0.9, "b": -0.8}
    want = sum(w * deltas(adapter_of(model, n))["first"] for n, w in weights.items())
    draws = [
        deltas(merged_by_us(model, weights, "dare_linear", density=0.7, seed=seed))["first"]
        for seed in range(150)
    ]
    error = gap(np.mean(draws, axis=0), want)
    spread = gap(draws[0], want)
    assert spread > 0.5
    assert error < 2.5 * spread / np.sqrt(len(draws))


# ---- where PEFT's are not what they say -------------------------------------


def exact(model, weights):
    parts = {name: deltas(adapter_of(model, name)) for name in weights}
    return {
        path: sum(w * parts[name][path] for name, w in weights.items() if path in parts[name])
        for path in next(iter(parts.values()))
    }


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("linear", {}),
        ("magnitude_prune", {"density": 1.0}),
        ("dare_linear", {"density": 1.0}),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_factors_that_peft_adds_separately(method, options):
    model = peft_model(SAME)
    weights = {"a": 0.6, "b": 0.4}
    want = exact(model, weights)
    check_equal(merged_by_us(model, weights, method, **options), want)
    for name, got in merged_by_peft(model, weights, method, **options).items():
        assert gap(got, want[name]) > 0.3


def test_an_adapter_with_itself_doubles_in_peft():
    model = peft_model(SAME)
    model.add_weighted_adapter(["a"], [1.0], "again", combination_type="linear")
    want = peft_deltas(model, "a")
    weights = {"a": 0.5, "again": 0.5}
    check_equal(merged_by_us(model, weights, "linear"), want)
    for name, got in merged_by_peft(model, weights, "linear").items():
        assert gap(got, 2 * want[name]) < 1e-5


@pytest.mark.parametrize("method", ["svd", "cat"])
def test_rslora_of_peft_is_too_large(method):
    model = peft_model({n: {**o, "use_rslora": True} for n, o in SAME.items()})
    weights = {"a": 0.6, "b": 0.4}
    want = exact(model, weights)
    check_equal(merged_by_us(model, weights, method), want)
    options = {"svd_rank": 8} if method == "svd" else {}
    for name, got in merged_by_peft(model, weights, method, **options).items():
        assert gap(got, np.sqrt(8) * want[name]) < 1e-5


def test_a_single_adapter_is_not_cut_by_peft():
    model = peft_model(SAME)
    got = merged_by_us(model, {"a": 1.0}, "svd", rank=2)
    assert {len(lora.A) for lora in got.modules.values()} == {2}
    for name, theirs in merged_by_peft(model, {"a": 1.0}, "svd", svd_rank=2).items():
        assert gap(theirs, peft_deltas(model, "a")[name]) < 1e-6


def test_what_is_subtracted_votes_against_in_ties():
    """Equal adapters, one of them subtracted: nothing agrees on a sign but what cancels."""
    model = peft_model(SAME)
    weights = {"a": 1.0, "b": -1.0}
    a, b = (deltas(adapter_of(model, n))["first"] for n in "ab")
    want = np.where(a * -b > 0, (a - b) / 2, np.where(np.abs(a) >= np.abs(b), a, -b))
    got = merged_by_us(model, weights, "ties_svd", density=1.0, rank=20)
    assert gap(deltas(got)["first"], want) < 1e-5
    theirs = merged_by_peft(model, weights, "ties_svd", svd_rank=20, density=1.0)["first"]
    assert gap(theirs, want) > 0.3
