"""PEFT models with several adapters, and the same adapters as ours."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import torch

import lora_engine as le
from lora_engine.adapters.adapter import LoraWeights

SIZES = {"first": (24, 20), "second": (20, 33)}  # (in, out)
ROWS, DIM = 30, 24


class Base(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.emb = torch.nn.Embedding(ROWS, DIM)
        for name, size in SIZES.items():
            setattr(self, name, torch.nn.Linear(*size))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(self.emb(tokens)))


def peft_model(configs: dict[str, dict[str, Any]], base: Any = None) -> Any:
    """A PEFT model with these adapters, random in A and B."""
    from peft import LoraConfig, get_peft_model

    model = None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for i, (name, options) in enumerate(configs.items()):
            given = {"target_modules": ["first", "second", "emb"], **options}
            config = LoraConfig(init_lora_weights=False, **given)
            torch.manual_seed(i + 1)
            if model is None:
                model = get_peft_model(base or Base(), config, adapter_name=name)
            else:
                model.add_adapter(name, config)
    for key, parameter in model.named_parameters():
        if "lora_" in key:
            parameter.data.normal_()
    return model


def layers(model: Any) -> dict[str, Any]:
    return {name: getattr(model.base_model.model, name) for name in (*SIZES, "emb")}


def adapter_of(model: Any, name: str) -> le.Adapter:
    """An adapter of a PEFT model as ours."""
    modules, embeddings = {}, {}
    for path, layer in layers(model).items():
        if name in getattr(layer, "lora_A", {}):
            A, B = layer.lora_A[name].weight, layer.lora_B[name].weight
            modules[path] = LoraWeights(A.detach().numpy(), B.detach().numpy(), layer.scaling[name])
        elif name in getattr(layer, "lora_embedding_A", {}):
            A, B = layer.lora_embedding_A[name], layer.lora_embedding_B[name]
            embeddings[path] = LoraWeights(
                A.detach().numpy(), B.detach().numpy(), layer.scaling[name]
            )
    return le.Adapter(modules, embeddings)


def peft_deltas(model: Any, name: str) -> dict[str, np.ndarray]:
    """The deltas of an adapter by PEFT, [out, in], and of embeddings [dim, rows]."""
    found = {}
    for path, layer in layers(model).items():
        if name in getattr(layer, "lora_A", {}):
            found[path] = layer.get_delta_weight(name).detach().double().numpy()
        elif name in getattr(layer, "lora_embedding_A", {}):
            found[path] = layer.get_delta_weight(name).detach().double().numpy().T
    return found


def delta(lora: LoraWeights) -> np.ndarray:
    return lora.scaling * lora.B.astype(np.float64) @ lora.A.astype(np.float64)


def deltas(adapter: le.Adapter) -> dict[str, np.ndarray]:
    """The deltas of an adapter by their definition, [out, in]."""
    return {name: delta(w) for name, w in {**adapter.modules, **adapter.embeddings}.items()}


def gap(got: np.ndarray, want: np.ndarray) -> float:
    """‖got - want‖ / ‖want‖."""
    return float(np.linalg.norm(got - want) / (np.linalg.norm(want) or 1.0))


def random_adapter(
    seed: int, ranks: dict[str, int], scaling: float = 1.0, size: tuple[int, int] = (24, 20)
) -> le.Adapter:
    """Modules of one size (in, out) and ranks of their own."""
    rng = np.random.default_rng(seed)
    d_in, d_out = size
    return le.Adapter(
        {
            name: LoraWeights(
                rng.standard_normal((r, d_in)).astype("f4"),
                rng.standard_normal((d_out, r)).astype("f4"),
                scaling,
            )
            for name, r in ranks.items()
        }
    )
