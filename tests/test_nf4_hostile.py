"""NF4 checkpoints that are damaged or made to harm."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import bits
from helpers_files import header_of, raw_safetensors
from helpers_nf4 import NAME, STATE, about, arrays, decode, matrix, same, state_dict
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save

import lora_engine as le

pytestmark = pytest.mark.usefixtures("backend")

PLAIN = arrays(state_dict(matrix(34, 96)))
NESTED = arrays(state_dict(matrix(34, 96), double_quant=True))
ODD = arrays(state_dict(matrix(1, 3)))
SAID, NESTED_SAID = about(PLAIN), about(NESTED)


def text(value: Any) -> np.ndarray:
    data = value if isinstance(value, bytes) else json.dumps(value).encode()
    return np.frombuffer(data, np.uint8)


def plain(**changes: Any) -> dict[str, np.ndarray]:
    """The keys with other values under them; None takes one away."""
    return changed(PLAIN, changes)


def nested(**changes: Any) -> dict[str, np.ndarray]:
    return changed(NESTED, changes)


def changed(tensors: dict[str, np.ndarray], changes: dict[str, Any]) -> dict[str, np.ndarray]:
    keys = {"weight": NAME, "state": NAME + STATE, "fp4": f"{NAME}{STATE[:-3]}fp4"}
    named = {keys.get(key, f"{NAME}.{key}"): value for key, value in changes.items()}
    return {k: v for k, v in {**tensors, **named}.items() if v is not None}


def said(**changes: Any) -> dict[str, np.ndarray]:
    """Other values in the JSON; ... takes one away."""
    return plain(state=text({k: v for k, v in {**SAID, **changes}.items() if v is not ...}))


def nested_said(**changes: Any) -> dict[str, np.ndarray]:
    whole = {**NESTED_SAID, **changes}
    return nested(state=text({k: v for k, v in whole.items() if v is not ...}))


def spoilt(tensors: dict[str, np.ndarray], key: str, value: float, at: int = -1) -> np.ndarray:
    values = tensors[f"{NAME}.{key}"].copy()
    values[at] = value
    return values


NAN, INF = float("nan"), float("inf")
JSON = json.dumps(SAID)

# what: (tensors, what the message must name)
HOSTILE: dict[str, tuple[dict[str, np.ndarray], str]] = {
    "nothing": ({}, f"{NAME}: missing"),
    "other-name": ({f"x.{k}": v for k, v in PLAIN.items()}, f"{NAME}: missing"),
    **{
        f"no-{key}": (plain(**{key: None}), "missing")
        for key in ("weight", "absmax", "quant_map", "state")
    },
    "no-nested_absmax": (nested(nested_absmax=None), "nested_absmax: missing"),
    "no-nested_quant_map": (nested(nested_quant_map=None), "nested_quant_map: missing"),
    "nested-keys-of-a-plain-matrix": (
        plain(**{k: NESTED[f"{NAME}.{k}"] for k in ("nested_absmax", "nested_quant_map")}),
        "nested_offset: |nested_offset where"),
    "no-nested-keys": (
        nested(nested_absmax=None, nested_quant_map=None), "expected nested_offset where"),
    "fp4-key": (plain(fp4=PLAIN[NAME + STATE]), "bitsandbytes__fp4: fp4 is not supported"),
    "fp4-in-json": (said(quant_type="fp4"), "quant_type: expected nf4 .fp4 is not supported"),
    # JSON
    "json-empty": (plain(state=text(b"")), "expected JSON"),
    "json-cut": (plain(state=PLAIN[NAME + STATE][:-1]), "expected JSON"),
    "json-array": (plain(state=text([])), "expected a JSON object, got list"),
    "json-deep": (plain(state=text(b"[" * 60_000)), "expected JSON"),
    "json-no-utf8": (plain(state=text(JSON.encode()[:-1] + b', "\xff": 0}')), "expected JSON"),
    "json-utf16": (plain(state=text(JSON.encode("utf-16"))), "expected JSON"),
    "json-half-surrogate": (said(quant_type="\ud800"), "expected JSON"),
    "json-twice": (plain(state=text(JSON[:-1].encode() + b', "dtype": "float16"}')), "twice"),
    "json-huge": (plain(state=text(JSON.encode() + b" " * (1 << 16))), "at most 65536 bytes"),
    "json-huge-number": (
        plain(state=text(JSON.replace("64", "9" * 10_000).encode())), "JSON|blocksize"),
    "json-float": (plain(state=PLAIN[NAME + STATE].view("u1").astype("f4")), "expected U8"),
    "json-2-d": (plain(state=PLAIN[NAME + STATE][None]), r"expected U8 \[n\]"),
    "json-unknown-key": (said(rotation="hadamard"), "expected the keys .*rotation"),
    **{f"json-no-{key}": (said(**{key: ...}), "expected") for key in SAID},
    **{f"json-no-{key}": (nested_said(**{key: ...}), "expected the keys")
       for key in ("nested_offset", "nested_dtype", "nested_blocksize")},
    **{f"quant_type-{v!r}": (said(quant_type=v), "quant_type: expected nf4")
       for v in (None, 1, ["nf4"], "NF4", "int8", "x" * 9999)},
    **{f"blocksize-{v!r}": (said(blocksize=v), "blocksize: expected a power of two|expected F32")
       for v in (0, -64, 1, 16, 48, 65, 128, 32, 8192, 1 << 70, 64.0, "64", True, None, [64])},
    **{f"dtype-{v!r}": (said(dtype=v), "dtype: expected one of float32")
       for v in ("float64", "torch.float32", "uint8", "", None, 32, ["float32"])},
    **{f"shape-{v!r}": (said(shape=v), "shape: expected two sizes")
       for v in (None, [], 3264, "34x96", [3264], [34, 96, 1], [34.0, 96], ["34", 96], [True, 96],
                 [-34, -96], [0, 96], [34, 0], [0, 0], [1 << 64, 1], [34, None], {"0": 34})},
    **{f"shape-{v!r}": (said(shape=v), r"expected (U8|F32) \[\d+")
       for v in ([34, 95], [33, 96], [96, 33], [34, 97], [1, 1], [1 << 62, 1 << 62],
                 [1 << 32, 1 << 32], [(1 << 63) - 1, (1 << 63) - 1])},
    # arrays
    "weight-cut": (plain(weight=PLAIN[NAME][:-1]), r"expected U8 \[1632, 1\].*got U8 \[1631, 1\]"),
    "weight-longer": (plain(weight=np.append(PLAIN[NAME], [[0]], 0).astype("u1")), "1633, 1"),
    "weight-flat": (plain(weight=PLAIN[NAME].ravel()), r"got U8 \[1632\]"),
    "weight-row": (plain(weight=PLAIN[NAME].T), r"got U8 \[1, 1632\]"),
    "weight-dense": (plain(weight=np.ones((34, 96), "f4")), r"got F32 \[34, 96\]"),
    "weight-empty": (plain(weight=np.ones((0, 1), "u1")), r"got U8 \[0, 1\]"),
    "weight-wide-at-an-odd-size": (
        {**ODD, NAME: np.ones((1, 1), "f2"),
         NAME + STATE: text({**SAID, "shape": [1, 5]})}, r"expected U8 \[3, 1\]"),
    "absmax-cut": (plain(absmax=PLAIN[f"{NAME}.absmax"][:-1]), r"expected F32 \[51\]"),
    "absmax-2-d": (plain(absmax=PLAIN[f"{NAME}.absmax"][None]), r"got F32 \[1, 51\]"),
    "absmax-half": (plain(absmax=PLAIN[f"{NAME}.absmax"].astype("f2")), "got F16"),
    "absmax-uint8": (plain(absmax=NESTED[f"{NAME}.absmax"]), "expected F32.*got U8"),
    "absmax-float": (nested(absmax=PLAIN[f"{NAME}.absmax"]), "expected U8.*got F32"),
    **{f"absmax-{v}": (plain(absmax=spoilt(PLAIN, "absmax", v)), "absmax: expected finite numbers")
       for v in (NAN, INF, -INF)},
    "map-cut": (plain(quant_map=PLAIN[f"{NAME}.quant_map"][:-1]), r"expected F32 \[16\]"),
    "map-nan": (plain(quant_map=spoilt(PLAIN, "quant_map", NAN)), "quant_map: expected the 16"),
    "map-other": (plain(quant_map=np.linspace(-1, 1, 16, dtype="f4")), "the 16 codes of NF4"),
    "map-an-ulp-off": (
        plain(quant_map=spoilt(PLAIN, "quant_map", np.nextafter(np.float32(1), np.float32(2)))),
        "the 16 codes of NF4"),
    "nested_absmax-two": (nested(nested_absmax=np.ones(2, "f4")), r"nested_absmax: .*F32 \[1\]"),
    "nested_absmax-none": (nested(nested_absmax=np.ones(0, "f4")), r"nested_absmax: .*F32 \[1\]"),
    **{f"nested_absmax-{v}": (nested(nested_absmax=np.array([v], "f4")),
                              "nested_absmax: expected finite") for v in (NAN, INF)},
    "nested-product": (
        nested(nested_absmax=np.array([3e38], "f4"),
               nested_quant_map=NESTED[f"{NAME}.nested_quant_map"] * np.float32(3)),
        "nested_absmax: expected products within"),
    "nested_map-cut": (nested(nested_quant_map=np.ones(255, "f4")), r"expected F32 \[256\]"),
    "nested_map-nan": (
        nested(nested_quant_map=spoilt(NESTED, "nested_quant_map", NAN, 3)), "finite numbers"),
    **{f"nested_offset-{v!r}": (nested_said(nested_offset=v), "nested_offset: expected a finite")
       for v in (NAN, INF, -INF, 1e39, "1", None, True, [1.0])},
    **{f"nested_blocksize-{v!r}": (nested_said(nested_blocksize=v), "blocksize: expected 256")
       for v in (0, 64, 512, 256.0, "256", None, True, -256)},
    "nested_dtype": (nested_said(nested_dtype="float16"), "nested_dtype: expected float32"),
}  # fmt: skip


def check_refusal(error: pytest.ExceptionInfo, source: str) -> None:
    assert str(error.value).startswith(source), error.value
    assert NAME in str(error.value)
    assert len(str(error.value)) < 1000
    str(error.value).encode()


@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_keys_are_refused(what):
    tensors, names = HOSTILE[what]
    with pytest.raises(le.FormatError, match=names) as caught:
        le.NF4Tensor.from_bitsandbytes(tensors, NAME)
    check_refusal(caught, "from_bitsandbytes: ")


@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_file_is_refused(what, tmp_path):
    tensors, names = HOSTILE[what]
    file = tmp_path / "model.safetensors"
    file.write_bytes(save({k: np.ascontiguousarray(v) for k, v in tensors.items()}))
    with pytest.raises(le.FormatError, match=names) as caught:
        le.NF4Tensor.load(file, NAME)
    check_refusal(caught, f"{file}: ")


# Only arrays can hold these.
@pytest.mark.parametrize("dtype", ["float64", "int8", "uint16", "int64", "bool", "object", ">f4"])
@pytest.mark.parametrize("key", list(NESTED))
def test_keys_of_other_dtypes_are_refused(key, dtype):
    tensors = {**NESTED, key: NESTED[key].astype(dtype)}
    with pytest.raises(le.FormatError, match=f"{key}: expected one of uint8"):
        le.NF4Tensor.from_bitsandbytes(tensors, NAME)


def test_wrong_arguments_are_named(tmp_path):
    for tensors in (None, [PLAIN], "model.safetensors"):
        with pytest.raises(TypeError, match="tensors: expected a mapping of names"):
            le.NF4Tensor.from_bitsandbytes(tensors, NAME)
    with pytest.raises(TypeError, match=f"{NAME}.absmax: expected a NumPy array or a torch tensor"):
        le.NF4Tensor.from_bitsandbytes(plain(absmax=[1.0]), NAME)
    with pytest.raises(ValueError, match=f"{NAME}: expected a dense CPU tensor, got meta"):
        le.NF4Tensor.from_bitsandbytes(plain(weight=torch.empty(1, 1, device="meta")), NAME)
    for name in (None, 3, "__metadata__"):
        with pytest.raises(TypeError, match="name: expected the name of a tensor"):
            le.NF4Tensor.load(tmp_path / "x", name)
        with pytest.raises(TypeError, match="name: expected the name of a tensor"):
            le.nf4_quantize(np.ones((1, 1), "f4")).save(tmp_path / "x", name)
    with pytest.raises(FileNotFoundError):
        le.NF4Tensor.load(tmp_path / "x", NAME)
    with pytest.raises(FileNotFoundError):
        le.nf4_quantize(np.ones((1, 1), "f4")).save(tmp_path / "no" / "x", NAME)


# ---- the file around the keys -----------------------------------------------


def entry(dtype: Any = "U8", shape: Any = (2,), offsets: Any = (0, 2), **more: Any) -> dict:
    return {"x": {"dtype": dtype, "shape": shape, "data_offsets": offsets, **more}}


CONTAINERS = {
    "empty": (b"", "got 0 bytes"),
    "seven-bytes": (b"\0" * 7, "got 7 bytes"),
    "header-2^60": ((1 << 60).to_bytes(8, "little") + bytes(9), "header: expected at most 9"),
    "header-over-the-cap": (
        (17 << 20).to_bytes(8, "little") + bytes(18 << 20), f"at most {16 << 20}"),
    "pickle": (b"\x80\x04\x95\x10\0\0\0\0\0\0\0" + bytes(9), "header"),
    "no-json": (raw_safetensors({}, header=b"{" * 20), "safetensors: expected JSON"),
    "deep": (raw_safetensors({}, header=b'{"a":' + b"[" * 100_000), "expected JSON"),
    "array": (raw_safetensors({}, header=b"[]"), "expected a JSON object"),
    "twice": (raw_safetensors({}, header=b'{"x": {}, "x": {}}'), "twice"),
    "half-surrogate": (raw_safetensors({}, header=b'{"\\ud800": {}}'), "expected JSON"),
    "trailing": (raw_safetensors(entry(), bytes(3)), "expected safetensors of"),
    "cut": (raw_safetensors(entry(), bytes(1)), "x: .*offsets in 0..1"),
    "hole": (raw_safetensors(entry(offsets=(1, 3)), bytes(3)), "x: .*without holes"),
    "overlap": (
        raw_safetensors({**entry(), "y": entry(offsets=(1, 3))["x"]}, bytes(3)), "without holes"),
    "same-place": (raw_safetensors({**entry(), "y": entry()["x"]}, bytes(2)), "without holes"),
    "metadata-list": (raw_safetensors({}, metadata=[]), "__metadata__"),
    "metadata-number": (raw_safetensors({}, metadata={"a": 1}), "__metadata__"),
    "entry-list": (raw_safetensors({"x": []}), "x: .*dtype, shape and data_offsets"),
    "entry-more": (raw_safetensors(entry(strides=[1]), bytes(2)), "dtype, shape and data_offsets"),
    **{f"dtype-{v!r}": (raw_safetensors(entry(v), bytes(2)), "x: .*dtype")
       for v in ("U9", "", None, 1, ["U8"])},
    **{f"shape-{v!r}": (raw_safetensors(entry(shape=v), bytes(2)), "x: .*expected")
       for v in (None, 2, "2", [2.0], [-2], [-1, -2], [True, 2], [3], [1 << 64], [2] * 33,
                 [1 << 62] * 30, [0])},
    **{f"offsets-{v!r}": (raw_safetensors(entry(offsets=v), bytes(2)), "x: .*offsets")
       for v in (None, [0], [0, 1, 2], [0, 2.0], [2, 0], [-1, 1], ["0", 2], [0, 1 << 64])},
}  # fmt: skip


@pytest.mark.parametrize("what", CONTAINERS)
def test_hostile_container_is_refused_and_left_alone(what, tmp_path):
    data, names = CONTAINERS[what]
    file = tmp_path / "model.safetensors"
    file.write_bytes(data)
    w = le.nf4_quantize(np.ones((1, 1), "f4"))
    for use in (le.NF4Tensor.load, lambda f, name: w.save(f, name)):
        with pytest.raises(le.FormatError, match=names) as caught:
            use(file, NAME)
        assert str(caught.value).startswith(f"{file}: ")
        assert len(str(caught.value)) < 1000
    assert file.read_bytes() == data
    assert os.listdir(tmp_path) == [file.name]


@pytest.mark.parametrize("kind", ["folder", "pipe"])
def test_what_is_no_file_is_refused(kind, tmp_path):
    path = tmp_path / "model.safetensors"
    path.mkdir() if kind == "folder" else os.mkfifo(path)
    w = le.nf4_quantize(np.ones((1, 1), "f4"))
    for use in (le.NF4Tensor.load, lambda f, name: w.save(f, name)):
        with pytest.raises(le.FormatError, match="expected a plain file"):
            use(path, NAME)


# ---- drawn damage -----------------------------------------------------------

FILES = {"plain": save(PLAIN), "nested": save(NESTED), "odd": save(ODD)}
WANT = {"plain": PLAIN, "nested": NESTED, "odd": ODD}


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("nf4") / "model.safetensors"


def outcome(file: Path, data: bytes) -> le.NF4Tensor | None:
    """What load makes of the bytes; None where it refuses them."""
    file.write_bytes(data)
    try:
        return le.NF4Tensor.load(file, NAME)
    except le.FormatError:
        return None


def regions(data: bytes) -> dict[str, range]:
    """Where each key's bytes lie; "" is the header."""
    start = 8 + int.from_bytes(data[:8], "little")
    entries = {k: e["data_offsets"] for k, e in header_of(data).items()}
    return {"": range(start), **{k: range(start + b, start + e) for k, (b, e) in entries.items()}}


@pytest.mark.parametrize("which", FILES)
def test_no_cut_file_is_read(which, file):
    data = FILES[which]
    ends = {
        at + by for r in regions(data).values() for at in (r.start, r.stop) for by in (-1, 0, 1)
    }
    ends |= set(range(0, len(data), max(1, len(data) // 40)))
    for at in sorted(at for at in ends if 0 <= at < len(data)):
        assert outcome(file, data[:at]) is None


@given(st.data())
@pytest.mark.parametrize("which", FILES)
def test_flipped_bits_are_refused_or_change_no_more_than_they_are(which, file, data):
    """Nothing in the format tells whether a code or a magnitude was damaged; but sizes, dtypes
    and all that a flip outside of them reaches are the same, or the file is refused."""
    good = FILES[which]
    where = regions(good)
    key = data.draw(st.sampled_from(sorted(where)))
    at = data.draw(st.integers(where[key].start, where[key].stop - 1))
    flipped = bytearray(good)
    flipped[at] ^= 1 << data.draw(st.integers(0, 7))
    w = outcome(file, bytes(flipped))
    if w is None:
        return
    assert w.shape == tuple(about(WANT[which])["shape"])
    assert np.isfinite(w.to_float()).all()
    if key == "":
        assert same(w.to_bitsandbytes(NAME), WANT[which])
    elif key == f"{NAME}.quant_map":
        raise AssertionError("a changed map was taken for NF4's")
    elif not key.endswith(STATE):
        back = w.to_bitsandbytes(NAME)
        assert [k for k in back if not same({k: back[k]}, {k: WANT[which][k]})] == [key]
        assert bits(w.to_float()) == bits(decode(back))


@given(st.binary(max_size=300), st.integers(0, 400))
def test_garbage_is_refused(file, garbage, at):
    assert outcome(file, garbage) is None
    good = FILES["odd"]
    w = outcome(file, good[:at] + garbage + good[at + len(garbage) :])
    if w is not None:
        assert np.isfinite(w.to_float()).all()
