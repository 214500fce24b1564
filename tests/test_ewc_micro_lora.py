"""EWC over the modules of a MicroLoRA: by name, and as what a step is under."""

from __future__ import annotations

import numpy as np
import pytest
from helpers import bits
from helpers_ewc import (
    FORMS,
    close,
    ewc_backend,  # noqa: F401  the fixture
    expected,
    matrix_of,
    samples,
)

import lora_engine as le
from lora_engine import reference

pytestmark = [pytest.mark.usefixtures("ewc_backend"), pytest.mark.parametrize("form", FORMS)]

WIDE = {"q": (12, 7), "k": (12, 5), "v": (12, 7)}  # q and v share a pool


def made(seed=0):
    lora = le.MicroLoRA(
        le.MicroLoRAConfig(12, 7, rank=2, target_modules=("q", "k", "v"), shapes={"k": (12, 5)})
    )
    rng = np.random.default_rng(seed)
    for name, (width, out) in WIDE.items():
        lora.set_weights(
            name, rng.standard_normal((2, width)).astype("f4"),
            rng.standard_normal((out, 2)).astype("f4"),
        )  # fmt: skip
    return lora


def task(seed, name, n=8):
    return samples(np.random.default_rng(seed), n, *WIDE[name])


def adapter_of(lora, name):
    A, B, scaling = lora.weights(name)
    return reference.Adapter([A], [B], scaling)


def learned(form, lam=1.0):
    lora = made()
    ewc = le.EWC(lora, lam, form=form, fisher_samples=5)
    for i, name in enumerate(WIDE):
        assert ewc.observe(*task(i, name), name).samples == 8
    ewc.consolidate()
    return lora, ewc


def test_modules_are_named(form):
    lora = made()
    ewc = le.EWC(lora, 1.0, form=form, fisher_samples=5)
    ewc.observe(*task(1, "k"), "k")
    ewc.observe(*task(2, "v"), "v")
    done = ewc.consolidate()
    assert done.consolidated == {"k": 8, "v": 8}
    assert done.unobserved == ("q",)
    state = ewc.state()
    assert {key.split(".", 3)[3] for key in state} == {"k", "v"}
    for i, name in ((1, "k"), (2, "v")):
        want = expected(form, adapter_of(lora, name), (WIDE[name][1],), *task(i, name), 5)
        got = [[state[f"{form}.{field}.0.{name}"]] for field in ("first", "second")]
        assert close(matrix_of(form, *got), matrix_of(form, *want))
    assert ewc.consolidate("q").unobserved == ("q",)
    ewc.remove("k")
    assert {key.split(".", 3)[3] for key in ewc.state()} == {"v"}


def test_adapt_takes_the_same_step_as_a_pool_under_the_same_record(form):
    lora, ewc = learned(form)
    twin = made()
    state = ewc.state()
    for _ in range(2):  # the second step starts off the anchor
        for name in WIDE:
            x, grad = task(9, name, 3)
            feedback = le.Feedback.from_gradient(grad)
            assert lora.adapt(x, feedback, name, lr=0.1, ewc=ewc).applied
            m = twin._modules[name]
            fisher = [state[f"{form}.{field}.0.{name}"] for field in ("first", "second")]
            own = le.EWC(m.pool, 1.0, form=form)
            own._pools[m.pool]._storage.restore(
                m.slot, *([f] for f in fisher),
                *([state[f"{form}.anchor_{f}.0.{name}"]] for f in "AB"),
            )  # fmt: skip
            m.pool.adapt(x, grad, np.full(3, m.slot, np.int32), 0.1, ewc=own)
            for got, want in zip(lora.weights(name), twin.weights(name), strict=True):
                assert bits(np.float32(got)) == bits(np.float32(want))
    assert ewc.penalty() > 0


def test_the_penalty_holds_and_without_it_nothing_does(form):
    moved = {}
    for held in (True, False):
        lora, ewc = learned(form, 1e6)
        before = lora.weights("q")
        for i in range(20):
            x, grad = task(50 + i, "q", 1)
            lora.adapt(x, le.Feedback.from_gradient(grad), "q", 0.05, ewc=ewc if held else None)
        A, B, scaling = lora.weights("q")
        moved[held] = np.linalg.norm(scaling * (B @ A - before[1] @ before[0]))
    assert moved[True] < 0.05 * moved[False]


def test_apply_updates_is_under_the_penalty(form):
    lora, ewc = learned(form)
    once, other = learned(form)
    for name in WIDE:
        x, grad = task(3, name, 4)
        lora.adapt(x, le.Feedback.from_gradient(grad), name)
        once.adapt(x, le.Feedback.from_gradient(grad), name, lr=0.2, ewc=other)
    assert lora.apply_updates(0.2, ewc=ewc).applied
    for name in WIDE:
        for got, want in zip(lora.weights(name)[:2], once.weights(name)[:2], strict=True):
            assert close([got], [want], 1e-5)
    assert ewc.penalty() == pytest.approx(other.penalty(), rel=1e-3)


def test_what_is_refused(form):
    lora, ewc = learned(form)
    other = made()
    x, grad = task(1, "q", 1)
    feedback = le.Feedback.from_gradient(grad)
    before = {name: bits(lora.weights(name)[1]) for name in WIDE}
    lora.adapt(x, feedback, "q")
    cases = [
        (ValueError, "ewc: expected None without lr",
         lambda: lora.adapt(x, feedback, "q", ewc=ewc)),
        (ValueError, "ewc: expected one made for this MicroLoRA",
         lambda: other.adapt(x, feedback, "q", 0.1, ewc=ewc)),
        (ValueError, "ewc: expected one made for this MicroLoRA",
         lambda: lora.apply_updates(0.1, ewc=le.EWC(other, 1.0, form=form))),
        (TypeError, "ewc: expected an EWC or None, got str",
         lambda: lora.adapt(x, feedback, "q", 0.1, ewc="on")),
        (ValueError, "got one of a MicroLoRA",
         lambda: lora._modules["q"].pool.adapt(x, grad, np.zeros(1, "i4"), 0.1, ewc=ewc)),
        (ValueError, "module: expected one of q, k, v, got 'o'", lambda: ewc.observe(x, grad, "o")),
        (ValueError, "module: expected one of q, k, v, got 0", lambda: ewc.observe(x, grad, 0)),
        (ValueError, "module: expected one of q, k, v", lambda: ewc.consolidate(["q", "o"])),
        (ValueError, "grad: expected shape", lambda: ewc.observe(x, grad, "k")),
        (ValueError, "module", lambda: ewc.load_state({f"{form}.first.0.o": np.ones(1, "f4")})),
    ]  # fmt: skip
    state = ewc.state()
    for error, message, call in cases:
        with pytest.raises(error, match=message):
            call()
    assert {name: bits(lora.weights(name)[1]) for name in WIDE} == before
    assert {k: v.tobytes() for k, v in ewc.state().items()} == {
        k: v.tobytes() for k, v in state.items()
    }


def test_it_is_saved_beside_the_adapter(form, tmp_path):
    lora, ewc = learned(form)
    x, grad = task(4, "q", 3)
    lora.adapt(x, le.Feedback.from_gradient(grad), "q", 0.1, ewc=ewc)
    ewc.observe(x, grad, "q")
    lora.save(tmp_path / "adapter")
    file = tmp_path / "adapter" / "lora_engine_ewc.safetensors"
    ewc.save(file)
    lora.save(tmp_path / "adapter")  # which keeps other files
    again = le.MicroLoRA.load(tmp_path / "adapter")
    read = le.EWC.load(file, again)
    assert read.penalty() == ewc.penalty() > 0
    for one, held in ((lora, ewc), (again, read)):
        one.adapt(x, le.Feedback.from_gradient(grad), "q", 0.1, ewc=held)
        held.consolidate("q")
    assert bits(again.weights("q")[1]) == bits(lora.weights("q")[1])
    assert {k: v.tobytes() for k, v in read.state().items()} == {
        k: v.tobytes() for k, v in ewc.state().items()
    }
    with pytest.raises(le.FormatError, match="other weights"):
        le.EWC.load(file, made())


def test_settings_are_checked(form):
    for lam in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="ewc_lambda: expected 0 or more"):
            le.EWC(made(), lam, form=form)
    with pytest.raises(ValueError, match="form"):
        le.EWC(made(), 1.0, form=form + "s")
