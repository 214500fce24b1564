"""The search behind ``lora-engine tune``: timers are made up, so no GPU and no quiet machine."""

from __future__ import annotations

import json

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
    assert found == search.Outcome("other", None, None, None, {"warps=4": "a", "warps=8": "b"})
    assert "other" not in json.loads((tmp_path / "t.json").read_text())["choices"]


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
    after = Made({4: 0, 8: 0, 2: 1e-6})
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
    ],
)  # fmt: skip
def test_a_damaged_file_is_begun_anew(tmp_path, text):
    (tmp_path / "t.json").write_text(text)
    held = record(tmp_path)
    assert held.refused
    (found,) = run(tmp_path, job(Made({4: 1e-6})))
    assert found.choice == {"warps": 4}
