"""PEFT's adapter folder: adapter_config.json and adapter_model.safetensors.

What the engine knows beyond PEFT lies beside them in a state file that carries
the weights' digest. Files are read as hostile: sizes are checked before
anything is allocated.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lora_engine import atomic
from lora_engine.adapters.config import MAX_FLOAT, MicroLoRAConfig
from lora_engine.adapters.exploration import is_quality
from lora_engine.errors import FormatError
from lora_engine.safetensors_file import read_header, read_json, read_tensor, short

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
STATE_FILE = "lora_engine_state.safetensors"
STATE_KEY = "lora_engine"  # of the state file's metadata
FILES = frozenset({CONFIG_FILE, WEIGHTS_FILE, STATE_FILE})

MAX_JSON = 1 << 20
MAX_RANK = 65536

_PREFIX, _A, _B = "base_model.model.", ".lora_A.weight", ".lora_B.weight"
_DTYPES: dict[str, Any] = {"F32": np.float32, "F16": np.float16, "F64": np.float64, "I64": np.int64,
                           "U8": np.uint8}  # fmt: skip

Tensors = dict[str, np.ndarray]


# ---- safetensors ------------------------------------------------------------


def to_bytes(tensors: Tensors, key: str = "format", value: str = "pt") -> bytes:
    """safetensors bytes; the same tensors give the same bytes.

    key, value: the metadata, one entry: safetensors writes several in any order.
    """
    from safetensors.numpy import save

    contiguous = {name: np.ascontiguousarray(tensors[name]) for name in sorted(tensors)}
    return save(contiguous, metadata={key: value})


def from_bytes(data: bytes, source: str) -> tuple[Tensors, dict[str, str]]:
    """The tensors and the metadata of safetensors bytes; bfloat16 is widened to float32.

    Raises FormatError naming the source and the key.
    """
    if not isinstance(data, (bytes, bytearray, memoryview)):
        raise TypeError(f"{source}: data: expected bytes, got {type(data).__name__}")
    file = io.BytesIO(data)
    metadata, entries = read_header(file, source)
    tensors = {}
    for name, entry in entries.items():
        raw = read_tensor(file, entry, source)
        if raw.dtype == "BF16":
            wide = raw.data.view(np.uint16).astype(np.uint32) << np.uint32(16)
            values = wide.view(np.float32)
        elif raw.dtype in _DTYPES:
            values = raw.data.view(_DTYPES[raw.dtype])
        else:
            raise FormatError(f"{source}: {short(name)}: dtype {raw.dtype} is not supported")
        try:
            tensors[name] = values.reshape(raw.shape)
        except ValueError as error:
            raise FormatError(f"{source}: {short(name)}: {short(str(error))}") from None
    return tensors, metadata


# ---- factors by PEFT's key names --------------------------------------------


def to_tensors(factors: dict[str, tuple[np.ndarray, np.ndarray]]) -> Tensors:
    """{module: (A [r, in], B [out, r])} under PEFT's key names."""
    tensors = {}
    for name, (A, B) in factors.items():
        tensors[f"{_PREFIX}{name}{_A}"] = A
        tensors[f"{_PREFIX}{name}{_B}"] = B
    return tensors


def from_tensors(tensors: Tensors, source: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """{module: (A [r, in], B [out, r])}, float32. Raises FormatError naming the key."""
    found: dict[str, dict[str, np.ndarray]] = {}
    for key, tensor in sorted(tensors.items()):  # safetensors gives them in any order
        suffix = next((s for s in (_A, _B) if key.endswith(s)), None)
        if suffix is None or not key.startswith(_PREFIX):
            raise FormatError(
                f"{source}: {short(key)}: expected a key like {_PREFIX}<module>{_A} or ...{_B}"
            )
        if tensor.ndim != 2 or tensor.dtype.kind != "f" or 0 in tensor.shape:
            raise FormatError(
                f"{source}: {short(key)}: expected a float matrix,"
                f" got {tensor.dtype} {list(tensor.shape)}"
            )
        with np.errstate(over="ignore"):
            values = tensor.astype(np.float32)
        if not np.isfinite(values).all():
            raise FormatError(f"{source}: {short(key)}: expected finite numbers, got NaN or Inf")
        found.setdefault(key[len(_PREFIX) : -len(suffix)], {})[suffix] = values
    if not found:
        raise FormatError(f"{source}: expected at least one adapted module, got none")
    factors = {}
    for name, pair in found.items():
        for suffix in (_A, _B):
            if suffix not in pair:
                raise FormatError(f"{source}: {_PREFIX}{short(name)}{suffix}: missing")
        A, B = pair[_A], pair[_B]
        if A.shape[0] != B.shape[1] or A.shape[0] > MAX_RANK:
            raise FormatError(
                f"{source}: {_PREFIX}{short(name)}{_B}: expected shape [out, {A.shape[0]}] of a"
                f" rank of at most {MAX_RANK}, got {list(B.shape)}"
            )
        factors[name] = (A, B)
    return factors


def check_modules(
    factors: dict[str, tuple[np.ndarray, np.ndarray]], config: MicroLoRAConfig, source: str
) -> None:
    """Raises FormatError unless the factors are those of the config, module for module."""
    for name in config.target_modules:
        if name not in factors:
            raise FormatError(f"{source}: {_PREFIX}{name}{_A}: missing")
    for name in factors:
        if name not in config.target_modules:
            raise FormatError(f"{source}: {short(name)}: expected modules of the config only")
    for name, (A, B) in factors.items():
        d_in, d_out = config.shape(name)
        want = ((config.rank, d_in), (d_out, config.rank))
        if (A.shape, B.shape) != want:
            raise FormatError(
                f"{source}: {name}: expected A {list(want[0])} and B {list(want[1])},"
                f" got {list(A.shape)} and {list(B.shape)}"
            )


# ---- folders ----------------------------------------------------------------


def _peft_config(config: MicroLoRAConfig, kept: dict[str, Any]) -> dict[str, Any]:
    """kept: what the folder's config held when it was loaded."""
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": None,
        "rank_pattern": {},
        "alpha_pattern": {},
        "fan_in_fan_out": False,
        "bias": "none",
        "inference_mode": True,
        "init_lora_weights": True,
        "modules_to_save": None,
        **kept,
        "r": config.rank,
        "lora_alpha": config.alpha,
        "lora_dropout": config.dropout,
        "target_modules": list(config.target_modules),
        "use_rslora": config.use_rslora,
    }


class Folder(NamedTuple):
    """What an adapter folder holds."""

    config: MicroLoRAConfig
    tensors: Tensors
    steps: dict[str, int]  # adapts of each module
    baselines: dict[str, float]  # the mean quality of each module, where there is one
    peft_config: dict[str, Any]  # as read, with keys the engine has no use for
    beside: dict[str, bytes]  # the other files that were asked for


def digest(tensors: Tensors) -> str:
    """Of the weights, as their file has them."""
    return hashlib.sha256(to_bytes(tensors)).hexdigest()


def save(
    folder: str | os.PathLike[str], content: Folder, beside: Mapping[str, bytes] | None = None
) -> None:
    """Replaces the folder whole, with these files beside; other files in it are kept."""
    beside = beside or {}
    config = content.config
    weights = to_bytes(content.tensors)
    text = json.dumps(_peft_config(config, content.peft_config), indent=2) + "\n"
    own = {
        "weights_sha256": hashlib.sha256(weights).hexdigest(),
        "seed": config.seed,
        "gradient_checkpointing": config.gradient_checkpointing,
        "baselines": content.baselines,
    }
    state = {name: np.array([steps], np.int64) for name, steps in content.steps.items()}

    def write(to: Path) -> None:
        atomic.write_file(to / CONFIG_FILE, text.encode())
        atomic.write_file(to / WEIGHTS_FILE, weights)
        atomic.write_file(to / STATE_FILE, to_bytes(state, STATE_KEY, json.dumps(own)))
        for name, data in beside.items():
            atomic.write_file(to / name, data)

    atomic.replace_folder(Path(folder), write, FILES | beside.keys())


def _read_config(source: str, data: bytes) -> dict[str, Any]:
    if len(data) > MAX_JSON:
        raise FormatError(f"{source}: expected at most {MAX_JSON} bytes, got more")
    return read_json(data, source)


# Each makes of the same A and B another delta.
_PLAIN_LORA_LACKS = (
    "use_dora", "rank_pattern", "alpha_pattern", "modules_to_save", "lora_bias", "use_qalora",
    "use_bdlora", "alora_invocation_tokens", "arrow_config", "kasa_config",
)  # fmt: skip


def _to_config(
    source: str, raw: dict[str, Any], factors: dict[str, tuple[np.ndarray, np.ndarray]]
) -> MicroLoRAConfig:
    def bad(key: str, expected: str) -> FormatError:
        got = short(repr(raw.get(key)))
        return FormatError(f"{source}: {key}: expected {expected}, got {got}")

    def number(key: str, default: Any) -> float:
        value = raw.get(key, default)
        # Beyond float32 nothing is stored; NaN is beyond it too.
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise bad(key, "a number")
        if not abs(value) <= MAX_FLOAT:
            raise bad(key, "a number within float32's range")
        return float(value)

    if raw.get("peft_type") != "LORA":
        raise bad("peft_type", "LORA")
    for key in _PLAIN_LORA_LACKS:
        if raw.get(key):
            raise bad(key, "nothing: a MicroLoRA is plain LoRA of one rank and alpha")
    if raw.get("bias", "none") != "none":
        raise bad("bias", "none")
    rank, alpha = number("r", None), number("lora_alpha", 8)
    if rank != int(rank) or not 1 <= rank <= MAX_RANK:
        raise bad("r", f"a whole number from 1 to {MAX_RANK}")
    dropout = number("lora_dropout", 0.0)
    if not 0.0 <= dropout < 1.0:
        raise bad("lora_dropout", "0 <= p < 1")
    use_rslora = raw.get("use_rslora", False)
    if not isinstance(use_rslora, bool):
        raise bad("use_rslora", "true or false")
    shapes = {name: (A.shape[1], B.shape[0]) for name, (A, B) in factors.items()}
    listed = raw.get("target_modules")
    order = [m for m in listed if isinstance(m, str)] if isinstance(listed, list) else []
    names = list(dict.fromkeys([*(m for m in order if m in factors), *factors]))
    first = shapes[names[0]]
    try:
        return MicroLoRAConfig(
            *first,
            rank=int(rank),
            alpha=alpha,
            dropout=dropout,
            target_modules=tuple(names),
            shapes={name: shape for name, shape in shapes.items() if shape != first} or None,
            use_rslora=use_rslora,
        )
    except ValueError as error:
        raise FormatError(f"{source}: {short(str(error))}") from None


def _read_state(
    source: str, data: bytes, weights: bytes, config: MicroLoRAConfig
) -> tuple[MicroLoRAConfig, dict[str, int], dict[str, float]]:
    """The config with the engine's own values, step counts and baselines, if of these weights."""
    try:
        state, metadata = from_bytes(data, source)
        own = read_json(metadata.get(STATE_KEY, "").encode(), f"{source}: {STATE_KEY}")
        if own.get("weights_sha256") != hashlib.sha256(weights).hexdigest():
            raise FormatError(f"{source}: it belongs to other weights")
        names = ("seed", "gradient_checkpointing")
        config = replace(config, **{name: own[name] for name in names if name in own})
        for name, count in state.items():
            if count.shape != (1,) or count.dtype != np.int64 or count[0] < 0:
                raise FormatError(f"{source}: {short(name)}: expected a step count")
        steps = {name: int(count[0]) for name, count in state.items()}
        return config, steps, _read_baselines(source, own)
    except ValueError as error:
        why = error if isinstance(error, FormatError) else f"{source}: {error}"
        warnings.warn(f"engine state dropped: {why}", stacklevel=4)
        return config, {}, {}


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


def load(folder: str | os.PathLike[str], beside: Iterable[str] = ()) -> Folder:
    """What an adapter folder of one rank holds, and those of the files ``beside`` that are there.

    Raises FormatError naming file and key, FileNotFoundError.
    """
    path = Path(os.path.realpath(folder))
    limits = {CONFIG_FILE: MAX_JSON, WEIGHTS_FILE: None, STATE_FILE: None}
    files = atomic.read_files(path, {**limits, **dict.fromkeys(beside)})
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if name not in files:
            raise FileNotFoundError(f"{path / name}: expected an adapter folder's file, got none")
    raw = _read_config(str(path / CONFIG_FILE), files[CONFIG_FILE])
    source = str(path / WEIGHTS_FILE)
    tensors, _ = from_bytes(files[WEIGHTS_FILE], source)
    factors = from_tensors(tensors, source)
    config = _to_config(str(path / CONFIG_FILE), raw, factors)
    check_modules(factors, config, source)
    steps: dict[str, int] = {}
    baselines: dict[str, float] = {}
    if STATE_FILE in files:
        state = files[STATE_FILE]
        source = str(path / STATE_FILE)
        config, steps, baselines = _read_state(source, state, files[WEIGHTS_FILE], config)
    others = {name: data for name, data in files.items() if name not in FILES}
    return Folder(config, tensors, steps, baselines, raw, others)
