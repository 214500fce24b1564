"""An adapter's weights as torch has them: for training, dropout, biases and embeddings."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

Tensor = torch.Tensor
PARAMETERS = ("weight", "bias")  # of a layer


class Factors:
    """Of one layer: A [r, in], B [out, r], views of the pool's own memory for a linear layer, and
    scaling. For an embedding A [r, rows], B [dim, r]."""

    def __init__(self, A: Tensor, B: Tensor, scaling: float) -> None:
        self.A, self.B, self.scaling = A, B, scaling

    def delta(self) -> Tensor:
        """scaling B A, float32."""
        return (self.B.detach().float() @ self.A.detach().float()) * self.scaling


class Biases:
    """Of one layer: ``own`` stands in for the base's bias (PEFT's bias="lora_only" or "all");
    ``lora`` is lora_B's bias, times scaling."""

    def __init__(self, own: Tensor | None, lora: Tensor | None, scaling: float) -> None:
        self.own, self.lora, self.scaling = own, lora, scaling

    def delta(self, base: Tensor | None) -> Tensor:
        """What is added to the output of a layer with this bias."""
        total = None if self.lora is None else self.lora * self.scaling
        if self.own is None:
            assert total is not None
            return total
        assert base is not None  # as checked when it was attached
        change = self.own - base.detach()
        return change if total is None else change + total


class Saved:
    """Of one layer: its whole weight and bias, which stand in for the base's (PEFT's
    modules_to_save); None: the base's."""

    def __init__(self) -> None:
        self.weight: Tensor | None = None
        self.bias: Tensor | None = None

    def given(self) -> list[str]:
        """Which of the two."""
        return [name for name in PARAMETERS if getattr(self, name) is not None]

    def of(self, name: str, base: Any, dtype: torch.dtype) -> Tensor | None:
        """One of them in a dtype, of the layer's own where there is none here."""
        value: Tensor | None = getattr(self, name)
        if value is None:
            own: Tensor | None = getattr(base, name)
            return own
        return value.to(dtype)


class Trained(torch.nn.Module):
    """Parameters of adapters, by the adapter's name, as a child of the layer that they are for.

    A model's parameters() and zero_grad() see them, so an optimiser or a Trainer of the model
    does; its state_dict stays the base's. They stay where the pool is, whatever the model is
    moved to.
    """

    def state_dict(self, *args: Any, destination: Any = None, **kwargs: Any) -> Any:
        return {} if destination is None else destination

    def _load_from_state_dict(self, *args: Any) -> None:
        pass

    def _apply(self, fn: Any, recurse: bool = True) -> Trained:
        return self


class Weights:
    """All of one adapter's, by the layer's path; ``trained``: they are Parameters."""

    def __init__(self) -> None:
        self.factors: dict[str, Factors] = {}
        self.biases: dict[str, Biases] = {}
        self.saved: dict[str, Saved] = {}
        self.trained = False

    def all(self) -> Iterator[tuple[str, str, Any, str]]:
        """(path, PEFT's name, what holds it, attribute) of each tensor."""
        for path, factors in self.factors.items():
            yield path, "lora_A", factors, "A"
            yield path, "lora_B", factors, "B"
        for path, biases in self.biases.items():
            if biases.lora is not None:
                yield path, "lora_bias", biases, "lora"
            if biases.own is not None:
                yield path, "bias_of", biases, "own"
        for path, saved in self.saved.items():
            for name in saved.given():
                yield path, f"modules_to_save_{name}", saved, name

    def train(self) -> None:
        """Makes Parameters of all tensors, where they lie."""
        for _, _, holder, attribute in self.all():
            setattr(holder, attribute, torch.nn.Parameter(getattr(holder, attribute)))
        self.trained = True

    def parameters(self) -> list[torch.nn.Parameter]:
        """The Parameters, layer by layer."""
        return [getattr(holder, attribute) for _, _, holder, attribute in self.all()]


Layers = Mapping[str, torch.nn.Module]  # the attached ones, by path


def _key(name: str) -> str:
    return name.replace(".", "_")


def check_free(layers: Layers, name: str, weights: Weights) -> None:
    """Raises ValueError where the layers have something else where the Parameters would go."""
    for path, kind, _, _ in weights.all():
        child = layers[path]._modules.get(kind)
        if child is None or (isinstance(child, Trained) and _key(name) not in child._parameters):
            continue
        raise ValueError(
            "Attached.parameters: name: expected one that differs from those trained by more than"
            f" . and _, and a layer without a {kind} of its own, got {name!r} and {path}"
        )


def put_parameters(layers: Layers, name: str, weights: Weights) -> None:
    """Gives the layers an adapter's Parameters, as their children."""
    for path, kind, holder, attribute in weights.all():
        child: Any = layers[path]._modules.setdefault(kind, Trained())
        child._parameters[_key(name)] = getattr(holder, attribute)  # also of an adapter "train"


def take_parameters(layers: Layers, name: str, weights: Weights) -> None:
    """Takes them away again."""
    for path, kind, _, _ in weights.all():
        child: Any = layers[path]._modules[kind]
        del child._parameters[_key(name)]
        if not child._parameters:
            del layers[path]._modules[kind]
