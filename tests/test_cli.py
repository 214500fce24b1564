"""The lora-engine command, and what the environment forces on it."""

from __future__ import annotations

import json
import platform
import sys
import sysconfig
import types
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
from helpers_files import run_python

import lora_engine as le
from lora_engine import _C, cli


def test_doctor_tells_what_is_there(capsys):
    assert cli.main(["doctor"]) == 0
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert lines[0] == (
        f"lora_engine {le.__version__}, Python {platform.python_version()}, {platform.machine()}"
    )
    assert f"threads: {le.get_num_threads()}" in lines
    report = le.backends()
    assert set(report) == {"cpu", "reference", "triton"}
    for name, about in report.items():
        assert f"backend {name}: {about}" in lines
    assert f"using {_C.isa()} of " in report["cpu"]
    for isa, supported in _C.isas_built().items():
        assert (isa if supported else f"{isa} (not on this CPU)") in report["cpu"]
    assert f"numpy: {np.__version__}" in lines
    for package in ("safetensors", "torch", "triton", "transformers", "peft"):
        try:
            version = metadata.version(package)
        except metadata.PackageNotFoundError:
            version = "not installed"
        assert f"{package}: {version}" in lines
    assert err == ""


def test_installed_command_runs():
    script = Path(sysconfig.get_path("scripts")) / "lora-engine"
    ran = run_python(str(script), "doctor")
    assert (ran.returncode, ran.stderr) == (0, "")
    assert ran.stdout == run_python("-m", "lora_engine.cli", "doctor").stdout


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["nonsense"], "invalid choice: 'nonsense'"),
        ([], "arguments are required: command"),
        (["doctor", "extra"], "unrecognized arguments: extra"),
        (["demo", "--rounds", "many"], "--rounds: invalid int value: 'many'"),
    ],
    ids=" ".join,
)
def test_wrong_use_exits_2_and_says_why(args, says, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(args)
    assert caught.value.code == 2
    out, err = capsys.readouterr()
    assert says in err
    assert "usage: lora-engine" in err
    assert out == ""


def test_process_exits_with_the_status():
    assert run_python("-m", "lora_engine.cli", "nonsense").returncode == 2


BLOCKED = """
import sys

class Missing:  # as if the package were not installed
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name == sys.argv[1]:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Missing)
from lora_engine.cli import main
sys.exit(main(["demo", "--out", sys.argv[2]]))
"""


@pytest.mark.parametrize("package", ["sklearn", "threadpoolctl", "rich", "matplotlib"])
def test_demo_without_a_package_says_how_to_get_it(package, tmp_path):
    ran = run_python("-c", BLOCKED, package, str(tmp_path / "out"))
    assert ran.returncode == 1
    assert ran.stderr == f"the demo needs {package}: pip install 'lora-engine[demo]'\n"
    assert ran.stdout == ""
    assert not (tmp_path / "out").exists()


@pytest.fixture
def played(monkeypatch):
    """Puts a function in the demo's place."""

    def put(run):
        module = types.ModuleType("lora_engine.demo")
        module.run = run
        monkeypatch.setitem(sys.modules, "lora_engine.demo", module)
        monkeypatch.setattr(le, "demo", module, raising=False)

    return put


def test_demo_is_given_its_arguments(played):
    calls = []

    def run(**options):
        calls.append(options)
        return 3

    played(run)
    assert cli.main(["demo"]) == 3
    assert cli.main(["demo", "--rounds", "7", "--out", "elsewhere"]) == 3
    assert calls == [
        {"rounds": 600, "out": "demo_output"},
        {"rounds": 7, "out": "elsewhere"},
    ]


def test_ctrl_c_exits_130(played, capsys):
    def run(**options):
        raise KeyboardInterrupt

    played(run)
    assert cli.main(["demo"]) == 130
    assert capsys.readouterr().err == "stopped\n"


# ---- the environment --------------------------------------------------------

ISAS = ", ".join(_C.isas_built())


@pytest.mark.parametrize(
    ("variable", "value", "says"),
    [
        ("BACKEND", "nonsense", "LORA_ENGINE_BACKEND=nonsense: expected one of cpu, triton, reference"),
        ("BACKEND", "CPU", "LORA_ENGINE_BACKEND=CPU: expected one of cpu, triton, reference"),
        ("ISA", "nonsense", f"LORA_ENGINE_ISA=nonsense: expected one of {ISAS}"),
        ("ISA", "AVX2", f"LORA_ENGINE_ISA=AVX2: expected one of {ISAS}"),
    ],
)  # fmt: skip
def test_what_cannot_be_had_fails_loudly(variable, value, says):
    ran = run_python("-m", "lora_engine.cli", "doctor", **{f"LORA_ENGINE_{variable}": value})
    assert ran.returncode != 0
    assert says in ran.stderr.splitlines()[-1]
    assert "backend cpu: " in ran.stdout  # doctor still says what there is


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_triton_without_a_gpu_fails_loudly():
    environment = {"LORA_ENGINE_BACKEND": "triton", "TRITON_INTERPRET": "0"}
    ran = run_python("-m", "lora_engine.cli", "doctor", **environment)
    assert ran.returncode != 0
    assert "backend triton: no GPU (on a CPU the kernels run with TRITON_INTERPRET=1" in ran.stderr
    assert "Traceback" not in ran.stderr


@pytest.mark.parametrize("isa", _C.isas_built())
def test_isa_is_forced_or_refused(isa):
    ran = run_python("-m", "lora_engine.cli", "doctor", LORA_ENGINE_ISA=isa, LORA_ENGINE_BACKEND="")
    if _C.isas_built()[isa]:
        assert ran.returncode == 0
        assert f"; using {isa} of " in ran.stdout
    else:
        assert ran.returncode != 0
        assert f"LORA_ENGINE_ISA={isa}: this CPU does not have it" in ran.stderr.splitlines()[-1]


LEARN = """
import json, sys
import numpy as np
import torch
import lora_engine as le
from helpers_files import trained
from lora_engine.backends import chosen

rng = np.random.default_rng(0)
found = {}

def keep(name, *arrays):
    found[name] = [np.asarray(a, dtype=np.float64).ravel().tolist() for a in arrays]

x, grad, y = (rng.standard_normal((5, d)).astype("f4") for d in (6, 5, 5))
for kind, convert in (("numpy", lambda a: a.copy()), ("torch", torch.from_numpy)):
    lora = trained(rank=3, dropout=0.25, target_modules=("q", "v"), shapes={"v": (6, 5)})
    X, G, Y = convert(x), convert(grad), convert(y)
    keep(kind + " forward", lora.forward(X, "q"), lora.forward(X[0], "v"))
    out = Y * np.nan
    keep(kind + " out", lora.forward(X, "q", out=out), lora.forward_add(X, "q", Y * 1))
    first = lora.adapt(X, le.Feedback.from_gradient(G), "q", lr=0.1)
    second = lora.adapt(X, le.Feedback.from_target(Y, base=G, weight=0.5), "v")
    third = lora.adapt(X[0], le.Feedback.from_gradient(G[0]), "v")
    fourth = lora.apply_updates(lr=0.1)
    bad = lora.adapt(X, le.Feedback.from_gradient(G * np.inf), "q", lr=0.1)
    results = first, second, third, fourth, bad
    keep(kind + " applied", [r.applied for r in results])
    keep(kind + " norms", [r.grad_norm for r in results[:4]])
    found[kind + " notes"] = [r.note for r in results]
    keep(kind + " q", *lora.weights("q"))
    keep(kind + " v", *lora.weights("v"))
X = torch.from_numpy(x).requires_grad_()
lora.forward(X, "q").backward(torch.from_numpy(grad))
keep("dx", X.grad)
lora.apply_updates(lr=0.1)
lora.save(sys.argv[1])
lora = le.MicroLoRA.load(sys.argv[1])
keep("loaded", *lora.weights("q"), *lora.weights("v"))
lora.adapt(x, le.Feedback.from_gradient(grad), "q", lr=0.1)  # dropout goes on
keep("after", *lora.weights("q"))
print(json.dumps([chosen().__name__, found]))
"""


def test_reference_backend_learns_the_same(tmp_path):
    modules = {"cpu": "lora_engine._C", "reference": "lora_engine.backends.reference"}

    def learn(name):
        return run_python(
            "-W",
            "error::UserWarning",
            "-c",
            LEARN,
            str(tmp_path / name),
            LORA_ENGINE_BACKEND=name,
            PYTHONPATH=str(Path(__file__).parent),
        )

    found = {}
    with ThreadPoolExecutor() as both:
        for name, ran in zip(modules, both.map(learn, modules), strict=True):
            assert ran.returncode == 0, ran.stderr
            used, found[name] = json.loads(ran.stdout)
            assert used == modules[name]
    assert found["cpu"].keys() == found["reference"].keys()
    moved = 0
    for key, got in found["cpu"].items():
        want = found["reference"][key]
        if key.endswith("notes"):
            assert got == want
            continue
        for a, b in zip(got, want, strict=True):
            assert np.linalg.norm(np.subtract(a, b)) <= 2e-6 * (1 + np.linalg.norm(b)), key
        moved += got != want
    assert moved  # they are two computations, not one compared with itself
