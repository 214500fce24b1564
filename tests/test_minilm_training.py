"""A LoRA trained on MiniLM's real weights through le.attach: PEFT's losses, step for step."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers_attach import adapter_of, with_peft
from helpers_files import quietly
from helpers_models import minilm_classifier, sentences, transformers

import lora_engine as le

pytestmark = pytest.mark.usefixtures("one_torch_thread")

CONFIG = {"r": 4, "lora_alpha": 16, "target_modules": ["query", "value", "dense"],
          "init_lora_weights": True}  # fmt: skip
LABELS = torch.tensor([0, 0, 1, 1, 0, 0])  # of SENTENCES: whether it is about money
STEPS, LR = 3, {"sgd": 0.3, "adamw_torch": 2e-3}


@pytest.fixture(scope="module")
def plain():
    return minilm_classifier()


def both_ways(plain, packed):
    """The same model and the same new adapter, by PEFT and attached; the base in NF4 or not."""
    base = copy.deepcopy(plain)
    if packed:
        le.quantize(base, double_quant=True)
    peft = with_peft(base, {"a": CONFIG}, seed=4)
    handle = le.attach(base, {"a": adapter_of(peft, "a")})
    handle.parameters("a")
    return {"peft": (peft, None), "attached": (base, handle)}


def weights_of(model, handle):
    """What was learned: B A of each layer, by its path."""
    adapter = handle.adapter("a") if handle else adapter_of(model, "a")
    return {path: torch.from_numpy(w.B @ w.A) for path, w in adapter.modules.items()}


def check(losses, weights):
    assert len(losses["attached"]) == STEPS
    assert losses["attached"] == pytest.approx(losses["peft"], rel=2e-5)
    largest = max(float(want.abs().max()) for want in weights["peft"].values())
    assert largest > 5e-4  # B was zero
    for path, want in weights["peft"].items():
        torch.testing.assert_close(weights["attached"][path], want, rtol=2e-3, atol=2e-6)


@pytest.mark.parametrize("packed", [False, True], ids=["float32", "nf4"])
@pytest.mark.parametrize("optimizer", list(LR))
def test_a_plain_loop(optimizer, packed, plain):
    losses, weights = {}, {}
    for way, (model, handle) in both_ways(plain, packed).items():
        model.train()
        torch.manual_seed(7)  # of the base's dropout
        trained = [p for p in model.parameters() if p.requires_grad]
        make = torch.optim.SGD if optimizer == "sgd" else torch.optim.AdamW
        stepping = make(trained, lr=LR[optimizer])
        losses[way] = []
        for _ in range(STEPS):
            loss = model(**sentences(), labels=LABELS).loss
            loss.backward()
            stepping.step()
            stepping.zero_grad()
            losses[way].append(loss.item())
        weights[way] = weights_of(model, handle)
    check(losses, weights)


class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return len(LABELS)

    def __getitem__(self, row):
        return {**{k: v[row] for k, v in sentences().items()}, "labels": LABELS[row]}


@pytest.mark.parametrize("packed", [False, True], ids=["float32", "nf4"])
@pytest.mark.parametrize("optimizer", list(LR))
def test_the_trainer_of_transformers(optimizer, packed, plain, tmp_path):
    losses, weights = {}, {}

    class Recorded(transformers.Trainer):
        def compute_loss(self, *args, **kwargs):
            loss = super().compute_loss(*args, **kwargs)
            losses[way].append(loss.item())
            return loss

    for way, (model, handle) in both_ways(plain, packed).items():
        losses[way] = []
        arguments = transformers.TrainingArguments(
            tmp_path, per_device_train_batch_size=4, max_steps=STEPS, learning_rate=LR[optimizer],
            optim=optimizer, seed=3, use_cpu=True, save_strategy="no", logging_strategy="no",
            report_to=[], disable_tqdm=True,
        )  # fmt: skip
        quietly(Recorded(model, arguments, train_dataset=Rows()).train)
        weights[way] = weights_of(model, handle)
    check(losses, weights)
