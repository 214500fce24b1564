"""Ops 5 and 6 on the Triton backend, against the float64 reference and torch.func."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from helpers import DTYPE_PAIRS, LAYOUTS, bits, delta_error, f64, strided
from helpers_triton import (
    DEVICE,
    few,
    indices,
    interpreted,
    on_device,
    triton_backend,  # noqa: F401  a fixture
)
from hypothesis import given
from hypothesis import strategies as st

import lora_engine as le
from lora_engine import reference
from lora_engine.kernels import lora_fisher as kernels

pytestmark = pytest.mark.usefixtures("triton_backend")

TOLERANCE = 1e-6  # of every dtype: inputs are exact, sums float32 or better
WIDTHS = st.sampled_from([1, 2, 7, 16, 33, 127, 130])
RANKS = st.sampled_from([0, 1, 2, 3, 5, 17])
ROWS = st.sampled_from([0, 1, 2, 7, 16, 31, 65])
SEEDS = st.integers(0, 2**32 - 1)


def host(a):
    return f64(a.cpu()) if isinstance(a, torch.Tensor) else f64(a)


def same_bits(a, b):
    return bits(a.cpu()) == bits(b.cpu())


def offsets_of(rng, n):
    """Samples of 0 to many rows, single rows in runs among them."""
    cuts = np.sort(rng.integers(0, n + 1, rng.integers(0, 5)))
    singles = np.arange(*np.sort(rng.integers(0, n + 1, 2)))[:9]
    return np.sort(np.concatenate([[0], cuts, singles, [n]])).astype(np.int32)


def magnitude(x, grad, A, B, scaling, segments=None):
    return reference.lora_fisher(*(np.abs(host(a)) for a in (x, grad, A, B)), scaling, segments)


def problem(rng, n=20, d_in=33, d_out=17, r=2):
    shapes = (n, d_in), (n, d_out), (r, d_in), (d_out, r)
    return [on_device(rng.standard_normal(s)) for s in shapes]


def expected(x, grad, A, B, scaling, segments=None):
    return reference.lora_fisher(host(x), host(grad), host(A), host(B), scaling, segments)


# ---- fisher_accumulate ----------------------------------------------------------


@pytest.mark.parametrize(("f_dtype", "g_dtype"), DTYPE_PAIRS)
@few
@given(data=st.data())
def test_accumulate_matches_reference(f_dtype, g_dtype, data):
    shape = data.draw(
        st.sampled_from([(0, 4), (3, 0), (1, 1), (1, 4099), (3, 127), (2, 2049), (70, 5)])
    )
    gamma, scale = data.draw(st.sampled_from([0.0, 0.95, -1.0])), data.draw(st.floats(0, 2))
    rng = np.random.default_rng(data.draw(SEEDS, "seed"))
    F, g = (
        strided(on_device(rng.standard_normal(shape), d), data.draw(st.sampled_from(LAYOUTS)))
        for d in (f_dtype, g_dtype)
    )
    want = reference.fisher_accumulate(host(F), host(g), gamma, scale)
    scale_of = np.abs(gamma * host(F)) + scale * host(g) ** 2
    kept = bits(g.cpu())
    le.fisher_accumulate(F, g, gamma, scale)
    # Rounding to nearest: half a unit in the last place (of float16's smallest numbers, 2^-24).
    unit = {"float32": 0.0, "bfloat16": 2.0**-8, "float16": 2.0**-11}[f_dtype]
    allowed = 3e-7 * scale_of + unit * np.abs(want) * 1.0001
    allowed += 2.0**-25 if f_dtype == "float16" else 0
    assert (np.abs(host(F) - want) <= allowed + 1e-38).all()
    assert bits(g.cpu()) == kept


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_accumulate_rounds_to_nearest_in_every_layout(dtype):
    rng = np.random.default_rng(0)
    F, g = rng.uniform(0, 1, (37, 131)), on_device(rng.standard_normal((37, 131)))
    for layout in LAYOUTS:
        exact = strided(on_device(F).to(dtype), layout)
        want = exact.float()
        le.fisher_accumulate(want, g, 0.5, 0.25)
        le.fisher_accumulate(exact, g, 0.5, 0.25)
        assert same_bits(exact, want.to(dtype))
    ties = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, 2 - 2**-8], device=DEVICE).sqrt()
    to = torch.zeros(3, dtype=torch.bfloat16, device=DEVICE)
    le.fisher_accumulate(to, ties, 0.0, 1.0)
    assert same_bits(to, (ties * ties).bfloat16())


@pytest.mark.parametrize("layout", ["rows", "steps"])
@pytest.mark.parametrize("shape", [(6, 20), (2, 2100)])
def test_accumulate_leaves_the_gaps_of_a_strided_output_alone(layout, shape):
    wide = torch.full((2 * shape[0] + 1, 2 * shape[1] + 3), 7.0, device=DEVICE)
    F = wide[::2, 3 : 3 + 2 * shape[1] : 2][: shape[0]]
    if layout == "rows":
        F = wide[1 : 1 + shape[0], 3 : 3 + shape[1]]
    F.fill_(1.0)
    le.fisher_accumulate(F, torch.full(shape, 2.0, device=DEVICE), 0.5, 0.25)
    assert (F == 1.5).all()
    F.fill_(7.0)
    assert (wide == 7.0).all()


def test_accumulate_takes_vectors_and_numpy_arrays():
    F, g = np.full(2055, 2.0, "f4"), np.full(2055, 3.0, "f4")
    F, g = (F, g) if DEVICE == "cpu" else (torch.tensor(a, device=DEVICE) for a in (F, g))
    le.fisher_accumulate(F[::3], g[::3], 0.5, 1.0)
    assert (F[::3] == 10).all()
    assert (F[1::3] == 2).all()


def test_accumulate_goes_on_beyond_one_launch(monkeypatch):
    from lora_engine.kernels import fisher_accumulate as op

    monkeypatch.setattr(op, "PIECE", 2064)
    F, g = torch.ones(5000, device=DEVICE), torch.arange(5000.0, device=DEVICE)
    le.fisher_accumulate(F, g, 1.0, 1.0)
    assert torch.equal(F, g * g + 1)


def test_accumulate_keeps_nan_where_it_is():
    F, g = torch.ones(100, device=DEVICE), torch.ones(100, device=DEVICE)
    F[3], g[50], g[99] = np.nan, np.nan, np.inf
    le.fisher_accumulate(F, g, 0.5, 0.5)
    F = F.cpu().numpy()
    assert np.isnan(F[[3, 50]]).all()
    assert F[99] == np.inf
    assert (np.delete(F, [3, 50, 99]) == 1).all()


# ---- lora_fisher ----------------------------------------------------------------


@pytest.mark.parametrize(("x_dtype", "w_dtype"), DTYPE_PAIRS)
@few
@given(data=st.data())
def test_matches_the_sum_over_samples(x_dtype, w_dtype, data):
    n, r = data.draw(ROWS, "n"), data.draw(RANKS, "r")
    d_in, d_out = data.draw(WIDTHS, "in"), data.draw(WIDTHS, "out")
    rng = np.random.default_rng(data.draw(SEEDS, "seed"))
    shapes = (n, d_in), (n, d_out), (r, d_in), (d_out, r)
    x, grad, A, B = (
        strided(on_device(rng.standard_normal(s), d), data.draw(st.sampled_from(LAYOUTS)))
        for s, d in zip(shapes, (x_dtype, x_dtype, w_dtype, w_dtype), strict=True)
    )
    scaling = data.draw(st.sampled_from([1.0, -0.5, 2.0, 0.0]), "scaling")
    segments = offsets_of(rng, n) if data.draw(st.booleans(), "segments") else None
    offsets = None if segments is None else indices(segments)
    want = expected(x, grad, A, B, scaling, segments)
    scale = magnitude(x, grad, A, B, scaling, segments)
    new = le.lora_fisher(x, grad, A, B, scaling, offsets)
    out_dtypes = data.draw(st.sampled_from([("f4", "f4"), ("f8", "f8"), ("f8", "f4")]), "out")
    out = tuple(
        strided(
            torch.from_numpy(np.full(w.shape, 3.0, d)).to(DEVICE),
            data.draw(st.sampled_from(LAYOUTS)),
        )
        for w, d in zip(want, out_dtypes, strict=True)
    )
    got = le.lora_fisher(x, grad, A, B, scaling, offsets, out=out)
    for fresh, added, mine, ref, size in zip(new, got, out, want, scale, strict=True):
        assert fresh.dtype == torch.float32
        assert tuple(fresh.shape) == ref.shape
        assert added is mine
        assert delta_error(fresh.cpu(), ref, size) <= TOLERANCE
        assert delta_error(added.cpu(), ref + 3, size + 3) <= TOLERANCE


def per_sample(x, grad, A, B, scaling):
    """torch.func: the gradient of <grad, s B A x> for each [rows, in] of x, squared and summed."""

    def loss(A, B, x, up):
        return (scaling * (x @ A.T) @ B.T * up).sum()

    gradients = torch.func.vmap(torch.func.grad(loss, argnums=(0, 1)), in_dims=(None, None, 0, 0))
    return [(g**2).sum(0) for g in gradients(A, B, x, grad)]


@pytest.mark.parametrize("length", [1, 2, 7, 20])
def test_agrees_with_torch_func(length):
    n = 20 if length < 7 else 4 * length
    x, grad, A, B = problem(np.random.default_rng(length), n)
    samples = (a.double().reshape(-1, length, a.shape[1]) for a in (x, grad))
    want = per_sample(*samples, A.double(), B.double(), 0.7)
    segments = indices(range(0, n + 1, length))
    got = le.lora_fisher(x, grad, A, B, 0.7, segments)
    by_row = le.lora_fisher(x, grad, A, B, 0.7)
    for F, row, ref in zip(got, by_row, want, strict=True):
        ref = f64(ref.cpu())
        assert delta_error(F.cpu(), ref, ref) <= TOLERANCE
        far = delta_error(row.cpu(), ref, ref)  # squares of rows are no squares of samples
        assert far <= TOLERANCE if length == 1 else far > 0.01


def test_a_vector_is_one_sample():
    x, grad, A, B = problem(np.random.default_rng(2), 1)
    by_matrix = le.lora_fisher(x, grad, A, B, 1.0)
    for F, same in zip(le.lora_fisher(x[0], grad[0], A, B, 1.0), by_matrix, strict=True):
        assert same_bits(F, same)
    u, v = le.lora_fisher_factors(x[0], grad[0])
    assert torch.equal(u, grad[0] ** 2)
    assert torch.equal(v, x[0] ** 2)


@interpreted
def test_numpy_arrays_give_numpy_arrays():
    x, grad, A, B = (a.numpy() for a in problem(np.random.default_rng(3)))
    x.flags.writeable = False
    got = (*le.lora_fisher(x, grad, A[::-1], B[:, ::-1], 1.0), *le.lora_fisher_factors(x, grad))
    F_A, F_B = expected(x, grad, A, B, 1.0)
    want = F_A[::-1], F_B[:, ::-1], *reference.lora_fisher_factors(x, grad)
    for F, ref in zip(got, want, strict=True):
        assert isinstance(F, np.ndarray)
        assert F.dtype == np.float32
        assert delta_error(F, ref, ref) <= TOLERANCE


def test_nothing_to_sum():
    x, grad, A, B = problem(np.random.default_rng(3), 0)
    for S in (None, 1, 4):
        segments = None if S is None else indices([0] * S)
        for F, like in zip(le.lora_fisher(x, grad, A, B, 1.0, segments), (A, B), strict=True):
            assert torch.equal(F, torch.zeros_like(like))
    assert not torch.cat(le.lora_fisher_factors(x, grad)).any()
    ones = (torch.ones(s, device=DEVICE) for s in ((3, 0), (3, 5), (2, 0), (5, 2)))
    assert not le.lora_fisher(*ones, 1.0)[1].any()  # h is an empty sum


@pytest.mark.parametrize("segmented", [False, True])
@pytest.mark.parametrize("d_in", [0, 5])
@pytest.mark.parametrize("d_out", [0, 4])
@pytest.mark.parametrize("r", [0, 2])
def test_features_and_ranks_of_0(d_in, d_out, r, segmented):
    x, grad, A, B = problem(np.random.default_rng(9), 3, d_in, d_out, r)
    segments = indices([0, 1, 3]) if segmented else None
    want = expected(x, grad, A, B, 0.3, None if segments is None else [0, 1, 3])
    out = torch.full_like(A, 7.0), torch.full_like(B, 7.0)
    le.lora_fisher(x, grad, A, B, 0.3, segments, out=out)
    for fresh, added, ref in zip(
        le.lora_fisher(x, grad, A, B, 0.3, segments), out, want, strict=True
    ):
        assert fresh.shape == ref.shape
        assert np.allclose(host(fresh), ref, rtol=1e-5)
        assert np.allclose(host(added), ref + 7, rtol=1e-5)


def test_rank_256_and_odd_widths():
    x, grad, A, B = problem(np.random.default_rng(4), 3, 129, 7, 256)
    for F, ref in zip(
        le.lora_fisher(x, grad, A, B, 0.3), expected(x, grad, A, B, 0.3), strict=True
    ):
        assert delta_error(F.cpu(), ref, ref) <= TOLERANCE


def test_wide_features_are_summed_in_splits():
    x, grad, A, B = problem(np.random.default_rng(5), 2, 2049, 1030, 1)
    want = expected(x, grad, A, B, 0.3)
    size = magnitude(x, grad, A, B, 0.3)
    for F, ref, scale in zip(le.lora_fisher(x, grad, A, B, 0.3), want, size, strict=True):
        assert delta_error(F.cpu(), ref, scale) <= TOLERANCE


@pytest.mark.parametrize("segmented", [False, True])
def test_splitting_a_batch_changes_nothing(segmented, monkeypatch):
    rng = np.random.default_rng(6)
    x, grad, A, B = problem(rng, 200, 20, 9, 3)
    offsets = offsets_of(rng, 200) if segmented else np.arange(0, 201, 40, dtype=np.int32)
    segments = indices(offsets)
    whole = le.lora_fisher(x, grad, A, B, 0.3, segments if segmented else None)
    again = le.lora_fisher(x, grad, A, B, 0.3, segments if segmented else None)
    assert all(same_bits(a, b) for a, b in zip(whole, again, strict=True))
    out = tuple(torch.zeros_like(F, dtype=torch.float64) for F in (A, B))
    factors = tuple(torch.zeros(w, dtype=torch.float64, device=DEVICE) for w in (9, 20))
    cuts = [0, len(offsets) // 2, len(offsets) - 1]
    for first, last in pairwise(cuts):
        rows = slice(offsets[first], offsets[last])
        part = segments[first : last + 1] - segments[first] if segmented else None
        le.lora_fisher(x[rows], grad[rows], A, B, 0.3, part, out=out)
        le.lora_fisher_factors(x[rows], grad[rows], out=factors)
    once = (*whole, *le.lora_fisher_factors(x, grad))
    for got, ref in zip((*out, *factors), once, strict=True):
        assert (np.abs(host(got) / host(ref) - 1) <= TOLERANCE).all()
    if not segmented:  # rows that do not fit the L2 come in pieces
        monkeypatch.setattr(kernels, "PIECE_BYTES", 64 * 4 * 29)
        pieces = le.lora_fisher(x, grad, A, B, 0.3)
        assert kernels.piece_rows(x, grad, 3) == 64
        for got, ref in zip(pieces, whole, strict=True):
            assert (np.abs(host(got) / host(ref) - 1) <= TOLERANCE).all()


def test_many_samples_keep_their_precision(monkeypatch):
    """Sums in float32 would be off by 4e-6: many additions of a constant err the same way."""
    n = 4000
    x, grad = torch.full((n, 1), 1.63819, device=DEVICE), torch.full((n, 1), 0.9, device=DEVICE)
    A, B = torch.full((1, 1), 0.7, device=DEVICE), torch.full((1, 1), 1.3, device=DEVICE)
    monkeypatch.setattr(kernels, "SPLIT_ROWS", n)  # all in one split
    F_A, F_B = le.lora_fisher(x, grad, A, B, 1.0)
    want = expected(x[:1], grad[:1], A, B, 1.0)
    for F, ref in ((F_A, want[0]), (F_B, want[1])):
        assert abs(F.item() / (n * ref.item()) - 1) <= TOLERANCE
    u, v = le.lora_fisher_factors(x, grad)
    assert abs(u.item() / (n * host(grad)[0, 0] ** 2) - 1) <= TOLERANCE
    assert abs(v.item() / (n * host(x)[0, 0] ** 2) - 1) <= TOLERANCE


@pytest.mark.parametrize("segments", [None, (0, 4, 5, 20)], ids=["rows", "segments"])
def test_nan_stays_where_it_belongs(segments):
    """x of NaN makes h of NaN: all of F_B, but of F_A and v only its own column."""
    x, grad, A, B = problem(np.random.default_rng(7))
    if segments is not None:
        segments = indices(segments)
    clean_A, _ = le.lora_fisher(x, grad, A, B, 1.0, segments)
    x[4, 9] = np.nan
    F_A, F_B = (host(F) for F in le.lora_fisher(x, grad, A, B, 1.0, segments))
    u, v = (host(f) for f in le.lora_fisher_factors(x, grad))
    others = np.arange(33) != 9
    assert np.isnan(F_B).all()
    assert np.isnan(F_A[:, 9]).all()
    assert np.array_equal(F_A[:, others], host(clean_A)[:, others])
    assert np.array_equal(np.isnan(v), ~others)
    assert not np.isnan(u).any()
    x[4, 9], grad[11, 3] = 1.0, np.nan
    F_A, F_B = (host(F) for F in le.lora_fisher(x, grad, A, B, 1.0, segments))
    assert np.isnan(F_A).all()
    assert np.array_equal(np.isnan(F_B[:, 0]), np.arange(17) == 3)


def test_rows_beyond_the_batch_are_not_read():
    """Neither by rows nor by offsets that nobody could check: they end at the batch."""
    rng = np.random.default_rng(8)
    x, grad, A, B = problem(rng, 40)
    x[20:], grad[20:] = np.nan, np.nan
    x, grad = x[:20], grad[:20]
    wrong = indices([-7, 3, 90, 5, 20, 99])
    right = np.array([0, 3, 20, 20, 20])
    for segments, offsets in ((None, None), (wrong, right)):
        want = expected(x, grad, A, B, 1.0, offsets)
        if segments is not None:  # rows 5 to 20 are a sample of their own
            tail = expected(x[5:], grad[5:], A, B, 1.0, [0, 15])
            want = [a + b for a, b in zip(want, tail, strict=True)]
        F = torch.full_like(A, np.nan), torch.full_like(B, np.nan)
        kernels.lora_fisher(x, grad, A, B, 1.0, segments, *F, False)
        for got, ref in zip(F, want, strict=True):
            assert delta_error(got.cpu(), ref, ref) <= TOLERANCE


# ---- lora_fisher_factors --------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@few
@given(data=st.data())
def test_factors_match_reference(dtype, data):
    n, d_in, d_out = data.draw(ROWS, "n"), data.draw(WIDTHS, "in"), data.draw(WIDTHS, "out")
    rng = np.random.default_rng(data.draw(SEEDS, "seed"))
    x, grad = (
        strided(on_device(rng.standard_normal(s), dtype), data.draw(st.sampled_from(LAYOUTS)))
        for s in ((n, d_in), (n, d_out))
    )
    want = reference.lora_fisher_factors(host(x), host(grad))
    wide = [torch.full((2 * len(w),), 3.0, dtype=torch.float64, device=DEVICE) for w in want]
    out = tuple(w[::2] for w in wide)
    assert all(a is b for a, b in zip(le.lora_fisher_factors(x, grad, out=out), out, strict=True))
    for fresh, added, ref in zip(le.lora_fisher_factors(x, grad), out, want, strict=True):
        assert tuple(fresh.shape) == ref.shape
        assert (np.abs(host(fresh) - ref) <= TOLERANCE * ref).all()
        assert (np.abs(host(added) - ref - 3) <= TOLERANCE * (ref + 3)).all()
    assert all((w[1::2] == 3).all() for w in wide)
