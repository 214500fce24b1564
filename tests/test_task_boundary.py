"""Task boundaries found in a stream: the false alarms that were allowed, and the delay."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import lora_engine as le

WINDOW, RATE = 100, 2e-3
STREAMS = {
    "normal": lambda rng, n: rng.standard_normal(n),
    "cauchy": lambda rng, n: rng.standard_cauchy(n),
    "exponential": lambda rng, n: rng.exponential(size=n),
    "bernoulli": lambda rng, n: (rng.random(n) < 0.2).astype(float),
    "constant": lambda rng, n: np.zeros(n),
}


@pytest.mark.parametrize("kind", STREAMS)
def test_false_alarms_stay_within_the_rate(kind):
    """60 are allowed in 30,000 samples; that many would come at most, and some do come."""
    losses = STREAMS[kind](np.random.default_rng(0), 30_000)
    alarms = le.TaskBoundary(WINDOW, RATE).update(losses)
    assert 5 <= len(alarms) <= RATE * len(losses)


def test_a_looser_rate_alarms_more():
    losses = np.random.default_rng(1).standard_normal(20_000)
    counts = [len(le.TaskBoundary(WINDOW, rate).update(losses)) for rate in (1e-4, 1e-2)]
    assert counts[0] <= 2 < 50 < counts[1] <= 200


def delay(shift, before, seed, draw=STREAMS["normal"]):
    """Samples of the new task until the alarm; None for one before it, or none in 300."""
    losses = draw(np.random.default_rng(seed), before + 300)
    losses[before:] += shift
    alarms = le.TaskBoundary().update(losses)
    return alarms[0] - before + 1 if alarms and alarms[0] >= before else None


@pytest.mark.parametrize("before", [200, 399, 400, 1000])
def test_a_shift_of_one_deviation_is_noticed_in_some_20_samples(before):
    """Wherever in its windows the comparison is."""
    found = [delay(1.0, before, seed) for seed in range(25)]
    noticed = sorted(d for d in found if d is not None)
    assert len(noticed) >= 22  # the others alarmed too early: 2.5% to 10% are allowed to
    assert noticed[len(noticed) // 2] <= 25
    assert noticed[int(len(noticed) * 0.85)] <= 50


def test_a_shift_of_heavy_tails_is_noticed():
    found = [delay(3.0, 500, seed, STREAMS["cauchy"]) for seed in range(20)]
    assert sum(d is not None and d <= 60 for d in found) >= 17


def test_losses_that_fall_are_no_new_task():
    """Learning lowers them; and what was learned is compared with what came lately."""
    rng = np.random.default_rng(2)
    losses = np.linspace(4.0, 0.0, 3000) + rng.standard_normal(3000)
    boundary = le.TaskBoundary()
    assert boundary.update(losses) == []
    assert boundary.update(rng.standard_normal(100) + 1.5)


def test_it_begins_anew_after_an_alarm():
    rng = np.random.default_rng(3)
    boundary = le.TaskBoundary()
    levels = (0.0, 2.0, 4.0, 6.0)
    losses = np.concatenate([level + rng.standard_normal(600) for level in levels])
    alarms = boundary.update(losses)
    assert len(alarms) <= 4  # a false one among them
    for start in (600, 1200, 1800):
        assert any(start <= a < start + 30 for a in alarms)


def test_one_by_one_is_at_once():
    rng = np.random.default_rng(4)
    losses = np.concatenate([rng.standard_normal(400), rng.standard_normal(100) + 2]).astype("f4")
    together = le.TaskBoundary().update(losses)
    assert together
    single = le.TaskBoundary()
    assert [i for i, loss in enumerate(losses) if single.update(loss)] == together
    assert le.TaskBoundary().update(torch.from_numpy(losses)) == together


def test_the_state_goes_on_to_the_same_alarms():
    rng = np.random.default_rng(5)
    losses = np.concatenate([rng.standard_normal(730), rng.standard_normal(100) + 1])
    boundary, other = le.TaskBoundary(WINDOW), le.TaskBoundary(WINDOW)
    boundary.update(losses[:720])
    other.update(losses[:33])
    other.load_state(boundary.state())
    alarms = boundary.update(losses[720:])
    assert alarms
    assert other.update(losses[720:]) == alarms
    for key, value in boundary.state().items():
        assert value.tobytes() == other.state()[key].tobytes()


def test_what_is_refused_changes_nothing():
    boundary = le.TaskBoundary(WINDOW)
    boundary.update(np.random.default_rng(6).standard_normal(130))
    good = boundary.state()

    def other(key, value):
        return lambda: boundary.load_state({**good, key: value})

    cases = [
        (ValueError, "finite", lambda: boundary.update([1.0, float("nan")])),
        (ValueError, "finite", lambda: boundary.update(float("inf"))),
        (ValueError, r"expected shape \[n\]", lambda: boundary.update(np.zeros((2, 2)))),
        (ValueError, "keys", lambda: boundary.load_state({})),
        (ValueError, "keys", other("more", np.zeros(1))),
        (ValueError, "values: expected finite", other("values", good["values"][1:])),
        (ValueError, "values: expected finite", other("values", good["values"] * np.nan)),
        (ValueError, "ages: expected finite", other("ages", good["ages"].astype("i4"))),
        (ValueError, "evidence: expected finite", other("evidence", np.zeros((2, 2)))),
        (ValueError, "window", other("values", good["values"][::-1].copy())),
        (ValueError, "window", other("ages", good["ages"] + 1000)),
        (ValueError, "window", other("drawn", np.array([-1]))),
        (ValueError, "window", other("evidence", good["evidence"] - 1e9)),
        (ValueError, "window", other("lengths", np.array([-1, 1 + len(good["values"])]))),
        (ValueError, "window: expected at least 20", lambda: le.TaskBoundary(5)),
        (ValueError, "false_alarms", lambda: le.TaskBoundary(false_alarms=0.0)),
        (ValueError, "false_alarms", lambda: le.TaskBoundary(false_alarms=float("nan"))),
    ]  # fmt: skip
    for error, message, call in cases:
        with pytest.raises(error, match=message):
            call()
    after = boundary.state()
    assert all(after[key].tobytes() == good[key].tobytes() for key in good)
