"""le.quantize and NF4Linear: bitsandbytes' matrix and torch's layer as oracles."""

from __future__ import annotations

import copy
import weakref

import pytest
import torch
from helpers import TOLERANCE, bits
from helpers_files import quietly
from helpers_models import TINY, cosine, output, tiny, tokens
from helpers_nf4 import NAME, bitsandbytes, matrix, same, state_dict
from torch import nn

import lora_engine as le
from lora_engine.quant import model as quantizing

pytestmark = pytest.mark.usefixtures("one_torch_thread")

PREFIX = NAME.removesuffix("weight")


def layer(out=40, features=96, bias=True, dtype="float32", **options):
    made = nn.Linear(features, out, bias=bias, dtype=getattr(torch, dtype))
    with torch.no_grad():
        made.weight.copy_(matrix(out, features, dtype))
    return made, le.NF4Linear.from_linear(made, **options)


def dense(made):
    """The layer of the decoded matrix, in float64."""
    same_ = nn.Linear(made.in_features, made.out_features, made.bias is not None).double()
    with torch.no_grad():
        same_.weight.copy_(torch.from_numpy(made.nf4.to_float()))
        if made.bias is not None:
            same_.bias.copy_(made.bias)
    return same_


def close(got, want, size, dtype="float32"):
    gap = (got.detach().double() - want.detach().double()).norm()
    assert gap <= TOLERANCE[dtype] * size.detach().double().norm()


# ---- the layer ----


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "plain"])
def test_a_layer_is_the_decoded_matrix_forward_and_backward(dtype, bias):
    torch.manual_seed(0)
    _, made = layer(bias=bias, dtype=dtype)
    oracle = dense(made)
    x = torch.randn(2, 5, 96).to(getattr(torch, dtype)).requires_grad_()
    x64 = x.detach().double().requires_grad_()
    up = torch.randn(2, 5, 40).to(x.dtype)
    y, want = made(x), oracle(x64)
    assert y.dtype == x.dtype
    assert y.shape == (2, 5, 40)
    y.backward(up)
    want.backward(up.double())
    absolute = x64.detach().abs() @ oracle.weight.detach().abs().T
    close(y, want, absolute + 1, dtype)
    close(x.grad, x64.grad, up.double().abs() @ oracle.weight.detach().abs(), dtype)
    assert made.weight.grad is None
    if bias:
        close(made.bias.grad, oracle.bias.grad, up.double().abs().sum((0, 1)), dtype)


def test_compute_says_in_what_x_is_read():
    torch.manual_seed(0)
    plain, made = layer(compute="bfloat16")
    x = torch.randn(3, 96)
    assert bits(made(x)) == bits(
        le.nf4_linear(x, made.nf4, plain.bias.detach(), compute="bfloat16")
    )
    assert bits(made(x)) != bits(le.nf4_linear(x, made.nf4, plain.bias.detach()))
    with pytest.raises(ValueError, match=r"NF4Linear: compute: expected .* got 'float16'"):
        layer(compute="float16")


@pytest.mark.parametrize("double_quant", [False, True], ids=["plain", "double"])
@pytest.mark.parametrize("blocksize", [64, 128])
def test_the_state_dict_is_what_bitsandbytes_saves_and_comes_back(blocksize, double_quant):
    plain, made = layer(bias=False, blocksize=blocksize, double_quant=double_quant)
    want = state_dict(plain.weight.detach(), blocksize, double_quant)
    got = made.state_dict(prefix=PREFIX)
    assert set(got) == set(want)
    if double_quant:  # the mean's last bit may differ: test_nf4_tensor.py says how much
        alike = {k: v for k, v in want.items() if "absmax" not in k and "quant_state" not in k}
        assert same({k: got[k] for k in alike}, alike)
        assert le.NF4Tensor.from_bitsandbytes(got, NAME).double_quant
    else:
        assert same({k: got[k] for k in want}, want)

    # Into a layer of another matrix and block size; what was given may change afterwards.
    _, other = layer(bias=False, blocksize=256)
    source = {k: v.clone() for k, v in made.state_dict().items()}
    assert not other.load_state_dict(source).missing_keys
    for tensor in source.values():
        tensor.zero_()
    assert same(other.state_dict(), made.state_dict())
    x = torch.randn(3, 96)
    assert bits(other(x)) == bits(made(x))
    # assign=True borrows, as torch has it.
    source = {k: v.clone() for k, v in made.state_dict().items()}
    other.load_state_dict(source, assign=True)
    assert other.weight.data_ptr() == source["weight"].data_ptr()
    assert bits(other(x)) == bits(made(x))


def test_a_state_dict_that_does_not_fit_is_refused_and_nothing_changed():
    plain, made = layer()
    before = {k: v.clone() for k, v in made.state_dict().items()}
    with pytest.raises(RuntimeError, match=r"weight\.absmax: missing"):
        made.load_state_dict(plain.state_dict())
    with pytest.raises(RuntimeError, match=r"Missing key.*\"weight\""):
        made.load_state_dict({"bias": made.bias})
    _, wider = layer(features=97)
    with pytest.raises(
        RuntimeError, match=r"weight: expected a packed matrix \[40, 96\], got \[40"
    ):
        made.load_state_dict(wider.state_dict())
    bad = {**before, "weight.absmax": before["weight.absmax"].fill_(float("nan"))}
    with pytest.raises(RuntimeError, match=r"weight\.absmax: expected finite"):
        made.load_state_dict(bad)
    with pytest.raises(RuntimeError, match=r"Unexpected key.*weight\.more"):
        made.load_state_dict({**made.state_dict(), "weight.more": torch.zeros(1)})
    before["weight.absmax"] = made.state_dict()["weight.absmax"]
    assert same(made.state_dict(), before)


def test_a_cast_reaches_the_bias_and_never_the_codes():
    _, made = layer()
    weight, x = made.weight, torch.randn(3, 96)
    made.to(torch.bfloat16)
    assert made.bias.dtype == torch.bfloat16
    assert made.weight is weight
    assert list(made._parameters) == ["weight", "bias"]
    assert made.state_dict()["weight.absmax"].dtype == torch.float32
    assert made(x.to(torch.bfloat16)).dtype == torch.bfloat16
    copied = copy.deepcopy(made.float())
    assert copied.nf4 is made.nf4
    with torch.no_grad():
        copied.bias.zero_()
    assert made.bias.abs().max() > 0


def test_autocast_casts_x_as_it_does_for_a_plain_layer():
    plain, made = layer()
    x = torch.randn(3, 96)
    with torch.autocast("cpu", torch.bfloat16):
        y = made(x)
        assert y.dtype == plain(x).dtype == torch.bfloat16
    assert bits(y.detach()) == bits(made(x.bfloat16()).detach())


def test_a_layer_compiles_whole():
    _, made = layer()
    x = torch.randn(3, 96, requires_grad=True)
    compiled = torch.compile(made, fullgraph=True, backend="aot_eager")
    want = made(x)
    got = compiled(x)
    assert bits(got.detach()) == bits(want.detach())
    (a,) = torch.autograd.grad(want.sum(), x)
    (b,) = torch.autograd.grad(got.sum(), x)
    assert bits(a) == bits(b)


def test_a_layer_from_a_tensor_copies_its_bytes():
    W = matrix(40, 96)
    w = le.nf4_quantize(W.numpy(), double_quant=True)
    made = le.NF4Linear(w, torch.ones(40))
    x = torch.randn(3, 96)
    assert bits(made(x)) == bits(le.nf4_linear(x, w, torch.ones(40)))
    with pytest.raises(TypeError, match=r"nf4: expected an NF4Tensor, got Tensor"):
        le.NF4Linear(W)
    with pytest.raises(ValueError, match=r"bias: expected shape \[40\], got \[39\]"):
        le.NF4Linear(w, torch.ones(39))


# ---- models ----


@pytest.mark.parametrize("kind", TINY)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_quantised_model_is_the_model_of_the_decoded_matrices(kind, dtype):
    model, ids = tiny(kind, dtype), tokens()
    plain = output(model, ids).detach()
    oracle = copy.deepcopy(model)
    report = le.quantize(model, double_quant=True)
    assert report.bytes_after < report.bytes_before
    linear = {"llama": 14, "gpt2": 8, "bert": 13}[kind]
    assert len(report.layers) == linear
    assert report.kept == ({} if kind == "bert" else {"lm_head": "skipped"})
    for path in report.layers:
        made, was = model.get_submodule(path), oracle.get_submodule(path)
        assert type(made) is le.NF4Linear
        assert made.training is False
        W = torch.from_numpy(made.nf4.to_float()).to(was.weight.dtype)
        with torch.no_grad():
            was.weight.copy_(W if type(was) is nn.Linear else W.T)
    got, want = output(model, ids), output(oracle, ids)
    assert cosine(got, plain) > 0.8
    assert cosine(got, plain) < 0.9999  # the matrices are not what they were
    assert cosine(got, want) > (0.999999 if dtype == "float32" else 0.999)
    if dtype == "float32":
        assert (got - want).abs().max() < 1e-5


def test_bytes_are_counted():
    model = nn.Sequential(nn.Linear(128, 64), nn.Linear(64, 32, bias=False))
    report = le.quantize(model)
    assert report.bytes_before == 4 * (128 * 64 + 64 + 64 * 32)
    packed = sum(m.nf4.nbytes for m in model)
    assert report.bytes_after == packed + 4 * 64
    assert model[0].nf4.nbytes >= 128 * 64 // 2 + 4 * 128 * 64 // 64
    assert report.layers == ("0", "1")


def test_one_layer_at_a_time_and_its_floats_are_freed(monkeypatch):
    model = nn.Sequential(*[nn.Linear(32, 32) for _ in range(5)])
    weights = [weakref.ref(m.weight) for m in model]
    alive = []
    packing = le.NF4Tensor.from_float.__func__

    def counted(cls, *args):
        alive.append(sum(w() is not None for w in weights))
        return packing(cls, *args)

    monkeypatch.setattr(le.NF4Tensor, "from_float", classmethod(counted))
    le.quantize(model)
    assert alive == [5, 4, 3, 2, 1]
    assert not any(w() for w in weights)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(50, 32)
        self.first = nn.Linear(32, 32)
        self.again = self.first
        self.blocks = nn.ModuleDict({"one": nn.Linear(32, 32), "head": nn.Linear(32, 32)})
        self.out = nn.Linear(32, 50, bias=False)
        self.out.weight = self.embed.weight
        self.lm_head = nn.Linear(32, 4)


def test_tied_weights_stay_and_a_module_in_two_places_is_one():
    model = Tied()
    report = le.quantize(model)
    assert report.layers == ("first", "blocks.one", "blocks.head")
    assert report.kept == {"out": "its weight is another module's too", "lm_head": "skipped"}
    assert model.first is model.again
    assert model.out.weight is model.embed.weight


@pytest.mark.parametrize(
    ("skip", "kept"),
    [
        ([], set()),
        (["head"], {"blocks.head"}),
        (["blocks"], {"blocks.one", "blocks.head"}),
        (["blocks.one", "irst"], {"blocks.one"}),
    ],
)
def test_what_is_skipped(skip, kept):
    report = le.quantize(Tied(), skip=skip)
    assert {path for path, why in report.kept.items() if why == "skipped"} == kept
    assert set(report.layers) == {"first", "blocks.one", "blocks.head", "lm_head"} - kept


def test_layers_that_torch_does_not_call_stay():
    model = nn.Sequential(nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), nn.Linear(32, 8))
    report = le.quantize(model.eval())
    assert report.layers == ("1",)
    assert set(report.kept) == {"0.linear1", "0.linear2"}
    with torch.no_grad():
        assert model(torch.randn(2, 5, 32)).shape == (2, 5, 8)  # through torch's fast path


def bad_models():
    hooked = nn.Linear(32, 32)
    hooked.register_forward_hook(lambda *_: None)
    infinite = nn.Linear(32, 32)
    infinite.weight.data[3, 4] = float("-inf")
    broken = nn.Linear(32, 32)
    broken.weight.data[3, 4] = float("nan")
    return {
        "meta": (nn.Linear(32, 32, device="meta"), ValueError, "tensor on meta"),
        "float64": (nn.Linear(32, 32).double(), TypeError, "got torch.float64"),
        "hook": (hooked, ValueError, "without hooks"),
        "inf": (infinite, ValueError, "got NaN or Inf"),
        "nan": (broken, ValueError, "got NaN or Inf"),
        "empty": (quietly(nn.Linear, 32, 0), ValueError, "no empty matrix"),
        "4-bit": (
            bitsandbytes.nn.Linear4bit(32, 32, quant_type="nf4"),
            ValueError,
            "not quantised",
        ),
    }


@pytest.mark.parametrize("which", ["meta", "float64", "hook", "inf", "nan", "empty", "4-bit"])
def test_a_layer_that_cannot_be_packed_leaves_the_model_as_it_was(which):
    bad, error, message = bad_models()[which]
    model = nn.ModuleList([nn.Linear(32, 32), bad])
    first = model[0]
    with pytest.raises(error, match=rf"quantize: 1: .*{message}"):
        le.quantize(model)
    assert model[0] is first
    assert model[1] is bad


def test_what_is_no_model_to_quantise():
    with pytest.raises(TypeError, match="model: expected a torch module, got dict"):
        le.quantize({})
    with pytest.raises(ValueError, match="got a layer"):
        le.quantize(nn.Linear(4, 4))
    with pytest.raises(ValueError, match="expected a linear layer, got none"):
        le.quantize(nn.Sequential(nn.ReLU()))
    model = nn.Sequential(nn.Linear(32, 32))
    with pytest.raises(ValueError, match="blocksize: expected a power of two"):
        le.quantize(model, blocksize=48)
    with pytest.raises(ValueError, match="quantize: compute: expected"):
        le.quantize(model, compute="float16")
    with pytest.raises(TypeError, match="skip: expected paths"):
        le.quantize(model, skip="0")
    assert type(model[0]) is nn.Linear
    le.quantize(model)
    with pytest.raises(ValueError, match="expected a linear layer, got none"):
        le.quantize(model)


def test_a_model_with_pefts_adapters_is_refused():
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(nn.Sequential(nn.Linear(32, 32)), LoraConfig(target_modules=["0"]))
    with pytest.raises(ValueError, match="without adapters, got a PeftModel with some at the top"):
        le.quantize(model)


def test_peft_trains_on_a_packed_model_as_on_the_decoded_one():
    from peft import LoraConfig, get_peft_model

    losses, weights = [], []
    for packed in (True, False):
        model = tiny("llama")
        report = le.quantize(model)
        if not packed:
            for path in report.layers:
                made = model.get_submodule(path)
                plain = nn.Linear(made.in_features, made.out_features, bias=False)
                plain.weight.data = torch.from_numpy(made.nf4.to_float())
                model.set_submodule(path, plain)
        torch.manual_seed(1)
        config = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
        model = get_peft_model(model, config).train()
        trained = [p for p in model.parameters() if p.requires_grad]
        assert all(p.dtype == torch.float32 for p in trained)
        optimizer = torch.optim.SGD(trained, lr=0.1)
        for step in range(3):
            ids = tokens(seed=step)
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        weights.append(torch.cat([p.detach().flatten() for p in trained]))
    assert losses[:3] == pytest.approx(losses[3:], rel=1e-5)
    assert losses[2] < losses[0] - 0.01
    assert torch.allclose(weights[0], weights[1], rtol=1e-4, atol=1e-5)


def test_a_bar_counts_layers(monkeypatch):
    seen = []

    class Counted(quantizing.Bar):
        def advance(self, done, loss=None):
            seen.append((done, loss))
            super().advance(done, loss)

    monkeypatch.setattr(quantizing, "Bar", Counted)
    le.quantize(nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32)))
    assert seen == [(1, None), (1, None)]


@pytest.mark.parametrize("shape", [(96,), (3, 96), (2, 3, 96)], ids=str)
def test_what_a_layer_gives_may_be_written_to(shape):
    _, made = layer()
    x = torch.randn(shape, requires_grad=True)
    y = made(x)
    y[0] += 1.0  # as PEFT does with its rows
    y.sum().backward()
    want = torch.from_numpy(made.nf4.to_float()).sum(0).expand(shape)
    torch.testing.assert_close(x.grad, want, rtol=1e-4, atol=1e-4)
