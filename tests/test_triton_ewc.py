"""Op 7 on the Triton backend: the array op, and both forms inside the fused step."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from helpers import (
    DTYPES,
    LAYOUTS,
    STORED,
    TOLERANCE,
    bits,
    delta_error,
    f64,
    fill_pool,
    strided,
)
from helpers_ewc import close, expected, matrix_of
from helpers_triton import (  # noqa: F401  the fixture
    DEVICE,
    FULL,
    few,
    indices,
    on_device,
    triton_backend,
)
from hypothesis import given
from hypothesis import strategies as st
from test_batched_adapt import ROUNDING, step_error

import lora_engine as le
from lora_engine import reference
from lora_engine.reference_ewc import delta_penalty, delta_step

pytestmark = pytest.mark.usefixtures("triton_backend")


@pytest.mark.parametrize("dtype", DTYPES)
@few
@given(data=st.data())
def test_array_step_matches_reference(dtype, data):
    shape = data.draw(st.sampled_from([(0, 4), (1, 1), (3, 127), (2, 2049), (40, 3)]), "shape")
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1), "seed"))
    lr, lam = (
        data.draw(st.sampled_from([0.0, 0.01, 1.0])),
        data.draw(st.sampled_from([0.0, 0.5, 1e4])),
    )
    theta, grad, fisher, anchor = (
        strided(on_device(values, kind), data.draw(st.sampled_from(LAYOUTS)))
        for values, kind in (
            (rng.standard_normal(shape), dtype),
            (rng.standard_normal(shape), dtype),
            (rng.uniform(0, 3, shape), "float32"),
            (rng.standard_normal(shape), "float32"),
        )
    )
    want = reference.ewc_step(f64(theta), f64(grad), f64(fisher), f64(anchor), lr, lam)
    kept = [bits(a) for a in (grad, fisher, anchor)]
    le.ewc_step(theta, grad, fisher, anchor, lr, lam, seed=5, version=9)
    assert delta_error(theta, want, np.abs(want) + 1) <= (
        TOLERANCE[dtype] if dtype == "float32" else STORED[dtype]
    )
    assert [bits(a) for a in (grad, fisher, anchor)] == kept


@pytest.mark.parametrize("layout", ["contiguous", "columns"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_array_step_rounds_as_the_reference(dtype, layout):
    """A step from 0 to values of every exponent, so that the hash alone sets the bits."""
    rng = np.random.default_rng(1)
    drawn = rng.integers(0, 1 << 32, (40, 51), dtype=np.uint32).view(np.float32)
    values = np.where(np.isfinite(drawn), drawn, 1.0).astype(np.float32)
    theta = strided(on_device(np.zeros((40, 51)), dtype), layout)
    zeros = on_device(np.zeros((40, 51)))
    with np.errstate(over="ignore"):
        le.ewc_step(theta, on_device(-values), zeros, zeros, 1.0, 0.0, seed=2**63, version=4)
    key = reference.rounding_key(2**63, 0, 4)
    want = ROUNDING[dtype](values, key, np.arange(values.size).reshape(values.shape))
    got = f64(theta).astype(np.float32)
    finite = np.isfinite(want)
    assert bits(got[finite] + 0) == bits(want[finite] + 0)
    assert np.array_equal(np.isfinite(got), finite)


def test_an_enormous_lambda():
    theta, anchor = on_device(np.array([5.0, 1.0, -3.0])), on_device(np.ones(3))
    fisher = on_device(np.array([1.0, 0.0, 1e3]))
    le.ewc_step(theta, on_device(np.zeros(3)), fisher, anchor, 0.1, 1e12)
    assert np.allclose(f64(theta), [1.0, 1.0, 1.0], atol=1e-6)


OPTIONS = {"lr": 0.05, "max_norm": 1.0, "lr_ratio": 2.0, "weight_decay": 0.1}


class Learning:
    """A pool of two slots and some rows; slot 0 has a record, slot 1 none."""

    def __init__(self, slices, ranks, dtype, form, lam, seed=0, **options):
        rng = np.random.default_rng(seed)
        self.held = fill_pool(rng, 21, slices, [ranks, ranks], dtype, seed=7, **options)
        self.anchor, self.slices, self.lam, self.form = self.held.adapters[0], slices, lam, form
        sliced = len(slices) > 1
        here = [m is not None for m in self.anchor.A]
        shapes = {
            "factor": ([m.shape for m in self.anchor.A if m is not None],
                       [m.shape for m in self.anchor.B if m is not None]),
            "delta": ([(o,) for o, h in zip(slices, here, strict=True) if h], [(21,)] * sum(here)),
        }[form]  # fmt: skip
        self.fisher = []
        for group in shapes:
            drawn = iter([rng.uniform(0, 2, shape).astype("f4") for shape in group])
            self.fisher.append([next(drawn) if h else None for h in here])
        self.ewc = le.EWC(self.held.pool, ewc_lambda=lam, form=form)
        self.ewc.set(0, *(f if sliced else f[0] for f in self.fisher))
        self.x = rng.standard_normal((4, 21)).astype("f4")
        self.grad = rng.standard_normal((4, sum(slices))).astype("f4")
        self.ids = np.array([0, 1, 0, -1], np.int32)

    def errors(self, **changed):
        """One step, and how far each slot is from the reference's."""
        options = {**OPTIONS, **changed}
        before = self.held.refresh()
        self.held.pool.adapt(
            on_device(self.x), on_device(self.grad), indices(self.ids), ewc=self.ewc, **options
        )
        after, step = self.held.refresh(), reference.Step(**options, ewc_lambda=self.lam)
        errors = []
        for slot in (0, 1):
            g = reference.slot_gradients(
                self.x, self.grad, before[slot], self.slices, slot, self.ids
            )
            if slot or self.form == "factor":
                record = (tuple(self.fisher), self.anchor) if slot == 0 else (None, None)
                want = reference.step_adapter(before[slot], *g, step, *record)
            else:
                want = delta_step(before[slot], *g, step, tuple(self.fisher), self.anchor)
            errors.append(step_error(after[slot], want, before[slot]))
        return errors

    def penalty(self) -> float:
        now, total = self.held.refresh()[0], 0.0
        for s, (a, b) in enumerate(zip(now.A, now.B, strict=True)):
            if a is None:
                continue
            first, second, star = self.fisher[0][s], self.fisher[1][s], self.anchor
            if self.form == "delta":
                total += delta_penalty(
                    a, b, star.A[s], star.B[s], first, second, now.scaling, self.lam
                )
            else:
                total += self.lam * float((first * (f64(a) - star.A[s]) ** 2).sum())
                total += self.lam * float((second * (f64(b) - star.B[s]) ** 2).sum())
        return total


@pytest.mark.parametrize(
    ("form", "lam", "slices", "ranks"),
    [
        ("factor", 0.8, (9,), 2),
        ("factor", 1e4, (7, 4), (2, 1)),
        ("factor", 0.8, (4, 6), (0, 3)),
        ("delta", 0.0, (9,), 1),
        ("delta", 0.8, (7, 4), (2, 3)),
        ("delta", 1e4, (4, 6), (0, 3)),
        ("delta", 1e4, (9,), 2),
    ],
    ids=str,
)
def test_fused_step_matches_reference(form, lam, slices, ranks):
    learning = Learning(slices, ranks, "float32", form, lam)
    for _ in range(2):  # the second step starts off the anchor
        assert max(learning.errors()) <= STORED["float32"]
    assert learning.ewc.penalty() == pytest.approx(learning.penalty(), rel=1e-6)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("form", ["factor", "delta"])
def test_fused_step_in_16_bits(form, dtype):
    """In the delta form the block of A sees B as it was stored, the reference as it was not."""
    learning = Learning((9,), 3, dtype, form, 0.8)
    for _ in range(2):
        assert max(learning.errors()) <= STORED[dtype]


@pytest.mark.parametrize("ranks", [6, *([17, 40] if FULL or DEVICE == "cuda" else [])])
def test_delta_form_of_larger_ranks(ranks):
    """Reflections are needed from rank 3 on; from rank 17 on they go over several tiles."""
    learning = Learning((13,), ranks, "float32", "delta", 1e4)
    for _ in range(2):
        assert max(learning.errors()) <= STORED["float32"]


@pytest.mark.parametrize("form", ["factor", "delta"])
def test_frozen_a_and_history(form):
    learning = Learning((9,), 2, "float32", form, 0.8, history=1)
    before = learning.held.refresh()
    assert max(learning.errors(train_A=False)) <= STORED["float32"]
    after = learning.held.refresh()
    assert bits(after[0].A[0]) == bits(before[0].A[0])
    assert bits(after[0].B[0]) != bits(before[0].B[0])
    learning.held.pool.rollback(0)
    assert bits(learning.held.refresh()[0].B[0]) == bits(before[0].B[0])
    assert learning.ewc.penalty() == 0.0
    assert max(learning.errors()) <= STORED["float32"]  # the record is still its own


@pytest.mark.parametrize("lam", [0.5, 1e4])
def test_delta_penalty_falls_step_by_step(lam):
    """From other weights of the same adapter, without a gradient; monotone up to c = 20,000."""
    learning = Learning((9,), 3, "float32", "delta", lam)
    learning.ids[:] = -1
    learning.ids[0] = 0
    pool = learning.held.pool
    for _ in range(2):  # away from the anchor, without the penalty
        pool.adapt(on_device(learning.x), on_device(learning.grad), indices(learning.ids), 0.2)
    values = [learning.ewc.penalty()]
    zeros = on_device(np.zeros((1, 21))), on_device(np.zeros((1, 9)))
    for _ in range(3):
        pool.adapt(*zeros, indices([0]), 0.05, ewc=learning.ewc)
        values.append(learning.ewc.penalty())
    floor = 1e-10 * values[0]  # of what float32 weights can express
    assert all(b < a or b < floor for a, b in pairwise(values))
    assert values[-1] < 0.5 * values[0]


def test_delta_form_of_a_rank_deficient_adapter():
    """B = 0: G of the second block has no direction at all, and I + t G is I."""
    learning = Learning((9,), 3, "float32", "delta", 1e4)
    A, _, scaling = learning.held.pool.get(0)
    learning.held.pool.set(0, A, np.zeros((9, 3), "f4"), scaling)
    learning.anchor = learning.held.refresh()[0]
    learning.ewc.set(0, *(f[0] for f in learning.fisher))
    for _ in range(2):
        assert max(learning.errors()) <= STORED["float32"]


@pytest.mark.parametrize("form", ["factor", "delta"])
def test_a_gradient_that_waited_takes_the_penalty_too(form):
    learning = Learning((9,), 3, "float32", form, 0.8)
    held = learning.held
    before, mine = held.refresh()[0], learning.ids == 0
    x, grad = learning.x[mine], learning.grad[mine]
    held.pool.accumulate_gradient(0, on_device(x), on_device(grad))
    assert held.pool.apply_updates(0.05, max_norm=1.0, ewc=learning.ewc) == {0: ""}
    g = reference.slot_gradients(x, grad, before, (9,), 0, np.zeros(len(x), np.int32))
    step = reference.Step(0.05, 1.0, ewc_lambda=0.8)
    if form == "delta":
        want = delta_step(before, *g, step, tuple(learning.fisher), learning.anchor)
    else:
        want = reference.step_adapter(before, *g, step, tuple(learning.fisher), learning.anchor)
    assert step_error(held.refresh()[0], want, before) <= STORED["float32"]


@pytest.mark.parametrize("form", ["factor", "delta"])
def test_a_record_does_not_outlive_its_adapter(form):
    """A slot reissued to another user, or set anew, is free of the old penalty."""
    learning = Learning((9,), 2, "float32", form, 1e6)
    pool = learning.held.pool
    learning.ewc.set(1, *(f[0] for f in learning.fisher))
    A, B, scaling = pool.get(0)
    pool.remove(0)
    assert pool.add(A + 1, B + 1, scaling) == 0
    pool.set(1, A - 1, B - 1, scaling)
    assert learning.ewc.penalty() == 0.0
    learning.lam = 0.0
    assert max(learning.errors()) <= STORED["float32"]


@pytest.mark.parametrize("form", ["factor", "delta"])
def test_a_record_is_read_and_put_back_to_the_bit(form):
    learning = Learning((7, 5, 4), (2, 0, 3), "float32", form, 0.8)
    learning.errors()  # away from the anchor
    got = learning.ewc._storage.get(0)
    for part, want in zip(got, (*learning.fisher, *learning.anchor[:2]), strict=True):
        for a, b in zip(part, want, strict=True):
            assert (a is None) == (b is None)
            assert a is None or (a.dtype == np.float32 and bits(a) == bits(b))
    other = le.EWC(learning.held.pool, learning.lam, form=form)
    other._storage.restore(0, *got)
    assert other.penalty() == learning.ewc.penalty() > 0.0
    with pytest.raises(ValueError, match=r"EWC\.get: slot: .*slot 1, which has none"):
        other._storage.get(1)
    with pytest.raises(ValueError, match="anchor_A: expected finite values, got nan"):
        other._storage.restore(
            1, *got[:2], [a if a is None else a * np.nan for a in got[2]], got[3]
        )
    with pytest.raises(IndexError, match=r"EWC\.restore: slot"):
        other._storage.restore(5, *got)


def test_what_is_refused():
    pool, _ = fill_pool(np.random.default_rng(3), 16, (8,), [2])
    factor, delta = le.EWC(pool, 1.0, form="factor"), le.EWC(pool, 1.0, form="delta")
    F_A, F_B, u, v = (np.ones(s, "f4") for s in ((2, 16), (8, 2), 8, 16))
    for kind, match, call in [
        (ValueError, r"EWC\.set: fisher_A: expected shape \[2, 16\], got \[3, 16\]",
         lambda: factor.set(0, np.ones((3, 16), "f4"), F_B)),
        (ValueError, r"fisher_B: expected finite values of 0 or more, got -1",
         lambda: factor.set(0, F_A, -F_B)),
        (ValueError, r"u: expected shape \[8\], got \[16\]", lambda: delta.set(0, v, u)),
        (ValueError, r"v: expected finite values of 0 or more, got nan",
         lambda: delta.set(0, u, v * np.nan)),
        (TypeError, "u: expected float32, got float64", lambda: delta.set(0, u.astype("f8"), v)),
        (IndexError, "slot", lambda: delta.set(5, u, v)),
        (ValueError, "ewc_lambda: expected 0 or more", lambda: le.EWC(pool, -1.0)),
        (ValueError, "form: expected factor or delta", lambda: le.EWC(pool, 1.0, form="dense")),
    ]:  # fmt: skip
        with pytest.raises(kind, match=match):
            call()
    assert factor.penalty() == delta.penalty() == 0.0
    theta, three = on_device(np.zeros(3)), on_device(np.ones(3))
    with pytest.raises(ValueError, match="ewc_step: fisher: expected shape"):
        le.ewc_step(theta, three, on_device(np.zeros(2)), three, 0.1, 1.0)
    with pytest.raises(ValueError, match="theta: expected memory of its own"):
        le.ewc_step(theta, theta, three, three, 0.1, 1.0)
    with pytest.raises(ValueError, match="lr: expected 0 or more"):
        le.ewc_step(theta, three, three, three, -0.1, 1.0)


@pytest.mark.parametrize("form", ["factor", "delta"])
@pytest.mark.parametrize(("slices", "ranks"), [((9,), 2), ((4, 6), (0, 3))], ids=str)
def test_a_record_is_read_and_restored(form, slices, ranks):
    learning = Learning(slices, ranks, "float32", form, 0.8)
    storage = learning.ewc._pools[learning.held.pool]._storage
    learning.errors()
    left = learning.ewc.penalty()
    assert left > 0
    got = storage.get(0)
    want = (*learning.fisher, learning.anchor.A, learning.anchor.B)
    for part, values in zip(got, want, strict=True):
        assert [p is None for p in part] == [v is None for v in values]
        for p, v in zip(part, values, strict=True):
            assert p is None or bits(p) == bits(v)
    learning.ewc.remove(0)
    with pytest.raises(ValueError, match=r"EWC\.get: slot: expected one with a record, got slot 0"):
        storage.get(0)
    wrong = [None if m is None else m[1:] for m in got[2]]
    with pytest.raises(ValueError, match=r"EWC\.restore: anchor"):
        storage.restore(0, got[0], got[1], wrong, got[3])
    assert learning.ewc.penalty() == 0.0
    storage.restore(0, *got)
    assert learning.ewc.penalty() == left
    assert max(learning.errors()) <= STORED["float32"]


@pytest.mark.parametrize("form", ["factor", "delta"])
def test_a_task_is_observed_and_consolidated(form):
    """Device tensors in, and the record that the reference's formulas give."""
    learning = Learning((9,), 2, "float32", form, 0.8)
    ewc = le.EWC(learning.held.pool, 0.8, form=form, fisher_samples=3)
    x, grad = on_device(learning.x), on_device(learning.grad)
    assert ewc.observe(x, grad, indices(learning.ids)).samples == 3
    assert ewc.consolidate(indices([0])).consolidated == {0: 2}
    rows = [0, 2]
    want = expected(form, learning.anchor, (9,), learning.x[rows], learning.grad[rows], 3)
    got = ewc._pools[learning.held.pool]._storage.get(0)
    assert close(matrix_of(form, *got[:2]), matrix_of(form, *want))
