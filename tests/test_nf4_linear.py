"""nf4_linear against the reference and against onnxruntime and bitsandbytes on the same bytes."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from helpers import (
    DTYPES,
    LAYOUTS,
    TOLERANCE,
    batch_magnitude,
    bits,
    f64,
    fill_pool,
    poisoned,
    strided,
    to_dtype,
)
from hypothesis import given
from hypothesis import strategies as st

import lora_engine as le
from lora_engine import reference
from lora_engine.backends import chosen

ROWS = (0, 1, 2, 3, 7, 8, 40, 64, 100)
OUT, IN = (1, 2, 32, 33, 288), (16, 32, 64, 93, 96, 128, 1234, 4304)
COMPUTES = (None, "float32", "bfloat16")
# Some features of which the rows of one matrix begin in the middle of a chunk of 64.
SIZES = st.one_of(
    st.sampled_from([1, 31, 32, 63, 64, 65, 127, 128, 192, 2049]), st.integers(1, 300)
)


def tolerance(dtype, compute):
    return max(TOLERANCE[dtype], TOLERANCE["bfloat16"] if compute == "bfloat16" else 0)


def matrix(rng, out, features, blocksize=64, double_quant=False):
    return le.nf4_quantize(
        rng.standard_normal((out, features)).astype("f4"), blocksize, double_quant
    )


def assert_linear(y, x, w, dtype, compute=None, bias=None, delta=None, delta_size=0.0):
    W = w.to_float()
    want = reference.nf4_linear(f64(x), W, None if bias is None else f64(bias))
    size = np.abs(f64(x)) @ np.abs(W).T.astype("f8") + delta_size
    if bias is not None:
        size = size + np.abs(f64(bias))
    if delta is not None:
        want = want + delta
    assert y.shape == want.shape
    assert np.linalg.norm(f64(y) - want) <= tolerance(dtype, compute) * np.linalg.norm(size)


@pytest.mark.parametrize("features", IN)
@pytest.mark.parametrize("out", OUT)
def test_acceptance_sizes(out, features):
    rng = np.random.default_rng(out * features)
    for blocksize, double_quant in ((64, False), (64, True), (32, False), (256, True)):
        w = matrix(rng, out, features, blocksize, double_quant)
        for n in ROWS:
            dtype = DTYPES[n % 3]
            x = to_dtype(rng.standard_normal((n, features)), dtype)
            for compute in COMPUTES[: 1 if n > 8 else 3]:
                y = poisoned(x, n, out)
                le.nf4_linear(x, w, out=y, compute=compute)
                assert_linear(y, x, w, dtype, compute)


@st.composite
def drawn(draw):
    n, features, out = draw(st.sampled_from([0, 1, 2, 4, 5, 17, 70])), draw(SIZES), draw(SIZES)
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    dtype = draw(st.sampled_from(DTYPES))
    kind = draw(st.sampled_from(["numpy", "torch"])) if dtype == "float32" else "torch"
    layout = draw(st.sampled_from(LAYOUTS))
    x = strided(to_dtype(rng.standard_normal((n, features)), dtype, kind), layout)
    bias = to_dtype(rng.standard_normal(out), dtype, kind) if draw(st.booleans()) else None
    blocksize = draw(st.sampled_from([32, 64, 128, 1024, 4096]))
    w = matrix(rng, out, features, blocksize, draw(st.booleans()))
    return rng, x, w, bias, dtype


@given(
    drawn(),
    st.sampled_from(DTYPES),
    st.sampled_from([0, 1, 3]),
    st.sampled_from(LAYOUTS),
    st.sampled_from(COMPUTES),
)
def test_matches_reference(case, pool_dtype, k, layout, compute):
    """k adapters a row, 0: no pool. Mixed ranks, rows without, one slice or two."""
    rng, x, w, bias, dtype = case
    out, features = w.shape
    pool = ids = weights = delta = None
    size = 0.0
    if k:
        slices = (out,) if out < 2 else (out // 2, out - out // 2)
        filled = fill_pool(rng, features, slices, [1, 5, 17, (2, 0)[: len(slices)]], pool_dtype)
        pool = filled.pool
        ids = rng.integers(-1, 4, (len(x), k) if k > 1 else len(x)).astype("i4")
        weights = rng.uniform(-1, 1, ids.shape).astype("f4") if k > 1 else None
        delta = reference.batched_lora_delta(f64(x), filled.adapters, slices, ids, weights)
        size = batch_magnitude(x, filled.adapters, slices, ids, weights)
    y = strided(poisoned(x, len(x), out), layout)
    assert le.nf4_linear(x, w, bias, pool, ids, weights, out=y, compute=compute) is y
    assert_linear(y, x, w, dtype, compute, bias, delta, size)
    assert bits(le.nf4_linear(x, w, bias, pool, ids, weights, compute=compute)) == bits(y)


@pytest.mark.parametrize("features", [32, 64, 93, 128, 300])
@pytest.mark.parametrize("n", [1, 3, 20])
def test_identity_returns_x(features, n):
    x = np.random.default_rng(n).standard_normal((n, features)).astype("f4")
    for blocksize in (32, 64, 4096):
        w = le.nf4_quantize(np.eye(features, dtype="f4"), blocksize)
        assert bits(le.nf4_linear(x, w)) == bits(x)


def test_compute_float32_is_float32():
    """Not bfloat16 behind the back, whatever the dtype of x: errors of 1e-6, not of 1e-3."""
    rng = np.random.default_rng(0)
    w = matrix(rng, 64, 512)
    for dtype in DTYPES:
        x = to_dtype(rng.standard_normal((3, 512)), dtype)
        wide = f64(x) @ w.to_float().T.astype("f8")
        y = le.nf4_linear(x.float(), w, compute="float32")
        assert np.linalg.norm(f64(y) - wide) <= 1e-6 * np.linalg.norm(wide)
        if dtype == "float32":
            continue
        rounded = torch.from_numpy(wide).to(x.dtype)
        same = (le.nf4_linear(x, w, compute="float32") == rounded).float().mean()
        assert same > 0.98  # but for ties that float32 sums break


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1, 4, 16, 17, 90])
def test_rows_without_an_adapter_keep_their_bits(n, dtype):
    rng = np.random.default_rng(n)
    filled = fill_pool(rng, 192, (70,), [1, 3, 16])
    filled.pool.set(2, np.full((2, 192), np.nan, "f4"), np.full((70, 2), np.nan, "f4"), 1.0)
    w, x = matrix(rng, 70, 192), to_dtype(rng.standard_normal((n, 192)), dtype)
    plain = le.nf4_linear(x, w)
    none, every = np.full(n, -1, "i4"), rng.integers(0, 2, n).astype("i4")
    assert bits(le.nf4_linear(x, w, pool=filled.pool, ids=none)) == bits(plain)
    mixed = np.where(np.arange(n) % 2 == 0, none, every).astype("i4")
    y = le.nf4_linear(x, w, pool=filled.pool, ids=mixed)
    assert bits(y[::2]) == bits(plain[::2])
    whole = le.nf4_linear(x, w, pool=filled.pool, ids=every)
    assert bits(y[1::2]) == bits(whole[1::2])
    assert (f64(whole) != f64(plain)).any(axis=1).all()


@pytest.mark.parametrize("n", [1, 3, 8, 33, 130])
@pytest.mark.parametrize("features", [2048, 2049])
def test_the_same_bits_on_any_number_of_threads(n, features, threads):
    rng = np.random.default_rng(n)
    filled = fill_pool(rng, features, (515,), [1, 16])
    w, x = matrix(rng, 515, features), rng.standard_normal((n, features)).astype("f4")
    ids = rng.integers(-1, 2, n).astype("i4")
    grad = rng.standard_normal((n, 515)).astype("f4")
    results = []
    for count in (1, 2, 3):
        threads(count)
        y = le.nf4_linear(x, w, pool=filled.pool, ids=ids)
        back = chosen().nf4_linear_backward(grad, w.storage(chosen()), None)
        results.append((bits(y), bits(back)))
    assert len(set(results)) == 1


def test_any_leading_dimensions_and_a_vector():
    rng = np.random.default_rng(5)
    w = matrix(rng, 33, 96)
    x = rng.standard_normal((2, 3, 5, 96)).astype("f4")
    flat = le.nf4_linear(x.reshape(-1, 96), w)
    assert bits(le.nf4_linear(x, w)) == bits(flat.reshape(2, 3, 5, 33))
    moved = x.transpose(1, 0, 2, 3)
    assert bits(le.nf4_linear(moved, w)) == bits(flat.reshape(2, 3, 5, 33).transpose(1, 0, 2, 3))
    y = torch.full((2, 3, 5, 33), float("nan"))
    assert le.nf4_linear(torch.from_numpy(x), w, out=y) is y
    assert bits(y) == bits(flat.reshape(2, 3, 5, 33))
    assert le.nf4_linear(x[0, 0, 0], w).shape == (33,)
    assert le.nf4_linear(np.empty((2, 0, 96), "f4"), w).shape == (2, 0, 33)
    for shape in ((3, 2, 5, 33), (30, 33), (2, 3, 5, 34), (990,)):
        wrong = np.full(shape, 5.0, "f4")
        with pytest.raises(ValueError, match=r"nf4_linear: out: expected shape \[2, 3, 5, 33\]"):
            le.nf4_linear(x, w, out=wrong)
        assert (wrong == 5.0).all()
    with pytest.raises(ValueError, match="out: expected leading dimensions that are one in memory"):
        le.nf4_linear(x, w, out=np.empty((2, 6, 5, 33), "f4")[:, ::2])


def test_nan_stays_in_its_row():
    rng = np.random.default_rng(1)
    for n, features in ((3, 128), (3, 93), (30, 128)):
        w, x = matrix(rng, 40, features), rng.standard_normal((n, features)).astype("f4")
        plain = le.nf4_linear(x, w)
        x[1, 7] = np.nan
        y = le.nf4_linear(x, w)
        assert np.isnan(y[1]).all()
        others = np.arange(n) != 1
        assert bits(y[others]) == bits(plain[others])


def test_the_packed_matrix_is_never_altered():
    rng = np.random.default_rng(2)
    W = rng.standard_normal((64, 192)).astype("f4")
    for double_quant in (False, True):
        held = le.nf4_quantize(W, 64, double_quant).to_bitsandbytes("w")
        tensors = {name: torch.from_numpy(np.array(a)) for name, a in held.items()}
        before = {name: bits(t) if t.element_size() > 1 else t.numpy().tobytes()
                  for name, t in tensors.items()}  # fmt: skip
        w = le.NF4Tensor.from_bitsandbytes(tensors, "w")
        size = w.nbytes
        for n in (1, 8, 40):
            x = torch.randn(n, 192, requires_grad=True)
            le.nf4_linear(x, w).sum().backward()
        after = {name: bits(t) if t.element_size() > 1 else t.numpy().tobytes()
                 for name, t in tensors.items()}  # fmt: skip
        assert (before, size) == (after, w.nbytes)


# ---- peers on the same bytes ------------------------------------------------


def by_onnxruntime(w, x):
    parts = {name: np.asarray(a) for name, a in w.to_bitsandbytes("w").items()}
    node = onnx.helper.make_node(
        "MatMulBnb4", ["x", "codes", "absmax"], ["y"], domain="com.microsoft",
        K=w.shape[1], N=w.shape[0], block_size=w.blocksize, quant_type=1,
    )  # fmt: skip
    value = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [node],
        "linear",
        [value("x", onnx.TensorProto.FLOAT, list(x.shape))],
        [value("y", onnx.TensorProto.FLOAT, [len(x), w.shape[0]])],
        [
            onnx.numpy_helper.from_array(parts["w"].reshape(-1), "codes"),
            onnx.numpy_helper.from_array(parts["w.absmax"], "absmax"),
        ],
    )
    opsets = [onnx.helper.make_opsetid(d, v) for d, v in (("", 17), ("com.microsoft", 1))]
    model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=9)
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    return session.run(None, {"x": x})[0]


@pytest.mark.parametrize("n", [1, 5, 40])
@pytest.mark.parametrize("blocksize", [32, 64, 128])
def test_onnxruntime_gives_the_same(n, blocksize):
    rng = np.random.default_rng(n)
    w, x = matrix(rng, 48, 256, blocksize), rng.standard_normal((n, 256)).astype("f4")
    size = np.abs(x) @ np.abs(w.to_float()).T
    gap = np.linalg.norm(le.nf4_linear(x, w) - by_onnxruntime(w, x))
    assert gap <= 2e-6 * np.linalg.norm(size)


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_layer_of_bitsandbytes_gives_the_same(dtype, double_quant):
    from helpers_nf4 import NAME, bitsandbytes

    layer = bitsandbytes.nn.Linear4bit(
        256, 96, compute_dtype=getattr(torch, dtype), quant_type="nf4",
        compress_statistics=double_quant,
    ).to("cpu")  # fmt: skip
    saved = {name: t.clone() for name, t in layer.state_dict(prefix="model.q_proj.").items()}
    w = le.NF4Tensor.from_bitsandbytes(saved, NAME)
    bias = layer.bias.detach().to(getattr(torch, dtype))
    for n in (1, 6, 40):
        x = torch.randn(n, 256).to(bias.dtype)
        with torch.no_grad():
            theirs = layer(x)
        y = le.nf4_linear(x, w, bias)
        size = np.abs(f64(x)) @ np.abs(w.to_float()).T + np.abs(f64(bias))
        gap = np.linalg.norm(f64(y) - f64(theirs))
        assert gap <= 2 * TOLERANCE[dtype] * np.linalg.norm(size)


# ---- batches as servers see them, and memory --------------------------------

RANKS = (0, 1, 2, 3, 8, 17, 64, 256)


@pytest.mark.parametrize("n", [1, 8, 16, 100])
def test_every_rank_in_one_batch(n):
    rng = np.random.default_rng(n)
    filled = fill_pool(rng, 128, (65,), list(RANKS))
    w, x = matrix(rng, 65, 128), rng.standard_normal((n, 128)).astype("f4")
    ids = rng.integers(-1, len(RANKS), n).astype("i4")
    delta = reference.batched_lora_delta(x, filled.adapters, (65,), ids)
    size = batch_magnitude(x, filled.adapters, (65,), ids)
    assert_linear(le.nf4_linear(x, w, pool=filled.pool, ids=ids), x, w, "float32", delta=delta,
                  delta_size=size)  # fmt: skip


def test_a_thousand_adapters_and_a_long_tail():
    rng = np.random.default_rng(4)
    filled = fill_pool(rng, 64, (16, 8, 8), [(2, 0, 1)] * 1024)
    w, x = matrix(rng, 32, 64), rng.standard_normal((300, 64)).astype("f4")
    ids = (np.minimum(rng.zipf(1.3, 300), 1024) - 1).astype("i4")
    delta = reference.batched_lora_delta(x, filled.adapters, (16, 8, 8), ids)
    size = batch_magnitude(x, filled.adapters, (16, 8, 8), ids)
    y = le.nf4_linear(x, w, pool=filled.pool, ids=ids)
    assert_linear(y, x, w, "float32", delta=delta, delta_size=size)
    A, B, s = filled.pool.get(int(ids[0]))
    filled.pool.set(int(ids[0]), [a * 2 if a is not None else None for a in A], B, s)
    changed = le.nf4_linear(x, w, pool=filled.pool, ids=ids)
    same = ids != ids[0]
    assert bits(changed[same]) == bits(y[same])
    assert (changed[~same] != y[~same]).any(axis=1).all()


MEMORY = """
import resource
import subprocess
import sys

import numpy as np
from lora_engine import _C

rows = cols = 16384  # 128 MiB packed; decoded it would be 1 GiB
packed = np.full(rows * cols // 2, 0x5A, np.uint8)
w = _C.Nf4(packed, rows, cols, 64, np.ones(rows * cols // 64, np.float32))
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
before = peak()
for n in (1, 3, 40):
    y = _C.nf4_linear(np.ones((n, cols), np.float32), w, None, None, None, None, None, None)
    _C.nf4_linear_backward(y, w, None)
print(peak() - before)
"""


def test_the_matrix_is_never_decoded_whole():
    ran = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert int(ran.stdout) < 32 * 1024  # KiB


@pytest.mark.parametrize("features", [2048, 4096, 4160, 11008])
@pytest.mark.parametrize("n", [1, 2, 3, 4, 7, 16])
def test_rows_longer_than_what_stays_in_the_cache(n, features):
    rng = np.random.default_rng(n * features)
    for blocksize, double_quant in ((64, False), (32, False), (128, True)):
        w = matrix(rng, 5, features, blocksize, double_quant)
        x = to_dtype(rng.standard_normal((n, features)), "float32")
        for compute in COMPUTES[1:]:
            y = poisoned(x, n, 5)
            le.nf4_linear(x, w, out=y, compute=compute)
            assert_linear(y, x, w, "float32", compute)
