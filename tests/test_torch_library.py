"""torch.ops.lora_engine: opcheck, torch.compile, gradients, refusals."""

from __future__ import annotations

import gc
import itertools
import subprocess
import sys

import numpy as np
import pytest
import torch
from helpers import TOLERANCE, bits, delta_error, f64, fill_pool, magnitude
from torch._dynamo.utils import counters
from torch.library import opcheck

import lora_engine as le
import lora_engine.torch_ops  # defines the ops
from lora_engine.backends import chosen

OPS = torch.ops.lora_engine
IN, OUT = 17, 9
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


def random(*shape, grad=False, seed=0):
    rng = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=rng).requires_grad_(grad)


def slots(*values):
    return torch.tensor(values, dtype=torch.int32)


def new_pool(ranks=(1, 3), out=OUT, **options):
    return fill_pool(np.random.default_rng(1), IN, (out,), list(ranks), **options).pool


IDS = slots(0, -1, 1, 0, 1)


def of(pool):
    return pool.handle, pool.version_tensor


def calls(pool, w):
    """(op, arguments) of every op, in odd shapes."""
    x, grad, then = random(5, IN), random(5, OUT), torch.tensor([1, 0, 1, 1, 1])
    A, B = random(3, IN), random(OUT, 3)
    mixed, weights = IDS[:, None].repeat(1, 2), random(5, 2)
    rows = of(pool)
    return {
        "lora_delta": (x, A, B, 2.0),
        "lora_delta, vector": (x[0], A, B.t().contiguous().t(), 2.0),
        "lora_delta, bfloat16": (x.bfloat16(), A.bfloat16(), B.bfloat16(), 2.0),
        "lora_delta, no rows": (x[:0], A, B, 2.0),
        "lora_delta, recorded": (random(5, IN, grad=True), A.requires_grad_(), B, 2.0),
        "batched_lora_delta": (x, *rows, IDS),
        "batched_lora_delta, no rows": (x[:0], *rows, IDS[:0]),
        "batched_lora_delta, recorded": (random(5, IN, grad=True), *rows, mixed, weights),
        "batched_lora_delta_recorded": (x, *rows, mixed, weights),
        "batched_lora_delta_backward": (grad, rows[0], then, IDS),
        "batched_lora_delta_": (random(5, OUT), x, *rows, IDS, None),
        "batched_adapt": (x, grad, *rows, IDS, 0.0),
        "batched_adapt, options": (x, grad, *rows, mixed, 0.0, weights, 1.0, 2.0, False, 0.1),
        "fisher_accumulate": (random(3, 7), random(3, 7, seed=1), 0.9, 0.1),
        "lora_fisher": (x, grad, A.detach(), B, 2.0),
        "lora_fisher, segments": (x, grad, A.detach(), B, 2.0, slots(0, 2, 5)),
        "lora_fisher_factors": (x, grad),
        "nf4_linear": (x, w.handle),
        "nf4_linear, deep": (random(2, 3, IN), w.handle, None, -1, None, None, None, "bfloat16"),
        "nf4_linear, recorded": (
            random(5, IN, grad=True), w.handle, random(OUT, grad=True), *rows, IDS,
        ),
        "nf4_linear_recorded": (x, w.handle, random(OUT), *rows, IDS, None, None),
        "nf4_linear_backward": (grad, w.handle),
        "nf4_linear_backward, adapters": (grad, w.handle, rows[0], then, IDS),
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
        got = OPS.batched_lora_delta(x, *of(pool), ids, weights)
        assert bits(got.detach()) == bits(want)
        added = y.clone()
        OPS.batched_lora_delta_(added, x.detach(), *of(pool), ids, weights)
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
        x, grad, before = random(5, IN), random(5, OUT), one.version_tensor.clone()
        options = {"max_norm": 1.0, "lr_ratio": 2.0, "train_A": False, "weight_decay": 0.1}
        outcomes = OPS.batched_adapt(x, grad, *of(one), IDS, 0.1, None, *options.values())
        result = two.adapt(x, grad, IDS, 0.1, **options)
        assert outcomes.dtype == torch.uint8
        assert ((outcomes == 1).numpy() == np.asarray(result.applied)).all()
        assert int(one.version_tensor - before) == 1
        for slot in (0, 1):
            for mine, theirs in zip(one.get(slot), two.get(slot), strict=True):
                assert np.array_equal(mine, theirs)

    def test_nf4_linear(self):
        pool, w = new_pool(), le.nf4_quantize(random(OUT, IN))
        x, bias, up = random(5, IN, grad=True), random(OUT, grad=True), random(5, OUT)
        plain = x.detach(), w, bias.detach(), pool, IDS
        y = OPS.nf4_linear(x, w.handle, bias, *of(pool), IDS)
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
        loss = OPS.batched_lora_delta(x, *of(pool), slots(0, 0, -1, 0, 0)).sum()
        pool.set(1, random(4, IN), random(OUT, 4), 1.0)  # of no row
        pool.add(random(4, IN), random(OUT, 4), 1.0)
        loss.backward(retain_graph=True)
        kept = x.grad.clone()
        pool.adapt(x.detach(), random(5, OUT), slots(1, 1, 1, 1, 1), lr=0.1)
        if change == "adapt":
            OPS.batched_adapt(x.detach(), random(5, OUT), *of(pool), IDS, 0.1)
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
    OPS.batched_lora_delta_(y, random(5, IN), *of(pool), IDS)
    assert y._version == before + 1


# ---- torch.compile ----


class Served(torch.nn.Module):
    """A base layer, and each row's adapter on top."""

    def __init__(self, pool):
        super().__init__()
        self.base, self.pool = torch.nn.Linear(IN, pool.out_features), pool

    def forward(self, x, ids):
        delta = torch.ops.lora_engine.batched_lora_delta(
            x, self.pool.handle, self.pool.version_tensor, ids, None
        )
        return self.base(x) + delta


@pytest.fixture(params=["aot_eager", "inductor"])
def compiled(request):
    """Compiles with no graph break, from nothing."""
    torch.compiler.reset()
    counters.clear()
    with (
        torch._inductor.config.patch(fx_graph_cache=False),
        torch._functorch.config.patch(enable_autograd_cache=False),
    ):
        yield lambda f: torch.compile(f, fullgraph=True, backend=request.param)
    torch.compiler.reset()


def test_a_compiled_module_serves_new_ranks_without_a_recompile(compiled):
    pool = new_pool()
    assert pool.handle  # before it is traced
    module, x = Served(pool), random(5, IN, grad=True)
    fast = compiled(module)
    assert torch.allclose(fast(x, IDS), module(x, IDS), rtol=1e-5, atol=1e-5)
    with torch.compiler.set_stance("fail_on_recompile"):
        added = pool.add(random(8, IN), random(OUT, 8), 1.0)
        ids = slots(added, -1, 1, 0, added)
        assert torch.allclose(fast(x, ids), module(x, ids), rtol=1e-5, atol=1e-5)
        pool.remove(0)
        pool.adapt(x.detach(), random(5, OUT), slots(1, 1, 1, 1, 1), lr=0.1)
        ids = slots(added, -1, 1, 1, 1)
        up = random(5, OUT)
        fast(x, ids).backward(up)
        got, x.grad = x.grad, None
        module(x, ids).backward(up)
        assert torch.allclose(got, x.grad, rtol=1e-5, atol=1e-5)
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


def test_a_compiled_forward_stays_on_its_side_of_an_adapt(compiled):
    pool = new_pool()
    x, grad = random(5, IN), random(5, OUT)
    handle, version = of(pool)

    def turns(x):
        first = OPS.batched_lora_delta(x, handle, version, IDS)
        outcomes = OPS.batched_adapt(x, grad, handle, version, IDS, 0.1)
        y = grad.clone()
        OPS.batched_lora_delta_(y, x, handle, version, IDS)
        OPS.batched_adapt(x, grad, handle, version, IDS, 0.1)
        return first, y - grad, OPS.batched_lora_delta(x, handle, version, IDS), outcomes

    start, before = [pool.get(slot) for slot in (0, 1)], version.clone()
    got = compiled(turns)(x)
    assert int(version - before) == 2
    for slot, weights in enumerate(start):
        pool.set(slot, *weights)
    want = turns(x)
    for mine, theirs in zip(got, want, strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-4, atol=1e-5)
    for later, earlier in ((got[1], got[0]), (got[2], got[1])):
        assert (later - earlier)[0].abs().max() > 0.1


def test_a_compiled_backward_pass_refuses_changed_adapters(compiled):
    """Whether the forward's versions are kept, or read when it is too late."""
    pool = new_pool()
    handle, version = of(pool)
    fast = compiled(lambda x: OPS.batched_lora_delta(x, handle, version, IDS).sum())
    x = random(5, IN, grad=True)
    loss = fast(x)
    pool.add(random(1, IN), random(OUT, 1), 1.0)
    loss.backward()
    assert x.grad[0].any()
    loss = fast(x)
    pool.set(1, random(1, IN), random(OUT, 1), 1.0)
    with pytest.raises(RuntimeError, match="adapters that were changed since"):
        loss.backward()


def test_compiled_nf4_linear_with_any_number_of_rows(compiled):
    pool, w = new_pool(), le.nf4_quantize(random(OUT, IN))
    rows = (w.handle, None, *of(pool))
    fast = compiled(lambda x, ids: OPS.nf4_linear(x, *rows, ids).tanh())
    for n in (2, 3, 5, 4):
        x = random(n, IN, grad=True)
        y = fast(x, IDS[:n])
        assert torch.allclose(y, OPS.nf4_linear(x, *rows, IDS[:n]).tanh(), rtol=1e-5, atol=1e-5)
        y.sum().backward()
        assert x.grad.shape == (n, IN)
    assert counters["stats"]["unique_graphs"] <= 2  # of 2 rows, of any number


def test_a_handle_first_read_in_a_trace_is_refused():
    torch.compiler.reset()
    fast = torch.compile(Served(new_pool()), fullgraph=True, backend="eager")
    with pytest.raises(Exception, match="read once before it is traced"):
        fast(random(5, IN), IDS)


# ---- handles ----


def test_handles_are_never_reused_and_tell_sizes_apart():
    pools = [new_pool(), new_pool(), new_pool(out=OUT + 1)]
    handles = [p.handle for p in pools]
    assert handles == [p.handle for p in pools]
    assert len(set(handles)) == 3
    sizes = [h % 2**32 for h in handles]
    assert sizes[0] == sizes[1] != sizes[2]
    del pools
    gc.collect()
    assert new_pool().handle not in handles


def test_handles_keep_nothing_alive():
    pool = new_pool()
    handle, version = of(pool)
    OPS.batched_lora_delta(random(5, IN), handle, version, IDS)
    del pool
    gc.collect()
    with pytest.raises(ValueError, match=r"pool: expected the handle of a living AdapterPool, got"):
        OPS.batched_lora_delta(random(5, IN), handle, version, IDS)


def test_every_change_grows_the_version_tensor():
    pool = new_pool(history=1)
    x, grad = random(1, IN), random(1, OUT)
    seen = [int(pool.version_tensor)]
    for change in (
        lambda: pool.add(random(2, IN), random(OUT, 2), 1.0),
        lambda: pool.set(0, random(2, IN), random(OUT, 2), 1.0),
        lambda: pool.rollback(0),
        lambda: pool.adapt(x, grad, slots(0), lr=0.1),
        lambda: (pool.accumulate_gradient(0, x, grad), pool.apply_updates(lr=0.1)),
        lambda: pool.remove(0),
    ):
        change()
        seen.append(int(pool.version_tensor))
    assert all(b > a for a, b in itertools.pairwise(seen))


def test_importing_defines_the_ops_and_nothing_imports_torch_before():
    script = """
import sys, numpy as np, lora_engine as le
pool = le.AdapterPool(4, 4)
w = le.nf4_quantize(np.ones((4, 4), "f4"))
assert "torch" not in sys.modules
assert w.handle and pool.handle
import torch
assert torch.ops.lora_engine.nf4_linear(torch.ones(1, 4), w.handle).tolist() == [[4.0] * 4]
"""
    subprocess.run([sys.executable, "-c", script], check=True)


# ---- refusals ----


def refusals(pool, w):
    h, v = of(pool)
    x, grad, needs = random(5, IN), random(5, OUT), random(5, IN, grad=True)
    weights = random(5, grad=True)
    other = torch.zeros(5, dtype=torch.int32, device="meta")
    kind = "expected the handle of a living"
    return {
        "kind of pool": (f"pool: {kind}.*NF4Tensor", "batched_lora_delta", (x, w.handle, v, IDS)),
        "kind of w": (f"w: {kind} NF4.*AdapterPool", "nf4_linear", (x, h)),
        "unknown": (f"pool: {kind}.*nothing", "batched_adapt", (x, grad, 5, v, IDS, 0.1)),
        "ids elsewhere": ("ids: .*cpu.*meta", "batched_lora_delta", (x, h, v, other)),
        "ids elsewhere, nf4": ("ids: .*meta", "nf4_linear", (x, w.handle, None, h, v, other)),
        "version's size": (r"version: .*\[2\]", "batched_lora_delta", (x, h, v.repeat(2), IDS)),
        "version's dtype": ("version: .*int32", "batched_adapt", (x, grad, h, v.int(), IDS, 0.1)),
        "version's device": (
            "version: .*meta", "batched_lora_delta_", (grad, x, h, v.to("meta"), IDS),
        ),
        "no version": ("version, ids:", "nf4_linear", (x, w.handle, None, h, None, IDS)),
        "no pool": ("pool: .*-1", "nf4_linear", (x, w.handle, None, -1, v, IDS)),
        "shape": (r"x: .*\[5, 9\]", "batched_lora_delta", (grad, h, v, IDS)),
        "weights' grad": ("weights: .*grad", "batched_lora_delta", (x, h, v, IDS, weights)),
        "x's grad, in place": ("x: .*grad", "batched_lora_delta_", (grad, needs, h, v, IDS)),
        "x's grad, adapt": ("x: .*grad", "batched_adapt", (needs, grad, h, v, IDS, 0.1)),
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
        y = OPS.batched_lora_delta(x, *of(pool), IDS)
        assert OPS.batched_adapt(x, random(5, OUT), *of(pool), IDS, 0.1)[0] == 1
    assert not y.requires_grad
    with pytest.raises(IndexError, match="got 7"):
        OPS.batched_lora_delta(x, *of(pool), slots(0, 0, 7, 0, 0))
