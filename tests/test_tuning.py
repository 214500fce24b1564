"""The search behind ``lora-engine tune``: timers are made up, so no GPU and no quiet machine."""

from __future__ import annotations

import json

import numpy as np
import pytest
from helpers_tuning import DEVICE, VERSIONS, Made, job, record, run

from lora_engine.kernels import tuned
from lora_engine.tuning import search


@pytest.mark.parametrize(
    ("times", "warps"),
    [
        ({4: 1e-6, 8: 2e-6, 2: 3e-6}, 4),
        ({4: 2e-6, 8: 1e-6, 2: 3e-6}, 8),
        ({4: 1.01e-6, 8: 1e-6}, 4),  # noise
        ({4: "error 3, allowed 1", 8: 2e-6, 2: 1e-6}, 2),
    ],
)
def test_the_quickest_that_is_right_is_chosen(tmp_path, times, warps):
    (found,) = run(tmp_path, job(Made(times)))
    assert found.choice == {"warps": warps}
    content = json.loads((tmp_path / "t.json").read_text())
    assert content["choices"] == {"k": {"warps": warps}}
    assert (content["device"], content["versions"]) == (DEVICE, VERSIONS)
    assert tuned.read(tmp_path / "t.json") == content


def test_what_is_wrong_is_dropped_and_told(tmp_path):
    times = {4: 2e-6, 8: "error 3, allowed 1", 2: ValueError("no\nsuch code"), 1: 3e-6}
    (found,) = run(tmp_path, job(Made(times)))
    assert found.choice == {"warps": 4}
    assert found.wrong == {"warps=8": "error 3, allowed 1", "warps=2": "ValueError: such code"}
    (found,) = run(tmp_path, job(Made({4: "a", 8: "b"}), "other", "other"))
    assert found == search.Outcome("other", *[None] * 4, {"warps=4": "a", "warps=8": "b"})
    assert "other" not in json.loads((tmp_path / "t.json").read_text())["choices"]


class Noisy(Made):
    """A machine that others use: now and then, for some measurements on end, it is slower."""

    def __init__(self, times: dict[int, float], draw: int, spread: float) -> None:
        super().__init__(times)
        self.rng, self.spread, self.slower = np.random.default_rng(draw), spread, 1.0

    def seconds(self, choice: dict[str, int]) -> float:
        if not self.timed or self.rng.random() < 0.1:
            self.slower = 1 + self.rng.uniform(0, 3 * self.spread)
        noise = np.exp(abs(self.rng.normal(0, self.spread)))
        return super().seconds(choice) * self.slower * float(noise)


@pytest.mark.parametrize("draw", range(8))
def test_noise_is_not_kept_and_what_is_faster_is(tmp_path, draw):
    alike = dict.fromkeys(range(12), 1e-6)
    same, faster = Noisy(alike, draw, 0.3), Noisy(alike | {9: 0.7e-6}, draw, 0.05)
    (found, other) = run(tmp_path, job(same, "alike", "1"), job(faster, "faster", "2"))
    assert (found.choice, found.ratio, found.best_us) == ({"warps": 0}, None, found.heuristic_us)
    assert other.choice == {"warps": 9}
    assert search.MARGIN < other.ratio < 1.5


def test_a_comparison_takes_turns_and_is_made_once(tmp_path):
    trial = Made({4: 2e-6, 8: 1e-6})
    (found,) = run(tmp_path, job(trial))
    assert trial.timed[2:6] == [4, 8, 8, 4]
    assert len(trial.timed) == 2 + 2 * search.PAIRS
    assert found.ratio == 2
    again = Made({4: 1e-6, 8: 1e-6})
    assert run(tmp_path, job(again)) == [found]
    assert (again.tried, again.timed) == ([], [])


@pytest.mark.parametrize("stop", [KeyboardInterrupt(), search.DeviceLost("it fell off")])
def test_a_comparison_that_is_stopped_is_made_again(tmp_path, stop):
    trial, seconds = Made({4: 2e-6, 8: 1e-6, 2: 1.5e-6}), Made.seconds

    def stops(choice: dict[str, int]) -> float:
        if len(trial.timed) == 9:
            raise stop
        return seconds(trial, choice)

    trial.seconds = stops
    with pytest.raises(type(stop)):
        run(tmp_path, job(trial))
    assert json.loads((tmp_path / "t.json").read_text())["choices"] == {}
    (found,) = run(tmp_path, job(Made(trial.times)))
    lost = isinstance(stop, search.DeviceLost)  # what brought the device down is not tried again
    assert found.choice == {"warps": 2 if lost else 8}


def test_one_that_fails_when_it_is_compared_is_dropped(tmp_path):
    trial = Made({4: 2e-6, 8: 1e-6, 2: 1.5e-6})

    def fails(choice: dict[str, int]) -> float:
        if len(trial.timed) > 3 and choice["warps"] == 8:
            raise RuntimeError("no more")
        return Made.seconds(trial, choice)

    trial.seconds = fails
    (found,) = run(tmp_path, job(trial))
    assert (found.choice, found.wrong) == ({"warps": 2}, {"warps=8": "RuntimeError: no more"})


def test_a_case_without_memory_is_told_and_passed_over(tmp_path):
    def make() -> Made:
        raise MemoryError("of 8 GiB\nnot one is left")

    trial = Made({4: 2e-6, 8: 1e-6})
    lacks = job(trial, "lacks", "1")._replace(make=make)
    found, other = run(tmp_path, lacks, job(trial, "other", "2"))
    why = {"data": "MemoryError: not one is left"}
    assert found == search.Outcome("lacks", *[None] * 4, why)
    assert other.choice == {"warps": 8}
    assert list(json.loads((tmp_path / "t.json").read_text())["choices"]) == ["other"]
    (found,) = run(tmp_path, job(trial, "lacks", "1"))  # with the memory, it is measured
    assert found.choice == {"warps": 8}


def test_what_was_measured_is_not_measured_again(tmp_path):
    first, again = Made({4: 2e-6, 8: 1e-6}), Made({4: 1e-6, 8: 1e-6, 2: 1e-7})
    run(tmp_path, job(first))
    (found,) = run(tmp_path, job(again))
    assert (first.tried, again.tried) == ([4, 8], [2])
    assert (found.heuristic_us, found.choice) == (2.0, {"warps": 2})
    other = Made({4: 1e-6})
    run(tmp_path, job(other, "k", "another case"))
    assert other.tried == [4]


def test_a_stop_keeps_what_was_measured(tmp_path):
    for stop in (KeyboardInterrupt(), search.DeviceLost("it fell off")):
        with pytest.raises(type(stop)):
            run(tmp_path, job(Made({4: 2e-6, 8: stop, 2: 1e-6})))
    assert "k" not in json.loads((tmp_path / "t.json").read_text())["choices"]
    after = Made({4: 2e-6, 8: 0, 2: 1e-6})
    (found,) = run(tmp_path, job(after))
    assert after.tried == [2]  # a candidate that brought the device down is not tried again
    assert found.wrong == {"warps=8": "it fell off"}


BEGUN_ANEW = {
    "device": {"device": {"name": "two"}},
    "versions": {"versions": {"lora_engine": "2"}},
}


@pytest.mark.parametrize("why", BEGUN_ANEW)
def test_a_file_of_others_is_begun_anew(tmp_path, why):
    run(tmp_path, job(Made({4: 1e-6})))
    held = record(tmp_path, **BEGUN_ANEW[why])
    assert f"it was made with {why}" in held.refused
    assert held.measured("c") == {}


@pytest.mark.parametrize(
    "text",
    [
        "{", "[]", '{"format": 1}',
        '{"format": 1, "device": {"name": "one"}, "versions": {"lora_engine": "1"},'
        ' "choices": {}, "measured": {"c": {"warps=4": 3}}}',
        '{"format": 1, "device": {"name": "one"}, "versions": {"lora_engine": "1"},'
        ' "choices": {}, "measured": {"c": {"warps=4": {"us": 1.0, "ratio": "2"}}}}',
    ],
)  # fmt: skip
def test_a_damaged_file_is_begun_anew(tmp_path, text):
    (tmp_path / "t.json").write_text(text)
    held = record(tmp_path)
    assert held.refused
    (found,) = run(tmp_path, job(Made({4: 1e-6})))
    assert found.choice == {"warps": 4}
