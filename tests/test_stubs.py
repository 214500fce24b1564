"""lora_engine/_C.pyi is what nanobind writes for the module that is installed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import lora_engine


def test_stubs_are_up_to_date(tmp_path):
    written = tmp_path / "_C.pyi"
    command = [sys.executable, "-m", "nanobind.stubgen", "-q", "-m", "lora_engine._C", "-o"]
    subprocess.run([*command, str(written)], check=True)
    kept = Path(lora_engine.__file__).with_name("_C.pyi")
    assert kept.read_text() == written.read_text(), f"run: {' '.join(command)} {kept.name}"
