"""bitsandbytes' Linear4bit as an NF4Linear, of the same bytes."""

from __future__ import annotations

import sys
from typing import Any

import torch

from lora_engine.errors import FormatError
from lora_engine.quant.linear import NF4Linear

_COMPUTE = {torch.float32: "float32", torch.float16: "float32", torch.bfloat16: "bfloat16"}


def is_linear4bit(module: Any) -> bool:
    """Whether it is a layer of bitsandbytes in 4 bits; without importing bitsandbytes."""
    loaded = sys.modules.get("bitsandbytes")
    return loaded is not None and isinstance(module, loaded.nn.Linear4bit)


def _state(layer: Any) -> Any:
    return getattr(layer.weight, "quant_state", None) or layer.quant_state


def beside(layer: Any) -> dict[str, Any]:
    """What is saved with the packed weight, by its key after the layer's path."""
    state = _state(layer)
    parts = {} if state is None else state.as_dict(packed=True)
    return {f"weight.{name}": value for name, value in parts.items()}


def from_linear4bit(layer: Any, path: str = "Linear4bit") -> NF4Linear:
    """The layer with its own packed weight and bias, borrowed on the CPU and copied from a GPU.

    ``compute`` is what the layer says (float32 for float16), None where it takes x's dtype.
    path: names the layer in errors. Raises FormatError (fp4), ValueError (not packed yet, or
    packed anew by bitsandbytes).
    """
    state = _state(layer)
    if state is None:
        raise ValueError(f"{path}: expected a packed weight, got one that is not quantised yet")
    if getattr(state, "packing_format_for_cpu", False):
        raise ValueError(
            f"{path}: expected the weight as it was loaded, got it as bitsandbytes packs it anew in"
            " its first forward on this CPU, with scales rounded to bfloat16: load the model again"
            " and convert or attach before it is run"
        )
    parts = {"weight": layer.weight, **beside(layer)}
    plain = {k: v.detach().as_subclass(torch.Tensor).cpu() for k, v in parts.items()}
    compute = _COMPUTE.get(layer.compute_dtype) if layer.compute_type_is_set else None
    try:
        made = NF4Linear.from_parts(plain, layer.bias, compute)
    except FormatError as error:
        raise FormatError(f"{path}: {error}") from None
    return made.train(layer.training)
