"""lora-engine inspect: against the dense delta, and what it prints."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from helpers_files import CONFIG, STATE, edit_config, trained
from hypothesis import given
from hypothesis import strategies as st

import lora_engine as le
from lora_engine import cli, inspect_command
from lora_engine.adapters.adapter import LoraWeights

sizes = st.integers(1, 9)


@given(sizes, sizes, st.integers(1, 12), st.floats(-3, 3, width=32), st.integers(0, 2**32))
def test_norm_and_singular_values_are_those_of_the_dense_delta(d_in, out, rank, scaling, seed):
    """Ranks above the sizes too."""
    rng = np.random.default_rng(seed)
    A, B = (rng.standard_normal(s).astype("f4") for s in ((rank, d_in), (out, rank)))
    weights = LoraWeights(A, B, scaling)
    want = np.linalg.svd(scaling * B.astype("f8") @ A.astype("f8"), compute_uv=False)
    got = inspect_command.singular_values(weights)
    assert len(got) == min(rank, d_in, out)
    np.testing.assert_allclose(got, want[: len(got)], rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(
        inspect_command.norm(weights), np.linalg.norm(want), rtol=1e-9, atol=1e-9
    )


@pytest.mark.parametrize(
    ("values", "want"),
    [([1, 1, 1], 3.0), ([5, 0, 0], 1.0), ([0, 0], 0.0), ([2, 1], 3 / 2 ** (2 / 3))],
)  # fmt: skip
def test_effective_rank(values, want):
    assert inspect_command.effective_rank(np.array(values, "f8")) == pytest.approx(want)


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "adapter"
    trained(6, 5, rank=3, target_modules=("a.q", "a.[v]")).save(path)
    return path


def test_json(folder, capsys):
    adapter = le.Adapter.load(folder)
    assert cli.main(["inspect", "--json", str(folder)]) == 0
    (report,) = json.loads(capsys.readouterr().out)
    assert report["folder"] == str(folder)
    assert report["engine_state"] == "present"
    assert report["parameters"] == 2 * 3 * 11
    assert report["bytes"] == (folder / "adapter_model.safetensors").stat().st_size
    assert report["peft_config"]["target_modules"] == ["a.q", "a.[v]"]
    assert {m["module"] for m in report["modules"]} == set(adapter.modules)
    for m in report["modules"]:
        A, B, scaling, _ = adapter.modules[m["module"]]
        delta = scaling * B.astype("f8") @ A.astype("f8")
        assert (m["in_features"], m["out_features"], m["rank"], m["kind"]) == (6, 5, 3, "linear")
        assert m["norm"] == pytest.approx(np.linalg.norm(delta))
        assert m["bytes"] == 4 * 3 * 11
    assert report["norm"] == pytest.approx(np.hypot(*(m["norm"] for m in report["modules"])))


def test_bytes_are_those_of_the_files_dtype(folder, tmp_path, capsys):
    replace(le.Adapter.load(folder), dtype="bfloat16").save(tmp_path / "half")
    assert cli.main(["inspect", "--json", str(tmp_path / "half")]) == 0
    (report,) = json.loads(capsys.readouterr().out)
    assert [m["bytes"] for m in report["modules"]] == [2 * 3 * 11] * 2
    assert report["engine_state"] == "none"


def test_table_and_picture(folder, tmp_path, capsys):
    picture = tmp_path / "spectra.png"
    assert cli.main(["inspect", str(folder), "--plot", str(picture)]) == 0
    out = capsys.readouterr().out
    value = inspect_command.singular_values(le.Adapter.load(folder).modules["a.[v]"])[0]
    (row,) = [line for line in out.splitlines() if "a.[v] " in line]
    for cell in ("6 x 5", " 3 ", "1.333", f"{value:.3g}", " 132 "):
        assert cell in row
    assert "2 modules, 66 parameters" in out
    assert "engine state: present" in out
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_what_cannot_be_read_is_said_and_the_rest_shown(folder, tmp_path, capsys):
    edit_config(folder, use_dora=True)
    good = tmp_path / "good"
    trained().save(good)
    (good / STATE).write_bytes((folder / STATE).read_bytes())
    args = ["inspect", "--json", str(folder), str(good), str(tmp_path / "none")]
    assert cli.main(args) == 1
    out, err = capsys.readouterr()
    (report,) = json.loads(out)
    assert report["folder"] == str(good)
    assert "it belongs to other weights" in report["engine_state"]
    dora, none = err.splitlines()
    assert dora.startswith(f"inspect: {folder / CONFIG}: use_dora: expected nothing")
    assert none.startswith(f"inspect: {tmp_path / 'none' / CONFIG}: expected an adapter folder's")


def test_picture_that_cannot_be_written(folder, tmp_path, capsys):
    assert cli.main(["inspect", str(folder), "--plot", str(tmp_path / "no" / "a.png")]) == 1
    assert "inspect: --plot: " in capsys.readouterr().err
