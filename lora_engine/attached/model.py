"""The attached model itself: adapter_names in its calls and in generate()."""

from __future__ import annotations

import functools
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from lora_engine.attached.layers import AttachedLinear
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
        inside = adapter_names is None and before is not False
        if not inside:
            local.rows = rows_of_call(handle, adapter_names, args, kwargs)
        try:
            output = super().__call__(*args, **kwargs)  # type: ignore[misc]
            if not inside:
                follow(handle, output)
            return output
        finally:
            if before is False:
                del local.rows
            else:
                local.rows = before


@_eager  # type: ignore[untyped-decorator]
def rows_of_call(handle: Attached, names: Any, args: Any, kwargs: Any) -> Rows:
    one_row = isinstance(handle.model, AttachedLinear)  # of one dimension
    return handle.rows_of(names, batch_of(args, kwargs, one_row))


@_eager  # type: ignore[untyped-decorator]
def follow(handle: Attached, output: Any) -> None:
    if torch.is_grad_enabled():
        handle.calls.follow(output)


def forward_with_names(base: type) -> Any:
    """The forward of a model's class, with adapter_names, under the signature of its own."""
    kind: Any = base

    @functools.wraps(kind.forward)
    def forward(self: Any, *args: Any, adapter_names: Any = None, **kwargs: Any) -> Any:
        if adapter_names is None:
            return kind.forward(self, *args, **kwargs)
        handle: Attached = self._lora_model
        with handle.calls.within(rows_of_call(handle, adapter_names, args, kwargs)):
            output = kind.forward(self, *args, **kwargs)
            follow(handle, output)
        return output

    return forward


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
        if "adapter_names" in kwargs:  # which a part handed on with its other **kwargs
            raise TypeError(
                "adapter_names: expected in a call of the attached model, got them in one of a"
                " part of it"
            )
        if self.gradient_checkpointing and self.training:
            kwargs["_lora_rows"] = self._lora_calls.now()
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


def batch_of(args: tuple[Any, ...], kwargs: Mapping[str, Any], one_row: bool = False) -> int | None:
    """How many elements a call's inputs have, None where that cannot be seen. one_row: those of
    one dimension are one."""
    named = [kwargs.get(name) for name in _INPUTS]
    for value in (*args, *named, *kwargs.values()):
        if isinstance(value, torch.Tensor) and value.ndim:
            return 1 if one_row and value.ndim == 1 else int(value.shape[0])
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
