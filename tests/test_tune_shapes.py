"""The shapes that are tuned, read from a model's config.json."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from lora_engine.errors import FormatError
from lora_engine.tuning import shapes
from lora_engine.tuning.shapes import Shape

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


def test_what_is_no_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / "config.json")
    for path in (tmp_path, tmp_path / "config.json", Path("/dev/zero")):
        with pytest.raises(OSError, match="expected a regular file"):
            shapes.from_config(path)
