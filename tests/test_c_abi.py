"""The C ABI through ctypes: what a host that is not Python sees."""

from __future__ import annotations

import ctypes as c
import runpy

import numpy as np
import pytest
from helpers_native import ROOT

from lora_engine import _C, reference
from lora_engine.reference_ewc import delta_penalty

LIB = c.CDLL(_C.__file__)
OK, VALUE, TYPE, INDEX = 0, 1, 2, 3
HOST = runpy.run_path(str(ROOT / "examples" / "python" / "host.py"))
LeArray, LePoolOptions, LeStep = HOST["Array"], HOST["PoolOptions"], HOST["Step"]


class LeContextOptions(c.Structure):
    _fields_ = [
        ("abi_version", c.c_int32),
        ("num_threads", c.c_int32),
        *((name, c.c_void_p) for name in ("threads", "allocator", "log")),
    ]


for name in ("le_last_error", "le_status_string", "le_isa", "le_isa_built"):
    getattr(LIB, name).restype = c.c_char_p
LIB.le_pool_create.argtypes = [c.c_void_p, c.POINTER(LePoolOptions), c.POINTER(c.c_void_p)]
for name in ("le_last_error", "le_context_destroy", "le_pool_destroy", "le_get_num_threads"):
    getattr(LIB, name).argtypes = [c.c_void_p]
LIB.le_pool_add.argtypes = [c.c_void_p, *[c.POINTER(LeArray)] * 2, c.c_float, c.POINTER(c.c_int32)]
LIB.le_pool_forward.argtypes = [
    c.c_void_p,
    *[c.POINTER(LeArray)] * 3,
    c.c_int32,
    c.c_int32,
    c.POINTER(LeArray),
]
LIB.le_pool_adapt.argtypes = [
    c.c_void_p,
    *[c.POINTER(LeArray)] * 4,
    c.POINTER(LeStep),
    c.c_void_p,
]
LIB.le_lora_fisher.argtypes = [
    c.c_void_p,
    *[c.POINTER(LeArray)] * 4,
    c.c_float,
    c.POINTER(LeArray),
    c.c_int32,
    *[c.POINTER(LeArray)] * 2,
]
LIB.le_lora_fisher_factors.argtypes = [
    c.c_void_p,
    *[c.POINTER(LeArray)] * 2,
    c.c_int32,
    *[c.POINTER(LeArray)] * 2,
]


class LeNf4(c.Structure):
    _fields_ = [
        ("packed", c.c_void_p),
        ("rows", c.c_int64),
        ("cols", c.c_int64),
        ("blocksize", c.c_int32),
        ("absmax", c.c_void_p),
        ("absmax_codes", c.c_void_p),
        ("nested_absmax", c.c_void_p),
        ("nested_map", c.c_void_p),
        ("nested_blocksize", c.c_int32),
        ("nested_offset", c.c_float),
    ]


class LeMerge(c.Structure):
    _fields_ = [
        *((name, c.POINTER(LeArray)) for name in ("slots", "weights", "u", "v", "samples")),
        ("rank", c.c_int32),
        ("scaling", c.c_float),
        ("max_sweeps", c.c_int32),
        ("tolerance", c.c_float),
        ("num_threads", c.c_int32),
    ]


ARRAY, NF4 = c.POINTER(LeArray), c.POINTER(LeNf4)
LIB.le_consolidate.argtypes = [
    c.c_void_p, c.c_int32, c.POINTER(LeMerge), ARRAY, ARRAY, c.c_void_p, c.c_void_p
]  # fmt: skip
LIB.le_nf4_encode.argtypes = [c.c_void_p, ARRAY, c.c_int32, c.c_void_p, c.c_void_p]
LIB.le_nf4_decode.argtypes = [c.c_void_p, NF4, ARRAY]
LIB.le_nf4_linear.argtypes = [
    c.c_void_p, ARRAY, NF4, ARRAY, c.c_void_p, ARRAY, ARRAY, c.c_int32, ARRAY
]  # fmt: skip
LIB.le_nf4_linear_backward.argtypes = [c.c_void_p, ARRAY, NF4, ARRAY]
LIB.le_pool_remove.argtypes = [c.c_void_p, c.c_int32]
LIB.le_ewc_create.argtypes = [c.c_void_p, c.c_int32, c.c_float, c.POINTER(c.c_void_p)]
LIB.le_ewc_destroy.argtypes = [c.c_void_p]
LIB.le_ewc_set.argtypes = [c.c_void_p, c.c_int32, *[ARRAY] * 2]
for name in ("le_ewc_get", "le_ewc_restore"):
    getattr(LIB, name).argtypes = [c.c_void_p, c.c_int32, *[ARRAY] * 4]
LIB.le_ewc_penalty.argtypes = [c.c_void_p, c.POINTER(c.c_double)]


def view(a: np.ndarray) -> LeArray:
    dtype = {"float32": 0, "int32": 3, "float64": 5}[a.dtype.name]
    shape = (c.c_int64 * 4)(*a.shape)
    strides = (c.c_int64 * 4)(*[s // a.itemsize for s in a.strides])
    return LeArray(a.ctypes.data, shape, strides, a.ndim, dtype, 0)


@pytest.fixture
def handles():
    ctx, pool = c.c_void_p(), c.c_void_p()
    options = LeContextOptions(1, 2, None, None, None)
    assert LIB.le_context_create(c.byref(options), c.byref(ctx)) == OK
    out = c.c_int64(8)
    options = LePoolOptions(16, c.pointer(out), 1, 0, 0, 0, 0, 0)
    assert LIB.le_pool_create(ctx, c.byref(options), c.byref(pool)) == OK
    yield ctx, pool
    LIB.le_pool_destroy(pool)
    LIB.le_context_destroy(ctx)


def add(pool, seed=0):
    rng = np.random.default_rng(seed)
    A, B = rng.standard_normal((2, 16)).astype("f4"), rng.standard_normal((8, 2)).astype("f4")
    slot = c.c_int32(-1)
    assert LIB.le_pool_add(pool, view(A), view(B), 0.5, c.byref(slot)) == OK
    return slot.value, A, B


def test_version_isa_and_threads(handles):
    assert LIB.le_abi_version() == 1
    assert LIB.le_version() == 0x000100
    assert LIB.le_isa().decode() == _C.isa()
    assert LIB.le_isa_built(0, None) == b"generic"
    assert LIB.le_isa_built(99, None) is None
    assert LIB.le_get_num_threads(handles[0]) == 2
    assert LIB.le_status_string(INDEX) == b"no such slot"
    assert LIB.le_status_string(99) == b"unknown status"


def test_forward_and_adapt_match_the_reference(handles):
    _, pool = handles
    slot, A, B = add(pool)
    rng = np.random.default_rng(1)
    x, grad = rng.standard_normal((3, 16)).astype("f4"), rng.standard_normal((3, 8)).astype("f4")
    ids = np.array([slot, -1, slot], "i4")
    y = np.full((3, 8), np.nan, "f4")
    assert LIB.le_pool_forward(pool, view(x), view(ids), None, 0, 0, view(y)) == OK
    want = reference.lora_delta(x, A, B, 0.5)
    assert np.allclose(y[[0, 2]], want[[0, 2]], rtol=0, atol=1e-5)
    assert (y[1] == 0).all()

    outcomes = np.full(3, 9, "u1")
    step = LeStep(0.1, 1.0, 0.0, 0.0, 1, None)
    status = LIB.le_pool_adapt(
        pool, view(x), view(grad), view(ids), None, step, outcomes.ctypes.data
    )
    assert (status, outcomes.tolist()) == (OK, [1, 0, 1])
    gA, gB = reference.adapter_gradients(x[[0, 2]], grad[[0, 2]], A, B, 0.5)
    moved = reference.lora_delta(x, A - 0.05 * gA, B - 0.05 * gB, 0.5)
    assert LIB.le_pool_forward(pool, view(x), view(ids), None, 0, 0, view(y)) == OK
    assert np.allclose(y[[0, 2]], moved[[0, 2]], rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", ["f4", "f8"])
def test_fisher_sums_overwrite_or_add(handles, dtype):
    ctx, _ = handles
    rng = np.random.default_rng(2)
    shapes = (5, 16), (5, 8), (2, 16), (8, 2)
    x, grad, A, B = (rng.standard_normal(s).astype("f4") for s in shapes)
    segments = np.array([0, 2, 2, 5], "i4")
    sums = [np.full(s, np.nan, dtype) for s in ((2, 16), (8, 2), (8,), (16,))]
    want = (
        *reference.lora_fisher(x, grad, A, B, 0.5, segments),
        *reference.lora_fisher_factors(x, grad),
    )
    for accumulate in (0, 1):
        F_A, F_B, u, v = map(view, sums)
        args = view(x), view(grad), view(A), view(B), 0.5, view(segments), accumulate, F_A, F_B
        assert LIB.le_lora_fisher(ctx, *args) == OK
        assert LIB.le_lora_fisher_factors(ctx, view(x), view(grad), accumulate, u, v) == OK
        for got, ref in zip(sums, want, strict=True):
            assert np.allclose(got, (1 + accumulate) * ref, rtol=1e-5, atol=1e-6)
    assert LIB.le_lora_fisher_factors(ctx, view(x), view(grad), 0, view(segments), v) == VALUE
    assert LIB.le_lora_fisher_factors(ctx, view(x), None, 0, u, v) == VALUE


def nf4(W, blocksize=64):
    """(le_nf4 of W, what it borrows)."""
    packed, absmax = reference.nf4_quantize(W, blocksize)
    held = LeNf4(
        packed.ctypes.data, *W.shape, blocksize, absmax.ctypes.data, None, None, None, 0, 0.0
    )
    return held, (packed, absmax)


def test_nf4_both_ways_and_multiplied(handles):
    ctx, pool = handles
    slot, A, B = add(pool)
    rng = np.random.default_rng(3)
    W, x = rng.standard_normal((8, 16)).astype("f4"), rng.standard_normal((3, 16)).astype("f4")
    w, (packed, absmax) = nf4(W)
    codes, scales = np.full_like(packed, 255), np.full_like(absmax, np.nan)
    args = ctx, view(W), 64, codes.ctypes.data, scales.ctypes.data
    assert LIB.le_nf4_encode(*args) == OK
    assert (codes == packed).all()
    assert (scales == absmax).all()
    decoded = np.full((8, 16), np.nan, "f4")
    assert LIB.le_nf4_decode(ctx, c.byref(w), view(decoded)) == OK
    assert (decoded == reference.nf4_dequantize(packed, 8, 16, 64, absmax)).all()
    y, ids = np.full((3, 8), np.nan, "f4"), np.array([slot, -1, slot], "i4")
    status = LIB.le_nf4_linear(ctx, view(x), w, None, pool, view(ids), None, -1, view(y))
    delta = np.where(ids[:, None] < 0, 0, reference.lora_delta(x, A, B, 0.5))
    assert status == OK
    assert np.allclose(y, x @ decoded.T + delta, rtol=0, atol=1e-5)
    dx = np.full((3, 16), np.nan, "f4")
    assert LIB.le_nf4_linear_backward(ctx, view(y), w, view(dx)) == OK
    assert np.allclose(dx, y @ decoded, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"packed": None}, b"w: expected codes and scales, got NULL"),
        ({"absmax": None}, b"w: expected codes and scales, got NULL"),
        ({"blocksize": 48}, b"blocksize: expected a power of two from 32 to 4096, got 48"),
        ({"blocksize": 8192}, b"blocksize: expected a power of two from 32 to 4096, got 8192"),
        ({"rows": 0}, b"w: expected rows and cols from 1"),
        ({"rows": 2**40, "cols": 2**40}, b"w: expected rows and cols from 1, 2^48 elements"),
        ({"cols": 15}, b"x: expected shape [n, in] = [n, 15], got [3, 16]"),
        ({"rows": 7}, b"out: expected shape [n, out] = [3, 7], got [3, 8]"),
    ],
)
def test_nf4_refusals(handles, change, words):
    ctx, _ = handles
    w, held = nf4(np.ones((8, 16), "f4"))
    for name, value in change.items():
        setattr(w, name, value)
    x, y = np.ones((3, 16), "f4"), np.full((3, 8), 7.0, "f4")
    args = ctx, view(x), w, None, None, None, None, -1, view(y)
    assert LIB.le_nf4_linear(*args) == VALUE
    assert words in LIB.le_last_error(ctx)
    assert (y == 7.0).all()
    assert LIB.le_nf4_linear(ctx, view(x), None, None, None, None, None, -1, view(y)) == VALUE
    del held


def test_consolidate(handles):
    _, pool = handles
    deltas = []
    for seed in range(3):
        _, A, B = add(pool, seed)
        deltas.append(0.5 * B @ A)
    slots, weights = np.array([1, 2], "i4"), np.array([0, 0.25, 0.75], "f4")
    keep = view(slots), view(weights)
    merge = LeMerge(c.pointer(keep[0]), c.pointer(keep[1]), None, None, None, 6, 1.0, 9, 1e-6, 1)
    A, B = np.full((6, 16), np.nan, "f4"), np.full((8, 6), np.nan, "f4")
    versions, info = np.zeros(3, "u8"), np.zeros(2, "i4")
    told = versions.ctypes.data, info.ctypes.data
    assert LIB.le_consolidate(pool, 0, merge, view(A), view(B), *told) == OK
    want = deltas[0] + 0.25 * deltas[1] + 0.75 * deltas[2]
    assert np.allclose(B @ A, want, rtol=0, atol=1e-5)
    assert versions.tolist() == [1, 1, 1]
    assert info[0] >= 1
    A[:] = 7
    for arguments in (
        (None, 0, merge, view(A), view(B), *told),
        (pool, 0, None, view(A), view(B), *told),
        (pool, 0, merge, None, view(B), *told),
        (pool, 0, merge, view(A), view(B), None, told[1]),
        (pool, 0, merge, view(A), view(B), told[0], None),
        (pool, 0, LeMerge(None, c.pointer(keep[1]), None, None, None, 6, 1.0, 9, 1e-6, 1), view(A),
         view(B), *told),
    ):  # fmt: skip
        assert LIB.le_consolidate(*arguments) == VALUE
    assert LIB.le_consolidate(pool, 3, merge, view(A), view(B), *told) == INDEX
    assert (A == 7).all()


def test_a_record_of_ewc_in_delta_form(handles):
    ctx, pool = handles
    slot, A, B = add(pool)
    rng = np.random.default_rng(4)
    u, v = rng.random(8, "f4"), rng.random(16, "f4")
    stars = rng.standard_normal((2, 16)).astype("f4"), rng.standard_normal((8, 2)).astype("f4")
    ewc, penalty = c.c_void_p(), c.c_double(-1.0)
    assert LIB.le_ewc_create(pool, 2, 3.0, c.byref(ewc)) == VALUE
    assert LIB.le_ewc_create(pool, 1, 3.0, c.byref(ewc)) == OK
    got = [np.full_like(a, np.nan) for a in (u, v, *stars)]
    assert LIB.le_ewc_get(ewc, slot, *map(view, got)) == VALUE
    assert b"slot 0, which has none" in LIB.le_last_error(ctx)
    assert LIB.le_ewc_set(ewc, slot, view(u), view(v)) == OK
    assert LIB.le_ewc_penalty(ewc, c.byref(penalty)) == OK
    assert penalty.value == 0.0
    assert LIB.le_ewc_restore(ewc, slot, view(u), view(v), view(stars[0]), None) == VALUE
    assert LIB.le_ewc_restore(ewc, slot, view(u), view(v), *map(view, stars)) == OK
    assert LIB.le_ewc_penalty(ewc, c.byref(penalty)) == OK
    want = delta_penalty(A, B, *stars, u, v, 0.5, 3.0)
    assert penalty.value == pytest.approx(want, rel=1e-6)
    skipped = LeArray()
    assert LIB.le_ewc_get(ewc, slot, skipped, *map(view, got[1:])) == OK
    assert np.isnan(got[0]).all()
    for a, b in zip(got[1:], (v, *stars), strict=True):
        assert (a == b).all()
    LIB.le_ewc_destroy(ewc)


def test_errors_are_statuses_with_words(handles):
    ctx, pool = handles
    slot, *_ = add(pool)
    x, y, ids = np.ones((1, 15), "f4"), np.full((1, 8), 7.0, "f4"), np.array([slot], "i4")
    assert LIB.le_pool_forward(pool, view(x), view(ids), None, 0, 1, view(y)) == VALUE
    assert LIB.le_last_error(ctx) == (
        b"batched_lora_delta: x: expected shape [n, in] = [n, 16], got [1, 15]"
    )
    x = np.ones((1, 16), "f4")
    assert LIB.le_pool_forward(pool, view(x), view(x), None, 0, 1, view(y)) == TYPE
    assert LIB.le_pool_remove(pool, slot) == OK
    assert LIB.le_pool_forward(pool, view(x), view(ids), None, 0, 1, view(y)) == INDEX
    assert LIB.le_pool_remove(pool, slot) == INDEX
    assert b"removed" in LIB.le_last_error(ctx)
    assert (y == 7.0).all()


def test_null_pointers_are_refused(handles):
    ctx, pool = handles
    x, y = np.ones((1, 16), "f4"), np.ones((1, 8), "f4")
    ids = np.zeros(1, "i4")
    assert LIB.le_pool_forward(None, view(x), view(ids), None, 0, 1, view(y)) == VALUE
    assert b"pool: expected a pointer, got NULL" in LIB.le_last_error(ctx)
    assert LIB.le_pool_forward(pool, None, view(ids), None, 0, 1, view(y)) == VALUE
    assert LIB.le_pool_forward(pool, view(x), None, None, 0, 1, view(y)) == VALUE
    assert LIB.le_pool_forward(pool, view(x), view(ids), None, 0, 1, None) == VALUE
    assert LIB.le_pool_create(ctx, None, None) == VALUE
    options = LeContextOptions(1, -1, None, None, None)
    assert LIB.le_context_create(c.byref(options), c.byref(c.c_void_p())) == VALUE
