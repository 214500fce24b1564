"""One user's adapter as a file of an AdapterStore.

safetensors. Metadata: ``user``, ``scaling``, and ``digest``: SHA-256 of the whole file with
zeros in the digest's place. Tensors: ``lora_A.<slice>`` [r, in] and ``lora_B.<slice>`` [out, r]
in the pool's dtype, none for a slice that the adapter lacks; ``state.<name>``: what is kept
beside the weights. Files are read as hostile.
"""

from __future__ import annotations

import hashlib
import io
import math
import os
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from lora_engine.adapters.peft_config import MAX_RANK
from lora_engine.errors import FormatError
from lora_engine.safetensors_file import (
    Header,
    Raw,
    open_file,
    pack,
    read_header,
    short,
    to_array,
)

MAX_USER = 1 << 16  # bytes
MAX_FILE = 1 << 30


_NO_DIGEST = "0" * 64
_STORED = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}

Arrays = dict[str, np.ndarray]


class Shape(NamedTuple):
    """What the adapters of a store have in common."""

    in_features: int
    slices: tuple[int, ...]
    dtype: str


class Stored(NamedTuple):
    """An adapter by slice (None for one that it lacks), and what is kept beside it."""

    A: list[Any]
    B: list[Any]
    scaling: float
    state: Arrays


# ---- names ------------------------------------------------------------------


def user_hash(user: Any) -> bytes:
    """SHA-256 of a user's id: all that reaches the file system. Raises TypeError, ValueError."""
    if not isinstance(user, str):
        raise TypeError(f"AdapterStore: user: expected text, got {type(user).__name__}")
    try:
        data = user.encode()
    except UnicodeEncodeError:
        raise ValueError("AdapterStore: user: expected text, got half a surrogate pair") from None
    if len(data) > MAX_USER:
        raise ValueError(f"AdapterStore: user: expected at most {MAX_USER} bytes, got {len(data)}")
    return hashlib.sha256(data).digest()


def path_of(folder: str, hashed: bytes) -> str:
    """In one of 4096 folders: of a million files, 244 each."""
    name = hashed.hex()
    return f"{folder}/{name[:3]}/{name[3:]}.safetensors"


# ---- writing ----------------------------------------------------------------


def _stored(array: np.ndarray, dtype: str) -> np.ndarray | Raw:
    if dtype == "bfloat16":  # the values are of it: the lower halves are zero
        high = np.ascontiguousarray(array, np.float32).view(np.uint32) >> np.uint32(16)
        return Raw("BF16", array.shape, high.astype(np.uint16).reshape(-1).view(np.uint8))
    return array.astype(dtype)


def encode(user: str, stored: Stored, dtype: str) -> list[bytes | memoryview]:
    """The parts of the file, in their order."""
    tensors: dict[str, np.ndarray | Raw] = {}
    for name, factors in (("lora_A", stored.A), ("lora_B", stored.B)):
        for s, factor in enumerate(factors):
            if factor is not None:
                tensors[f"{name}.{s}"] = _stored(factor, dtype)
    for name, array in stored.state.items():
        tensors[f"state.{name}"] = array
    metadata = {"digest": _NO_DIGEST, "user": user, "scaling": repr(stored.scaling)}
    head, *data = pack(tensors, metadata)
    head = bytes(head)
    return [head.replace(_quoted(_NO_DIGEST), _quoted(_digest(head, data)), 1), *data]


def _quoted(digest: str) -> bytes:
    # A user's id cannot hold this: JSON escapes quotes.
    return f'"digest":"{digest}"'.encode()


def _digest(head: bytes, data: list[Any]) -> str:
    hashed = hashlib.sha256(head)
    for part in data:
        hashed.update(part)
    return hashed.hexdigest()


# ---- reading ----------------------------------------------------------------


def read(path: str) -> bytes | None:
    """The bytes of a file, None where there is none. Raises FormatError, OSError."""
    try:
        opened = open_file(path)
    except FileNotFoundError:
        return None
    with opened:
        size = os.fstat(opened.fileno()).st_size
        if size > MAX_FILE:
            raise FormatError(f"{path}: expected at most {MAX_FILE} bytes, got {size}")
        return opened.read()


def decode(data: bytes, user: str, shape: Shape, source: str) -> Stored:
    """What ``encode`` wrote for that user. Raises FormatError naming the source and the key."""
    header = read_header(io.BytesIO(data), source)
    metadata = header.metadata
    _check_digest(data, metadata, source)
    if metadata.get("user") != user:
        got = short(repr(metadata.get("user")))
        raise FormatError(f"{source}: user: expected {short(repr(user))}, got {got}")
    try:
        scaling = float(metadata.get("scaling", ""))
    except ValueError:
        scaling = math.nan
    if not math.isfinite(scaling):
        raise FormatError(f"{source}: scaling: expected a finite number")
    for name in header.entries:
        if not _known(name, len(shape.slices)):
            raise FormatError(f"{source}: {short(name)}: expected no such key")
    A, B = _factors(data, header, shape, source)
    return Stored(A, B, scaling, _state(data, header, source))


def _check_digest(data: bytes, metadata: Mapping[str, str], source: str) -> None:
    start = 8 + int.from_bytes(data[:8], "little")
    digest = metadata.get("digest", "")
    head = data[:start].replace(_quoted(digest), _quoted(_NO_DIGEST), 1)
    if _digest(head, [memoryview(data)[start:]]) != digest:
        raise FormatError(f"{source}: digest: expected that of the file, got another")


def _array(data: bytes, header: Header, name: str, source: str) -> np.ndarray:
    entry = header.entries[name]
    raw = np.frombuffer(data, np.uint8, entry.nbytes, entry.begin)
    aligned = raw.copy() if entry.begin % 8 else raw
    return to_array(Raw(entry.dtype, entry.shape, aligned), f"{source}: {short(name)}")


def _factors(data: bytes, header: Header, shape: Shape, source: str) -> tuple[list[Any], list[Any]]:
    A: list[Any] = []
    B: list[Any] = []
    for s, out in enumerate(shape.slices):
        names = (f"lora_A.{s}", f"lora_B.{s}")
        missing = [name for name in names if name not in header.entries]
        if len(missing) == 1:
            raise FormatError(f"{source}: {missing[0]}: missing")
        if missing:
            A.append(None)
            B.append(None)
            continue
        rank = header.entries[names[0]].shape[:1] or (0,)
        want = ((*rank, shape.in_features), (out, *rank))
        for name, its in zip(names, want, strict=True):
            entry = header.entries[name]
            if entry.shape != its or entry.dtype != _STORED[shape.dtype]:
                raise FormatError(
                    f"{source}: {name}: expected {shape.dtype} {list(its)},"
                    f" got {entry.dtype} {short(str(list(entry.shape)))}"
                )
        if not 1 <= rank[0] <= MAX_RANK:
            raise FormatError(f"{source}: {names[0]}: expected a rank of 1 to {MAX_RANK}")
        pair = [_array(data, header, name, source) for name in names]
        for name, factor in zip(names, pair, strict=True):
            if not np.isfinite(factor).all():
                raise FormatError(f"{source}: {name}: expected finite numbers, got NaN or Inf")
        A.append(pair[0].astype(np.float32, copy=False))
        B.append(pair[1].astype(np.float32, copy=False))
    if not any(a is not None for a in A):
        raise FormatError(f"{source}: lora_A.0: missing")
    return A, B


def _known(name: str, slices: int) -> bool:
    kind, _, s = name.partition(".")
    return kind == "state" or (kind in ("lora_A", "lora_B") and s in map(str, range(slices)))


def _state(data: bytes, header: Header, source: str) -> Arrays:
    return {
        name.removeprefix("state."): _array(data, header, name, source).copy()
        for name in header.entries
        if name.startswith("state.")
    }
