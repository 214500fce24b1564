"""le.attach on 4-bit layers, this engine's and bitsandbytes': fused; PEFT as oracle."""

from __future__ import annotations

import dataclasses

import helpers_models  # noqa: F401  no hub
import pytest
import torch
from helpers import bits
from helpers_attach import adapter_of, logits, new_model, tokens, two_adapters, with_peft
from helpers_nf4 import bitsandbytes, flat_bytes
from torch import nn

import lora_engine as le
from lora_engine.attached import layers
from lora_engine.quant.bitsandbytes_layer import is_linear4bit

pytestmark = pytest.mark.usefixtures("one_torch_thread")

KINDS = ("llama", "gpt2", "bert")
ROWS = ["a", "__base__", {"a": 0.5, "b": -0.25}]


def packed(kind):
    """A model whose layers are all NF4Linear."""
    model = new_model(kind)
    le.quantize(model, double_quant=True)
    return model


def of_bitsandbytes(kind, tmp_path):
    """The same, with its layers as transformers loads them for bitsandbytes."""
    saved = packed(kind)
    saved.save_pretrained(tmp_path)
    return type(saved).from_pretrained(tmp_path).eval()


def adapters(kind):
    """PEFT on the packed model, and its adapters."""
    peft = with_peft(packed(kind), two_adapters(kind))
    return peft, {name: adapter_of(peft, name) for name in ("a", "b")}


def stored(model):
    return {k: flat_bytes(v.detach()).tobytes() for k, v in model.state_dict().items()}


@pytest.fixture(params=["ours", "bitsandbytes"])
def layers_of(request, tmp_path):
    return packed if request.param == "ours" else lambda kind: of_bitsandbytes(kind, tmp_path)


@pytest.mark.parametrize("kind", KINDS)
def test_each_row_has_its_adapter_as_with_peft(kind, layers_of, monkeypatch):
    peft, both = adapters(kind)
    model = layers_of(kind)
    types = {path: type(m) for path, m in model.named_modules()}
    plain, before = logits(packed(kind), tokens()), stored(model)
    handle = le.attach(model, both)
    monkeypatch.setattr(layers, "add_delta", None)  # all in the pass over the packed weight
    for names in (["a", "__base__", "b"], ["b", "b", "a"]):
        got, want = (logits(m, tokens(), adapter_names=names) for m in (model, peft))
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    mixed = logits(model, tokens(), adapter_names=ROWS)
    assert (mixed - plain)[[0, 2]].abs().amax((1, *range(2, mixed.ndim))).min() > 1e-3
    alone = logits(model, tokens(), adapter_names=["__base__"] * 3)
    assert bits(mixed[1]) == bits(alone[1])
    torch.testing.assert_close(alone, plain, rtol=1e-5, atol=1e-5)
    if layers_of is packed:  # else loaded from a file, where torch's own layers round otherwise
        assert bits(alone) == bits(plain)
    handle.detach()
    assert {path: type(m) for path, m in model.named_modules()} == types
    assert stored(model) == before


def test_a_mixture_is_the_sum_of_its_deltas():
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(32, 24))
    le.quantize(base)
    peft = with_peft(base, {n: {"target_modules": ["0"], "r": r} for n, r in (("a", 2), ("b", 5))})
    x = torch.randn(3, 7, 32)
    le.attach(base, {name: adapter_of(peft, name) for name in ("a", "b")})
    with torch.no_grad():
        got = base(x, adapter_names=ROWS)
        a, b, none = (base(x, adapter_names=[n] * 3) for n in ("a", "b", "__base__"))
    want = none[2] + 0.5 * (a - none)[2] - 0.25 * (b - none)[2]
    torch.testing.assert_close(got[2], want, rtol=1e-5, atol=1e-5)
    assert bits(got[0]) == bits(a[0])


def test_adapters_of_two_dtypes_one_fused_one_added(layers_of):
    _, both = adapters("llama")
    model, same = layers_of("llama"), packed("llama")
    mixed = {"a": both["a"], "b": dataclasses.replace(both["b"], dtype="bfloat16")}
    le.attach(model, mixed)
    le.attach(same, both)
    names = ["b", {"a": 1.0, "b": 1.0}, "a"]
    got, want = (logits(m, tokens(), adapter_names=names) for m in (model, same))
    torch.testing.assert_close(got, want, rtol=3e-2, atol=3e-2)
    torch.testing.assert_close(got[2], want[2], rtol=1e-5, atol=1e-5)
    assert bits(got[0]) != bits(want[0])


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_reach_the_inputs_as_with_peft(kind):
    peft, both = adapters(kind)
    model = packed(kind)
    le.attach(model, both)
    names, found = ["a", "__base__", "b"], []
    for m in (model, peft):
        embedded = m.get_input_embeddings()(tokens()["input_ids"]).detach().requires_grad_()
        y = m(inputs_embeds=embedded, adapter_names=names).logits
        (y * torch.linspace(-1, 1, y.numel()).view(y.shape)).sum().backward()
        found.append(embedded.grad)
    torch.testing.assert_close(found[0], found[1], rtol=1e-3, atol=1e-4)
    assert found[1].abs().max() > 1e-2


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_are_trained_as_by_peft(kind, layers_of):
    """QLoRA, each row on its own adapter: the gradients of A and B."""
    peft, both = adapters(kind)
    model = layers_of(kind)
    before = stored(model)
    handle = le.attach(model, both)
    trained = {name: handle.parameters(name) for name in both}
    for name, parameter in peft.named_parameters():
        parameter.requires_grad_("lora_" in name)
    for m in (model, peft):
        y = m(**tokens(), adapter_names=["a", "__base__", "b"]).logits
        (y * torch.linspace(-1, 1, y.numel()).view(y.shape)).sum().backward()
    layers_ = dict(peft.base_model.model.named_modules())
    for name, parameters in trained.items():
        want = [
            getattr(layers_[path], which)[name].weight.grad
            for path in both[name].modules
            for which in ("lora_A", "lora_B")
        ]
        for got, grad in zip((p.grad for p in parameters), want, strict=True):
            torch.testing.assert_close(got, grad, rtol=1e-3, atol=1e-3 * float(grad.abs().max()))
        assert max(float(grad.abs().max()) for grad in want) > 1e-2
    optimizer = torch.optim.SGD(trained["a"], lr=0.1)
    was = logits(model, tokens(), adapter_names=["a", "__base__", "b"])
    optimizer.step()
    now = logits(model, tokens(), adapter_names=["a", "__base__", "b"])
    assert bits(now[1:]) == bits(was[1:])
    assert (now[0] - was[0]).abs().max() > 1e-3  # what is served, by the fused pass too
    handle.detach()
    assert stored(model) == before


def test_a_packed_weight_is_not_merged_into(layers_of):
    _, both = adapters("llama")
    model = layers_of("llama")
    handle, before = le.attach(model, both), stored(model)
    served = logits(model, tokens(), adapter_names=ROWS)
    with pytest.raises(TypeError, match=r"Attached.merge: .*weight: expected .* got torch.uint8"):
        handle.merge("a")
    assert stored(model) == before
    assert bits(logits(model, tokens(), adapter_names=ROWS)) == bits(served)


def test_an_attached_packed_model_compiles():
    _, both = adapters("llama")
    model = packed("llama")
    le.attach(model, both)
    compiled = torch.compile(model, backend="aot_eager")
    for names in (["a", "__base__", "b"], ["b", "a", "a"]):
        want = logits(model, tokens(), adapter_names=names)
        got = logits(compiled, tokens(), adapter_names=names)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_what_bitsandbytes_would_compute_is_what_is_served():
    """At sizes where bitsandbytes' own CPU code is right."""
    model = bitsandbytes.nn.Linear4bit(128, 64, quant_type="nf4", compute_dtype=torch.float32)
    model = nn.Sequential(model.to("cpu")).eval()
    x = torch.randn(4, 128)
    with torch.no_grad():
        want = model(x)
    peft = with_peft(nn.Sequential(nn.Linear(128, 64)), {"a": {"target_modules": ["0"]}})
    weights = adapter_of(peft, "a").modules["0"]
    le.attach(model, {"a": adapter_of(peft, "a")})
    with torch.no_grad():
        got = model(x, adapter_names=["__base__", "a", "a", "__base__"])
    delta = weights.scaling * x @ torch.from_numpy(weights.B @ weights.A).T
    delta[[0, 3]] = 0
    torch.testing.assert_close(got, want + delta, rtol=1e-5, atol=1e-5)


def test_a_layer_that_cannot_be_taken_leaves_the_model_as_it_was():
    peft = with_peft(nn.Sequential(nn.Linear(64, 32)), {"a": {"target_modules": ["0"]}})
    adapter = adapter_of(peft, "a")
    fp4 = bitsandbytes.nn.Linear4bit(64, 32, quant_type="fp4").to("cpu")
    new = bitsandbytes.nn.Linear4bit(64, 32, quant_type="nf4")
    for layer, error, message in (
        (fp4, le.FormatError, "attach: 0: .*fp4 is not supported"),
        (new, ValueError, "attach: 0: .*not quantised yet"),
    ):
        model = nn.Sequential(layer)
        with pytest.raises(error, match=message):
            le.attach(model, {"a": adapter})
        assert is_linear4bit(model[0])
        assert type(model) is nn.Sequential
        assert not hasattr(model[0], "_lora")


def test_an_attached_model_is_neither_quantised_nor_loaded_into(tmp_path):
    peft = with_peft(nn.Sequential(nn.Linear(64, 32)), {"a": {"target_modules": ["0"]}})
    model = nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 64))
    handle = le.attach(model, {"a": adapter_of(peft, "a")})
    with pytest.raises(ValueError, match="quantize: model: expected a model without adapters"):
        le.quantize(model)
    with pytest.raises(ValueError, match="load_quantized: model: expected a model without"):
        le.load_quantized(model, tmp_path)
    handle.detach()
    le.quantize(model)
