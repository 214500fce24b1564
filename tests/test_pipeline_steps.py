"""train_step: batches, tasks, and what is refused."""

from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
from helpers import to_dtype
from helpers_files import trained, weight_bits
from helpers_training import TARGET, drawn, started

import lora_engine as le
from lora_engine import reference
from lora_engine.learning import protection

KINDS = [("numpy", "float32"), ("torch", "float32"), ("torch", "bfloat16"), ("numpy", "float16")]


@pytest.mark.parametrize("kind", KINDS, ids="-".join)
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_batch_is_the_mean_of_its_rows(optimizer, kind):
    """At once, row by row, and in pieces: the same step."""
    moved = []
    x, g = (to_dtype(np.stack([r[i] for r in drawn(6)]), kind[1], kind[0]) for i in (0, 1))
    for cuts in ([0, 6], [0, 2, 6], [0, 1, 2, 3, 4, 5, 6]):
        lora, pipe = started(optimizer=optimizer, batch_size=6, learning_rate=0.1)
        for a, b in pairwise(cuts):
            result = pipe.train_step(lora, x[a:b], le.Feedback.from_gradient(g[a:b]), module="q")
            assert (result.applied, result.stepped) == (True, b == 6)
        assert pipe.steps("q") == 1
        moved.append(np.concatenate([w.ravel() for w in lora.weights("q")[:2]]))
    assert np.allclose(moved[0], moved[1], rtol=1e-4, atol=1e-5)
    assert np.allclose(moved[0], moved[2], rtol=1e-4, atol=1e-5)


def test_nothing_moves_before_the_batch_is_full():
    lora, pipe = started(batch_size=3)
    before = weight_bits(lora)
    (x, y), *_ = drawn(1)
    for _ in range(2):
        result = pipe.train_step(lora, x, TARGET(y), module="q")
        assert (result.applied, result.stepped, result.learning_rate) == (True, False, None)
    assert weight_bits(lora) == before
    assert pipe.flush(lora) == 1
    assert weight_bits(lora) != before
    assert (pipe.steps("q"), pipe.flush(lora)) == (1, 0)


def test_loss_and_norm_are_those_of_the_feedback():
    lora, pipe = started()
    x, y = (np.stack([r[i] for r in drawn(3)]) for i in (0, 1))
    base = np.ones_like(y)
    A, B, s = lora.weights("q")
    gap = reference.lora_delta(x, A, B, s) + base - y
    norm = np.sqrt(
        sum(((g / 3) ** 2).sum() for g in reference.adapter_gradients(x, 0.5 * gap, A, B, s))
    )
    result = pipe.train_step(lora, x, TARGET(y, base, weight=0.5), module="q")
    assert result.loss == pytest.approx(0.25 * (gap**2).sum() / 3, rel=1e-5)
    assert result.grad_norm == pytest.approx(norm, rel=1e-5)
    assert pipe.train_step(lora, x, TARGET(y, base, weight=0.0), module="q").loss == 0.0
    assert pipe.train_step(lora, x, le.Feedback.from_gradient(y), module="q").loss is None


def test_each_module_has_its_own_batch_and_schedule():
    lora = trained(7, 5, target_modules=("q", "k"), shapes={"k": (7, 3)})
    lora, pipe = started(lora, lr_schedule="linear", total_steps=4, batch_size=2)
    (x, y), *_ = drawn(1)
    for _ in range(4):
        pipe.train_step(lora, x, TARGET(y), module="q")
    pipe.train_step(lora, x, TARGET(y[:3]), module="k")
    assert (pipe.steps("q"), pipe.steps("k")) == (2, 0)
    assert pipe.learning_rate("q") == pytest.approx(1e-3 * 0.5)
    assert pipe.learning_rate("k") == pytest.approx(1e-3)


def test_a_rate_of_zero_says_that_nothing_was_learned():
    lora, pipe = started(lr_schedule="cosine", total_steps=2)
    (x, y), *_ = drawn(1)
    assert all(pipe.train_step(lora, x, TARGET(y), module="q").stepped for _ in range(2))
    before = weight_bits(lora)
    result = pipe.train_step(lora, x, TARGET(y), module="q")
    assert (result.stepped, result.applied) == (False, False)
    assert "the learning rate is 0 at step 2" in result.note
    assert weight_bits(lora) == before


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_gradient_that_is_not_finite_changes_nothing(optimizer, bad):
    lora, pipe = started(optimizer=optimizer)
    other, plain = started(optimizer=optimizer)
    for i, (x, y) in enumerate(drawn(6)):
        if i == 3:
            result = pipe.train_step(lora, x * np.float32(bad), TARGET(y), module="q")
            assert not result.applied
            assert "NaN or Inf" in result.note
        pipe.train_step(lora, x, TARGET(y), module="q")
        plain.train_step(other, x, TARGET(y), module="q")
    assert weight_bits(lora) == weight_bits(other)
    assert pipe.steps("q") == 6


def test_adamw_survives_a_gradient_whose_square_overflows():
    lora, pipe = started(optimizer="adamw", max_grad_norm=None)
    x, y = drawn(1)[0]
    before = weight_bits(lora)
    result = pipe.train_step(lora, x, le.Feedback.from_gradient(y * np.float32(1e25)), module="q")
    assert (result.applied, result.stepped) == (False, False)
    assert weight_bits(lora) == before
    assert pipe.train_step(lora, x, le.Feedback.from_gradient(y), module="q").stepped
    assert weight_bits(lora) != before


X, Y = np.ones(7, "f4"), np.ones(5, "f4")


@pytest.mark.parametrize(
    ("error", "match", "x", "feedback", "module"),
    [
        (ValueError, "module: expected one of q, got 'k'", X, TARGET(Y), "k"),
        (TypeError, "train_step: feedback: expected a Feedback, got ndarray", X, Y, "q"),
        (ValueError, "expected", X[:3], TARGET(Y), "q"),
        (ValueError, "expected", X, TARGET(Y[:2]), "q"),
        (ValueError, "expected", X, le.Feedback.from_gradient(Y[:2]), "q"),
        (TypeError, "expected", X.astype("f8"), le.Feedback.from_gradient(Y.astype("f8")), "q"),
    ],
)
def test_bad_input_changes_no_state(error, match, x, feedback, module):
    lora, pipe = started(batch_size=2)
    before = weight_bits(lora)
    with pytest.raises(error, match=match):
        pipe.train_step(lora, x, feedback, module=module)
    assert weight_bits(lora) == before
    assert (pipe.steps("q"), pipe.flush(lora)) == (0, 0)


def test_another_lora_is_refused():
    lora, pipe = started()
    for call in (
        lambda: pipe.train_step(trained(7, 5), X, TARGET(Y), module="q"),
        lambda: pipe.start_new_task(trained(7, 5)),
        lambda: pipe.flush(trained(7, 5)),
        lambda: pipe.train(trained(7, 5), [], module="q"),
        lambda: le.TrainingPipeline().train_step(lora, X, TARGET(Y), module="q"),
    ):
        with pytest.raises(ValueError, match="lora: expected the one of init_for_lora, got "):
            call()
    with pytest.raises(TypeError, match="lora: expected a MicroLoRA, got str"):
        pipe.init_for_lora("lora")
    with pytest.raises(TypeError, match="config: expected a TrainingConfig, got dict"):
        le.TrainingPipeline({})
    with pytest.raises(TypeError, match="boundary: expected a TaskBoundary, got str"):
        le.TrainingPipeline(boundary="")


# ---- tasks ------------------------------------------------------------------


class StandIn:
    """What the pipeline asks of an EWC, with the records of the pool's own."""

    def __init__(self, lora, ewc_lambda, gamma, form, fisher_samples):
        (m,) = lora._modules.values()
        self.slot, self.lora = m.slot, lora
        self.records = le.EWC(m.pool, ewc_lambda, form="factor")
        self._pools = {m.pool: self.records}
        self.rows, self.tasks = 0, 0

    def observe(self, x, grad, module):
        self.rows += len(x) if x.ndim == 2 else 1

    def consolidate(self):
        A, B, _ = self.lora.weights("q")
        self.records.set(self.slot, np.ones_like(A), np.ones_like(B))
        self.tasks += 1
        return SimpleNamespace(consolidated={"q": self.rows})


@pytest.fixture
def stand_in(monkeypatch):
    monkeypatch.setattr(protection, "_new_ewc", lambda lora, c: StandIn(
        lora, c.ewc_lambda, c.online_ewc_gamma, c.ewc_form, c.fisher_samples))  # fmt: skip


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("none", [None, 0])
def test_without_lambda_there_is_no_ewc(optimizer, none):
    lora, pipe = started(optimizer=optimizer, ewc_lambda=none)
    assert pipe.start_new_task(lora) is False


@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_the_step_is_proximal_in_the_plain_metric(optimizer):
    """theta = (plain step + lr c F anchor) / (1 + lr c F), whatever made the plain step."""
    lr, lam = 0.05, 3.0
    lora, pipe = started(optimizer=optimizer, ewc_lambda=lam, learning_rate=lr)
    free, plain = started(optimizer=optimizer, learning_rate=lr)
    anchor = lora.weights("q")
    pipe._protection.observe(*drawn(1)[0], "q")
    assert pipe.start_new_task(lora) is True
    x, y = drawn(1)[0]
    pipe.train_step(lora, x, TARGET(y), module="q")
    plain.train_step(free, x, TARGET(y), module="q")
    c = 2 * lam * lr
    for now, freely, was in zip(
        lora.weights("q")[:2], free.weights("q")[:2], anchor[:2], strict=True
    ):
        assert not np.array_equal(freely, was)
        assert np.allclose(now, (freely + c * was) / (1 + c), rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("stand_in")
def test_every_sample_is_observed_and_a_task_ends_with_its_last_batch():
    lora, pipe = started(batch_size=4, ewc_lambda=1.0)
    for x, y in drawn(6):
        pipe.train_step(lora, x, TARGET(y), module="q")
    ewc = pipe._protection.ewc
    pipe.train_step(lora, X * np.float32("nan"), TARGET(Y), module="q")
    assert (ewc.rows, ewc.tasks, pipe.steps("q")) == (6, 0, 1)
    assert pipe.start_new_task(lora)
    assert (ewc.tasks, pipe.steps("q")) == (1, 2)


@pytest.mark.usefixtures("stand_in")
def test_a_boundary_that_fires_starts_a_task():
    class Fires:
        def __init__(self):
            self.seen = []

        def update(self, value):
            self.seen.append(value)
            return len(self.seen) == 3

    boundary = Fires()
    lora = trained(7, 5)
    pipe = le.TrainingPipeline(le.TrainingConfig(ewc_lambda=1.0), boundary=boundary)
    pipe.init_for_lora(lora)
    results = [pipe.train_step(lora, x, TARGET(y), module="q") for x, y in drawn(5)]
    pipe.train_step(lora, X * np.float32("nan"), TARGET(Y), module="q")
    assert [r.new_task for r in results] == [False, False, True, False, False]
    assert boundary.seen == [r.loss for r in results]
    assert pipe._protection.ewc.tasks == 1


def test_a_boundary_sees_what_rises_with_a_new_task():
    seen = []
    lora = trained(7, 5)
    pipe = le.TrainingPipeline(boundary=SimpleNamespace(update=seen.append))
    pipe.init_for_lora(lora)
    by_gradient = pipe.train_step(lora, X, le.Feedback.from_gradient(Y), module="q")
    by_target = pipe.train_step(lora, X, TARGET(Y), module="q")
    for quality in (0.5, 0.25):
        _, trace = lora.forward(X, "q", explore=0.1, return_trace=True)
        rated = le.Feedback.from_quality(quality, trace=trace)
        pipe.train_step(lora, X, rated, module="q")
    assert seen == [by_gradient.grad_norm, by_target.loss, 0.75]


# ---- by quality -------------------------------------------------------------


@pytest.mark.parametrize("way", ["trace", "last", "output"])
def test_a_quality_is_learned_from_as_adapt_does(way):
    """The same steps and baseline; clipped to 1 there, and here by max_grad_norm's default."""
    lora, pipe = started(learning_rate=0.05)
    same = trained(7, 5, rank=2)
    for i, quality in enumerate((0.5, 0.9, 0.1, 0.4)):
        x, output = drawn(1, i)[0]
        for one in (lora, same):
            _, trace = one.forward(x, "q", explore=0.2, return_trace=True)
            given = {"trace": trace} if way == "trace" else {}
            if way == "last":
                one.forward(x, "q", explore=0.2)
            feedback = le.Feedback.from_quality(
                quality, **given, output=output if way == "output" else None
            )
            if one is lora:
                result = pipe.train_step(lora, x, feedback, module="q")
            else:
                want = same.adapt(x, feedback, "q", lr=0.05)
        assert (result.applied, result.note) == (want.applied, want.note)
        assert result.applied is (i > 0)
        assert result.loss is None
    assert lora._modules["q"].baseline.value == same._modules["q"].baseline.value
    for got, wanted in zip(lora.weights("q"), same.weights("q"), strict=True):
        assert np.allclose(got, wanted, rtol=1e-5, atol=1e-6)


def test_a_quality_without_a_direction_only_sets_the_baseline():
    lora, pipe = started()
    before = weight_bits(lora)
    for quality in (0.5, 1.0):
        result = pipe.train_step(lora, X, le.Feedback.from_quality(quality), module="q")
        assert not result.applied
        assert "has no direction" in result.note
    assert weight_bits(lora) == before
    assert pipe.flush(lora) == 0
    assert lora._modules["q"].baseline.value == pytest.approx(0.55)
