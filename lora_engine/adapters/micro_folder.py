"""MicroLoRA as an Adapter and in a folder: what it can hold, and the engine's own state."""

from __future__ import annotations

import io
import json
import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from lora_engine.adapters.adapter import Adapter, LoraWeights
from lora_engine.adapters.config import MicroLoRAConfig
from lora_engine.adapters.exploration import is_quality
from lora_engine.adapters.peft_config import PeftConfig, scalings
from lora_engine.adapters.peft_format import STATE_FILE, Folder, adapter_of, digest
from lora_engine.adapters.peft_tensors import A_SUFFIX, PREFIX, Factors, read_tensors, to_tensors
from lora_engine.errors import FormatError
from lora_engine.safetensors_file import from_bytes, read_header, read_json, short, to_bytes

STATE_KEY = "lora_engine"  # of the state file's metadata

_LACKS = ("rank_pattern", "alpha_pattern", "modules_to_save", "lora_bias")
_PLAIN = "nothing: a MicroLoRA is plain LoRA of one rank and alpha"


class State(NamedTuple):
    """What the engine knows beyond PEFT."""

    steps: Mapping[str, int]  # adapts of each module
    baselines: Mapping[str, float]  # the mean quality of each module, where there is one


# ---- conversion -------------------------------------------------------------


def to_adapter(config: MicroLoRAConfig, factors: Factors, kept: Mapping[str, Any]) -> Adapter:
    """kept: what the folder's config held when it was loaded."""
    own = {
        "r": config.rank,
        "lora_alpha": config.alpha,
        "lora_dropout": config.dropout,
        "use_rslora": config.use_rslora,
    }
    weights = {name: LoraWeights(A, B, config.scaling) for name, (A, B) in factors.items()}
    return Adapter(weights, peft_config={**kept, **own})


def weights_bytes(adapter: Adapter) -> bytes:
    """The file of an adapter's weights."""
    return to_bytes(to_tensors(adapter))


def config_of(adapter: Adapter, source: str) -> MicroLoRAConfig:
    """The config of a MicroLoRA that holds the adapter.

    Raises FormatError naming what a MicroLoRA cannot hold.
    """
    if not adapter.modules:
        raise FormatError(f"{source}: modules: expected at least one, got none")
    found = scalings(adapter)
    beyond: dict[str, Any] = {
        "rank_pattern": found.rank_pattern,
        "alpha_pattern": found.alpha_pattern,
        "embeddings": adapter.embeddings,
        "bias": adapter.biases,
        "lora_bias": {n: w for n, w in adapter.modules.items() if w.bias_delta is not None},
        "modules_to_save": adapter.modules_to_save,
    }
    for key, value in beyond.items():
        if value:
            got = short(", ".join(value))
            raise FormatError(f"{source}: {key}: expected {_PLAIN}, got some of {got}")
    shapes = {name: (w.A.shape[1], w.B.shape[0]) for name, w in adapter.modules.items()}
    listed = adapter.peft_config.get("target_modules")
    order = [m for m in listed if isinstance(m, str)] if isinstance(listed, list) else []
    names = list(dict.fromkeys([*(m for m in order if m in shapes), *shapes]))
    first = shapes[names[0]]
    try:
        return MicroLoRAConfig(
            *first,
            rank=found.r,
            alpha=float(found.lora_alpha),
            dropout=float(adapter.peft_config.get("lora_dropout", 0.0)),
            target_modules=tuple(names),
            shapes={name: shape for name, shape in shapes.items() if shape != first} or None,
            use_rslora=found.use_rslora,
        )
    except ValueError as error:
        raise FormatError(f"{source}: {short(str(error))}") from None


def read_factors(data: bytes, config: MicroLoRAConfig, source: str) -> Factors:
    """The factors in safetensors bytes, if they are those of the config, module for module.

    Raises FormatError naming the key.
    """
    tensors = read_tensors(data, source)
    for name in (*tensors.embeddings, *tensors.whole, *tensors.lora_biases):
        raise FormatError(f"{source}: {PREFIX}{short(name)}: expected {_PLAIN}")
    factors = tensors.factors
    for name in config.target_modules:
        if name not in factors:
            raise FormatError(f"{source}: {PREFIX}{name}{A_SUFFIX}: missing")
    for name, (A, B) in factors.items():
        if name not in config.target_modules:
            raise FormatError(f"{source}: {short(name)}: expected modules of the config only")
        d_in, d_out = config.shape(name)
        want = ((config.rank, d_in), (d_out, config.rank))
        if (A.shape, B.shape) != want:
            raise FormatError(
                f"{source}: {name}: expected A {list(want[0])} and B {list(want[1])},"
                f" got {list(A.shape)} and {list(B.shape)}"
            )
    return factors


# ---- folders ----------------------------------------------------------------


def load(files: Folder) -> tuple[Adapter, MicroLoRAConfig, State]:
    """What a folder holds, if a MicroLoRA can hold it. Raises FormatError naming file and key."""
    _refuse(files.config)
    adapter = adapter_of(files)
    config, state = config_of(adapter, files.config.source), State({}, {})
    if files.state is not None:
        config, state = _read_state(files, files.state, config)
    return adapter, config, state


def _refuse(config: PeftConfig) -> None:
    for key in _LACKS:
        if config.raw.get(key):
            raise config.refused(key, _PLAIN)
    if config.raw.get("bias", "none") != "none":
        raise config.refused("bias", "none")


def state_bytes(config: MicroLoRAConfig, state: State, weights: bytes) -> bytes:
    """The state file beside those weights."""
    own = {
        "weights_sha256": digest(weights),
        "seed": config.seed,
        "gradient_checkpointing": config.gradient_checkpointing,
        "baselines": state.baselines,
    }
    steps = {name: np.array([count], np.int64) for name, count in state.steps.items()}
    return to_bytes(steps, STATE_KEY, json.dumps(own))


def read_own(files: Folder) -> dict[str, Any]:
    """What the state file says beside the step counts, {} where there is no such file.

    Raises FormatError where it is damaged or belongs to other weights.
    """
    if files.state is None:
        return {}
    source = str(files.path / STATE_FILE)
    metadata, _ = read_header(io.BytesIO(files.state), source)
    own = read_json(metadata.get(STATE_KEY, "").encode(), f"{source}: {STATE_KEY}")
    if own.get("weights_sha256") != digest(files.weights):
        raise FormatError(f"{source}: it belongs to other weights")
    return own


def _read_state(
    files: Folder, data: bytes, config: MicroLoRAConfig
) -> tuple[MicroLoRAConfig, State]:
    """The config with the engine's own values, and the state, if of these weights."""
    source = str(files.path / STATE_FILE)
    try:
        own = read_own(files)
        names = ("seed", "gradient_checkpointing")
        config = replace(config, **{name: own[name] for name in names if name in own})
        counts, _ = from_bytes(data, source)
        for name, count in counts.items():
            if count.shape != (1,) or count.dtype != np.int64 or count[0] < 0:
                raise FormatError(f"{source}: {short(name)}: expected a step count")
        steps = {name: int(count[0]) for name, count in counts.items()}
        return config, State(steps, _read_baselines(source, own))
    except ValueError as error:
        why = error if isinstance(error, FormatError) else f"{source}: {error}"
        warnings.warn(f"engine state dropped: {why}", stacklevel=4)
        return config, State({}, {})


def _read_baselines(source: str, own: dict[str, Any]) -> dict[str, float]:
    found = own.get("baselines", {})
    if not isinstance(found, dict):
        raise FormatError(f"{source}: baselines: expected an object, got {short(repr(found))}")
    for name, value in found.items():
        if not is_quality(value):
            raise FormatError(
                f"{source}: baselines: {short(name)}: expected a number in 0..1,"
                f" got {short(repr(value))}"
            )
    return {name: float(value) for name, value in found.items()}
