"""PEFT's adapter folder: adapter_config.json and adapter_model.safetensors.

What the engine knows beyond PEFT lies beside them in a state file that carries
the weights' digest. Files are read as hostile: sizes are checked before
anything is allocated, and safetensors' own parser checks the rest.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from lora_engine.adapters import atomic
from lora_engine.adapters.config import MicroLoRAConfig
from lora_engine.errors import FormatError

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
STATE_FILE = "lora_engine_state.safetensors"
FILES = frozenset({CONFIG_FILE, WEIGHTS_FILE, STATE_FILE})

MAX_JSON = 1 << 20
MAX_HEADER = 16 << 20
MAX_RANK = 65536

_PREFIX, _A, _B = "base_model.model.", ".lora_A.weight", ".lora_B.weight"
_DTYPES: dict[str, Any] = {"F32": np.float32, "F16": np.float16, "F64": np.float64, "I64": np.int64}

Tensors = dict[str, np.ndarray]


# ---- safetensors ------------------------------------------------------------


def to_bytes(tensors: Tensors, metadata: dict[str, str] | None = None) -> bytes:
    """safetensors bytes; the same tensors give the same bytes."""
    from safetensors.numpy import save

    contiguous = {name: np.ascontiguousarray(tensors[name]) for name in sorted(tensors)}
    return save(contiguous, metadata=metadata or {"format": "pt"})


def _check_header(data: bytes, source: str) -> int:
    """Length of the JSON header, checked against the cap and the data."""
    if len(data) < 8:
        raise FormatError(f"{source}: expected safetensors, got {len(data)} bytes")
    (length,) = struct.unpack("<Q", data[:8])
    if length > min(MAX_HEADER, len(data) - 8):
        raise FormatError(
            f"{source}: header: expected at most {min(MAX_HEADER, len(data) - 8)} bytes, got {length}"
        )
    return int(length)


def from_bytes(data: bytes, source: str) -> Tensors:
    """The tensors of safetensors bytes; bfloat16 is widened to float32.

    Raises FormatError naming the source and the key.
    """
    import safetensors

    if not isinstance(data, (bytes, bytearray, memoryview)):
        raise TypeError(f"{source}: data: expected bytes, got {type(data).__name__}")
    data = bytes(data)
    _check_header(data, source)
    try:
        entries = safetensors.deserialize(data)
    except safetensors.SafetensorError as error:
        raise FormatError(f"{source}: expected safetensors: {error}") from None
    tensors = {}
    for name, entry in entries:
        shape, raw = entry["shape"], entry["data"]
        if entry["dtype"] == "BF16":
            wide = np.frombuffer(raw, np.uint16).astype(np.uint32) << np.uint32(16)
            tensors[name] = wide.view(np.float32).reshape(shape)
        elif entry["dtype"] in _DTYPES:
            tensors[name] = np.frombuffer(raw, _DTYPES[entry["dtype"]]).reshape(shape)
        else:
            raise FormatError(f"{source}: {name}: dtype {entry['dtype']} is not supported")
    return tensors


def _metadata(data: bytes, source: str) -> dict[str, str]:
    header = json.loads(data[8 : 8 + _check_header(data, source)])
    return {str(k): str(v) for k, v in header.get("__metadata__", {}).items()}


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
    for key, tensor in tensors.items():
        suffix = next((s for s in (_A, _B) if key.endswith(s)), None)
        if suffix is None or not key.startswith(_PREFIX):
            raise FormatError(
                f"{source}: {key}: expected a key like {_PREFIX}<module>{_A} or ...{_B}"
            )
        if tensor.ndim != 2 or tensor.dtype.kind != "f" or 0 in tensor.shape:
            raise FormatError(
                f"{source}: {key}: expected a float matrix, got {tensor.dtype} {list(tensor.shape)}"
            )
        with np.errstate(over="ignore"):
            values = tensor.astype(np.float32)
        if not np.isfinite(values).all():
            raise FormatError(f"{source}: {key}: expected finite numbers, got NaN or Inf")
        found.setdefault(key[len(_PREFIX) : -len(suffix)], {})[suffix] = values
    if not found:
        raise FormatError(f"{source}: expected at least one adapted module, got none")
    factors = {}
    for name, pair in found.items():
        for suffix in (_A, _B):
            if suffix not in pair:
                raise FormatError(f"{source}: {_PREFIX}{name}{suffix}: missing")
        A, B = pair[_A], pair[_B]
        if A.shape[0] != B.shape[1] or A.shape[0] > MAX_RANK:
            raise FormatError(
                f"{source}: {_PREFIX}{name}{_B}: expected shape [out, {A.shape[0]}] of a rank of at"
                f" most {MAX_RANK}, got {list(B.shape)}"
            )
        factors[name] = (A, B)
    return factors


def check_modules(
    factors: dict[str, tuple[np.ndarray, np.ndarray]], config: MicroLoRAConfig, source: str
) -> None:
    """Raises FormatError unless the factors are those of the config, module for module."""
    missing = [name for name in config.target_modules if name not in factors]
    extra = [name for name in factors if name not in config.target_modules]
    if missing or extra:
        raise FormatError(
            f"{source}: expected modules {list(config.target_modules)}, got {list(factors)}"
        )
    for name, (A, B) in factors.items():
        d_in, d_out = config.shape(name)
        want = ((config.rank, d_in), (d_out, config.rank))
        if (A.shape, B.shape) != want:
            raise FormatError(
                f"{source}: {name}: expected A {list(want[0])} and B {list(want[1])},"
                f" got {list(A.shape)} and {list(B.shape)}"
            )


# ---- folders ----------------------------------------------------------------


def _peft_config(config: MicroLoRAConfig) -> dict[str, Any]:
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": None,
        "r": config.rank,
        "lora_alpha": config.alpha,
        "lora_dropout": config.dropout,
        "target_modules": list(config.target_modules),
        "use_rslora": config.use_rslora,
        "rank_pattern": {},
        "alpha_pattern": {},
        "fan_in_fan_out": False,
        "bias": "none",
        "inference_mode": True,
        "init_lora_weights": True,
        "modules_to_save": None,
    }


def save(
    folder: str | os.PathLike[str], config: MicroLoRAConfig, tensors: Tensors, state: Tensors
) -> None:
    """Replaces the folder whole; other files in it are kept."""
    weights = to_bytes(tensors)
    own = {"seed": config.seed, "gradient_checkpointing": config.gradient_checkpointing}
    metadata = {"weights_sha256": hashlib.sha256(weights).hexdigest(), "config": json.dumps(own)}

    def write(to: Path) -> None:
        text = json.dumps(_peft_config(config), indent=2) + "\n"
        atomic.write_file(to / CONFIG_FILE, text.encode())
        atomic.write_file(to / WEIGHTS_FILE, weights)
        atomic.write_file(to / STATE_FILE, to_bytes(state, metadata))

    atomic.replace_folder(Path(folder), write, FILES)


def _read_config(path: Path) -> dict[str, Any]:
    if path.stat().st_size > MAX_JSON:
        raise FormatError(f"{path}: expected at most {MAX_JSON} bytes, got {path.stat().st_size}")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path}: expected JSON: {error}") from None
    if not isinstance(config, dict):
        raise FormatError(f"{path}: expected a JSON object, got {type(config).__name__}")
    return config


def _to_config(
    path: Path, raw: dict[str, Any], factors: dict[str, tuple[np.ndarray, np.ndarray]]
) -> MicroLoRAConfig:
    def bad(key: str, expected: str) -> FormatError:
        return FormatError(f"{path}: {key}: expected {expected}, got {raw.get(key)!r}"[:400])

    def number(key: str, default: Any) -> float:
        value = raw.get(key, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise bad(key, "a number")
        return float(value)

    if raw.get("peft_type") != "LORA":
        raise bad("peft_type", "LORA")
    for key in ("use_dora", "rank_pattern", "alpha_pattern", "modules_to_save", "lora_bias"):
        if raw.get(key):
            raise bad(key, "nothing: a MicroLoRA is plain LoRA of one rank and alpha")
    if raw.get("bias", "none") != "none":
        raise bad("bias", "none")
    rank = number("r", None)
    if rank != int(rank) or not 1 <= rank <= MAX_RANK:
        raise bad("r", f"a whole number from 1 to {MAX_RANK}")
    shapes = {name: (A.shape[1], B.shape[0]) for name, (A, B) in factors.items()}
    first = next(iter(shapes.values()))
    listed = raw.get("target_modules")
    order = [m for m in listed if m in factors] if isinstance(listed, list) else []
    names = [*order, *(name for name in factors if name not in order)]
    try:
        config = MicroLoRAConfig(
            *first,
            rank=int(rank),
            alpha=number("lora_alpha", 8),
            dropout=number("lora_dropout", 0.0),
            target_modules=tuple(names),
            shapes={name: shape for name, shape in shapes.items() if shape != first} or None,
            use_rslora=bool(raw.get("use_rslora", False)),
        )
    except ValueError as error:
        raise FormatError(f"{path}: {error}") from None
    return config


def _read_state(folder: Path, weights: bytes) -> tuple[dict[str, Any], Tensors]:
    """(own config values, tensors), empty where the state is of other weights."""
    path = folder / STATE_FILE
    if not path.is_file():
        return {}, {}
    try:
        data = path.read_bytes()
        state = from_bytes(data, str(path))
        metadata = _metadata(data, str(path))
        own = json.loads(metadata.get("config", "{}"))
        if metadata.get("weights_sha256") != hashlib.sha256(weights).hexdigest():
            raise FormatError(f"{path}: it belongs to other weights")
        if not isinstance(own, dict) or any(v.shape != (1,) for v in state.values()):
            raise FormatError(f"{path}: expected step counts")
    except (FormatError, ValueError) as error:
        warnings.warn(f"engine state dropped: {error}", stacklevel=4)
        return {}, {}
    return own, state


def load(folder: str | os.PathLike[str]) -> tuple[MicroLoRAConfig, Tensors, Tensors]:
    """(config, tensors, state) of an adapter folder of one rank.

    Raises FormatError naming file and key, FileNotFoundError.
    """
    path = Path(os.path.realpath(folder))
    atomic.recover(path)
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (path / name).is_file():
            raise FileNotFoundError(f"{path / name}: expected an adapter folder's file, got none")
    raw = _read_config(path / CONFIG_FILE)
    weights = (path / WEIGHTS_FILE).read_bytes()
    source = str(path / WEIGHTS_FILE)
    tensors = from_bytes(weights, source)
    factors = from_tensors(tensors, source)
    config = _to_config(path / CONFIG_FILE, raw, factors)
    check_modules(factors, config, source)
    own, state = _read_state(path, weights)
    seed, checkpointing = own.get("seed", 0), own.get("gradient_checkpointing", False)
    if isinstance(seed, int) and seed >= 0:
        from dataclasses import replace

        config = replace(config, seed=seed, gradient_checkpointing=bool(checkpointing))
    return config, tensors, state
