"""merge and unmerge, saving, and a handle's adapter as an Adapter."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from helpers_attach import adapter_of, logits, new_model, tokens, two_adapters, with_peft
from peft import PeftModel

import lora_engine as le
from lora_engine.adapters.adapter import Adapter, LoraWeights

KINDS = ("llama", "gpt2", "bert")


def attached(kind, dtype=torch.float32, **options):
    base = new_model(kind, dtype)
    configs = {name: {**c, **options} for name, c in two_adapters(kind).items()}
    peft = with_peft(base, configs)
    model = copy.deepcopy(base)
    return model, le.attach(model, {n: adapter_of(peft, n) for n in ("a", "b")}), base, peft


def bits(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


def same(one, two):
    return one.keys() == two.keys() and all(torch.equal(v, two[k]) for k, v in one.items())


@pytest.mark.parametrize("kind", KINDS)
def test_merge_is_pefts_and_unmerge_gives_the_bits_back(kind):
    model, handle, base, peft = attached(kind)
    before = bits(model)
    served = logits(model, tokens())
    handle.merge("a")
    got = logits(model, tokens())
    torch.testing.assert_close(got, served, rtol=1e-3, atol=1e-4)
    peft.merge_adapter(["a"])
    for path, module in peft.base_model.model.named_modules():
        if hasattr(module, "base_layer"):
            torch.testing.assert_close(model.get_submodule(path).weight, module.base_layer.weight)
    one = bits(model)
    handle.merge("b")
    both = bits(model)
    handle.unmerge("a")
    handle.merge("a")
    assert not same(both, one)
    assert both.keys() == before.keys()
    handle.unmerge("b")
    assert same(bits(model), one)
    handle.unmerge("a")
    assert same(bits(model), before)
    assert torch.equal(logits(model, tokens()), served)
    handle.merge("b")
    handle.detach()
    assert same(bits(model), before)
    assert torch.equal(logits(model, tokens()), logits(base, tokens()))


def test_merge_of_biases_and_embeddings():
    options = {"lora_bias": True, "target_modules": ["query"]}
    model, handle, base, _ = attached("bert", **options)
    rng = np.random.default_rng(0)
    norm = "bert.encoder.layer.0.output.LayerNorm"
    words = "bert.embeddings.word_embeddings"
    rest = Adapter(
        {},
        {
            words: LoraWeights(
                rng.standard_normal((2, 48), "f4"), rng.standard_normal((16, 2), "f4"), 0.5
            )
        },
        {norm: rng.standard_normal(16, "f4")},
    )
    handle.add("rest", rest)
    before = bits(model)
    for name in ("a", "rest"):
        served = logits(model, tokens(), adapter_names=[name] * 3)
        assert (served - logits(base, tokens())).abs().max() > 1e-2
        handle.merge(name)
        torch.testing.assert_close(logits(model, tokens()), served, rtol=1e-3, atol=1e-4)
        handle.unmerge(name)
        assert same(bits(model), before)
    names = ["rest", "__base__", "a"]
    got = logits(model, tokens(), adapter_names=names)
    assert torch.equal(got[1], logits(base, tokens())[1])
    for i, name in enumerate(names):
        want = logits(model, tokens(), adapter_names=[name] * 3)[i]
        torch.testing.assert_close(got[i], want, rtol=1e-4, atol=1e-5)


def test_merge_of_16_bits_rounds_once():
    model, handle, base, _ = attached("llama", torch.bfloat16)
    handle.merge("a")
    path = "model.layers.0.self_attn.q_proj"
    w = handle.adapter("a").modules[path]
    W = base.get_submodule(path).weight.float() + torch.from_numpy(w.B @ w.A) * w.scaling
    assert torch.equal(model.get_submodule(path).weight, W.bfloat16())


def test_what_merging_refuses_changes_nothing():
    model = torch.nn.ModuleDict(
        {"one": torch.nn.Linear(4, 4, bias=False), "two": torch.nn.Linear(4, 4)}
    )
    model["two"].weight = model["one"].weight
    w = LoraWeights(np.ones((1, 4), "f4"), np.ones((4, 1), "f4"), 1.0)
    handle = le.attach(model["one"], {"a": Adapter({"x": w._replace(bias_delta=np.ones(4, "f4"))})})
    before = bits(model)
    with pytest.raises(TypeError, match=r"bias: expected a float32 or 16-bit parameter, got none"):
        handle.merge("a")
    assert same(bits(model), before)
    handle.detach()
    handle = le.attach(
        model, {"a": Adapter({"one": w}), "nan": Adapter({"two": w._replace(scaling=3e38)})}
    )
    with pytest.raises(ValueError, match=r"one\.weight: .* two shares"):
        handle.merge("a")
    for call, words in (
        (lambda: handle.merge("x"), r"attached adapter \(a, nan\), got 'x'"),
        (lambda: handle.unmerge("a"), r"merged adapter \(none\), got 'a'"),
    ):
        with pytest.raises(ValueError, match=words):
            call()
    assert same(bits(model), before)


def test_while_merged():
    model, handle, _, _ = attached("llama")
    handle.merge("a")
    for call in (
        lambda: model(**tokens(), adapter_names=["b"] * 3),
        lambda: handle.merge("a"),
        lambda: handle.remove("a"),
        lambda: handle.add("a", handle.adapter("a")),
    ):
        with pytest.raises(ValueError, match="expected no merged adapter, got 'a'"):
            call()
    merged = logits(model, tokens())
    handle.set_adapter("b")
    assert torch.equal(logits(model, tokens()), merged)
    handle.unmerge("a")
    want = logits(model, tokens(), adapter_names=["b"] * 3)
    torch.testing.assert_close(logits(model, tokens()), want, rtol=1e-4, atol=1e-5)


def test_a_folder_is_served_and_saved_as_peft_has_it(tmp_path):
    base = new_model("gpt2")
    peft = with_peft(base, {"a": {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}})
    peft.save_pretrained(tmp_path, selected_adapters=["a"])
    model = copy.deepcopy(base)
    handle = le.attach(model, {"mine": tmp_path / "a"})
    want = logits(peft, tokens())
    torch.testing.assert_close(logits(model, tokens()), want, rtol=1e-4, atol=1e-5)
    parameters = handle.parameters("mine")
    with torch.no_grad():
        parameters[1].mul_(-3.0)
    handle.save("mine", tmp_path / "trained")
    again = PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path / "trained"))
    got = logits(model, tokens())
    assert (got - want).abs().max() > 1e-2
    torch.testing.assert_close(logits(again.eval(), tokens()), got, rtol=1e-4, atol=1e-5)
    model.save_pretrained(tmp_path / "base")
    loaded = type(base).from_pretrained(tmp_path / "base")
    assert same(bits(loaded), bits(base))
    assert model.config.architectures == ["GPT2LMHeadModel"]


def test_parts_called_by_themselves_are_served_what_is_merged_once():
    """As generate() calls an encoder; whatever is changed of other adapters meanwhile."""
    model, handle, _, _ = attached("llama")
    part = model.model

    def hidden():
        with torch.no_grad():
            return part(**tokens()).last_hidden_state

    want = hidden()
    handle.merge("a")
    other = handle.adapter("b")
    for change in (
        lambda: handle.set_adapter("a"),
        lambda: handle.add("c", other),
        lambda: handle.remove("c"),
        lambda: handle.parameters("b"),
        lambda: handle.set_adapter({"a": 0.5, "b": 0.5}),
    ):
        change()
        torch.testing.assert_close(hidden(), want, rtol=1e-3, atol=1e-4)
    handle.set_adapter("a")
    handle.unmerge("a")
    assert torch.equal(hidden(), want)


def test_a_micro_lora_keeps_what_its_folder_says(tmp_path):
    model = new_model("llama")
    said = {"task_type": "CAUSAL_LM", "base_model_name_or_path": "some/model", "unknown": 7}
    kept = {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], **said}
    w = LoraWeights(np.ones((2, 16), "f4"), np.ones((16, 2), "f4"), 2.0)
    Adapter({"q_proj": w}, peft_config=kept).save(tmp_path / "loaded")
    handle = le.attach(model, {"a": le.MicroLoRA.load(tmp_path / "loaded")})
    handle.save("a", tmp_path / "saved")
    found = Adapter.load(tmp_path / "saved")
    assert {key: found.peft_config[key] for key in said} == said
    assert found.modules.keys() == {f"model.layers.{i}.self_attn.q_proj" for i in (0, 1)}
    assert all(m.scaling == 2.0 and np.array_equal(m.A, w.A) for m in found.modules.values())
