"""load_quantized: a bitsandbytes 4-bit checkpoint into a model, without bitsandbytes."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch

from lora_engine.errors import FormatError
from lora_engine.quant import checkpoint
from lora_engine.quant.linear import NF4Linear, check_compute
from lora_engine.quant.model import check_bare, is_linear
from lora_engine.safetensors_file import (
    OF_NAMES,
    Entry,
    open_file,
    read_header,
    read_json,
    read_tensor,
    short,
    to_torch,
)

Module = torch.nn.Module
_WHOLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_MAX_INDEX = 16 << 20


class _Stored(NamedTuple):
    """A tensor of the checkpoint, not read yet."""

    file: BinaryIO
    entry: Entry
    source: str

    def read(self) -> torch.Tensor:
        tensor: torch.Tensor = to_torch(read_tensor(self.file, self.entry, self.source))
        return tensor


def load_quantized(
    model: Any, folder: str | os.PathLike[str], *, compute: str | None = None
) -> tuple[str, ...]:
    """Puts the 4-bit checkpoint of a folder into a model made from its configuration.

    folder: model.safetensors, or its parts with model.safetensors.index.json, as
    ``save_pretrained`` writes a model that bitsandbytes or ``quantize`` packed. Each linear layer
    that the checkpoint has packed becomes an ``NF4Linear`` of those bytes; the other parameters and
    buffers take the checkpoint's values, in the model's dtypes. The model's parameters may be on
    meta (``accelerate.init_empty_weights``), so that its float weights never take memory; what is
    in no checkpoint (buffers that are not saved) may not. All is read and checked before the model
    is touched. Returns the paths of the packed layers.

    Raises FormatError naming file and key (a damaged file; a tensor missing, of no use, or of
    another shape; fp4; no safetensors), TypeError, ValueError, OSError.
    """
    if not isinstance(model, Module):
        got = type(model).__name__
        raise TypeError(f"load_quantized: model: expected a torch module, got {got}")
    check_compute("load_quantized", compute)
    check_bare("load_quantized", model)
    with contextlib.ExitStack() as stack:
        stored = _open(Path(folder), stack)
        names = [k.removesuffix(checkpoint.STATE) for k in stored if k.endswith(checkpoint.STATE)]
        of_layers = {name + suffix for name in names for suffix in checkpoint.ALL}
        rest = {k: s for k, s in stored.items() if k not in of_layers}
        wanted = model.state_dict(keep_vars=True)
        tied = getattr(model, "all_tied_weights_keys", {})  # of transformers, on meta too
        same = {name for name in tied if tied[name] in rest}
        _check_names(wanted, {*names, *same}, rest, os.fspath(folder))
        layers = {name: _read_layer(model, name, stored, compute) for name in names}
        plain = {name: _read_plain(wanted[name], name, s) for name, s in rest.items()}
    for name, made in layers.items():
        model.set_submodule(name.removesuffix(".weight"), made)
    on_meta = {name: t for name, t in plain.items() if wanted[name].is_meta}
    model.load_state_dict(on_meta, strict=False, assign=True)
    model.load_state_dict({k: t for k, t in plain.items() if k not in on_meta}, strict=False)
    tie: Any = getattr(model, "tie_weights", None)
    if tie is not None:
        tie()
    return tuple(name.removesuffix(".weight") for name in layers)


# ---- files ----


def _open(folder: Path, stack: contextlib.ExitStack) -> dict[str, _Stored]:
    """Every tensor of a folder by its name. Raises FormatError, OSError."""
    if (folder / _WHOLE).exists():
        return _entries(folder / _WHOLE, stack)
    if not (folder / _INDEX).exists():
        raise FormatError(f"{folder}: expected {_WHOLE} or {_INDEX}, got neither")
    source = os.fspath(folder / _INDEX)
    with open_file(folder / _INDEX) as file:
        places = read_json(file.read(_MAX_INDEX), source).get("weight_map")
    if not isinstance(places, dict):
        raise FormatError(f"{source}: weight_map: expected names of files, got {places!r:.200}")
    for name, place in places.items():
        if not isinstance(place, str) or os.path.basename(place) != place:
            raise FormatError(f"{source}: {short(name)}: expected a file beside it, got {place!r}")
    parts = {place: _entries(folder / place, stack) for place in sorted(set(places.values()))}
    found = {}
    for name, place in places.items():
        if name not in parts[place]:
            raise FormatError(f"{folder / place}: {short(name)}: missing, but in {_INDEX}")
        found[name] = parts[place][name]
    return found


def _entries(path: Path, stack: contextlib.ExitStack) -> dict[str, _Stored]:
    file, source = stack.enter_context(open_file(path)), os.fspath(path)
    entries = read_header(file, source).entries
    return {name: _Stored(file, entry, source) for name, entry in entries.items()}


# ---- what belongs where ----


def _check_names(
    wanted: dict[str, Any], there: set[str], rest: dict[str, _Stored], folder: str
) -> None:
    """Raises FormatError for what the checkpoint lacks or has too much."""
    for name in [k for k in rest if k.endswith(checkpoint.STATE_FP4)]:
        raise FormatError(f"{rest[name].source}: {short(name)}: fp4 is not supported, only nf4")
    for name in [k for k in rest if k not in wanted]:
        raise FormatError(f"{rest[name].source}: {short(name)}: the model has no such tensor")
    tensors = {id(wanted[name]) for name in rest}
    for name, tensor in wanted.items():
        if there.isdisjoint(_prefixes(name)) and id(tensor) not in tensors:  # nor tied to one
            raise FormatError(f"{folder}: {short(name)}: missing")


def _prefixes(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:n]) for n in range(1, len(parts) + 1)]


def _read_layer(
    model: Module, name: str, stored: dict[str, _Stored], compute: str | None
) -> NF4Linear:
    source, path = stored[name + checkpoint.STATE].source, name.removesuffix(".weight")
    try:
        layer: Any = model.get_submodule(path)
    except AttributeError:
        raise FormatError(f"{source}: {short(name)}: the model has no such layer") from None
    if not isinstance(layer, NF4Linear) and not is_linear(layer):
        got = type(layer).__name__
        raise FormatError(f"{source}: {short(name)}: the model has a {got} there, no linear layer")
    parts = {
        "weight" + suffix: stored[name + suffix].read()
        for suffix in checkpoint.ALL
        if name + suffix in stored
    }
    try:
        made = NF4Linear.from_parts(parts, layer.bias, compute)
    except (FormatError, ValueError) as error:
        raise FormatError(f"{source}: {short(path)}: {error}") from None
    out = getattr(layer, "out_features", getattr(layer, "nf", None))
    features = getattr(layer, "in_features", getattr(layer, "nx", None))
    if made.nf4.shape != (out, features):
        raise FormatError(
            f"{source}: {short(name)}: expected [{out}, {features}], got {list(made.nf4.shape)}"
        )
    return made.train(layer.training)


def _read_plain(target: torch.Tensor, name: str, stored: _Stored) -> torch.Tensor:
    entry = stored.entry
    if entry.shape != tuple(target.shape):
        raise FormatError(
            f"{stored.source}: {short(name)}: expected {list(target.shape)},"
            f" got {entry.dtype} {short(str(list(entry.shape)))}"
        )
    try:
        return stored.read().to(target.dtype)
    except KeyError:
        known = ", ".join(OF_NAMES)
        raise FormatError(
            f"{stored.source}: {short(name)}: expected one of {known}, got {entry.dtype}"
        ) from None
