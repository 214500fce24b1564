"""What MicroLoRA refuses, and MicroLoRA under several threads."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch
from helpers import (
    bits,
)
from helpers_files import redraw, trained, weight_bits

import lora_engine as le

# ---- refusals ---------------------------------------------------------------

X, G = np.ones((2, 6), "f4"), np.ones((2, 5), "f4")
FB = le.Feedback.from_gradient(G)


@pytest.mark.parametrize(
    "call",
    [
        lambda lora: lora.forward(X, "nope"),
        lambda lora: lora.forward_add(X, "nope", G.copy()),
        lambda lora: lora.adapt(X, FB, "nope", lr=0.1),
        lambda lora: lora.weights("nope"),
        lambda lora: lora.set_weights("nope", X, G),
    ],
    ids=["forward", "forward_add", "adapt", "weights", "set_weights"],
)
def test_unknown_module_is_named(call):
    with pytest.raises(ValueError, match=r"expected one of q, v, got 'nope'"):
        call(trained(target_modules=("q", "v")))


@pytest.mark.parametrize(
    ("error", "match", "call"),
    [
        (ValueError, r"x: .*\[n, 6\], got \[2, 5\]", lambda m: m.forward(G, "q")),
        (ValueError, r"x: .*\[n, 6\], got \[1, 2, 6\]", lambda m: m.forward(X[None], "q")),
        (ValueError, r"x: .*\[n, 6\], got \[\]", lambda m: m.forward(np.zeros((), "f4"), "q")),
        (TypeError, r"x: .*got float64", lambda m: m.forward(X.astype("f8"), "q")),
        (TypeError, r"x: .*got list", lambda m: m.forward(X.tolist(), "q")),
        (TypeError, r"x: .*got list", lambda m: m.adapt(X.tolist(), FB, "q")),
        (TypeError, r"x: .*got list", lambda m: m.adapt(X.tolist(), FB, "q", lr=0.1)),
        (ValueError, r"out: .*got \[2, 6\]", lambda m: m.forward(X, "q", out=X.copy())),
        (TypeError, r"out: .*got float64", lambda m: m.forward(X, "q", out=G.astype("f8"))),
        (ValueError, r"y: .*got none", lambda m: m.forward_add(X, "q", None)),
        (ValueError, r"grad: .*\[2, 5\], got \[1, 5\]",
         lambda m: m.adapt(X, le.Feedback.from_gradient(G[:1]), "q")),
        (TypeError, r"grad: .*got float64",
         lambda m: m.adapt(X, le.Feedback.from_gradient(G.astype("f8")), "q", lr=0.1)),
        (TypeError, r"feedback: expected a Feedback, got ndarray", lambda m: m.adapt(X, G, "q")),
        (ValueError, r"Feedback: .*got none", lambda m: m.adapt(X, le.Feedback(), "q", lr=0.1)),
        (ValueError, r"lr: .*got nan", lambda m: m.adapt(X, FB, "q", lr=float("nan"))),
        (ValueError, r"lr: .*got -1", lambda m: m.adapt(X, FB, "q", lr=-1)),
        (ValueError, r"lr: .*got inf", lambda m: m.adapt(X, FB, "q", lr=1e300)),
        (ValueError, r"A: expected shape \(2, 6\), got \(2, 5\)",
         lambda m: m.set_weights("q", G, G.T)),
        (ValueError, r"B: expected shape \(5, 2\), got \(2, 5\)",
         lambda m: m.set_weights("q", X, G)),
        (TypeError, r"A: .*got float64", lambda m: m.set_weights("q", X.astype("f8"), G.T)),
        (TypeError, r"A: .*got list", lambda m: m.set_weights("q", X.tolist(), G.T)),
    ],
)  # fmt: skip
@pytest.mark.parametrize("dropout", [0.0, 0.5], ids=["p0", "p0.5"])
def test_refusal_names_the_argument_and_changes_nothing(error, match, call, dropout):
    lora = trained(dropout=dropout)
    before = weight_bits(lora)
    with pytest.raises(error, match=match):
        call(lora)
    assert weight_bits(lora) == before
    assert lora.apply_updates(lr=0.1).note == "nothing was accumulated"


def test_refused_apply_keeps_what_waits():
    lora, spared = trained(), trained()
    for each in (lora, spared):
        each.adapt(X, FB, "q")
    with pytest.raises(ValueError, match="lr"):
        lora.apply_updates(lr=float("nan"))
    for each in (lora, spared):
        assert each.apply_updates(lr=0.1).applied
    assert weight_bits(lora) == weight_bits(spared)


def test_forward_refuses_a_read_only_or_shared_out():
    lora = trained(6, 6)
    out = np.ones((2, 6), "f4")
    out.flags.writeable = False
    with pytest.raises(ValueError, match=r"out: .*read-only"):
        lora.forward(X, "q", out=out)
    x = X.copy()
    with pytest.raises(ValueError, match=r"out: .*shared with x"):
        lora.forward(x, "q", out=x)
    assert (out == 1).all()
    assert (x == 1).all()


def test_set_weights_drops_what_waits():
    lora = trained()
    lora.adapt(X, FB, "q")
    redraw(lora, 7)
    before = weight_bits(lora)
    assert lora.apply_updates(lr=0.1).note == "nothing was accumulated"
    assert weight_bits(lora) == before


def test_lr_of_numpy_is_the_same_step():
    lora, other = trained(), trained()
    for lr in (np.float32(0.25), np.float64(0.5), 1):
        assert lora.adapt(X, FB, "q", lr=lr).applied
        assert other.adapt(X, FB, "q", lr=float(lr)).applied
    assert weight_bits(lora) == weight_bits(other)


# ---- threads ----------------------------------------------------------------


def in_threads(*work):
    """Runs the calls at the same time; the first error of any is raised."""
    errors = []
    gate = threading.Barrier(len(work))

    def guarded(call):
        gate.wait()
        try:
            call()
        except BaseException as error:
            errors.append(error)

    started = [threading.Thread(target=guarded, args=(call,)) for call in work]
    for thread in started:
        thread.start()
    for thread in started:
        thread.join()
    if errors:
        raise errors[0]


def test_threads_that_accumulate_lose_nothing():
    """Gradients of whole numbers add up exactly, in whatever order they come."""
    d, calls = 4096, 256  # long enough for the GIL to be released
    lora = le.MicroLoRA(le.MicroLoRAConfig(d, d, rank=1, alpha=1.0, target_modules=("q",)))
    first = np.zeros((1, d), "f4")
    first[0, 0] = 1.0
    lora.set_weights("q", first, first.T)
    x, grad = np.ones((16, d), "f4"), np.ones((16, d), "f4")

    def accumulate():
        for _ in range(calls):
            assert lora.adapt(x, le.Feedback.from_gradient(grad), "q").applied

    in_threads(*[accumulate] * 4)
    assert lora.apply_updates(lr=1.0).applied  # the mean gradient is 1 everywhere
    A, B, _ = lora.weights("q")
    assert np.array_equal(A, first - 1)
    assert np.array_equal(B, first.T - 1)


def test_forward_takes_a_parameter():
    """A subclass of Tensor that needs no gradient is data like any other."""
    lora = trained()
    x = torch.nn.Parameter(torch.ones(2, 6), requires_grad=False)
    assert bits(lora.forward(x, "q")) == bits(lora.forward(torch.ones(2, 6), "q"))
