"""The search behind ``lora-engine tune``: timers are made up, so no GPU and no quiet machine."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import bits
from helpers_files import run_python
from helpers_triton import interpreted, triton_backend  # noqa: F401  a fixture

import lora_engine as le
from lora_engine import _C, cli
from lora_engine.backends import cpu_tuned
from lora_engine.errors import FormatError
from lora_engine.kernels import tuned
from lora_engine.tuning import command, cpu, search, shapes
from lora_engine.tuning.shapes import Shape

DEVICE, VERSIONS = {"name": "one"}, {"lora_engine": "1"}


class Made:
    """A trial whose times and faults are given."""

    def __init__(self, times: dict[int, Any]) -> None:
        self.times, self.tried = times, []

    def problem(self, choice: dict[str, int]) -> str:
        self.tried.append(choice["warps"])
        found = self.times[choice["warps"]]
        if isinstance(found, BaseException):
            raise found
        return found if isinstance(found, str) else ""

    def seconds(self, choice: dict[str, int]) -> float:
        return float(self.times[choice["warps"]])


def job(trial: Any, key: str = "k", case: str = "c") -> search.Job:
    return search.Job(key, case, tuple({"warps": w} for w in trial.times), lambda: trial)


def record(path: Path, device: Any = DEVICE, versions: Any = VERSIONS) -> search.Record:
    return search.Record(path / "t.json", device, versions)


def run(path: Path, *jobs: search.Job, **about: Any) -> list[search.Outcome]:
    return search.run(jobs, record(path, **about), lambda job, new: None)


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


# ---- the command --------------------------------------------------------------

TUNES = """
import os, sys, time
from rich.console import Console
from lora_engine.tuning import command, search

class Slow:
    def problem(self, choice):
        return ""

    def seconds(self, choice):
        print("tries", choice["warps"], flush=True)
        if choice["warps"] == int(sys.argv[1]):
            time.sleep(60)
        return 1e-6 / choice["warps"]

jobs = [search.Job("k", "c", tuple({"warps": w} for w in (1, 2, 4, 8)), Slow)]
sys.exit(command.tune(jobs, {"name": "one"}, {"v": "1"}, Console(stderr=True)))
"""


def tuning(folder: Path, hangs_at: int) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", TUNES, str(hangs_at)],
        env={**cpu_tuned.os.environ, "LORA_ENGINE_TUNED": str(folder)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_stopped_command_goes_on_where_it_was(tmp_path, how):
    stopped = tuning(tmp_path, hangs_at=4)
    for want in ("tries 1\n", "tries 2\n", "tries 4\n"):
        assert stopped.stdout.readline() == want
    time.sleep(0.2)  # it now waits
    stopped.send_signal(how)
    _, err = stopped.communicate(timeout=60)
    path = tmp_path / "one.json"
    assert sorted(tmp_path.iterdir()) == [path]
    assert list(json.loads(path.read_text())["measured"]["c"]) == ["warps=1", "warps=2"]
    if how == signal.SIGINT:
        assert stopped.returncode == 130
        want = f"stopped: 2 new measurements are kept in {path}; the same command goes on"
        assert want in err
        assert "Traceback" not in err
    after = tuning(tmp_path, hangs_at=0)
    out, err = after.communicate(timeout=60)
    assert (after.returncode, out) == (0, "tries 4\ntries 8\n")
    assert json.loads(path.read_text())["choices"] == {"k": {"warps": 8}}
    assert "warps=8" in err


@pytest.fixture
def quick(monkeypatch, tmp_path):
    """The command with made-up times of the CPU, into a folder of its own."""
    monkeypatch.setenv("LORA_ENGINE_TUNED", str(tmp_path))
    times = iter(range(1000, 0, -1))
    monkeypatch.setattr(
        cpu, "job", lambda *given, job=cpu.job: job(*given, timer=lambda _: next(times))
    )
    return tmp_path


def test_without_a_gpu_the_cpu_is_tuned_and_it_is_said(quick, monkeypatch, capsys):
    monkeypatch.setattr(command, "_no_gpu", lambda: "No GPU tuned: none.")
    assert cli.main(["tune", "--shape", "33,40", "--rank", "2"]) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[-1] == "No GPU tuned: none."
    (path,) = quick.iterdir()
    assert path.name == tuned.file_name(cpu_tuned.identity())
    content = json.loads(path.read_text())
    assert content["device"] == {
        "kind": "cpu", "name": cpu_tuned.identity()["name"], "isa": _C.isa(),
        "cores": len(cpu_tuned.os.sched_getaffinity(0)),
    }  # fmt: skip
    assert content["versions"] == {"lora_engine": le.__version__}
    (case,) = content["measured"]
    assert "33x40 rank 2" in case
    last = {
        "bytes_per_thread": cpu_tuned.BYTES_PER_THREAD[-1],
        "tile_rows": cpu_tuned.TILE_ROWS[-1],
    }
    assert content["choices"] == {"cpu": last}


@interpreted
def test_kernels_are_not_timed_in_the_interpreter():
    assert "TRITON_INTERPRET is set" in command._no_gpu()
    ran = run_python("-c", "from lora_engine.tuning import command; print(command._no_gpu())",
                     TRITON_INTERPRET="0")  # fmt: skip
    assert ran.stdout.startswith("No GPU tuned: backend triton: no GPU")


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--shape", "4096"], "expected in,out"),
        (["--shape", "4096,0"], "expected in,out"),
        (["--shape", "4096,-1"], "expected in,out"),
        (["--shape", "1,99999999999999999999"], "expected in,out"),
        (["--shape", "8,8", "--rank", "0"], "expected a number from 1 to 1024"),
        (["--shape", "8,8", "--rows", "1e3"], "expected a number from 1 to 65536"),
        (["--shape", "8,8", "--dtype", "int8"], "invalid choice: 'int8'"),
    ],
    ids=str,
)
def test_wrong_use_exits_2_and_says_why(args, says, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(["tune", *args])
    assert caught.value.code == 2
    assert says in capsys.readouterr().err


def test_nothing_to_tune_exits_2(capsys, tmp_path):
    for args, says in (
        ([], "expected --shape IN,OUT or --model FOLDER"),
        (["--model", str(tmp_path)], "config.json"),
    ):
        assert cli.main(["tune", *args]) == 2
        out, err = capsys.readouterr()
        assert (says in err, out) == (True, "")


# ---- config.json --------------------------------------------------------------

LLAMA = {
    "architectures": ["LlamaForCausalLM"], "hidden_size": 4096, "intermediate_size": 14336,
    "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256,
}  # fmt: skip
GPT2 = {"n_embd": 768, "n_head": 12, "n_inner": None, "vocab_size": 50257}


def config(folder: Path, content: Any) -> Path:
    data = content if isinstance(content, bytes) else json.dumps(content).encode()
    (folder / "config.json").write_bytes(data)
    return folder


def test_projections_of_a_model(tmp_path):
    want = [
        Shape(4096, 4096), Shape(4096, 1024), Shape(4096, 14336), Shape(14336, 4096),
    ]  # fmt: skip
    assert shapes.from_config(config(tmp_path, LLAMA)) == want
    assert shapes.from_config(tmp_path / "config.json") == want
    assert shapes.from_config(config(tmp_path, {"text_config": LLAMA, "vision_config": {}})) == want
    given = LLAMA | {"hidden_size": 2560, "head_dim": 128, "num_key_value_heads": None}
    assert shapes.from_config(config(tmp_path, given)) == [
        Shape(2560, 4096), Shape(4096, 2560), Shape(2560, 14336), Shape(14336, 2560),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (GPT2, "hidden_size: expected a model's size, and it is not there"),
        (LLAMA | {"intermediate_size": None}, "intermediate_size: expected a model's size"),
        (LLAMA | {"hidden_size": "4096"}, "hidden_size: expected a number from 1 to 1048576"),
        (LLAMA | {"hidden_size": True}, "hidden_size: expected a number"),
        (LLAMA | {"hidden_size": -4096}, "hidden_size: expected a number"),
        (LLAMA | {"hidden_size": 4096.0}, "hidden_size: expected a number"),
        (LLAMA | {"hidden_size": 10**30}, "hidden_size: expected a number"),
        (LLAMA | {"num_attention_heads": 0}, "num_attention_heads: expected a number"),
        (LLAMA | {"num_attention_heads": 33}, "expected a divisor of hidden_size 4096, got 33"),
        (LLAMA | {"head_dim": 1 << 20}, "head_dim: expected at most"),
        ({"text_config": GPT2}, "text_config: hidden_size"),
        (b"{", "expected JSON"),
        (b"[1]", "expected a JSON object"),
        (b"\xff", "expected JSON"),
        (b"[" * 100_000, "expected JSON"),
        (b'{"hidden_size": 1, "hidden_size": 2}', "a key is there twice"),
        (b" " * (shapes.MAX_CONFIG + 1), "expected at most"),
    ],
)
def test_a_config_that_cannot_be_used_says_why(tmp_path, content, says):
    with pytest.raises(FormatError, match=says) as caught:
        shapes.from_config(config(tmp_path, content))
    assert "config.json" in str(caught.value)
    assert len(str(caught.value)) < 500 + len(str(tmp_path))


# ---- the core -----------------------------------------------------------------


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
            "format": 1, "device": cpu_tuned.identity(), "versions": tuned.versions(),
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


# ---- the kernels, interpreted ---------------------------------------------------


@interpreted
@pytest.mark.usefixtures("triton_backend")
@pytest.mark.parametrize(("dtype", "rows"), [("float32", 1), ("bfloat16", 17)])
def test_every_candidate_is_right_and_has_the_heuristics_bits(tmp_path, dtype, rows):
    from lora_engine.tuning import gpu

    jobs = list(gpu.jobs([Shape(32, 70)], [3], [rows], [dtype], timer=lambda call, copies: 1.0))
    assert [j.key.split()[0] for j in jobs] == [
        "lora_delta", "batched_lora_delta", "nf4_linear", "nf4_linear",
    ]  # fmt: skip
    for found in run(tmp_path, *jobs):
        assert (found.wrong, found.best_us) == ({}, 1e6), found.key


@interpreted
@pytest.mark.usefixtures("triton_backend")
def test_what_was_tuned_is_what_the_ops_look_up(monkeypatch, tmp_path):
    from lora_engine.kernels import tunable
    from lora_engine.tuning import gpu

    monkeypatch.setenv("LORA_ENGINE_TUNED", str(tmp_path))
    monkeypatch.setattr(gpu.Trial, "problem", lambda self, choice: "")
    times = (2.0**-i for i in range(1000))
    jobs = list(gpu.jobs([Shape(32, 70)], [3], [2], ["float16"], timer=lambda call, c: next(times)))
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


@interpreted
@pytest.mark.usefixtures("triton_backend")
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
