"""Tables and pictures of results made up by hand; the experiments have tests of their own."""

from __future__ import annotations

import io

import numpy as np
import pytest
from helpers_evidence import quiet  # noqa: F401  skips where what the demo needs is missing
from matplotlib.image import imread
from rich.console import Console

from lora_engine.evidence import (
    adapters,
    many_users,
    measure,
    permuted_digits,
    pictures,
    quality,
    report,
    transfer,
)


def accuracy(end, seeds=2, tasks=5):
    """All tasks learned to 0.9 and in the end at ``end``."""
    each = np.where(np.tri(tasks, dtype=bool), 0.9, np.nan)
    each[-1] = end
    return np.stack([each] * seeds)


@pytest.fixture
def evidence():
    names = (permuted_digits.NONE, permuted_digits.L2, permuted_digits.EWC, permuted_digits.JOINT)
    permuted = {n: accuracy(a) for n, a in zip(names, (0.5, 0.6, 0.75, 0.94), strict=True)}
    permuted[permuted_digits.JOINT][:, :-1] = np.nan
    outcome = adapters.Outcome(accuracy(0.7), accuracy(0.85), 30.0, {30.0: 0.9})
    held_out = np.linspace(0.5, 0.8, quality.CHECKPOINTS + 1)
    learned = quality.Result(
        np.stack([held_out[1:] - 0.05] * 2), np.stack([held_out] * 2), 3000, 1.0, 0.08, {}
    )
    lambdas = {0.0: 0.8, 1.0: 0.9, 10.0: 0.91}
    transferred = transfer.Result(1.0, {}, {"rank 8": lambdas, "batch 32": lambdas})
    users = [
        many_users.Run(np.array([[0.9, end, 0.9]] * 4), np.array([[1e-3, 2e-3, 3e-3]] * 5))
        for end in (0.7, 0.88)
    ]
    return report.Evidence(
        permuted_digits.Result(permuted, 20.0, 0.95, 0.05, {}),
        adapters.Result(dict.fromkeys(adapters.FORMS, outcome), 0.05, {}),
        learned,
        transferred,
        many_users.Result(*users, 10.0, {}),
    )


def shown(evidence, folder):
    printed = io.StringIO()
    status = report.show(evidence, folder, Console(file=printed, width=100))
    return status, printed.getvalue()


def test_every_number_is_said(evidence, tmp_path):
    status, printed = shown(evidence, tmp_path)
    assert status == 0
    assert "every margin is held" in printed
    for said in ("75.0 ± 0.0", "20, gamma 0.95", "delta form", "sigma 1",
                 "90.0", "91.0", "4 users", "2.00 / 2.00", "6.00 / 6.00"):  # fmt: skip
        assert said in printed, said
    assert sorted(file.name for file in tmp_path.iterdir()) == ["quality.png", "tasks.png"]


@pytest.mark.parametrize("part", ["permuted", "adapted", "learned", "transferred", "users"])
def test_a_missed_margin_is_a_failure(evidence, tmp_path, part):
    worse = {
        "permuted": evidence.permuted._replace(
            accuracy=dict.fromkeys(evidence.permuted.accuracy, accuracy(0.5))
        ),
        "adapted": evidence.adapted._replace(
            outcomes={
                form: outcome._replace(ewc=outcome.none)
                for form, outcome in evidence.adapted.outcomes.items()
            }
        ),
        "learned": evidence.learned._replace(held_out=evidence.learned.held_out * 0 + 0.5),
        "transferred": evidence.transferred._replace(ewc_lambda=0.0),
        "users": evidence.users._replace(ewc=evidence.users.none),
    }
    status, printed = shown(evidence._replace(**{part: worse[part]}), tmp_path)
    assert status == 1
    assert "FALLS SHORT: " in printed
    assert "every margin is held" not in printed


def test_pictures_show_what_was_measured(evidence, tmp_path):
    """Another result is another picture."""
    drawn = []
    for end in (0.85, 0.6):
        outcome = evidence.adapted.outcomes["delta"]._replace(ewc=accuracy(end))
        outcomes = {**evidence.adapted.outcomes, "delta": outcome}
        adapted = evidence.adapted._replace(outcomes=outcomes)
        pictures.draw_tasks(evidence.permuted, adapted, tmp_path / "tasks.png")
        drawn.append(imread(tmp_path / "tasks.png"))
    assert drawn[0].shape == drawn[1].shape
    assert (drawn[0] != drawn[1]).any()


def test_out_that_cannot_be_a_folder_is_refused_before_anything_runs(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(report, "measure", None)
    (tmp_path / "file").write_text("")
    assert report.run(tmp_path / "file") == 2
    assert "demo: out:" in capsys.readouterr().err


def test_joint_training_has_no_forgetting_to_say(evidence):
    lost = measure.forgetting(evidence.permuted.accuracy[permuted_digits.JOINT])
    assert np.isnan(lost).all()
