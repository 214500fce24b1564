"""MicroLoRAConfig: what it takes, what it makes of it, and what it refuses by name."""

from __future__ import annotations

import math
from dataclasses import FrozenInstanceError, replace
from fractions import Fraction

import numpy as np
import pytest

import lora_engine as le

BAD = {
    "in_features": [0, -1, 2**31, 3.5, 4.0, "4", None, True, float("nan"), [4]],
    "out_features": [0, -1, 2**31, 3.5, "4", None],
    "rank": [0, -1, 65537, 10**12, 2.0, 2.5, "2", None, True],
    "alpha": [math.nan, math.inf, -math.inf, 1e39, 10**400, "4", None, True, 1j],
    "dropout": [-0.1, 1.0, 2, math.nan, "0.1", None, True],
    "target_modules": [
        (), "q_proj", b"q", None, 3, {"q", "v"}, iter("qv"), {"q": 1}, ("q", "q"), ("q", 1), ("",),
        ("a\0b",), ("a\nb",), ("\ud800",), (None,), np.array(["q"]),
    ],
    "shapes": [
        {"k_proj": (4, 4)}, {"q_proj": (4,)}, {"q_proj": (4, 4, 4)}, {"q_proj": 4},
        {"q_proj": None}, {"q_proj": (0, 4)}, {"q_proj": (4, -1)}, {"q_proj": (4.5, 4)},
        {"q_proj": ("4", "4")}, {"q_proj": (True, 4)}, {"q_proj": "44"}, {1: (4, 4)},
        [("q_proj", (4, 4))], "q_proj", 4,
    ],
    "use_rslora": [None, "false", 0, 1, 2.0, []],
    "gradient_checkpointing": [None, "true", 0, 1],
    "seed": [-1, 2**64, 1.5, 1.0, "0", None, True],
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "value"),
    [(name, value) for name, values in BAD.items() for value in values],
    ids=lambda v: repr(v)[:30],
)
def test_bad_value_names_its_field(name, value):
    with pytest.raises(ValueError, match=rf"^MicroLoRAConfig: {name}: expected .*, got ") as caught:
        le.MicroLoRAConfig(**{"in_features": 8, "out_features": 8, name: value})
    assert len(str(caught.value)) < 500


GOOD = {
    "in_features": [(1, 1), (np.int64(4), 4), (np.uint8(4), 4)],
    "rank": [(1, 1), (np.int32(3), 3), (65536, 65536)],
    "alpha": [(1, 1.0), (0, 0.0), (-2, -2.0), (np.float32(1.5), 1.5), (Fraction(1, 4), 0.25)],
    "dropout": [(0, 0.0), (0.99, 0.99), (np.float64(0.5), 0.5)],
    "target_modules": [(["b", "a"], ("b", "a")), (("größe.投影",), ("größe.投影",))],
    "shapes": [({"q_proj": [4, np.int64(5)]}, {"q_proj": (4, 5)}), ({}, {}), (None, None)],
    "use_rslora": [(np.True_, True), (False, False)],
    "seed": [(2**64 - 1, 2**64 - 1), (np.int64(7), 7)],
}


@pytest.mark.parametrize(
    ("name", "value", "kept"),
    [(name, *pair) for name, pairs in GOOD.items() for pair in pairs],
    ids=lambda v: repr(v)[:30],
)
def test_values_are_kept_as_plain_python(name, value, kept):
    config = le.MicroLoRAConfig(**{"in_features": 8, "out_features": 8, name: value})
    got = getattr(config, name)
    assert got == kept
    assert type(got) is type(kept)
    if name == "shapes" and kept:
        assert all(type(n) is int for shape in got.values() for n in shape)


def test_config_cannot_be_changed_from_outside():
    shapes, modules = {"k": (4, 2)}, ["q", "k"]
    config = le.MicroLoRAConfig(8, 8, shapes=shapes, target_modules=modules)
    shapes["k"] = (1, 1)
    modules.append("v")
    assert config.shape("k") == (4, 2)
    assert config.shape("q") == (8, 8)
    assert config.target_modules == ("q", "k")
    with pytest.raises(FrozenInstanceError):
        config.rank = 3


@pytest.mark.parametrize(
    ("rank", "alpha", "use_rslora", "scaling"),
    [(2, 4.0, False, 2.0), (4, 4.0, False, 1.0), (4, 4.0, True, 2.0), (2, -1.0, False, -0.5)],
)
def test_scaling(rank, alpha, use_rslora, scaling):
    config = le.MicroLoRAConfig(8, 8, rank=rank, alpha=alpha, use_rslora=use_rslora)
    assert config.scaling == scaling


@pytest.mark.parametrize("rank", [1, 2, 8])
def test_for_hidden_dim_is_square_with_alpha_of_twice_the_rank(rank):
    config = le.MicroLoRAConfig.for_hidden_dim(96, rank=rank)
    assert config == le.MicroLoRAConfig(96, 96, rank=rank, alpha=2.0 * rank)
    assert config.scaling == 2.0


def test_presets_differ_from_the_default_only_in_what_they_say():
    for name, rank, modules, checkpointing in [
        ("low_latency", 1, ("q_proj",), False),
        ("balanced", 2, ("q_proj", "v_proj"), False),
        ("high_quality", 4, ("q_proj", "k_proj", "v_proj", "o_proj"), False),
        ("minimal_memory", 1, ("q_proj",), True),
    ]:
        want = replace(
            le.MicroLoRAConfig.for_hidden_dim(64, rank=rank),
            target_modules=modules,
            gradient_checkpointing=checkpointing,
        )
        assert le.MicroLoRAConfig.preset(name, 64) == want


def test_unknown_preset_names_the_known():
    known = "low_latency, balanced, high_quality, minimal_memory"
    with pytest.raises(ValueError, match=f"name: expected one of {known}, got 'fastest'"):
        le.MicroLoRAConfig.preset("fastest", 64)
