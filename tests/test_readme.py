"""The README's Python runs as it is written."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

README = Path(__file__).parents[1] / "README.md"


def test_examples_run_and_learn(tmp_path):
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    blocks = [b for b in blocks if 'device="cuda"' not in b]
    assert len(blocks) == 5
    check = "assert result.applied.tolist() == [True, True, False, True]\n"
    check += "assert np.abs(y - target)[0].mean() < 0.5 * np.abs(target)[0].mean()\n"
    command = [sys.executable, "-c", blocks[0] + check + "".join(blocks[1:])]
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert "no adapter was named" in ran.stdout
    assert (tmp_path / "my_adapter" / "adapter_model.safetensors").is_file()
    assert (tmp_path / "base.safetensors").stat().st_size < 0.52 * 4096 * 4096
