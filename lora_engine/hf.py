"""``lora_engine.attach``: adapters on a transformers model, or on any torch module."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from lora_engine.attached.handle import Attached, Source

__all__ = ["Attached", "attach"]


def attach(model: torch.nn.Module, adapters: Mapping[str, Source]) -> Attached:
    """Puts adapters on a model, and gives its calls ``adapter_names``.

    model: a transformers model, any module that holds nn.Linear, transformers' Conv1D or
    nn.Embedding layers, or one such layer. adapters: by name, each a PEFT adapter folder, an
    ``Adapter`` or a ``MicroLoRA``. The paths of a folder or an ``Adapter`` are the model's own;
    a MicroLoRA's module names stand for every path that ends in them, as PEFT's target_modules
    do, and its weights are copied.

    Then ``model(**inputs, adapter_names=["a", "__base__", {"a": 0.7, "b": 0.3}])`` serves each
    element of the batch with its adapter or mixture, as do ``model.forward`` and
    ``model.generate``. Dimension 0 is the batch, of the inputs and of what the layers are given;
    torch's Transformer layers with batch_first=False take no names. In a mixture the name None, as
    a Router fills up rows with, stands for nothing. A call without names uses what ``set_adapter``
    chose, at first the first adapter, as with PEFT; so does a part of the model that is called by
    itself, which takes no names. The model stays the object that it was, with its modules and its
    state_dict; ``detach`` ends it.

    modules_to_save (weights and biases of linear layers, LayerNorm and nn.Embedding) serve the
    rows that name their adapter instead of the model's own; in a mixture w times the difference
    of the two outputs is added. The shape must be the model's: a head of other labels is refused.

    Weights are kept in the dtype that the adapter says (``Adapter.dtype``; float32 of a
    MicroLoRA), whatever the model's. Calls from several threads, each with names of its own, do
    not meet.

    Raises ValueError (an adapter of another model, a shape that does not fit, NaN or Inf, a model
    that is attached to, or a part of which is), TypeError (a layer or dtype that takes no
    adapter), and what reading a folder raises; the model is then as it was.
    """
    _check("model", model, torch.nn.Module, "a torch module")
    _check("adapters", adapters, Mapping, "{name: adapter}")
    if not adapters:
        raise ValueError("attach: adapters: expected at least one, got none")
    return Attached(model, adapters)


def _check(name: str, value: object, kind: type, expected: str) -> None:
    if not isinstance(value, kind):
        raise TypeError(f"attach: {name}: expected {expected}, got {type(value).__name__}")
