"""The attached model itself: adapter_names in its calls and in generate()."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from lora_engine.attached.rows import Rows

_eager: Any = torch.compiler.disable  # whatever is compiled around it

if TYPE_CHECKING:
    from lora_engine.attached.handle import Attached

_INPUTS = ("input_ids", "inputs_embeds", "pixel_values", "input_features", "inputs")


class AttachedModel:
    """In front of the class of the model that was attached to."""

    _lora_model: Any  # the handle

    def __init_subclass__(cls, **_: Any) -> None:
        """Not the model's, which is for classes that people write."""

    # Names become tensors here, outside what torch.compile(model) traces: it goes on with the
    # call inside, whose graph takes them as inputs. Nothing else may be called here.
    @_eager(recursive=False)  # type: ignore[untyped-decorator]
    def __call__(self, *args: Any, adapter_names: Any = None, **kwargs: Any) -> Any:
        handle: Attached = self._lora_model
        local = handle.calls.local
        before = getattr(local, "rows", False)
        if adapter_names is not None or before is False:
            local.rows = rows_of_call(handle, adapter_names, args, kwargs)
        try:
            return super().__call__(*args, **kwargs)  # type: ignore[misc]
        finally:
            if before is False:
                del local.rows
            else:
                local.rows = before


@_eager  # type: ignore[untyped-decorator]
def rows_of_call(handle: Attached, names: Any, args: Any, kwargs: Any) -> Rows | None:
    return handle.rows_of(names, batch_of(args, kwargs))


class AttachedGenerator(AttachedModel):
    """The same of a model that generates."""

    def generate(self, *args: Any, adapter_names: Any = None, **kwargs: Any) -> Any:
        """``generate`` of the model, each row of the inputs with its adapter."""
        handle: Attached = self._lora_model
        if adapter_names is None and hasattr(handle.calls.local, "rows"):
            return super().generate(*args, **kwargs)  # type: ignore[misc]  # inside another call
        with torch.no_grad():
            rows = handle.rows_of(adapter_names, batch_of(args, kwargs), repeats(self, kwargs))
        with handle.calls.within(rows):
            return super().generate(*args, **kwargs)  # type: ignore[misc]


class AttachedCheckpoint:
    """In front of transformers' layers that may be checkpointed.

    What they ran with goes along with their arguments, as they are computed again when the call
    is long over.
    """

    _lora_calls: Any
    gradient_checkpointing: bool
    training: bool

    def __init_subclass__(cls, **_: Any) -> None:
        """Not the layer's, which is for classes that people write."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.gradient_checkpointing and self.training:
            kwargs["_lora_rows"] = self._lora_calls.rows()
        return super().__call__(*args, **kwargs)  # type: ignore[misc]

    def forward(self, *args: Any, _lora_rows: Any = False, **kwargs: Any) -> Any:
        if _lora_rows is False:
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        with self._lora_calls.within(_lora_rows):
            return super().forward(*args, **kwargs)  # type: ignore[misc]


def checkpointed(model: torch.nn.Module) -> list[Any]:
    """The layers of a model that transformers may checkpoint."""
    layers = sys.modules.get("transformers.modeling_layers")
    kind = getattr(layers, "GradientCheckpointingLayer", ())
    return [module for module in model.modules() if isinstance(module, kind)]


def batch_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int | None:
    """How many elements a call's inputs have, None where that cannot be seen."""
    named = [kwargs.get(name) for name in _INPUTS]
    for value in (*args, *named, *kwargs.values()):
        if isinstance(value, torch.Tensor) and value.ndim:
            return int(value.shape[0])
    return None


def repeats(model: Any, kwargs: Mapping[str, Any]) -> int:
    """How often generate() repeats each element: for its beams, or for several sequences."""
    configs = (kwargs.get("generation_config"), getattr(model, "generation_config", None))

    def option(name: str) -> int:
        values = [kwargs.get(name), *(getattr(config, name, None) for config in configs)]
        return int(next((v for v in values if v is not None), 1))

    return max(option("num_beams"), option("num_return_sequences"))


def names_of(op: str, names: Any) -> Sequence[Any]:
    """adapter_names as a sequence; TypeError for anything else."""
    if isinstance(names, Sequence) and not isinstance(names, str):
        return names
    raise TypeError(
        f"{op}: expected a list, a name (or a mixture, or __base__) a row, got {names!r}:"
        " for one adapter for all rows use set_adapter"
    )
