"""MicroLoRA: serving, learning, dropout, presets, and what it refuses."""

from __future__ import annotations

from time import perf_counter

import numpy as np
import pytest
from helpers import (
    LAYOUTS,
    TOLERANCE,
    bits,
    delta_error,
    f64,
    magnitude,
    poisoned,
    strided,
    to_dtype,
)
from helpers_files import mean_gradients, step_error, trained, weight_bits

import lora_engine as le
from lora_engine import reference

KINDS = [
    ("numpy", "float32"),
    ("torch", "float32"),
    ("torch", "bfloat16"),
    ("numpy", "float16"),
    ("torch", "float16"),
]
SHAPES = [(1, 1, 1, 1), (1, 127, 64, 1), (3, 64, 127, 2), (5, 2049, 33, 4), (70, 17, 2049, 8)]


def shape_id(shape: tuple[int, ...]) -> str:
    n, d_in, d_out, r = shape
    return f"n{n}-in{d_in}-out{d_out}-r{r}"


def kind_id(kind: tuple[str, str]) -> str:
    return "-".join(kind)


shapes = pytest.mark.parametrize("shape", SHAPES, ids=shape_id)
kinds = pytest.mark.parametrize("kind", KINDS, ids=kind_id)


def drawn(shape: tuple[int, ...], kind: tuple[str, str], **config):
    """(lora, x, grad) of a shape."""
    n, d_in, d_out, r = shape
    rng = np.random.default_rng(shape)
    lora = trained(d_in, d_out, rank=r, alpha=3.0, **config)
    x = to_dtype(rng.standard_normal((n, d_in)), kind[1], kind[0])
    grad = to_dtype(rng.standard_normal((n, d_out)), kind[1], kind[0])
    return lora, x, grad


# ---- serving ----------------------------------------------------------------


@kinds
@shapes
def test_fresh_adapter_changes_nothing(shape, kind):
    n, d_in, d_out, r = shape
    _, x, y = drawn(shape, kind)
    lora = le.MicroLoRA(le.MicroLoRAConfig(d_in, d_out, rank=r))
    out = poisoned(x, n, d_out)
    assert lora.forward(x, "q_proj", out=out) is out
    assert not f64(out).any()
    before = f64(y).copy()
    lora.forward_add(x, "q_proj", y)
    assert np.array_equal(f64(y), before)


@pytest.mark.parametrize("d_in", [1, 7, 4096], ids=lambda d: f"in{d}")
def test_fresh_A_is_kaiming_uniform(d_in):
    lora = le.MicroLoRA(le.MicroLoRAConfig(d_in, 3, rank=64))
    bound = 1 / np.sqrt(d_in)  # of torch.nn.init.kaiming_uniform_(a=sqrt 5)
    A, B, scaling = lora.weights("q_proj")
    assert np.abs(A).max() <= bound
    assert not B.any()
    assert scaling == 4.0 / 64
    spread = A.std() / (bound / np.sqrt(3))
    assert abs(spread - 1) < 4 / np.sqrt(A.size)
    assert A.tobytes() != lora.weights("v_proj")[0].tobytes()


def test_seed_fixes_the_first_weights():
    def made(seed):
        return weight_bits(le.MicroLoRA(le.MicroLoRAConfig(8, 8, seed=seed)))

    assert made(3) == made(3)
    assert made(3) != made(4)


@kinds
@shapes
def test_forward_matches_reference(shape, kind):
    lora, x, _ = drawn(shape, kind)
    A, B, s = lora.weights("q")
    ref, size = reference.lora_delta(f64(x), A, B, s), magnitude(x, A, B, s)
    tolerance = TOLERANCE[kind[1]]
    made = lora.forward(x, "q")
    assert type(made) is type(x)
    assert made.dtype == x.dtype
    assert delta_error(made, ref, size) <= tolerance
    out = poisoned(x, shape[0], shape[2])
    assert lora.forward(x, "q", out=out) is out
    assert bits(out) == bits(made)
    one = lora.forward(x[0], "q")
    assert one.shape == (shape[2],)
    assert bits(one) == bits(made[0])  # a row's delta does not depend on its batch


@kinds
@shapes
def test_forward_add_matches_reference(shape, kind):
    lora, x, y = drawn(shape, kind)
    A, B, s = lora.weights("q")
    ref = f64(y) + reference.lora_delta(f64(x), A, B, s)
    size = magnitude(x, A, B, s) + np.abs(f64(y))
    row = y[0].copy() if kind[0] == "numpy" else y[0].clone()
    assert lora.forward_add(x, "q", y) is y
    assert delta_error(y, ref, size) <= TOLERANCE[kind[1]]
    assert lora.forward_add(x[0], "q", row) is row
    assert bits(row) == bits(y[0])


@pytest.mark.parametrize("layout", LAYOUTS)
@kinds
def test_layout_changes_no_bit(layout, kind):
    lora, x, grad = drawn((5, 33, 18, 2), kind)
    out = strided(poisoned(x, 5, 18), layout)
    assert bits(lora.forward(strided(x, layout), "q", out=out)) == bits(lora.forward(x, "q"))
    other = trained(33, 18, rank=2, alpha=3.0)
    fb = le.Feedback.from_gradient
    assert lora.adapt(x, fb(grad), "q", lr=0.1).applied
    assert other.adapt(strided(x, layout), fb(strided(grad, layout)), "q", lr=0.1).applied
    assert weight_bits(lora) == weight_bits(other)


def test_read_only_input_is_served_and_learned_from():
    lora, x, grad = drawn((3, 8, 6, 2), ("numpy", "float32"))
    plain = trained(8, 6, rank=2, alpha=3.0)
    x.flags.writeable = grad.flags.writeable = False
    assert bits(lora.forward(x, "q")) == bits(lora.forward(x.copy(), "q"))
    assert lora.adapt(x, le.Feedback.from_gradient(grad), "q", lr=0.1).applied
    assert plain.adapt(x.copy(), le.Feedback.from_gradient(grad.copy()), "q", lr=0.1).applied
    assert weight_bits(lora) == weight_bits(plain)


def test_modules_have_their_own_shapes_and_weights():
    names = ("model.layers.0.q_proj", "model.layers.0.k_proj", "größe.投影")
    lora = trained(12, 9, target_modules=names, shapes={names[1]: (12, 4), names[2]: (7, 9)})
    want = {names[0]: (12, 9), names[1]: (12, 4), names[2]: (7, 9)}
    rng = np.random.default_rng(0)
    for name, (d_in, d_out) in want.items():
        x = rng.standard_normal((2, d_in)).astype("f4")
        A, B, s = lora.weights(name)
        assert (A.shape, B.shape) == ((2, d_in), (d_out, 2))
        ref, size = reference.lora_delta(x, A, B, s), magnitude(x, A, B, s)
        assert delta_error(lora.forward(x, name), ref, size) <= 1e-6
    before = weight_bits(lora)
    grad = np.ones((2, 4), "f4")
    x = np.ones((2, 12), "f4")
    assert lora.adapt(x, le.Feedback.from_gradient(grad), names[1], lr=0.1).applied
    after = weight_bits(lora)
    assert [n for n in names if before[n] != after[n]] == [names[1]]


# ---- learning ---------------------------------------------------------------


@kinds
@shapes
def test_adapt_is_the_reference_step(shape, kind):
    lora, x, grad = drawn(shape, kind)
    before = lora.weights("q")
    start = perf_counter()
    result = lora.adapt(x, le.Feedback.from_gradient(grad), "q", lr=0.5)
    elapsed = (perf_counter() - start) * 1e6
    assert (result.applied, result.note) == (True, "")
    assert step_error(lora, "q", before, f64(x), f64(grad), 0.5) <= 1e-6
    norm = np.sqrt(sum((g**2).sum() for g in mean_gradients(f64(x), f64(grad), *before)))
    assert result.grad_norm == pytest.approx(norm, rel=1e-5)
    assert 0 < result.latency_us <= elapsed


@kinds
def test_adapt_takes_a_vector(kind):
    lora, x, grad = drawn((1, 33, 18, 2), kind)
    other = trained(33, 18, rank=2, alpha=3.0)
    assert lora.adapt(x[0], le.Feedback.from_gradient(grad[0]), "q", lr=0.5).applied
    assert other.adapt(x, le.Feedback.from_gradient(grad), "q", lr=0.5).applied
    assert weight_bits(lora) == weight_bits(other)


@kinds
@shapes
def test_updates_are_the_mean_of_all_rows(shape, kind):
    lora, x, grad = drawn(shape, kind)
    before, untouched = lora.weights("q"), weight_bits(lora)
    fb = le.Feedback.from_gradient
    cut = max(1, shape[0] // 3)
    calls = [(x[:cut], grad[:cut]), (x[cut:], grad[cut:]), (x[0], grad[0])]
    for rows, up in calls:
        result = lora.adapt(rows, fb(up), "q")
        assert result.applied == bool(len(rows))
        if result.applied:
            norm = np.sqrt(sum((g**2).sum() for g in mean_gradients(f64(rows), f64(up), *before)))
            assert result.grad_norm == pytest.approx(norm, rel=1e-5)
    assert weight_bits(lora) == untouched
    all_x, all_grad = np.vstack([f64(x), f64(x[:1])]), np.vstack([f64(grad), f64(grad[:1])])
    result = lora.apply_updates(lr=0.5)
    assert (result.applied, result.note) == (True, "")
    assert step_error(lora, "q", before, all_x, all_grad, 0.5) <= 1e-6
    norm = np.sqrt(sum((g**2).sum() for g in mean_gradients(all_x, all_grad, *before)))
    assert result.grad_norm == pytest.approx(norm, rel=1e-5)
    after = weight_bits(lora)
    assert lora.apply_updates(lr=0.5)[:2] == (False, "nothing was accumulated")
    assert weight_bits(lora) == after


def test_apply_updates_steps_every_module_that_has_something():
    lora = trained(target_modules=("a", "b", "c"))
    before, old = weight_bits(lora), {name: lora.weights(name) for name in "abc"}
    rng = np.random.default_rng(1)
    x, grad = rng.standard_normal((4, 6)).astype("f4"), rng.standard_normal((4, 5)).astype("f4")
    for name in "ac":
        assert lora.adapt(x, le.Feedback.from_gradient(grad), name).applied
    result = lora.apply_updates(lr=0.25)
    for name in "ac":
        assert step_error(lora, name, old[name], x, grad, 0.25) <= 1e-6
    assert weight_bits(lora)["b"] == before["b"]
    norms = [(g**2).sum() for name in "ac" for g in mean_gradients(x, grad, *old[name])]
    assert result.grad_norm == pytest.approx(np.sqrt(sum(norms)), rel=1e-5)


BAD = {
    "nan-in-grad": (1.0, np.nan),
    "inf-in-grad": (1.0, np.inf),
    "nan-in-x": (np.nan, 1.0),
    "inf-in-x": (-np.inf, 1.0),
    "product-overflows": (3e38, 3e38),
}


@pytest.mark.parametrize("rows", [1, 3, 70], ids=lambda n: f"n{n}")
@pytest.mark.parametrize("what", BAD)
@pytest.mark.parametrize("at_once", [True, False], ids=["lr", "accumulate"])
def test_gradient_with_nan_or_inf_changes_nothing(what, rows, at_once):
    rng = np.random.default_rng(2)
    x = rng.standard_normal((rows, 6)).astype("f4")
    grad = rng.standard_normal((rows, 5)).astype("f4")
    fb = le.Feedback.from_gradient
    lora, spared = trained(), trained()
    for each in (lora, spared):
        assert each.adapt(x, fb(grad), "q").applied
    bad_x, bad_grad = x.copy(), grad.copy()
    bad_x[-1, 2], bad_grad[-1, 1] = BAD[what]
    before = weight_bits(lora)
    result = lora.adapt(bad_x, fb(bad_grad), "q", lr=0.1 if at_once else None)
    assert not result.applied
    assert "NaN or Inf" in result.note
    assert not np.isfinite(result.grad_norm)
    assert weight_bits(lora) == before
    for each in (lora, spared):  # what waits is what waited
        assert each.apply_updates(lr=0.1).applied
    assert weight_bits(lora) == weight_bits(spared)


def test_accumulated_overflow_is_reported_and_dropped():
    """Two gradients that float32 holds, and their sum that it does not."""
    lora = trained(6, 5, rank=1, alpha=1.0)
    lora.set_weights("q", np.ones((1, 6), "f4"), np.zeros((5, 1), "f4"))
    before = weight_bits(lora)
    x, grad = np.zeros(6, "f4"), np.zeros(5, "f4")
    x[0], grad[0] = 1.0, 2e38
    for _ in range(2):
        assert lora.adapt(x, le.Feedback.from_gradient(grad), "q").applied
    result = lora.apply_updates(lr=0.1)
    assert not result.applied
    assert result.note == "q: the gradient or the step holds NaN or Inf: the adapter is untouched"
    assert weight_bits(lora) == before
    assert lora.apply_updates(lr=0.1).note == "nothing was accumulated"


@kinds
def test_empty_batch_learns_nothing_and_says_so(kind):
    lora, x, grad = drawn((2, 33, 18, 2), kind)
    before = weight_bits(lora)
    assert lora.forward(x[:0], "q").shape == (0, 18)
    for feedback in (le.Feedback.from_gradient(grad[:0]), le.Feedback.from_target(grad[:0])):
        for lr in (0.1, None):
            result = lora.adapt(x[:0], feedback, "q", lr=lr)
            assert result[:2] == (False, "x has no rows: nothing was learned")
            assert result.grad_norm == 0
    assert weight_bits(lora) == before
    assert lora.apply_updates(lr=0.1).note == "nothing was accumulated"


def test_ten_thousand_adapts_stay_bounded_and_converge():
    lora = le.MicroLoRA(le.MicroLoRAConfig(16, 12, target_modules=("q",)))
    teacher = trained(16, 12, draw=5, alpha=0.5)
    rng = np.random.default_rng(6)
    x = rng.standard_normal((64, 16)).astype("f4")
    y = teacher.forward(x, "q")

    def loss():
        return float(((lora.forward(x, "q") - y) ** 2).sum())

    first = loss()
    seen = []
    for i in range(10_000):
        row = slice(i % 64, i % 64 + 1)
        assert lora.adapt(x[row], le.Feedback.from_target(y[row]), "q", lr=0.01).applied
        if i % 1000 == 999:
            seen.append(loss())
    assert seen[0] < first / 2
    assert seen[-1] < first * 1e-6
    A, B, _ = lora.weights("q")
    assert max(np.abs(A).max(), np.abs(B).max()) < 10


def test_ten_thousand_adapts_to_a_target_out_of_reach_stay_bounded():
    """A constant pull to a target that no linear map of x reaches."""
    lora = le.MicroLoRA(le.MicroLoRAConfig(16, 12, target_modules=("q",)))
    x = np.zeros((2, 16), "f4")
    x[:, 0] = 1, -1
    y = np.ones((2, 12), "f4")
    y[:, 1] = 1, -1  # this part is reachable
    for _ in range(10_000):
        lora.adapt(x, le.Feedback.from_target(y), "q", lr=0.05)
    out = lora.forward(x, "q")
    assert np.allclose(out[:, 1], y[:, 1], atol=1e-3)
    assert np.abs(np.delete(out, 1, axis=1)).max() < 1e-3
    assert max(np.abs(w).max() for w in lora.weights("q")[:2]) < 10


# ---- configuration ----------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "rank", "modules", "checkpointing"),
    [
        ("low_latency", 1, ("q_proj",), False),
        ("balanced", 2, ("q_proj", "v_proj"), False),
        ("high_quality", 4, ("q_proj", "k_proj", "v_proj", "o_proj"), False),
        ("minimal_memory", 1, ("q_proj",), True),
    ],
)
def test_presets(name, rank, modules, checkpointing):
    lora = le.MicroLoRA(le.MicroLoRAConfig.preset(name, 24))
    assert lora.config.gradient_checkpointing is checkpointing
    assert tuple(weight_bits(lora)) == modules
    for module in modules:
        A, B, scaling = lora.weights(module)
        assert (A.shape, B.shape, scaling) == ((rank, 24), (24, rank), 2.0)


def test_rslora_scaling():
    lora = trained(rank=9, alpha=6.0, use_rslora=True)
    assert lora.weights("q")[2] == 2.0
    x = np.ones(6, "f4")
    A, B, _ = lora.weights("q")
    ref, size = reference.lora_delta(x, A, B, 2.0), magnitude(x, A, B, 2.0)
    assert delta_error(lora.forward(x, "q"), ref, size) <= 1e-6


def test_repr_names_what_it_adapts():
    assert repr(trained(rank=2, alpha=5.0)) == "MicroLoRA(rank=2, scaling=2.5, modules=['q'])"
