"""Ops 5 and 6, Fisher information, against explicit sums over samples and torch.func."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers import DTYPE_PAIRS, KINDS, LAYOUTS, bits, delta_error, f64, strided, to_dtype
from hypothesis import given
from hypothesis import strategies as st

import lora_engine as le
from lora_engine import reference

TOLERANCE = 1e-6  # of every dtype: inputs are exact, sums float32 or better
WIDTHS = st.sampled_from([1, 2, 3, 7, 8, 16, 17, 33, 63, 64, 127, 257, 1030, 2049])
RANKS = st.sampled_from([0, 1, 2, 3, 4, 5, 17])
ROWS = st.sampled_from([0, 1, 2, 5, 6, 7, 12, 31, 64, 65, 130])
SEEDS = st.integers(0, 2**32 - 1)


def kind_of(data, *dtypes):
    """float32 alone is also drawn as NumPy arrays."""
    return data.draw(st.sampled_from(KINDS)) if set(dtypes) == {"float32"} else "torch"


def offsets_of(rng, n):
    """Samples of 0 to many rows, single rows in runs among them."""
    cuts = np.sort(rng.integers(0, n + 1, rng.integers(0, n + 2)))
    singles = np.arange(*np.sort(rng.integers(0, n + 1, 2)))
    return np.sort(np.concatenate([[0], cuts, singles, [n]])).astype(np.int32)


def magnitude(x, grad, A, B, scaling, segments=None):
    return reference.lora_fisher(*(np.abs(f64(a)) for a in (x, grad, A, B)), scaling, segments)


def problem(rng, n=20, d_in=33, d_out=17, r=2):
    shapes = (n, d_in), (n, d_out), (r, d_in), (d_out, r)
    return [rng.standard_normal(s).astype("f4") for s in shapes]


# ---- fisher_accumulate ----------------------------------------------------------


@pytest.mark.parametrize(("f_dtype", "g_dtype"), DTYPE_PAIRS)
@given(data=st.data())
def test_accumulate_matches_reference(f_dtype, g_dtype, data):
    shape = data.draw(st.sampled_from([(0, 4), (3, 0), (1, 1), (3, 127), (2, 2049), (70, 5)]))
    kind = kind_of(data, f_dtype, g_dtype)
    gamma, scale = data.draw(st.sampled_from([0.0, 0.95, -1.0])), data.draw(st.floats(0, 2))
    rng = np.random.default_rng(data.draw(SEEDS, "seed"))
    F, g = (to_dtype(rng.standard_normal(shape), d, kind) for d in (f_dtype, g_dtype))
    F, g = (strided(a, data.draw(st.sampled_from(LAYOUTS))) for a in (F, g))
    want = reference.fisher_accumulate(f64(F), f64(g), gamma, scale)
    scale_of = np.abs(gamma * f64(F)) + scale * f64(g) ** 2
    kept = bits(g)
    le.fisher_accumulate(F, g, gamma, scale)
    # Rounding to nearest: half a unit in the last place (of float16's smallest numbers, 2^-24).
    unit = {"float32": 0.0, "bfloat16": 2.0**-8, "float16": 2.0**-11}[f_dtype]
    allowed = 3e-7 * scale_of + unit * np.abs(want) + (2.0**-25 if f_dtype == "float16" else 0)
    assert (np.abs(f64(F) - want) <= allowed + 1e-38).all()
    assert bits(g) == kept


def test_accumulate_rounds_bfloat16_to_nearest_in_every_layout():
    rng = np.random.default_rng(0)
    F, g = rng.uniform(0, 1, (37, 131)).astype("f4"), rng.standard_normal((37, 131)).astype("f4")
    want = F.copy()
    for layout in LAYOUTS:
        exact = strided(torch.from_numpy(F).bfloat16(), layout)
        want = exact.float()
        le.fisher_accumulate(want, g, 0.5, 0.25)
        le.fisher_accumulate(exact, g, 0.5, 0.25)
        assert bits(exact) == bits(want.bfloat16())


def test_accumulate_leaves_the_gaps_of_a_strided_output_alone(threads):
    wide = np.full((900, 300), 7.0, "f4")
    F = wide[::3, 10:-10:2]
    F[...] = 1.0
    g = np.full(F.shape, 2.0, "f4")
    threads(2)
    le.fisher_accumulate(F, g, 0.5, 0.25)
    assert (F == 1.5).all()
    F[...] = 7.0
    assert (wide == 7.0).all()


@pytest.mark.parametrize("shape", [(1_000_003,), (1001, 1003)], ids=str)
def test_accumulate_is_the_same_on_any_thread_count(shape, threads):
    rng = np.random.default_rng(1)
    F, g = rng.standard_normal(shape).astype("f4"), rng.standard_normal(shape).astype("f4")
    seen = set()
    for count in (1, 2, 3):
        threads(count)
        to = F.copy()
        le.fisher_accumulate(to, g, 0.9, 0.1)
        seen.add(bits(to))
    assert len(seen) == 1
    assert delta_error(to, reference.fisher_accumulate(F, g, 0.9, 0.1), F) <= TOLERANCE


def test_accumulate_keeps_nan_where_it_is():
    F, g = np.ones(100, "f4"), np.ones(100, "f4")
    F[3], g[50], g[99] = np.nan, np.nan, np.inf
    le.fisher_accumulate(F, g, 0.5, 0.5)
    assert np.isnan(F[[3, 50]]).all()
    assert F[99] == np.inf
    assert (np.delete(F, [3, 50, 99]) == 1).all()


# ---- lora_fisher ----------------------------------------------------------------


@pytest.mark.parametrize(("x_dtype", "w_dtype"), DTYPE_PAIRS)
@given(data=st.data())
def test_matches_the_sum_over_samples(x_dtype, w_dtype, data):
    n, r = data.draw(ROWS, "n"), data.draw(RANKS, "r")
    d_in, d_out = data.draw(WIDTHS, "in"), data.draw(WIDTHS, "out")
    kind = kind_of(data, x_dtype, w_dtype)
    rng = np.random.default_rng(data.draw(SEEDS, "seed"))
    shapes = (n, d_in), (n, d_out), (r, d_in), (d_out, r)
    x, grad, A, B = (
        strided(to_dtype(rng.standard_normal(s), d, kind), data.draw(st.sampled_from(LAYOUTS)))
        for s, d in zip(shapes, (x_dtype, x_dtype, w_dtype, w_dtype), strict=True)
    )
    scaling = data.draw(st.sampled_from([1.0, -0.5, 2.0, 0.0]), "scaling")
    segments = offsets_of(rng, n) if data.draw(st.booleans(), "segments") else None
    given_segments = segments
    if kind == "torch" and segments is not None:
        given_segments = torch.from_numpy(segments)
    want = reference.lora_fisher(f64(x), f64(grad), f64(A), f64(B), scaling, segments)
    scale = magnitude(x, grad, A, B, scaling, segments)

    new = le.lora_fisher(x, grad, A, B, scaling, given_segments)
    out_dtype = data.draw(st.sampled_from(["f4", "f8"]), "out")
    out = tuple(
        strided(np.full(w.shape, 3.0, out_dtype), data.draw(st.sampled_from(LAYOUTS))) for w in want
    )
    got = le.lora_fisher(x, grad, A, B, scaling, given_segments, out=out)
    for fresh, added, mine, ref, size in zip(new, got, out, want, scale, strict=True):
        assert isinstance(fresh, torch.Tensor) == (kind == "torch")
        assert str(fresh.dtype).endswith("float32")
        assert tuple(fresh.shape) == ref.shape
        assert added is mine
        assert delta_error(fresh, ref, size) <= TOLERANCE
        assert delta_error(added, ref + 3, size + 3) <= TOLERANCE


def per_sample(x, grad, A, B, scaling):
    """torch.func: the gradient of <grad, s B A x> for each [rows, in] of x, squared and summed."""

    def loss(A, B, x, up):
        return (scaling * (x @ A.T) @ B.T * up).sum()

    gradients = torch.func.vmap(torch.func.grad(loss, argnums=(0, 1)), in_dims=(None, None, 0, 0))
    return [(g**2).sum(0) for g in gradients(A, B, x, grad)]


@pytest.mark.parametrize("length", [1, 2, 7, 40])
def test_agrees_with_torch_func(length):
    x, grad, A, B = (torch.from_numpy(a) for a in problem(np.random.default_rng(length), 280))
    want = per_sample(
        *(a.double().reshape(-1, length, a.shape[1]) for a in (x, grad)),
        A.double(),
        B.double(),
        0.7,
    )
    segments = torch.arange(0, 281, length, dtype=torch.int32)
    got = le.lora_fisher(x, grad, A, B, 0.7, segments)
    for F, ref in zip(got, want, strict=True):
        assert delta_error(F, f64(ref), f64(ref)) <= TOLERANCE
    if length == 1:
        assert [bits(F) for F in le.lora_fisher(x, grad, A, B, 0.7)] == [bits(F) for F in got]
    else:  # squares of rows are not squares of samples
        by_row = le.lora_fisher(x, grad, A, B, 0.7)
        assert delta_error(by_row[0], f64(want[0]), f64(want[0])) > 0.01


def test_a_vector_is_one_sample():
    x, grad, A, B = problem(np.random.default_rng(2), 1)
    assert [bits(F) for F in le.lora_fisher(x[0], grad[0], A, B, 1.0)] == [
        bits(F) for F in le.lora_fisher(x, grad, A, B, 1.0)
    ]
    u, v = le.lora_fisher_factors(x[0], grad[0])
    assert np.array_equal(u, grad[0] ** 2)
    assert np.array_equal(v, x[0] ** 2)


def test_nothing_to_sum():
    x, grad, A, B = problem(np.random.default_rng(3), 0)
    for segments in (None, np.zeros(1, "i4"), np.zeros(4, "i4")):
        for F, like in zip(le.lora_fisher(x, grad, A, B, 1.0, segments), (A, B), strict=True):
            assert np.array_equal(F, np.zeros_like(like))
    assert not np.concatenate(le.lora_fisher_factors(x, grad)).any()
    no_input = le.lora_fisher(np.ones((3, 0), "f4"), np.ones((3, 5), "f4"), np.ones((2, 0), "f4"),
                              np.ones((5, 2), "f4"), 1.0)  # fmt: skip
    assert not no_input[1].any()  # h is an empty sum


@pytest.mark.parametrize("segmented", [False, True])
def test_is_the_same_on_any_thread_count(segmented, threads):
    rng = np.random.default_rng(4)
    x, grad, A, B = problem(rng, 1500, 520, 260, 3)
    segments = offsets_of(rng, 1500) if segmented else None
    seen = set()
    for count in (1, 2, 3, 7):
        threads(count)
        sums = le.lora_fisher(x, grad, A, B, 0.3, segments)
        seen.add(tuple(bits(F) for F in (*sums, *le.lora_fisher_factors(x, grad))))
    assert len(seen) == 1
    want = reference.lora_fisher(x, grad, A, B, 0.3, segments)
    for F, ref, size in zip(sums, want, magnitude(x, grad, A, B, 0.3, segments), strict=True):
        assert delta_error(F, ref, size) <= TOLERANCE


@pytest.mark.parametrize("segmented", [False, True])
def test_splitting_a_batch_changes_nothing(segmented):
    rng = np.random.default_rng(5)
    x, grad, A, B = problem(rng, 700, 129, 65, 3)
    segments = offsets_of(rng, 700) if segmented else np.arange(701, dtype=np.int32)
    whole = le.lora_fisher(x, grad, A, B, 0.3, segments if segmented else None)
    out = np.zeros(A.shape), np.zeros(B.shape)
    factors = np.zeros(65), np.zeros(129)
    cuts = np.sort(rng.choice(len(segments), 9, replace=False))
    for first, last in zip([0, *cuts], [*cuts, len(segments) - 1], strict=True):
        rows = slice(segments[first], segments[last])
        part = segments[first : last + 1] - segments[first] if segmented else None
        le.lora_fisher(x[rows], grad[rows], A, B, 0.3, part, out=out)
        le.lora_fisher_factors(x[rows], grad[rows], out=factors)
    for got, ref in zip((*out, *factors), (*whole, *le.lora_fisher_factors(x, grad)), strict=True):
        assert (np.abs(got / ref - 1) <= TOLERANCE).all()


def test_ten_million_samples_keep_their_precision():
    """A million at a time, ten times; the first million also alone, in float32."""
    rng = np.random.default_rng(6)
    _, _, A, B = problem(rng, 1, 3, 4, 2)
    x = rng.standard_normal((1_000_000, 3), dtype=np.float32)
    grad = rng.standard_normal((1_000_000, 4), dtype=np.float32) * np.float32(0.01)
    h, g = x @ f64(A).T, grad @ f64(B)
    want = (
        4 * (g**2).T @ f64(x) ** 2,
        4 * (f64(grad) ** 2).T @ h**2,
        *reference.lora_fisher_factors(x, grad),
    )
    once = (*le.lora_fisher(x, grad, A, B, 2.0), *le.lora_fisher_factors(x, grad))
    out = [np.zeros(w.shape) for w in want]
    for _ in range(10):
        le.lora_fisher(x, grad, A, B, 2.0, out=tuple(out[:2]))
        le.lora_fisher_factors(x, grad, out=tuple(out[2:]))
    for F, F10, ref in zip(once, out, want, strict=True):
        assert (np.abs(F / ref - 1) <= TOLERANCE).all()
        assert (np.abs(F10 / (10 * ref) - 1) <= TOLERANCE).all()


def test_nan_stays_where_it_belongs():
    """x of NaN makes h of NaN: all of F_B, but of F_A and v only its own column."""
    x, grad, A, B = problem(np.random.default_rng(7))
    clean_A, _ = le.lora_fisher(x, grad, A, B, 1.0)
    x[4, 9] = np.nan
    F_A, F_B = le.lora_fisher(x, grad, A, B, 1.0)
    u, v = le.lora_fisher_factors(x, grad)
    others = np.arange(33) != 9
    assert np.isnan(F_B).all()
    assert np.isnan(F_A[:, 9]).all()
    assert bits(F_A[:, others]) == bits(clean_A[:, others])
    assert np.array_equal(np.isnan(v), ~others)
    assert not np.isnan(u).any()
    x[4, 9], grad[11, 3] = 1.0, np.nan
    F_A, F_B = le.lora_fisher(x, grad, A, B, 1.0)
    assert np.isnan(F_A).all()
    assert np.array_equal(np.isnan(F_B[:, 0]), np.arange(17) == 3)


# ---- lora_fisher_factors --------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@given(data=st.data())
def test_factors_match_reference(dtype, data):
    n, d_in, d_out = data.draw(ROWS, "n"), data.draw(WIDTHS, "in"), data.draw(WIDTHS, "out")
    kind = kind_of(data, dtype)
    rng = np.random.default_rng(data.draw(SEEDS, "seed"))
    x, grad = (
        strided(to_dtype(rng.standard_normal(s), dtype, kind), data.draw(st.sampled_from(LAYOUTS)))
        for s in ((n, d_in), (n, d_out))
    )
    want = reference.lora_fisher_factors(f64(x), f64(grad))
    out = tuple(np.full(2 * len(w), 3.0)[::2] for w in want)
    assert all(a is b for a, b in zip(le.lora_fisher_factors(x, grad, out=out), out, strict=True))
    for fresh, added, ref in zip(le.lora_fisher_factors(x, grad), out, want, strict=True):
        assert tuple(fresh.shape) == ref.shape
        assert (np.abs(f64(fresh) - ref) <= TOLERANCE * ref).all()
        assert (np.abs(added - ref - 3) <= TOLERANCE * (ref + 3)).all()
