"""Sona: what a session is served, what a request changes, what is counted and refused."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
from helpers import bits, f64
from helpers_sona import IN, OUT, config, module, row, served, taught

import lora_engine as le
from lora_engine.learning import sona_module


def test_a_fresh_sona_adds_nothing():
    sona = le.Sona(config())
    assert not served(sona).any()
    assert sona.forward(row(0)).shape == (OUT,)


def test_served_is_consolidated_plus_fast():
    sona = le.Sona(config())
    taught(sona)
    assert sona.background().applied
    taught(sona, sessions=2)
    m = module(sona)
    x = row(7, n=5)
    for session in range(3):
        want = 0.0
        for slot in m.served.slots_of(session):
            A, B, scaling = m.pool.get(slot)
            want = want + scaling * f64(x) @ f64(A).T @ f64(B).T
        assert np.allclose(served(sona, session), want, atol=1e-5)
    assert len(m.served.slots_of(1)) == 2
    assert len(m.served.slots_of(2)) == 1


def test_rows_of_several_sessions_in_one_call():
    sona = le.Sona(config())
    taught(sona)
    sona.background()
    taught(sona, sessions=2)
    x, out = row(3, n=4), np.full((4, OUT), np.nan, np.float32)
    got = sona.forward(x, session=[1, 2, "nobody", 0], out=out)
    assert got is out
    for i, session in enumerate([1, 2, "nobody", 0]):
        assert np.allclose(out[i], sona.forward(x[i], session=session), atol=1e-6)
    assert torch.equal(
        sona.forward(torch.from_numpy(x), session=[1, 2, "nobody", 0]), torch.from_numpy(out)
    )


@pytest.mark.parametrize(("dtype", "count"), [("bfloat16", 300), ("float16", 2100)])
def test_slot_ids_beyond_what_the_dtype_of_x_counts_to(dtype, count):
    """Of many sessions, two learned toward two sides: each is served its own, in one mixture."""
    micro = le.MicroLoRAConfig(2, 2, rank=1, target_modules=("q",))
    sona = le.Sona(config(micro_lora=micro, instant_lr=1.0, max_pending_samples=10_000))
    x, up = np.ones(2, np.float32), np.ones(2, np.float32)
    for session in range(count):
        sign = 1.0 if session % 2 else -1.0
        sona.instant_adapt(x, le.Feedback.from_gradient(sign * up), session=session)
    last = list(range(count - 40, count))
    want = sona.forward(np.ones((40, 2), np.float32), session=last)
    assert (want[::2] * want[1::2] < 0).all()
    rows = torch.ones(40, 2, dtype=getattr(torch, dtype))
    alone = torch.stack([sona.forward(rows[0], session=session) for session in last])
    for got in (alone, sona.forward(rows, session=last)):
        np.testing.assert_allclose(f64(got), want, rtol=0.02)


def test_feedback_changes_its_session_alone():
    sona = le.Sona(config())
    before = [bits(served(sona, s).astype(np.float32)) for s in range(2)]
    x, target = row(0), row(1, OUT)
    losses = []
    for _ in range(30):
        losses.append(float(((sona.forward(x, session=0) - target) ** 2).sum()))
        result = sona.instant_adapt(x, le.Feedback.from_target(target), session=0)
        assert result.applied
        assert result.latency_us > 0
    assert losses[-1] < 0.2 * losses[0]
    assert bits(served(sona, 1).astype(np.float32)) == before[1]
    assert bits(served(sona, 0).astype(np.float32)) != before[0]


def test_the_step_is_the_pools():
    """From dL/dy, on the session's adapter, clipped to max_grad_norm."""
    sona = le.Sona(config(max_grad_norm=0.5))
    m = module(sona)
    pool = le.AdapterPool(IN, OUT)
    slot = pool.add(m.A, m.B, m.scaling)
    for i in range(5):
        x, g = row(i, n=3), row(i + 50, OUT, n=3)
        assert sona.instant_adapt(x, le.Feedback.from_gradient(g), session="s").applied
        pool.adapt(x, g, np.full(3, slot, np.int32), lr=0.05, max_norm=0.5)
    fast = m.served.fast["s"]
    for got, want in zip(m.pool.get(fast.slot), pool.get(slot), strict=True):
        assert bits(np.float32(got)) == bits(np.float32(want))


def test_quality_moves_opposite_ways_and_constant_quality_none():
    x = row(0)
    moves = []
    for quality in (1.0, 0.0):
        sona = le.Sona(config())
        sona.instant_adapt(x, le.Feedback.from_quality(0.5))
        _, trace = sona.forward(x, explore=0.1, return_trace=True)
        result = sona.instant_adapt(x, le.Feedback.from_quality(quality, trace=trace))
        assert result.applied, result.note
        moves.append(f64(sona.forward(x)))
    assert moves[0] @ moves[1] < -0.9 * np.linalg.norm(moves[0]) * np.linalg.norm(moves[1])
    sona = le.Sona(config())
    for _ in range(20):
        sona.forward(x, explore=0.1)
        assert not sona.instant_adapt(x, le.Feedback.from_quality(0.7)).applied
    assert not served(sona).any()


@pytest.mark.parametrize(("max_grad_norm", "most"), [(1e6, 1.0), (0.5, 0.5)])
def test_a_step_by_quality_is_bounded(max_grad_norm, most):
    sona = le.Sona(config(max_grad_norm=max_grad_norm))
    sona.instant_adapt(row(0), le.Feedback.from_quality(0.0))
    sona.forward(row(0), explore=1e-3)
    result = sona.instant_adapt(row(0), le.Feedback.from_quality(1.0))
    assert result.grad_norm > 100.0
    m = module(sona)
    A, B, _ = m.pool.get(m.served.fast[None].slot)
    assert np.hypot(np.linalg.norm(A - m.A), np.linalg.norm(B)) == pytest.approx(0.05 * most)


def test_torch_tensors():
    sona, same = le.Sona(config()), le.Sona(config())
    for i in range(4):
        x, y = row(i), row(i + 9, OUT)
        sona.instant_adapt(x, le.Feedback.from_target(y), session=1)
        same.instant_adapt(
            torch.from_numpy(x), le.Feedback.from_target(torch.from_numpy(y)), session=1
        )
    assert bits(served(sona, 1).astype("f4")) == bits(served(same, 1).astype("f4"))


@pytest.mark.parametrize("strategy", ["ewc_merge", "ensemble"])
def test_bfloat16_teaches_as_the_same_numbers_in_float32(strategy):
    sona, same = le.Sona(config(consolidation=strategy)), le.Sona(config(consolidation=strategy))
    for i in range(25):
        x, g = (torch.from_numpy(row(s, n)).bfloat16() for s, n in ((i, IN), (i + 99, OUT)))
        for one, (sample, up) in ((sona, (x, g)), (same, (x.float(), g.float()))):
            assert one.instant_adapt(sample, le.Feedback.from_gradient(up), session=i % 2).applied
        if i == 12:
            assert sona.background().applied == same.background().applied
    for one, other in zip(
        module(sona).held_out.samples(), module(same).held_out.samples(), strict=True
    ):
        assert len(one) == 3
        assert bits(one) == bits(other)
    assert bits(served(sona, 1).astype("f4")) == bits(served(same, 1).astype("f4"))
    assert sona.forward(x, session=1).dtype == torch.bfloat16


def test_a_gradient_that_does_not_fit_is_named_when_a_sample_is_held_out_too():
    sona = le.Sona(config())
    with pytest.raises(ValueError, match="grad: expected"):
        sona.instant_adapt(row(0), le.Feedback.from_gradient(row(1, OUT + 1)))
    assert sona.stats().instant_count == 0
    assert not len(module(sona).held_out.samples()[0])


def test_statistics_and_logs(caplog):
    sona = le.Sona(config())
    with caplog.at_level(logging.DEBUG, logger="lora_engine.learning"):
        taught(sona, sessions=2, samples=5)
        module(sona).held_out.clear()  # too few to judge by
        sona.instant_adapt(row(0), le.Feedback.from_quality(0.5))
        sona.instant_adapt(np.full(IN, np.nan, np.float32), le.Feedback.from_gradient(row(1, OUT)))
        sona.background()
    stats = sona.stats()
    assert (stats.instant_count, stats.background_count) == (12, 1)
    assert stats.instant_avg_latency_us > 0
    assert sum(stats.skipped.values()) == 2
    assert any("NaN" in reason for reason in stats.skipped)
    assert any("instant: applied" in r.message for r in caplog.records)
    assert any("background: BackgroundResult" in r.message for r in caplog.records)


def test_saved_and_loaded(tmp_path):
    sona = le.Sona(config())
    taught(sona)
    sona.background()
    sona.save(tmp_path / "a")
    other = le.Sona(config())
    taught(other, sessions=1)
    other.load(tmp_path / "a")
    assert np.allclose(served(other, 0), served(sona, "new"), atol=1e-6)
    assert len(module(other).pool) == 1
    wide = le.MicroLoRA(le.MicroLoRAConfig(IN, OUT + 1, target_modules=("q",)))
    wide.save(tmp_path / "b")
    with pytest.raises(ValueError, match=r"Sona.load: q: expected A"):
        other.load(tmp_path / "b")


def test_refused_before_anything_changes():
    sona = le.Sona(config())
    taught(sona)
    before, stats = served(sona, 0), sona.stats()._replace(engine=None)
    adapters = len(module(sona).pool)
    x, g = row(0), le.Feedback.from_gradient(row(0, OUT))
    for call, kind, text in (
        (lambda: sona.instant_adapt(x, g, session=0, quality=1.5), ValueError, "quality: expected"),
        (lambda: sona.instant_adapt(x, g, session=0, quality="a"), TypeError, "quality: expected"),
        (lambda: sona.instant_adapt(x, "good", session=0), TypeError, "expected a Feedback"),
        (lambda: sona.instant_adapt(row(0, 5), g, session=0), ValueError, "x: expected"),
        (lambda: sona.instant_adapt(x, g, module="v"), ValueError, "module: expected one of q"),
        (lambda: sona.instant_adapt(row(0, 5), g, session="new"), ValueError, "x: expected"),
        (lambda: sona.forward(row(0, n=2), session=[1]), ValueError, "expected one for each"),
        (lambda: sona.forward(x.tolist(), session=0), TypeError, "x: expected a NumPy array"),
        (lambda: sona.forward(x, explore=-1.0), ValueError, "explore: expected"),
        (lambda: sona.deep_optimize([x]), TypeError, "expected a TrainingSample"),
        (lambda: sona.deep_optimize([le.TrainingSample(x, row(0, OUT), 2.0)]), ValueError,
         "quality"),
        (lambda: sona.deep_optimize([le.TrainingSample(x * np.nan, row(0, OUT), 1.0)]), ValueError,
         "finite"),
        (lambda: sona.deep_optimize([le.TrainingSample(row(0, 3), row(0, OUT), 1.0)]), ValueError,
         "input_embedding: expected shape"),
    ):  # fmt: skip
        with pytest.raises(kind, match=text):
            call()
    assert np.array_equal(served(sona, 0), before)
    assert sona.stats()._replace(engine=None) == stats
    assert len(module(sona).pool) == adapters


def test_sessions_that_learned_nothing_hold_no_adapter():
    sona = le.Sona(config())
    taught(sona, sessions=1, samples=1)
    nan = np.full(IN, np.nan, np.float32)
    for i in range(5):
        for x, feedback in (
            (row(0), le.Feedback.from_quality(0.7)),
            (nan, le.Feedback.from_gradient(row(0, OUT))),
            (row(0, n=3)[:0], le.Feedback.from_gradient(row(0, OUT, n=3)[:0])),
        ):
            assert not sona.instant_adapt(x, feedback, session=f"new {i}").applied
    assert len(module(sona).pool) == 2
    assert list(module(sona).served.fast) == [0]


def test_a_refused_call_keeps_the_trace():
    sona, x = le.Sona(config()), row(0)
    sona.instant_adapt(x, le.Feedback.from_quality(0.5))
    sona.forward(x, explore=0.1)
    with pytest.raises(ValueError, match="q: expected 1 or 1 numbers"):
        sona.instant_adapt(x, le.Feedback.from_quality([0.1, 0.2]))
    with pytest.raises(ValueError, match="x: expected"):
        sona.instant_adapt(x[:5], le.Feedback.from_quality(0.9))
    assert sona.instant_adapt(x, le.Feedback.from_quality(0.9)).applied
    assert not sona.instant_adapt(x, le.Feedback.from_quality(0.9)).applied


def test_baselines_are_those_of_the_sessions_rated_last(monkeypatch):
    monkeypatch.setattr(sona_module, "BASELINES", 3)
    sona = le.Sona(config())
    for session in (0, 1, 2, 0, 3):
        sona.instant_adapt(row(0), le.Feedback.from_quality(0.5), session=session)
    assert list(module(sona).baselines) == [2, 0, 3]


@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        ({"consolidation": "best"}, ValueError),
        ({"instant_lr": 0.0}, ValueError),
        ({"instant_lr": "fast"}, TypeError),
        ({"ewc_gamma": 1.1}, ValueError),
        ({"ewc_lambda": float("nan")}, ValueError),
        ({"max_pending_samples": 0}, ValueError),
        ({"micro_lora": None}, TypeError),
    ],
)
def test_configurations_that_are_refused(changes, kind):
    with pytest.raises(kind, match=rf"SonaConfig: {next(iter(changes))}: expected"):
        le.SonaConfig(**changes)


def test_presets_are_the_guides():
    presets = {name: le.SonaConfig.preset(name, 64) for name in
               ("low_latency", "balanced", "high_quality", "minimal_memory")}  # fmt: skip
    assert [p.background_interval_ms for p in presets.values()] == [200, 100, 50, 100]
    assert [p.micro_lora.rank for p in presets.values()] == [1, 2, 4, 1]
    assert [len(p.micro_lora.target_modules) for p in presets.values()] == [1, 2, 4, 1]
    assert [p.max_pending_samples for p in presets.values()] == [1000, 1000, 1000, 100]
    base = presets["balanced"].ewc_lambda
    assert [p.ewc_lambda for p in presets.values()] == [0.0, base, 5 * base, base]
    changed = le.SonaConfig.preset("high_quality", 64, ewc_lambda=3.0, max_pending_samples=7)
    assert (changed.ewc_lambda, changed.max_pending_samples) == (3.0, 7)
    assert changed.micro_lora == presets["high_quality"].micro_lora
    with pytest.raises(ValueError, match=r"SonaConfig.preset: name: expected one of low_latency"):
        le.SonaConfig.preset("fast")
