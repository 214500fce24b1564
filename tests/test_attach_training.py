"""Training an adapter of an attached model: PEFT's gradients and losses, step for step."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from helpers_attach import adapter_of, logits, new_model, tokens, two_adapters, with_peft

import lora_engine as le
from lora_engine.adapters.adapter import Adapter, LoraWeights

KINDS = ("llama", "gpt2", "bert")


def labels_of(kind, inputs):
    return torch.tensor([0, 1, 1]) if kind == "bert" else inputs["input_ids"]


def pair(kind, **options):
    """(attached model, its handle, PEFT's model) of the same adapter "a", both in train mode."""
    base = new_model(kind)
    config = {**two_adapters(kind)["a"], **options}
    peft = with_peft(base, {"a": config})
    model = copy.deepcopy(base)
    handle = le.attach(model, {"a": adapter_of(peft, "a")})
    return model.train(), handle, peft.train()


def losses(model, parameters, optimizer, kind, steps=5, **call):
    torch.manual_seed(5)  # of dropout
    step, found = optimizer(parameters), []
    for i in range(steps):
        inputs = tokens(seed=i % 2)
        step.zero_grad()
        loss = model(**inputs, labels=labels_of(kind, inputs), **call).loss
        loss.backward()
        step.step()
        found.append(loss.item())
    return found


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.02, weight_decay=0.1),
}


def trainable(peft):
    return [p for p in peft.parameters() if p.requires_grad]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("kind", KINDS)
def test_losses_are_pefts_step_for_step(kind, optimizer):
    model, handle, peft = pair(kind)
    parameters = handle.parameters("a")
    got = losses(model, parameters, OPTIMIZERS[optimizer], kind)
    want = losses(peft, trainable(peft), OPTIMIZERS[optimizer], kind)
    np.testing.assert_allclose(got, want, rtol=1e-4)
    assert len(set(got)) == 5
    assert abs(got[4] - got[0]) > 1e-2
    # What is served is what was trained, from the pools' memory.
    after = adapter_of(peft, "a")
    for path, weights in handle.adapter("a").modules.items():
        np.testing.assert_allclose(weights.A, after.modules[path].A, rtol=2e-3, atol=2e-4)
        np.testing.assert_allclose(weights.B, after.modules[path].B, rtol=2e-3, atol=2e-4)
    served = logits(model.eval(), tokens(), adapter_names=["a", "__base__", "a"])
    torch.testing.assert_close(
        served, logits(peft.eval(), tokens(), adapter_names=["a", "__base__", "a"]),
        rtol=1e-3, atol=1e-3,
    )  # fmt: skip


@pytest.mark.parametrize(
    "options",
    [
        {"lora_dropout": 0.3},
        {"bias": "lora_only"},
        {"lora_bias": True},
        {"target_modules": ["query", "word_embeddings"]},
    ],
    ids=lambda o: next(iter(o)),
)
def test_losses_with_dropout_biases_and_embeddings(options):
    model, handle, peft = pair("bert", **options)
    got = losses(model, handle.parameters("a"), OPTIMIZERS["adamw"], "bert")
    want = losses(peft, trainable(peft), OPTIMIZERS["adamw"], "bert")
    np.testing.assert_allclose(got, want, rtol=1e-4)
    trained, after = handle.adapter("a"), adapter_of(peft, "a")
    for mine, theirs in ((trained.biases, after.biases), (trained.embeddings, after.embeddings)):
        assert mine.keys() == theirs.keys()
        for path, value in mine.items():
            np.testing.assert_allclose(value[0], theirs[path][0], rtol=2e-3, atol=2e-4)
    got, want = logits(model.eval(), tokens()), logits(peft.eval(), tokens())
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_losses(reentrant):
    plain, plain_handle, _ = pair("llama", lora_dropout=0.2)
    names = ["a", "__base__", "a"]
    sgd = OPTIMIZERS["sgd"]
    want = losses(plain, plain_handle.parameters("a"), sgd, "llama", adapter_names=names)
    model, handle, _ = pair("llama", lora_dropout=0.2)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    got = losses(model, handle.parameters("a"), sgd, "llama", adapter_names=names)
    np.testing.assert_allclose(got, want, rtol=1e-5)


@pytest.mark.parametrize("reentrant", [False, True])
def test_another_kind_of_checkpoint_follows_the_names_of_its_call(reentrant):
    """Also where another adapter is set by then; calls of other names need passes of their own."""

    class Checkpointed(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.proj = torch.nn.Linear(4, 4)
            self.again = True

        def forward(self, x):
            def part(x):
                return torch.tanh(self.proj(x))

            if not self.again:
                return {"out": part(x)}
            return {"out": torch.utils.checkpoint.checkpoint(part, x, use_reentrant=reentrant)}

    rng = np.random.default_rng(0)
    model = Checkpointed()

    def drawn():
        shapes = ((1, 4), (4, 1))
        return LoraWeights(*(rng.standard_normal(s, np.float32) for s in shapes), 0.5)

    handle = le.attach(model, {name: Adapter({"proj": drawn()}) for name in "ab"})
    parameters = handle.parameters("a") + handle.parameters("b")
    x = torch.randn(2, 4, requires_grad=True)

    def gradients(calls, between=lambda: None):
        for p in parameters:
            p.grad = None
        handle.set_adapter("a")
        losses = [model(x, **call)["out"].sum() for call in calls]
        between()
        sum(losses).backward()
        return [None if p.grad is None else p.grad.clone() for p in parameters]

    for calls in (
        [{}],
        [{"adapter_names": ["a", "b"]}],
        [{"adapter_names": ["__base__", "b"]}] * 2,
        [{}, {}],
    ):
        model.again = False
        want = gradients(calls)
        model.again = True
        got = gradients(calls, lambda: handle.set_adapter("b"))
        for one, other in zip(got, want, strict=True):
            assert (one is None) == (other is None)
            torch.testing.assert_close(one, other)
    with pytest.raises(RuntimeError, match="calls of other names"):
        gradients([{}, {"adapter_names": ["b", "b"]}])


@torch.inference_mode()
def _serve(handle, model, x):
    handle.set_adapter({"a": 0.5})
    for names in (None, ["a"] * 3, [{"a": 0.5}, "b", "__base__"]):
        model(x, adapter_names=names)
    model[0](x)
    handle.merge("a")
    handle.unmerge("a")


def test_what_was_first_used_in_inference_mode_is_trained_later():
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Tanh())
    w = LoraWeights(np.ones((1, 4), "f4"), np.ones((4, 1), "f4"), 0.5, np.ones(4, "f4"))
    dropout = {"lora_dropout": 0.1}
    x = torch.ones(3, 4)
    with torch.inference_mode():
        adapters = {"a": Adapter({"0": w}), "b": Adapter({"0": w}, peft_config=dropout)}
        handle = le.attach(model, adapters)
    _serve(handle, model, x)
    model[0](x).sum().backward()
    model(x, adapter_names=[{"a": 0.5}, "b", "__base__"]).sum().backward()
    with torch.inference_mode():
        parameters = handle.parameters("a")
    parameters += handle.parameters("b")
    model(x, adapter_names=[{"a": 0.5}, "b", "__base__"]).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in parameters)


def test_gradients_by_finite_differences_of_mixed_rows():
    """Two adapters trained in one batch, one only served, a mixture of both kinds, base rows."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(5, 6), torch.nn.Tanh(), torch.nn.Linear(6, 4))
    rng = np.random.default_rng(0)

    def drawn(rank):
        def weights(d_in, out):
            shapes = ((rank, d_in), (out, rank))
            return LoraWeights(*(rng.standard_normal(s, np.float32) for s in shapes), 0.5)

        return Adapter({"0": weights(5, 6), "2": weights(6, 4)})

    handle = le.attach(model, {"a": drawn(2), "b": drawn(3), "served": drawn(1)})
    parameters = [*handle.parameters("a"), *handle.parameters("b")]
    names = ["a", "b", "__base__", {"a": 0.5, "served": -1.5}, "served", {"b": 2.0, "a": 1.0}]
    x = torch.randn(6, 3, 5, requires_grad=True)
    up = torch.randn(6, 3, 4)

    def loss():
        return (model(x, adapter_names=names) * up).sum()

    loss().backward()
    for tensor in (x, *parameters):
        direction = torch.randn(tensor.shape)
        slope = float((tensor.grad * direction).sum())
        with torch.no_grad():
            values = []
            for step in (1e-2, -2e-2):
                tensor += step * direction
                values.append(float(loss()))
            tensor += 1e-2 * direction
        assert slope == pytest.approx((values[0] - values[1]) / 2e-2, rel=2e-2, abs=2e-2)


def test_a_step_is_served_at_once_and_the_model_stays_the_bases():
    model = new_model("llama")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    flags = [p.requires_grad for p in model.parameters()]
    peft = with_peft(model, two_adapters("llama"))
    handle = le.attach(model, {n: adapter_of(peft, n) for n in ("a", "b")})
    plain = logits(model, tokens(), adapter_names=["b"] * 3)
    parameters = handle.parameters("a")
    first = logits(model, tokens())
    with torch.no_grad():
        for parameter in parameters:
            parameter.mul_(2.0)
    assert not torch.equal(logits(model, tokens()), first)
    w = handle.adapter("a").modules["model.layers.0.self_attn.q_proj"]
    assert np.array_equal(w.A, parameters[0].detach().numpy())
    assert np.array_equal(w.B, parameters[1].detach().numpy())
    assert [p for p in model.parameters() if p.requires_grad] == parameters
    assert handle.parameters("a") == parameters
    assert list(model.state_dict()) == list(before)
    model.load_state_dict(before)
    for i in range(100):  # growth moves nothing
        handle.add(f"more{i}", adapter_of(peft, "b"))
    with torch.no_grad():
        parameters[0].zero_()
    assert not handle.adapter("a").modules["model.layers.0.self_attn.q_proj"].A.any()
    handle.remove("a")
    assert [p for p in model.parameters() if p.requires_grad] == []
    with torch.no_grad():
        for parameter in parameters:  # an optimiser that goes on
            assert not parameter.any()
            parameter.add_(1.0)
    handle.add("new", adapter_of(peft, "a"))
    assert torch.equal(logits(model, tokens(), adapter_names=["b"] * 3), plain)
    handle.detach()
    assert [p.requires_grad for p in model.parameters()] == flags


def test_a_16_bit_adapter_is_trained_in_float32():
    model = torch.nn.Linear(4, 4).bfloat16()
    w = LoraWeights(np.full((1, 4), 1.0, "f4"), np.full((4, 1), 0.5, "f4"), 1.0)
    handle = le.attach(model, {"a": Adapter({"proj": w}, dtype="bfloat16")})
    (pool,) = handle._shelf.pools.values()
    assert pool.dtype == "bfloat16"
    A, B = handle.parameters("a")
    assert A.dtype == B.dtype == torch.float32
    y = model(torch.ones(2, 4, dtype=torch.bfloat16), adapter_names=["a", "__base__"])
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    torch.testing.assert_close(A.grad, torch.full((1, 4), 2.0))
    torch.testing.assert_close(B.grad, torch.full((4, 1), 4.0))
