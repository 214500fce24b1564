"""A packed matrix under the key names of a bitsandbytes checkpoint.

``weight`` holds the codes; beside it lie ``weight.absmax``, ``weight.quant_map``,
with double quantisation ``weight.nested_absmax`` and ``weight.nested_quant_map``,
and ``weight.quant_state.bitsandbytes__nf4``: JSON in UTF-8, as uint8. All of it is
read as hostile; errors name the source and the key.
"""

from __future__ import annotations

import json
from collections.abc import Container, Mapping
from typing import Any, NamedTuple

import numpy as np

from lora_engine import reference
from lora_engine.errors import FormatError
from lora_engine.safetensors_file import Entry, Raw, is_count, read_json, short

WEIGHT, ABSMAX, QUANT_MAP = "", ".absmax", ".quant_map"
NESTED_ABSMAX, NESTED_MAP = ".nested_absmax", ".nested_quant_map"
STATE, STATE_FP4 = ".quant_state.bitsandbytes__nf4", ".quant_state.bitsandbytes__fp4"
PLAIN = (WEIGHT, ABSMAX, QUANT_MAP, STATE)
NESTED = (WEIGHT, ABSMAX, QUANT_MAP, NESTED_ABSMAX, NESTED_MAP, STATE)
ALL = (*NESTED, STATE_FP4)
NESTED_BLOCK = reference.NF4_NESTED_BLOCK
MAX_FLOAT = float(np.finfo(np.float32).max)

MAX_STATE = 1 << 16  # bytes of JSON; bitsandbytes writes about 170
_STORAGE = {"U8": 1, "BF16": 2, "F16": 2, "F32": 4}  # quant_storage: bytes of an element
_DTYPES = ("float32", "bfloat16", "float16")
_STATE_KEYS = {"quant_type", "blocksize", "dtype", "shape"}
_NESTED_KEYS = {"nested_blocksize", "nested_dtype", "nested_offset"}

Parts = dict[str, Raw]  # by what follows the weight's name


class State(NamedTuple):
    """What the JSON says."""

    rows: int
    cols: int
    blocksize: int
    dtype: str  # of the matrix before it was packed
    nested_offset: float | None  # None: absmax is not quantised

    @property
    def blocks(self) -> int:
        return -(-self.rows * self.cols // self.blocksize)

    @property
    def nested_blocks(self) -> int:
        return -(-self.blocks // NESTED_BLOCK)


def is_blocksize(value: Any) -> bool:
    """A power of two from 32 to 4096, as bitsandbytes has them."""
    return is_count(value) and value in (32, 64, 128, 256, 512, 1024, 2048, 4096)


# ---- reading ----------------------------------------------------------------


def present(names: Container[str], name: str, source: str) -> tuple[str, ...]:
    """Which parts of a matrix there are, none missing. Raises FormatError."""
    if name + STATE_FP4 in names:
        raise FormatError(f"{source}: {short(name)}{STATE_FP4}: fp4 is not supported, only nf4")
    nested = any(name + suffix in names for suffix in (NESTED_ABSMAX, NESTED_MAP))
    wanted = NESTED if nested else PLAIN
    for suffix in wanted:
        if name + suffix not in names:
            raise FormatError(f"{source}: {short(name)}{suffix}: missing")
    return wanted


def check_state_size(tensor: Raw | Entry, where: str) -> None:
    """Before the JSON is read. Raises FormatError."""
    if tensor.dtype != "U8" or len(tensor.shape) != 1 or tensor.nbytes > MAX_STATE:
        raise FormatError(
            f"{where}: expected U8 [n] of at most {MAX_STATE} bytes,"
            f" got {tensor.dtype} {short(str(list(tensor.shape)))}"
        )


def read_state(data: bytes, where: str) -> State:
    """The checked JSON. Raises FormatError."""
    raw = read_json(data, where)

    def check(key: str, right: bool, expected: str) -> None:
        if not right:
            got = short(repr(raw.get(key)))
            raise FormatError(f"{where}: {key}: expected {expected}, got {got}")

    check("quant_type", raw.get("quant_type") == "nf4", "nf4 (fp4 is not supported)")
    nested = bool(_NESTED_KEYS & set(raw))
    wanted = _STATE_KEYS | _NESTED_KEYS if nested else _STATE_KEYS
    if set(raw) != wanted:
        raise FormatError(
            f"{where}: expected the keys {', '.join(sorted(wanted))},"
            f" got {short(', '.join(map(repr, sorted(raw))))}"
        )
    shape = raw["shape"]
    check("blocksize", is_blocksize(raw["blocksize"]), "a power of two from 32 to 4096")
    check("dtype", raw["dtype"] in _DTYPES, f"one of {', '.join(_DTYPES)}")
    two = isinstance(shape, list) and len(shape) == 2
    check("shape", two and all(is_count(n) and n > 0 for n in shape), "two sizes from 1 on")
    offset: Any = None
    if nested:
        offset, size, block = raw["nested_offset"], raw["nested_blocksize"], NESTED_BLOCK
        check("nested_blocksize", is_count(size) and size == block, str(block))
        check("nested_dtype", raw["nested_dtype"] == "float32", "float32")
        number = isinstance(offset, float) or is_count(offset)
        finite = number and abs(offset) <= MAX_FLOAT  # NaN is not
        check("nested_offset", finite, "a finite float32")
        offset = float(offset)
    return State(shape[0], shape[1], raw["blocksize"], raw["dtype"], offset)


def check_layout(parts: Mapping[str, Raw | Entry], state: State, source: str, name: str) -> None:
    """dtypes and shapes of the parts, before they are read. Raises FormatError."""
    nested = state.nested_offset is not None
    if nested != (NESTED_ABSMAX in parts):
        raise FormatError(
            f"{source}: {short(name)}{STATE}: expected nested_offset where there is"
            f" {NESTED_ABSMAX} and only there, got {state.nested_offset}"
        )

    def check(suffix: str, dtype: str, shape: tuple[int, ...]) -> None:
        got = parts[suffix]
        if (got.dtype, got.shape) != (dtype, shape):
            raise FormatError(
                f"{source}: {short(name)}{suffix}: expected {dtype} {list(shape)} for a"
                f" [{state.rows}, {state.cols}] matrix in blocks of {state.blocksize},"
                f" got {got.dtype} {short(str(list(got.shape)))}"
            )

    size, storage = (state.rows * state.cols + 1) // 2, parts[WEIGHT].dtype
    if storage not in _STORAGE or size % _STORAGE[storage]:
        storage = "U8"  # what is then expected
    check(WEIGHT, storage, (size // _STORAGE[storage], 1))
    check(ABSMAX, "U8" if nested else "F32", (state.blocks,))
    check(QUANT_MAP, "F32", (16,))
    if nested:
        check(NESTED_ABSMAX, "F32", (state.nested_blocks,))
        check(NESTED_MAP, "F32", (256,))


def numbers(raw: Raw) -> np.ndarray:
    """The values of a float32 or uint8 part, aligned."""
    return np.require(raw.data.view(np.float32 if raw.dtype == "F32" else np.uint8), None, "A")


def check_values(parts: Parts, state: State, source: str, name: str) -> None:
    """What must hold in the parts themselves. Raises FormatError."""

    def check(suffix: str, right: bool, expected: str) -> None:
        if not right:
            raise FormatError(f"{source}: {short(name)}{suffix}: expected {expected}")

    codes, finite = numbers(parts[QUANT_MAP]), "finite numbers, got NaN or Inf"
    check(QUANT_MAP, np.array_equal(codes, reference.NF4_CODES), "the 16 codes of NF4")
    if state.nested_offset is None:
        check(ABSMAX, bool(np.isfinite(numbers(parts[ABSMAX])).all()), finite)
        return
    scales, steps = numbers(parts[NESTED_ABSMAX]), numbers(parts[NESTED_MAP])
    check(NESTED_ABSMAX, bool(np.isfinite(scales).all()), finite)
    check(NESTED_MAP, bool(np.isfinite(steps).all()), finite)
    with np.errstate(over="ignore"):
        absmax = reference.double_dequantize(
            numbers(parts[ABSMAX]), scales, steps, NESTED_BLOCK, state.nested_offset
        )
    check(NESTED_ABSMAX, bool(np.isfinite(absmax).all()), "products within float32's range")


# ---- writing ----------------------------------------------------------------


def _own(values: np.ndarray, column: bool = False) -> Raw:
    data = np.ascontiguousarray(values).view(np.uint8).reshape(-1)
    data.flags.writeable = False
    dtype = "F32" if values.dtype == np.float32 else "U8"
    return Raw(dtype, (values.size, 1) if column else values.shape, data)


def make_parts(
    packed: np.ndarray, absmax: np.ndarray, state: State, double_quant: bool
) -> tuple[Parts, State]:
    """What bitsandbytes saves for these codes, and the state with its nested_offset."""
    listing = {"quant_type": "nf4", "blocksize": state.blocksize, "dtype": state.dtype}
    parts = {WEIGHT: _own(packed, column=True)}
    about: dict[str, Any] = {**listing, "shape": [state.rows, state.cols]}
    if double_quant:
        codes, nested_absmax, offset = reference.double_quantize(absmax)
        state = state._replace(nested_offset=offset)
        parts[ABSMAX], parts[QUANT_MAP] = _own(codes), _own(reference.NF4_CODES)
        parts[NESTED_ABSMAX] = _own(nested_absmax)
        parts[NESTED_MAP] = _own(reference.dynamic_map())
        about |= {"nested_blocksize": NESTED_BLOCK, "nested_dtype": "float32"}
        about["nested_offset"] = offset
    else:
        parts[ABSMAX], parts[QUANT_MAP] = _own(absmax), _own(reference.NF4_CODES)
    parts[STATE] = _own(np.frombuffer(json.dumps(about).encode(), np.uint8))
    return parts, state
