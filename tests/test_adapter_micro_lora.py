"""A MicroLoRA as an Adapter, and back where a MicroLoRA can hold it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from helpers_files import trained, weight_bits
from helpers_peft import drawn

import lora_engine as le


@pytest.mark.parametrize("use_rslora", [False, True])
def test_micro_lora_and_back(use_rslora):
    lora = trained(rank=3, alpha=7.0, dropout=0.25, use_rslora=use_rslora,
                   target_modules=("b", "a"), shapes={"a": (3, 4)})  # fmt: skip
    adapter = le.Adapter.from_micro_lora(lora)
    A, B, _ = lora.weights("a")
    assert adapter.modules["a"].A.tobytes() == A.tobytes()
    assert adapter.modules["a"].B.tobytes() == B.tobytes()
    again = le.MicroLoRA.from_adapter(adapter)
    assert again.config == lora.config
    assert weight_bits(again) == weight_bits(lora)


def test_an_adapter_without_a_config_becomes_a_micro_lora():
    w = drawn(3, scaling=0.3)
    lora = le.MicroLoRA.from_adapter(le.Adapter({"q": w}))
    assert lora.config.scaling == 0.3
    assert lora.weights("q")[0].tobytes() == w.A.tobytes()


BEYOND = {
    "rank_pattern": {"modules": {"q": drawn(2), "v": drawn(3, scaling=2.0)}},
    "alpha_pattern": {"modules": {"q": drawn(), "v": drawn(scaling=1.0)}},
    "embeddings": {"embeddings": {"e": drawn()}},
    "bias": {"biases": {"q": np.ones(5, "f4")}},
    "lora_bias": {"modules": {"q": drawn()._replace(bias_delta=np.ones(5, "f4"))}},
    "modules_to_save": {"modules_to_save": {"head.weight": np.ones((2, 2), "f4")}},
    "modules": {"modules": {}, "embeddings": {"e": drawn()}},
}


@pytest.mark.parametrize("key", BEYOND)
def test_what_a_micro_lora_cannot_hold_is_named(key):
    adapter = replace(le.Adapter({"q": drawn()}), **BEYOND[key])
    with pytest.raises(le.FormatError, match=rf"^MicroLoRA\.from_adapter: {key}: expected"):
        le.MicroLoRA.from_adapter(adapter)
