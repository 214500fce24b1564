"""4-bit models that bitsandbytes and transformers made, in this engine's layers."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from helpers import bits
from helpers_files import quietly
from helpers_models import TINY, output, tiny, tokens, transformers
from helpers_nf4 import bitsandbytes, flat_bytes, same
from safetensors.torch import load_file, save_file
from torch import nn

import lora_engine as le
from lora_engine.quant.bitsandbytes_layer import from_linear4bit

pytestmark = pytest.mark.usefixtures("one_torch_thread")

WEIGHTS = "model.safetensors"
PATH = {
    "llama": "model.layers.0.mlp.up_proj",
    "gpt2": "transformer.h.0.attn.c_attn",
    "bert": "encoder.layer.0.output.dense",
}


def checkpoint(kind, folder, double_quant=True, **options):
    """What transformers saves of a model that it packed with bitsandbytes, and that model."""
    model = tiny(kind)
    quietly(model.save_pretrained, folder / "float")
    config = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=double_quant,
        **options,
    )  # fmt: skip
    packed = type(model).from_pretrained(folder / "float", quantization_config=config).eval()
    quietly(packed.save_pretrained, folder / "packed")
    return packed, folder / "packed"


def parts_of(model):
    """The state dict as a file holds it: a tied weight once."""
    found = model.state_dict()
    tied = getattr(model, "all_tied_weights_keys", {})
    return {name: found[name] for name in sorted(found) if name not in tied}


def read(folder):
    return dict(sorted(load_file(folder / WEIGHTS).items()))


@pytest.mark.parametrize("kind", TINY)
@pytest.mark.parametrize("double_quant", [False, True], ids=["plain", "double"])
def test_a_checkpoint_of_bitsandbytes_loads_and_answers_as_it_does(kind, double_quant, tmp_path):
    theirs, folder = checkpoint(kind, tmp_path, double_quant)
    ids = tokens()
    want = output(theirs, ids).detach()
    ours = tiny(kind, seed=5)
    layers = le.load_quantized(ours, folder)
    assert {p for p, m in theirs.named_modules() if type(m).__name__ == "Linear4bit"} == set(layers)
    assert all(type(ours.get_submodule(p)) is le.NF4Linear for p in layers)
    got = output(ours, ids).detach()
    assert (got - want).abs().max() < 1e-5 * want.abs().max()
    assert same(parts_of(ours), read(folder))  # using it changed no byte

    # Loaded by transformers, converted: the same bytes, borrowed.
    loaded = type(theirs).from_pretrained(folder).eval()
    weights = {p: loaded.get_submodule(p).weight.data_ptr() for p in layers}
    report = le.quantize(loaded)
    assert set(report.layers) == set(layers)
    assert {p: loaded.get_submodule(p).weight.data_ptr() for p in layers} == weights
    assert bits(output(loaded, ids)) == bits(got)
    assert report.bytes_before == pytest.approx(report.bytes_after, rel=0.02)

    # And saved from here, by transformers: the same file, which it loads again.
    quietly(loaded.save_pretrained, tmp_path / "again")
    assert same(read(tmp_path / "again"), read(folder))
    again = type(theirs).from_pretrained(tmp_path / "again").eval()
    assert bits(output(again, ids)) == bits(want)


@pytest.mark.parametrize("kind", TINY)
def test_what_quantize_saves_is_what_bitsandbytes_packs(kind, tmp_path):
    _, folder = checkpoint(kind, tmp_path, double_quant=False)
    model = tiny(kind)
    le.quantize(model)
    quietly(model.save_pretrained, tmp_path / "ours")
    assert same(read(tmp_path / "ours"), read(folder))
    said = json.loads((tmp_path / "ours" / "config.json").read_text())["quantization_config"]
    theirs = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert said == {key: theirs[key] for key in said} | {
        "llm_int8_skip_modules": [] if kind == "bert" else ["lm_head"]
    }


@pytest.mark.parametrize("kind", TINY)
def test_a_model_on_meta_takes_no_memory_for_floats(kind, tmp_path):
    import accelerate

    _, folder = checkpoint(kind, tmp_path)
    want = tiny(kind)
    le.load_quantized(want, folder)
    with accelerate.init_empty_weights():
        model = type(want)(want.config)
    le.load_quantized(model.eval(), folder)
    assert bits(output(model, tokens())) == bits(output(want, tokens()))
    assert all(p.dtype == torch.uint8 for n, p in model.named_parameters() if "proj.weight" in n)


def test_a_checkpoint_in_several_files(tmp_path):
    theirs, folder = checkpoint("llama", tmp_path)
    quietly(theirs.save_pretrained, tmp_path / "parts", max_shard_size="20KB")
    assert len(list((tmp_path / "parts").glob("model-*.safetensors"))) > 2
    whole, parts = tiny("llama", seed=1), tiny("llama", seed=2)
    le.load_quantized(whole, folder)
    le.load_quantized(parts, tmp_path / "parts")
    assert same(parts_of(parts), parts_of(whole))

    index = tmp_path / "parts" / "model.safetensors.index.json"
    said = json.loads(index.read_text())
    shutil.copytree(tmp_path / "parts", tmp_path / "copied")
    for place, message in [
        ("../float/model.safetensors", "a file beside it"),
        (3, "a file beside"),
    ]:
        name = next(iter(said["weight_map"]))
        index.write_text(json.dumps({"weight_map": {**said["weight_map"], name: place}}))
        with pytest.raises(le.FormatError, match=message):
            le.load_quantized(parts, tmp_path / "parts")
    index.write_text(json.dumps({"weight_map": [1]}))
    with pytest.raises(le.FormatError, match="weight_map: expected"):
        le.load_quantized(parts, tmp_path / "parts")
    assert same(parts_of(parts), parts_of(whole))


def test_the_model_keeps_its_dtype_and_its_ties(tmp_path):
    _, folder = checkpoint("gpt2", tmp_path)
    model = tiny("gpt2", "bfloat16", seed=3)
    le.load_quantized(model, folder, compute="float32")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16, torch.uint8}
    assert model.lm_head.weight is model.transformer.wte.weight
    layer = model.get_submodule(PATH["gpt2"])
    assert layer.compute == "float32"
    x = torch.randn(2, 64).bfloat16()
    want = le.nf4_linear(x, layer.nf4, layer.bias.detach(), compute="float32")
    assert bits(layer(x)) == bits(want)


def test_layers_already_packed_are_replaced(tmp_path):
    _, folder = checkpoint("bert", tmp_path)
    model, want = tiny("bert", seed=4), tiny("bert")
    le.quantize(model)
    le.load_quantized(model, folder)
    le.load_quantized(want, folder)
    assert same(parts_of(model), parts_of(want))


# ---- what is refused ----


def edits():
    """What is done to a checkpoint's tensors, and what is then said."""
    up = PATH["llama"] + ".weight"

    def nan(t):
        t[up + ".absmax"][0] = float("nan")

    def fp4(t):
        t[up + ".quant_state.bitsandbytes__fp4"] = t.pop(up + ".quant_state.bitsandbytes__nf4")

    return {
        "lacks a layer": (lambda t: [t.pop(k) for k in list(t) if k.startswith(up)], rf"{up}: mis"),
        "lacks a norm": (lambda t: t.pop("model.norm.weight"), r"model\.norm\.weight: missing"),
        "lacks scales": (lambda t: t.pop(up + ".absmax"), r"weight\.absmax: missing"),
        "too much": (lambda t: t.update(more=torch.ones(2)), "more: the model has no such tensor"),
        "other shape": (
            lambda t: t.update({"model.norm.weight": torch.ones(63)}),
            r"model\.norm\.weight: expected \[64\], got F32 \[63\]",
        ),
        "other dtype": (
            lambda t: t.update({"model.norm.weight": torch.ones(64, dtype=torch.int64)}),
            r"model\.norm\.weight: expected one of .* got I64",
        ),
        "nan": (nan, r"up_proj: .*absmax: expected finite numbers"),
        "fp4": (fp4, "fp4 is not supported"),
    }


@pytest.mark.parametrize("which", list(edits()))
def test_a_checkpoint_of_another_model_changes_nothing(which, tmp_path):
    edit, message = edits()[which]
    _, folder = checkpoint("llama", tmp_path, double_quant=False)
    tensors = load_file(folder / WEIGHTS)
    edit(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    model = tiny("llama", seed=6)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modules = list(model.modules())
    with pytest.raises(le.FormatError, match=message):
        le.load_quantized(model, folder)
    assert same(model.state_dict(), before)
    assert all(a is b for a, b in zip(model.modules(), modules, strict=True))


def test_another_layer_another_shape_and_no_safetensors(tmp_path):
    _, folder = checkpoint("llama", tmp_path)
    config = tiny("llama").config
    config.intermediate_size = 256
    wider = transformers.LlamaForCausalLM(config)
    with pytest.raises(le.FormatError, match=r"down_proj\.weight: expected \[64, 256\], got \["):
        le.load_quantized(wider, folder)
    model = tiny("llama")
    model.model.layers[0].mlp.up_proj = nn.Bilinear(3, 3, 3, bias=False)
    with pytest.raises(le.FormatError, match="has a Bilinear there, no linear layer"):
        le.load_quantized(model, folder)
    (tmp_path / "pickled").mkdir()
    (tmp_path / "pickled" / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(le.FormatError, match=r"expected model\.safetensors or .* got neither"):
        le.load_quantized(tiny("llama"), tmp_path / "pickled")
    with pytest.raises(TypeError, match="model: expected a torch module"):
        le.load_quantized(3, folder)
    with pytest.raises(ValueError, match="compute: expected"):
        le.load_quantized(tiny("llama"), folder, compute="int8")


# ---- bitsandbytes' own layers ----


def linear4bit(quant_type="nf4", compute=None, storage=torch.uint8, out=32, features=64):
    torch.manual_seed(0)
    made = bitsandbytes.nn.Linear4bit(
        features, out, compute_dtype=compute, quant_type=quant_type, quant_storage=storage
    )
    return made.to("cpu").eval()


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("compute", [None, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_layer_of_bitsandbytes_is_borrowed_and_never_written(compute, storage):
    layer = linear4bit(compute=compute, storage=storage)
    before = {k: v.clone() for k, v in layer.state_dict().items()}
    made = from_linear4bit(layer)
    assert made.weight.data_ptr() == layer.weight.data_ptr()
    assert made.bias is layer.bias
    says = {torch.float16: "float32", None: None}
    assert made.compute == says.get(compute, str(compute).removeprefix("torch."))
    x = torch.randn(5, 64)
    dense = torch.from_numpy(made.nf4.to_float())
    want = torch.nn.functional.linear(x, dense, layer.bias)
    assert (made(x) - want).abs().max() < (3e-2 if made.compute == "bfloat16" else 1e-5)
    x.requires_grad_()
    made(x).sum().backward()
    np.testing.assert_allclose(x.grad[0], dense.sum(0), rtol=1e-2, atol=1e-2)
    after, ours = layer.state_dict(), made.state_dict()
    for name in {*before, *ours}:
        was = flat_bytes(before[name].detach()).tobytes()
        assert flat_bytes(after[name].detach()).tobytes() == was
        assert flat_bytes(ours[name].detach()).tobytes() == was


def test_layers_of_bitsandbytes_that_cannot_be_taken():
    with pytest.raises(le.FormatError, match=r"here: .*fp4 is not supported"):
        from_linear4bit(linear4bit("fp4"), "here")
    made = bitsandbytes.nn.Linear4bit(64, 32, quant_type="nf4")
    with pytest.raises(ValueError, match="not quantised yet"):
        from_linear4bit(made)
    run = linear4bit()
    data, state = bitsandbytes.functional._convert_weight_packed_for_cpu(
        run.weight.data, run.weight.quant_state
    )
    run.weight.data, run.weight.quant_state = data, state
    with pytest.raises(ValueError, match=r"packs it anew .* load the model again"):
        from_linear4bit(run)
