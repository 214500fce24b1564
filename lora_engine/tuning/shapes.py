"""The shapes that are tuned: given, or read from a model's config.json."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from lora_engine.errors import FormatError
from lora_engine.kernels.tuned import open_regular
from lora_engine.safetensors_file import is_count, read_json

MAX_CONFIG = 1 << 20  # bytes
LARGEST = 1 << 20  # features


class Shape(NamedTuple):
    """Of a projection: x [n, in] to y [n, out]."""

    in_features: int
    out_features: int

    def __str__(self) -> str:
        return f"{self.in_features}x{self.out_features}"


def parse(text: str) -> Shape:
    """ "4096,1024". Raises ValueError."""
    sizes = text.split(",")
    if len(sizes) == 2 and all(s.isascii() and s.isdigit() and len(s) < 10 for s in sizes):
        shape = Shape(*map(int, sizes))
        if min(shape) >= 1 and max(shape) <= LARGEST:
            return shape
    raise ValueError(f"expected in,out with sizes from 1 to {LARGEST}, got {text[:80]!r}")


def _size(config: dict[str, Any], name: str, source: str, default: int | None = None) -> int:
    value = config.get(name)
    if value is None and default is not None:
        return default
    if value is None:
        raise FormatError(f"{source}: {name}: expected a model's size, and it is not there")
    if not is_count(value) or not 1 <= value <= LARGEST:
        got = str(value)[:80]
        raise FormatError(f"{source}: {name}: expected a number from 1 to {LARGEST}, got {got}")
    return int(value)


def from_config(path: Path) -> list[Shape]:
    """The projections q, k, v, o, gate, up and down of a model, each shape once.

    path: config.json, or the folder that holds it. Raises FormatError (naming file and key),
    OSError.
    """
    file = path / "config.json" if path.is_dir() else path
    with open_regular(file) as opened:
        data = opened.read(MAX_CONFIG + 1)
    source = str(file)
    if len(data) > MAX_CONFIG:
        raise FormatError(f"{source}: expected at most {MAX_CONFIG} bytes")
    config = read_json(data, source)
    inner = config.get("text_config")  # of a model that also sees or hears
    if "hidden_size" not in config and isinstance(inner, dict):
        config, source = inner, f"{source}: text_config"
    hidden = _size(config, "hidden_size", source)
    between = _size(config, "intermediate_size", source)
    heads = _size(config, "num_attention_heads", source)
    kv_heads = _size(config, "num_key_value_heads", source, heads)
    if config.get("head_dim") is None and hidden % heads:
        raise FormatError(
            f"{source}: num_attention_heads: expected a divisor of hidden_size {hidden},"
            f" got {heads}"
        )
    each = _size(config, "head_dim", source, hidden // heads)
    if heads * each > LARGEST or kv_heads * each > LARGEST:
        raise FormatError(f"{source}: head_dim: expected at most {LARGEST} features in all heads")
    q, kv = heads * each, kv_heads * each
    found = (hidden, q), (hidden, kv), (q, hidden), (hidden, between), (between, hidden)
    return list(dict.fromkeys(Shape(*sizes) for sizes in found))
