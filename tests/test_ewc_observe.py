"""EWC over a task and at its end: the moving average of per-sample squares, and the merge."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers import bits, f64, fill_pool, read_adapter
from helpers_ewc import (
    FORMS,
    average,
    close,
    ewc_backend,  # noqa: F401  the fixture
    expected,
    matrix_of,
    record,
    samples,
    small_pool,
)

import lora_engine as le

pytestmark = [pytest.mark.usefixtures("ewc_backend"), pytest.mark.parametrize("form", FORMS)]


@pytest.mark.parametrize("n", [1, 3, 40], ids=lambda n: f"n{n}")
@pytest.mark.parametrize(
    ("slices", "rank"), [((9,), 2), ((4, 5), (0, 3))], ids=["one slice", "a slice missing"]
)
def test_the_record_is_the_corrected_moving_average(form, slices, rank, n):
    rng = np.random.default_rng(n)
    pool, adapters = fill_pool(rng, 33, slices, [rank])
    x, grad = samples(rng, n, 33, 9)
    ewc = le.EWC(pool, 1.0, form=form, fisher_samples=10)
    assert ewc.observe(x, grad, 0) == (n, 0, "")
    assert ewc.consolidate().consolidated == {0: n}
    want = expected(form, adapters[0], slices, x, grad, 10)
    got = record(ewc, 0)
    for part, direct in zip(got[:2], want, strict=True):
        assert [p is None for p in part] == [d is None for d in direct]
        assert close([p for p in part if p is not None], [d for d in direct if d is not None])
    for part, weights in zip(got[2:], (adapters[0].A, adapters[0].B), strict=True):
        assert [bits(p) for p in part if p is not None] == [
            bits(w) for w in weights if w is not None
        ]


def test_more_samples_than_float64_tells_apart_is_the_mean(form):
    rng = np.random.default_rng(0)
    x, grad = samples(rng, 5, 33, 9)
    records = []
    for fisher_samples in (10**17, 10**9):
        pool, _ = fill_pool(np.random.default_rng(1), 33, (9,), [2])
        ewc = le.EWC(pool, 1.0, form=form, fisher_samples=fisher_samples)
        assert ewc.observe(x[:1], grad[:1], 0).samples == 1
        assert ewc.observe(x[1:], grad[1:], np.zeros(4, np.int32)).samples == 4
        ewc.consolidate()
        records.append(record(ewc, 0))
    for got, want in zip(records[0][:2], records[1][:2], strict=True):
        np.testing.assert_allclose(got[0], want[0], rtol=1e-5)


def test_n_rows_at_once_are_n_rows_one_by_one(form):
    rng = np.random.default_rng(1)
    records = []
    x, grad = samples(rng, 60, 12, 7)
    ids = rng.integers(-1, 3, 60)
    for step in (1, 7, 60):
        pool = small_pool().pool
        ewc = le.EWC(pool, 1.0, form=form, fisher_samples=8)
        if step == 60:
            ewc._pools[pool]._moving._chunk = 13  # as if the batch was too large for one pass
        for at in range(0, 60, step):
            ewc.observe(x[at : at + step], grad[at : at + step], ids[at : at + step])
        ewc.consolidate()
        records.append([matrix_of(form, *record(ewc, slot)[:2])[0] for slot in range(3)])
    assert close(records[1], records[0])
    assert close(records[2], records[0])


def test_the_square_is_of_each_sample_and_not_of_the_mean(form):
    """Two gradients that cancel: their mean says that nothing matters."""
    pool, adapters = small_pool()
    x, grad = samples(np.random.default_rng(2), 1, 12, 7)
    x, grad = np.concatenate([x, x]), np.concatenate([grad, -grad])
    ewc = le.EWC(pool, 1.0, form=form, fisher_samples=10**6)
    ewc.observe(x, grad, [1, 1])
    ewc.consolidate()
    got = matrix_of(form, *record(ewc, 1)[:2])
    assert close(got, matrix_of(form, *expected(form, adapters[1], (7,), x[:1], grad[:1], 5)))
    of_the_mean = expected(form, adapters[1], (7,), x[:1], grad.mean(0)[None], 5)
    assert not close(got, matrix_of(form, *of_the_mean), 0.5)


def test_one_sample_is_a_mean_already(form):
    """Without the correction for the start it would count a hundredth."""
    pool, adapters = small_pool()
    x, grad = samples(np.random.default_rng(3), 2, 12, 7)
    ewc = le.EWC(pool, 1.0, form=form)
    ewc.observe(x[0], grad[0], 0)
    ewc.observe(x[1], grad[1], 1)
    ewc.consolidate()
    for slot in (0, 1):
        rows = x[slot : slot + 1], grad[slot : slot + 1]
        want = expected(form, adapters[slot], (7,), *rows, 100)
        assert close(matrix_of(form, *record(ewc, slot)[:2]), matrix_of(form, *want))


def test_later_samples_count_more(form):
    pool, _ = small_pool()
    x, grad = samples(np.random.default_rng(4), 30, 12, 7)
    grad[:15] *= 100
    ewc = le.EWC(pool, 1.0, form=form, fisher_samples=3)
    ewc.observe(x, grad, 0)
    ewc.observe(x[::-1].copy(), grad[::-1].copy(), 1)
    ewc.consolidate()
    late_large, early_large = (matrix_of(form, *record(ewc, s)[:2])[0].max() for s in (1, 0))
    assert late_large > 10 * early_large


def dense_merge(form, old, new, gamma):
    """gamma F* + F; of matrices, what is left of it with rank one."""
    if form == "factor":
        return gamma * old + new
    total = gamma * old + new
    return np.outer(total.sum(axis=1), total.sum(axis=0)) / total.sum()


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0])
def test_gamma_counts_at_the_boundary_only(form, gamma):
    pool, adapters = small_pool()
    rng = np.random.default_rng(5)
    ewc = le.EWC(pool, 1.0, gamma, form, fisher_samples=20)
    tasks = [samples(rng, n, 12, 7) for n in (30, 5, 17)]
    want = None
    for x, grad in tasks:
        for row in range(len(x)):
            ewc.observe(x[row], grad[row], 2)
        ewc.consolidate(2)
        fresh = matrix_of(form, *expected(form, adapters[2], (7,), x, grad, 20))[0]
        want = fresh if want is None else dense_merge(form, want, fresh, gamma)
        assert close(matrix_of(form, *record(ewc, 2)[:2]), [want])


def test_marginals_are_those_of_the_dense_matrix(form):
    """Of the delta form; what averages u and v by themselves has others."""
    if form == "factor":
        pytest.skip("the factor form keeps gamma F* + F whole")
    pool, adapters = small_pool()
    rng = np.random.default_rng(6)
    ewc = le.EWC(pool, 1.0, 0.7, form, fisher_samples=50)
    means = []
    for widths in ((30.0, 1.0), (1.0, 30.0)):
        x, grad = samples(rng, 25, 12, 7)
        x[:, :3] *= widths[0]
        grad[:, 4:] *= widths[1]
        ewc.observe(x, grad, 0)
        ewc.consolidate()
        means.append(expected(form, adapters[0], (7,), x, grad, 50))
    (u0,), (v0,) = means[0]
    (u1,), (v1,) = means[1]
    dense = 0.7 * np.outer(u0, v0) + np.outer(u1, v1)
    got = matrix_of(form, *record(ewc, 0)[:2])[0]
    assert close([got.sum(axis=1), got.sum(axis=0)], [dense.sum(axis=1), dense.sum(axis=0)])
    apart = np.outer(0.7 * u0 + u1, 0.7 * v0 + v1)
    assert not close([apart.sum(axis=1)], [dense.sum(axis=1)], 0.1)


def test_samples_without_a_gradient_say_that_nothing_matters(form):
    pool, _ = small_pool()
    x, _ = samples(np.random.default_rng(7), 4, 12, 7)
    ewc = le.EWC(pool, 1.0, form=form)
    for _ in range(2):
        ewc.observe(x, np.zeros((4, 7), "f4"), 0)
        ewc.consolidate()
    assert not matrix_of(form, *record(ewc, 0)[:2])[0].any()


def test_the_anchor_is_where_the_task_ended(form):
    pool, _ = small_pool()
    x, grad = samples(np.random.default_rng(8), 6, 12, 7)
    ids = np.array([0, 0, 0, 1, 1, 1], np.int32)
    ewc = le.EWC(pool, 2.0, form=form)
    ewc.observe(x, grad, ids)
    pool.adapt(x, grad, ids, 0.1)
    ewc.consolidate()
    assert ewc.penalty() == 0.0
    pool.adapt(x, grad, ids, 0.1)
    left = ewc.penalty()
    assert left > 0.0
    ewc.observe(x[:3], grad[:3], 0)
    done = ewc.consolidate()
    assert done.consolidated == {0: 3}
    assert done.unobserved == (1,)
    assert "1 observed no sample" in done.note
    assert 0.0 < ewc.penalty() < left  # that of slot 1, whose anchor stayed
    again = ewc.consolidate([0, 2])
    assert again.consolidated == {}
    assert again.unobserved == (0, 2)
    assert le.EWC(pool, 1.0, form=form).consolidate().note.startswith("nothing was observed")


def test_rows_of_nobody_and_bad_rows_are_left_out_and_counted(form):
    pool, adapters = small_pool()
    x, grad = samples(np.random.default_rng(9), 8, 12, 7)
    ids = np.array([0, -1, 0, 0, 0, 0, 0, 0])
    grad[1] = np.nan  # of no slot: nobody's
    grad[2, 3] = np.nan
    x[4, 0] = np.inf
    grad[6] = 1e25  # squares beyond float32
    ewc = le.EWC(pool, 1.0, form=form, fisher_samples=9)
    result = ewc.observe(x, grad, ids)
    assert result[:2] == (4, 3)
    assert "3 rows" in result.note
    good = [0, 3, 5, 7]
    ewc.consolidate()
    want = expected(form, adapters[0], (7,), x[good], grad[good], 9)
    assert close(matrix_of(form, *record(ewc, 0)[:2]), matrix_of(form, *want))
    assert ewc.observe(x[:1], grad[:1], [-1]) == (
        0, 0, "no adapter was named: nothing was observed"
    )  # fmt: skip
    assert ewc.observe(x[:0], grad[:0], np.zeros(0, int)).samples == 0
    assert ewc.observe(x[2:3], grad[2:3], 0)[:2] == (0, 1)
    assert ewc.consolidate().consolidated == {}


def test_a_slot_that_changes_hands_inherits_nothing(form):
    rng = np.random.default_rng(10)
    pool, _ = small_pool(history=1)
    x, grad = samples(rng, 5, 12, 7)
    ewc = le.EWC(pool, 1.0, form=form)

    def observed() -> dict:
        return dict.fromkeys(ewc.consolidate().consolidated)

    ids = np.array([0, 0, 1, 1, 2])
    ewc.observe(x, grad, ids)
    kept = pool.get(1)
    pool.remove(0)
    with pytest.raises(IndexError, match="slot"):
        ewc.observe(x, grad, ids)
    assert pool.add(*pool.get(2)) == 0
    pool.set(1, *kept)
    assert observed() == {2: None}
    ewc.observe(x[:1], grad[:1], 0)
    state = ewc.state()
    assert state[f"{form}.samples.0.0"] == 1
    assert f"{form}.samples.0.1" not in state
    pool.adapt(x[:1], grad[:1], np.array([0], np.int32), 0.1)
    pool.rollback(0)  # of a step: the adapter is the same
    assert observed() == {0: None}
    ewc.observe(x[:1], grad[:1], 0)
    pool.set(0, *kept)
    ewc.observe(x[:1], grad[:1], 0)
    pool.rollback(0)  # of the set: what was observed is of the adapter that went
    assert observed() == {}


def test_a_thousand_users(form):
    rng = np.random.default_rng(11)
    pool, _ = fill_pool(rng, 8, (6,), [1] * 1000)
    x, grad = samples(rng, 3000, 8, 6)
    ids = rng.permutation(np.repeat(np.arange(1000), 3))
    ewc = le.EWC(pool, 1.0, form=form, fisher_samples=4)
    assert ewc.observe(x[:1500], grad[:1500], ids[:1500]).samples == 1500
    assert ewc.observe(x[1500:], grad[1500:], ids[1500:].astype(np.int32)).samples == 1500
    assert ewc.consolidate().consolidated == dict.fromkeys(range(1000), 3)
    for slot in (0, 17, 999):
        rows = ids == slot
        want = expected(form, read_adapter(pool, slot), (6,), x[rows], grad[rows], 4)
        assert close(matrix_of(form, *record(ewc, slot)[:2]), matrix_of(form, *want))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_torch_tensors_and_half_precision(form, dtype):
    pool, adapters = small_pool()
    x, grad = samples(np.random.default_rng(12), 6, 12, 7)
    tensors = [torch.from_numpy(a).to(getattr(torch, dtype)) for a in (x, grad)]
    ewc = le.EWC(pool, 1.0, form=form, fisher_samples=6)
    ewc.observe(tensors[0].requires_grad_(), tensors[1], torch.tensor([0, 0, 0, -1, 0, 1]))
    ewc.consolidate(torch.tensor([0]))
    rows = [f64(t).astype("f4")[[0, 1, 2, 4]] for t in tensors]
    want = expected(form, adapters[0], (7,), *rows, 6)
    assert close(matrix_of(form, *record(ewc, 0)[:2]), matrix_of(form, *want))


def test_what_is_refused_changes_nothing(form):
    pool, _ = small_pool()
    x, grad = samples(np.random.default_rng(13), 3, 12, 7)
    ewc = le.EWC(pool, 1.0, form=form)
    ewc.observe(x, grad, [0, 0, 1])
    before = {key: bits(value) for key, value in ewc.state().items() if "samples" not in key}
    cases = [
        (ValueError, r"x: expected shape \[n, 12\], got \[3, 11\]", (x[:, 1:], grad, 0)),
        (ValueError, r"grad: expected shape \[3, 7\], got \[2, 7\]", (x, grad[1:], 0)),
        (ValueError, r"ids: expected shape \[3\], got \[2\]", (x, grad, [0, 0])),
        (ValueError, r"ids: expected shape \[3\], got \[3, 1\]", (x, grad, np.zeros((3, 1), int))),
        (TypeError, "ids: expected whole numbers", (x, grad, [0.0, 1.0, 2.0])),
        (TypeError, "ids: expected whole numbers", (x, grad, True)),
        (TypeError, "ids: expected whole numbers", (x, grad, "q_proj")),
        (IndexError, "slot", (x, grad, [0, 1, 3])),
        (IndexError, "slot or -1, got -2", (x, grad, [0, 1, -2])),
        (TypeError, "x: expected float32, bfloat16 or float16, got float64", (f64(x), grad, 0)),
        (TypeError, "grad: expected a NumPy array or a torch tensor", (x, grad.tolist(), 0)),
    ]
    for error, message, arguments in cases:
        with pytest.raises(error, match=message):
            ewc.observe(*arguments)
    with pytest.raises(IndexError, match="slot"):
        ewc.consolidate([0, 3])
    with pytest.raises(IndexError, match="got -1"):
        ewc.consolidate([-1, 0])
    after = {key: bits(value) for key, value in ewc.state().items() if "samples" not in key}
    assert after == before
    for error, message, options in [
        (ValueError, "gamma: expected 0 to 1", {"gamma": 1.5}),
        (ValueError, "gamma: expected 0 to 1", {"gamma": float("nan")}),
        (ValueError, "fisher_samples: expected at least 1", {"fisher_samples": 0}),
        (TypeError, "float", {"fisher_samples": 2.5}),
    ]:
        with pytest.raises(error, match=message):
            le.EWC(pool, 1.0, form=form, **options)
    with pytest.raises(TypeError, match="expected a MicroLoRA or AdapterPool, got dict"):
        le.EWC({}, 1.0, form=form)


def test_the_helper_is_the_formula(form):
    """d^(n-1-i) over its sum, of three numbers by hand."""
    d = 1 - 1 / 4
    direct = (d * d * 1.0 + d * 5.0 + 9.0) / (d * d + d + 1)
    assert average([np.array(v) for v in (1.0, 5.0, 9.0)], 4) == pytest.approx(direct)
