"""Tiny models, PEFT's adapters on a copy of them, and the same as lora_engine has them."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import torch
import transformers
from helpers_models import configuration
from peft import LoraConfig, get_peft_model

from lora_engine.adapters.adapter import Adapter, LoraWeights

VOCABULARY, WIDTH = 48, 16
TARGETS = {
    "llama": (["q_proj", "v_proj"], ["q_proj", "down_proj"]),
    "gpt2": (["c_attn"], ["c_attn", "c_fc"]),
    "bert": (["query", "value"], ["query", "dense"]),
}


def new_model(kind: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> Any:
    """A tiny model in eval mode: causal LM of Llama or GPT-2, classifier of BERT."""
    torch.manual_seed(seed)
    config = configuration(kind, VOCABULARY, WIDTH, 24, heads=2, positions=32, spread=0.3)
    made: Any = {
        "llama": transformers.LlamaForCausalLM, "gpt2": transformers.GPT2LMHeadModel,
        "bert": transformers.BertForSequenceClassification,
    }[kind]  # fmt: skip
    model = made(config)
    return model.to(dtype).eval()


def tokens(n: int = 3, length: int = 7, seed: int = 1) -> dict[str, torch.Tensor]:
    """Inputs without padding."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCABULARY, (n, length), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def with_peft(model: Any, configs: dict[str, dict[str, Any]], seed: int = 2) -> Any:
    """A PEFT model on a copy of the model, with drawn weights in A and B; in eval mode."""
    torch.manual_seed(seed)
    copied = copy.deepcopy(model)
    peft: Any = None
    for name, options in configs.items():
        config = LoraConfig(**{"r": 4, "init_lora_weights": False, **options})
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Conv1D's fan_in_fan_out
            if peft is None:
                peft = get_peft_model(copied, config, adapter_name=name)
            else:
                peft.add_adapter(name, config)
    return peft.eval()


def adapter_of(peft: Any, name: str) -> Adapter:
    """What PEFT has under a name."""
    modules, embeddings, biases = {}, {}, {}
    config = peft.peft_config[name]
    for path, layer in peft.base_model.model.named_modules():
        if name in getattr(layer, "lora_embedding_A", {}):
            A, B = layer.lora_embedding_A[name], layer.lora_embedding_B[name]
            embeddings[path] = LoraWeights(_array(A), _array(B), layer.scaling[name])
        elif name in getattr(layer, "lora_A", {}):
            A, B, scaling = layer.lora_A[name], layer.lora_B[name], layer.scaling[name]
            bias = None if B.bias is None else _array(B.bias) * scaling
            modules[path] = LoraWeights(_array(A.weight), _array(B.weight), scaling, bias)
            if config.bias == "lora_only" and layer.base_layer.bias is not None:
                biases[path] = _array(layer.base_layer.bias)
    kept = {"lora_dropout": config.lora_dropout} if config.lora_dropout else {}
    return Adapter(modules, embeddings, biases, kept)


def _array(tensor: torch.Tensor) -> Any:
    return tensor.detach().float().numpy().copy()


def two_adapters(kind: str) -> dict[str, dict[str, Any]]:
    """Configs of two adapters that share some modules, of other ranks."""
    first, second = TARGETS[kind]
    fan = kind == "gpt2"
    return {
        "a": {"target_modules": first, "fan_in_fan_out": fan},
        "b": {"target_modules": second, "r": 3, "use_rslora": True, "fan_in_fan_out": fan},
    }


def logits(model: Any, inputs: dict[str, torch.Tensor], **options: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(**inputs, **options).logits
    return found


class Flat(torch.nn.Module):
    """A layer that is given x [n, m, 4] as n m rows."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = torch.nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.proj(x.reshape(-1, 4))
        return y
