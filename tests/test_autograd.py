"""forward of a torch x that requires grad: its backward pass, and what must not be recorded."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers import DTYPES, TOLERANCE, bits, delta_error, f64, magnitude
from helpers_files import mean_gradients, trained, weight_bits

import lora_engine as le

SHAPES = [(7,), (1, 7), (5, 33), (2, 3, 16), (2, 1, 4, 8), (0, 7), (2, 0, 7)]
shapes = pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
checkpointing = pytest.mark.parametrize("recompute", [True, False], ids=["recompute", "keep"])
dtypes = pytest.mark.parametrize("dtype", DTYPES)


def drawn(shape, dtype="float32"):
    """(x that requires grad, upstream gradient), for 9 outputs."""
    rng = torch.Generator().manual_seed(len(shape))
    x = torch.randn(*shape, generator=rng).to(getattr(torch, dtype)).requires_grad_()
    return x, torch.randn(*shape[:-1], 9, generator=rng).to(x.dtype)


def by_torch(lora, x, up):
    """(y, dx, dA, dB) of torch's own autograd, in float64."""
    A, B, s = lora.weights("q")
    a, b = (torch.tensor(w, dtype=torch.float64, requires_grad=True) for w in (A, B))
    rows = x.detach().double().requires_grad_()
    y = s * (rows @ a.T) @ b.T
    y.backward(up.double())
    return y.detach(), rows.grad, a.grad, b.grad


def waiting(lora, module="q"):
    """(gA, gB) summed over the rows that wait for apply_updates, and their number."""
    m = lora._modules[module]
    A, B, _ = lora.weights(module)
    if m.gradient is None:
        return np.zeros_like(A), np.zeros_like(B), 0
    gA, gB = np.split(m.gradient.copy(), [A.size])
    return gA.reshape(A.shape), gB.reshape(B.T.shape).T, m.samples


@shapes
@dtypes
@checkpointing
def test_gradients_agree_with_torch(shape, dtype, recompute):
    x, up = drawn(shape, dtype)
    lora = trained(shape[-1], 9, gradient_checkpointing=recompute)
    A, B, s = lora.weights("q")
    y = lora.forward(x, "q")
    assert y.requires_grad
    assert (y.shape, y.dtype) == (up.shape, x.dtype)
    y.backward(up)
    want_y, dx, dA, dB = by_torch(lora, x, up)
    rows, ups = f64(x).reshape(-1, shape[-1]), f64(up).reshape(-1, 9)
    size_y = magnitude(rows, A, B, s).reshape(up.shape)
    size_x = magnitude(ups, B.T, A.T, s).reshape(x.shape)
    tolerance = TOLERANCE[dtype]
    assert delta_error(y, want_y.numpy(), size_y) <= tolerance
    assert (x.grad.shape, x.grad.dtype) == (x.shape, x.dtype)
    assert delta_error(x.grad, dx.numpy(), size_x) <= tolerance
    gA, gB, samples = waiting(lora)
    assert samples == len(rows)
    if len(rows):
        sizes = mean_gradients(np.abs(rows), np.abs(ups), np.abs(A), np.abs(B), abs(s))
        assert delta_error(gA, dA.numpy(), len(rows) * sizes[0]) <= 1e-6
        assert delta_error(gB, dB.numpy(), len(rows) * sizes[1]) <= 1e-6
    else:
        assert lora.apply_updates(lr=0.1).note == "nothing was accumulated"


def test_dx_agrees_with_finite_differences():
    lora = trained(7, 9)
    x, up = drawn((3, 7))

    def loss(values):  # linear in x: a wide step only rounds less
        y = lora.forward(values.astype("f4"), "q")
        return float((f64(y) * f64(up)).sum())

    lora.forward(x, "q").backward(up)
    at = f64(x)
    for index in np.ndindex(*at.shape):
        ends = []
        for sign in (1, -1):
            moved = at.copy()
            moved[index] += sign * 0.5
            ends.append(loss(moved))
        assert ends[0] - ends[1] == pytest.approx(float(x.grad[index]), rel=1e-4, abs=1e-4)


def test_forward_has_the_bits_of_the_plain_forward():
    for shape in ((7,), (5, 33)):
        x, _ = drawn(shape)
        lora = trained(shape[-1], 9)
        assert bits(lora.forward(x, "q").detach()) == bits(lora.forward(x.detach(), "q"))


@shapes
def test_keeping_and_recomputing_give_the_same_bits(shape):
    x, up = drawn(shape)
    results = []
    for recompute in (True, False):
        lora = trained(shape[-1], 9, gradient_checkpointing=recompute)
        x.grad = None
        lora.forward(x, "q").backward(up)
        gA, gB, samples = waiting(lora)
        results.append((bits(x.grad), gA.tobytes(), gB.tobytes(), samples))
    assert results[0] == results[1]


class Counting:
    """A module's storage that counts the calls of shrink and what gradient is given as h."""

    def __init__(self, storage):
        self.storage, self.shrinks, self.given = storage, 0, []

    def shrink(self, *args):
        self.shrinks += 1
        return self.storage.shrink(*args)

    def gradient(self, x, grad, slot, h, total):
        self.given.append(None if h is None else h.copy())
        return self.storage.gradient(x, grad, slot, h, total)

    def __getattr__(self, name):
        return getattr(self.storage, name)


@checkpointing
def test_checkpointing_decides_what_is_kept(recompute):
    lora = trained(7, 9, gradient_checkpointing=recompute)
    counting = lora._modules["q"].storage = Counting(lora._modules["q"].storage)
    x, up = drawn((4, 7))
    y = lora.forward(x, "q")
    assert counting.shrinks == (0 if recompute else 1)
    y.backward(up)
    assert counting.shrinks == (0 if recompute else 1)
    (h,) = counting.given
    if recompute:
        assert h is None
    else:
        A = lora.weights("q")[0]
        assert np.allclose(h, f64(x) @ f64(A).T, rtol=1e-5, atol=1e-5)


def test_what_waits_is_applied_as_one_mean():
    lora = trained(7, 9, gradient_checkpointing=True)
    before = lora.weights("q")
    x, up = drawn((2, 3, 7))
    lora.forward(x, "q").backward(up)
    one, up_one = drawn((7,))
    lora.forward(one, "q").backward(up_one)
    extra = np.ones((2, 7), "f4"), np.ones((2, 9), "f4")
    assert lora.adapt(extra[0], le.Feedback.from_gradient(extra[1]), "q").applied
    rows = np.concatenate([f64(x).reshape(-1, 7), f64(one)[None], extra[0]])
    ups = np.concatenate([f64(up).reshape(-1, 9), f64(up_one)[None], extra[1]])
    assert lora.apply_updates(lr=0.5).applied
    gA, gB = mean_gradients(rows, ups, *before)
    after = lora.weights("q")
    assert np.allclose(after[0], before[0] - 0.5 * gA, rtol=1e-5, atol=1e-5)
    assert np.allclose(after[1], before[1] - 0.5 * gB, rtol=1e-5, atol=1e-5)


def test_gradient_flows_through_a_network():
    """Between two linear layers, with a sum whose gradient is one number expanded."""
    torch.manual_seed(0)
    before, after = torch.nn.Linear(6, 7), torch.nn.Linear(9, 2)
    lora = trained(7, 9)
    A, B, s = (torch.tensor(w) for w in lora.weights("q"))
    inputs = torch.randn(4, 6)
    grads = []
    for delta in (lambda h: lora.forward(h, "q"), lambda h: s * (h @ A.T) @ B.T):
        before.zero_grad()
        after(torch.tanh(delta(before(inputs)))).sum().backward()
        grads.append(before.weight.grad.clone())
    assert grads[0].abs().max() > 0.01
    assert torch.allclose(*grads, rtol=1e-4, atol=1e-5)
    x = torch.randn(3, 7, requires_grad=True)
    lora.forward(x, "q").sum().backward()
    assert torch.allclose(x.grad, (s * B.sum(0) @ A).expand(3, 7), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layout", ["columns", "every other", "expanded"])
@checkpointing
def test_layout_of_x_changes_no_bit(layout, recompute):
    leaf = torch.randn(8, 14, requires_grad=True)
    view = {
        "columns": lambda: leaf[:7, :5].T,
        "every other": lambda: leaf[::2, ::2],
        "expanded": lambda: leaf[0, :7].expand(2, 3, 7),
    }[layout]
    up = torch.randn(*view().shape[:-1], 9)
    lora, plain = (trained(7, 9, gradient_checkpointing=recompute) for _ in range(2))
    lora.forward(view(), "q").backward(up)
    got = leaf.grad
    dense = view().detach().contiguous().requires_grad_()
    plain.forward(dense, "q").backward(up)
    leaf.grad = None
    view().backward(dense.grad)
    assert torch.equal(got, leaf.grad)
    for a, b in zip(waiting(lora), waiting(plain), strict=True):
        assert np.array_equal(a, b)


def test_backward_twice_needs_and_counts_a_kept_graph():
    lora = trained(7, 9)
    x, up = drawn((4, 7))
    y = lora.forward(x, "q")
    y.backward(up, retain_graph=True)
    once, samples = waiting(lora)[1], waiting(lora)[2]
    y.backward(up)
    assert np.array_equal(waiting(lora)[1], 2 * once)
    assert waiting(lora)[2] == 2 * samples == 8
    with pytest.raises(RuntimeError, match="second time"):
        y.backward(up)
    assert waiting(lora)[2] == 8


@checkpointing
@pytest.mark.parametrize("change", ["adapt", "set_weights", "import_weights", "apply_updates"])
def test_weights_changed_since_forward_are_refused(change, recompute):
    lora = trained(7, 9, gradient_checkpointing=recompute)
    x, up = drawn((4, 7))
    feedback = le.Feedback.from_gradient(up)
    rows = x.detach()
    if change == "apply_updates":
        lora.adapt(rows, feedback, "q")
    y = lora.forward(x, "q")
    {
        "adapt": lambda: lora.adapt(rows, feedback, "q", lr=0.1),
        "set_weights": lambda: lora.set_weights("q", *lora.weights("q")[:2]),
        "import_weights": lambda: lora.import_weights(lora.export_weights()),
        "apply_updates": lambda: lora.apply_updates(lr=0.1),
    }[change]()
    with pytest.raises(RuntimeError, match="weights that were changed since"):
        y.backward(up)
    assert x.grad is None
    assert waiting(lora)[2] == 0


def test_another_module_may_change_between():
    lora = trained(7, 9, target_modules=("q", "v"))
    x, up = drawn((4, 7))
    y = lora.forward(x, "q")
    assert lora.adapt(x.detach(), le.Feedback.from_gradient(up), "v", lr=0.1).applied
    y.backward(up)
    assert torch.allclose(x.grad.double(), by_torch(lora, x, up)[1], rtol=1e-4, atol=1e-5)


def test_nan_upstream_leaves_what_waits():
    lora = trained(7, 9)
    x, up = drawn((4, 7))
    lora.forward(x, "q").backward(up)
    kept = waiting(lora)
    bad = up.clone()
    bad[1, 2] = torch.nan
    lora.forward(x, "q").backward(bad)
    assert x.grad[1].isnan().all()  # what torch would say, too
    assert x.grad[0].isfinite().all()
    now = waiting(lora)
    assert now[2] == kept[2]
    assert np.array_equal(now[0], kept[0])
    assert np.array_equal(now[1], kept[1])


@shapes
@pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode], ids=lambda g: g.__name__)
def test_nothing_is_recorded_without_grad(shape, guard):
    lora = trained(shape[-1], 9)
    x, _ = drawn(shape)
    want = lora.forward(x, "q").detach()
    with guard():
        y = lora.forward(x, "q")
        if len(shape) <= 2:
            out = torch.full(want.shape, torch.nan)
            assert lora.forward(x, "q", out=out) is out
            assert bits(out) == bits(want)
    assert not y.requires_grad
    assert y.grad_fn is None
    assert y.shape == want.shape
    assert bits(y) == bits(want)


def test_plain_forward_records_nothing():
    x, _ = drawn((4, 7))
    assert trained(7, 9).forward(x.detach(), "q").grad_fn is None


def test_second_derivative_is_refused():
    """The backward pass is not differentiable: torch must say so rather than drop a term."""
    lora = trained(7, 9)
    x, _ = drawn((4, 7))
    y = lora.forward(x, "q")
    (dx,) = torch.autograd.grad((y**2).sum(), x, create_graph=True)
    assert dx.requires_grad
    with pytest.raises(RuntimeError, match="once_differentiable"):
        ((dx**2).sum() + (x**2).sum()).backward()


FB = le.Feedback.from_gradient


@pytest.mark.parametrize(
    ("argument", "call"),
    [
        ("out", lambda m, x, g: m.forward(x.detach(), "q", out=g)),
        ("out", lambda m, x, g: m.forward(x, "q", out=torch.empty(4, 9))),
        ("x", lambda m, x, g: m.forward_add(x, "q", torch.ones(4, 9))),
        ("out", lambda m, x, g: m.forward_add(x.detach(), "q", g)),
        ("x", lambda m, x, g: m.adapt(x, FB(g.detach()), "q", lr=0.1)),
        ("x", lambda m, x, g: m.adapt(x, FB(g.detach()), "q")),
        ("x", lambda m, x, g: m.adapt(x, le.Feedback.from_target(g.detach()), "q", lr=0.1)),
        ("grad", lambda m, x, g: m.adapt(x.detach(), FB(g), "q", lr=0.1)),
        ("grad", lambda m, x, g: m.adapt(x.detach(), FB(g), "q")),
        ("y", lambda m, x, g: m.adapt(x.detach(), le.Feedback.from_target(g), "q", lr=0.1)),
        ("A", lambda m, x, g: m.set_weights("q", x[:2], torch.ones(9, 2))),
    ],
)  # fmt: skip
@pytest.mark.parametrize("dropout", [0.0, 0.5], ids=["p0", "p0.5"])
def test_op_on_a_tensor_that_requires_grad_is_refused_by_name(argument, call, dropout):
    lora = trained(7, 9, dropout=dropout)
    before = weight_bits(lora)
    x, g = torch.ones(4, 7, requires_grad=True), torch.ones(4, 9, requires_grad=True)
    with pytest.raises(ValueError, match=rf": {argument}: expected .*(requires? grad)"):
        call(lora, x, g)
    assert weight_bits(lora) == before
    assert lora.apply_updates(lr=0.1).note == "nothing was accumulated"


@pytest.mark.parametrize(
    ("error", "match", "x"),
    [
        (ValueError, r"x: .*got \[4, 6\]", torch.ones(4, 6, requires_grad=True)),
        (ValueError, r"x: .*got \[\]", torch.ones((), requires_grad=True)),
        (TypeError, r"x: .*got float64", torch.ones(4, 7).double().requires_grad_()),
    ],
    ids=["width", "0-d", "float64"],
)
@checkpointing
def test_bad_x_is_named(error, match, x, recompute):
    with pytest.raises(error, match=match):
        trained(7, 9, gradient_checkpointing=recompute).forward(x, "q")
