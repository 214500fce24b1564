"""Attached adapters with modules_to_save, against PEFT."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers_attach import logits, new_model, tokens, with_peft
from helpers_files import quietly

import lora_engine as le
from lora_engine.adapters.adapter import Adapter

CASES = {
    "classifier": ("bert", ["classifier"]),
    "norms": ("bert", ["LayerNorm", "classifier"]),
    "embedding": ("llama", ["embed_tokens", "lm_head"]),
    "conv1d": ("gpt2", ["c_proj"]),
}
TARGETS = {"bert": ["query", "value"], "llama": ["q_proj"], "gpt2": ["c_attn"]}


def made(kind, saved, folder, dtype=torch.float32):
    """(model, attached to PEFT's folders "a", with modules_to_save, and "b", without; its handle;
    the untouched model; PEFT's of both)."""
    base = new_model(kind, dtype)
    options = {"target_modules": TARGETS[kind], "fan_in_fan_out": kind == "gpt2"}
    peft = with_peft(base, {"a": {**options, "modules_to_save": saved}, "b": options})
    with torch.no_grad():
        for name, parameter in peft.named_parameters():
            if ".modules_to_save.a." in name:
                parameter.add_(torch.randn_like(parameter) / 8)
    quietly(peft.save_pretrained, folder)
    model = copy.deepcopy(base)
    handle = le.attach(model, {name: folder / name for name in ("a", "b")})
    return model, handle, base, peft


@pytest.fixture(scope="module", params=CASES)
def served(request, tmp_path_factory):
    return made(*CASES[request.param], tmp_path_factory.mktemp("folders"))


def shown(model, base):
    """How far a model is from the base, of set_adapter's choice."""
    return (logits(model, tokens()) - logits(base, tokens())).abs().max()


def test_set_adapter_serves_the_saved_modules_as_peft_does(served):
    model, handle, base, peft = served
    for name in ("a", "b"):
        handle.set_adapter(name)
        peft.set_adapter(name)
        want = logits(peft, tokens())
        torch.testing.assert_close(logits(model, tokens()), want, rtol=1e-4, atol=1e-5)
        assert shown(model, base) > 1e-2
    handle.set_adapter(None)
    assert torch.equal(logits(model, tokens()), logits(base, tokens()))
    handle.set_adapter("a")


def test_rows_of_a_batch_have_their_own_saved_modules(served):
    """Each row as PEFT has it alone; __base__ to the bit."""
    model, _, base, peft = served
    inputs = tokens()
    alone = {}
    for name in ("a", "b"):
        peft.set_adapter(name)
        alone[name] = logits(peft, inputs)
    for names in (["a", "__base__", "b"], ["b", "a", "a"], ["a", "a", "a"]):
        got = logits(model, inputs, adapter_names=names)
        for i, name in enumerate(names):
            if name == "__base__":
                assert torch.equal(got[i], logits(base, inputs)[i])
            else:
                torch.testing.assert_close(got[i], alone[name][i], rtol=1e-4, atol=1e-5)


def test_in_one_graph(tmp_path):
    model, _, _, _ = made("bert", ["classifier", "LayerNorm"], tmp_path)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    names = ["a", "__base__", "b"]
    want = logits(model, tokens(), adapter_names=names)
    assert torch.equal(logits(compiled, tokens(), adapter_names=names), want)


def test_merge_unmerge_and_save(served, tmp_path):
    model, handle, _, _ = served
    before = {key: value.clone() for key, value in model.state_dict().items()}
    want = logits(model, tokens())
    handle.merge("a")
    torch.testing.assert_close(logits(model, tokens()), want, rtol=1e-3, atol=1e-4)
    for key, values in handle.adapter("a").modules_to_save.items():
        assert torch.equal(model.state_dict()[key], torch.from_numpy(values))
    handle.merge("b")
    handle.unmerge("a")
    handle.unmerge("b")
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    handle.save("a", tmp_path / "a")
    again = le.Adapter.load(tmp_path / "a")
    assert again.modules_to_save.keys() == handle.adapter("a").modules_to_save.keys()
    handle.add("a", tmp_path / "a")
    assert torch.equal(logits(model, tokens()), want)


def test_a_mixture_adds_the_weighted_differences(tmp_path):
    model, handle, base, _ = made("bert", ["classifier"], tmp_path)
    handle.add("c", _scaled_head(handle.adapter("a"), 3.0))
    hidden = {}
    model.classifier.register_forward_hook(lambda m, x, y: hidden.update(x=x[0], y=y))
    for mixture in ({"a": 0.7, "c": -0.3}, {"a": 1.0, "c": 1.0, "b": 2.0}):
        logits(model, tokens(), adapter_names=["__base__", mixture, "b"])
        want = F.linear(hidden["x"], base.classifier.weight, base.classifier.bias)
        for name, weight in mixture.items():
            saved = {
                k: torch.from_numpy(v) for k, v in handle.adapter(name).modules_to_save.items()
            }
            if saved:
                head = (saved["classifier.weight"], saved["classifier.bias"])
                own = F.linear(hidden["x"][1], base.classifier.weight, base.classifier.bias)
                want[1] += weight * (F.linear(hidden["x"][1], *head) - own)
        torch.testing.assert_close(hidden["y"], want, rtol=1e-5, atol=1e-5)
        handle.set_adapter(mixture)
        uniform = logits(model, tokens())
        rows = logits(model, tokens(), adapter_names=[mixture] * 3)
        torch.testing.assert_close(uniform, rows, rtol=1e-4, atol=1e-5)
    handle.detach()
    assert torch.equal(logits(model, tokens()), logits(base, tokens()))
    assert type(model.classifier) is torch.nn.Linear


def _scaled_head(adapter: Adapter, by: float) -> Adapter:
    saved = {k: (v * by).astype("f4") for k, v in adapter.modules_to_save.items()}
    return replace(adapter, modules_to_save=saved)


@pytest.mark.parametrize("names", [None, ["a", "__base__", "a"]], ids=["set", "names"])
def test_training_gives_pefts_losses_and_weights(tmp_path, names):
    model, handle, _, peft = made("bert", ["classifier"], tmp_path)
    peft.set_adapter("a")
    call = {} if names is None else {"adapter_names": names}
    losses = []
    mine = handle.parameters("a")
    assert sum(p.numel() for p in mine) == sum(
        p.numel() for p in peft.parameters() if p.requires_grad
    )
    for one, parameters in (
        (model, mine),
        (peft, [p for p in peft.parameters() if p.requires_grad]),
    ):
        step, found = torch.optim.AdamW(parameters, lr=0.02), []
        if names is not None:
            one.eval()  # as PEFT wants it
        for i in range(4):
            step.zero_grad()
            loss = one(**tokens(seed=i), labels=torch.tensor([0, 1, 1]), **call).loss
            loss.backward()
            step.step()
            found.append(loss.item())
        losses.append(found)
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-4)
    assert abs(losses[0][3] - losses[0][0]) > 1e-2
    want = peft.base_model.model.classifier.modules_to_save["a"]
    got = handle.adapter("a").modules_to_save
    np.testing.assert_allclose(got["classifier.weight"], want.weight.detach(), rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(got["classifier.bias"], want.bias.detach(), rtol=1e-3, atol=1e-4)
    assert not any("modules_to_save" in key for key in model.state_dict())


def test_a_16_bit_model_serves_it_rounded_and_writes_the_bits_back(tmp_path):
    model, handle, base, _ = made("bert", ["classifier"], tmp_path)
    handle.detach()
    model = model.to(torch.bfloat16)
    handle = le.attach(model, {"a": tmp_path / "a"})
    x = torch.randn(3, base.classifier.in_features, dtype=torch.bfloat16)
    saved = le.Adapter.load(tmp_path / "a").modules_to_save
    head = [torch.from_numpy(saved[f"classifier.{n}"]).bfloat16() for n in ("weight", "bias")]
    got = model.classifier(x)
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, F.linear(x, *head))
    for key, values in handle.adapter("a").modules_to_save.items():
        assert np.array_equal(values, saved[key])


def test_what_peft_writes_of_an_adapted_embedding_must_be_the_bases(tmp_path):
    base = new_model("llama")
    peft = with_peft(base, {"a": {"target_modules": ["embed_tokens"]}})
    quietly(peft.save_pretrained, tmp_path, save_embedding_layers=True)
    assert "model.embed_tokens.weight" in le.Adapter.load(tmp_path / "a").modules_to_save
    model = copy.deepcopy(base)
    handle = le.attach(model, {"a": tmp_path / "a"})
    want = logits(peft, tokens())
    torch.testing.assert_close(logits(model, tokens()), want, rtol=1e-4, atol=1e-5)
    assert "model.embed_tokens.weight" in handle.adapter("a").modules_to_save
    handle.detach()
    with torch.no_grad():
        model.model.embed_tokens.weight[0] += 1
    with pytest.raises(ValueError, match=r"embed_tokens\.weight: .*the layer's own weights"):
        le.attach(model, {"a": tmp_path / "a"})


REFUSED = {
    "shape": ({"classifier.weight": np.ones((3, 16), "f4")}, r"\[2, 16\], got \[3, 16\]"),
    "parameter": ({"classifier.steps": np.ones(2, "f4")}, r"classifier\.steps: .*got Linear"),
    "kind": ({"bert.encoder.weight": np.ones(2, "f4")}, r"encoder\.weight: .*got BertEncoder"),
    "module": ({"score.weight": np.ones((2, 16), "f4")}, r"one of score, which it has not"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_before_anything_is_changed(tmp_path, case):
    model, handle, _, _ = made("bert", ["classifier"], tmp_path)
    adapter, (saved, match) = handle.adapter("a"), REFUSED[case]
    before = logits(model, tokens())
    with pytest.raises((ValueError, TypeError), match=match):
        handle.add("a", replace(adapter, modules_to_save=saved))
    assert torch.equal(logits(model, tokens()), before)
