"""PEFT loads what we save, and we load what PEFT saves."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from helpers_files import (
    CONFIG,
    WEIGHTS,
    edit_config,
    quietly,
    saved,
    trained,
)

import lora_engine as le

# ---- PEFT -------------------------------------------------------------------


class Base(torch.nn.Module):
    """A frozen model whose layers have the names of target_modules."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = torch.nn.ModuleList(
            torch.nn.ModuleDict({"q_proj": torch.nn.Linear(6, 5), "v_proj": torch.nn.Linear(6, 4)})
            for _ in range(2)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        outs = [layer[name](x) for layer in self.layers for name in ("q_proj", "v_proj")]
        return torch.cat(outs, dim=-1)


NAMES = [f"layers.{i}.{name}" for i in range(2) for name in ("q_proj", "v_proj")]


def deltas(lora: le.MicroLoRA, x: torch.Tensor) -> torch.Tensor:
    return torch.cat([lora.forward(x, name) for name in NAMES], dim=-1)


@pytest.mark.parametrize("use_rslora", [False, True], ids=["alpha/r", "rslora"])
@pytest.mark.parametrize("rank", [1, 3], ids=lambda r: f"r{r}")
def test_peft_loads_what_we_save(rank, use_rslora, tmp_path):
    from peft import PeftModel

    lora = trained(
        6, 5, rank=rank, alpha=3.0, use_rslora=use_rslora, target_modules=NAMES,
        shapes={name: (6, 4) for name in NAMES if "v_proj" in name},
    )  # fmt: skip
    base, x = Base(), torch.randn(7, 6)
    want = base(x).detach() + deltas(lora, x)
    model = quietly(PeftModel.from_pretrained, base, saved(tmp_path, lora))
    got = model(x).detach()
    assert deltas(lora, x).abs().max() > 0.1
    assert torch.allclose(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("use_rslora", [False, True], ids=["alpha/r", "rslora"])
def test_we_load_what_peft_saves(dtype, use_rslora, tmp_path):
    from peft import LoraConfig, PeftModel, get_peft_model
    from safetensors.torch import load_file

    config = LoraConfig(
        r=3, lora_alpha=5, use_rslora=use_rslora, target_modules=["q_proj", "v_proj"],
        init_lora_weights=False, lora_dropout=0.125,
    )  # fmt: skip
    torch.manual_seed(1)
    model = quietly(get_peft_model, Base(), config).to(getattr(torch, dtype))
    quietly(model.save_pretrained, tmp_path / "a")
    edit_config(tmp_path / "a", base_model_name_or_path="some/base", of_a_later_peft=[1, {}])
    stored = load_file(tmp_path / "a" / WEIGHTS)
    assert {t.dtype for t in stored.values()} == {getattr(torch, dtype)}
    lora = le.MicroLoRA.load(tmp_path / "a")
    assert lora.config.target_modules == tuple(NAMES)
    assert lora.config.dropout == 0.125
    for name in NAMES:
        A, B, scaling = lora.weights(name)
        assert scaling == pytest.approx(5 / (np.sqrt(3) if use_rslora else 3), rel=1e-6)
        for which, got in (("A", A), ("B", B)):
            want = stored[f"base_model.model.{name}.lora_{which}.weight"].float().numpy()
            assert got.tobytes() == want.tobytes()
    x = torch.randn(7, 6)
    model = model.float().eval()
    with torch.no_grad():
        want = model(x)
        with model.disable_adapter():
            want = want - model(x)
    got = deltas(lora, x)
    assert got.abs().max() > 0.1
    assert torch.allclose(got, want, rtol=1e-4, atol=1e-5)

    # And back: what PEFT wrote that we have no use for is kept, and PEFT loads it again.
    before = json.loads((tmp_path / "a" / CONFIG).read_text())
    readme = (tmp_path / "a" / "README.md").read_bytes()
    lora.save(tmp_path / "a")
    after = json.loads((tmp_path / "a" / CONFIG).read_text())
    assert after.pop("target_modules") == NAMES
    assert sorted(before.pop("target_modules")) == ["q_proj", "v_proj"]
    assert after == before
    assert after["base_model_name_or_path"] == "some/base"
    assert (tmp_path / "a" / "README.md").read_bytes() == readme
    again = quietly(PeftModel.from_pretrained, Base(), tmp_path / "a").eval()
    with torch.no_grad():
        assert torch.allclose(again(x), Base()(x) + got, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("key", "options"),
    [
        ("use_dora", {"use_dora": True}),
        ("rank_pattern", {"rank_pattern": {"v_proj": 1}}),
        ("alpha_pattern", {"alpha_pattern": {"v_proj": 1}}),
        ("bias", {"bias": "lora_only"}),
        ("lora_bias", {"lora_bias": True}),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_what_a_micro_lora_is_not_is_refused(key, options, tmp_path):
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], **options)
    model = quietly(get_peft_model, Base(), config)
    quietly(model.save_pretrained, tmp_path / "a")
    with pytest.raises(le.FormatError, match=rf"{CONFIG}: {key}: |{WEIGHTS}: base_model.*: "):
        le.MicroLoRA.load(tmp_path / "a")
