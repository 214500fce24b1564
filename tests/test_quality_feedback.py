"""Feedback by quality alone: its direction, its baseline, and what it cannot learn from."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch
from helpers import bits, f64, to_dtype
from helpers_files import trained, weight_bits

import lora_engine as le
from lora_engine import ops, reference
from lora_engine.adapters.exploration import Trace
from lora_engine.learning import feedback as notes

IN, OUT = 5, 3
from_quality = le.Feedback.from_quality


def row(kind="numpy", dtype="float32", n=None, width=IN, seed=0):
    values = np.random.default_rng(seed).standard_normal((n or 1, width))
    made = to_dtype(values, dtype, kind)
    return made if n else made[0]


def with_baseline(value, **options):
    """An adapter whose baseline is a number."""
    lora = trained(IN, OUT, **options)
    result = lora.adapt(row(), from_quality(value), "q", lr=1.0)
    assert not result.applied
    return lora


def moved(lora, x, feedback, lr=0.01):
    """How a step moves the delta of x."""
    before = f64(lora.forward(x, "q"))
    result = lora.adapt(x, feedback, "q", lr=lr)
    assert result.applied, result.note
    return f64(lora.forward(x, "q")) - before


# ---- the gradient ----


def test_the_gradient_is_that_of_expected_quality():
    """-(q - b) noise / sigma, averaged over noise, against finite differences of E[q]."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(24)
    weights = weights / weights.sum()
    places = np.stack([axis.ravel() for axis in np.meshgrid(nodes, nodes)], 1)
    chance = np.outer(weights, weights).ravel()
    lora, x, sigma = trained(IN, 2), row(), 0.3
    mu = f64(lora.forward(x, "q"))

    def quality(y):
        return 1.0 / (1.0 + np.exp(-(y @ np.array([1.5, -0.7]) + 0.4 * np.sin(3.0 * y[..., 0]))))

    def expected(center):
        return chance @ quality(center + sigma * places)

    step = 1e-5
    want = [(expected(mu + e) - expected(mu - e)) / (2 * step) for e in step * np.eye(2)]
    got = np.zeros(2)
    for place, weight in zip(places, chance, strict=True):
        noise = place.astype(np.float32)
        feedback = from_quality(quality(mu + sigma * f64(noise)), trace=Trace("q", noise, sigma))
        grad, why = feedback.quality_gradient(lora, x, "q", 0.5, None)
        assert why == ""
        got -= weight * f64(grad)  # L = -E[q]
    assert np.allclose(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [("numpy", "float32"), ("numpy", "float16"), ("torch", "float32"), ("torch", "bfloat16")],
)
def test_the_step_is_that_of_the_gradient(kind, dtype):
    x = row(kind, dtype, n=4)
    lora, same = with_baseline(0.25), with_baseline(0.25)
    delta, trace = lora.forward(x, "q", explore=0.5, return_trace=True)
    plain = lora.forward(x, "q")
    assert np.allclose(f64(delta), f64(plain) + 0.5 * f64(trace.noise), atol=0.03)
    qualities = np.array([1.0, 0.0, 0.25, 0.75])
    result = lora.adapt(x, from_quality(qualities, trace=trace), "q", lr=0.1)
    grad = trace.noise / 0.5 * to_dtype(-(qualities - 0.25)[:, None], dtype, kind)
    clip = min(1.0, 1.0 / result.grad_norm)
    plain = same.adapt(x, le.Feedback.from_gradient(grad), "q", lr=0.1 * clip)
    assert result.grad_norm == plain.grad_norm
    for got, want in zip(lora.weights("q"), same.weights("q"), strict=True):
        assert np.allclose(got, want, rtol=1e-5, atol=1e-6)


def test_good_moves_toward_what_was_explored_and_bad_away():
    x = row()
    good, bad = with_baseline(0.5), with_baseline(0.5)
    _, trace = good.forward(x, "q", explore=0.2, return_trace=True)
    up = moved(good, x, from_quality(0.9, trace=trace))
    down = moved(bad, x, from_quality(0.1, trace=trace))
    assert up @ f64(trace.noise) > 0 > down @ f64(trace.noise)
    assert np.dot(up, down) < -0.95 * np.linalg.norm(up) * np.linalg.norm(down)


def test_output_and_base():
    x, output, base = row(), row(width=OUT, seed=1), row(width=OUT, seed=2)
    good, bad = with_baseline(0.5), with_baseline(0.5)
    A, B, scaling = good.weights("q")
    mu = f64(base) + reference.lora_delta(f64(x)[None], A, B, scaling)[0]
    want = f64(output) - mu
    for lora, quality, sign in ((good, 0.9, 1.0), (bad, 0.1, -1.0)):
        feedback = from_quality(quality, output=output, base=base)
        grad, _ = feedback.quality_gradient(lora, x, "q", 0.5, None)
        assert np.allclose(f64(grad), -sign * 0.4 * want / np.linalg.norm(want), atol=1e-6)
        assert np.sign(moved(lora, x, feedback) @ want) == sign


def test_what_was_served_gives_no_direction():
    lora, x = with_baseline(0.5), row()
    result = lora.adapt(x, from_quality(1.0, output=lora.forward(x, "q")), "q", lr=1.0)
    assert (result.applied, result.note) == (False, notes.NO_DISTANCE)


# ---- the baseline ----


def test_baseline_is_the_moving_average_after_use():
    lora, x = trained(IN, OUT), row()
    baseline = None
    for quality in (0.2, 0.8, 0.8, 0.0, 1.0):
        _, trace = lora.forward(x, "q", explore=0.1, return_trace=True)
        result = lora.adapt(x, from_quality(quality, trace=trace), "q", lr=1e-3)
        assert result.applied == (baseline is not None)
        if baseline is None:
            assert result.note == notes.FIRST_QUALITY
            baseline = quality
        else:
            baseline = 0.9 * baseline + 0.1 * quality
        assert lora._modules["q"].baseline.value == pytest.approx(baseline)


def test_a_constant_quality_teaches_nothing():
    lora, x = trained(IN, OUT), row()
    before = weight_bits(lora)
    for _ in range(50):
        lora.forward(x, "q", explore=0.1)
        result = lora.adapt(x, from_quality(0.7), "q", lr=1.0)
        assert not result.applied
    assert result.note == notes.AS_EXPECTED
    assert weight_bits(lora) == before


def _door(way):
    """(forward, learn by a feedback) of an adapter that learns with a rate of 0.01."""
    if way == "sona":
        micro = le.MicroLoRAConfig(IN, OUT, target_modules=("q",))
        sona = le.Sona(le.SonaConfig(micro_lora=micro, instant_lr=0.01, max_grad_norm=1e6))
        return sona.forward, sona.instant_adapt
    lora = trained(IN, OUT)
    if way == "train_step":
        pipe = le.TrainingPipeline(
            le.TrainingConfig(learning_rate=0.01, max_grad_norm=None, ewc_lambda=None)
        )
        pipe.init_for_lora(lora)
        return lora.forward, lambda x, fb: pipe.train_step(lora, x, fb, "q")
    if way == "adapt":
        return lora.forward, lambda x, fb: lora.adapt(x, fb, "q", lr=0.01)

    def accumulates(x, feedback):
        if lora.adapt(x, feedback, "q").applied:
            lora.apply_updates(0.01)

    return lora.forward, accumulates


@pytest.mark.parametrize("door", ["adapt", "apply_updates", "train_step", "sona"])
@pytest.mark.parametrize(
    ("qualities", "direction", "steps"),
    [("random", "trace", 10_000), ("alternating", "trace", 1000), ("constant", "trace", 500),
     ("random", "output", 1000)],
)  # fmt: skip
def test_ten_thousand_steps_stay_bounded(qualities, direction, steps, door):
    forward, learn = _door(door)
    rng = np.random.default_rng(0)
    x, output = row(), row(width=OUT, seed=1) if direction == "output" else None
    for step in range(steps):
        quality = {"constant": 1.0, "random": rng.random(), "alternating": step % 2}[qualities]
        if output is None:
            forward(x, "q", explore=0.1)
        learn(x, from_quality(quality, output=output))
    assert np.abs(forward(x, "q")).max() < 30.0


@pytest.mark.parametrize("n", [None, 3])
@pytest.mark.parametrize("sigma", [0.01, 50.0])
def test_every_door_clips_a_quality_the_same_way(n, sigma):
    """sigma: so small that the norm is above 1, so large that it is below."""
    x = row(n=n)
    moved = []
    for door in ("adapt", "apply_updates", "train_step"):
        lora = with_baseline(0.25)
        if door == "train_step":
            options = {"batch_size": n or 1, "max_grad_norm": None, "ewc_lambda": None}
            pipe = le.TrainingPipeline(le.TrainingConfig(learning_rate=0.1, **options))
            pipe.init_for_lora(lora)
        _, trace = lora.forward(x, "q", explore=sigma, return_trace=True)
        feedback = from_quality(0.75, trace=trace)
        before = np.concatenate([part.ravel() for part in lora.weights("q")[:2]])
        if door == "adapt":
            norm = lora.adapt(x, feedback, "q", lr=0.1).grad_norm
        elif door == "apply_updates":
            lora.adapt(x, feedback, "q")
            lora.apply_updates(0.1)
        else:
            pipe.train_step(lora, x, feedback, "q")
        after = np.concatenate([part.ravel() for part in lora.weights("q")[:2]])
        moved.append((after - before) / 0.1)
    assert (norm > 1.0) is (sigma < 1.0)
    assert np.linalg.norm(moved[0]) == pytest.approx(min(norm, 1.0), rel=1e-4)
    for other in moved[1:]:
        assert np.allclose(other, moved[0], atol=1e-5)


def test_baselines_are_of_a_module_and_travel_with_the_folder(tmp_path):
    config = le.MicroLoRAConfig(IN, OUT, target_modules=("q", "v"))
    lora = le.MicroLoRA(config)
    lora.adapt(row(), from_quality(0.3), "q", lr=1.0)
    lora.save(tmp_path / "a")
    loaded = le.MicroLoRA.load(tmp_path / "a")
    assert loaded._modules["q"].baseline.value == 0.3
    assert loaded._modules["v"].baseline.value is None


# ---- traces ----


def test_the_last_trace_is_used_once_by_its_own_thread():
    lora, x = with_baseline(0.5), row()
    lora.forward(x, "q", explore=0.1)
    elsewhere = []
    other = threading.Thread(
        target=lambda: elsewhere.append(lora.adapt(x, from_quality(1.0), "q", lr=0.1).note)
    )
    other.start()
    other.join()
    assert elsewhere == [notes.NO_DIRECTION]
    assert lora.adapt(x, from_quality(1.0), "q", lr=0.1).applied
    again = lora.adapt(x, from_quality(1.0), "q", lr=0.1)
    assert (again.applied, again.note) == (False, notes.NO_DIRECTION)


def test_a_returned_trace_is_not_kept():
    lora, x = with_baseline(0.5), row()
    lora.forward(x, "q", explore=0.1, return_trace=True)
    assert not lora.adapt(x, from_quality(1.0), "q", lr=0.1).applied


def test_exploration_is_normal_and_follows_the_seed():
    config = le.MicroLoRAConfig(IN, OUT, target_modules=("q",), seed=5)
    x, zeros = row(n=4000), np.zeros((4000, IN), np.float32)
    drawn = [le.MicroLoRA(config).forward(zeros, "q", explore=2.0) for _ in range(2)]
    assert bits(drawn[0]) == bits(drawn[1])
    assert abs(drawn[0].mean()) < 0.08
    assert drawn[0].std() == pytest.approx(2.0, rel=0.05)
    out = np.full((4000, OUT), np.nan, np.float32)
    assert le.MicroLoRA(config).forward(x, "q", out, explore=2.0) is out
    assert bits(out) == bits(le.MicroLoRA(config).forward(x, "q", explore=2.0))


def test_exploring_is_differentiated_through():
    lora = trained(IN, OUT)
    x = row("torch").requires_grad_()
    y, trace = lora.forward(x, "q", explore=0.1, return_trace=True)
    y.sum().backward()
    A, B, scaling = lora.weights("q")
    assert np.allclose(f64(x.grad), scaling * np.ones(OUT) @ B @ A, atol=1e-5)
    assert isinstance(trace.noise, torch.Tensor)


def test_a_refused_call_keeps_the_trace():
    lora, x = with_baseline(0.5), row()
    lora.forward(x, "q", explore=0.1)
    with pytest.raises(ValueError, match="q: expected 1 or 1 numbers"):
        lora.adapt(x, from_quality([0.1, 0.2]), "q", lr=0.1)
    assert lora.adapt(x, from_quality(0.9), "q", lr=0.1).applied


@pytest.mark.filterwarnings("error")
def test_qualities_of_no_rows():
    x = row(n=1)[:0]
    lora, sona = with_baseline(0.5), le.Sona(le.SonaConfig(
        micro_lora=le.MicroLoRAConfig(IN, OUT, target_modules=("q",))))  # fmt: skip
    for result in (lora.adapt(x, from_quality([]), "q", lr=0.1),
                   lora.adapt(x, from_quality([]), "q"),
                   sona.instant_adapt(x, from_quality([]))):  # fmt: skip
        assert (result.applied, result.note) == (False, ops.NO_ROWS)
    assert lora._modules["q"].baseline.value == 0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_quality_that_autograd_records_is_a_number(dtype):
    q = torch.tensor([0.5, 0.25], dtype=dtype, requires_grad=True)
    assert from_quality(q).quality.tolist() == [0.5, 0.25]


# ---- refusals: nothing changes ----


@pytest.mark.parametrize("q", [-0.1, 1.1, float("nan"), [0.5, 2.0], [[0.5]]])
def test_quality_outside_its_range(q):
    with pytest.raises(ValueError, match=r"Feedback.from_quality: q: expected a number in 0..1"):
        from_quality(q)


@pytest.mark.parametrize("q", ["good", "0.5", ["0.5"], None, [0.5, None], [[0.1], 0.2], object()])
def test_quality_that_is_no_number(q):
    with pytest.raises(TypeError, match=r"Feedback.from_quality: q: expected numbers"):
        from_quality(q)


def refusals():
    x = row()
    trace = Trace("q", np.ones(OUT, np.float32), 0.1)
    return {
        "rows": (row(n=3), from_quality([0.1, 0.2], trace=trace), ValueError, "q: expected 1 or 3"),
        "width": (x, from_quality(1.0, trace=Trace("q", row(width=2), 0.1)), ValueError, "trace"),
        "module": (x, from_quality(1.0, trace=Trace("v", row(width=3), 0.1)), ValueError, "one of"),
        "output": (x, from_quality(1.0, output=row(width=4)), ValueError, "output: expected shape"),
        "base": (
            x, from_quality(1.0, output=row(width=3), base=row(width=4)), ValueError, "base",
        ),
        "list": (x, from_quality(1.0, output=[1.0, 2.0, 3.0]), TypeError, "output"),
        "x": ([1.0], from_quality(1.0, trace=trace), TypeError, "x: expected a NumPy array"),
    }  # fmt: skip


@pytest.mark.parametrize("case", refusals())
def test_refused_before_anything_changes(case):
    x, feedback, kind, text = refusals()[case]
    lora = with_baseline(0.5)
    before = weight_bits(lora)
    with pytest.raises(kind, match=text):
        lora.adapt(x, feedback, "q", lr=1.0)
    assert weight_bits(lora) == before
    assert lora._modules["q"].baseline.value == 0.5


def test_an_output_and_a_trace():
    with pytest.raises(ValueError, match="got both"):
        from_quality(0.5, output=row(), trace=Trace("q", row(), 0.1))


@pytest.mark.parametrize(
    ("explore", "kind"),
    [
        (0.0, ValueError),
        (-1, ValueError),
        ("1", TypeError),
        (np.nan, ValueError),
        (True, TypeError),
    ],
)
def test_exploration_that_is_none(explore, kind):
    with pytest.raises(kind, match=r"MicroLoRA.forward: explore: expected"):
        trained(IN, OUT).forward(row(), "q", explore=explore)
    with pytest.raises(TypeError, match="explore: expected a number, got None"):
        trained(IN, OUT).forward(row(), "q", return_trace=True)


def test_nan_is_reported():
    lora, x = with_baseline(0.5), np.full(IN, np.nan, np.float32)
    before = weight_bits(lora)
    lora.forward(x, "q", explore=0.1)
    result = lora.adapt(x, from_quality(1.0), "q", lr=1.0)
    assert not result.applied
    assert "NaN" in result.note
    assert weight_bits(lora) == before
