"""safetensors by their bytes: single tensors of a large file, converted by nobody.

The format: the length of the header (8 bytes, little endian), the header (JSON,
``{name: {"dtype", "shape", "data_offsets"}}``), the data, without holes. Files
are read as hostile: every entry is checked against the size of the file before
anything is read for it.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import stat
import struct
from collections.abc import Collection, Mapping
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lora_engine import atomic
from lora_engine.errors import FormatError

MAX_HEADER = 16 << 20

# Bits of an element, in the order in which safetensors writes the dtypes: the
# widest first, so that every tensor is aligned.
_BITS = {
    "U64": 64, "I64": 64, "F64": 64, "C64": 64, "F32": 32, "U32": 32, "I32": 32,
    "BF16": 16, "F16": 16, "U16": 16, "I16": 16, "F8_E5M2FNUZ": 8, "F8_E4M3FNUZ": 8,
    "F8_E8M0": 8, "F8_E4M3": 8, "F8_E5M2": 8, "I8": 8, "U8": 8,
    "F6_E3M2": 6, "F6_E2M3": 6, "F4": 4, "BOOL": 8,
}  # fmt: skip
_ORDER = {dtype: place for place, dtype in enumerate(_BITS)}
_COPY = 1 << 20
_MAX_DIMS = 32  # NumPy's limit before 2.0


class Raw(NamedTuple):
    """A tensor as a file holds it."""

    dtype: str  # as safetensors names it
    shape: tuple[int, ...]
    data: NDArray[np.uint8]  # its bytes, flat

    @property
    def nbytes(self) -> int:
        return self.data.nbytes


class Entry(NamedTuple):
    """Where a file holds a tensor."""

    dtype: str
    shape: tuple[int, ...]
    begin: int  # of its bytes, counted from the start of the file
    nbytes: int


class Header(NamedTuple):
    """What a file holds."""

    metadata: dict[str, str]
    entries: dict[str, Entry]


def short(text: str) -> str:
    """Text from a file as a message holds it."""
    return text if len(text) <= 200 else f"{text[:200]}..."


# ---- arrays -----------------------------------------------------------------

_NAMES = {"uint8": "U8", "float32": "F32", "bfloat16": "BF16", "float16": "F16"}
OF_NAMES = {name: dtype for dtype, name in _NAMES.items()}


def is_torch(array: Any) -> bool:
    return hasattr(array, "detach")


def raw_of(array: Any, where: str) -> Raw:
    """An array or CPU tensor of uint8 or a float to 32 bits, without a copy if it is contiguous.

    Raises TypeError, ValueError (device), FormatError (dtype).
    """
    if not is_torch(array) and not isinstance(array, np.ndarray):
        got = type(array).__name__
        raise TypeError(f"{where}: expected a NumPy array or a torch tensor, got {got}")
    dtype = _NAMES.get(str(array.dtype).removeprefix("torch."))
    if dtype is None:
        known = ", ".join(_NAMES)
        raise FormatError(f"{where}: expected one of {known}, got {array.dtype}")
    shape = tuple(array.shape)
    if is_torch(array):
        if array.device.type != "cpu" or array.is_sparse:
            raise ValueError(f"{where}: expected a dense CPU tensor, got {array.device}")
        import torch

        array = array.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
    data = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    data.flags.writeable = False  # of this view only
    return Raw(dtype, shape, data)


def to_numpy(raw: Raw) -> np.ndarray:
    """A read-only view. Not for bfloat16, which NumPy lacks."""
    return raw.data.view(OF_NAMES[raw.dtype]).reshape(raw.shape)


def to_torch(raw: Raw) -> Any:
    """A copy, as tensors cannot be read-only."""
    import torch

    dtype: torch.dtype = getattr(torch, OF_NAMES[raw.dtype])
    return torch.from_numpy(raw.data.copy()).view(dtype).reshape(raw.shape)


# ---- reading ----------------------------------------------------------------


def read_json(data: bytes, source: str) -> dict[str, Any]:
    """A JSON object in UTF-8 that names nothing twice. Raises FormatError."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise ValueError("a key is there twice")
        for text in (*found, *found.values()):
            if isinstance(text, str):
                text.encode()  # raises ValueError for half a surrogate pair
        return found

    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=once)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{source}: expected JSON: {short(str(error))}") from None
    if not isinstance(value, dict):
        raise FormatError(f"{source}: expected a JSON object, got {type(value).__name__}")
    return value


def is_count(value: Any) -> bool:
    """Whether a value from JSON is a whole number from 0 on, within int64."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 63


def _entry(raw: Any, start: int, size: int) -> Entry:
    """Raises ValueError saying what is wrong."""
    if not isinstance(raw, dict) or set(raw) != {"dtype", "shape", "data_offsets"}:
        raise ValueError("expected dtype, shape and data_offsets")
    dtype, shape, offsets = raw["dtype"], raw["shape"], raw["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _BITS:
        raise ValueError(f"dtype {short(repr(dtype))} is not known")
    if not isinstance(shape, list) or len(shape) > _MAX_DIMS or not all(map(is_count, shape)):
        raise ValueError(f"expected a shape, got {short(repr(shape))}")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(is_count, offsets)):
        raise ValueError(f"expected two offsets, got {short(repr(offsets))}")
    begin, end = offsets
    if not begin <= end <= size:
        raise ValueError(f"expected offsets in 0..{size}, got {short(repr(offsets))}")
    if prod(shape) * _BITS[dtype] != 8 * (end - begin):
        raise ValueError(f"expected {dtype} {short(repr(shape))}, got {end - begin} bytes")
    return Entry(dtype, tuple(shape), start + begin, end - begin)


def read_header(file: BinaryIO, source: str) -> Header:
    """The checked header of an open file. Raises FormatError naming the source and the key."""
    total = file.seek(0, os.SEEK_END)
    file.seek(0)
    if total < 8:
        raise FormatError(f"{source}: expected safetensors, got {total} bytes")
    (length,) = struct.unpack("<Q", file.read(8))
    most = min(MAX_HEADER, total - 8)
    if length > most:
        raise FormatError(f"{source}: header: expected at most {most} bytes, got {length}")
    names = read_json(file.read(length), f"{source}: header of safetensors")
    metadata = names.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise FormatError(f"{source}: __metadata__: expected text under each key of safetensors")
    start, size = 8 + length, total - 8 - length
    entries = {}
    for name, raw in names.items():
        try:
            entries[name] = _entry(raw, start, size)
        except ValueError as error:
            raise FormatError(f"{source}: {short(name)}: safetensors: {error}") from None
    at = start
    for name, entry in sorted(entries.items(), key=lambda e: (e[1].begin, e[1].nbytes)):
        if entry.begin != at:
            raise FormatError(f"{source}: {short(name)}: safetensors: expected data without holes")
        at += entry.nbytes
    if at != total:
        raise FormatError(f"{source}: expected safetensors of {at} bytes, got {total}")
    return Header(metadata, entries)


def read_tensor(file: BinaryIO, entry: Entry, source: str) -> Raw:
    """One tensor; its bytes are read-only. Raises FormatError if the file has become shorter."""
    file.seek(entry.begin)
    data = file.read(entry.nbytes)
    if len(data) != entry.nbytes:
        raise FormatError(f"{source}: expected {entry.nbytes} bytes more, got {len(data)}")
    return Raw(entry.dtype, entry.shape, np.frombuffer(data, np.uint8))


def open_file(path: str | Path) -> BinaryIO:
    """Opens a plain file. Raises FormatError for a pipe or a folder, OSError."""
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # no wait for a pipe
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise FormatError(f"{path}: expected a plain file")
    return open(handle, "rb")


_NUMPY: dict[str, Any] = {"F32": np.float32, "F16": np.float16, "F64": np.float64,
                          "I64": np.int64, "U8": np.uint8}  # fmt: skip


def to_array(raw: Raw, where: str) -> np.ndarray:
    """The tensor as NumPy has it, read-only; bfloat16 is widened to float32. Raises FormatError."""
    if raw.dtype == "BF16":
        wide = raw.data.view(np.uint16).astype(np.uint32) << np.uint32(16)
        values: np.ndarray = wide.view(np.float32)
    elif raw.dtype in _NUMPY:
        values = raw.data.view(_NUMPY[raw.dtype])
    else:
        raise FormatError(f"{where}: dtype {raw.dtype} is not supported")
    try:
        return values.reshape(raw.shape)
    except ValueError as error:
        raise FormatError(f"{where}: {short(str(error))}") from None


def read_all(data: bytes, source: str) -> tuple[dict[str, str], dict[str, Raw]]:
    """The metadata and the tensors of safetensors bytes, by name. Raises FormatError, TypeError."""
    if not isinstance(data, (bytes, bytearray, memoryview)):
        raise TypeError(f"{source}: data: expected bytes, got {type(data).__name__}")
    file = io.BytesIO(data)
    metadata, entries = read_header(file, source)
    return metadata, {name: read_tensor(file, entries[name], source) for name in sorted(entries)}


def from_bytes(data: bytes, source: str) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """The tensors and the metadata of safetensors bytes; bfloat16 is widened to float32.

    Raises FormatError naming the source and the key.
    """
    metadata, raws = read_all(data, source)
    tensors = {name: to_array(raw, f"{source}: {short(name)}") for name, raw in raws.items()}
    return tensors, metadata


# ---- writing ----------------------------------------------------------------


def _layout(
    content: Mapping[str, Raw | Entry], metadata: Mapping[str, str]
) -> tuple[bytes, list[str]]:
    """What stands before the data, and the tensors' order in it, as safetensors itself has them."""
    order = sorted(content, key=lambda name: (_ORDER[content[name].dtype], name.encode()))
    listing: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    at = 0
    for name in order:
        dtype, shape, end = content[name].dtype, content[name].shape, at + content[name].nbytes
        listing[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, end]}
        at = end
    text = json.dumps(listing, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text, order


def to_bytes(
    tensors: Mapping[str, np.ndarray | Raw], key: str = "format", value: str = "pt"
) -> bytes:
    """safetensors bytes; the same tensors give the same bytes.

    key, value: the metadata, one entry: safetensors writes several in any order. A Raw is for
    bfloat16, which NumPy and so safetensors' writer for it lack.
    """
    arrays = {name: tensors[name] for name in sorted(tensors)}
    if not any(isinstance(tensor, Raw) for tensor in arrays.values()):
        from safetensors.numpy import save

        contiguous = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
        return save(contiguous, metadata={key: value})
    return b"".join(pack(arrays, {key: value}))


def _raw_of_numpy(array: np.ndarray) -> Raw:
    """An array of a dtype that ``to_array`` gives."""
    dtype = next(name for name, known in _NUMPY.items() if array.dtype == known)
    return Raw(dtype, array.shape, np.ascontiguousarray(array).reshape(-1).view(np.uint8))


def pack(
    tensors: Mapping[str, np.ndarray | Raw], metadata: Mapping[str, str]
) -> list[bytes | memoryview]:
    """A file in parts: what it begins with, then the data of each tensor in their order."""
    raws = {
        name: tensor if isinstance(tensor, Raw) else _raw_of_numpy(tensor)
        for name, tensor in tensors.items()
    }
    start, order = _layout(raws, metadata)
    return [start, *(raws[name].data.data for name in order)]


def _copy(old: BinaryIO, entry: Entry, new: BinaryIO, source: str) -> None:
    old.seek(entry.begin)
    left = entry.nbytes
    while left:
        data = old.read(min(left, _COPY))
        if not data:
            raise FormatError(f"{source}: expected {left} bytes more")
        new.write(data)
        left -= len(data)


def update_file(
    path: str | os.PathLike[str], tensors: Mapping[str, Raw], drop: Collection[str] = ()
) -> None:
    """Puts tensors into a file, in one step; makes the file where there is none.

    Other tensors and the metadata are kept, but for those named in ``drop``. The
    bytes are those that safetensors itself writes for the same content. Of two
    updates at the same time, the later one wins. Raises FormatError, OSError.
    """
    whole = Path(os.path.realpath(path))
    with contextlib.ExitStack() as stack:
        old, header = None, Header({"format": "pt"}, {})
        if whole.exists():
            old = stack.enter_context(open_file(whole))
            header = read_header(old, str(path))
        kept = {name: entry for name, entry in header.entries.items() if name not in drop}
        content: dict[str, Raw | Entry] = {**kept, **tensors}
        start, order = _layout(content, header.metadata)

        def write(new: BinaryIO) -> None:
            new.write(start)
            for name in order:
                tensor = content[name]
                if isinstance(tensor, Raw):
                    new.write(tensor.data.data)
                elif old is not None:
                    _copy(old, tensor, new, str(path))

        atomic.replace_file(whole, write)
