"""What the GPU suite does to be done in time and to be started at all: the core from a wheel,
ends of processes, exit codes; where there is no GPU."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

from bench import gpu, gpu_build, gpu_case, gpu_process, gpu_tests, gpu_warm, gpu_worker
from bench.case import OURS
from bench.gpu_cases import CASES
from bench.gpu_time import Budget
from lora_engine import _C

ROOT = Path(__file__).parents[1]
CORE = Path(_C.__file__)
# find_spec("pip") would have setuptools leave distutils alone, which Inductor then fails on.
PIP = list(metadata.distributions(name="pip"))


# ---- a bare checkout ----


@pytest.fixture
def checkout(tmp_path):
    """What is tracked, of what is imported: no core, no lora_engine/kernels."""
    to = tmp_path / "checkout"
    for name in ("bench", "kernels", "lora_engine"):
        ignored = shutil.ignore_patterns("*.so", "__pycache__", "results")
        shutil.copytree(ROOT / name, to / name, symlinks=True, ignore=ignored)
    link = to / "lora_engine" / "kernels"
    if link.is_symlink():
        link.unlink()
    for name in ("pyproject.toml", "CMakeLists.txt"):
        shutil.copy2(ROOT / name, to)
    return to


def wheel(folder, version="0.1.0", stub=None):
    """As pip builds one, with the core of this process."""
    folder.mkdir()
    tag = f"cp3{sys.version_info.minor}-cp3{sys.version_info.minor}-linux_x86_64"
    tag = tag.replace("x86_64", os.uname().machine)
    about = f"lora_engine-{version}.dist-info"
    with zipfile.ZipFile(folder / f"lora_engine-{version}-{tag}.whl", "w") as file:
        file.write(CORE, f"lora_engine/{CORE.name}")
        file.write(ROOT / "lora_engine" / "__init__.py", "lora_engine/__init__.py")
        text = stub or (ROOT / "lora_engine" / "_C.pyi").read_text()
        file.writestr("lora_engine/_C.pyi", text)
        head = f"Metadata-Version: 2.1\nName: lora-engine\nVersion: {version}\n"
        file.writestr(f"{about}/METADATA", head)
        file.writestr(f"{about}/WHEEL", f"Wheel-Version: 1.0\nRoot-Is-Purelib: false\nTag: {tag}\n")
        file.writestr(f"{about}/RECORD", "")
    return folder


PREPARE = """
import multiprocessing, subprocess, sys

def where(pipe):
    import lora_engine.kernels.launch
    pipe.send([lora_engine.__file__, lora_engine._C.__file__, lora_engine.kernels.launch.__file__])

if __name__ == "__main__":
    from bench import gpu_build
    from bench.gpu_time import Budget
    try:
        gpu_build.prepare(Budget(120.0))
    except gpu_build.BuildError as failed:
        raise SystemExit(f"refused: {failed}")
    pipe, theirs = multiprocessing.Pipe()
    worker = multiprocessing.get_context("spawn").Process(target=where, args=(theirs,))
    worker.start()
    print(*pipe.recv(), sep="\\n")
    worker.join()
    test = "from importlib.util import *; print(find_spec('lora_engine.kernels.launch').origin)"
    subprocess.run([sys.executable, "-c", test], cwd="/", env=gpu_build.environment(), check=True)
"""
# An editable install of this repository would be found before any checkout.
NO_EDITABLE = """
import sys
sys.meta_path[:] = [f for f in sys.meta_path if "ScikitBuild" not in type(f).__name__]
"""


def prepare(checkout, wheels):
    (checkout / "prepare.py").write_text(PREPARE)
    site = checkout / "sites"
    site.mkdir()
    (site / "sitecustomize.py").write_text(NO_EDITABLE)
    tools = checkout / "no tools"
    tools.mkdir()
    env = {
        **os.environ, "PATH": str(tools), gpu_build.WHEELS: str(wheels),
        "PYTHONPATH": f"{checkout}{os.pathsep}{site}",
    }  # fmt: skip
    return subprocess.run(
        [sys.executable, "prepare.py"], cwd=checkout, env=env, text=True, capture_output=True,
        timeout=300,
    )  # fmt: skip


@pytest.mark.skipif(not PIP, reason="needs pip")
def test_a_wheel_spares_the_build(checkout, tmp_path):
    done = prepare(checkout, wheel(tmp_path / "wheels"))
    assert done.returncode == 0, done.stdout + done.stderr
    package = checkout / "lora_engine"
    assert sorted(done.stdout.splitlines()) == sorted([  # of two processes
        str(package / "__init__.py"), str(package / CORE.name),
        *[str(package / "kernels" / "launch.py")] * 2,
    ])  # fmt: skip


@pytest.mark.skipif(not PIP, reason="needs pip")
@pytest.mark.parametrize(
    ("made", "why"),
    [
        ({"version": "0.0.9"}, "is of lora_engine 0.0.9"),
        ({"stub": "def old(): ..."}, "other calls"),
    ],
)
def test_a_wheel_that_does_not_fit_is_not_taken(checkout, tmp_path, made, why):
    done = prepare(checkout, wheel(tmp_path / "wheels", **made))
    assert done.returncode == 1
    assert "the core could not be built:\ncmake is not there" in done.stderr
    assert why in done.stderr
    assert not list((checkout / "lora_engine").glob("*.so"))


def test_a_folder_without_wheels_is_said(monkeypatch, tmp_path):
    monkeypatch.setenv(gpu_build.WHEELS, str(tmp_path))
    with pytest.raises(gpu_build.BuildError, match="no wheels are there"):
        gpu_build._install_wheels(Budget(1.0))


def test_a_build_that_takes_too_long_is_stopped(monkeypatch, tmp_path):
    slow = tmp_path / "cmake"
    slow.write_text("#!/bin/sh\nsleep 60 & wait\n")
    slow.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(gpu_build, "FOLDER", tmp_path)
    begun = time.monotonic()
    with pytest.raises(gpu_build.BuildError, match="took more than 1 s and was stopped"):
        gpu_build._build(Budget(1.0), "no wheel")
    assert time.monotonic() - begun < 30


# ---- processes ----


def test_what_a_process_started_ends_with_it(tmp_path):
    child = "import os, time; print(os.getpid(), flush=True); time.sleep(60)"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    with open(tmp_path / "log", "wb") as log:
        process = gpu_process.start([sys.executable, "-c", parent], stdout=log)
    while not (tmp_path / "log").read_text().endswith("\n"):
        time.sleep(0.05)
    gpu_process.stop(process)
    status = Path(f"/proc/{(tmp_path / 'log').read_text().strip()}/stat")
    for _ in range(100):  # until the system has noticed
        if not status.exists() or status.read_text().split()[2] == "Z":
            return
        time.sleep(0.05)
    pytest.fail("it still runs")


def test_run_gives_what_was_printed(tmp_path):
    code = "import sys; print('a\\n\\nb'); print('c', file=sys.stderr); sys.exit(3)"
    found = gpu_process.run([sys.executable, "-c", code], 60.0, tmp_path, dict(os.environ))
    assert found == (3, ["a", "b", "c"])
    assert gpu_process.run(["no such"], 1.0, tmp_path, {}) == (127, ["no such is not there"])


def test_warm_processes_do_not_outlast_the_budget(monkeypatch):
    made = []

    def start(part, parts):
        made.append(gpu_process.start([sys.executable, "-c", "import time; time.sleep(60)"]))
        return made[-1]

    monkeypatch.setattr(gpu_warm, "_start", start)
    with gpu_warm.beside(2, Budget(0.2)):
        assert len(made) == 2
    assert all(process.poll() == -9 for process in made)


def test_warm_goes_on_after_a_contender_that_fails(monkeypatch, capsys):
    def missing(data):
        raise gpu_case.Absent("bitsandbytes is not installed")

    def fails(data):
        raise ValueError("no such layer")

    called = []
    done = gpu_case.Timed([lambda: called.append(1), lambda: called.append(2)], lambda run: None)
    contenders = {OURS: fails, "a": missing, "b": lambda data: done}
    monkeypatch.setattr("torch.cuda.synchronize", lambda: None)
    gpu_warm.warm(gpu_case.Case("op", "s", (), 1, lambda sets: sets, contenders))
    assert called == [1]
    said = capsys.readouterr().err
    assert "no such layer" in said
    assert "not installed" not in said


# ---- tests that are run ----


@pytest.fixture
def suite(monkeypatch, tmp_path):
    """A folder of tests in place of this one."""
    monkeypatch.setattr(gpu_tests, "TESTS", tmp_path)
    (tmp_path / "pytest.ini").write_text("[pytest]\nfilterwarnings = error\n")
    (tmp_path / "test_triton_a.py").write_text(
        "import warnings\nwarnings.warn('old', DeprecationWarning)\n"
        "def test_x(): pass\ndef test_y(): assert 0\n"
    )
    (tmp_path / f"{gpu_tests.DISPATCH}.py").write_text(f"def {gpu_tests.REGISTERED}(): pass\n")
    return tmp_path


def test_tests_are_run_and_the_kernels_in_cpp_told(suite):
    found, why, registered = gpu_tests.run(suite / "logs", 2, Budget(100.0), lambda text: None)
    assert {name: t["status"] for name, t in found.items()} == {
        "test_triton_a": "red", "test_torch_dispatch": "green",
    }  # fmt: skip
    assert (why, registered) == ("", True)
    assert gpu_tests.registered("") is None
    line = f"test_torch_dispatch.py::{gpu_tests.REGISTERED}"
    assert gpu_tests.registered(f"{line} FAILED  [ 1%]") is False


def test_a_file_that_cannot_be_collected_costs_the_others_nothing(suite):
    (suite / "test_triton_b.py").write_text("import no_such_module\ndef test_z(): pass\n")
    found, why, _ = gpu_tests.run(suite / "logs", 2, Budget(100.0), lambda text: None)
    assert set(found) == {"test_triton_a", "test_torch_dispatch"}
    assert "not all tests were collected" in why
    assert "test_triton_b.py" in why
    found, why, registered = gpu_tests.run(suite, 1, Budget(0.0), lambda text: None)
    assert (found, registered) == ({}, None)
    assert "took more than 0 s and was stopped" in why


def test_a_missing_test_library_is_named(monkeypatch):
    monkeypatch.setattr(gpu_tests, "find_spec", lambda name: None if name == "hypothesis" else 1)
    assert gpu_tests.collect([], 1.0) == ([], "hypothesis not installed")


# ---- numbers, ends, exit codes ----


def test_the_worst_case_ends_before_nine_minutes():
    assert gpu.BUILD_SECONDS + gpu.TEST_SECONDS + gpu.CASE_SECONDS < gpu.TOTAL_SECONDS
    for spent, most in ((0.0, gpu.CASE_SECONDS), (479.0, 41.0), (600.0, 0.0)):
        budget = Budget(gpu.TOTAL_SECONDS, lambda: 0.0)
        budget.begun = -spent
        assert gpu.limit(budget) == most
    assert gpu.LAST_SECONDS <= 520


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({}, 0),
        ({"rows": [{"status": "left out"}]}, 0),
        ({"tests": {"a": {"status": "unfinished"}}}, 0),
        ({"tests": {"a": {"status": "red"}}}, 1),
        ({"tests_error": "not all tests were collected"}, 1),
        ({"rows": [{"status": "measured"}, {"status": "failed"}]}, 1),
        ({"rows": [{"status": "refused"}]}, 1),
    ],
)
def test_exit_codes(change, code):
    assert gpu.exit_code({"tests": {}, "tests_error": "", "rows": [], **change}) == code


def test_json_has_no_number_that_is_not_finite(tmp_path):
    gpu.write(tmp_path / "r.json", {"a": [1.0, float("nan")], "b": (float("inf"), {"c": None})})
    assert json.loads((tmp_path / "r.json").read_text(), parse_constant=pytest.fail) == {
        "a": [1.0, None], "b": [None, {"c": None}],
    }  # fmt: skip


@pytest.mark.parametrize("us", [float("nan"), float("inf"), 0.0, -1.0])
def test_times_that_cannot_be_are_no_row(us):
    found = {"copy_gb_s": 4000.0, "empty_kernel_us": 1.0}
    with pytest.raises(RuntimeError, match="cannot be"):
        gpu_worker.numbers(CASES[0], found, {OURS: [3.0, us]}, {}, None)


def test_a_peer_that_cannot_be_imported_is_absent(monkeypatch, tmp_path):
    (tmp_path / "peer_of_another_cuda.py").write_text("raise OSError('libcudart.so.12: no')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(gpu_case.Absent, match=r"cannot be imported: OSError: libcudart.so.12: no"):
        gpu_case.peer("peer_of_another_cuda")
    with pytest.raises(gpu_case.Absent, match="no_such_peer is not installed"):
        gpu_case.peer("no_such_peer.nn")
