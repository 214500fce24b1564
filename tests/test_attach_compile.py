"""An attached model under torch.compile, transformers' Trainer and torch's own fast paths."""

from __future__ import annotations

import copy
import threading

import numpy as np
import pytest
import torch
import transformers
from helpers_attach import Flat, adapter_of, logits, new_model, tokens, two_adapters, with_peft
from torch._dynamo.utils import counters

import lora_engine as le
from lora_engine.adapters.adapter import Adapter, LoraWeights
from lora_engine.attached import spread

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:torch.*")


@pytest.fixture
def fresh():
    """The compiler, from nothing."""
    torch.compiler.reset()
    counters.clear()
    with (
        torch._inductor.config.patch(fx_graph_cache=False),
        torch._functorch.config.patch(enable_autograd_cache=False),
    ):
        yield
    torch.compiler.reset()


def drawn(like: Adapter, rank: int) -> Adapter:
    rng = np.random.default_rng(rank)

    def weights(w: LoraWeights) -> LoraWeights:
        shapes = ((rank, w.A.shape[1]), (w.B.shape[0], rank))
        return LoraWeights(*(rng.standard_normal(s, np.float32) * 0.3 for s in shapes), 1.0)

    return Adapter({path: weights(w) for path, w in like.modules.items()})


def test_other_names_and_ranks_compile_nothing_anew(fresh):
    model = new_model("llama")
    peft = with_peft(model, two_adapters("llama"))
    first = adapter_of(peft, "a")
    handle = le.attach(model, {"a": first, "b": adapter_of(peft, "b")})
    handle.set_adapter(None)
    fast = torch.compile(model, fullgraph=True, backend="aot_eager")

    def check(names, n=3):
        rows = tokens(len(names or range(n)))
        got, want = (logits(m, rows, adapter_names=names) for m in (fast, model))
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)

    check(["a", "__base__", "b"])
    check(None)
    check(["b", "a", "a"])
    handle.add("new", drawn(first, 9))
    check(["new", "__base__", "a"])
    handle.add("a", drawn(first, 2))  # in place of the first
    check(["new", "a", "a"])
    for i in range(70):  # past the room there is for numbers
        handle.add(f"more{i}", first)
    check(["more69", "more3", "new"])
    check(["__base__"] * 3)
    others = threading.Thread(target=check, args=(["b", "new", "__base__"],))
    others.start()
    check(["a", "b", "__base__"])
    others.join()
    assert not counters["graph_break"]
    check(["a", {"a": 0.5, "b": -1.0}, "b"])
    check([{"a": 0.5, "b": 2.0, "new": 0.1}] * 3)
    check([{"a": 0.5}, "__base__", "b"])
    for name in ("a", {"b": 0.5}, {"a": 1.0, "b": 1.0}, "__base__", "b"):
        handle.set_adapter(name)
        check(None)
    assert counters["stats"]["unique_graphs"] == 1
    for n in (4, 5, 6):  # one more graph, of any number of rows
        check(["a", "new", "b", {"a": 0.5, "b": 2.0, "new": 0.1}, "__base__", "b"][-n:])
        check(None, n)
    assert counters["stats"]["unique_graphs"] == 2


def test_a_compiled_layer_that_sees_another_number_of_elements_says_so(fresh):
    model = Flat()
    w = LoraWeights(np.ones((1, 4), "f4"), np.ones((4, 1), "f4"), 1.0)
    handle = le.attach(model, {"a": Adapter({"proj": w})})
    fast = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = torch.ones(2, 3, 4)
    torch.testing.assert_close(fast(x), model(x))
    with pytest.raises(ValueError, match="each of the 6 elements that come to a compiled layer"):
        fast(x, adapter_names=["a", "a"])
    handle.set_adapter(None)
    plain = torch.nn.functional.linear(x.reshape(6, 4), model.proj.weight, model.proj.bias)
    assert torch.equal(fast(x), plain)
    assert counters["stats"]["unique_graphs"] == 1


def test_rows_are_spread_over_elements_and_their_repeats():
    table = torch.tensor([-1, 4, 5], dtype=torch.int32)
    cpu = torch.device("cpu")
    two = spread.traced([[1, 0], [2, 1]], [[0.5, 1.0], [2.0, 3.0]], False, 2, cpu)
    one = spread.traced([[2]], [[0.5]], False, 1, cpu)
    whole = spread.traced([[2]], [[0.5]], True, 1, cpu)
    for rows, batch, per, ids, weights in (
        (two, 2, 1, [[4, -1], [5, 4]], [[0.5, 1.0], [2.0, 3.0]]),
        (two, 4, 1, [[4, -1]] * 2 + [[5, 4]] * 2, [[0.5, 1.0]] * 2 + [[2.0, 3.0]] * 2),
        (two, 2, 3, [[4, -1]] * 3 + [[5, 4]] * 3, [[0.5, 1.0]] * 3 + [[2.0, 3.0]] * 3),
        (one, 1, 2, [[5, -1]] * 2, [[0.5, 1.0]] * 2),
        (whole, 3, 2, [[5, -1]] * 6, [[0.5, 1.0]] * 6),
    ):
        got = torch.ops.lora_engine.spread_rows(table, *rows, batch, per)
        assert got[0].tolist() == ids
        assert got[1].tolist() == weights
    for rows, batch in ((two, 3), (two, 1), (one, 2)):
        with pytest.raises(ValueError, match=f"each of the {batch} elements"):
            torch.ops.lora_engine.spread_rows(table, *rows, batch, 1)


def test_compiled_by_layer_and_in_training(fresh):
    """Attached before; what is trained is seen by the graph, with its gradients."""
    model = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3))
    first = Adapter({"0": LoraWeights(np.ones((1, 4), "f4"), np.ones((5, 1), "f4"), 0.5)})
    handle = le.attach(model, {"a": first})
    model[0].compile(fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 4)
    plain = torch.nn.functional.linear(x, model[0].weight, model[0].bias)
    parameters = handle.parameters("a")
    got = []
    for _ in range(3):
        model(x, adapter_names=["a", "__base__"]).sum().backward()
        got.append([p.grad.clone() for p in parameters])
        for p in parameters:
            p.grad = None
    model[0]._compiled_call_impl = None
    model(x, adapter_names=["a", "__base__"]).sum().backward()
    for grads in got:
        for p, grad in zip(parameters, grads, strict=True):
            torch.testing.assert_close(p.grad, grad)
    with torch.no_grad():
        model[0].compile(fullgraph=True, backend="aot_eager")
        hidden = []
        model[0].register_forward_hook(lambda _, __, y: hidden.append(y))
        model(x, adapter_names=["a", "__base__"])
    torch.testing.assert_close(hidden[0][1], plain[1])
    assert (hidden[0][0] - plain[0]).abs().max() > 0.1


def test_the_fast_path_of_a_torch_encoder_layer_does_not_go_past_an_adapter():
    layer = torch.nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    w = LoraWeights(np.arange(8, dtype="f4")[None], np.ones((16, 1), "f4"), 1.0)
    x = torch.randn(2, 3, 8)
    with torch.no_grad():
        plain = layer(x)
        handle = le.attach(layer, {"a": Adapter({"linear1": w})})
        got = layer(x, adapter_names=["a", "__base__"])
        assert (got[0] - plain[0]).abs().max() > 1e-2
        torch.testing.assert_close(got[1], plain[1])
        handle.detach()
        assert torch.equal(layer(x), plain)
    assert not layer.linear1._forward_hooks
    assert not layer.linear1._forward_pre_hooks


class Losses(transformers.TrainerCallback):
    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in (logs or {}):
            self.losses.append(logs["loss"])


@pytest.mark.parametrize("optimizer", ["sgd", "adamw_torch"])
def test_a_trainer_gives_pefts_losses(optimizer, tmp_path):
    """With its own optimiser, weight decay, clipping and zero_grad: it finds the Parameters."""
    base = new_model("bert")
    peft = with_peft(base, {"a": {**two_adapters("bert")["a"], "lora_dropout": 0.2}})
    model = copy.deepcopy(base)
    handle = le.attach(model, {"a": adapter_of(peft, "a")})
    handle.parameters("a")
    rows = tokens(12)
    data = [
        {"input_ids": ids, "attention_mask": mask, "labels": i % 2}
        for i, (ids, mask) in enumerate(zip(*rows.values(), strict=True))
    ]
    found = []
    for trained in (model, peft):
        arguments = transformers.TrainingArguments(
            str(tmp_path), max_steps=5, per_device_train_batch_size=4, logging_steps=1, seed=3,
            learning_rate=0.05, weight_decay=0.1, max_grad_norm=0.3, optim=optimizer,
            report_to=[], save_strategy="no", disable_tqdm=True, use_cpu=True,
        )  # fmt: skip
        seen = Losses()
        trainer = transformers.Trainer(trained, arguments, train_dataset=data, callbacks=[seen])
        trainer.train()
        found.append(seen.losses)
    got, want = found
    assert len(got) == 5
    np.testing.assert_allclose(got, want, rtol=1e-3)
    assert len(set(got)) == 5
