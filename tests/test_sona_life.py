"""Sona over a long life: bounded by any quality, at the interpreter's exit, on other backends."""

from __future__ import annotations

import numpy as np
import pytest
from helpers_files import run_python
from helpers_sona import OUT, config, row, served

import lora_engine as le

TESTS = str(__import__("pathlib").Path(__file__).parent)


@pytest.mark.parametrize("qualities", ["constant", "random", "alternating"])
def test_ten_thousand_steps_by_quality_stay_bounded(qualities):
    """Sessions step, are merged and step again."""
    sona, rng = le.Sona(config(instant_lr=0.01)), np.random.default_rng(0)
    x, applied = row(0), 0
    for step in range(10_000):
        quality = {"constant": 1.0, "random": rng.random(), "alternating": step % 2}[qualities]
        sona.forward(x, session=step % 3, explore=0.1)
        feedback = le.Feedback.from_quality(quality)
        applied += sona.instant_adapt(x, feedback, session=step % 3).applied
        if step % 1000 == 999:
            sona.background()
    assert np.abs(served(sona, 0)).max() < 30.0
    assert applied == 0 if qualities == "constant" else applied > 9000


AT_EXIT = """
import sys
sys.path.insert(0, {tests!r})
from helpers_sona import config, taught
import lora_engine as le
sona = le.Sona(config(background_interval_ms=1.0))
sona.start()
taught(sona, sessions=3, samples=100)
print("taught")
"""


def test_a_thread_that_runs_does_not_hold_the_interpreter():
    """Without stop; a pass may be under way."""
    child = run_python("-c", AT_EXIT.format(tests=TESTS))
    assert (child.returncode, child.stdout.strip(), child.stderr) == (0, "taught", "")


ON_A_BACKEND = """
import sys
sys.path.insert(0, {tests!r})
import torch
from helpers_sona import config, row
import lora_engine as le
sona = le.Sona(config())
for i in range(6):
    x, y = (torch.from_numpy(row(seed, n)) for seed, n in ((i % 3, 12), (50, 7)))
    assert sona.instant_adapt(x, le.Feedback.from_target(y), session=i % 2).applied
    if i == 3:
        assert sona.background().applied
sona.save({folder!r})
other = le.Sona(config())
other.load({folder!r})
for session in (0, 1, "new"):
    delta = sona.forward(torch.from_numpy(row(9)), session=session)
    assert torch.equal(other.forward(torch.from_numpy(row(9)), session=session), delta)
    print(*delta.tolist())
"""


@pytest.mark.parametrize("backend", ["cpu", "reference", "triton"])
def test_backends_agree(backend, tmp_path, monkeypatch):
    """Steps, a pass, a save and a load; Triton under its interpreter."""
    monkeypatch.setenv("LORA_ENGINE_BACKEND", backend)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    child = run_python("-c", ON_A_BACKEND.format(tests=TESTS, folder=str(tmp_path / "a")))
    assert child.returncode == 0, child.stderr
    got = np.array(child.stdout.split(), float).reshape(3, OUT)
    monkeypatch.undo()
    sona = le.Sona(config())
    for i in range(6):
        x, y = row(i % 3), row(50, OUT)
        sona.instant_adapt(x, le.Feedback.from_target(y), session=i % 2)
        if i == 3:
            assert sona.background().applied
    want = np.stack([sona.forward(row(9), session=session) for session in (0, 1, "new")])
    assert want.any()
    assert np.allclose(got, want, rtol=1e-3, atol=1e-5)
