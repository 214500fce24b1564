"""The background pass of Sona: what it merges, keeps, rejects and brings back."""

from __future__ import annotations

import logging
import threading
import time

import numpy as np
import pytest
from helpers import f64
from helpers_sona import IN, OUT, config, module, row, served, taught

import lora_engine as le
from lora_engine.learning import background, consolidation
from lora_engine.learning.consolidation import STRATEGIES


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


@pytest.mark.parametrize("where", [(consolidation, "consolidate"), (background, "_gain")])
def test_a_pass_that_fails_changes_nothing(where, monkeypatch):
    sona = le.Sona(config())
    taught(sona)
    before, adapters = served(sona, 1), len(module(sona).pool)

    def fails(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(*where, fails)
    with pytest.raises(KeyboardInterrupt):
        sona.background()
    assert np.array_equal(served(sona, 1), before)
    assert len(module(sona).pool) == adapters
    monkeypatch.undo()
    assert sona.background().samples_used == 450


def test_a_loss_that_is_no_number_is_rejected():
    sona = le.Sona(config())
    taught(sona)
    module(sona).held_out.target[0] = np.nan
    before = served(sona, 0)
    result = sona.background()
    assert (result.applied, result.samples_used) == (False, 450)
    assert result.note == "rejected: the loss on held-out samples is not a number"
    assert np.array_equal(served(sona, 0), before)


def test_a_pass_that_keeps_failing_is_counted_and_logged_once(monkeypatch, caplog):
    sona = le.Sona(config())
    taught(sona)

    def fails(*_, **__):
        raise ValueError("bad")

    def wait(done):
        end = time.monotonic() + 10
        while not done(sona.stats()) and time.monotonic() < end:
            time.sleep(0.002)
        assert done(sona.stats())

    monkeypatch.setattr(consolidation, "consolidate", fails)
    with sona, caplog.at_level(logging.ERROR, logger="lora_engine"):
        sona.start()
        wait(lambda stats: stats.background_failed >= 3)
        assert len(caplog.records) == 1
        monkeypatch.undo()
        wait(lambda stats: stats.background_count)
    assert sona.stats().pending_samples == 0


def test_an_interval_of_0_leaves_the_core_alone():
    calls = []
    repeater = background.Repeater(lambda: calls.append(0), 0.0)
    repeater.start()
    time.sleep(0.1)
    repeater.stop()
    assert 1 <= len(calls) <= 100


def test_rollback():
    sona = le.Sona(config())
    assert not sona.rollback()
    taught(sona)
    before = [served(sona, s) for s in (0, 1, "new")]
    used = len(module(sona).pool)
    assert sona.background().applied
    assert not np.allclose(served(sona, 0), before[0])
    assert sona.rollback()
    assert sona.stats().pending_samples == 450
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
    assert (sona.stats().background_count, sona.stats().background_rejected) == (0, 0)
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


def test_rows_of_a_batch_count_for_max_pending():
    sona = le.Sona(config(max_pending_samples=10))
    for n, waiting in ((8, 8), (500, 8), (2, 10)):
        feedback = le.Feedback.from_gradient(row(1, OUT, n=n))
        assert sona.instant_adapt(row(0, n=n), feedback, session="s").applied
        assert sona.stats().pending_samples == waiting
    assert list(sona.stats().skipped.values()) == [500]


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
