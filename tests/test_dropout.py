"""Dropout: a mask on x in adapt, a function of seed, module and step."""

from __future__ import annotations

import numpy as np
import pytest
from helpers import (
    bits,
    f64,
    to_dtype,
)
from helpers_files import trained, weight_bits
from test_micro_lora import KINDS, drawn, kinds

import lora_engine as le

# ---- dropout ----------------------------------------------------------------


def dropped(steps: int, p: float, *, seed: int = 0, module: str = "q", kind=KINDS[0], n: int = 1):
    """The scaled masks that adapt put on x [n, 32], step by step, read from B.

    With A the identity, B zero and x ones, gB = scaling grad maskᵀ.
    """
    config = le.MicroLoRAConfig(
        32, n, rank=32, alpha=32.0, dropout=p, seed=seed, target_modules=(module,)
    )
    lora = le.MicroLoRA(config)
    x = to_dtype(np.ones((n, 32)), kind[1], kind[0])
    grad = to_dtype(-n * np.eye(n), kind[1], kind[0])  # output i hears row i alone
    masks = []
    for _ in range(steps):
        lora.set_weights(module, np.eye(32, dtype="f4"), np.zeros((n, 32), "f4"))
        assert lora.adapt(x, le.Feedback.from_gradient(grad), module, lr=1.0).applied
        masks.append(lora.weights(module)[1])
    return np.array(masks)


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 0.9], ids=lambda p: f"p{p}")
@kinds
def test_dropout_keeps_the_expectation(p, kind):
    masks = dropped(200, p, kind=kind, n=4)
    keep = np.float64(1 - p)
    rel = 1e-6 if kind[1] == "float32" else 2**-8
    assert np.allclose(masks[masks != 0], 1 / keep, rtol=rel)
    kept = np.mean(masks != 0)
    sigma = np.sqrt(p * keep / masks.size)
    assert abs(kept - keep) <= 4 * sigma
    if p:
        rows = (masks != 0).reshape(-1, 32)
        assert len(np.unique(rows, axis=0)) > 0.9 * len(np.unique(rows[:, :16], axis=0)) > 50


@kinds
def test_dropout_scales_once_and_rounds_once(kind):
    """In bfloat16 the rounding of 1/(1-p) itself would shift every value the same way."""
    config = le.MicroLoRAConfig(64, 1, rank=64, alpha=64.0, dropout=0.1, target_modules=("q",))
    lora = le.MicroLoRA(config)
    lora.set_weights("q", np.eye(64, dtype="f4"), np.zeros((1, 64), "f4"))
    x = to_dtype(np.random.default_rng(0).uniform(1, 2, 64), kind[1], kind[0])
    grad = to_dtype(-np.ones(1), kind[1], kind[0])
    assert lora.adapt(x, le.Feedback.from_gradient(grad), "q", lr=1.0).applied
    seen = lora.weights("q")[1][0]  # x as it was after dropout
    want = f64(to_dtype(f64(x) / 0.9, kind[1]))
    kept = seen != 0
    assert 40 < kept.sum() < 64
    assert np.allclose(seen[kept], want[kept], rtol=1e-6)


def test_dropout_repeats_with_seed_module_and_step():
    masks = dropped(5, 0.5, n=2)
    assert np.array_equal(masks, dropped(5, 0.5, n=2))
    assert np.array_equal(masks != 0, dropped(5, 0.5, n=2, kind=KINDS[2]) != 0)
    for i in range(5):
        for j in range(i):
            assert not np.array_equal(masks[i], masks[j])
    assert not np.array_equal(masks[:, 0], masks[:, 1])
    for other in (dropped(5, 0.5, n=2, seed=1), dropped(5, 0.5, n=2, module="v")):
        assert not (masks == other).all(axis=(1, 2)).any()


def test_dropout_masks_the_accumulated_gradient_alike():
    at_once, later = trained(dropout=0.5), trained(dropout=0.5)
    rng = np.random.default_rng(3)
    for _ in range(4):
        x, grad = rng.standard_normal((2, 6)).astype("f4"), rng.standard_normal((2, 5)).astype("f4")
        fb = le.Feedback.from_gradient(grad)
        assert at_once.adapt(x, fb, "q", lr=0.1).applied
        assert later.adapt(x, fb, "q").applied
        assert later.apply_updates(lr=0.1).applied
        for got, want in zip(later.weights("q")[:2], at_once.weights("q")[:2], strict=True):
            assert np.allclose(got, want, rtol=1e-5, atol=1e-6)


def test_refused_adapt_does_not_advance_dropout():
    lora, spared = trained(dropout=0.5), trained(dropout=0.5)
    fb = le.Feedback.from_gradient
    x, grad = np.ones((1, 6), "f4"), np.ones((1, 5), "f4")
    assert not lora.adapt(x, fb(grad * np.float32(np.nan)), "q", lr=0.1).applied
    for each in (lora, spared):
        assert each.adapt(x, fb(grad), "q", lr=0.1).applied
    assert weight_bits(lora) == weight_bits(spared)


@kinds
def test_dropout_leaves_forward_alone(kind):
    lora, x, _ = drawn((3, 33, 18, 2), kind, dropout=0.9)
    plain = trained(33, 18, rank=2, alpha=3.0)
    assert bits(lora.forward(x, "q")) == bits(plain.forward(x, "q"))
