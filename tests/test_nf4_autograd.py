"""The backward pass of nf4_linear: finite differences, and torch on the dequantised matrix."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch
from helpers import DTYPES, TOLERANCE, bits, f64, fill_pool, poisoned, strided, to_dtype
from hypothesis import given
from hypothesis import strategies as st

import lora_engine as le
from lora_engine import reference
from lora_engine.backends import chosen


def close(got, want, size, dtype="float32"):
    assert np.linalg.norm(f64(got) - f64(want)) <= TOLERANCE[dtype] * np.linalg.norm(size)


@given(
    st.sampled_from([0, 1, 3, 4, 70]),
    st.integers(1, 700),
    st.integers(1, 100),
    st.sampled_from(DTYPES),
    st.sampled_from(["contiguous", "rows", "columns"]),
    st.sampled_from([32, 64, 512]),
    st.integers(0, 2**32 - 1),
)
def test_dx_is_grad_times_the_matrix(n, features, out, dtype, layout, blocksize, seed):
    rng = np.random.default_rng(seed)
    w = le.nf4_quantize(rng.standard_normal((out, features)).astype("f4"), blocksize)
    grad = strided(to_dtype(rng.standard_normal((n, out)), dtype), layout)
    dx = strided(poisoned(grad, n, features), layout)
    assert chosen().nf4_linear_backward(grad, w.storage(chosen()), dx) is dx
    W = w.to_float().astype("f8")
    close(dx, f64(grad) @ W, np.abs(f64(grad)) @ np.abs(W), dtype)


@given(st.sampled_from([(9,), (4, 5)]), st.integers(1, 3), st.integers(0, 2**32 - 1))
def test_a_transposed_batch_is_the_gradient_of_the_batch(slices, k, seed):
    rng = np.random.default_rng(seed)
    filled = fill_pool(rng, 33, slices, [1, 4, (3, 0)[: len(slices)], 17])
    ids = rng.integers(-1, 4, (6, k)).astype("i4")
    weights = rng.uniform(-1, 1, ids.shape).astype("f4")
    grad = rng.standard_normal((6, 9)).astype("f4")
    turned = {s: reference.transposed(a, slices) for s, a in filled.adapters.items()}
    want = reference.batched_lora_delta(grad, turned, [33], ids, weights)
    # The reference itself, by its definition: <grad, delta(e)> for each unit vector e.
    for i in range(6):
        each = np.eye(33)
        delta = reference.batched_lora_delta(
            each, filled.adapters, slices, np.repeat(ids[i : i + 1], 33, 0),
            np.repeat(weights[i : i + 1], 33, 0),
        )  # fmt: skip
        np.testing.assert_allclose(want[i], delta @ grad[i].astype("f8"), rtol=1e-9, atol=1e-9)
    for accumulate in (False, True):
        dx = np.full((6, 33), 2.0 if accumulate else np.nan, "f4")
        filled.pool._storage.forward(grad, ids, weights, dx, accumulate, True)
        close(dx, want + 2.0 * accumulate, np.abs(want) + 10)


def setting(dtype="float32", k=None, seed=0):
    rng = np.random.default_rng(seed)
    filled = fill_pool(rng, 96, (40,), [1, 3, 2])
    w = le.nf4_quantize(rng.standard_normal((40, 96)).astype("f4"))
    x = to_dtype(rng.standard_normal((7, 96)), dtype).requires_grad_()
    bias = to_dtype(rng.standard_normal(40), dtype).requires_grad_()
    ids = rng.integers(-1, 2, (7, k) if k else 7).astype("i4")
    weights = rng.uniform(-1, 1, ids.shape).astype("f4") if k else None
    up = to_dtype(rng.standard_normal((7, 40)), dtype)
    return filled, w, x, bias, ids, weights, up


def by_torch(filled, w, x, bias, ids, weights, up):
    """(y, dx, dbias, {slot: (dA, dB)}) of torch's autograd in float64, adapters one by one."""
    rows, b = (t.detach().double().requires_grad_() for t in (x, bias))
    y = rows @ torch.from_numpy(w.to_float()).double().T + b
    factors = {}
    for slot, (A, B, s) in filled.adapters.items():
        a, c = (torch.tensor(m[0], dtype=torch.float64, requires_grad=True) for m in (A, B))
        share = torch.from_numpy(np.where(ids == slot, 1.0 if weights is None else weights, 0.0))
        share = share if share.ndim == 1 else share.sum(1)
        y = y + share[:, None] * s * (rows @ a.T) @ c.T
        factors[slot] = (a, c)
    y.backward(up.double())
    return y.detach(), rows.grad, b.grad, {s: (a.grad, c.grad) for s, (a, c) in factors.items()}


@pytest.mark.parametrize("k", [None, 1, 3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_agree_with_torch(dtype, k):
    filled, w, x, bias, ids, weights, up = setting(dtype, k)
    y = le.nf4_linear(x, w, bias, filled.pool, ids, weights)
    y.backward(up)
    want_y, dx, dbias, factors = by_torch(filled, w, x, bias, ids, weights, up)
    close(y, want_y, 3 * f64(want_y), dtype)
    close(x.grad, dx, 3 * f64(dx), dtype)
    close(bias.grad, dbias, 3 * f64(dbias), dtype)
    named = {int(s) for s in ids.ravel() if s >= 0}
    for slot, (dA, dB) in factors.items():
        got = filled.pool.gradient(slot)
        assert (got is None) == (slot not in named)
        for g, want in zip(got or (), (dA, dB), strict=bool(got)):
            close(g, want, 3 * f64(want), dtype)


def test_gradients_agree_with_finite_differences():
    filled, w, x, bias, ids, weights, up = setting(k=2)
    le.nf4_linear(x, w, bias, filled.pool, ids, weights).backward(up)

    def loss(rows):
        with torch.no_grad():
            y = le.nf4_linear(rows, w, bias, filled.pool, ids, weights)
        return float((y.double() * up.double()).sum())

    rng = np.random.default_rng(3)
    for _ in range(10):  # linear in x: the difference has no error but rounding
        step = torch.from_numpy(rng.standard_normal(x.shape).astype("f4"))
        slope = (loss(x.detach() + step) - loss(x.detach() - step)) / 2
        want = float((x.grad.double() * step.double()).sum())
        assert abs(slope - want) <= 1e-4 * float((x.grad * step).abs().sum())
    A, B, s = filled.pool.get(1)
    gA, gB = filled.pool.gradient(1)
    for which, g in ((0, gA), (1, gB)):
        step = rng.standard_normal(g.shape).astype("f4")
        ends = []
        for sign in (0.5, -0.5):
            moved = [A.copy(), B.copy()]
            moved[which] += sign * step
            filled.pool.set(1, *moved, s)
            ends.append(loss(x.detach()))
        assert abs(ends[0] - ends[1] - float((g * step).sum())) <= 1e-4 * np.abs(g * step).sum()


def test_leading_dimensions_vectors_and_frozen_inputs():
    filled, w, x, bias, ids, _, up = setting()
    wide = x.detach()[:6].reshape(2, 3, 96).requires_grad_()
    le.nf4_linear(wide, w, bias.detach(), filled.pool, ids[:6]).backward(up[:6].reshape(2, 3, 40))
    _, dx, _, _ = by_torch(filled, w, x, bias, ids, None, up)
    close(wide.grad.reshape(6, 96), dx[:6], f64(dx))
    one = x.detach()[0].requires_grad_()
    le.nf4_linear(one, w).backward(up[0])
    close(one.grad, f64(up[0]) @ w.to_float(), np.abs(f64(up[0])) @ np.abs(w.to_float()))
    b = bias.detach().requires_grad_()
    le.nf4_linear(x.detach(), w, b).backward(up)  # of the bias alone
    close(b.grad, up.sum(0), np.abs(f64(up)).sum(0))
    with torch.no_grad():
        quiet = le.nf4_linear(x, w, bias, filled.pool, ids)
    assert not quiet.requires_grad
    assert bits(quiet) == bits(le.nf4_linear(x, w, bias, filled.pool, ids).detach())


def test_gradients_wait_add_up_and_are_applied():
    filled, w, x, bias, ids, _, up = setting()
    pool = filled.pool
    for _ in range(2):
        le.nf4_linear(x, w, bias, pool, ids).backward(up)
    twice = pool.gradient(1)
    _, _, _, factors = by_torch(filled, w, x, bias, ids, None, up)
    for g, want in zip(twice, factors[1], strict=True):
        close(g, 2 * want, 6 * f64(want))
    A, B, _ = pool.get(1)
    rows = int((ids == 1).sum())
    assert pool.apply_updates(lr=0.5) == {s: "" for s in sorted({int(i) for i in ids if i >= 0})}
    after = pool.get(1)
    for before, now, want in zip((A, B), after, factors[1], strict=False):
        np.testing.assert_allclose(now, before - 0.5 * f64(want) / rows, rtol=1e-4, atol=1e-5)
    assert pool.gradient(1) is None
    assert pool.apply_updates(lr=0.5) == {}
    le.nf4_linear(x, w, bias, pool, ids).backward(up)
    pool.clear_updates()
    assert pool.gradient(1) is None


def test_a_gradient_that_is_not_finite_is_left_out_and_said():
    filled, w, x, bias, ids, _, up = setting()
    up[np.flatnonzero(ids == 0)[0], 0] = float("nan")
    before = bits(filled.pool.get(0)[0])
    le.nf4_linear(x, w, bias, filled.pool, ids).backward(up)
    notes = filled.pool.apply_updates(lr=0.1)
    assert notes[0] == "1 gradients with NaN or Inf were left out"
    assert notes[1] == ""
    assert bits(filled.pool.get(0)[0]) == before


def test_what_waits_goes_with_the_adapter():
    filled, w, x, bias, ids, _, up = setting()
    le.nf4_linear(x, w, bias, filled.pool, ids).backward(up)
    A, B, s = filled.pool.get(0)
    filled.pool.set(0, A, B, s)
    assert filled.pool.gradient(0) is None
    filled.pool.remove(1)
    with pytest.raises(IndexError):
        filled.pool.gradient(1)
    assert filled.pool.add(A, B, s) == 1
    assert filled.pool.gradient(1) is None
    with pytest.raises(IndexError):
        filled.pool.accumulate_gradient(99, x.detach(), up)
    assert filled.pool._pending == {}


def test_a_rollback_drops_what_waits():
    rng = np.random.default_rng(0)
    pool = le.AdapterPool(96, 40, history=1)
    slot = pool.add(*(rng.standard_normal(s).astype("f4") for s in ((4, 96), (40, 4))), 1.0)
    pool.set(slot, *(rng.standard_normal(s).astype("f4") for s in ((2, 96), (40, 2))), 1.0)
    x, up = (rng.standard_normal((3, n)).astype("f4") for n in (96, 40))
    pool.accumulate_gradient(slot, x, up)
    pool.rollback(slot)
    assert pool.gradient(slot) is None
    assert pool.apply_updates(lr=0.1) == {}
    pool.accumulate_gradient(slot, x, up)
    assert pool.gradient(slot)[0].shape == (4, 96)
    size = pool.nbytes
    pool.clear_updates()
    assert pool.nbytes == size - 4 * 4 * (96 + 40)
    assert pool.gradient(slot) is None


def test_a_gradient_never_reaches_the_next_owner_of_a_slot():
    """apply_updates beside remove and add: the new adapters stay as they were added."""
    rng = np.random.default_rng(1)
    A, B = rng.standard_normal((2, 8)).astype("f4"), np.zeros((8, 2), "f4")
    x, up = (rng.standard_normal((1, 8)).astype("f4") for _ in range(2))
    for _ in range(5):
        pool = le.AdapterPool(8, 8)
        slots = [pool.add(A, B, 1.0) for _ in range(2000)]
        for slot in slots:
            pool.accumulate_gradient(slot, x, up)
        learner = threading.Thread(target=lambda pool=pool: pool.apply_updates(lr=1.0))
        learner.start()
        for slot in reversed(slots):
            pool.remove(slot)
        fresh = [pool.add(np.zeros((1, 8), "f4"), np.zeros((8, 1), "f4"), 1.0) for _ in slots]
        learner.join()
        assert not any(pool.get(slot)[1].any() for slot in fresh)


def test_arrays_of_either_kind_under_autograd():
    _, w, x, bias, _, _, up = setting()
    le.nf4_linear(x, w, bias.detach().numpy()).backward(up)
    want = x.grad.clone()
    x.grad = None
    le.nf4_linear(x, w).backward(up)
    assert bits(x.grad) == bits(want)
    one = bias.detach()[None].requires_grad_()
    le.nf4_linear(x.detach().numpy(), w, one).backward(up)
    assert one.grad.shape == (1, 40)
    close(one.grad[0], up.sum(0), np.abs(f64(up)).sum(0))


def test_ids_as_tensors():
    filled, w, x, bias, ids, weights, up = setting(k=2)
    y = le.nf4_linear(x, w, bias, filled.pool, torch.from_numpy(ids), torch.from_numpy(weights))
    y.backward(up)
    got = filled.pool.gradient(1)
    filled.pool.clear_updates()
    le.nf4_linear(x, w, bias, filled.pool, ids, weights).backward(up)
    for a, b in zip(got, filled.pool.gradient(1), strict=True):
        assert bits(a) == bits(b)


def test_ids_may_be_reused_before_the_backward_pass():
    filled, w, x, bias, ids, _, up = setting()
    y = le.nf4_linear(x, w, bias, filled.pool, ids)
    _, dx, _, _ = by_torch(filled, w, x, bias, ids.copy(), None, up)
    ids[:] = 2
    y.backward(up)
    close(x.grad, dx, 3 * f64(dx))
    assert filled.pool.gradient(2) is None


def test_weights_changed_since_the_forward_pass_are_refused():
    filled, w, x, bias, ids, _, up = setting()
    y = le.nf4_linear(x, w, bias, filled.pool, ids)
    filled.pool.adapt(x.detach(), up, ids, lr=0.1)
    with pytest.raises(RuntimeError, match="nf4_linear: backward: expected the adapters"):
        y.backward(up)
    y = le.nf4_linear(x, w, bias, filled.pool, ids)
    filled.pool.remove(1)
    with pytest.raises(RuntimeError, match="nf4_linear: backward: expected the adapters"):
        y.backward(up)
    assert filled.pool.gradient(0) is None


def test_what_cannot_be_differentiated_is_refused():
    filled, w, x, bias, ids, weights, _ = setting(k=2)
    with pytest.raises(ValueError, match="weights: expected a tensor outside autograd"):
        le.nf4_linear(x, w, bias, filled.pool, ids, torch.from_numpy(weights).requires_grad_())
    with pytest.raises(ValueError, match="out: expected None where x or bias requires grad"):
        le.nf4_linear(x, w, bias, out=torch.empty(7, 40))
