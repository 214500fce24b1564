"""The README's Python runs as it is written."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import helpers_report
import torch

from bench import readme
from bench.cases import CASES

README = Path(__file__).parents[1] / "README.md"


def test_examples_run_and_learn(tmp_path):
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    blocks = [block for block in blocks if "cuda" not in block]
    assert len(blocks) >= 6
    check = "assert result.applied.tolist() == [True, True, False, True]\n"
    check += "assert np.abs(y - target)[0].mean() < 0.5 * np.abs(target)[0].mean()\n"
    command = [sys.executable, "-c", blocks[0] + check + "".join(blocks[1:])]
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert "no adapter was named" in ran.stdout
    assert (tmp_path / "my_adapter" / "adapter_model.safetensors").is_file()
    assert (tmp_path / "base.safetensors").stat().st_size < 0.52 * 4096 * 4096


def test_the_example_for_a_gpu_runs():
    """On a GPU as it stands; else interpreted, with 64 features."""
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    (block,) = (block for block in blocks if "cuda" in block)
    environment = dict(os.environ)
    if not torch.cuda.is_available():
        block = block.replace("4096", "64").replace("randn(64,", "randn(4,")
        block = block.replace("(64,), slot", "(4,), slot").replace('"cuda"', '"cpu"')
        environment.update(TRITON_INTERPRET="1", LORA_ENGINE_BACKEND="triton")
    size = 4096 if torch.cuda.is_available() else 64
    before = f"import numpy as np, lora_engine as le; A = np.ones((2, {size}), 'f4')\n"
    before += f"B = np.ones(({size}, 2), 'f4')\n"
    after = "assert result.applied.all(); assert (y != 0).any()\n"
    command = [sys.executable, "-c", before + block + after]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr


def test_the_speed_table_is_that_of_its_results_file():
    text = README.read_text(encoding="utf-8")
    assert text == readme.generated(text), "python -m bench.readme --write"
    assert "| aim |" in text


def test_the_record_has_every_case():
    """A new case is measured before it is on main: python -m bench.table --rounds 31."""
    name = readme.BLOCK.search(README.read_text(encoding="utf-8"))["file"]
    record = json.loads((README.parent / name).read_text(encoding="utf-8"))
    assert [(r["op"], r["shape"]) for r in record["rows"]] == [(c.op, c.shape) for c in CASES]


def test_what_failed_and_what_was_absent_stand_in_the_table():
    report = helpers_report.report()
    report["rows"][2]["peers"][0]["wanted"] = 2.0
    lines = readme.table(report).splitlines()
    assert "| `broken`, 64 | wrong |  |  |  |" in lines
    assert "| `of torch`, 1 | absent |  |  |  |" in lines
    assert any(line.endswith("| PEFT | absent | 2x, not judged |") for line in lines)
