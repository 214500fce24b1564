"""What the C++ core takes from a tuned file, and that no setting changes a bit."""

from __future__ import annotations

import json
import os
import warnings
from typing import Any

import numpy as np
import pytest
from helpers import bits
from helpers_files import run_python

import lora_engine as le
from lora_engine import _C
from lora_engine.backends import cpu_tuned
from lora_engine.kernels import tuned
from lora_engine.tuning import cpu
from lora_engine.tuning.shapes import Shape


@pytest.fixture
def untuned():
    yield
    _C.set_tuning(0, 0)
    tuned.forget()


def test_no_setting_changes_a_bit(untuned, threads):
    threads(2)
    rng = np.random.default_rng(0)
    x = rng.standard_normal((70, 300), dtype="f4")
    A, B = rng.standard_normal((9, 300), dtype="f4"), rng.standard_normal((200, 9), dtype="f4")
    pool = le.AdapterPool(300, 200)
    slots = [pool.add(A * (i + 1), B, 0.5) for i in range(3)]
    ids = np.array([slots[i // 20 % 3] for i in range(70)], "i4")
    found = set()
    for size in (0, 1, *cpu_tuned.BYTES_PER_THREAD):
        for rows in (0, 1, 3, 4096, *cpu_tuned.TILE_ROWS):
            _C.set_tuning(size, rows)
            found.add((bits(_C.lora_delta(x, A, B, 0.5, None, False)), bits(pool.forward(x, ids))))
    assert len(found) == 1


@pytest.mark.parametrize("given", [(-1, 0), (0, -1), (0, 4097), (1 << 41, 0)])
def test_settings_out_of_range_are_refused(given, untuned):
    with pytest.raises(
        ValueError, match=r"set_tuning: (bytes_per_thread|tile_rows): expected 0 to"
    ):
        _C.set_tuning(*given)


@pytest.fixture
def applied(monkeypatch, tmp_path, untuned):
    """Writes a CPU's file and applies it: what the core was set to, and the warnings."""
    monkeypatch.setenv("LORA_ENGINE_TUNED", str(tmp_path))

    def apply(**changes: Any) -> tuple[list[Any], list[str]]:
        content = {
            "format": 1, "device": cpu_tuned.identity(), "versions": cpu_tuned.versions(),
            "choices": {"cpu": {"bytes_per_thread": 49152, "tile_rows": 8}}, "measured": {},
        }  # fmt: skip
        path = tmp_path / tuned.file_name(cpu_tuned.identity())
        path.write_text(json.dumps(content | changes))
        tuned.forget()
        calls: list[Any] = []
        with warnings.catch_warnings(record=True) as caught, monkeypatch.context() as patch:
            warnings.simplefilter("always")
            patch.setattr(_C, "set_tuning", lambda *given: calls.append(given))
            cpu_tuned.apply()
            cpu_tuned.apply()
        return calls, [str(w.message) for w in caught]

    return apply


def test_a_tuned_cpu_is_set(applied):
    assert applied() == ([(49152, 8)] * 2, [])


@pytest.mark.parametrize(
    "changes",
    [
        {"device": {"kind": "cpu", "name": "another"}},
        {"versions": {"lora_engine": "0"}},
        {"versions": {"lora_engine": le.__version__}},
        {"versions": {"lora_engine": le.__version__, "core": "0" * 16}},
        {"choices": {"cpu": {"bytes_per_thread": 1, "tile_rows": 8}}},
        {"choices": {"cpu": {"bytes_per_thread": 49152}}},
        {"choices": {"cpu": {"bytes_per_thread": 49152, "tile_rows": [8]}}},
        {"format": 7},
    ],
    ids=str,
)
def test_a_refused_cpu_file_is_told_once(applied, changes):
    calls, said = applied(**changes)
    assert (calls, len(said)) == ([], 1)
    assert "not used" in said[0]


FIRST_USE = """
import warnings
warnings.simplefilter("error")
import numpy as np
import lora_engine as le
print("imported", flush=True)
warnings.simplefilter("always")
x = np.ones((1, 4), "f4")
for _ in range(3):
    le.lora_delta(x, x, np.ones((4, 1), "f4"), 1.0)
"""


def test_the_file_is_read_at_the_first_op_and_not_at_import(tmp_path):
    (tmp_path / tuned.file_name(cpu_tuned.identity())).write_text("{")
    ran = run_python("-c", FIRST_USE, LORA_ENGINE_TUNED=str(tmp_path), LORA_ENGINE_BACKEND="")
    assert (ran.returncode, ran.stdout) == (0, "imported\n"), ran.stderr
    assert ran.stderr.count("not used: it cannot be read") == 1
    assert ran.stderr.startswith("<string>:10: UserWarning: ")  # the line that called the op


def test_a_pipe_in_the_files_place_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / tuned.file_name(cpu_tuned.identity()))
    ran = run_python("-c", FIRST_USE, LORA_ENGINE_TUNED=str(tmp_path), LORA_ENGINE_BACKEND="")
    assert (ran.returncode, ran.stdout) == (0, "imported\n"), ran.stderr
    assert ran.stderr.count("expected a regular file") == 1


NO_HOME = """
import pwd
def unknown(uid):
    raise KeyError(uid)
pwd.getpwuid = unknown
"""


@pytest.mark.parametrize("tuned_in", ["", "/dev/null", "/dev/null/x", "x" * 300])
def test_without_a_folder_ops_run(tuned_in):
    ran = run_python("-c", NO_HOME + FIRST_USE, HOME="", XDG_CACHE_HOME="",
                     LORA_ENGINE_TUNED=tuned_in, LORA_ENGINE_BACKEND="")  # fmt: skip
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "imported\n", "")


@pytest.mark.parametrize(
    ("spoiled", "says"),
    [
        (lambda y: y * (1 + np.float32(2**-22)), "other bits than the heuristic's"),
        (lambda y: y * 2, "error 0."),
        (lambda y: y * np.nan, "error nan"),
    ],
    ids=["a bit", "twice", "NaN"],
)
def test_a_candidate_that_changes_the_core_s_result_is_dropped(monkeypatch, spoiled, says):
    now, call = [0, 0], cpu._Case.call

    def spoil(case: Any) -> None:
        call(case)
        if now[1] == 8 and len(case.x) == 64:
            case.y[:] = spoiled(case.y)

    monkeypatch.setattr(_C, "set_tuning", lambda *given: now.__setitem__(slice(None), given))
    monkeypatch.setattr(cpu._Case, "call", spoil)
    trial = cpu.job([Shape(33, 40)], [2]).make()
    for choice in cpu.CANDIDATES[:5]:
        found = trial.problem(choice)
        assert found.startswith(says) if choice["tile_rows"] == 8 else found == ""
