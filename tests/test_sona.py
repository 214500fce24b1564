"""Sona: what a session is served, what a request changes, what the background pass does with it."""

from __future__ import annotations

import logging
import threading
import time

import numpy as np
import pytest
import torch
from helpers import bits, f64

import lora_engine as le
from lora_engine.learning import consolidation
from lora_engine.learning.sona_config import STRATEGIES

IN, OUT = 12, 7


def config(**changes):
    micro = le.MicroLoRAConfig(IN, OUT, rank=2, alpha=4.0, target_modules=("q",))
    options = {"instant_lr": 0.05, "background_min_samples": 1, "background_interval_ms": 0.0}
    return le.SonaConfig(micro_lora=micro, **{**options, **changes})


def row(seed, width=IN, n=None):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((n, width) if n else width).astype(np.float32)


def taught(sona, sessions=3, samples=150, scale=0.3):
    """Every session learns toward a map of its own; the same for all with scale 0."""
    shared = np.outer(row(99, OUT), row(98)).astype(np.float64) * 0.3
    for s in range(sessions):
        own = shared + scale * np.outer(row(s, OUT), row(s + 50)) * 0.3
        for i in range(samples):
            x = row(1000 * s + i)
            y = (own @ x).astype(np.float32)
            result = sona.instant_adapt(x, le.Feedback.from_target(y), session=s)
            assert result.applied, result.note
    return shared


def served(sona, session=None, seed=7, n=5):
    return f64(sona.forward(row(seed, n=n), session=session))


def module(sona):
    return sona._modules["q"]


# ---- serving and instant adaptation -----------------------------------------


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


def test_torch_tensors():
    sona, same = le.Sona(config()), le.Sona(config())
    for i in range(4):
        x, y = row(i), row(i + 9, OUT)
        sona.instant_adapt(x, le.Feedback.from_target(y), session=1)
        same.instant_adapt(
            torch.from_numpy(x), le.Feedback.from_target(torch.from_numpy(y)), session=1
        )
    assert bits(served(sona, 1).astype("f4")) == bits(served(same, 1).astype("f4"))


# ---- the background pass ----------------------------------------------------


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_background_merges_and_forgets(strategy):
    sona = le.Sona(config(consolidation=strategy))
    shared = taught(sona, scale=0.0)
    assert sona.stats().pending_samples == 450
    held = module(sona).held_out
    x, target = held.samples()
    result = sona.background()
    assert result.applied, result.note
    assert (result.samples_used, result.sessions) == (450, 3)
    assert sona.stats().pending_samples == 0
    assert not module(sona).served.fast
    for session in (0, 1, 2, "new"):
        assert np.array_equal(served(sona, session), served(sona))
    losses = [((f64(delta) - target) ** 2).sum(1).mean() / 2
              for delta in (np.zeros_like(target), sona.forward(x))]  # fmt: skip
    assert result.quality_delta == pytest.approx(losses[0] - losses[1], rel=1e-4)
    assert result.quality_delta > 0
    want = f64(row(7, n=5)) @ shared.T
    assert np.linalg.norm(served(sona) - want) < 0.5 * np.linalg.norm(want)


def test_each_strategy_changes_the_weights_its_own_way():
    found = []
    for strategy in STRATEGIES:
        sona = le.Sona(config(consolidation=strategy, held_out=1))
        for s in range(6):
            for i in range(5 + 3 * s):
                x = row(100 * s + i)
                y = row(s + 40, OUT)
                sona.instant_adapt(x, le.Feedback.from_target(y), session=s, quality=(s + 1) / 6)
        module(sona).held_out.count = 0
        assert sona.background().applied
        found.append(served(sona))
    for i, one in enumerate(found):
        for other in found[:i]:
            assert np.linalg.norm(one - other) > 1e-3 * np.linalg.norm(other)


def test_a_worse_result_is_rejected_and_nothing_changes(monkeypatch):
    sona = le.Sona(config())
    taught(sona)
    before = [served(sona, s) for s in (0, 1, 2, "new")]
    used = len(module(sona).pool)
    worse = consolidation.Consolidated(
        np.ones((2, IN), "f4"), 99 * np.ones((OUT, 2), "f4"), 2.0, (), 0
    )
    monkeypatch.setattr(consolidation, "consolidate", lambda *a, **o: worse)
    result = sona.background()
    assert not result.applied
    assert result.quality_delta < 0
    assert "rejected: the loss on held-out samples would rise" in result.note
    for was, s in zip(before, (0, 1, 2, "new"), strict=True):
        assert np.array_equal(served(sona, s), was)
    assert len(module(sona).pool) == used
    assert sona.stats().pending_samples == 450
    assert (sona.stats().background_count, sona.stats().background_rejected) == (0, 1)
    monkeypatch.undo()
    assert sona.background().applied


@pytest.mark.parametrize("rejected", [False, True])
def test_what_is_learned_during_a_pass_is_kept(monkeypatch, rejected):
    sona = le.Sona(config())
    taught(sona)
    merge = consolidation.consolidate
    x = row(5, n=4)
    between = {}

    def during(*args, **options):
        before = served(sona, 0)
        sona.instant_adapt(x, le.Feedback.from_gradient(row(6, OUT, n=4)), session=0)
        sona.instant_adapt(x, le.Feedback.from_gradient(row(6, OUT, n=4)), session="late")
        between["step"] = served(sona, 0) - before
        between["whole"] = served(sona, 0)
        done = merge(*args, **options)
        return done._replace(B=50 * done.B + 9) if rejected else done

    monkeypatch.setattr(consolidation, "consolidate", during)
    assert sona.background().applied is not rejected
    assert np.linalg.norm(between["step"]) > 1e-3
    if rejected:
        assert np.allclose(served(sona, 0), between["whole"], atol=1e-5)
        assert len(module(sona).served.slots_of(0)) == 2
    else:
        assert np.allclose(served(sona, 0) - served(sona), between["step"], atol=1e-5)
    assert np.allclose(served(sona, "late") - served(sona), between["step"], atol=1e-5)
    assert not module(sona).served.frozen


def test_many_rejected_passes_keep_adapters_small(monkeypatch):
    sona = le.Sona(config())
    taught(sona, sessions=1, samples=50)
    merge = consolidation.consolidate

    def during(*args, **options):
        sona.instant_adapt(row(5), le.Feedback.from_gradient(row(6, OUT)), session=0)
        done = merge(*args, **options)
        return done._replace(B=50 * done.B + 9)

    monkeypatch.setattr(consolidation, "consolidate", during)
    for _ in range(9):
        assert not sona.background().applied
    m = module(sona)
    assert m.pool.ranks(m.served.fast[0].slot)[0] <= 8
    assert len(m.pool) == 2
    assert sona.stats().pending_samples == 59


def test_a_pass_that_fails_changes_nothing(monkeypatch):
    sona = le.Sona(config())
    taught(sona)
    before = served(sona, 1)

    def fails(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(consolidation, "consolidate", fails)
    with pytest.raises(KeyboardInterrupt):
        sona.background()
    assert np.array_equal(served(sona, 1), before)
    monkeypatch.undo()
    assert sona.background().samples_used == 450


def test_rollback():
    sona = le.Sona(config())
    assert not sona.rollback()
    taught(sona)
    before = [served(sona, s) for s in (0, 1, "new")]
    used = len(module(sona).pool)
    assert sona.background().applied
    assert not np.allclose(served(sona, 0), before[0])
    assert sona.rollback()
    for was, s in zip(before, (0, 1, "new"), strict=True):
        assert np.array_equal(served(sona, s), was)
    assert len(module(sona).pool) == used
    assert not sona.rollback()
    for _ in range(5):  # and what was kept for it is freed
        taught(sona, samples=3)
        sona.background()
    assert len(module(sona).pool) <= 2 * used


def test_nothing_waits():
    sona = le.Sona(config())
    result = sona.background()
    assert (result.applied, result.note, result.samples_used) == (False, "no samples wait", 0)
    assert sona.maybe_background() is None
    sona = le.Sona(config(background_min_samples=4))
    taught(sona, sessions=1, samples=3)
    assert sona.maybe_background() is None
    taught(sona, sessions=1, samples=1)
    assert sona.maybe_background().applied


def test_interval():
    sona = le.Sona(config(background_interval_ms=1e6))
    taught(sona)
    assert sona.maybe_background() is None
    sona._last_pass -= 1001
    assert sona.maybe_background().applied


def test_more_than_max_pending_learn_and_are_left_out():
    sona = le.Sona(config(max_pending_samples=10))
    taught(sona, sessions=2, samples=10)
    stats = sona.stats()
    assert stats.pending_samples == 10
    assert sum(stats.skipped.values()) == 10
    assert "left out of the merge" in next(iter(stats.skipped))
    before = served(sona, 1)
    assert before.any()
    assert sona.background().samples_used == 10
    assert np.allclose(served(sona, 1) - served(sona), before, atol=1e-5)  # still its own


def test_the_penalty_holds_what_is_consolidated():
    """A stronger penalty lets a session's adapter move the output less."""
    moved = []
    for ewc_lambda in (0.0, 0.1, 10.0):
        sona = le.Sona(config(ewc_lambda=ewc_lambda))
        taught(sona, scale=0.0)
        sona.background()
        for i in range(30):
            sona.instant_adapt(row(i), le.Feedback.from_target(row(50, OUT)), session="s")
        moved.append(np.linalg.norm(served(sona, "s") - served(sona)))
    assert moved[0] > 1.02 * moved[1] > 1.02**2 * moved[2]


def test_learning_and_serving_while_passes_run():
    sona = le.Sona(config(background_interval_ms=1.0, background_min_samples=5))
    failures, stop = [], threading.Event()

    def learn(session):
        i = 0
        while not stop.is_set():
            x = row(i % 50)
            sona.instant_adapt(x, le.Feedback.from_target(0.1 * row(i % 50, OUT)), session=session)
            i += 1

    def serve():
        x = row(1, n=3)
        while not stop.is_set():
            if not np.isfinite(sona.forward(x, session=[0, 1, 2])).all():
                raise AssertionError("not finite")

    def guarded(work, *args):
        try:
            work(*args)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=guarded, args=(learn, s)) for s in range(3)]
    threads += [threading.Thread(target=guarded, args=(serve,)) for _ in range(2)]
    with sona:
        sona.start()
        with pytest.raises(RuntimeError, match="got one that runs"):
            sona.start()
        for thread in threads:
            thread.start()
        end = time.monotonic() + 2.0
        while time.monotonic() < end and sona.stats().background_count < 20:
            time.sleep(0.01)
        stop.set()
        for thread in threads:
            thread.join()
    assert not failures, failures
    stats = sona.stats()
    assert stats.background_count + stats.background_rejected >= 5
    assert not [t for t in threading.enumerate() if t.name == "sona-background"]
    assert len(module(sona).pool) <= 2 * (1 + 2 * 3)
    waiting = sum(fast.pending for fast in module(sona).served.fast.values())
    sona.background()
    assert sona.stats().pending_samples in (0, waiting)


# ---- deep ---------------------------------------------------------------------


def samples_of(matrix, n=60, quality=0.9, seed=0):
    return [le.TrainingSample(x, (matrix @ x).astype(np.float32), quality) for x in row(seed, n=n)]


def test_deep_run_learns_over_the_threshold():
    sona = le.Sona(config(deep_lr=0.05, deep_epochs=30, deep_batch_size=8))
    good = np.outer(row(1, OUT), row(2)) * 0.2
    samples = samples_of(good) + samples_of(-5 * good, n=30, quality=0.2, seed=3)
    result = sona.deep_optimize(samples)
    assert result.applied, result.note
    assert (result.samples_used, result.held_out) == (48, 12)
    assert result.quality_delta > 0
    x = row(9, n=50)
    want = f64(x) @ good.T
    assert np.linalg.norm(f64(sona.forward(x)) - want) < 0.5 * np.linalg.norm(want)
    assert sona.rollback()
    assert not served(sona).any()


def test_deep_run_that_is_worse_is_rejected():
    sona = le.Sona(config(deep_lr=1e3, max_grad_norm=1e6, deep_epochs=2))
    result = sona.deep_optimize(samples_of(np.ones((OUT, IN))))
    assert not result.applied
    assert "rejected" in result.note
    assert not served(sona).any()
    assert len(module(sona).pool) == 1
    assert sona.stats().deep_rejected == 1


def test_deep_run_of_too_few():
    sona = le.Sona(config())
    result = sona.deep_optimize(samples_of(np.ones((OUT, IN)), n=40, quality=0.4))
    assert not result.applied
    assert result.note == "0 of 40 samples can be learned from, fewer than 5"


def test_deep_trigger_is_summed_quality_of_applied_samples():
    sona = le.Sona(config(deep_trigger_threshold=3.0))
    for i in range(6):
        assert not sona.should_trigger_deep()
        sona.instant_adapt(row(i), le.Feedback.from_target(row(i, OUT)), quality=0.5)
    assert sona.stats().accumulated_quality == pytest.approx(3.0)
    assert sona.should_trigger_deep()
    nan = np.full(IN, np.nan, np.float32)
    sona.instant_adapt(nan, le.Feedback.from_gradient(row(1, OUT)), quality=1.0)
    assert sona.stats().accumulated_quality == pytest.approx(3.0)
    sona.deep_optimize(samples_of(np.ones((OUT, IN))))
    assert not sona.should_trigger_deep()


# ---- statistics, files, refusals ------------------------------------------------


def test_statistics_and_logs(caplog):
    sona = le.Sona(config())
    with caplog.at_level(logging.DEBUG, logger="lora_engine.learning"):
        taught(sona, sessions=2, samples=5)
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
    before, stats = served(sona, 0), sona.stats()
    x, g = row(0), le.Feedback.from_gradient(row(0, OUT))
    for call, kind, text in (
        (lambda: sona.instant_adapt(x, g, session=0, quality=1.5), ValueError, "quality: expected"),
        (lambda: sona.instant_adapt(x, g, session=0, quality="a"), TypeError, "quality: expected"),
        (lambda: sona.instant_adapt(x, "good", session=0), TypeError, "expected a Feedback"),
        (lambda: sona.instant_adapt(row(0, 5), g, session=0), ValueError, "x: expected"),
        (lambda: sona.instant_adapt(x, g, module="v"), ValueError, "module: expected one of q"),
        (lambda: sona.forward(row(0, n=2), session=[1]), ValueError, "expected one for each"),
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
    assert sona.stats() == stats


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
    with pytest.raises(ValueError, match=r"SonaConfig.preset: name: expected one of low_latency"):
        le.SonaConfig.preset("fast")
