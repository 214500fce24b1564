"""What EWC keeps, as arrays by name and as a file.

A key is ``form.field.slice.name``: name a slot or a module (which may hold dots). first and
second: the Fisher information of a record; anchor_A, anchor_B: its anchor; mean_first,
mean_second: the moving average, over ``samples`` (int64 [1], slice 0). All others float32.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from lora_engine import atomic, safetensors_file
from lora_engine.adapters.micro_lora import MicroLoRA
from lora_engine.adapters.pool import AdapterPool
from lora_engine.errors import FormatError
from lora_engine.learning.ewc_pool import PoolEwc, SlotState
from lora_engine.safetensors_file import read_json, short

if TYPE_CHECKING:
    from lora_engine.learning.ewc import EWC

_RECORD = ("first", "second", "anchor_A", "anchor_B")
_MEAN = ("mean_first", "mean_second")
_SETTINGS = ("ewc_lambda", "gamma", "form", "fisher_samples")
_KEY = "lora_engine_ewc"  # of the file's metadata

Arrays = dict[str, np.ndarray]


# ---- to arrays --------------------------------------------------------------


def to_arrays(ewc: EWC) -> Arrays:
    arrays: Arrays = {}
    for pool, held in ewc._pools.items():
        for slot, state in held.states().items():
            _put(arrays, ewc.form, str(ewc._name(pool, slot)), state)
    return arrays


def _put(arrays: Arrays, form: str, name: str, state: SlotState) -> None:
    fields = [*zip(_RECORD, state.record or (), strict=False)]
    fields += zip(_MEAN, state.mean or (), strict=False)
    for field, parts in fields:
        for s, part in enumerate(parts):
            if part is not None:
                arrays[f"{form}.{field}.{s}.{name}"] = part
    if state.mean:
        arrays[f"{form}.samples.0.{name}"] = np.array([state.samples], np.int64)


# ---- from arrays ------------------------------------------------------------


class _Expected:
    """The shapes of a slot's fields, by slice; None: the slice is missing."""

    def __init__(self, pool: AdapterPool, slot: int, form: str) -> None:
        width = pool.in_features
        pairs = [
            None if not rank else ((rank, width), (out, rank))
            for rank, out in zip(pool.ranks(slot), pool.slices, strict=True)
        ]
        first: list[Any] = [p and p[0] for p in pairs]
        second: list[Any] = [p and p[1] for p in pairs]
        self.shapes: dict[str, list[Any]] = {"anchor_A": first, "anchor_B": second}
        if form == "delta":
            first = [p and (p[1][0],) for p in pairs]
            second = [p and (width,) for p in pairs]
        for prefix in ("", "mean_"):
            self.shapes |= {f"{prefix}first": first, f"{prefix}second": second}


def _split(key: Any, form: str) -> tuple[str, str, str]:
    """(field, slice, name) of a key."""
    parts = key.split(".", 3) if isinstance(key, str) else []
    if len(parts) != 4 or parts[1] not in (*_RECORD, *_MEAN, "samples"):
        raise ValueError(f"EWC state: {short(repr(key))}: expected a key of EWC.state")
    if parts[0] != form:
        raise ValueError(f"EWC state: {short(key)}: expected form {form}, got {short(parts[0])}")
    return parts[1], parts[2], parts[3]


def _array(key: str, value: Any, shape: tuple[int, ...], signed: bool) -> np.ndarray:
    if not isinstance(value, np.ndarray) or value.dtype != np.float32:
        got = getattr(value, "dtype", type(value).__name__)
        raise TypeError(f"EWC state: {short(key)}: expected a float32 array, got {got}")
    if value.shape != shape:
        raise ValueError(
            f"EWC state: {short(key)}: expected shape {list(shape)}, got {list(value.shape)}"
        )
    if not np.isfinite(value).all() or not (signed or (value >= 0).all()):
        want = "finite values" if signed else "finite values of 0 or more"
        raise ValueError(f"EWC state: {short(key)}: expected {want}, got others")
    return value.copy()


def _group(ewc: EWC, name: str, fields: Arrays) -> tuple[PoolEwc, int, SlotState]:
    """One slot's state from its fields, by ``field.slice``; all are used, or it raises."""
    held, slot = _place(ewc, name)
    shapes = _Expected(held.pool, slot, ewc.form).shapes
    left = dict(fields)

    def take(names: tuple[str, ...]) -> Any:
        if not any(key.split(".")[0] in names for key in left):
            return None
        found = []
        for field in names:
            parts: list[Any] = []
            for s, shape in enumerate(shapes[field]):
                key = f"{field}.{s}"
                if shape is None:
                    parts.append(None)
                elif key not in left:
                    raise ValueError(f"EWC state: {ewc.form}.{key}.{short(name)}: missing")
                else:
                    full = f"{ewc.form}.{key}.{name}"
                    signed = field.startswith("anchor")
                    parts.append(_array(full, left.pop(key), shape, signed))
            found.append(parts)
        return tuple(found)

    count = left.pop("samples.0", None)
    record, mean = take(_RECORD), take(_MEAN)
    if left:
        raise ValueError(f"EWC state: {short(name)}: {short(min(left))}: no such slice")
    samples = 0
    if mean or count is not None:
        good = isinstance(count, np.ndarray) and count.dtype == np.int64 and count.shape == (1,)
        if not mean or not good or count[0] < 1:  # type: ignore[index]
            raise ValueError(
                f"EWC state: {short(name)}: expected a mean and the number of its samples"
            )
        samples = int(count[0])  # type: ignore[index]
    return held, slot, SlotState(record, mean, samples)


def _place(ewc: EWC, name: str) -> tuple[PoolEwc, int]:
    if isinstance(ewc.target, MicroLoRA):
        return ewc._find("load_state", name)
    if not name.isascii() or not name.isdigit() or len(name) > 10:
        raise ValueError(f"EWC state: {short(repr(name))}: expected a slot")
    return ewc._find("load_state", int(name))


def from_arrays(ewc: EWC, arrays: Mapping[str, np.ndarray]) -> None:
    groups: dict[str, Arrays] = {}
    for key, value in arrays.items():
        field, part, name = _split(key, ewc.form)
        groups.setdefault(name, {})[f"{field}.{part}"] = value
    loaded: dict[PoolEwc, dict[int, SlotState]] = {held: {} for held in ewc._pools.values()}
    for name, fields in groups.items():
        held, slot, state = _group(ewc, name, fields)
        loaded[held][slot] = state
    for held, states in loaded.items():
        held.load(states)


# ---- one slot, for an AdapterStore, which knows no slot by number --------------

_ANY = "0"


def to_slot_arrays(ewc: EWC, slot: int) -> Arrays:
    """As of slot 0."""
    held, slot = ewc._find("slot_state", slot)
    arrays: Arrays = {}
    _put(arrays, ewc.form, _ANY, held.state(slot))
    return arrays


def from_slot_arrays(ewc: EWC, slot: int, arrays: Mapping[str, np.ndarray]) -> None:
    fields: Arrays = {}
    for key, value in arrays.items():
        field, part, name = _split(key, ewc.form)
        if name != _ANY:
            raise ValueError(f"EWC state: {short(key)}: expected that of one slot")
        fields[f"{field}.{part}"] = value
    held, slot, state = _group(ewc, str(slot), fields)
    held.put(slot, state)


# ---- files ------------------------------------------------------------------


def _digest(ewc: EWC, names: set[str]) -> str:
    """Of the weights of a MicroLoRA, or of those slots of a pool."""
    hashed = hashlib.sha256()
    for name in sorted(ewc._where if isinstance(ewc.target, MicroLoRA) else names):
        held, slot = _place(ewc, name)
        A, B, scaling = held.pool._storage.get(slot)
        hashed.update(f"{name} {scaling!r} {held.pool.ranks(slot)}\n".encode())
        for factor in (*A, *B):
            if factor is not None:
                hashed.update(np.ascontiguousarray(factor).tobytes())
    return hashed.hexdigest()


def _names(arrays: Mapping[str, np.ndarray], form: str) -> set[str]:
    return {_split(key, form)[2] for key in arrays}


def save(ewc: EWC, file: str | os.PathLike[str]) -> None:
    arrays = to_arrays(ewc)
    own: dict[str, Any] = {name: getattr(ewc, name) for name in _SETTINGS}
    own["weights_sha256"] = _digest(ewc, _names(arrays, ewc.form))
    data = safetensors_file.to_bytes(arrays, _KEY, json.dumps(own))

    def write(to: BinaryIO) -> None:
        to.write(data)

    atomic.replace_file(Path(os.path.realpath(file)), write)


def _settings(text: str, source: str) -> dict[str, Any]:
    own = read_json(text.encode(), f"{source}: {_KEY}")
    kinds: dict[str, Any] = {"form": str, "fisher_samples": int, "weights_sha256": str}
    for name in (*_SETTINGS, "weights_sha256"):
        value = own.get(name)
        if isinstance(value, bool) or not isinstance(value, kinds.get(name, (int, float))):
            raise FormatError(f"{source}: {_KEY}: {name}: expected a setting of EWC")
    return own


def load(file: str | os.PathLike[str], lora_or_pool: MicroLoRA | AdapterPool) -> EWC:
    from lora_engine.learning.ewc import EWC
    from lora_engine.safetensors_file import open_file

    source = os.fspath(file)
    with open_file(Path(os.path.realpath(file))) as opened:
        arrays, metadata = safetensors_file.from_bytes(opened.read(), source)
    own = _settings(metadata.get(_KEY, ""), source)
    try:
        ewc = EWC(lora_or_pool, **{name: own[name] for name in _SETTINGS})
        digest = _digest(ewc, _names(arrays, ewc.form))
    except (ValueError, OverflowError, IndexError) as error:
        raise FormatError(f"{source}: {short(str(error))}") from None
    if own["weights_sha256"] != digest:
        raise FormatError(f"{source}: it belongs to other weights")
    try:
        from_arrays(ewc, arrays)
    except TypeError as error:
        raise FormatError(f"{source}: {short(str(error))}") from None
    except ValueError as error:
        raise ValueError(f"{source}: {short(str(error))}") from None
    return ewc
