"""Op 4 on the Triton backend: bytes of the format, products and gradients against the reference."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers import (
    DTYPE_PAIRS,
    DTYPES,
    LAYOUTS,
    TOLERANCE,
    batch_magnitude,
    bits,
    f64,
    fill_pool,
    poisoned,
    strided,
)
from helpers_triton import (  # noqa: F401  the fixture
    few,
    indices,
    interpreted,
    on_device,
    triton_backend,
)
from hypothesis import given
from hypothesis import strategies as st

import lora_engine as le
from lora_engine import reference
from lora_engine.backends import chosen

pytestmark = pytest.mark.usefixtures("triton_backend")

BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
COMPUTES = (None, "float32", "bfloat16")
# Of few rows, of a tile or two of each form, and of more than the widest.
ROWS = st.sampled_from([0, 1, 2, 16, 17, 64, 65, 130])
SIZES = st.sampled_from([1, 31, 32, 33, 64, 96, 127, 160])


def draw_weights(data, rows, cols):
    """float64 of any scale, some with whole blocks of zeros."""
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1), "seed"))
    W = rng.standard_normal((rows, cols)) * 10.0 ** data.draw(st.integers(-3, 3), "scale")
    return W * (rng.random((rows, cols)) < data.draw(st.sampled_from([1.0, 0.01]), "density"))


def parts_of(w):
    """(packed, absmax or codes of it) as arrays."""
    held = w.to_bitsandbytes("w")
    return [np.asarray(held[name]).ravel() for name in ("w", "w.absmax")]


def packed(rng, rows, cols, blocksize=64, double_quant=False):
    return le.nf4_quantize(on_device(rng.standard_normal((rows, cols))), blocksize, double_quant)


# ---- the format -------------------------------------------------------------


@pytest.mark.parametrize("blocksize", BLOCKSIZES)
@few
@given(data=st.data())
def test_the_bytes_are_those_of_the_reference(blocksize, data):
    dtype = data.draw(st.sampled_from(DTYPES), "dtype")
    rows = data.draw(st.sampled_from([1, 2, 3, 17]), "rows")
    cols = data.draw(st.sampled_from([1, 31, 33, 64, 127, 300]), "cols")
    layout = data.draw(st.sampled_from(LAYOUTS), "layout")
    W = strided(on_device(draw_weights(data, rows, cols), dtype), layout)
    before = bits(W)
    codes, absmax = parts_of(le.nf4_quantize(W, blocksize))
    assert bits(W) == before
    want_codes, want_absmax = reference.nf4_quantize(f64(W), blocksize)
    assert codes.tobytes() == want_codes.tobytes()
    assert absmax.tobytes() == want_absmax.tobytes()


def test_values_between_codes_go_the_same_way():
    """Each midpoint and its neighbours in float32, under an absmax that needs the division."""
    codes = reference.NF4_CODES
    middles = (codes[:-1] + codes[1:]) / np.float32(2)
    near = [middles, np.nextafter(middles, np.float32(2)), np.nextafter(middles, np.float32(-2))]
    for scale in (1.0, 3.0, 0.7):
        values = np.concatenate([[1.0], *near]).astype("f4") * np.float32(scale)
        W = np.zeros((1, 64), "f4")
        W[0, : len(values)] = values
        got, _ = parts_of(le.nf4_quantize(on_device(W)))
        assert got.tobytes() == reference.nf4_quantize(W, 64)[0].tobytes()


@pytest.mark.parametrize("double_quant", [False, True], ids=["plain", "double"])
@pytest.mark.parametrize("dtype", DTYPES)
@few
@given(data=st.data())
def test_decoding_is_exact_to_the_bit(dtype, double_quant, data):
    rows = data.draw(st.sampled_from([1, 3, 40]), "rows")
    cols = data.draw(st.sampled_from([1, 32, 33, 127, 160, 2049]), "cols")
    W = draw_weights(data, rows, cols).astype("f4")
    blocksize = data.draw(st.sampled_from(BLOCKSIZES), "blocksize")
    codes, absmax = reference.nf4_quantize(W, blocksize)
    w = le.nf4_quantize(on_device(W), blocksize, double_quant)
    if double_quant:
        nested = reference.double_quantize(absmax)
        absmax = reference.double_dequantize(
            *nested[:2], reference.dynamic_map(), reference.NF4_NESTED_BLOCK, nested[2]
        )
    want = reference.nf4_dequantize(codes, rows, cols, blocksize, absmax)
    layout = data.draw(st.sampled_from(LAYOUTS), "layout")
    out = strided(poisoned(on_device(np.zeros((1, 1)), dtype), rows, cols), layout)
    assert le.nf4_dequantize(w, out) is out
    assert bits(out) == bits(torch.from_numpy(want).to(out.dtype))


def test_decoding_into_the_hosts_memory():
    rng = np.random.default_rng(0)
    w = packed(rng, 5, 96, 64, True)
    array = w.to_float()
    assert isinstance(array, np.ndarray)
    tensor = w.to_float(torch.bfloat16)
    assert bits(tensor) == bits(torch.from_numpy(array).bfloat16())
    out = np.full((10, 192), np.nan, "f4")[::2, ::2]
    assert bits(le.nf4_dequantize(w, out)) == bits(array)


def test_the_bytes_decode_as_those_of_bitsandbytes():
    pytest.importorskip("bitsandbytes")
    from helpers_nf4 import NAME, decode, matrix, state_dict

    for rows, cols, blocksize, double_quant in ((17, 96, 64, True), (5, 93, 32, False)):
        tensors = state_dict(matrix(rows, cols), blocksize, double_quant)
        w = le.NF4Tensor.from_bitsandbytes(tensors, NAME)
        assert bits(w.to_float()) == bits(decode(tensors))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_only_finite_numbers_are_packed(bad):
    W = on_device(np.ones((3, 40)))
    W[2, 39] = bad
    with pytest.raises(ValueError, match="nf4_quantize: W: expected finite numbers"):
        le.nf4_quantize(W)


# ---- the product ------------------------------------------------------------


def assert_linear(y, x, w, dtype, compute=None, bias=None, delta=0.0, delta_size=0.0):
    W = w.to_float().astype("f8")
    want = reference.nf4_linear(f64(x), W, None if bias is None else f64(bias)) + delta
    size = np.abs(f64(x)) @ np.abs(W).T + delta_size
    if bias is not None:
        size = size + np.abs(f64(bias))
    assert tuple(y.shape) == want.shape
    tolerance = max(TOLERANCE[dtype], TOLERANCE["bfloat16"] if compute == "bfloat16" else 0)
    assert np.linalg.norm(f64(y) - want) <= tolerance * np.linalg.norm(size)


@pytest.mark.parametrize("compute", COMPUTES)
@pytest.mark.parametrize("dtype", DTYPES)
@few
@given(data=st.data())
def test_matches_reference(dtype, compute, data):
    n, out, features = (
        data.draw(s, name) for s, name in ((ROWS, "n"), (SIZES, "out"), (SIZES, "in"))
    )
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1), "seed"))
    w = packed(
        rng, out, features, data.draw(st.sampled_from([32, 64, 4096])), data.draw(st.booleans())
    )
    layouts = [data.draw(st.sampled_from(LAYOUTS)) for _ in range(2)]
    x = strided(on_device(rng.standard_normal((n, features)), dtype), layouts[0])
    kind = data.draw(st.sampled_from([None, *DTYPES]), "bias")
    bias = None if kind is None else on_device(rng.standard_normal(out), kind)
    y = strided(poisoned(x, n, out), layouts[1])
    assert le.nf4_linear(x, w, bias, out=y, compute=compute) is y
    assert_linear(y, x, w, dtype, compute, bias)
    assert bits(le.nf4_linear(x, w, bias, compute=compute)) == bits(y)


@pytest.mark.parametrize(
    ("n", "features"), [(1, 160), (2, 160), (17, 96), (65, 64), (130, 32), (1, 93), (33, 93)]
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_form(dtype, n, features):
    rng = np.random.default_rng(n)
    w, x = packed(rng, 70, features), on_device(rng.standard_normal((n, features)), dtype)
    y = poisoned(x, n, 70)
    le.nf4_linear(x, w, out=y)
    assert_linear(y, x, w, dtype)


@pytest.mark.parametrize(
    ("n", "out", "features", "dtype"),
    [
        (1, 20, 2048, "float32"),
        (3, 20, 1056, "float32"),
        (3, 20, 1536, "bfloat16"),
        (20, 3, 1056, "float16"),
        (2, 3, 2049, "float32"),
    ],
)
def test_sums_that_are_split(n, out, features, dtype):
    """Few tiles, many features."""
    rng = np.random.default_rng(0)
    bias = on_device(rng.standard_normal(out))
    w = packed(rng, out, features, 64, features == 1536)
    x = on_device(rng.standard_normal((n, features)), dtype)
    assert_linear(le.nf4_linear(x, w, bias), x, w, dtype, None, bias)


@pytest.mark.parametrize("features", [64, 93])
@pytest.mark.parametrize("n", [1, 20])
def test_identity_returns_x(n, features):
    x = on_device(np.random.default_rng(n).standard_normal((n, features)))
    w = le.nf4_quantize(on_device(np.eye(features)))
    assert bits(le.nf4_linear(x, w)) == bits(x)


def test_compute_float32_is_float32():
    rng = np.random.default_rng(0)
    w = packed(rng, 40, 256)
    x = on_device(rng.standard_normal((3, 256)), "bfloat16")
    wide = f64(x) @ w.to_float().T.astype("f8")
    y = le.nf4_linear(x.float(), w, compute="float32")
    assert np.linalg.norm(f64(y) - wide) <= 1e-6 * np.linalg.norm(wide)


@pytest.mark.parametrize(("x_size", "w_size"), [(65504.0, 1e-4), (1e3, 1e-6), (1e-3, 1e6)])
def test_float16_with_weights_out_of_its_range(x_size, w_size):
    rng = np.random.default_rng(0)
    for n, features in ((1, 64), (5, 64), (5, 33)):
        W = rng.standard_normal((10, features)) * w_size
        w = le.nf4_quantize(on_device(W))
        x = on_device(rng.uniform(-x_size, x_size, (n, features)), "float16")
        assert_linear(le.nf4_linear(x, w), x, w, "float16")


def test_nan_stays_in_its_row():
    rng = np.random.default_rng(1)
    for n, features in ((3, 128), (20, 93)):
        w, x = packed(rng, 40, features), on_device(rng.standard_normal((n, features)))
        plain = le.nf4_linear(x, w)
        x[1, 7] = float("nan")
        y = le.nf4_linear(x, w)
        assert np.isnan(f64(y)[1]).all()
        others = [i for i in range(n) if i != 1]
        assert bits(y[others]) == bits(plain[others])


def test_leading_dimensions_and_a_vector():
    rng = np.random.default_rng(5)
    w, x = packed(rng, 33, 96), on_device(rng.standard_normal((2, 3, 96)))
    flat = le.nf4_linear(x.reshape(6, 96), w)
    assert bits(le.nf4_linear(x, w)) == bits(flat.reshape(2, 3, 33))
    assert bits(le.nf4_linear(x[0, 0], w)) == bits(le.nf4_linear(x[0, :1], w)[0])


# ---- with adapters ----------------------------------------------------------


MIXED = (3, 2, [17, (2, 0)])  # rows, adapters of each, ranks
BATCHES = [(*pair, 2, 1, [1, 3]) for pair in DTYPE_PAIRS] + [(d, d, *MIXED) for d in DTYPES]


@pytest.mark.parametrize(("dtype", "pool_dtype", "n", "k", "ranks"), BATCHES)
def test_deltas_are_added(dtype, pool_dtype, n, k, ranks):
    rng = np.random.default_rng(7)
    features, slices = (64, (20, 13)) if k == 1 else (33, (20, 13))
    filled = fill_pool(rng, features, slices, ranks, pool_dtype)
    w, x = packed(rng, 33, features), on_device(rng.standard_normal((n, features)), dtype)
    bias = on_device(rng.standard_normal(33), dtype)
    ids = rng.integers(-1, 2, (n, k)).astype("i4")
    ids[0] = 1
    weights = rng.uniform(-1, 1, (n, k)).astype("f4") if k > 1 else None
    delta = reference.batched_lora_delta(f64(x), filled.adapters, slices, ids, weights)
    size = batch_magnitude(x, filled.adapters, slices, ids, weights)
    y = strided(poisoned(x, n, 33), "columns")
    on = None if weights is None else on_device(weights)
    le.nf4_linear(x, w, bias, filled.pool, indices(ids), on, out=y)
    assert_linear(y, x, w, dtype, None, bias, delta, size)


@pytest.mark.parametrize(("n", "features"), [(1, 64), (4, 1056), (4, 33), (17, 64), (260, 32)])
def test_rows_without_an_adapter_keep_their_bits(n, features):
    rng = np.random.default_rng(n)
    filled = fill_pool(rng, features, (20,), [1, 3, 2])
    filled.pool.set(2, np.full((2, features), np.nan, "f4"), np.full((20, 2), np.nan, "f4"), 1.0)
    w, x = packed(rng, 20, features), on_device(rng.standard_normal((n, features)), "bfloat16")
    bias = on_device(rng.standard_normal(20))
    plain = le.nf4_linear(x, w, bias)
    none, every = np.full(n, -1, "i4"), rng.integers(0, 2, n).astype("i4")
    assert bits(le.nf4_linear(x, w, bias, filled.pool, indices(none))) == bits(plain)
    mixed = np.where(np.arange(n) % 2 == 0, none, every)
    y = le.nf4_linear(x, w, bias, filled.pool, indices(mixed))
    assert bits(y[::2]) == bits(plain[::2])
    assert (f64(y[1::2]) != f64(plain[1::2])).any(axis=1).all()


# ---- the backward pass ------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@few
@given(data=st.data())
def test_dx_is_grad_times_the_matrix(dtype, data):
    n, out, features = (
        data.draw(s, name) for s, name in ((ROWS, "n"), (SIZES, "out"), (SIZES, "in"))
    )
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1), "seed"))
    layout = data.draw(st.sampled_from(LAYOUTS), "layout")
    w = packed(
        rng, out, features, data.draw(st.sampled_from([32, 64, 512])), data.draw(st.booleans())
    )
    assert_dx(rng, w, n, dtype, layout)


def assert_dx(rng, w, n, dtype, layout="contiguous"):
    out, features = w.shape
    grad = strided(on_device(rng.standard_normal((n, out)), dtype), layout)
    dx = strided(poisoned(grad, n, features), layout)
    assert chosen().nf4_linear_backward(grad, w.storage(chosen()), dx) is dx
    W = w.to_float().astype("f8")
    size = np.linalg.norm(np.abs(f64(grad)) @ np.abs(W))
    assert np.linalg.norm(f64(dx) - f64(grad) @ W) <= TOLERANCE[dtype] * size


@pytest.mark.parametrize(
    ("n", "out", "features", "dtype"),
    [
        (2, 2049, 33, "float32"),
        (1, 1056, 64, "bfloat16"),
        (70, 40, 96, "float32"),
        (70, 40, 96, "bfloat16"),
        (70, 40, 96, "float16"),
    ],
)
def test_dx_of_long_sums_and_many_rows(n, out, features, dtype):
    rng = np.random.default_rng(n)
    assert_dx(rng, packed(rng, out, features), n, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(7, 96), (2, 3, 96), (96,)])
def test_gradients_of_x_and_bias(dtype, shape):
    rng = np.random.default_rng(2)
    w = packed(rng, 40, 96)
    x = on_device(rng.standard_normal(shape), dtype).requires_grad_()
    bias = on_device(rng.standard_normal(40), dtype).requires_grad_()
    y = le.nf4_linear(x, w, bias)
    up = on_device(rng.standard_normal(tuple(y.shape)), dtype)
    y.backward(up)
    W = w.to_float().astype("f8")
    size = np.linalg.norm(np.abs(f64(up)) @ np.abs(W))
    assert np.linalg.norm(f64(x.grad) - f64(up) @ W) <= TOLERANCE[dtype] * size
    want = f64(up).reshape(-1, 40).sum(0)
    size = np.linalg.norm(np.abs(f64(up)).reshape(-1, 40).sum(0))
    assert np.linalg.norm(f64(bias.grad) - want) <= TOLERANCE[dtype] * size


def test_the_gradient_agrees_with_finite_differences():
    rng = np.random.default_rng(3)
    w = packed(rng, 40, 96)
    x = on_device(rng.standard_normal((7, 96))).requires_grad_()
    up = on_device(rng.standard_normal((7, 40)))
    le.nf4_linear(x, w).backward(up)

    def loss(rows):
        return float((f64(le.nf4_linear(rows, w)) * f64(up)).sum())

    step = on_device(rng.standard_normal((7, 96)))
    slope = (loss(x.detach() + step) - loss(x.detach() - step)) / 2
    want = (f64(x.grad) * f64(step)).sum()
    assert abs(slope - want) <= 1e-5 * np.abs(f64(x.grad) * f64(step)).sum()


# ---- refusals ---------------------------------------------------------------


def test_what_does_not_fit_is_refused_before_damage():
    rng = np.random.default_rng(0)
    w, x = packed(rng, 8, 64), on_device(rng.standard_normal((3, 64)))
    small = fill_pool(rng, 64, (7,), [1]).pool
    ids = indices([0, -1, 0])
    cases = [
        ({"x": x[:, :63]}, ValueError, r"x: expected shape \[n, 64\], got \[3, 63\]"),
        ({"x": x.double()}, TypeError, "x: expected float32, bfloat16 or float16, got float64"),
        ({"bias": x[0, :9]}, ValueError, r"bias: expected shape \[out\] = \[8\], got \[9\]"),
        ({"bias": x[0, :8].double()}, TypeError, "bias: expected float32, bfloat16 or float16"),
        ({"compute": "int8"}, ValueError, "compute: expected float32, bfloat16 or None, got int8"),
        ({"pool": small, "ids": ids}, ValueError, r"pool: expected .*\[64, 8\], got \[64, 7\]"),
        ({"out": x[:, :8]}, ValueError, "out: expected memory of its own, got .* shared with x"),
        ({"out": x.half()[:, :8].clone()}, TypeError, "out: expected float32, the dtype of x"),
    ]  # fmt: skip
    for changes, error, message in cases:
        args = {"x": x, "w": w, "out": on_device(np.full((3, 8), 5.0))} | changes
        before = bits(args["out"])
        with pytest.raises(error, match="nf4_linear: " + message):
            le.nf4_linear(**args)
        assert bits(args["out"]) == before


@interpreted
def test_an_output_over_the_packed_bytes():
    codes = np.zeros(256 * 64 // 2, np.uint8)
    held = chosen().Nf4(codes, 256, 64, 64, np.ones(256, "f4"), None, None, 0, 0.0)
    over = codes[: 8 * 256 * 4].view("f4").reshape(8, 256)
    with pytest.raises(ValueError, match="out: expected memory of its own, got memory shared with"):
        chosen().nf4_linear(np.ones((8, 64), "f4"), held, None, None, None, None, over, None)
    assert not codes.any()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"packed": np.zeros(255, "u1")}, ValueError, "packed: expected 256 elements, got 255"),
        ({"packed": np.zeros(512, "u1")[::2]}, ValueError, "packed: expected contiguous memory"),
        ({"absmax": np.ones(9, "f4")}, ValueError, "absmax: expected 8 elements, got 9"),
        ({"absmax": np.ones(8, "f8")}, TypeError, "absmax: expected float32, got float64"),
        ({"rows": 0}, ValueError, r"shape: expected rows and cols from 1.*got \[0, 64\]"),
        ({"rows": 2**60, "cols": 2**60}, ValueError, "shape: expected rows and cols from 1"),
        ({"blocksize": 48}, ValueError, "blocksize: expected a power of two from 32 to 4096"),
    ],
)
def test_a_matrix_of_the_wrong_sizes(change, error, message):
    args = {
        "packed": np.zeros(256, "u1"), "rows": 8, "cols": 64, "blocksize": 64,
        "absmax": np.ones(8, "f4"),
    }  # fmt: skip
    with pytest.raises(error, match="Nf4: " + message):
        chosen().Nf4(**(args | change))


def test_the_packed_matrix_is_never_altered():
    rng = np.random.default_rng(2)
    for double_quant in (False, True):
        w = packed(rng, 40, 96, 64, double_quant)
        before = [part.tobytes() for part in parts_of(w)]
        for n in (1, 20):
            x = on_device(rng.standard_normal((n, 96))).requires_grad_()
            le.nf4_linear(x, w).sum().backward()
        on = w.storage(chosen()).on(x.device)
        assert [part.tobytes() for part in parts_of(w)] == before
        assert on.codes.cpu().numpy().tobytes() == before[0]
