"""PEFT's VeRA folder: vera_lambda_b and vera_lambda_d of each module, and the shared A and B."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lora_engine import atomic
from lora_engine.adapters.config import is_name
from lora_engine.adapters.peft_config import MAX_JSON, MAX_RANK
from lora_engine.adapters.peft_format import CONFIG_FILE, FILES, PICKLE_FILE, WEIGHTS_FILE
from lora_engine.adapters.peft_tensors import PREFIX
from lora_engine.adapters.variants.vera import Vera, projections
from lora_engine.errors import FormatError
from lora_engine.safetensors_file import (
    read_all,
    read_json,
    short,
    to_array,
    to_bytes,
)

_B, _D = ".vera_lambda_b", ".vera_lambda_d"
_SHARED = {"base_model.vera_A": "A", "base_model.vera_B": "B"}
_MAX_SEED = 2**63


def save(folder: str | os.PathLike[str], vera: Vera, save_projection: bool) -> None:
    """Replaces the folder whole; other files in it are kept. Raises ValueError, OSError."""
    if not save_projection:
        sizes = vera.A.shape[1], vera.B.shape[0]
        drawn = projections(vera.rank, *sizes, vera.projection_prng_key)
        if not all(map(np.array_equal, drawn, (vera.A, vera.B))):
            raise ValueError(
                "Vera.save: save_projection: expected True, as A and B are not those of"
                f" projection_prng_key {vera.projection_prng_key}"
            )
    tensors = {}
    for name, v in vera.modules.items():
        if not is_name(name):
            raise ValueError(f"Vera.save: expected a path of printable text, got {name!r}")
        tensors[PREFIX + name + _B], tensors[PREFIX + name + _D] = v.b, v.d
    if save_projection:
        tensors |= {"base_model.vera_A": vera.A, "base_model.vera_B": vera.B}
    config = {
        "task_type": None,
        "base_model_name_or_path": None,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "modules_to_save": None,
        "vera_dropout": 0.0,
        "target_modules": list(vera.modules),
        **vera.peft_config,
        "peft_type": "VERA",
        "r": vera.rank,
        "d_initial": vera.d_initial,
        "projection_prng_key": vera.projection_prng_key,
        "save_projection": save_projection,
    }
    text = (json.dumps(config, indent=2) + "\n").encode()
    weights = to_bytes(tensors)

    def write(to: Path) -> None:
        atomic.write_file(to / CONFIG_FILE, text)
        atomic.write_file(to / WEIGHTS_FILE, weights)

    atomic.replace_folder(Path(folder), write, FILES)


class _Config:
    """What of a config is used, checked."""

    def __init__(self, raw: dict[str, Any], source: str) -> None:
        self.raw, self.source = raw, source
        if raw.get("peft_type") != "VERA":
            raise self.refused("peft_type", "VERA")
        if raw.get("bias", "none") != "none" or raw.get("modules_to_save"):
            key = "modules_to_save" if raw.get("modules_to_save") else "bias"
            raise self.refused(key, "none: a Vera is plain VeRA")
        self.rank = self._whole("r", 256, 1, MAX_RANK)
        self.key = self._whole("projection_prng_key", 0, 0, _MAX_SEED)
        self.d_initial = raw.get("d_initial", 0.1)
        if isinstance(self.d_initial, bool) or not isinstance(self.d_initial, (int, float)):
            raise self.refused("d_initial", "a number")

    def refused(self, key: str, expected: str) -> FormatError:
        got = short(repr(self.raw.get(key)))
        return FormatError(f"{self.source}: {key}: expected {expected}, got {got}")

    def _whole(self, key: str, default: int, low: int, high: int) -> int:
        value = self.raw.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise self.refused(key, f"a whole number from {low} to {high}")
        return value


def _tensors(data: bytes, source: str) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    """({module: {suffix: vector}}, {"A": matrix, "B": matrix}), float32."""
    modules: dict[str, dict[str, Any]] = {}
    shared: dict[str, Any] = {}
    for key, raw in read_all(data, source)[1].items():
        where = f"{source}: {short(key)}"
        suffix = next((s for s in (_B, _D) if key.startswith(PREFIX) and key.endswith(s)), None)
        if suffix is None and key not in _SHARED:
            raise FormatError(f"{where}: expected a key like {PREFIX}<module>{_B} or ...{_D}")
        values = to_array(raw, where)
        dims = 1 if suffix else 2
        if values.ndim != dims or 0 in values.shape or values.dtype.kind != "f":
            raise FormatError(f"{where}: expected floats of {dims} dimensions, got {values.shape}")
        with np.errstate(over="ignore"):
            values = values.astype(np.float32)
        if not np.isfinite(values).all():
            raise FormatError(f"{where}: expected finite numbers, got NaN or Inf")
        if suffix:
            modules.setdefault(key[len(PREFIX) : -len(suffix)], {})[suffix] = values
        else:
            shared[_SHARED[key]] = values
    return modules, shared


def _inputs(
    names: list[str], given: int | Mapping[str, int] | None, shared: dict[str, Any]
) -> dict[str, int]:
    if given is None:
        if "A" not in shared:
            raise ValueError(
                "Vera.load: in_features: expected sizes, as the file holds no vera_A; got None"
            )
        return dict.fromkeys(names, shared["A"].shape[1])
    if not isinstance(given, Mapping):
        return dict.fromkeys(names, given)
    for name in names:
        if name not in given:
            raise ValueError(f"Vera.load: in_features: expected a size of {name}, got none")
    return {name: given[name] for name in names}


def load(folder: str | os.PathLike[str], in_features: int | Mapping[str, int] | None) -> Vera:
    """Raises FormatError naming file and key, FileNotFoundError, ValueError."""
    path = Path(os.path.realpath(folder))
    limits = {CONFIG_FILE: MAX_JSON, WEIGHTS_FILE: None, PICKLE_FILE: 0}
    files = atomic.read_files(path, limits)
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if name not in files and PICKLE_FILE in files:
            raise FormatError(f"{path / PICKLE_FILE}: expected safetensors: no pickle is read")
        if name not in files:
            raise FileNotFoundError(f"{path / name}: expected an adapter folder's file, got none")
    if len(files[CONFIG_FILE]) > MAX_JSON:
        raise FormatError(f"{path / CONFIG_FILE}: expected at most {MAX_JSON} bytes, got more")
    source = str(path / WEIGHTS_FILE)
    config = _Config(
        read_json(files[CONFIG_FILE], str(path / CONFIG_FILE)), str(path / CONFIG_FILE)
    )
    modules, shared = _tensors(files[WEIGHTS_FILE], source)
    if not modules or len(shared) == 1:
        raise FormatError(f"{source}: expected modules, and vera_A and vera_B together or neither")
    for name, found in modules.items():
        for suffix in (_B, _D):
            if suffix not in found:
                raise FormatError(f"{source}: {PREFIX}{short(name)}{suffix}: missing")
        if found[_D].shape != (config.rank,):
            raise FormatError(
                f"{source}: {PREFIX}{short(name)}{_D}: expected shape [{config.rank}],"
                f" got {list(found[_D].shape)}"
            )
    inputs = _inputs(list(modules), in_features, shared)
    shapes = {name: (inputs[name], len(found[_B])) for name, found in modules.items()}
    try:
        vera = Vera(
            shapes,
            config.rank,
            d_initial=config.d_initial,
            projection_prng_key=config.key,
            A=shared.get("A"),
            B=shared.get("B"),
        )
    except ValueError as error:
        raise FormatError(f"{source}: {short(str(error))}") from None
    for name, found in modules.items():
        vera.set_vectors(name, found[_B], found[_D])
    vera.peft_config = config.raw
    return vera
