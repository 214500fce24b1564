"""Adapters merged into the base weights, and those weights back to the bit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from lora_engine.attached.layers import AttachedEmbedding, AttachedLinear
from lora_engine.attached.matching import kind_of
from lora_engine.attached.placement import Placed

Tensor = torch.Tensor


class MergedBase:
    """The adapters that are merged, and copies of the weights and biases they were merged into."""

    def __init__(self) -> None:
        self.adapters: dict[str, Placed] = {}
        self._originals: dict[str, dict[str, Tensor]] = {}  # by path: "weight", "bias"

    def change(
        self, op: str, adapters: Mapping[str, Placed], modules: Mapping[str, torch.nn.Module]
    ) -> None:
        """Makes these adapters the merged ones: every weight is its original plus their deltas, in
        the order of the adapters, in float32 and rounded once. All, or none."""
        paths = {path for placed in adapters.values() for path in _touched(placed)}
        new = {path: self._with(op, path, modules, adapters.values()) for path in paths}
        originals = {
            path: self._originals.get(path)
            or {name: getattr(modules[path], name).detach().clone() for name in values}
            for path, values in new.items()
        }
        back = {path: kept for path, kept in self._originals.items() if path not in new}
        with torch.no_grad():
            for path, values in (*back.items(), *new.items()):
                for name in originals.get(path, {}).keys() | values.keys():
                    to = getattr(modules[path], name)
                    to.copy_(values[name] if name in values else originals[path][name])
        for path, kept in originals.items():  # what one adapter has no bias for, another may
            kept.update({k: v for k, v in self._originals.get(path, {}).items() if k not in kept})
        self._originals = originals
        self.adapters = dict(adapters)

    def _with(
        self, op: str, path: str, modules: Mapping[str, torch.nn.Module], adapters: Any
    ) -> dict[str, Tensor]:
        module: Any = modules[path]
        original = self._originals.get(path, {})
        sums: dict[str, Tensor] = {}

        def add(name: str, delta: Tensor) -> None:
            if name not in sums:
                _check_own(op, path, name, modules)
                sums[name] = original.get(name, getattr(module, name)).detach().float()
            sums[name] = sums[name] + delta

        kind = kind_of(module)
        for placed in adapters:
            weights = placed.view()
            saved = weights.saved.get(path)
            for name in saved.given() if saved is not None else ():
                whole = getattr(saved, name).detach()
                base = original.get(name, getattr(module, name)).detach().float()
                _check_own(op, path, name, modules)
                sums[name] = sums[name] + (whole - base) if name in sums else whole
            if path in weights.factors:
                delta = weights.factors[path].delta()
                if kind is not None and issubclass(kind, AttachedLinear):
                    delta = kind.as_weight(delta)
                elif kind is not None and issubclass(kind, AttachedEmbedding):
                    delta = delta.t()
                add("weight", delta)
            if path in weights.biases:
                base = original.get("bias", module.bias)
                add("bias", weights.biases[path].delta(base).detach().float())
        values = {name: s.to(getattr(module, name).dtype) for name, s in sums.items()}
        for name, value in values.items():
            if not bool(torch.isfinite(value).all()):
                raise ValueError(f"{op}: {path}.{name}: expected finite numbers, got NaN or Inf")
        return values


def _touched(placed: Placed) -> set[str]:
    weights = placed.view()
    return weights.factors.keys() | weights.biases.keys() | weights.saved.keys()


def _check_own(op: str, path: str, name: str, modules: Mapping[str, torch.nn.Module]) -> None:
    """Refuses what cannot take a delta: packed weights, and those that another layer uses too."""
    value = getattr(modules[path], name, None)
    if not isinstance(value, torch.nn.Parameter) or not value.is_floating_point():
        got = "none" if value is None else f"{value.dtype}"
        raise TypeError(f"{op}: {path}.{name}: expected a float32 or 16-bit parameter, got {got}")
    users = {
        other
        for other, module in modules.items()
        for parameter in module._parameters.values()
        if parameter is value and module is not modules[path]
    }
    if users:
        raise ValueError(
            f"{op}: {path}.{name}: expected a weight of this layer alone, got one that"
            f" {', '.join(sorted(users))} shares"
        )
