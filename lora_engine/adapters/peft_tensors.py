"""An adapter's tensors under PEFT's key names."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from lora_engine import reference
from lora_engine.adapters.adapter import Adapter, Array, LoraWeights
from lora_engine.adapters.config import is_name
from lora_engine.adapters.patterns import MAX_NAME
from lora_engine.adapters.peft_config import MAX_RANK, PeftConfig
from lora_engine.errors import FormatError
from lora_engine.safetensors_file import Raw, read_all, short, to_array

PREFIX = "base_model.model."
A_SUFFIX, B_SUFFIX = ".lora_A.weight", ".lora_B.weight"
_BIAS = ".lora_B.bias"
_EMBEDDING_A, _EMBEDDING_B = ".lora_embedding_A", ".lora_embedding_B"
_SUFFIXES = (A_SUFFIX, B_SUFFIX, _BIAS, _EMBEDDING_A, _EMBEDDING_B)
_WRAPPERS = {"modules_to_save", "original_module"}  # PEFT's, of which copies may be in a file
_FLOATS = {"F32": "float32", "BF16": "bfloat16", "F16": "float16", "F64": "float32"}

Factors = dict[str, tuple[Array, Array]]


class Tensors(NamedTuple):
    """What a file holds, by kind; all floats as float32."""

    factors: Factors  # {module: (A [r, in], B [out, r])}
    embeddings: Factors
    lora_biases: dict[str, Array]  # lora_B.bias by module
    whole: dict[str, np.ndarray]  # what is no part of an adapter, by path in the file
    dtype: str
    dtypes: dict[str, str]  # of tensors with another dtype, by key


# ---- reading ----------------------------------------------------------------


def _split(key: str, source: str) -> tuple[str, str]:
    """(module, suffix), or (path, "") for what is no part of an adapter."""
    path = key[len(PREFIX) :]
    if key.startswith(PREFIX) and is_name(path) and len(path) <= MAX_NAME:
        for suffix in _SUFFIXES:
            if path.endswith(suffix) and len(path) > len(suffix):
                return path[: -len(suffix)], suffix
        parts = path.split(".")
        if "lora_magnitude_vector" in parts:
            raise FormatError(f"{source}: {short(key)}: expected plain LoRA, got DoRA")
        if "token_adapter" in parts:
            raise FormatError(f"{source}: {short(key)}: trainable tokens are not read")
        if len(parts) > 1 and not any(part.startswith("lora_") for part in parts):
            return path, ""
    raise FormatError(
        f"{source}: {short(key)}: expected a key like {PREFIX}<module>{A_SUFFIX} or ...{B_SUFFIX}"
    )


def _as_float32(values: np.ndarray, where: str) -> Array:
    with np.errstate(over="ignore"):
        floats = values.astype(np.float32)
    if not np.isfinite(floats).all():
        raise FormatError(f"{where}: expected finite numbers, got NaN or Inf")
    return floats


def _pairs(found: dict[str, dict[str, Array]], a: str, b: str, source: str) -> Factors:
    """{module: (A, B)} of the keys with those suffixes."""
    factors = {}
    for name, parts in found.items():
        if a not in parts and b not in parts:
            continue
        for suffix in (a, b):
            if suffix not in parts:
                raise FormatError(f"{source}: {PREFIX}{short(name)}{suffix}: missing")
        A, B = parts[a], parts[b]
        if A.shape[0] != B.shape[1] or A.shape[0] > MAX_RANK:
            raise FormatError(
                f"{source}: {PREFIX}{short(name)}{b}: expected shape [out, {A.shape[0]}] of a"
                f" rank of at most {MAX_RANK}, got {list(B.shape)}"
            )
        factors[name] = (A, B)
    return factors


def _lora_biases(
    found: dict[str, dict[str, Array]], factors: Factors, source: str
) -> dict[str, Array]:
    biases = {}
    for name, parts in found.items():
        if _BIAS in parts:
            out = [len(factors[name][1])] if name in factors else "a module with lora_B.weight"
            if name not in factors or list(parts[_BIAS].shape) != out:
                got = list(parts[_BIAS].shape)
                raise FormatError(
                    f"{source}: {PREFIX}{short(name)}{_BIAS}: expected {out}, got {got}"
                )
            biases[name] = parts[_BIAS]
    return biases


def read_tensors(data: bytes, source: str) -> Tensors:
    """The tensors of safetensors bytes. Raises FormatError naming the source and the key."""
    found: dict[str, dict[str, Array]] = {}
    whole: dict[str, np.ndarray] = {}
    dtypes: dict[str, str] = {}
    counts: Counter[str] = Counter()
    for key, raw in read_all(data, source)[1].items():
        where = f"{source}: {short(key)}"
        module, suffix = _split(key, source)
        values = to_array(raw, where)
        if not suffix:
            whole[module] = _as_float32(values, where) if raw.dtype in _FLOATS else values.copy()
        else:
            dims, shape = (1, "vector") if suffix == _BIAS else (2, "matrix")
            if values.ndim != dims or raw.dtype not in _FLOATS or 0 in values.shape:
                got = f"{values.dtype} {list(values.shape)}"
                raise FormatError(f"{where}: expected a float {shape}, got {got}")
            found.setdefault(module, {})[suffix] = _as_float32(values, where)
            counts[_FLOATS[raw.dtype]] += 1
        if raw.dtype in _FLOATS:
            dtypes[key] = _FLOATS[raw.dtype]
    if not counts:
        raise FormatError(f"{source}: expected at least one adapted module, got none")
    dtype = max(counts, key=lambda name: (counts[name], name))
    others = {key: name for key, name in dtypes.items() if name != dtype}
    factors = _pairs(found, A_SUFFIX, B_SUFFIX, source)
    embeddings = _pairs(found, _EMBEDDING_A, _EMBEDDING_B, source)
    for name in embeddings:
        if name in factors:
            raise FormatError(f"{source}: {short(name)}: expected a linear layer or an embedding")
    lora_biases = _lora_biases(found, factors, source)
    return Tensors(factors, embeddings, lora_biases, whole, dtype, others)


def _sort_whole(
    tensors: Tensors, config: PeftConfig, source: str
) -> tuple[dict[str, Array], dict[str, np.ndarray], dict[str, np.ndarray]]:
    """(biases by module, modules_to_save by parameter, unused)."""
    biases, saved, unused = {}, {}, {}
    adapted = {*tensors.factors, *tensors.embeddings}
    for path, values in tensors.whole.items():
        module, _, leaf = path.rpartition(".")
        base = module.removesuffix(".base_layer")
        where = f"{source}: {PREFIX}{short(path)}"
        is_matrix = leaf == "weight" and values.ndim == 2 and values.dtype.kind == "f"
        if not _WRAPPERS.isdisjoint(module.split(".")):
            unused[path] = values
        elif (base in adapted) != (base != module):
            raise FormatError(f"{where}: expected a tensor of an adapter or of its base_layer")
        elif leaf == "bias" and f"{module}.weight" not in tensors.whole:
            if values.ndim != 1 or values.dtype.kind != "f":
                got = f"{values.dtype} {list(values.shape)}"
                raise FormatError(f"{where}: expected a float vector, got {got}")
            biases[base] = values
        elif is_matrix or leaf == "bias" or config.raw.get("modules_to_save"):
            saved[f"{base}.{leaf}"] = values
        else:
            raise FormatError(
                f"{where}: expected a key like {PREFIX}<module>{A_SUFFIX}, a bias, or a"
                " parameter of modules_to_save"
            )
    return biases, saved, unused


def to_adapter(tensors: Tensors, config: PeftConfig, source: str) -> Adapter:
    """Raises FormatError where the tensors are not of the config's ranks."""
    biases, saved, unused = _sort_whole(tensors, config, source)
    modules = {}
    for name, (A, B) in tensors.factors.items():
        bias, where = tensors.lora_biases.get(name), f"{source}: {PREFIX}{short(name)}{_BIAS}"
        if bias is None and config.lora_bias:
            raise FormatError(f"{where}: missing, where lora_bias is true")
        if bias is not None and not config.lora_bias:
            raise FormatError(f"{where}: expected none without lora_bias")
        scaling = _scaling_of(name, A, B, config, source)
        modules[name] = LoraWeights(
            A, B, scaling, None if bias is None else _bias_delta(bias, scaling)
        )
    embeddings = {
        name: LoraWeights(A, B, _scaling_of(name, A, B, config, source))
        for name, (A, B) in tensors.embeddings.items()
    }
    return Adapter(
        modules,
        embeddings,
        biases,
        config.raw,
        tensors.dtype,
        modules_to_save=saved,
        unused=unused,
        lora_biases=tensors.lora_biases,
        targets=frozenset({*modules, *embeddings}),
        dtypes=tensors.dtypes,
    )


def _scaling_of(name: str, A: Array, B: Array, config: PeftConfig, source: str) -> float:
    rank = config.rank_of(name)
    if A.shape[0] != rank:
        want = f"A {[rank, A.shape[1]]} and B {[B.shape[0], rank]}"
        got = f"{list(A.shape)} and {list(B.shape)}"
        raise FormatError(f"{source}: {short(name)}: expected {want}, got {got}")
    return config.scaling_of(name)


def _bias_delta(bias: Array, scaling: float) -> Array:
    return (bias * scaling).astype(np.float32)


# ---- writing ----------------------------------------------------------------


def _stored(values: np.ndarray, dtype: str, key: str) -> np.ndarray | Raw:
    """Rounded to the nearest number of the dtype; raises ValueError beyond its range."""
    if values.dtype.kind != "f":
        return values
    with np.errstate(over="ignore"):
        if dtype == "bfloat16":
            rounded: np.ndarray = reference.round_bfloat16(np.ascontiguousarray(values))
        else:
            rounded = values.astype(np.float16 if dtype == "float16" else np.float32)
    if not np.isfinite(rounded).all():
        raise ValueError(f"{key}: expected finite numbers within {dtype}'s range")
    if dtype != "bfloat16":
        return rounded
    halves = (rounded.view(np.uint32) >> np.uint32(16)).astype(np.uint16)
    return Raw("BF16", values.shape, halves.reshape(-1).view(np.uint8))


def _check(name: Any, weights: LoraWeights) -> None:
    if not is_name(name) or len(name) > MAX_NAME:
        raise ValueError(f"Adapter: expected a path of printable text, got {short(repr(name))}")
    A, B, scaling, bias = weights
    good = A.ndim == B.ndim == 2 and 1 <= A.shape[0] == B.shape[1] <= MAX_RANK
    if not good or A.dtype.kind != "f" or B.dtype.kind != "f" or 0 in (*A.shape, *B.shape):
        raise ValueError(
            f"Adapter: {name}: expected A [r, in] and B [out, r], floats,"
            f" got {A.dtype} {list(A.shape)} and {B.dtype} {list(B.shape)}"
        )
    if bias is not None and bias.shape != B.shape[:1]:
        raise ValueError(
            f"Adapter: {name}: bias_delta: expected {[len(B)]}, got {list(bias.shape)}"
        )
    if not np.isfinite(scaling):
        raise ValueError(f"Adapter: {name}: scaling: expected a finite number, got {scaling}")


def _lora_bias(name: str, w: LoraWeights, read: Array | None) -> Array:
    """PEFT's lora_B.bias of a module, zeros where it has none; read: the one it was loaded with."""
    if w.bias_delta is None:
        return np.zeros(len(w.B), np.float32)
    if read is not None and np.array_equal(w.bias_delta, _bias_delta(read, w.scaling)):
        return read
    if w.scaling == 0 and w.bias_delta.any():
        raise ValueError(f"Adapter: {name}: bias_delta: expected zeros where scaling is 0")
    return (w.bias_delta / (w.scaling or 1.0)).astype(np.float32)


def keys_of(module: str, embedding: bool) -> tuple[str, str]:
    """Those of a module's A and B."""
    suffixes = (_EMBEDDING_A, _EMBEDDING_B) if embedding else (A_SUFFIX, B_SUFFIX)
    return PREFIX + module + suffixes[0], PREFIX + module + suffixes[1]


def _key(path: str, leaf: str, adapted: Mapping[str, Any]) -> str:
    return f"{PREFIX}{path}.base_layer.{leaf}" if path in adapted else f"{PREFIX}{path}.{leaf}"


def to_tensors(adapter: Adapter) -> dict[str, np.ndarray | Raw]:
    """An adapter's tensors under PEFT's keys, in its dtypes. Raises ValueError."""
    adapted = {**adapter.modules, **adapter.embeddings}
    if len(adapted) != len(adapter.modules) + len(adapter.embeddings) or not adapted:
        raise ValueError("Adapter: expected modules and embeddings, none of them twice")
    has_bias = any(w.bias_delta is not None for w in adapter.modules.values())
    if has_bias and adapter.embeddings:
        raise ValueError("Adapter: bias_delta: expected none beside embeddings, as PEFT has none")
    for name, weights in adapted.items():
        _check(name, weights)
    tensors: dict[str, np.ndarray] = {}
    for name, w in adapter.modules.items():
        tensors |= zip(keys_of(name, False), w[:2], strict=True)
        if has_bias:
            tensors[PREFIX + name + _BIAS] = _lora_bias(name, w, adapter.lora_biases.get(name))
    for name, w in adapter.embeddings.items():
        tensors |= zip(keys_of(name, True), w[:2], strict=True)
    tensors |= {_key(path, "bias", adapted): bias for path, bias in adapter.biases.items()}
    for path, values in adapter.modules_to_save.items():
        module, _, leaf = path.rpartition(".")
        tensors[_key(module, leaf, adapted)] = values
    tensors |= {PREFIX + path: values for path, values in adapter.unused.items()}
    dtypes = adapter.dtypes
    return {k: _stored(t, dtypes.get(k, adapter.dtype), k) for k, t in tensors.items()}
