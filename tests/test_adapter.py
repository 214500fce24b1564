"""Adapter and PEFT: what PEFT writes we read with PEFT's outputs, and what we write PEFT loads."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_files import CONFIG, WEIGHTS, quietly
from helpers_peft import BASES, ours, outputs, peft_model
from safetensors.torch import load_file

import lora_engine as le

Q, V = "q_proj", "v_proj"

# {what: (base, LoraConfig's options)}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("bare", {"target_modules": [Q, V]}),
    "rslora": ("bare", {"target_modules": [Q, V], "use_rslora": True, "lora_alpha": 5}),
    "rank-and-alpha-pattern": (
        "bare",
        {
            "target_modules": [Q, V],
            "rank_pattern": {"layers.1.q_proj": 5, "v_proj": 1, "q_proj": 3},
            "alpha_pattern": {r"layers\.\d\.v_proj": 3, "^layers.0.q_proj": 7, "q_proj": 11},
        },
    ),
    "patterns-rslora": (
        "bare",
        {
            "target_modules": [Q, V],
            "use_rslora": True,
            "rank_pattern": {".*v_proj": 4},
            "alpha_pattern": {"layers.0.(q|v)_proj": 1},
        },
    ),
    "regex-targets": ("bare", {"target_modules": r".*\.0\.[qv]_proj"}),
    "all-linear": ("llama", {"target_modules": "all-linear"}),
    "layers_to_transform": ("llama", {"target_modules": [Q, V], "layers_to_transform": [1]}),
    "exclude_modules": (
        "llama", {"target_modules": [Q, V], "exclude_modules": ["layers.0.self_attn.v_proj"]}),
    "fan_in_fan_out": ("gpt2", {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}),
    "bias-all": ("bert", {"target_modules": ["query", "dense"], "bias": "all"}),
    "bias-lora_only": ("bert", {"target_modules": ["query", "value"], "bias": "lora_only"}),
    "lora_bias": ("bare", {"target_modules": [Q, V], "lora_bias": True, "lora_alpha": 3}),
    "embedding": ("llama", {"target_modules": [Q, "embed_tokens"], "lora_alpha": 3}),
    "embedding-bert": ("bert", {"target_modules": ["query", "word_embeddings"]}),
    "embedding-and-head": ("llama", {"target_modules": ["embed_tokens", "lm_head"]}),
    "modules_to_save": ("bert", {"target_modules": ["query"], "modules_to_save": ["classifier"]}),
    "modules_to_save-by-task": ("bert", {"target_modules": ["query"], "task_type": "SEQ_CLS"}),
    "modules_to_save-bias-all": (
        "bert",
        {"target_modules": ["query"], "bias": "all", "modules_to_save": ["classifier"]}),
    "modules_to_save-layer-norm": (
        "bert", {"target_modules": ["query"], "modules_to_save": ["LayerNorm"]}),
    "orthogonal": ("bare", {"target_modules": [Q], "init_lora_weights": "orthogonal", "r": 2}),
    "nested-prefix": ("nested", {"target_modules": [Q, V]}),
}  # fmt: skip
cases = pytest.mark.parametrize("case", CASES)


@cases
def test_what_peft_writes_is_read_with_its_outputs(case, tmp_path):
    base, options = CASES[case]
    folder, want = peft_model(base, tmp_path, **options)
    adapter = le.Adapter.load(folder)
    got = ours(BASES[base](), adapter)
    assert not torch.allclose(want, outputs(BASES[base]()), atol=1e-2)  # it changes something
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    stored = load_file(folder / WEIGHTS)
    adapted = {key.split(".lora_")[0] for key in stored if ".lora_" in key}
    assert {f"base_model.model.{m}" for m in (*adapter.modules, *adapter.embeddings)} == adapted


@cases
def test_load_and_save_change_no_byte_of_weights(case, tmp_path):
    base, options = CASES[case]
    folder, want = peft_model(base, tmp_path, **options)
    le.Adapter.load(folder).save(tmp_path / "again")
    assert (tmp_path / "again" / WEIGHTS).read_bytes() == (folder / WEIGHTS).read_bytes()
    before, after = (json.loads((f / CONFIG).read_text()) for f in (folder, tmp_path / "again"))
    assert after == before
    torch.testing.assert_close(from_peft(base, tmp_path / "again"), want, rtol=0, atol=0)


def from_peft(base: str, folder: Path) -> torch.Tensor:
    """The outputs of a base with the folder's adapter, as PEFT loads it."""
    from peft import PeftModel

    return outputs(quietly(PeftModel.from_pretrained, BASES[base](), folder))


@cases
def test_what_is_written_without_a_config_peft_loads_with_equal_outputs(case, tmp_path):
    """Ranks, scalings and targets are all said anew."""
    base, options = CASES[case]
    folder, want = peft_model(base, tmp_path, **options)
    read = le.Adapter.load(folder)
    kept = {k: read.peft_config[k] for k in ("modules_to_save", "task_type", "fan_in_fan_out")}
    if not read.modules_to_save:
        kept = {}
    replace(read, peft_config=kept, targets=frozenset()).save(tmp_path / "new")
    torch.testing.assert_close(from_peft(base, tmp_path / "new"), want, rtol=1e-6, atol=1e-6)
    ours_, theirs = (load_file(f / WEIGHTS) for f in (tmp_path / "new", folder))
    assert set(ours_) == set(theirs)
    again = le.Adapter.load(tmp_path / "new")
    assert {k: w.scaling for k, w in again.modules.items()} == {
        k: w.scaling for k, w in read.modules.items()
    }
