"""le.attach: each row's adapter on transformers models and bare modules, against PEFT."""

from __future__ import annotations

import copy
import gc
import inspect
import threading

import numpy as np
import pytest
import torch
from helpers_attach import adapter_of, logits, new_model, tokens, two_adapters, with_peft

import lora_engine as le
from lora_engine.adapters.adapter import Adapter, LoraWeights

KINDS = ("llama", "gpt2", "bert")


def bare(*shapes: tuple[int, int], seed: int = 0) -> torch.nn.Sequential:
    torch.manual_seed(seed)
    return torch.nn.Sequential(*(torch.nn.Linear(*shape) for shape in shapes))


def drawn(shape: tuple[int, int], rank: int, seed: int, scaling: float = 1.0) -> LoraWeights:
    rng = np.random.default_rng(seed)
    A = rng.standard_normal((rank, shape[0]), dtype=np.float32)
    return LoraWeights(A, rng.standard_normal((shape[1], rank), dtype=np.float32), scaling)


def delta(w: LoraWeights, x: torch.Tensor) -> torch.Tensor:
    return w.scaling * x @ torch.from_numpy(w.A).T @ torch.from_numpy(w.B).T


@pytest.fixture(scope="module", params=KINDS)
def served(request):
    """(the model, attached; its handle; the untouched model; PEFT's of the same adapters)."""
    base = new_model(request.param)
    peft = with_peft(base, two_adapters(request.param))
    model = copy.deepcopy(base)
    handle = le.attach(model, {name: adapter_of(peft, name) for name in ("a", "b")})
    yield model, handle, base, peft
    handle.detach()


def test_each_row_has_its_adapter_as_with_peft(served):
    model, _, base, peft = served
    for names in (["a", "__base__", "b"], ["b", "b", "a"], ["a", "a", "a"]):
        got, want = (logits(m, tokens(), adapter_names=names) for m in (model, peft))
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    plain = logits(base, tokens())
    got = logits(model, tokens(), adapter_names=["a", "__base__", "b"])
    assert torch.equal(got[1], plain[1])
    assert (got - plain)[[0, 2]].abs().amax((1, *range(2, got.ndim))).min() > 1e-2
    assert torch.equal(logits(model, tokens(), adapter_names=["__base__"] * 3), plain)


def test_set_adapter_as_with_peft(served):
    model, handle, base, peft = served
    for name in ("a", "b"):
        handle.set_adapter(name)
        peft.set_adapter(name)
        got, want = logits(model, tokens()), logits(peft, tokens())
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    for name in (None, "__base__"):
        handle.set_adapter(name)
        assert torch.equal(logits(model, tokens()), logits(base, tokens()))
    handle.set_adapter({"a": 0.7, "b": -0.3})
    got = logits(model, tokens())
    row = {"a": 0.7, "b": -0.3}
    torch.testing.assert_close(
        got, logits(model, tokens(), adapter_names=[row] * 3), rtol=1e-4, atol=1e-5
    )
    handle.set_adapter("a")


def test_generate_with_beams_as_with_peft(served):
    model, _, _, peft = served
    if not hasattr(model, "generate"):
        return
    names = ["a", "__base__", "b"]
    for options in ({}, {"num_beams": 3}, {"num_beams": 4, "num_return_sequences": 2}):
        options = {**tokens(), "max_new_tokens": 3, "do_sample": False, **options}
        got, want = (m.generate(**options, adapter_names=names) for m in (model, peft))
        assert torch.equal(got, want)


def test_a_mixture_is_the_weighted_sum_of_deltas():
    model = bare((5, 4))
    first, second = drawn((5, 4), 1, 1, 0.5), drawn((5, 4), 3, 2, 2.0)
    want_base = copy.deepcopy(model)
    le.attach(model, {"a": Adapter({"0": first}), "b": Adapter({"0": second})})
    x = torch.randn(3, 2, 5)
    with torch.no_grad():
        got = model(x, adapter_names=[{"a": 0.7, "b": 0.3}, "__base__", {"b": -2, "__base__": 1}])
        want = want_base(x)
    want[0] += 0.7 * delta(first, x[0]) + 0.3 * delta(second, x[0])
    want[2] += -2 * delta(second, x[2])
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_models_with_float32_adapters(dtype):
    base = new_model("llama", dtype)
    peft = with_peft(base, two_adapters("llama"))
    model = copy.deepcopy(base)
    le.attach(model, {name: adapter_of(peft, name) for name in ("a", "b")})
    names = ["a", "__base__", "b"]
    got, want = (logits(m, tokens(), adapter_names=names) for m in (model, peft))
    assert got.dtype == dtype
    assert torch.equal(got[1], want[1])
    scale = (want - logits(base, tokens())).float().norm()
    assert (got - want).float().norm() < {torch.bfloat16: 6e-2, torch.float16: 6e-3}[dtype] * scale


def test_a_single_linear_and_a_micro_lora():
    linear = torch.nn.Linear(6, 4)
    lora = le.MicroLoRA(le.MicroLoRAConfig(6, 4, target_modules=("proj",)))
    lora.adapt(np.ones(6, "f4"), le.Feedback.from_gradient(np.ones(4, "f4")), "proj", lr=0.1)
    handle = le.attach(linear, {"a": lora})
    x = torch.randn(3, 6)
    want = torch.nn.functional.linear(x, linear.weight, linear.bias)
    with torch.no_grad():
        got = linear(x, adapter_names=["a", "__base__", "a"])
        assert torch.equal(got[1], want[1])
        torch.testing.assert_close(got[2], want[2] + lora.forward(x[2:], "proj")[0])
        torch.testing.assert_close(linear(x[0]), want[0] + lora.forward(x[:1], "proj")[0])
        assert torch.equal(linear(x[0], adapter_names=["a"]), linear(x[0]))
        one = torch.nn.functional.linear(x[0], linear.weight, linear.bias)
        assert torch.equal(linear(x[0], adapter_names=["__base__"]), one)
    handle.detach()
    assert type(linear) is torch.nn.Linear
    assert torch.equal(linear(x), want)


def test_a_micro_lora_is_for_every_module_of_its_names():
    model = new_model("llama")
    config = le.MicroLoRAConfig(
        16, 16, target_modules=("q_proj", "v_proj"), shapes={"v_proj": (16, 8)}
    )
    lora = le.MicroLoRA(config)
    for module, out in (("q_proj", 16), ("v_proj", 8)):
        A, _, _ = lora.weights(module)
        lora.set_weights(module, A, np.full((out, 2), 0.3, "f4"))
    plain = logits(model, tokens())
    handle = le.attach(model, {"a": lora})
    assert (logits(model, tokens()) - plain).abs().max() > 1e-3
    paths = [f"model.layers.{i}.self_attn.{m}" for i in (0, 1) for m in ("q_proj", "v_proj")]
    assert "4 layers" in repr(handle)
    modules = {p: LoraWeights(*lora.weights(p.rsplit(".", 1)[1])) for p in paths}
    handle.add("b", Adapter({f"base_model.model.{p}": w for p, w in modules.items()}))
    got = logits(model, tokens(), adapter_names=["b"] * 3)
    assert torch.equal(got, logits(model, tokens(), adapter_names=["a"] * 3))


def test_forward_takes_names_and_keeps_its_signature():
    model = bare((5, 4))
    signature = inspect.signature(model.forward)
    handle = le.attach(model, {"a": Adapter({"0": drawn((5, 4), 2, 1)})})
    x = torch.randn(2, 5)
    with torch.no_grad():
        want = model(x, adapter_names=["__base__", "a"])
        assert torch.equal(model.forward(x, adapter_names=["__base__", "a"]), want)
        assert torch.equal(model.forward(x), model(x))
    assert inspect.signature(model.forward) == signature
    with pytest.raises(ValueError, match="got 'nobody'"):
        model.forward(x, adapter_names=["nobody", "a"])
    handle.detach()
    with pytest.raises(TypeError, match="adapter_names"):
        model.forward(x, adapter_names=["__base__", "a"])


def test_what_a_router_says_is_a_mixture():
    """Its weights are NumPy's; None fills up rows, here one place of each, and all of the last."""
    model = bare((5, 4))
    le.attach(model, {name: Adapter({"0": drawn((5, 4), 2, i)}) for i, name in enumerate("ab")})
    router = le.Router(top_k=3)
    router.add("a", prototypes=np.eye(3, dtype="f4")[:1])
    router.add("b", prototypes=np.eye(3, dtype="f4")[1:2])
    found = router.route(np.array([[1, 1, 0], [1, 0, 0], [0, np.nan, 1]], "f4"))
    assert [names.count(None) for names in found.names] == [1, 1, 3]
    rows = zip(found.names, found.weights, strict=True)
    mixtures = [dict(zip(*row, strict=True)) for row in rows]
    plain = [
        {name: float(w) for name, w in row.items() if name is not None} or "__base__"
        for row in mixtures
    ]
    x = torch.randn(3, 5)
    with torch.no_grad():
        assert torch.equal(model(x, adapter_names=mixtures), model(x, adapter_names=plain))
        assert torch.equal(
            model(x, adapter_names=[{"a": 1, "b": np.int64(2)}] * 3),
            model(x, adapter_names=[{"a": 1.0, "b": 2.0}] * 3),
        )


def test_add_replaces_remove_and_detach_restore():
    model = bare((5, 4), (4, 3))
    plain = copy.deepcopy(model)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    one, two = drawn((5, 4), 2, 1), drawn((5, 4), 4, 2)
    x = torch.randn(2, 5)
    handle = le.attach(model, {"a": Adapter({"0": one})})
    assert handle.names == ("a",)
    assert list(model.state_dict()) == list(before)
    with torch.no_grad():
        first = model(x)
        handle.add("a", Adapter({"0": two}))
        second = model(x)
        handle.add("b", Adapter({"1": drawn((4, 3), 1, 3)}))
        assert handle.names == ("a", "b")
        assert torch.equal(model(x), second)
        handle.add("a", Adapter({"0": one}))
        assert torch.equal(model(x), first)
        handle.remove("a")
        assert torch.equal(model(x), plain(x))
        assert handle.names == ("b",)
        assert not torch.equal(model(x, adapter_names=["b", "b"]), plain(x))
        handle.detach()
        assert torch.equal(model(x), plain(x))
    assert [type(m) for m in model.modules()] == [type(m) for m in plain.modules()]
    assert [set(vars(m)) for m in model.modules()] == [set(vars(m)) for m in plain.modules()]
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    with pytest.raises(RuntimeError, match="detached"):
        handle.set_adapter("b")
    le.attach(model, {"a": Adapter({"0": one})})
    with torch.no_grad():
        assert torch.equal(model(x), first)


def test_slots_of_replaced_adapters_are_freed():
    model = bare((5, 4))
    handle = le.attach(model, {"a": Adapter({"0": drawn((5, 4), 2, 1)})})
    (pool,) = handle._shelf.pools.values()
    for i in range(200):
        handle.add("a", Adapter({"0": drawn((5, 4), 1 + i % 3, i)}))
        model(torch.randn(2, 5), adapter_names=["a", "__base__"])
    gc.collect()
    handle.set_adapter(None)
    assert len(pool) <= 2
    handle.remove("a")
    assert len(pool) == 0


def test_a_call_that_has_begun_ends_with_the_adapters_it_began_with():
    """An adapter is replaced, and then removed, between two layers of a call."""
    model = bare((5, 5), (5, 5))
    old = Adapter({"0": drawn((5, 5), 2, 1), "1": drawn((5, 5), 2, 2)})
    new = Adapter({"0": drawn((5, 5), 3, 3), "1": drawn((5, 5), 3, 4)})
    handle = le.attach(model, {"a": old})
    x = torch.randn(2, 5)
    with torch.no_grad():
        first = model(x, adapter_names=["a", "a"])
        hook = model[0].register_forward_hook(lambda *_: handle.add("a", new))
        assert torch.equal(model(x, adapter_names=["a", "a"]), first)
        hook.remove()
        second = model(x)
        assert not torch.equal(second, first)
        hook = model[0].register_forward_hook(lambda *_: handle.remove("a"))
        assert torch.equal(model(x), second)
        hook.remove()
    (pool,) = handle._shelf.pools.values()
    handle.set_adapter(None)
    assert len(pool) == 0


@pytest.mark.parametrize("names", [None, ["a"] * 3])
def test_generate_ends_with_the_adapters_it_began_with(names):
    """Between two of its steps an adapter is replaced, another one set, and the first removed."""
    model = new_model("llama")
    peft = with_peft(model, two_adapters("llama"))
    one, two = (adapter_of(peft, name) for name in ("a", "b"))
    handle = le.attach(model, {"a": one})
    changes = {
        2: lambda: handle.add("a", two),
        3: lambda: handle.set_adapter(None),
        4: lambda: handle.remove("a"),
    }

    def scores(changes):
        step = iter(range(1, 9))

        def between(_, values):
            changes.get(next(step), lambda: None)()
            return values

        found = model.generate(
            **tokens(), max_new_tokens=5, do_sample=False, output_logits=True,
            return_dict_in_generate=True, logits_processor=[between], adapter_names=names,
        )  # fmt: skip
        return torch.stack(found.logits)

    want = scores({})
    assert torch.equal(scores(changes), want)
    assert handle.names == ()


def test_threads_serve_names_of_their_own():
    model = new_model("llama")
    peft = with_peft(model, two_adapters("llama"))
    adapters = {name: adapter_of(peft, name) for name in ("a", "b")}
    handle = le.attach(model, adapters)
    calls = [["a", "__base__", "b"], ["b", "a", "a"], [{"a": 0.5, "b": 2.0}, "b", "__base__"]]
    want = [logits(model, tokens(), adapter_names=names) for names in calls]
    wrong: list[object] = []
    start = threading.Barrier(len(calls) + 1)

    def serve(i: int) -> None:
        start.wait()
        for _ in range(15):
            if not torch.equal(logits(model, tokens(), adapter_names=calls[i]), want[i]):
                wrong.append(i)

    threads = [threading.Thread(target=serve, args=(i,)) for i in range(len(calls))]
    for thread in threads:
        thread.start()
    start.wait()
    for i in range(30):  # what names mean changes, and comes back to the same weights
        handle.add("ab"[i % 2], adapters["ab"[i % 2]])
    for thread in threads:
        thread.join()
    assert not wrong


def test_more_adapters_than_tables_begin_with_and_layers_without_them():
    """Each names one of two layers; numbers of freed ones are used again."""
    model = bare((3, 3), (3, 3))
    plain = copy.deepcopy(model)
    weights = [drawn((3, 3), 1, i) for i in range(150)]
    adapters = {str(i): Adapter({str(i % 2): w}) for i, w in enumerate(weights)}
    handle = le.attach(model, adapters)
    for i in range(0, 60, 3):
        handle.remove(str(i))
        handle.add(str(i), adapters[str(i)])
    x = torch.randn(150, 3)
    with torch.no_grad():
        got = model(x, adapter_names=[str(i) for i in range(150)])
        for i, w in enumerate(weights):
            h = plain[0](x[i]) + (0 if i % 2 else delta(w, x[i]))
            want = plain[1](h) + (delta(w, h) if i % 2 else 0)
            torch.testing.assert_close(got[i], want, rtol=1e-4, atol=1e-4)
