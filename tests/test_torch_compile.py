"""torch.ops.lora_engine under torch.compile and torch.export; handles."""

from __future__ import annotations

import gc
import os
import subprocess
import sys

import pytest
import torch
from helpers_torch import IDS, IN, OPS, OUT, new_pool, random, slots
from torch._dynamo.utils import counters

import lora_engine as le

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:torch.*")


class Served(torch.nn.Module):
    """A base layer, and each row's adapter on top."""

    def __init__(self, pool):
        super().__init__()
        self.base, self.pool = torch.nn.Linear(IN, pool.out_features), pool

    def forward(self, x, ids):
        return self.base(x) + OPS.batched_lora_delta(x, self.pool.handle, ids)


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
    pool.handle  # noqa: B018  before it is traced
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
    handle = pool.handle

    def turns(x):
        first = OPS.batched_lora_delta(x, handle, IDS)
        outcomes = OPS.batched_adapt(x, grad, handle, IDS, 0.1)
        y = grad.clone()
        OPS.batched_lora_delta_(y, x, handle, IDS)
        OPS.batched_adapt(x, grad, handle, IDS, 0.1)
        return first, y - grad, OPS.batched_lora_delta(x, handle, IDS), outcomes

    start = [pool.get(slot) for slot in (0, 1)]
    got = compiled(turns)(x)
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
    handle = pool.handle
    fast = compiled(lambda x: OPS.batched_lora_delta(x, handle, IDS).sum())
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
    rows = (w.handle, None, pool.handle)
    fast = compiled(lambda x, ids: OPS.nf4_linear(x, *rows, ids).tanh())
    for n in (2, 3, 5, 4):
        x = random(n, IN, grad=True)
        y = fast(x, IDS[:n])
        assert torch.allclose(y, OPS.nf4_linear(x, *rows, IDS[:n]).tanh(), rtol=1e-5, atol=1e-5)
        y.sum().backward()
        assert x.grad.shape == (n, IN)
    assert counters["stats"]["unique_graphs"] <= 2  # of 2 rows, of any number


class Layer(torch.nn.Module):
    """A packed base layer, its own pool on top."""

    def __init__(self, seed):
        super().__init__()
        self.pool = new_pool(out=IN, seed=seed)
        self.w = le.nf4_quantize(random(IN, IN, seed=seed))
        self.handles = self.w.handle, self.pool.handle  # made before the trace

    def forward(self, x, ids):
        y = OPS.nf4_linear(x, self.w.handle, None, self.pool.handle, ids)
        return y + OPS.batched_lora_delta(x, self.pool.handle, ids).tanh()


@pytest.mark.parametrize("grad", [False, True])
def test_one_graph_serves_a_pool_a_layer(compiled, grad):
    layers = [Layer(seed) for seed in range(12)]
    fast = [compiled(layer) for layer in layers]
    x = random(5, IN, grad=grad)
    for layer, served in zip(layers, fast, strict=True):
        assert torch.allclose(served(x, IDS), layer(x, IDS), rtol=1e-4, atol=1e-4)
        if grad:
            served(x, IDS).sum().backward()
            got, x.grad = x.grad, None
            layer(x, IDS).sum().backward()
            assert torch.allclose(got, x.grad, rtol=1e-4, atol=1e-4)
            x.grad = None
    assert counters["stats"]["unique_graphs"] == 1


def test_a_handle_passed_in_is_taken_as_it_comes(compiled):
    fast = compiled(lambda x, handle, ids: OPS.batched_lora_delta(x, handle, ids))
    pools, x = [new_pool(seed=seed) for seed in range(12)], random(5, IN)
    for pool in pools:
        assert torch.equal(fast(x, pool.handle, IDS), pool.forward(x, IDS, accumulate=False))
    with pytest.raises(ValueError, match="pool: expected the handle of a living"):
        fast(x, pools[0].handle[:7], IDS)
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("strict", [False, True])
def test_exporting_a_handle_is_refused(strict):
    pool = new_pool()
    pool.handle  # noqa: B018  before it is traced
    with pytest.raises(Exception, match=r"batched_lora_delta: torch\.export: expected an op of"):
        torch.export.export(Served(pool), (random(5, IN), IDS), strict=strict)


ELSEWHERE = """
import sys, torch
sys.path.insert(0, sys.argv[2])
from helpers_torch import IDS, IN, new_pool, random
pool, x = new_pool(seed=2), random(5, IN)
pool.handle
saved = torch.jit.load(sys.argv[1])
try:
    print(saved(x, IDS))
except Exception as error:
    assert "expected the handle of a living AdapterPool of this process" in str(error), error
else:
    raise SystemExit(1)
"""


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_a_saved_graph_finds_no_pool_in_another_process(tmp_path):
    """One that was not exported: its numbers are constants of a file."""
    pool, x = new_pool(), random(5, IN)
    handle = pool.handle
    traced = torch.jit.trace(lambda x, ids: OPS.batched_lora_delta(x, handle, ids), (x, IDS))
    assert torch.equal(traced(x, IDS), pool.forward(x, IDS))
    traced.save(str(tmp_path / "graph.pt"))
    here = os.path.dirname(__file__)
    command = [sys.executable, "-c", ELSEWHERE, str(tmp_path / "graph.pt"), here]
    subprocess.run(command, check=True, timeout=120)


CACHED = """
import sys, torch
sys.path.insert(0, sys.argv[1])
from helpers_torch import IDS, IN, OPS, new_pool, random
from torch._dynamo.utils import counters
[new_pool().handle for _ in range(int(sys.argv[2]))]
pool, x = new_pool(seed=int(sys.argv[2])), random(5, IN)
handle = pool.handle
fast = torch.compile(lambda x: OPS.batched_lora_delta(x, handle, IDS).tanh())
assert torch.allclose(fast(x), pool.forward(x, IDS, accumulate=False).tanh(), rtol=1e-4, atol=1e-5)
print(counters["inductor"]["fxgraph_cache_hit"] + counters["aot_autograd"]["autograd_cache_hit"])
"""


def test_the_cache_on_disk_serves_other_processes(tmp_path):
    """A graph without a number in it, whose result is of the pool that is there."""
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    hits = [
        int(subprocess.run(
            [sys.executable, "-c", CACHED, os.path.dirname(__file__), str(n)],
            check=True, timeout=180, env=environment, capture_output=True, text=True,
        ).stdout)
        for n in (1, 2)
    ]  # fmt: skip
    assert hits[0] == 0
    assert hits[1] > 0


def test_a_handle_first_read_in_a_trace_is_refused():
    torch.compiler.reset()
    fast = torch.compile(Served(new_pool()), fullgraph=True, backend="eager")
    with pytest.raises(Exception, match="read once before it is traced"):
        fast(random(5, IN), IDS)


# ---- handles ----


def test_a_handle_says_whose_it_is_in_its_sizes():
    pools = [new_pool(), new_pool(), new_pool(out=OUT + 1)]
    handles = [p.handle for p in pools]
    assert all(p.handle is h for p, h in zip(pools, handles, strict=True))
    numbers = [h.shape[0] for h in handles]
    assert len(set(numbers)) == 3
    assert [list(h.shape[1:]) for h in handles] == [[0, OUT], [0, OUT], [0, OUT + 1]]
    assert not any(h.untyped_storage().nbytes() for h in handles)  # nor of a CUDA graph's memory
    del pools
    gc.collect()
    assert new_pool().handle.shape[0] not in numbers


def test_handles_keep_nothing_alive():
    pool = new_pool()
    handle = pool.handle
    OPS.batched_lora_delta(random(5, IN), handle, IDS)
    del pool
    gc.collect()
    with pytest.raises(ValueError, match=r"handle of a living AdapterPool of this.*nothing"):
        OPS.batched_lora_delta(random(5, IN), handle, IDS)


def test_importing_defines_the_ops_and_nothing_imports_torch_before():
    script = """
import sys, numpy as np, lora_engine as le
pool = le.AdapterPool(4, 4)
w = le.nf4_quantize(np.ones((4, 4), "f4"))
assert "torch" not in sys.modules
assert not w.handle.numel() and not pool.handle.numel()
import torch
assert torch.ops.lora_engine.nf4_linear(torch.ones(1, 4), w.handle).tolist() == [[4.0] * 4]
"""
    subprocess.run([sys.executable, "-c", script], check=True)
