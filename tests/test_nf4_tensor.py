"""NF4Tensor and the NF4 ops: codes, magnitudes, bytes."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from helpers import (
    LAYOUTS,
    bits,
    f64,
    strided,
)
from helpers_nf4 import (
    BLOCKSIZES,
    COLS,
    NAME,
    ROWS,
    arrays,
    bitsandbytes,
    decode,
    flat_bytes,
    matrix,
    same,
    state_dict,
)
from hypothesis import given
from hypothesis import strategies as st

import lora_engine as le
from lora_engine import reference

pytestmark = pytest.mark.usefixtures("backend")

DTYPES = ("float32", "bfloat16", "float16")
dtypes = pytest.mark.parametrize("dtype", DTYPES)
double_quants = pytest.mark.parametrize("double_quant", [False, True], ids=["plain", "double"])


def nibbles(packed: np.ndarray) -> np.ndarray:
    return np.stack([packed >> 4, packed & 15], axis=1).ravel()


# ---- against bitsandbytes ---------------------------------------------------


@dtypes
@pytest.mark.parametrize("cols", COLS)
@pytest.mark.parametrize("rows", ROWS)
def test_codes_are_those_of_bitsandbytes(rows, cols, dtype):
    """bitsandbytes multiplies by 1/absmax where the format divides: a value within one
    ulp (of 1) of a midpoint may get the neighbouring code, nothing else may differ."""
    W = matrix(rows, cols, dtype)
    for blocksize in BLOCKSIZES if W.numel() < 1 << 14 else (64, 2048):
        theirs, state = bitsandbytes.functional.quantize_4bit(
            W, blocksize=blocksize, quant_type="nf4"
        )
        ours = le.nf4_quantize(W, blocksize).to_bitsandbytes(NAME)
        assert ours[f"{NAME}.absmax"].numpy().tobytes() == state.absmax.numpy().tobytes()
        a, b = nibbles(flat_bytes(ours[NAME])), nibbles(flat_bytes(theirs))
        other = np.flatnonzero(a != b)
        assert len(other) <= 1 + 1e-4 * a.size
        scaled = (
            W.double().numpy().ravel()[other] / state.absmax.double().numpy()[other // blocksize]
        )
        lower = np.minimum(a, b)[other]
        assert (np.maximum(a, b)[other] == lower + 1).all()
        codes = reference.NF4_CODES.astype("f8")
        assert (np.abs(scaled - (codes[lower] + codes[lower + 1]) / 2) <= 2.0**-23).all()


@pytest.mark.parametrize("blocksize", [64, 512])
def test_double_quantisation_is_that_of_bitsandbytes(blocksize):
    """Its CPU path looks codes up in a table of 2^16 steps: near a midpoint it may miss the
    nearest by one, never ours. Its mean is float32's, ours is rounded once."""
    W = matrix(288, 4304) * torch.linspace(0.1, 3.0, 288)[:, None]
    ours = arrays(le.nf4_quantize(W, blocksize, double_quant=True).to_bitsandbytes(NAME))
    theirs = arrays(state_dict(W, blocksize, double_quant=True))
    gap = {k: np.abs(f64(ours[k]) - f64(theirs[k])).max() for k in ours if "state" not in k}
    assert gap[f"{NAME}.nested_quant_map"] <= 2.0**-24  # torch's linspace differs by CPU
    assert gap[f"{NAME}.nested_absmax"] <= 4e-7 * theirs[f"{NAME}.nested_absmax"].max()
    assert gap[f"{NAME}.absmax"] <= 1
    assert (ours[f"{NAME}.absmax"] != theirs[f"{NAME}.absmax"]).mean() < 0.01
    absmax = flat_bytes(le.nf4_quantize(W, blocksize).to_bitsandbytes(NAME)[f"{NAME}.absmax"])
    # What each makes of the magnitudes, where a row of 4096 zeros' code 7 is replaced by 15: 1.
    ones = {k: v.copy() for k, v in ours.items()}, {k: v.copy() for k, v in theirs.items()}
    error = []
    for tensors in ones:
        tensors[NAME][:] = 0xFF
        error.append(np.abs(decode(tensors).ravel()[::blocksize] - absmax.view("f4")).sum())
    assert error[0] <= error[1] * (1 + 1e-6)


def test_map_of_double_quantisation_is_that_of_bitsandbytes():
    theirs = bitsandbytes.functional.create_dynamic_map().numpy()
    assert np.abs(reference.dynamic_map() - theirs).max() <= 2.0**-24


# ---- the format -------------------------------------------------------------


@st.composite
def drawn(draw):
    rows, cols = draw(st.sampled_from([1, 2, 3, 17])), draw(st.integers(1, 400))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    W = rng.standard_normal((rows, cols)) * 10.0 ** draw(st.integers(-4, 4))
    W *= rng.random((rows, cols)) < draw(st.sampled_from([1.0, 0.5, 0.01]))  # whole blocks of 0
    dtype, layout = draw(st.sampled_from(DTYPES)), draw(st.sampled_from(LAYOUTS))
    kind = "torch" if dtype == "bfloat16" else draw(st.sampled_from(["numpy", "torch"]))
    values = torch.from_numpy(W).to(getattr(torch, dtype))
    values = values.numpy() if kind == "numpy" else values
    return strided(values, layout), draw(st.sampled_from(BLOCKSIZES)), draw(st.booleans())


@given(drawn())
def test_each_weight_gets_the_nearest_code_of_its_block(case):
    W, blocksize, _ = case
    before = bits(W)
    stored = le.nf4_quantize(W, blocksize).to_bitsandbytes(NAME)
    assert bits(W) == before
    flat = f64(W).ravel()
    absmax = flat_bytes(stored[f"{NAME}.absmax"]).view("f4")
    starts = np.arange(0, flat.size, blocksize)
    assert (absmax == np.maximum.reduceat(np.abs(flat), starts).astype("f4")).all()
    scale = np.repeat(absmax, blocksize)[: flat.size].astype("f8")
    scaled = flat / np.where(scale == 0, 1, scale)
    codes = nibbles(flat_bytes(stored[NAME]))
    distance = np.abs(scaled[:, None] - reference.NF4_CODES.astype("f8"))
    chosen = distance[np.arange(flat.size), codes[: flat.size]]
    assert (chosen <= distance.min(axis=1) + 2.0**-23).all()
    assert (codes[: flat.size][scale == 0] == 7).all()
    assert (codes[flat.size :] == 7).all()
    packed, expected = reference.nf4_quantize(flat.reshape(W.shape), blocksize)
    assert packed.tobytes() == flat_bytes(stored[NAME]).tobytes()
    assert expected.tobytes() == absmax.tobytes()


@given(drawn(), st.sampled_from(DTYPES), st.sampled_from(LAYOUTS))
def test_decoding_is_exact_to_the_bit(case, dtype, layout):
    W, blocksize, double_quant = case
    w = le.nf4_quantize(W, blocksize, double_quant)
    want = decode(w.to_bitsandbytes(NAME))
    assert bits(w.to_float()) == bits(want)
    out = strided(torch.full(W.shape, float("nan"), dtype=getattr(torch, dtype)), layout)
    assert le.nf4_dequantize(w, out) is out
    assert bits(out) == bits(torch.from_numpy(want).to(out.dtype))
    tensor = w.to_float(out.dtype)
    assert tensor.dtype == out.dtype
    assert bits(tensor) == bits(out)
    if dtype != "bfloat16":
        assert bits(w.to_float(dtype)) == bits(out)


def test_ties_go_to_the_lower_code():
    """x/absmax equal to a midpoint, as float32 has it, is not greater than it."""
    codes = reference.NF4_CODES
    midpoints = (codes[:-1] + codes[1:]) / np.float32(2)
    above = np.nextafter(midpoints, np.float32(2))
    W = np.concatenate([midpoints, above, [1.0, -1.0]]).astype("f4")[None]
    got = nibbles(flat_bytes(le.nf4_quantize(W).to_bitsandbytes(NAME)[NAME]))
    assert got.tolist() == [*range(15), *range(1, 16), 15, 0]


def test_zeros_and_an_odd_end():
    stored = le.nf4_quantize(np.zeros((3, 43), "f4")).to_bitsandbytes(NAME)
    assert stored[NAME].shape == (65, 1)
    assert (stored[NAME] == 0x77).all()
    assert stored[f"{NAME}.absmax"].tolist() == [0.0, 0.0, 0.0]
    end = le.nf4_quantize(np.ones((1, 1), "f4")).to_bitsandbytes(NAME)
    assert end[NAME].tolist() == [[0xF7]]


@pytest.mark.parametrize("value", [0.0, 3.5])
def test_equal_magnitudes_survive_double_quantisation(value):
    W = np.full((5, 64), value, "f4")
    w = le.nf4_quantize(W, double_quant=True)
    assert (w.to_float() == value).all()
    theirs = state_dict(torch.from_numpy(W), double_quant=True)
    assert same(w.to_bitsandbytes(NAME), arrays(theirs))


def test_float16_out_of_range_is_infinite():
    w = le.nf4_quantize(np.full((1, 2), 1e5, "f4"))
    assert np.isinf(w.to_float(np.float16)).all()


# ---- the object -------------------------------------------------------------


@double_quants
@pytest.mark.parametrize("blocksize", [32, 64, 4096])
def test_size_and_what_it_says(blocksize, double_quant):
    w = le.NF4Tensor.from_float(matrix(512, 1024, "bfloat16"), blocksize, double_quant)
    assert (w.shape, w.blocksize, w.double_quant, w.dtype) == (
        (512, 1024), blocksize, double_quant, "bfloat16")  # fmt: skip
    weights, blocks = 512 * 1024, 512 * 1024 // blocksize
    scales = blocks + 4 * -(-blocks // 256) + 1024 if double_quant else 4 * blocks
    json = w.to_bitsandbytes(NAME)[f"{NAME}.quant_state.bitsandbytes__nf4"]
    assert w.nbytes == weights // 2 + scales + 16 * 4 + len(json)
    if double_quant and blocksize == 64:
        assert w.nbytes / weights <= 0.53
    assert repr(w) == (
        f"NF4Tensor(shape=(512, 1024), blocksize={blocksize}, double_quant={double_quant},"
        f" dtype='bfloat16', nbytes={w.nbytes})"
    )


@double_quants
def test_what_it_hands_out_cannot_change_it(double_quant):
    w = le.nf4_quantize(matrix(5, 64).numpy(), 32, double_quant)
    before = bits(w.to_float())
    for array in w.to_bitsandbytes(NAME).values():
        with pytest.raises(ValueError, match="read-only"):
            array[...] = 0
    with pytest.raises(AttributeError):
        w.shape = (1, 1)
    tensors = le.nf4_quantize(matrix(5, 64), 32, double_quant)
    for tensor in tensors.to_bitsandbytes(NAME).values():
        tensor.zero_()
    assert bits(tensors.to_float()) == bits(w.to_float()) == before


def test_parameters_are_packed_without_their_gradient():
    W = torch.nn.Parameter(matrix(3, 8))
    assert bits(le.nf4_quantize(W).to_float()) == bits(le.nf4_quantize(W.detach()).to_float())


BAD = {
    "list": (lambda: le.nf4_quantize([[1.0]]), TypeError, "W: expected a NumPy array or a torch"),
    "float64": (lambda: le.nf4_quantize(np.ones((2, 2))), TypeError, "W: expected .*got float64"),
    "int8": (lambda: le.nf4_quantize(np.ones((2, 2), "i1")), TypeError, "W: expected .*got int8"),
    "vector": (lambda: le.nf4_quantize(np.ones(2, "f4")), ValueError, r"W: .*got shape \(2,\)"),
    "3-d": (lambda: le.nf4_quantize(np.ones((1, 1, 2), "f4")), ValueError, "W: expected a matrix"),
    "no-rows": (lambda: le.nf4_quantize(np.ones((0, 2), "f4")), ValueError, "at least one row"),
    "no-cols": (lambda: le.nf4_quantize(np.ones((2, 0), "f4")), ValueError, "one column"),
    **{
        f"blocksize-{size!r}": (
            lambda size=size: le.nf4_quantize(np.ones((1, 2), "f4"), size),
            ValueError, "nf4_quantize: blocksize: expected a power of two from 32 to 4096")
        for size in (0, -64, 16, 48, 8192, 64.0, "64", None, True)
    },
    **{
        f"{value}-{dtype}": (
            lambda value=value, dtype=dtype: le.nf4_quantize(
                torch.tensor([[1.0] * 70 + [value]]).to(getattr(torch, dtype))),
            ValueError, "W: expected finite numbers")
        for value in (float("nan"), float("inf"), -float("inf")) for dtype in DTYPES
    },
    "no-tensor": (lambda: le.nf4_dequantize(np.ones(3)), TypeError, "nf4_dequantize: w: expected"),
    "linear-no-tensor": (
        lambda: le.nf4_linear(np.ones((1, 2), "f4"), np.ones(3)), TypeError, "nf4_linear: w: exp"),
    "out-shape": (lambda: small().to_float(out=np.ones((3, 2), "f4")), ValueError, "out: expected"),
    "out-dtype": (lambda: small().to_float(np.float64), TypeError, "out: expected"),
    "name": (lambda: small().to_bitsandbytes(3), TypeError, "name: expected the name"),
    "ids-alone": (
        lambda: le.nf4_linear(np.ones((1, 3), "f4"), small(), ids=np.zeros(1, "i4")),
        ValueError, "nf4_linear: pool, ids: expected both"),
    "compute": (
        lambda: le.nf4_linear(np.ones((1, 3), "f4"), small(), compute="int8"),
        ValueError, "nf4_linear: compute: expected"),
    "x-width": (lambda: le.nf4_linear(np.ones((1, 4), "f4"), small()), ValueError, "nf4_linear: x"),
    "bias-shape": (
        lambda: le.nf4_linear(np.ones((1, 3), "f4"), small(), np.ones(3, "f4")),
        ValueError, "nf4_linear: bias"),
}  # fmt: skip


def small() -> le.NF4Tensor:
    return le.nf4_quantize(np.ones((2, 3), "f4"))


@pytest.mark.parametrize("what", BAD)
def test_wrong_arguments_are_named(what):
    call, error, names = BAD[what]
    with pytest.raises(error, match=names):
        call()


def test_double_quantisation_is_decoded_in_two_roundings():
    """Over many blocks of very different magnitudes, against a decoder of its own."""
    rng = np.random.default_rng(9)
    W = rng.standard_normal((96, 4096)) * np.exp(rng.standard_normal((96, 1)) * 3)
    for blocksize in (32, 64, 256):
        w = le.nf4_quantize(W.astype("f4"), blocksize, double_quant=True)
        assert bits(w.to_float()) == bits(decode(w.to_bitsandbytes(NAME)))


def test_a_copy_of_a_model_shares_the_matrix():
    w = le.nf4_quantize(np.ones((4, 64), "f4"))
    assert copy.deepcopy({"layer": w})["layer"] is w
