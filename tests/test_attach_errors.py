"""What le.attach refuses, and that nothing has changed then."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch
from helpers_attach import Flat, logits, new_model, tokens

import lora_engine as le
from lora_engine.adapters.adapter import Adapter, LoraWeights

GOOD = "model.layers.0.self_attn.q_proj"


def weights(d_in: int = 16, out: int = 16, rank: int = 2) -> LoraWeights:
    return LoraWeights(np.ones((rank, d_in), "f4"), np.ones((out, rank), "f4"), 1.0)


@pytest.fixture(scope="module")
def model():
    return new_model("llama")


def untouched(model):
    classes = {type(m) for m in model.modules()}
    return not hasattr(model, "_lora_model") and all(
        "attached" not in str(c.__mro__) for c in classes
    )


REFUSED = {
    "no module of these": (
        {"encoder.query": weights()},
        ValueError,
        r"model\.layers\.0.*encoder\.query",
    ),
    "one of them missing": (
        {GOOD: weights(), "x.k_proj": weights()},
        ValueError,
        "x.k_proj, which it",
    ),
    "in features": ({GOOD: weights(d_in=15)}, ValueError, r"expected A \[r, 16\].*A \[2, 15\]"),
    "out features": ({GOOD: weights(out=17)}, ValueError, r"B \[16, r\].*B \[17, 2\]"),
    "ranks": (
        {GOOD: LoraWeights(np.ones((2, 16), "f4"), np.ones((16, 3), "f4"), 1.0)},
        ValueError,
        r"A \[2, 16\] and B \[16, 3\]",
    ),
    "kind of layer": (
        {"model.norm": weights()},
        TypeError,
        "expected a layer of .*Linear, got LlamaRMS",
    ),
    "an embedding": ({"model.embed_tokens": weights()}, TypeError, "got Embedding"),
    "empty": ({}, ValueError, "empty"),
    "NaN": (
        {GOOD: weights()._replace(A=np.full((2, 16), np.nan, "f4"))},
        ValueError,
        "(bad|good): .*q_proj: expected finite numbers, got NaN",
    ),
    "an infinite scaling": (
        {GOOD: weights()._replace(scaling=float("inf"))},
        ValueError,
        "q_proj: expected finite numbers",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_an_adapter_that_does_not_fit(model, case):
    modules, error, words = REFUSED[case]
    with pytest.raises(error, match=words):
        le.attach(model, {"good": Adapter({GOOD: weights()}), "bad": Adapter(modules)})
    assert untouched(model)
    handle = le.attach(model, {"good": Adapter({GOOD: weights()})})
    want = logits(model, tokens())
    with pytest.raises(error, match=words):
        handle.add("good", Adapter(modules))
    assert handle.names == ("good",)
    assert torch.equal(logits(model, tokens()), want)
    handle.detach()
    assert untouched(model)


def test_what_is_no_adapter_model_or_name(model):
    good = Adapter({GOOD: weights()})
    for arguments, error, words in (
        (({}, {"a": good}), TypeError, "a torch module, got dict"),
        ((model, [good]), TypeError, "got list"),
        ((model, {}), ValueError, "at least one, got none"),
        ((model, {"a": 3}), TypeError, "a: expected an adapter folder, .* got int"),
        ((model, {"__base__": good}), ValueError, "names other than __base__"),
        ((model, {"": good}), ValueError, "names other than"),
        ((model, {"a": le.MicroLoRA(le.MicroLoRAConfig(16, 16))}), ValueError, "a: .*v_proj"),
    ):
        with pytest.raises(error, match=words):
            le.attach(*arguments)
        assert untouched(model)


def test_a_model_of_float64():
    model = torch.nn.Linear(16, 16).double()
    with pytest.raises(TypeError, match=r"bfloat16 or float16, got torch\.float64"):
        le.attach(model, {"a": Adapter({"proj": weights()})})
    assert untouched(model)


def test_attached_twice(model):
    """The whole, a part of what is attached, and what has an attached part."""
    inside = {"a": Adapter({GOOD.removeprefix("model."): weights()})}
    for first, then in (
        ((model, {"a": Adapter({GOOD: weights()})}), (model, {"b": Adapter({GOOD: weights()})})),
        ((model, {"a": Adapter({GOOD: weights()})}), (model.model, inside)),
        ((model, {"a": Adapter({"lm_head": weights(16, 48)})}), (model.model, inside)),
        ((model.model, inside), (model, {"b": Adapter({"lm_head": weights(16, 48)})})),
    ):
        handle = le.attach(*first)
        held = [vars(module).copy() for module in model.modules()]
        with pytest.raises(
            ValueError, match=r"nothing is attached to.*got (an attached|layers\.|m)"
        ):
            le.attach(*then)
        assert [vars(module) for module in model.modules()] == held
        handle.detach()
        assert untouched(model)


@pytest.mark.parametrize("refused", ["1", "2", ""])
def test_whatever_raises_leaves_the_model_as_it_was(refused):
    """Here a module whose class cannot be exchanged: a layer, or the whole."""

    class Fixed:
        def __setattr__(self, name, value):
            if name == "__class__":
                raise OSError("fixed")
            super().__setattr__(name, value)

    class FixedLinear(Fixed, torch.nn.Linear):
        pass

    class FixedSequential(Fixed, torch.nn.Sequential):
        pass

    whole = torch.nn.Sequential if refused else FixedSequential
    layers = (FixedLinear if refused == str(i) else torch.nn.Linear for i in range(3))
    model = whole(*(layer(4, 4) for layer in layers))
    held = [(type(module), vars(module).copy()) for module in model.modules()]
    adapter = Adapter({str(i): weights(4, 4) for i in range(3)})
    with pytest.raises(OSError, match="fixed"):
        le.attach(model, {"a": adapter})
    assert [(type(module), vars(module)) for module in model.modules()] == held
    if refused:
        handle = le.attach(model, {"a": Adapter({"0": weights(4, 4)})})
        held = [(type(module), vars(module).copy()) for module in model.modules()]
        with pytest.raises(OSError, match="fixed"):
            handle.add("b", adapter)
        assert [(type(module), vars(module)) for module in model.modules()] == held
        assert handle.names == ("a",)


def test_names_are_checked_before_anything_ran(model):
    handle = le.attach(model, {"a": Adapter({GOOD: weights()})})
    ran = []
    hook = model.model.embed_tokens.register_forward_hook(lambda *_: ran.append(1))
    for names, error, words in (
        (["a"], ValueError, "each of the 3 rows, got 1"),
        (["a"] * 4, ValueError, "each of the 3 rows, got 4"),
        (["a", "nobody", "a"], ValueError, r"attached adapters \(a\) or __base__, got 'nobody'"),
        ("a", TypeError, "a list.*got 'a'"),
        ({"a": 1.0}, TypeError, "a list"),
        (["a", 3, "a"], TypeError, "a name or .* got 3"),
        ([{}, "a", "a"], ValueError, "at least one adapter in a mixture"),
        ([{"a": "x"}, "a", "a"], TypeError, "a number as its weight"),
        ([{"a": True}, "a", "a"], TypeError, "a number as its weight, got True"),
        ([{"a": float("nan")}, "a", "a"], ValueError, "finite"),
        ([{"a": 1.0, "b": 1.0}, "a", "a"], ValueError, "got 'b'"),
    ):
        for call in (model, model.generate):
            with pytest.raises(error, match=words):
                call(**tokens(), adapter_names=names)
    for name, error in (("nobody", ValueError), (3, TypeError), ({}, ValueError)):
        with pytest.raises(error):
            handle.set_adapter(name)
    for name in ("nobody", None):
        with pytest.raises(ValueError, match="name: expected an attached adapter"):
            handle.remove(name)
    assert not ran
    hook.remove()
    handle.detach()


def test_a_layer_that_sees_another_number_of_elements_says_so():
    model = Flat()
    le.attach(model, {"a": Adapter({"proj": weights(4, 4)})})
    with pytest.raises(ValueError, match="each of the 6 elements that come to proj, got 2"):
        model(torch.ones(2, 3, 4), adapter_names=["a", "a"])
    assert model(torch.ones(2, 3, 4)).shape == (6, 4)


def test_names_are_given_to_the_attached_model_not_to_a_part(model):
    """Whose **kwargs would swallow them."""
    handle = le.attach(model, {"a": Adapter({GOOD: weights()})})
    with pytest.raises(TypeError, match="adapter_names: expected in a call of the attached model"):
        model.model(**tokens(), adapter_names=["a"] * 3)
    handle.detach()


@pytest.mark.parametrize(
    "make", [torch.nn.TransformerEncoderLayer, torch.nn.TransformerDecoderLayer]
)
def test_names_of_layers_whose_dimension_0_is_not_the_batch(make):
    refused, taken = (make(8, 2, 16, dropout=0.0, batch_first=first) for first in (False, True))
    x = torch.randn(3, 3, 8)
    inputs = (x,) if make is torch.nn.TransformerEncoderLayer else (x, x)
    adapter = Adapter({"linear1": weights(8, 16)})
    le.attach(taken, {"a": adapter})
    taken(*inputs, adapter_names=["a"] * 3)
    plain = refused(*inputs)
    handle = le.attach(refused, {"a": adapter})
    with pytest.raises(ValueError, match=r"got linear1, of a module with batch_first=False"):
        refused(*inputs, adapter_names=["a"] * 3)
    assert not torch.equal(refused(*inputs), plain)
    handle.set_adapter(None)
    assert torch.equal(refused(*inputs), plain)


def test_a_projection_inside_multi_head_attention():
    model = torch.nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    with pytest.raises(ValueError, match=r"nn\.MultiheadAttention"):
        le.attach(model, {"a": Adapter({"self_attn.out_proj": weights(8, 8)})})


@pytest.mark.parametrize("make", [copy.deepcopy, pickle.dumps])
def test_an_attached_model_is_not_copied(make):
    model = torch.nn.Sequential(torch.nn.Linear(4, 4))
    handle = le.attach(model, {"a": Adapter({"0": weights(4, 4)})})
    for thing in (handle, model):
        with pytest.raises((TypeError, pickle.PicklingError), match=r"attach|not the same object"):
            make(thing)
    handle.detach()
    make(model)
