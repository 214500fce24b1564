"""The demo as users run it, on few rounds, and that its numbers are fair."""

from __future__ import annotations

import contextlib
import io
import itertools
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

pytest.importorskip("sklearn")
pytest.importorskip("rich")
pytest.importorskip("matplotlib")

import lora_engine as le
from lora_engine import cli, demo, demo_data

ROUNDS = 60


class Finished(NamedTuple):
    """One run of the command: what it measured, wrote, returned and printed."""

    outcome: demo.Outcome
    fresh: list[int]  # right answers that the fresh process reported
    folder: Path
    status: int
    printed: str


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo") / "new" / "out"
    outcomes, fresh, printed = [], [], io.StringIO()
    report, verify = demo.report, demo.verify_in_fresh_process

    def spied_report(outcome, *rest):
        outcomes.append(outcome)
        report(outcome, *rest)

    def spied_verify(out):
        fresh.extend(verify(out))
        return fresh

    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setattr(demo, "CHECKPOINTS", 3)
        patch.setattr(demo, "report", spied_report)
        patch.setattr(demo, "verify_in_fresh_process", spied_verify)
        status = cli.main(["demo", "--rounds", str(ROUNDS), "--out", str(folder)])
    return Finished(outcomes[0], fresh, folder, status, printed.getvalue())


def test_adapters_beat_the_frozen_base(finished):
    outcome = finished.outcome
    for kind in ("shifted", "rotated", "inverted", "scrambled"):
        assert outcome.accuracy(-1, kind) > outcome.accuracy(0, kind) + 0.15, kind
    assert outcome.accuracy(-1, "inverted") > 0.35
    assert len(outcome.rounds) == ROUNDS


def test_clean_users_are_not_harmed(finished):
    outcome = finished.outcome
    assert outcome.accuracy(0, "clean") > 0.95
    assert outcome.accuracy(-1, "clean") > outcome.accuracy(0, "clean") - 0.02


def test_a_fresh_adapter_changes_nothing(finished):
    outcome = finished.outcome
    assert outcome.checkpoints[0] == 0
    np.testing.assert_array_equal(outcome.right[0], outcome.right[1])


def test_fresh_process_gets_the_same_accuracy(finished):
    served = finished.outcome.right[-1]
    assert finished.fresh == served.tolist()
    assert finished.status == 0
    assert f"{served.sum()} of 32000 right, here {served.sum()}: the same" in finished.printed


def test_other_adapters_are_noticed(finished, tmp_path, monkeypatch, capsys):
    outcome = finished.outcome
    monkeypatch.setattr(demo, "run_rounds", lambda *_: outcome)
    monkeypatch.setattr(demo, "draw", lambda *_: None)
    monkeypatch.setattr(demo, "verify_in_fresh_process", lambda _: [0] * demo.USERS)
    assert demo.run(ROUNDS, tmp_path) == 1
    assert "NOT THE SAME" in capsys.readouterr().out


def test_a_broken_folder_is_a_failure(tmp_path, capsys):
    assert demo.verify_in_fresh_process(tmp_path) == []
    assert "adapter_config.json" in capsys.readouterr().err


def test_files(finished):
    outcome, folder = finished.outcome, finished.folder
    assert sorted(os.listdir(folder)) == ["accuracy.png", "adapters"]
    assert (folder / "accuracy.png").read_bytes().startswith(b"\x89PNG")
    users = sorted(os.listdir(folder / "adapters"))
    assert users == [f"user_{user:02d}" for user in range(demo.USERS)]
    for slot in (0, demo.USERS - 1):
        A, B, scaling = outcome.pool.get(slot)
        lora = le.MicroLoRA.load(folder / "adapters" / users[slot])
        loaded_A, loaded_B, loaded_scaling = lora.weights("classifier")
        np.testing.assert_array_equal(loaded_A, A)
        np.testing.assert_array_equal(loaded_B, B)
        assert loaded_scaling == scaling


def test_output_without_a_terminal_is_plain(finished):
    assert "\x1b" not in finished.printed
    tables = [line for line in finished.printed.splitlines() if "│" in line]
    assert tables
    assert max(map(len, tables)) <= 80
    for word in (*demo_data.KINDS, "round p99", "bytes per user", "learning rate"):
        assert word in finished.printed


def test_learning_rate_is_chosen_on_other_users(finished):
    outcome = finished.outcome
    assert outcome.learning_rate == max(outcome.tuning, key=outcome.tuning.get)
    reported, tuning = demo_data.reported_users(), demo_data.tuning_users()
    pairs = itertools.product(range(len(reported.kinds)), range(len(tuning.kinds)))
    for one, other in pairs:
        if (reported.kinds[one], tuning.kinds[other]) != ("clean", "clean"):
            gap = np.abs(reported.matrices[one] - tuning.matrices[other]).max()
            assert gap > 1e-4, (one, other)


def test_parts_of_the_data_are_disjoint_and_users_differ():
    world, users = demo_data.World(), demo_data.reported_users()
    parts = (world.stream, world.tuning, world.held_out)
    sizes = [len(part.labels) for part in parts]
    assert sum(sizes) + 500 == 1797
    images = np.concatenate([part.images for part in parts])
    assert len(np.unique(images, axis=0)) == sum(sizes)
    differing = np.unique(users.matrices, axis=0)
    assert len(differing) == 1 + sum(kind != "clean" for kind in users.kinds)


def test_views_of_one_user_and_of_all_agree():
    world, users = demo_data.World(), demo_data.reported_users()
    images = world.held_out.images[: len(users.kinds)]
    each = [users.view(i, images[i : i + 1])[0] for i in range(len(images))]
    np.testing.assert_allclose(users.views(images), each, atol=1e-5)


def test_gradient_is_that_of_the_loss():
    rng = np.random.default_rng(0)
    logits, labels = rng.standard_normal((3, 10)), np.array([1, 0, 9])

    def loss(y):
        return (np.log(np.exp(y).sum(axis=1)) - y[np.arange(3), labels]).sum()

    got = demo_data.loss_gradient(logits, labels)
    for i, j in np.ndindex(3, 10):
        step = np.zeros((3, 10))
        step[i, j] = 1e-5
        slope = (loss(logits + step) - loss(logits - step)) / 2e-5
        assert got[i, j] == pytest.approx(slope, abs=1e-8)


def test_ctrl_c_while_saving_leaves_whole_folders(tmp_path, monkeypatch):
    from lora_engine import atomic

    written = itertools.count()
    write = atomic.write_file

    def interrupted(path, data):
        if next(written) == 10:
            raise KeyboardInterrupt
        write(path, data)

    monkeypatch.setattr(atomic, "write_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        demo.save_adapters(demo.new_pool(8), tmp_path)
    left = sorted(os.listdir(tmp_path / "adapters"))
    assert left == [f"user_{user:02d}" for user in range(len(left))]
    assert 0 < len(left) < 8
    for name in left:
        le.MicroLoRA.load(tmp_path / "adapters" / name)


def test_bad_arguments(tmp_path, capsys):
    assert demo.run(0, tmp_path) == 2
    (tmp_path / "file").write_text("")
    assert demo.run(1, Path(tmp_path / "file")) == 2
    assert "expected at least 1, got 0" in capsys.readouterr().err
