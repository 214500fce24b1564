"""Tuning the Triton kernels, interpreted: what is tried is right, and what is wrong is found."""

from __future__ import annotations

from typing import Any

import pytest
from helpers_triton import interpreted, triton_backend  # noqa: F401  a fixture
from helpers_tuning import run

from lora_engine.kernels import tuned
from lora_engine.tuning import search
from lora_engine.tuning.shapes import Shape

pytestmark = [interpreted, pytest.mark.usefixtures("triton_backend")]


@pytest.mark.parametrize(("dtype", "rows"), [("float32", 1), ("bfloat16", 17)])
def test_every_candidate_is_right_and_has_the_heuristics_bits(tmp_path, dtype, rows):
    from lora_engine.tuning import gpu

    jobs = list(gpu.jobs([Shape(32, 70)], [3], [rows], [dtype], timer=lambda call, copies: 1.0))
    assert [j.key.split()[0] for j in jobs] == [
        "lora_delta", "batched_lora_delta", "nf4_linear", "nf4_linear",
    ]  # fmt: skip
    for found in run(tmp_path, *jobs):
        assert (found.wrong, found.best_us) == ({}, 1e6), found.key


def test_what_was_tuned_is_what_the_ops_look_up(monkeypatch, tmp_path):
    from lora_engine.kernels import tunable
    from lora_engine.tuning import gpu

    monkeypatch.setenv("LORA_ENGINE_TUNED", str(tmp_path))
    monkeypatch.setattr(gpu.Trial, "problem", lambda self, choice: "")
    times: dict[Any, float] = {}

    def each_is_quicker(call: Any, copies: int) -> float:
        trial = call.__self__
        return times.setdefault((trial, trial.tunable._forced), 2.0 ** -len(times))

    jobs = list(gpu.jobs([Shape(32, 70)], [3], [2], ["float16"], timer=each_is_quicker))
    device = tunable.identity(None)
    held = search.Record(tmp_path / tuned.file_name(device), device, tunable.versions())
    search.run(jobs, held, lambda job, new: None)
    tuned.forget()
    for job in jobs:
        trial = job.make()
        op = type(trial).tunable
        op.forget()
        found = []

        def tell(*case: Any, op: Any = op, found: list[Any] = found) -> Any:
            found.append(op._looked_up(*case))
            return found[-1]

        with monkeypatch.context() as patch:
            patch.setattr(op, "_measured", tell)
            trial.call(0)
        op.forget()
        assert found
        assert all(choice._asdict() == job.candidates[-1] for choice in found)
    tuned.forget()


def test_a_kernel_that_is_wrong_or_of_other_bits_is_found(monkeypatch, tmp_path):
    from lora_engine.tuning import gpu

    call = gpu.DeltaTrial.call

    def spoil(self: Any, i: int) -> Any:
        y = call(self, i)
        forced = self.tunable._forced
        if forced is not None and forced.columns == 64:
            y[-1, 0] *= 2 if forced.rows == 16 else 1 + 2**-22
        return y

    monkeypatch.setattr(gpu.DeltaTrial, "call", spoil)
    jobs = gpu.jobs([Shape(32, 70)], [3], [2], ["float32"], timer=lambda call, copies: 1.0)
    (found,) = run(tmp_path, next(jobs))
    assert found.choice is not None
    assert found.choice["columns"] != 64
    assert len(found.wrong) == 6
    for candidate, why in found.wrong.items():
        words = "error" if "rows=16" in candidate else "other bits than the heuristic's"
        assert why.startswith(words), (candidate, why)


def test_bits_are_held_to_the_heuristics_and_not_to_a_tuned_files(monkeypatch, tmp_path):
    from lora_engine.tuning import gpu

    call = gpu.DeltaTrial.call

    def spoil(self: Any, i: int) -> Any:
        y = call(self, i)
        if self.tunable._forced is None:  # what a tuned file chose, say
            y[-1, 0] *= 1 + 2**-22
        return y

    monkeypatch.setattr(gpu.DeltaTrial, "call", spoil)
    jobs = gpu.jobs([Shape(32, 70)], [3], [2], ["float32"], timer=lambda call, copies: 1.0)
    (found,) = run(tmp_path, next(jobs))
    assert found.wrong == {}


def test_a_device_that_fails_while_data_are_made_is_lost(monkeypatch):
    from lora_engine.tuning import gpu

    def fails(self: Any, rng: Any) -> None:
        raise RuntimeError("CUDA error: an illegal memory access\nat ...")

    monkeypatch.setattr(gpu.DeltaTrial, "_prepare", fails)
    made = next(gpu.jobs([Shape(32, 70)], [3], [2], ["float32"]))
    with pytest.raises(search.DeviceLost, match="the device failed: CUDA error"):
        made.make()
