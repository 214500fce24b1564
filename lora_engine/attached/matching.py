"""Which layers of a model an adapter is for, checked before anything is changed."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from lora_engine.adapters.adapter import Adapter, LoraWeights
from lora_engine.adapters.micro_lora import MicroLoRA
from lora_engine.adapters.peft_tensors import PREFIX
from lora_engine.attached.layers import (
    AttachedEmbedding,
    AttachedLayer,
    AttachedLinear,
    AttachedNF4,
    kinds,
)
from lora_engine.attached.placement import saved_of
from lora_engine.attached.weights import PARAMETERS

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def _some(names: Iterable[str]) -> str:
    listed = sorted(names)
    return ", ".join(listed[:4]) + (", ..." if len(listed) > 4 else "") or "none"


def kind_of(module: torch.nn.Module) -> type[AttachedLayer] | None:
    """The kind of base layer that a module is, None for a module that takes no adapter."""
    for kind in kinds():
        if isinstance(module, kind.BASE):
            return kind
    return None


def is_sequence_first(module: torch.nn.Module) -> bool:
    """Whether a module says that the batch is dimension 1 of what its layers are given."""
    torchs = (torch.nn.TransformerEncoderLayer, torch.nn.TransformerDecoderLayer)
    told: Any = module.self_attn if isinstance(module, torchs) else module
    return getattr(told, "batch_first", None) is False


class Model:
    """A model's modules by path, for matching."""

    def __init__(self, op: str, model: torch.nn.Module) -> None:
        self.op, self.root = op, model
        self.modules = dict(model.named_modules(remove_duplicate=False))
        self.never_called = {
            f"{path}.{name}" if path else name
            for path, module in self.modules.items()
            if isinstance(module, torch.nn.MultiheadAttention)
            for name, _ in module.named_children()
        }

    def check_free(self, calls: Any) -> None:
        """Refuses a model that another handle than that of these calls has a part of."""
        for path, module in self.modules.items():
            held = vars(module)
            owners = [getattr(held.get(key), "calls", None) for key in ("_lora_model", "_lora")]
            if any(other not in (None, calls) for other in (*owners, held.get("_lora_calls"))):
                raise ValueError(
                    f"{self.op}: model: expected one that nothing is attached to, nor to a part"
                    f" of it, got {path or 'an attached one'}: use the add of its handle, or detach"
                    " that first"
                )

    def adapter(self, name: str, source: Any) -> Adapter:
        """An adapter from what a user gives: an Adapter, a MicroLoRA or a PEFT folder."""
        if isinstance(source, Adapter):
            return source
        if isinstance(source, MicroLoRA):
            return self._of_micro_lora(name, source)
        if isinstance(source, (str, os.PathLike)):
            return Adapter.load(source)
        raise TypeError(
            f"{self.op}: {name}: expected an adapter folder, a MicroLoRA or an Adapter,"
            f" got {type(source).__name__}"
        )

    def _of_micro_lora(self, name: str, lora: MicroLoRA) -> Adapter:
        """Its modules' weights for every path that ends in their names, as PEFT's
        target_modules mean it."""
        own, modules = Adapter.from_micro_lora(lora), {}
        for target, weights in own.modules.items():
            paths = [p for p in self.modules if p == target or p.endswith("." + target)]
            if not paths and kind_of(self.root) and len(own.modules) == 1:
                paths = [""]
            if not paths:
                self._refuse_foreign(name, [target])
            modules.update(dict.fromkeys(paths, weights))
        return replace(own, modules=modules)

    def paths(self, name: str, adapter: Adapter) -> dict[str, str]:
        """The model's path for each of the adapter's; ValueError for one of another model."""
        saved = [key.rpartition(".")[0] for key in adapter.modules_to_save]
        wanted = list(
            dict.fromkeys([*adapter.modules, *adapter.embeddings, *adapter.biases, *saved])
        )
        if not wanted:
            raise ValueError(
                f"{self.op}: {name}: expected an adapter of some module, got an empty one"
            )
        if kind_of(self.root) and len(wanted) == 1:
            return {wanted[0]: ""}
        found = {p: q for p in wanted for q in (p, p.removeprefix(PREFIX)) if q in self.modules}
        missing = [p for p in wanted if p not in found]
        if missing:
            self._refuse_foreign(name, missing)
        seen: dict[int, str] = {}
        for path in found.values():
            other = seen.setdefault(id(self.modules[path]), path)
            if other != path:
                raise ValueError(
                    f"{self.op}: {name}: expected an adapter of a module once,"
                    f" got {other} and {path}, which are one module"
                )
        return found

    def _refuse_foreign(self, name: str, missing: list[str]) -> None:
        layers = [p for p, m in self.modules.items() if kind_of(m)]
        raise ValueError(
            f"{self.op}: {name}: expected an adapter of this model ({_some(layers)}),"
            f" got one of {_some(missing)}, which it has not"
        )

    def check(self, name: str, adapter: Adapter, paths: dict[str, str]) -> None:
        """Raises where a weight does not fit the layer that it is for."""
        for key, weights in adapter.modules.items():
            self._check_layer(name, paths[key], AttachedLinear, weights)
        for key, weights in adapter.embeddings.items():
            self._check_layer(name, paths[key], AttachedEmbedding, weights)
        serving = set(saved_of(adapter))
        for key, values in adapter.modules_to_save.items():
            module, _, parameter = key.rpartition(".")
            self._check_saved(name, paths[module], parameter, values, key in serving)
        for key, bias in adapter.biases.items():
            kind = kind_of(self.modules[paths[key]])
            if kind is None or issubclass(kind, AttachedEmbedding):
                got = type(self.modules[paths[key]]).__name__
                raise TypeError(
                    f"{self.op}: {name}: {paths[key]}: bias: expected a linear layer or LayerNorm,"
                    f" got {got}"
                )
            own = getattr(self.modules[paths[key]], "bias", None)
            if own is None or tuple(own.shape) != bias.shape:
                got = "none" if own is None else f"{list(own.shape)}"
                raise ValueError(
                    f"{self.op}: {name}: {paths[key]}: bias: expected the shape of the layer's,"
                    f" {got}, got {list(bias.shape)}"
                )
        self._check_finite(name, adapter)

    def _check_finite(self, name: str, adapter: Adapter) -> None:
        """As files are read."""
        tensors: list[tuple[str, Any]] = [
            *adapter.biases.items(),
            *adapter.modules_to_save.items(),
        ]
        for path, w in (*adapter.modules.items(), *adapter.embeddings.items()):
            tensors += [(path, value) for value in w if value is not None]
        for path, values in tensors:
            if not np.isfinite(values).all():
                raise ValueError(
                    f"{self.op}: {name}: {path}: expected finite numbers, got NaN or Inf"
                )

    def _check_saved(
        self, name: str, path: str, parameter: str, values: Any, serving: bool
    ) -> None:
        """modules_to_save; not serving: of an adapted layer."""
        module = self.modules[path]
        where, kind = f"{self.op}: {name}: {path}.{parameter}: modules_to_save", kind_of(module)
        own = module._parameters.get(parameter)
        if kind is None or issubclass(kind, AttachedNF4) or parameter not in PARAMETERS:
            takes = ", ".join(k.BASE.__name__ for k in kinds() if not issubclass(k, AttachedNF4))
            raise TypeError(
                f"{where}: expected a weight or bias of {takes}, got {type(module).__name__}"
            )
        if path in self.never_called:
            raise ValueError(f"{where}: expected a layer whose forward is called, got another")
        if own is None or tuple(own.shape) != np.shape(values):
            got = "none" if own is None else f"{list(own.shape)}"
            raise ValueError(
                f"{where}: expected the shape of the layer's, {got}, got {list(np.shape(values))}"
            )
        if not serving and not torch.equal(own.cpu(), torch.from_numpy(values).to(own.dtype)):
            raise ValueError(
                f"{where}: expected the layer's own weights, as the adapter has a delta for"
                " them, got others"
            )

    def _check_layer(
        self, name: str, path: str, wanted: type[AttachedLayer], weights: LoraWeights
    ) -> None:
        module, where = self.modules[path], f"{self.op}: {name}: {path or 'the model'}"
        kind = kind_of(module)
        if kind is None or not issubclass(kind, wanted):
            takes = ", ".join(k.BASE.__name__ for k in kinds() if issubclass(k, wanted))
            raise TypeError(f"{where}: expected a layer of {takes}, got {type(module).__name__}")
        if path in self.never_called:
            raise ValueError(
                f"{where}: expected a layer whose forward is called, got one of"
                " nn.MultiheadAttention, which reads its weights past it"
            )
        weight = getattr(module, "weight", None)
        if weight is not None and weight.is_floating_point() and weight.dtype not in _FLOATS:
            raise TypeError(
                f"{where}: expected weights of float32, bfloat16 or float16, got {weight.dtype}"
            )
        if np.shape(weights.A)[:1] != np.shape(weights.B)[1:] or np.ndim(weights.A) != 2:
            raise ValueError(
                f"{where}: expected A [r, in] and B [out, r], got A {list(np.shape(weights.A))}"
                f" and B {list(np.shape(weights.B))}"
            )
        got = (weights.A.shape[1], weights.B.shape[0])
        if got != kind.sizes(module):
            d_in, d_out = kind.sizes(module)
            raise ValueError(
                f"{where}: expected A [r, {d_in}] and B [{d_out}, r],"
                f" got A {list(weights.A.shape)} and B {list(weights.B.shape)}"
            )
