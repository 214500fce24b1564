"""lora_delta's kernels in C++ behind torch's dispatcher: what they take, and what they leave to
the functions in Python."""

from __future__ import annotations

import gc
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from helpers import TOLERANCE, bits, delta_error, f64, magnitude
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

import lora_engine as le
import lora_engine.torch_ops  # defines the ops
from lora_engine import _C, reference, torch_library
from lora_engine.backends import chosen

OP = torch.ops.lora_engine.lora_delta
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@pytest.fixture(autouse=True)
def core():
    """The backend that the kernels in C++ compute by, chosen now."""
    chosen.cache_clear()
    assert chosen() is _C


def random(*shape, dtype=torch.float32):
    rng = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=rng).to(dtype)


def arguments(n=5, width=17, rank=3, out=9, dtype=torch.float32):
    return (
        random(n, width, dtype=dtype),
        random(rank, width, dtype=dtype),
        random(out, rank).to(dtype),
    )


@pytest.fixture
def nothing_in_python(monkeypatch):
    """Fails a call that the kernels in C++ leave to Python."""

    def refuse(*args):
        raise AssertionError("left to Python")

    monkeypatch.setattr(torch_library, "chosen", refuse)


def test_registered_in_the_core():
    table = torch._C._dispatch_dump("lora_engine::lora_delta")
    named = [line for line in table.splitlines() if line.startswith(("CPU:", "AutogradCPU:"))]
    assert len(named) == 2
    assert all("py_torch.cpp" in line for line in named), table


@pytest.mark.usefixtures("nothing_in_python")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rank", [2, 3, 4, 8, 16])
@pytest.mark.parametrize("out", [1, 127, 300])
def test_right_without_python(dtype, rank, out):
    x, A, B = arguments(4, 129, rank, out, DTYPES[dtype])
    wide_A, wide_B = random(rank, 140, dtype=x.dtype)[:, 3:132], random(out, 40, dtype=x.dtype)
    columns = A.t().contiguous().t(), B.t().contiguous().t()
    cases = [(x, A, B), (x[1], A, B), (x[::2], A, B), (x[:1].expand(4, 129), A, B)]
    for rows, down, up in [*cases, (x, wide_A, wide_B[:, :rank]), (x, *columns)]:
        y = OP(rows, down, up, 0.5)
        assert y.dtype is x.dtype
        assert y.shape == (*rows.shape[:-1], out)
        assert y.is_contiguous()
        want = reference.lora_delta(f64(rows).reshape(-1, 129), f64(down), f64(up), 0.5)
        scale = magnitude(rows.reshape(-1, 129), down, up, 0.5)
        assert delta_error(y.reshape(-1, out), want, scale) <= TOLERANCE[dtype]
        assert bits(y) == bits(le.lora_delta(rows, down, up, 0.5))


@pytest.mark.usefixtures("nothing_in_python")
def test_where_nothing_is_recorded():
    x, A, B = (tensor.requires_grad_() for tensor in arguments())
    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode:
            y = OP(x, A, B, 2.0)
            assert not y.requires_grad
            assert bits(y) == bits(le.lora_delta(x, A, B, 2.0))


@pytest.mark.usefixtures("nothing_in_python")
def test_large_and_from_many_threads():
    x, A, B = arguments(300, 1024, 4, 513)
    want = bits(le.lora_delta(x, A, B, 2.0))
    before = torch.get_num_threads()
    with ThreadPoolExecutor(4) as threads:
        made = threads.map(lambda _: bits(OP(x, A, B, 2.0)), range(40))
        assert all(y == want for y in made)
    assert torch.get_num_threads() == before


def test_another_backend_is_asked(monkeypatch):
    monkeypatch.setenv("LORA_ENGINE_BACKEND", "reference")
    chosen.cache_clear()
    chosen()
    asked = []
    reference_backend = chosen()
    computed = reference_backend.lora_delta
    monkeypatch.setattr(
        reference_backend, "lora_delta", lambda *args: asked.append(args) or computed(*args)
    )
    x, A, B = arguments()
    assert torch.allclose(OP(x, A, B, 2.0), x @ A.t() @ B.t() * 2.0, atol=1e-5)
    assert len(asked) == 1


# ---- what is left to Python ----


def test_layouts_that_are_left_to_python():
    x, A, B = arguments()
    assert OP(x[:0], A, B, 2.0).shape == (0, 9)
    assert bits(OP(x, random(6, 34)[::2, ::2], B, 2.0)) == bits(
        le.lora_delta(x, random(6, 34)[::2, ::2], B, 2.0)
    )
    negated = torch.complex(torch.zeros(5, 17), x).conj().imag
    assert OP(x[:, :1], A[:, :1], B, 2.0).shape == (5, 9)  # a column may be such a view
    for view in (negated, negated[:, 0].unsqueeze(1)):  # a column that says it is contiguous
        assert view.is_neg()
        with pytest.raises(ValueError, match="negative bit"):
            OP(view, A[:, : view.shape[1]], B, 2.0)


WRONG = {
    "dtype of x": (lambda x, A, B: (x.double(), A, B), TypeError),
    "whole numbers": (lambda x, A, B: (x, A.int(), B), TypeError),
    "dtype of B": (lambda x, A, B: (x, A, B.bfloat16()), TypeError),
    "width": (lambda x, A, B: (x[:, :16], A, B), ValueError),
    "rank": (lambda x, A, B: (x, A, B[:, :2]), ValueError),
    "a scalar": (lambda x, A, B: (x[0, 0], A, B), ValueError),
    "five dimensions": (lambda x, A, B: (x[None, None, None], A, B), ValueError),
    "layout": (lambda x, A, B: (x.to_sparse(), A, B), TypeError),
}


@pytest.mark.parametrize("case", WRONG)
def test_errors_are_those_of_the_library(case):
    change, kind = WRONG[case]
    wrong = change(*arguments())
    with pytest.raises(kind, match=r"^lora_delta: ") as expected:
        le.lora_delta(*wrong, 2.0)
    for _ in range(3):
        with pytest.raises(kind) as raised:
            OP(*wrong, 2.0)
        assert str(raised.value) == str(expected.value)


def test_another_device():
    x, A, B = arguments()
    with pytest.raises(ValueError, match="lora_delta: A: expected a tensor on cpu, beside the"):
        OP(x, A.to("meta"), B, 2.0)


def test_not_finite():
    with pytest.raises(ValueError, match=r"lora_delta: scaling: expected a finite"):
        OP(*arguments(), float("nan"))


def test_keeps_no_tensor():
    x, A, B = arguments()
    wrong = random(9, 2)

    def counts():
        return [tensor._use_count() for tensor in (x, A, B, wrong)]

    before = counts()
    for _ in range(3):
        assert OP(x, A, B, 2.0)._use_count() == 1
        with pytest.raises(ValueError, match="lora_delta"):
            OP(x, A, wrong, 2.0)
        OP(x.requires_grad_(), A, B, 2.0).sum().backward()
        x.requires_grad_(False).grad = None
        gc.collect()
    assert counts() == before


def test_modes_and_subclasses_see_the_call():
    seen = []

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    class Sub(torch.Tensor):
        @classmethod
        def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
            seen.append(str(func))
            plain = [a.plain if isinstance(a, Sub) else a for a in args]
            return func(*plain, **(kwargs or {}))

    x, A, B = arguments()
    want = bits(OP(x, A, B, 2.0))
    with Mode():
        y = OP(x, A, B, 2.0)
    assert bits(y) == want
    assert seen == ["lora_engine.lora_delta.default"]
    for place in range(3):
        args = [x, A, B]
        args[place] = torch.Tensor._make_subclass(Sub, args[place])
        args[place].plain = [x, A, B][place]
        seen.clear()
        y = OP(*args, 2.0)
        assert bits(y) == want
        assert seen == ["lora_engine.lora_delta.default"]


def test_traced_and_transformed():
    x, A, B = arguments()
    want = OP(x, A, B, 2.0)
    for mode in ("real", "fake", "symbolic"):
        graph = make_fx(lambda *args: OP(*args, 2.0) + 1, tracing_mode=mode)(x, A, B)
        assert "lora_engine.lora_delta.default" in graph.code
        assert torch.equal(graph(x, A, B), want + 1)
    batched = torch.vmap(lambda x: OP(x, A, B, 2.0))(x[:, None])
    assert torch.equal(batched[:, 0], torch.cat([OP(row[None], A, B, 2.0) for row in x]))
    with torch.profiler.profile() as profile:
        OP(x, A, B, 2.0)
    assert "lora_engine::lora_delta" in {event.key for event in profile.key_averages()}


INTERRUPTED = """
import torch, lora_engine.torch_ops
from lora_engine import torch_library
op = torch.ops.lora_engine.lora_delta
x = torch.ones(2, 3)
def stop(*args): raise KeyError("of another kind")
torch_library.chosen = stop
try:
    op(x.double(), x, torch.ones(4, 2), 1.0)
except RuntimeError as error:
    assert "KeyError: 'of another kind'" in str(error), error
else:
    raise SystemExit(1)
"""


def test_an_error_of_another_kind_is_told():
    subprocess.run([sys.executable, "-c", INTERRUPTED], check=True, timeout=120)
