"""Feedback: the gradients it stands for, and what it refuses."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from helpers import bits, f64, to_dtype
from helpers_files import trained, weight_bits

import lora_engine as le
from lora_engine import reference


def loss(x, y, base, weight, A, B, scaling):
    """weight/2 ‖base + delta - y‖² in float64, mean over the rows."""
    gap = reference.lora_delta(x, A, B, scaling) - f64(y) + (0.0 if base is None else f64(base))
    return weight / 2 * (gap**2).sum() / len(x)


def finite_differences(of, at, step=1e-5):
    """The gradient of a function of a matrix, by central differences."""
    gradient = np.zeros(at.shape)
    for index in np.ndindex(*at.shape):
        ends = []
        for sign in (1, -1):
            moved = at.copy()
            moved[index] += sign * step
            ends.append(of(moved))
        gradient[index] = (ends[0] - ends[1]) / (2 * step)
    return gradient


@pytest.mark.parametrize("kind", ["numpy", "torch"])
@pytest.mark.parametrize("weight", [1.0, 0.25, 3.0], ids=lambda w: f"weight{w}")
@pytest.mark.parametrize("with_base", [True, False], ids=["base", "no-base"])
@pytest.mark.parametrize(
    "shape", [(1, 3, 4, 1), (4, 5, 3, 2)], ids=["n1-in3-out4-r1", "n4-in5-out3-r2"]
)
def test_target_gradient_agrees_with_finite_differences(shape, with_base, weight, kind):
    n, d_in, d_out, r = shape
    rng = np.random.default_rng(shape)
    lora = trained(d_in, d_out, rank=r)
    A, B, s = (f64(w) if i < 2 else w for i, w in enumerate(lora.weights("q")))
    x, y, base = (
        to_dtype(rng.standard_normal((n, d)), "float32", kind) for d in (d_in, d_out, d_out)
    )
    base = base if with_base else None
    want_A = finite_differences(lambda a: loss(f64(x), y, base, weight, a, B, s), A)
    want_B = finite_differences(lambda b: loss(f64(x), y, base, weight, A, b, s), B)
    result = lora.adapt(x, le.Feedback.from_target(y, base=base, weight=weight), "q", lr=1.0)
    assert result.applied
    after = lora.weights("q")
    for was, now, want in ((A, after[0], want_A), (B, after[1], want_B)):
        assert np.allclose(was - now, want, rtol=1e-4, atol=1e-4 * np.abs(want).max())
    norm = np.sqrt((want_A**2).sum() + (want_B**2).sum())
    assert result.grad_norm == pytest.approx(norm, rel=1e-4)


@pytest.mark.parametrize("kind", ["numpy", "torch"])
def test_target_of_a_vector(kind):
    lora, rows = trained(), trained()
    rng = np.random.default_rng(0)
    x, y, base = (to_dtype(rng.standard_normal((1, d)), "float32", kind) for d in (6, 5, 5))
    assert lora.adapt(x[0], le.Feedback.from_target(y[0], base[0]), "q", lr=0.1).applied
    assert rows.adapt(x, le.Feedback.from_target(y, base), "q", lr=0.1).applied
    assert weight_bits(lora) == weight_bits(rows)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_target_in_16_bits_points_the_same_way(dtype):
    rng = np.random.default_rng(1)
    draws = [rng.standard_normal((8, d)) for d in (6, 5, 5)]
    steps = []
    for of in ("float32", dtype):
        lora = trained()
        before = lora.weights("q")
        x, y, base = (to_dtype(d, of) for d in draws)
        assert lora.adapt(x, le.Feedback.from_target(y, base), "q", lr=1.0).applied
        after = lora.weights("q")
        moves = [(a - b).ravel() for a, b in zip(after[:2], before[:2], strict=True)]
        steps.append(np.concatenate(moves))
    gap = np.linalg.norm(steps[0] - steps[1]) / np.linalg.norm(steps[0])
    assert 0 < gap < 0.02


def test_gradient_is_taken_as_it_is():
    gradient = np.ones((2, 5), "f4")
    assert le.Feedback.from_gradient(gradient).output_gradient(trained(), None, "q") is gradient


def test_base_of_zeros_is_no_base():
    x, y = np.ones((2, 6), "f4"), np.full((2, 5), 3, "f4")
    steps = []
    for base in (None, np.zeros((2, 5), "f4")):
        lora = trained()
        assert lora.adapt(x, le.Feedback.from_target(y, base), "q", lr=0.1).applied
        steps.append(weight_bits(lora))
    assert steps[0] == steps[1]


def test_target_that_is_met_moves_nothing():
    lora = trained()
    x = np.ones((3, 6), "f4")
    before = weight_bits(lora)
    result = lora.adapt(x, le.Feedback.from_target(lora.forward(x, "q")), "q", lr=0.1)
    assert (result.applied, result.grad_norm) == (True, 0.0)
    assert weight_bits(lora) == before


@pytest.mark.parametrize("kind", ["numpy", "torch"])
def test_inputs_are_left_as_they_were(kind):
    rng = np.random.default_rng(2)
    arrays = [to_dtype(rng.standard_normal((2, d)), "float32", kind) for d in (6, 5, 5)]
    before = [bits(a) for a in arrays]
    x, y, base = arrays
    assert trained().adapt(x, le.Feedback.from_target(y, base, 2.0), "q", lr=0.1).applied
    assert [bits(a) for a in arrays] == before


def test_nan_in_the_target_learns_nothing():
    lora = trained()
    before = weight_bits(lora)
    y = np.zeros((2, 5), "f4")
    y[1, 1] = np.nan
    result = lora.adapt(np.ones((2, 6), "f4"), le.Feedback.from_target(y), "q", lr=0.1)
    assert not result.applied
    assert "NaN or Inf" in result.note
    assert weight_bits(lora) == before


@pytest.mark.parametrize("kind", [np.float64, np.float32, int], ids=lambda k: k.__name__)
def test_weight_of_any_kind_keeps_float32(kind):
    """A NumPy float64 scalar would widen the whole gradient."""
    lora, plain = trained(), trained()
    scalar = kind(2)
    x, y = np.ones((2, 6), "f4"), np.zeros((2, 5), "f4")
    assert lora.adapt(x, le.Feedback.from_target(y, weight=scalar), "q", lr=0.1).applied
    assert plain.adapt(x, le.Feedback.from_target(y, weight=2.0), "q", lr=0.1).applied
    assert weight_bits(lora) == weight_bits(plain)


@pytest.mark.parametrize("weight", [-1, math.nan, math.inf, -math.inf])
def test_bad_weight_is_named(weight):
    with pytest.raises(ValueError, match=r"Feedback.from_target: weight: expected 0 or more, got "):
        le.Feedback.from_target(np.zeros(5, "f4"), weight=weight)


N, T = np.ones((2, 5), "f4"), torch.ones(2, 5)


@pytest.mark.parametrize("name", ["y", "base"])
@pytest.mark.parametrize(
    ("error", "match", "x", "value"),
    [
        (ValueError, r"expected shape \(2, 5\), got \(2, 6\)", "numpy", np.ones((2, 6), "f4")),
        (ValueError, r"expected shape \(2, 5\), got \(5,\)", "numpy", N[0]),
        (ValueError, r"expected shape \(2, 5\), got \(1, 5\)", "torch", T[:1]),
        (TypeError, r"expected float32, the dtype of x, got float64", "numpy", N.astype("f8")),
        (TypeError, r"expected torch.float32, .* got torch.bfloat16", "torch", T.bfloat16()),
        (TypeError, r"expected a NumPy array, as x is, got Tensor", "numpy", T),
        (TypeError, r"expected a torch tensor, as x is, got ndarray", "torch", N),
        (TypeError, r"expected a NumPy array, as x is, got list", "numpy", N.tolist()),
        (ValueError, r"expected a tensor outside autograd", "torch", T.clone().requires_grad_()),
    ],
)  # fmt: skip
def test_bad_target_is_named(name, error, match, x, value):
    lora = trained()
    before = weight_bits(lora)
    good = N if x == "numpy" else T
    rows = np.ones((2, 6), "f4") if x == "numpy" else torch.ones(2, 6)
    feedback = le.Feedback.from_target(**{"y": good, "base": good, name: value})
    for lr in (0.1, None):
        with pytest.raises(error, match=rf"^Feedback.from_target: {name}: {match}"):
            lora.adapt(rows, feedback, "q", lr=lr)
    assert weight_bits(lora) == before
    assert lora.apply_updates(lr=0.1).note == "nothing was accumulated"


@pytest.mark.parametrize(
    "feedback", [le.Feedback(), le.Feedback.from_gradient(None)], ids=["bare", "None"]
)
def test_feedback_made_of_nothing_is_refused(feedback):
    with pytest.raises(
        ValueError, match="expected one of from_gradient, from_target or from_quality"
    ):
        trained().adapt(np.ones((2, 6), "f4"), feedback, "q", lr=0.1)
