"""``lora-engine tune`` as a command: what it says, where it stops, and how it goes on."""

from __future__ import annotations

import json
import os
import pwd
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers_files import run_python
from helpers_triton import interpreted

import lora_engine as le
from lora_engine import _C, cli
from lora_engine.backends import cpu_tuned
from lora_engine.kernels import tuned
from lora_engine.tuning import command, cpu, search

ROOT = Path(__file__).parents[1]
TUNES = """
import os, sys, time
from rich.console import Console
from lora_engine.tuning import command, search

class Slow:
    def problem(self, choice):
        print("tries", choice["warps"], flush=True)
        return ""

    def seconds(self, choice):
        if choice["warps"] == int(sys.argv[1]):
            time.sleep(60)
        return 1e-6 / choice["warps"]

jobs = [search.Job("k", "c", tuple({"warps": w} for w in (1, 2, 4, 8)), Slow)]
sys.exit(command.tune(jobs, {"name": "one"}, {"v": "1"}, Console(stderr=True)))
"""


def tuning(folder: Path, hangs_at: int) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", TUNES, str(hangs_at)],
        env={**os.environ, "LORA_ENGINE_TUNED": str(folder)},
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
    assert {p.name for p in tmp_path.iterdir()} == {"one.json", ".one.json.lock"}
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


def test_two_tunes_of_one_file_are_refused(tmp_path):
    first = tuning(tmp_path, hangs_at=2)
    for want in ("tries 1\n", "tries 2\n"):
        assert first.stdout.readline() == want
    second = tuning(tmp_path, hangs_at=0)
    out, err = second.communicate(timeout=60)
    assert (second.returncode, out) == (2, "")
    assert err == f"tune: {tmp_path / 'one.json'}: another tune is running on this file\n"
    first.kill()
    first.communicate(timeout=60)
    assert list(json.loads((tmp_path / "one.json").read_text())["measured"]["c"]) == ["warps=1"]


@pytest.mark.parametrize("place", ["file", "file/below", "/proc/none"])
def test_a_folder_that_cannot_be_written_is_told_first(tmp_path, place):
    (tmp_path / "file").write_text("")
    ran = tuning(tmp_path / place, hangs_at=0)
    out, err = ran.communicate(timeout=60)
    assert (ran.returncode, out) == (2, ""), err
    assert err.startswith(f"tune: {tmp_path / place / 'one.json'}: cannot be written: ")
    assert err.count("\n") == 1


def test_a_disk_that_is_full_is_told(tmp_path, monkeypatch, capsys):
    from rich.console import Console

    class Fills:
        def problem(self, choice: dict[str, int]) -> str:
            monkeypatch.setattr(search.atomic, "replace_file", full)
            return ""

        def seconds(self, choice: dict[str, int]) -> float:
            return 1e-6

    def full(*given: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setenv("LORA_ENGINE_TUNED", str(tmp_path))
    jobs = [search.Job("k", "c", ({"warps": 1},), Fills)]
    assert command.tune(jobs, {"name": "one"}, {"v": "1"}, Console()) == 2
    assert "cannot be written: [Errno 28] No space left" in capsys.readouterr().err


def test_a_user_without_a_home_must_name_a_folder(monkeypatch, capsys):
    for name in ("LORA_ENGINE_TUNED", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", {}.__getitem__)
    assert cli.main(["tune", "--shape", "8,8"]) == 2
    assert "name a folder in LORA_ENGINE_TUNED" in capsys.readouterr().err


@pytest.fixture
def quick(monkeypatch, tmp_path):
    """The command with made-up times of the CPU, into a folder of its own; more is quicker."""
    monkeypatch.setenv("LORA_ENGINE_TUNED", str(tmp_path))
    now: list[int] = []
    monkeypatch.setattr(_C, "set_tuning", lambda *given: now.__setitem__(slice(None), given))
    monkeypatch.setattr(
        cpu, "job", lambda *given, job=cpu.job: job(*given, timer=lambda _: 1 / (now[0] * now[1]))
    )
    return tmp_path


def test_without_a_gpu_the_cpu_is_tuned_and_it_is_said(quick, monkeypatch, capsys):
    monkeypatch.setattr(command, "_no_gpu", lambda: "No GPU tuned: none.")
    assert cli.main(["tune", "--shape", "33,40", "--rank", "2"]) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[-1] == "No GPU tuned: none."
    (path,) = quick.glob("*.json")
    assert path.name == tuned.file_name(cpu_tuned.identity())
    content = json.loads(path.read_text())
    assert content["device"] == {
        "kind": "cpu", "name": cpu_tuned.identity()["name"], "isa": _C.isa(),
        "cores": len(os.sched_getaffinity(0)),
    }  # fmt: skip
    core = tuned.digest([Path(_C.__file__)])
    assert content["versions"] == {"lora_engine": le.__version__, "core": core}
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


def test_a_checkout_that_is_not_built_says_what_to_do(tmp_path):
    """As where lora_engine is installed, and the folder one is in holds its sources alone."""
    shutil.copytree(ROOT / "bench", tmp_path / "bench", ignore=lambda *_: {"results"})
    (tmp_path / "lora_engine").mkdir()
    (tmp_path / "lora_engine" / "__init__.py").write_text("from lora_engine import _C\n")
    command = [sys.executable, "-S", "-m", "bench.tune", "--shape", "8,8"]  # -S: none installed
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    ran = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert (ran.returncode, ran.stdout) == (1, "")
    assert "Traceback" not in ran.stderr
    assert "pip install -e '.[bench]'" in ran.stderr
