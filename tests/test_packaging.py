"""What is installed and what an import costs in other packages."""

from __future__ import annotations

import ast
import inspect
import json
import re
from importlib import import_module, metadata
from pathlib import Path

import pytest
from helpers_files import run_python

import lora_engine as le

ROOT = Path(__file__).parents[1]
HEAVY = {
    "torch", "triton", "sklearn", "scipy", "transformers", "peft", "matplotlib", "rich", "pytest",
    "safetensors.torch", "lora_engine.torch_ops", "lora_engine.backends.reference",
    "lora_engine.demo", "lora_engine.cli",
}  # fmt: skip


def modules_after(code: str, **env: str) -> set[str]:
    listing = "import json, sys\nprint(json.dumps([n for n, m in sys.modules.items() if m]))"
    ran = run_python("-c", f"{code}\n{listing}", **env)
    assert ran.returncode == 0, ran.stderr
    return set(json.loads(ran.stdout.splitlines()[-1]))


def test_import_takes_numpy_only():
    found = modules_after("import lora_engine")
    assert {"lora_engine", "lora_engine._C", "numpy"} <= found
    assert found & HEAVY == set()


NUMPY_ONLY = """
import sys
sys.modules["torch"] = None  # as if it were not installed
import tempfile
import numpy as np
import lora_engine as le
from helpers_files import trained

lora = trained(dropout=0.5)
x, y = np.ones((2, 6), "f4"), np.ones((2, 5), "f4")
assert lora.adapt(x, le.Feedback.from_target(y), "q", lr=0.1).applied
assert lora.adapt(x, le.Feedback.from_gradient(y), "q").applied
assert lora.apply_updates(lr=0.1).applied
with tempfile.TemporaryDirectory() as folder:
    lora.save(folder + "/a")
    loaded = le.MicroLoRA.load(folder + "/a")
assert (loaded.forward(x, "q") == lora.forward(x, "q")).all()
try:
    lora.forward(x.tolist(), "q")
except TypeError as error:
    assert "x: expected a NumPy array or a torch tensor, got list" in str(error)
else:
    raise AssertionError("a list was served")
"""


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_everything_works_without_torch(backend):
    code = NUMPY_ONLY if backend == "cpu" else NUMPY_ONLY[: NUMPY_ONLY.index("try:")]
    found = modules_after(code, LORA_ENGINE_BACKEND=backend, PYTHONPATH=str(Path(__file__).parent))
    assert "safetensors.numpy" in found
    assert found & {"torch", "safetensors.torch", "lora_engine.torch_ops"} == set()


def test_torch_may_be_imported_after_the_first_call():
    code = """
import numpy as np
from helpers_files import trained

lora = trained()
want = lora.forward(np.ones((2, 6), "f4"), "q")
import torch

got = lora.forward(torch.ones(2, 6), "q")
assert type(got) is torch.Tensor
assert (got.numpy() == want).all()
"""
    assert "torch" in modules_after(code, PYTHONPATH=str(Path(__file__).parent))


# ---- what is installed ------------------------------------------------------


def test_distribution_owns_no_kernels_at_the_top():
    """PyPI has a package of that name, which transformers imports."""
    files = metadata.files("lora-engine")
    assert files
    tops = {file.parts[0] for file in files}
    assert "lora_engine" in tops
    known = r"lora_engine-[\d.]+\.dist-info|_editable_skbc_lora_engine\.(py|pth)|__pycache__|\.\."
    assert {top for top in tops if not re.fullmatch(known, top)} == {"lora_engine"}


def test_every_package_goes_below_lora_engine():
    """An editable install's file list tells little, so its source is read, too."""
    text = (ROOT / "pyproject.toml").read_text()
    section = text.split("[tool.scikit-build.wheel.packages]\n", 1)[1].split("\n[", 1)[0]
    mapped = dict(re.findall(r'^"([^"]+)" = "([^"]+)"$', section, re.MULTILINE))
    assert mapped == {"lora_engine": "lora_engine", "lora_engine/kernels": "kernels"}
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_kernels_install_below_lora_engine():
    kernels = import_module("lora_engine.kernels")
    assert kernels.__name__ == "lora_engine.kernels"
    assert [Path(folder).resolve() for folder in kernels.__path__] in (
        [ROOT / "kernels"],
        [Path(le.__file__).resolve().parent / "kernels"],
    )


def test_types_are_installed():
    from lora_engine import _C

    package = Path(le.__file__).parent
    compiled = Path(_C.__file__)
    assert (package / "py.typed").is_file()
    stubs = [folder / "_C.pyi" for folder in {package, compiled.parent}]
    found = [stub for stub in stubs if stub.is_file()]
    assert found
    for stub in found:
        tree = ast.parse(stub.read_text())
        kinds = (ast.ClassDef, ast.FunctionDef)
        names = {node.name for node in tree.body if isinstance(node, kinds)}
        assert names == {name for name in dir(_C) if not name.startswith("_")}


def test_metadata_agrees_with_the_package():
    about = metadata.metadata("lora-engine")
    assert about["Version"] == le.__version__
    assert about["License-Expression"] == "Apache-2.0"
    required = [r for r in metadata.requires("lora-engine") or [] if "extra ==" not in r]
    assert sorted(re.match(r"[\w-]+", r)[0] for r in required) == ["numpy", "safetensors"]
    scripts = metadata.entry_points(group="console_scripts", name="lora-engine")
    assert [script.value for script in scripts] == ["lora_engine.cli:main"]
    assert any(file.name == "LICENSE" for file in metadata.files("lora-engine"))


# ---- the public names -------------------------------------------------------


def own_doc(thing: object, name: str) -> str:
    """A docstring that someone wrote: not inherited, not what a dataclass makes up."""
    doc = vars(type)["__doc__"].__get__(thing) if isinstance(thing, type) else thing.__doc__
    return "" if not doc or doc.startswith(f"{name}(") else doc


def test_all_lists_what_there_is():
    assert len(set(le.__all__)) == len(le.__all__)
    for name in le.__all__:
        assert not name.startswith("_")
        assert callable(getattr(le, name))
    star: dict[str, object] = {}
    exec("from lora_engine import *", star)
    assert set(star) - {"__builtins__"} == set(le.__all__)


@pytest.mark.parametrize("name", le.__all__)
def test_public_name_has_a_docstring(name):
    thing = getattr(le, name)
    assert own_doc(thing, name)
    if not isinstance(thing, type):
        return
    for attribute, value in vars(thing).items():
        plain = value.__func__ if isinstance(value, (classmethod, staticmethod)) else value
        plain = plain.fget if isinstance(plain, property) else plain
        if inspect.isfunction(plain) and not attribute.startswith("_"):
            assert own_doc(plain, attribute), f"{name}.{attribute}"


def test_errors_are_value_errors():
    assert issubclass(le.FormatError, ValueError)
