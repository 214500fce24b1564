"""Many users of one pool with two tasks each: what each forgets, and that they stay apart."""

from __future__ import annotations

import numpy as np
import pytest
from helpers_evidence import FULL, quiet

from lora_engine.evidence import adapters, many_users

PROFILE = many_users.FULL if FULL else many_users.QUICK


@pytest.fixture(scope="module")
def result():
    with quiet() as progress:
        return many_users.run(progress, PROFILE)


def test_forgetting_is_halved_over_the_users(result):
    assert many_users.check(result) == []


def test_most_users_forget_less(result):
    less = result.ewc.forgetting < result.none.forgetting
    more = result.ewc.forgetting > result.none.forgetting
    assert less.shape == (PROFILE.users,)
    assert less.sum() > 3 * more.sum()


def test_the_first_task_is_learned_alike(result):
    """Before there is a record there is no penalty."""
    np.testing.assert_array_equal(result.ewc.accuracy[:, 0], result.none.accuracy[:, 0])


def test_every_round_is_timed(result):
    for run in (result.none, result.ewc):
        assert run.seconds.shape == (2 * PROFILE.rounds, 3)
        assert (run.seconds[:, :2] > 0).all()


def test_lambda_is_the_best_of_its_validation(result):
    assert result.validation[result.ewc_lambda] == max(result.validation.values())
    assert result.ewc_lambda == adapters.EWC_LAMBDA


def test_what_falls_short_is_said(result):
    (said,) = many_users.check(result._replace(ewc=result.none))
    assert said.startswith("half of the forgetting")


def test_each_user_sees_its_own_view():
    crowd = many_users._Crowd(3, 0, validating=True)
    images = np.random.default_rng(0).random((3, 2, 64), np.float32)
    for task in range(2):
        rows = crowd.seen(images, task).reshape(3, 2, 64)
        for user, i in np.ndindex(3, 2):
            want = images[user, i][crowd.views[user, task]]
            np.testing.assert_array_equal(rows[user, i], want)
    assert len(np.unique(crowd.views.reshape(6, 64), axis=0)) == 6


def test_accuracy_is_of_each_users_own_adapter():
    """The whole batch against one user at a time, in NumPy."""
    crowd = many_users._Crowd(3, 0, validating=True)
    rng = np.random.default_rng(1)
    for slot in range(3):
        A, B, s = crowd.pool.get(slot)
        crowd.pool.set(slot, A, 0.5 * rng.standard_normal(B.shape).astype("f4"), s)
    test = crowd.test._replace(images=crowd.test.images[:40], labels=crowd.test.labels[:40])
    got = crowd.accuracy(1, test)
    for user in range(3):
        A, B, s = crowd.pool.get(user)
        x = test.images[:, crowd.views[user, 1]]
        y = crowd.logits(crowd.first_layer(x) + s * (x @ A.T) @ B.T)
        assert got[user] == pytest.approx(float((y.argmax(axis=1) == test.labels).mean()))
