"""torch.ops.lora_engine: opcheck, values, gradients, refusals."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers import TOLERANCE, bits, delta_error, f64, magnitude
from helpers_torch import IDS, IN, OPS, OUT, new_pool, random, slots
from torch.autograd import forward_ad
from torch.library import opcheck

import lora_engine as le
from lora_engine.attached import spread
from lora_engine.backends import chosen

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:torch.*")


@pytest.fixture(scope="class", params=["cpu", "triton"])
def engine(request):
    """Runs a test on both backends, on CPU tensors."""
    if request.param == "triton" and torch.cuda.is_available():
        pytest.skip("the interpreter is for machines without a GPU")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LORA_ENGINE_BACKEND", request.param)
        chosen.cache_clear()
        yield request.param
    chosen.cache_clear()


def traced(numbers, weights, uniform=False):
    return spread.traced(numbers, weights, uniform, 2, torch.device("cpu"))


def calls(pool, w):
    """(op, arguments) of every op, in odd shapes."""
    x, grad, then = random(5, IN), random(5, OUT), torch.tensor([1, 0, 1, 1, 1])
    A, B = random(3, IN), random(OUT, 3)
    mixed, weights = IDS[:, None].repeat(1, 2), random(5, 2)
    number = pool.handle.shape[0]
    return {
        "lora_delta": (x, A, B, 2.0),
        "lora_delta, vector": (x[0], A, B.t().contiguous().t(), 2.0),
        "lora_delta, bfloat16": (x.bfloat16(), A.bfloat16(), B.bfloat16(), 2.0),
        "lora_delta, no rows": (x[:0], A, B, 2.0),
        "lora_delta, recorded": (random(5, IN, grad=True), A.requires_grad_(), B, 2.0),
        "batched_lora_delta": (x, pool.handle, IDS),
        "batched_lora_delta, no rows": (x[:0], pool.handle, IDS[:0]),
        "batched_lora_delta, recorded": (random(5, IN, grad=True), pool.handle, mixed, weights),
        "batched_lora_delta_recorded": (x, pool.handle, mixed, weights),
        "batched_lora_delta_backward": (grad, number, IN, then, IDS),
        "batched_lora_delta_": (random(5, OUT), x, pool.handle, IDS, None),
        "batched_adapt": (x, grad, pool.handle, IDS, 0.0),
        "batched_adapt, options": (x, grad, pool.handle, mixed, 0.0, weights, 1.0, 2.0, False, 0.1),
        "fisher_accumulate": (random(3, 7), random(3, 7, seed=1), 0.9, 0.1),
        "lora_fisher": (x, grad, A.detach(), B, 2.0),
        "lora_fisher, segments": (x, grad, A.detach(), B, 2.0, slots(0, 2, 5)),
        "lora_fisher_factors": (x, grad),
        "nf4_linear": (x, w.handle),
        "nf4_linear, deep": (random(2, 3, IN), w.handle, None, None, None, None, "bfloat16"),
        "nf4_linear, recorded": (
            random(5, IN, grad=True), w.handle, random(OUT, grad=True), pool.handle, IDS,
        ),
        "nf4_linear_recorded": (x, w.handle, random(OUT), pool.handle, IDS, None, None),
        "nf4_linear_backward": (grad, w.handle.shape[0], IN),
        "nf4_linear_backward, adapters": (grad, w.handle.shape[0], IN, number, then, IDS),
        "spread_rows": (slots(-1, 4, 5), *traced([[1, 0], [2, 1]], [[0.5, 1.0]] * 2), 4, 3),
        "spread_rows, one row for all": (slots(-1, 4), *traced([[1]], [[0.5]], True), 1, 1),
    }  # fmt: skip


NAMES = list(calls(new_pool(), le.nf4_quantize(random(OUT, IN))))


def test_every_op_is_checked():
    defined = {n.split("::")[1].split(".")[0] for n in torch._C._dispatch_get_all_op_names()
               if n.startswith("lora_engine::")}  # fmt: skip
    assert defined == {name.split(",")[0] for name in NAMES}


@pytest.mark.parametrize("name", NAMES)
def test_opcheck(name):
    pool, w = new_pool(), le.nf4_quantize(random(OUT, IN))
    arguments = calls(pool, w)[name]
    opcheck(getattr(OPS, name.split(",")[0]).default, arguments)


# ---- values and gradients ----


@pytest.mark.usefixtures("engine")
class TestValues:
    def test_lora_delta(self):
        x, A, B = (random(*s, grad=True) for s in ((5, IN), (3, IN), (OUT, 3)))
        up = random(5, OUT)
        y = OPS.lora_delta(x, A, B, 2.0)
        y.backward(up)
        x64, A64, B64 = (t.detach().double().requires_grad_() for t in (x, A, B))
        want = 2.0 * (x64 @ A64.T) @ B64.T
        want.backward(up.double())
        assert delta_error(y, f64(want), magnitude(x, A, B, 2.0)) <= TOLERANCE["float32"]
        for got, exact in ((x, x64), (A, A64), (B, B64)):
            assert torch.allclose(got.grad.double(), exact.grad, rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("k", [None, 2])
    def test_batched_lora_delta(self, k):
        pool = new_pool()
        x, up, y = random(5, IN, grad=True), random(5, OUT), random(5, OUT, seed=3)
        ids, weights = (IDS, None) if k is None else (IDS[:, None].repeat(1, k), random(5, k))
        want = pool.forward(x.detach(), ids, weights)
        got = OPS.batched_lora_delta(x, pool.handle, ids, weights)
        assert bits(got.detach()) == bits(want)
        added = y.clone()
        OPS.batched_lora_delta_(added, x.detach(), pool.handle, ids, weights)
        assert bits(added) == bits(pool.forward(x.detach(), ids, weights, out=y))
        got.backward(up)
        dx = torch.zeros(5, IN).double()
        for i, row in enumerate(ids.reshape(5, -1).tolist()):
            for j, slot in enumerate(row):
                if slot != -1:
                    A, B, s = pool.get(slot)
                    w = s if weights is None else s * float(weights[i, j])
                    dx[i] += w * torch.from_numpy(f64(up[i]) @ f64(B) @ f64(A))
        assert torch.allclose(x.grad.double(), dx, rtol=1e-5, atol=1e-5)
        assert not x.grad[1].any()

    def test_batched_adapt(self):
        one, two = new_pool(dtype="bfloat16"), new_pool(dtype="bfloat16")
        x, grad = random(5, IN), random(5, OUT)
        options = {"max_norm": 1.0, "lr_ratio": 2.0, "train_A": False, "weight_decay": 0.1}
        outcomes = OPS.batched_adapt(x, grad, one.handle, IDS, 0.1, None, *options.values())
        result = two.adapt(x, grad, IDS, 0.1, **options)
        assert outcomes.dtype == torch.uint8
        assert ((outcomes == 1).numpy() == np.asarray(result.applied)).all()
        for slot in (0, 1):
            for mine, theirs in zip(one.get(slot), two.get(slot), strict=True):
                assert np.array_equal(mine, theirs)

    def test_nf4_linear(self):
        pool, w = new_pool(), le.nf4_quantize(random(OUT, IN))
        x, bias, up = random(5, IN, grad=True), random(OUT, grad=True), random(5, OUT)
        plain = x.detach(), w, bias.detach(), pool, IDS
        y = OPS.nf4_linear(x, w.handle, bias, pool.handle, IDS)
        assert bits(y.detach()) == bits(le.nf4_linear(*plain))
        y.backward(up)
        again, bias_again = x.detach().requires_grad_(), bias.detach().requires_grad_()
        le.nf4_linear(again, w, bias_again, pool, IDS).backward(up)
        assert torch.allclose(x.grad, again.grad, rtol=1e-5, atol=1e-5)
        assert torch.allclose(bias.grad, bias_again.grad, rtol=1e-5, atol=1e-5)

    def test_fisher(self):
        x, grad, A, B = random(5, IN), random(5, OUT), random(3, IN), random(OUT, 3)
        for got, want in (
            (OPS.lora_fisher(x, grad, A, B, 2.0), le.lora_fisher(x, grad, A, B, 2.0)),
            (OPS.lora_fisher_factors(x, grad), le.lora_fisher_factors(x, grad)),
        ):
            assert [bits(t) for t in got] == [bits(t) for t in want]
        F = random(3, 7)
        want = 0.9 * F + 0.1 * F.square()
        OPS.fisher_accumulate(F, F.clone(), 0.9, 0.1)
        assert torch.allclose(F, want, rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize("change", ["adapt", "set", "rollback"])
    def test_an_adapter_changed_since_the_forward_pass_is_refused(self, change):
        pool = new_pool(history=1)
        x = random(5, IN, grad=True)
        loss = OPS.batched_lora_delta(x, pool.handle, slots(0, 0, -1, 0, 0)).sum()
        pool.set(1, random(4, IN), random(OUT, 4), 1.0)  # of no row
        pool.add(random(4, IN), random(OUT, 4), 1.0)
        loss.backward(retain_graph=True)
        kept = x.grad.clone()
        pool.adapt(x.detach(), random(5, OUT), slots(1, 1, 1, 1, 1), lr=0.1)
        if change == "adapt":
            OPS.batched_adapt(x.detach(), random(5, OUT), pool.handle, IDS, 0.1)
        else:
            pool.set(0, random(4, IN), random(OUT, 4), 1.0)
        if change == "rollback":
            pool.rollback(0)
        with pytest.raises(RuntimeError, match="adapters that were changed since"):
            loss.backward()
        assert torch.equal(x.grad, kept)


def test_second_derivative_of_lora_delta():
    x, A, B = (random(*s).double() for s in ((3, 4), (2, 4), (5, 2)))

    def delta(x, A, B):
        return OPS.lora_delta(x.float(), A.float(), B.float(), 1.5).double()

    inputs = [t.requires_grad_() for t in (x, A, B)]
    assert torch.autograd.gradgradcheck(delta, inputs, eps=1e-2, atol=1e-2, rtol=1e-2)


def test_autograd_sees_what_is_written():
    F, y, pool = random(3, 7), random(5, OUT), new_pool()
    leaf = random(3, 7, grad=True)
    loss = (leaf * F).sum()
    OPS.fisher_accumulate(F, random(3, 7), 0.9, 0.1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    before = y._version
    OPS.batched_lora_delta_(y, random(5, IN), pool.handle, IDS)
    assert y._version == before + 1


# ---- refusals ----


def refusals(pool, w):
    h = pool.handle
    x, grad, needs = random(5, IN), random(5, OUT), random(5, IN, grad=True)
    weights, up = random(5, grad=True), grad.clone()
    other = torch.zeros(5, dtype=torch.int32, device="meta")
    kind = "expected the handle of a living"
    return {
        "kind of pool": (f"pool: {kind}.*NF4Tensor", "batched_lora_delta", (x, w.handle, IDS)),
        "kind of w": (f"w: {kind} NF4.*AdapterPool", "nf4_linear", (x, h)),
        "unknown": (f"pool: {kind}.*nothing", "batched_adapt", (x, grad, h[:5], IDS, 0.1)),
        "no handle": (r"pool: .*got a tensor \[5\]", "batched_lora_delta", (x, IDS, IDS)),
        "no handle of w": (r"w: .*got a tensor \[5, 17\]", "nf4_linear", (x, x)),
        "a tensor of numbers": (r"\[5, 1, 9\]", "batched_adapt", (x, grad, up[:, None], IDS, 0.1)),
        "handle elsewhere": ("pool: .*meta", "batched_lora_delta_", (grad, x, h.to("meta"), IDS)),
        "ids elsewhere": ("ids: .*cpu.*meta", "batched_lora_delta", (x, h, other)),
        "ids elsewhere, nf4": ("ids: .*meta", "nf4_linear", (x, w.handle, None, h, other)),
        "no ids": ("ids:.*none", "nf4_linear", (x, w.handle, None, h)),
        "no pool": ("pool: .*none", "nf4_linear", (x, w.handle, None, None, IDS)),
        "shape": (r"x: .*\[5, 9\]", "batched_lora_delta", (grad, h, IDS)),
        "weights' grad": ("weights: .*grad", "batched_lora_delta", (x, h, IDS, weights)),
        "x's grad, in place": ("x: .*grad", "batched_lora_delta_", (grad, needs, h, IDS)),
        "x's grad, adapt": ("x: .*grad", "batched_adapt", (needs, grad, h, IDS, 0.1)),
        "F's grad": ("F: .*grad", "fisher_accumulate", (needs, x, 0.9, 0.1)),
        "grad of fisher": ("x: .*grad", "lora_fisher_factors", (needs, grad)),
    }  # fmt: skip


@pytest.mark.parametrize("case", list(refusals(new_pool(), le.nf4_quantize(random(OUT, IN)))))
def test_refusals(case):
    pool, w = new_pool(), le.nf4_quantize(random(OUT, IN))
    match, op, arguments = refusals(pool, w)[case]
    kept = [a.detach().clone() if isinstance(a, torch.Tensor) else a for a in arguments]
    with pytest.raises(ValueError, match=match):
        getattr(OPS, op)(*arguments)
    for now, before in zip(arguments, kept, strict=True):
        if isinstance(now, torch.Tensor) and now.device.type == "cpu":
            assert torch.equal(now, before)


def test_no_grad_is_as_good_as_no_requires_grad():
    pool = new_pool()
    x = random(5, IN, grad=True)
    with torch.no_grad():
        y = OPS.batched_lora_delta(x, pool.handle, IDS)
        assert OPS.batched_adapt(x, random(5, OUT), pool.handle, IDS, 0.1)[0] == 1
    assert not y.requires_grad
    with pytest.raises(IndexError, match="got 7"):
        OPS.batched_lora_delta(x, pool.handle, slots(0, 0, 7, 0, 0))


@pytest.mark.parametrize("grad_mode", [torch.enable_grad, torch.no_grad])
@pytest.mark.parametrize("name", [n for n in NAMES if "recorded" not in n and "no rows" not in n])
def test_a_tangent_is_refused(name, grad_mode):
    """Which would be lost: the derivative would be zero without an error."""
    op = name.split(",")[0]
    pool, w = new_pool(), le.nf4_quantize(random(OUT, IN))
    arguments = [a.detach() if isinstance(a, torch.Tensor) else a for a in calls(pool, w)[name]]
    floats = [i for i, a in enumerate(arguments)
              if isinstance(a, torch.Tensor) and a.is_floating_point()]  # fmt: skip
    for i in floats:
        with forward_ad.dual_level(), grad_mode():
            given = list(arguments)
            given[i] = forward_ad.make_dual(given[i], torch.ones_like(given[i]))
            with pytest.raises(ValueError, match=rf"^{op}: \w+: .* got a dual tensor"):
                getattr(OPS, op)(*given)
            getattr(OPS, op)(*arguments)  # of others nothing is lost
    with pytest.raises(ValueError, match=f"{op}: .* got a dual tensor"):
        torch.func.jvp(
            lambda t: getattr(OPS, op)(*arguments[: floats[0]], t, *arguments[floats[0] + 1 :]),
            (arguments[floats[0]],), (torch.ones_like(arguments[floats[0]]),),
        )  # fmt: skip


def test_adapting_in_inference_mode():
    one, two = new_pool(), new_pool()
    x, grad = random(5, IN), random(5, OUT)
    with torch.inference_mode():
        OPS.batched_adapt(x, grad, one.handle.clone(), IDS, 0.1)
    OPS.batched_adapt(x, grad, two.handle, IDS, 0.1)
    for slot in (0, 1):
        for mine, theirs in zip(one.get(slot), two.get(slot), strict=True):
            assert np.array_equal(mine, theirs)


def test_a_handle_made_in_inference_mode_is_changed_outside_it():
    pool = new_pool()
    with torch.inference_mode():
        handle = pool.handle.clone()
    assert OPS.batched_adapt(random(5, IN), random(5, OUT), handle, IDS, 0.1)[0] == 1
