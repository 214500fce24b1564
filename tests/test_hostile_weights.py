"""Weights files that are damaged or made to harm."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
from helpers_files import (
    A_KEY,
    B_KEY,
    CONFIG,
    KEPT,
    STATE,
    WEIGHTS,
    check_refusal,
    header_of,
    load_dropping,
    raw_safetensors,
    redraw,
    saved,
    trained,
    weight_bits,
)
from hypothesis import given
from hypothesis import strategies as st

import lora_engine as le
from lora_engine import reference

# ---- hostile weights --------------------------------------------------------


def pair(A: np.ndarray, B: np.ndarray, dtype: str = "F32") -> dict[str, object]:
    """Header entries of A and B, one after the other."""
    cut, end = A.nbytes, A.nbytes + B.nbytes
    return {
        A_KEY: {"dtype": dtype, "shape": list(A.shape), "data_offsets": [0, cut]},
        B_KEY: {"dtype": dtype, "shape": list(B.shape), "data_offsets": [cut, end]},
    }


def hostile_weights() -> dict[str, tuple[bytes, str]]:
    """{what: (bytes, what the message must name)}."""
    A, B, _ = trained().weights("q")
    good = pair(A, B)
    payload = A.tobytes() + B.tobytes()

    def tensor(key, shape, dtype="F32", size=None):
        end = (4 if size is None else size) * int(np.prod(shape, dtype=object))
        return raw_safetensors({key: {"dtype": dtype, "shape": shape, "data_offsets": [0, end]}},
                               bytes(end))  # fmt: skip

    def with_A(values):
        return raw_safetensors(good, np.asarray(values, "f4").tobytes() + B.tobytes())

    spoilt = {name: A.copy() for name in ("nan", "inf")}
    spoilt["nan"][1, 3], spoilt["inf"][0, 0] = np.nan, -np.inf
    wide = np.full(A.shape, 1e39), B.astype("f8")
    found = {
        "empty": (b"", "got 0 bytes"),
        "seven-bytes": (b"\0" * 7, "got 7 bytes"),
        "header-2^60": ((1 << 60).to_bytes(8, "little") + payload, "header: expected at most 88"),
        "header-2^64-1": (b"\xff" * 8 + payload, f"header: .*got {2**64 - 1}"),
        "header-past-end": ((89).to_bytes(8, "little") + payload, "header: .*88 bytes, got 89"),
        "header-over-the-cap": (
            (17 << 20).to_bytes(8, "little") + bytes(18 << 20), f"header: .*most {16 << 20}"),
        "header-empty": (bytes(8), "safetensors"),
        "header-no-json": (raw_safetensors({}, header=b"{" * 20), "safetensors"),
        "header-array": (raw_safetensors({}, header=b"[]"), "safetensors"),
        "header-deep": (raw_safetensors({}, header=b'{"a":' + b"[" * 100_000), "safetensors"),
        "header-no-utf8": (raw_safetensors({}, header=b'{"\xff":{}}'), "safetensors"),
        "no-tensors": (raw_safetensors({}), "at least one adapted module"),
        "trailing-bytes": (raw_safetensors(good, payload + b"\0"), "safetensors"),
        "missing-A": (tensor(B_KEY, [5, 2]), f"{A_KEY}: missing"),
        "missing-B": (tensor(A_KEY, [2, 6]), f"{B_KEY}: missing"),
        "other-module": (
            trained(target_modules=("p",)).export_weights(), f"{A_KEY}: missing"),
        "module-too-many": (
            trained(target_modules=("q", "p")).export_weights(), "p: expected modules of the"),
        "foreign-key": (tensor("model.weight", [2, 2]), "model.weight: expected a key like"),
        "no-suffix": (tensor("base_model.model.q.lora_A", [2, 6]), "q.lora_A: expected a key like"),
        "rank-3": (trained(rank=3).export_weights(), r"q: expected A \[2, 6\]"),
        "wider": (trained(7, 5).export_weights(), r"q: expected A \[2, 6\]"),
        "ranks-differ": (
            raw_safetensors(pair(np.zeros((2, 6), "f4"), np.zeros((5, 3), "f4")), bytes(108)),
            rf"{B_KEY}: expected shape \[out, 2\]"),
        "transposed": (
            raw_safetensors(pair(A.T, B.T), payload), rf"{B_KEY}: expected shape \[out, 6\]"),
        "nan": (with_A(spoilt["nan"]), f"{A_KEY}: .*NaN or Inf"),
        "inf": (with_A(spoilt["inf"]), f"{A_KEY}: .*NaN or Inf"),
        "beyond-float32": (
            raw_safetensors(pair(*wide, "F64"), b"".join(w.tobytes() for w in wide)),
            f"{A_KEY}: .*NaN or Inf"),
        "vector": (tensor(A_KEY, [12]), rf"{A_KEY}: expected a float matrix, got float32 \[12\]"),
        "scalar": (tensor(A_KEY, []), f"{A_KEY}: expected a float matrix"),
        "3-d": (tensor(A_KEY, [1, 2, 6]), f"{A_KEY}: expected a float matrix"),
        "100-d": (tensor(A_KEY, [1] * 100), A_KEY),
        "no-rows": (tensor(A_KEY, [0, 6]), f"{A_KEY}: expected a float matrix"),
        "no-rows-2^63-columns": (tensor(A_KEY, [0, 2**63]), A_KEY),
        "no-rows-2^62-columns": (tensor(A_KEY, [0, 2**62]), A_KEY),
        "2^40-columns": (
            raw_safetensors({A_KEY: {"dtype": "F32", "shape": [2, 2**40],
                                     "data_offsets": [0, 2**43]}}, bytes(64)), "safetensors"),
        "int64": (tensor(A_KEY, [2, 6], "I64", 8), f"{A_KEY}: expected a float matrix, got int64"),
        "int8": (tensor(A_KEY, [2, 6], "I8", 1), f"{A_KEY}: dtype I8 is not supported"),
        "float8": (tensor(A_KEY, [2, 6], "F8_E4M3", 1), f"{A_KEY}: dtype F8_E4M3"),
        "long-key": (tensor("x" * 100_000, [2, 6]), "x{200}[.]{3}: expected a key like"),
    }  # fmt: skip
    return found


HOSTILE = hostile_weights()


@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_bytes_are_refused(what):
    data, names = HOSTILE[what]
    lora = trained()
    before = weight_bits(lora)
    with pytest.raises(le.FormatError, match=names) as caught:
        lora.import_weights(data)
    check_refusal(caught, "import_weights: ")
    assert weight_bits(lora) == before


# load takes its modules from the file, so these are other adapters to it, not wrong ones.
ONLY_IMPORT = {"other-module", "module-too-many", "wider"}


@pytest.mark.parametrize("what", sorted(set(HOSTILE) - ONLY_IMPORT))
def test_hostile_weights_file_is_refused(what, tmp_path):
    folder = saved(tmp_path)
    data, names = HOSTILE[what]
    (folder / WEIGHTS).write_bytes(data)
    with pytest.raises(le.FormatError, match=names) as caught:
        le.MicroLoRA.load(folder)
    check_refusal(caught, str(folder / WEIGHTS))


def interesting_cuts(data: bytes) -> list[int]:
    """Before, inside and after each part of the file."""
    start = len(data) - len(payload_of(data))
    ends = [start + o for e in tensors_of(data).values() for o in e["data_offsets"]]
    near = {at + by for at in (0, 8, start // 2, start, *ends) for by in (-1, 0, 1)}
    return sorted(at for at in near if 0 <= at < len(data))


def tensors_of(data: bytes) -> dict[str, dict]:
    return {key: entry for key, entry in header_of(data).items() if key != "__metadata__"}


def payload_of(data: bytes) -> bytes:
    """What follows the header."""
    return data[8 + int.from_bytes(data[:8], "little") :]


def test_truncated_files_are_refused(tmp_path):
    folder = saved(tmp_path)
    lora = trained(draw=9)
    before = weight_bits(lora)
    data = (folder / WEIGHTS).read_bytes()
    cuts = interesting_cuts(data)
    assert len(cuts) >= 15
    for at in cuts:
        with pytest.raises(le.FormatError, match=r"^import_weights: "):
            lora.import_weights(data[:at])
        (folder / WEIGHTS).write_bytes(data[:at])
        with pytest.raises(le.FormatError, match=WEIGHTS):
            le.MicroLoRA.load(folder)
    assert weight_bits(lora) == before


def test_flipped_header_bits_never_give_other_weights():
    """A damaged header is refused; where it still says the same (a changed name in the
    metadata), the weights are the file's own."""
    donor, lora = trained(), trained(draw=9)
    data = donor.export_weights()
    before, own = weight_bits(lora), weight_bits(donor)
    rng = np.random.default_rng(0)
    refused = 0
    for at in range(len(data) - len(payload_of(data))):
        flipped = bytearray(data)
        flipped[at] ^= 1 << rng.integers(8)
        try:
            lora.import_weights(flipped)
        except le.FormatError:
            refused += 1
            assert weight_bits(lora) == before
        else:
            assert weight_bits(lora) == own
            redraw(lora, 9)
    assert refused > 150


def test_bfloat16_is_widened_without_torch():
    A, B, _ = trained().weights("q")
    a, b = (reference.round_bfloat16(w) for w in (A, B))
    halves = [(w.view(np.uint32) >> 16).astype("<u2") for w in (a, b)]
    lora = trained(draw=9)
    payload = b"".join(h.tobytes() for h in halves)
    lora.import_weights(raw_safetensors(pair(*halves, "BF16"), payload))
    assert lora.weights("q")[0].tobytes() == a.tobytes()
    assert lora.weights("q")[1].tobytes() == b.tobytes()


def test_float64_is_narrowed():
    A, B, _ = trained().weights("q")
    wide = [w.astype("f8") * (1 + 1e-12) for w in (A, B)]
    lora = trained(draw=9)
    lora.import_weights(raw_safetensors(pair(*wide, "F64"), b"".join(w.tobytes() for w in wide)))
    assert weight_bits(lora) == weight_bits(trained())


class Bomb:
    """Unpickling it leaves a mark."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


@pytest.mark.parametrize("name", [WEIGHTS, STATE, CONFIG])
def test_pickle_is_not_opened(name, tmp_path):
    folder, mark = saved(tmp_path), tmp_path / "mark"
    data = pickle.dumps(Bomb(mark))
    pickle.loads(data)
    assert mark.exists()  # the bomb works
    mark.unlink()
    (folder / name).write_bytes(data)
    if name == STATE:
        load_dropping(folder, "")
    else:
        with pytest.raises(le.FormatError, match=name):
            le.MicroLoRA.load(folder)
    with pytest.raises(le.FormatError):
        trained().import_weights(data)
    assert not mark.exists()


# ---- random bytes -----------------------------------------------------------

GOOD = trained().export_weights()
LORA = trained(draw=9)

entry = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "F16", "BF16", "F64", "I64", "U8", "BOOL", "C64", "X"]),
        "shape": st.lists(st.sampled_from([*range(-1, 5), 2**31, 2**63, 2**64 - 1]), max_size=4),
        "data_offsets": st.lists(st.integers(0, 200), min_size=2, max_size=2),
    }
)
headers = st.dictionaries(
    st.sampled_from([A_KEY, B_KEY, "__metadata__", "", "base_model.model.lora_A.weight"]),
    entry | st.none() | st.dictionaries(st.text(max_size=3), st.text(max_size=3), max_size=2),
)


def import_or_refuse(data: bytes) -> None:
    try:
        LORA.import_weights(data)
    except le.FormatError:
        assert weight_bits(LORA) == KEPT
    else:
        assert weight_bits(LORA) != KEPT
        redraw(LORA, 9)


@given(st.binary(max_size=400))
def test_random_bytes_are_refused(data):
    with pytest.raises(le.FormatError):
        LORA.import_weights(data)
    assert weight_bits(LORA) == KEPT


@given(headers, st.integers(0, 300))
def test_random_headers_raise_format_errors_only(header, size):
    import_or_refuse(raw_safetensors(header, bytes(size)))


edit = st.tuples(st.integers(0, len(GOOD) - 1), st.binary(max_size=3))


@given(st.lists(edit, min_size=1, max_size=4))
def test_random_edits_raise_format_errors_only(edits):
    data = GOOD
    for at, new in edits:
        data = data[:at] + new + data[at + len(new) :]
    import_or_refuse(data)
