"""What the tests of Adapter share: small bases, PEFT's folders of them, an adapter by hand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from helpers_files import quietly

import lora_engine as le
from lora_engine.adapters.adapter import LoraWeights

IDS = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])


class Bare(torch.nn.Module):
    """Linear layers with and without a bias, in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(
            torch.nn.ModuleDict(
                {"q_proj": torch.nn.Linear(6, 6), "v_proj": torch.nn.Linear(6, 6, bias=True)}
            )
            for _ in range(2)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = torch.tanh(layer["q_proj"](x)) + layer["v_proj"](x)
        return x


class Nested(torch.nn.Module):
    """A model whose parts have the names of PEFT's own prefix."""

    def __init__(self) -> None:
        super().__init__()
        self.base_model = torch.nn.ModuleDict({"model": Bare()})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.base_model["model"](x)
        return out


def _llama() -> torch.nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
                    num_attention_heads=2, num_key_value_heads=1)
    )  # fmt: skip


def _bert() -> torch.nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    return BertForSequenceClassification(
        BertConfig(vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
                   num_attention_heads=2, max_position_embeddings=16)
    )  # fmt: skip


def _gpt2() -> torch.nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(
        GPT2Config(vocab_size=32, n_embd=16, n_layer=1, n_head=2, n_positions=16,
                   bos_token_id=0, eos_token_id=0)
    )  # fmt: skip


def _made(make: Callable[[], torch.nn.Module]) -> Callable[[], torch.nn.Module]:
    def base() -> torch.nn.Module:
        torch.manual_seed(0)
        model: torch.nn.Module = quietly(make).eval()
        for parameter in model.parameters():  # biases too, large enough to see
            torch.nn.init.normal_(parameter.data, std=0.3)
        return model

    return base


BASES: dict[str, Callable[[], torch.nn.Module]] = {
    "bare": _made(Bare),
    "nested": _made(Nested),
    "llama": _made(_llama),
    "bert": _made(_bert),
    "gpt2": _made(_gpt2),
}


def drawn(r: int = 2, d_in: int = 6, out: int = 5, scaling: float = 2.0) -> LoraWeights:
    rng = np.random.default_rng([r, d_in, out])
    A, B = (rng.standard_normal(s).astype("f4") for s in ((r, d_in), (out, r)))
    return LoraWeights(A, B, scaling)


@torch.no_grad()
def outputs(model: torch.nn.Module) -> torch.Tensor:
    """Of fixed tokens, or rows."""
    model.eval()
    if hasattr(model, "config") and hasattr(model.config, "vocab_size"):
        return model(input_ids=IDS).logits
    torch.manual_seed(1)
    return model(torch.randn(7, 6))


def peft_model(
    base: str, tmp_path: Path, dtype: torch.dtype | None = None, **options: Any
) -> tuple[Path, torch.Tensor]:
    """A folder that PEFT wrote of a drawn adapter, and the adapted model's outputs."""
    from peft import LoraConfig, get_peft_model

    model = quietly(get_peft_model, BASES[base](), LoraConfig(**{"r": 2, **options}))
    torch.manual_seed(2)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += torch.randn_like(parameter) * 0.5
    if dtype is not None:
        model = model.to(dtype)
    folder = tmp_path / "peft"
    quietly(model.save_pretrained, folder)
    return folder, outputs(model)


@torch.no_grad()
def ours(model: torch.nn.Module, adapter: le.Adapter) -> torch.Tensor:
    """The base's outputs with the adapter's deltas put into its weights, in float32."""
    parameters = dict(model.named_parameters()) | dict(model.named_buffers())
    for path, bias in adapter.biases.items():
        parameters[f"{path}.bias"].copy_(torch.tensor(bias))
    for path, values in adapter.modules_to_save.items():
        parameters[path].copy_(torch.tensor(values))
    for path, w in {**adapter.modules, **adapter.embeddings}.items():
        module = model.get_submodule(path)
        delta = torch.tensor(w.B).double() @ torch.tensor(w.A).double() * w.scaling
        turned = path in adapter.embeddings or type(module).__name__ == "Conv1D"
        module.weight += (delta.T if turned else delta).float()
        if w.bias_delta is not None:
            module.bias += torch.tensor(w.bias_delta)
    return outputs(model)
