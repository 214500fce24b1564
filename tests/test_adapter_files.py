"""Adapter's files: dtypes, what is refused, files made to harm, MicroLoRA and back."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers_files import (
    A_KEY,
    B_KEY,
    CONFIG,
    STATE,
    WEIGHTS,
    check_refusal,
    contents,
    edit_config,
    raw_safetensors,
    saved,
    steps_of,
    trained,
)
from helpers_peft import drawn, peft_model
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import lora_engine as le
from lora_engine.adapters import peft_config, peft_tensors
from lora_engine.adapters.adapter import LoraWeights

PREFIX = "base_model.model."


def config_of(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / CONFIG).read_text()))


# ---- dtypes -----------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_16_bit_files_keep_their_dtype_and_bytes(dtype, tmp_path):
    folder, _ = peft_model("bert", tmp_path, getattr(torch, dtype), target_modules=["query"],
                           bias="all", task_type="SEQ_CLS")  # fmt: skip
    adapter = le.Adapter.load(folder)
    assert adapter.dtype == dtype
    assert adapter.dtypes == {}
    stored = load_file(folder / WEIGHTS)
    (name,) = adapter.modules
    want = stored[f"{PREFIX}{name}.lora_A.weight"].float().numpy()
    assert adapter.modules[name].A.tobytes() == want.tobytes()
    adapter.save(tmp_path / "again")
    assert (tmp_path / "again" / WEIGHTS).read_bytes() == (folder / WEIGHTS).read_bytes()


def test_dtypes_that_are_mixed_are_kept(tmp_path):
    """As PEFT has them over a bfloat16 base: its own weights in float32."""
    folder, _ = peft_model("bert", tmp_path, target_modules=["query"], bias="all",
                           modules_to_save=["classifier"])  # fmt: skip
    tensors = {
        key: t if ".lora_" in key else t.bfloat16()
        for key, t in load_file(folder / WEIGHTS).items()
    }
    tensors[f"{PREFIX}classifier.steps"] = torch.tensor(7)
    tensors[f"{PREFIX}bert.pooler.dense.bias"] = tensors[f"{PREFIX}bert.pooler.dense.bias"].half()
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    adapter = le.Adapter.load(folder)
    assert adapter.dtype == "float32"
    assert set(adapter.dtypes.values()) == {"bfloat16", "float16"}
    assert adapter.modules_to_save["classifier.steps"] == 7
    adapter.save(tmp_path / "again")
    assert (tmp_path / "again" / WEIGHTS).read_bytes() == (folder / WEIGHTS).read_bytes()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_dtype_rounds_as_torch_does(dtype, tmp_path):
    adapter = le.Adapter({"q": drawn()}, dtype=dtype)
    adapter.save(tmp_path / "a")
    stored = load_file(tmp_path / "a" / WEIGHTS)
    for key, values in ((A_KEY, adapter.modules["q"].A), (B_KEY, adapter.modules["q"].B)):
        assert torch.equal(stored[key], torch.tensor(values).to(getattr(torch, dtype)))


@pytest.mark.parametrize(("dtype", "value"), [("float16", 7e4), ("bfloat16", 3.4e38)])
def test_what_a_dtype_cannot_hold_is_refused_before_writing(dtype, value, tmp_path):
    folder = saved(tmp_path)
    before = contents(folder)
    w = drawn()
    w.B[1, 1] = value
    le.Adapter({"q": w}).save(tmp_path / "fits")
    with pytest.raises(ValueError, match=rf"^{B_KEY}: expected finite numbers within {dtype}"):
        le.Adapter({"q": w}, dtype=dtype).save(folder)
    assert contents(folder) == before


# ---- what is written --------------------------------------------------------


def test_lora_bias_comes_back_to_the_bit(tmp_path):
    """Though scaling times a number, divided by it again, may be another number."""
    folder, _ = peft_model("bare", tmp_path, target_modules=["q_proj"], lora_bias=True,
                           lora_alpha=3, r=7)  # fmt: skip
    adapter = le.Adapter.load(folder)
    stored = load_file(folder / WEIGHTS)
    changed = 0
    for name, w in adapter.modules.items():
        bias = stored[f"{PREFIX}{name}.lora_B.bias"].numpy()
        assert np.array_equal(w.bias_delta, (bias * w.scaling).astype("f4"))
        changed += int(((w.bias_delta / w.scaling).astype("f4") != bias).sum())
    adapter.save(tmp_path / "again")
    assert (tmp_path / "again" / WEIGHTS).read_bytes() == (folder / WEIGHTS).read_bytes()
    assert changed > 0  # there was something to lose
    other = {n: w._replace(bias_delta=w.bias_delta * 2) for n, w in adapter.modules.items()}
    replace(adapter, modules=other).save(tmp_path / "other")
    for key, values in load_file(tmp_path / "other" / WEIGHTS).items():
        if key.endswith("lora_B.bias"):
            torch.testing.assert_close(values, stored[key] * 2, rtol=1e-6, atol=0)


def test_ranks_and_scalings_that_no_longer_fit_the_config_are_said_anew(tmp_path):
    modules = {
        "q": drawn(4, scaling=0.5), "a.q": drawn(2, scaling=1.5), "a.b.q": drawn(2, scaling=1 / 3),
        "a.v": drawn(2, scaling=1.5), "x[0].v": drawn(3, scaling=-0.7),
    }  # fmt: skip
    old = {"r": 8, "lora_alpha": 8, "use_rslora": True, "rank_pattern": {"q": 1}, "of_later": [1]}
    adapter = le.Adapter(modules, peft_config=old)
    adapter.save(tmp_path / "a")
    config = config_of(tmp_path / "a")
    assert config["target_modules"] == list(modules)
    assert (config["r"], config["use_rslora"], config["of_later"]) == (2, True, [1])
    again = le.Adapter.load(tmp_path / "a")
    for name, w in modules.items():
        assert again.modules[name].scaling == w.scaling
        assert again.modules[name].A.tobytes() == w.A.tobytes()


def test_a_module_less_is_a_target_less(tmp_path):
    folder, _ = peft_model("bare", tmp_path, target_modules=["q_proj", "v_proj"])
    adapter = le.Adapter.load(folder)
    kept = {name: w for name, w in adapter.modules.items() if name != "layers.1.v_proj"}
    replace(adapter, modules=kept).save(tmp_path / "less")
    assert set(config_of(tmp_path / "less")["target_modules"]) == set(kept)
    adapter.save(tmp_path / "same")
    assert sorted(config_of(tmp_path / "same")["target_modules"]) == ["q_proj", "v_proj"]


def test_engine_state_is_kept_while_the_weights_are(tmp_path):
    lora = trained()
    assert lora.adapt(np.ones(6, "f4"), le.Feedback.from_gradient(np.ones(5, "f4")), "q", lr=0.1)
    folder = saved(tmp_path, lora)
    adapter = le.Adapter.load(folder)
    adapter.save(folder)
    assert steps_of(le.MicroLoRA.load(folder)) == {"q": 1}
    w = adapter.modules["q"]
    replace(adapter, modules={"q": w._replace(A=w.A * 2)}).save(folder)
    assert not (folder / STATE).exists()
    assert steps_of(le.MicroLoRA.load(folder)) == {"q": 0}


WRONG = {
    "shapes": ({"q": drawn()._replace(B=np.zeros((5, 3), "f4"))}, "q: expected A"),
    "vector": ({"q": drawn()._replace(A=np.zeros(6, "f4"))}, "q: expected A"),
    "rank-0": ({"q": LoraWeights(np.zeros((0, 6)), np.zeros((5, 0)), 1.0)}, "q: expected A"),
    "whole-numbers": ({"q": drawn()._replace(A=np.zeros((2, 6), int))}, "q: expected A"),
    "nan": ({"q": drawn()._replace(A=np.full((2, 6), np.nan, "f4"))}, "finite numbers"),
    "scaling": ({"q": drawn(scaling=np.inf)}, "q: scaling: expected a finite number"),
    "bias": ({"q": drawn()._replace(bias_delta=np.ones(4, "f4"))}, "q: bias_delta: expected"),
    "no-scaling": (
        {"q": drawn(scaling=0.0)._replace(bias_delta=np.ones(5, "f4"))}, "q: bias_delta: expected"),
    "name": ({"q\n": drawn()}, "expected a path of printable text"),
    "none": ({}, "expected modules and embeddings"),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG)
def test_what_does_not_fit_together_is_refused_before_writing(what, tmp_path):
    modules, says = WRONG[what]
    with pytest.raises(ValueError, match=says):
        le.Adapter(modules).save(tmp_path / "a")
    assert not (tmp_path / "a").exists()


# ---- what is refused --------------------------------------------------------

CONFIGS = {
    "vera": ("peft_type: expected LORA, got 'VERA'", {"peft_type": "VERA"}),
    "no-r": ("r: expected a number", {"r": None}),
    "other-rank": (r"q: expected A \[3, 6\] and B \[5, 3\], got \[2, 6\]", {"r": 3}),
    "rank_pattern": (r"q: expected A \[4, 6\]", {"rank_pattern": {"q": 4}}),
    "rank_pattern-0": ("rank_pattern: q: expected a whole", {"rank_pattern": {"q": 0}}),
    "rank_pattern-list": ("rank_pattern: expected an object", {"rank_pattern": ["q"]}),
    "hostile-regex": ("rank_pattern: .*nested quantifiers", {"rank_pattern": {"(q+)+$": 2}}),
    "alpha_pattern": ("alpha_pattern: q: expected a number", {"alpha_pattern": {"q": "1"}}),
    "alpha_pattern-nan": ("alpha_pattern: q: .*range", {"alpha_pattern": {"q": float("nan")}}),
    "bias": ("bias: expected none, all or lora_only", {"bias": "some"}),
    "lora_bias": (f"{PREFIX}q.lora_B.bias: missing", {"lora_bias": True}),
    "lora_bias-text": ("lora_bias: expected true or false", {"lora_bias": "yes"}),
    "pissa": ("init_lora_weights: expected an adapter of", {"init_lora_weights": "pissa_niter_4"}),
    "olora": ("init_lora_weights: expected an adapter of", {"init_lora_weights": "OLoRA"}),
    **{key: (f"{key}: expected nothing", {key: {"x": 1}}) for key in peft_config.VARIANTS},
}


@pytest.mark.parametrize("what", CONFIGS)
def test_configs_of_something_else_are_refused(what, tmp_path):
    folder = saved(tmp_path)
    says, changes = CONFIGS[what]
    edit_config(folder, **changes)
    with pytest.raises(le.FormatError, match=says) as caught:
        le.Adapter.load(folder)
    check_refusal(caught, str(folder))


def test_every_variant_that_peft_marks_is_refused():
    from dataclasses import fields

    from peft import LoraConfig

    marked = {f.name for f in fields(LoraConfig) if f.metadata.get("is_lora_variant")}
    assert marked <= set(peft_config.VARIANTS)


def test_a_dora_folder_of_peft_is_refused_by_name(tmp_path):
    folder, _ = peft_model("bare", tmp_path, target_modules=["q_proj"], use_dora=True)
    with pytest.raises(le.FormatError, match=f"{CONFIG}: use_dora: "):
        le.Adapter.load(folder)
    edit_config(folder, use_dora=False)
    with pytest.raises(le.FormatError, match=r"lora_magnitude_vector: .* got DoRA"):
        le.Adapter.load(folder)


def test_a_pickle_is_refused_by_name(tmp_path):
    folder = saved(tmp_path)
    (folder / WEIGHTS).rename(folder / "adapter_model.bin")
    with pytest.raises(le.FormatError, match=r"adapter_model\.bin: expected .* no pickle is read"):
        le.Adapter.load(folder)
    (folder / CONFIG).unlink()
    with pytest.raises(FileNotFoundError, match=CONFIG):
        le.Adapter.load(folder)


def tensor(key: str, *shape: int, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    return {key: torch.ones(shape, dtype=dtype)}


KEYS = {
    "no-prefix": (tensor("q.lora_A.weight", 2, 6), "q.lora_A.weight: expected a key like"),
    "adapter-name": (tensor(f"{PREFIX}q.lora_A.default.weight", 2, 6), "default.*: expected a key"),
    "variant": (tensor(f"{PREFIX}q.lora_diag", 2), "q.lora_diag: expected a key like"),
    "tokens": (tensor(f"{PREFIX}e.token_adapter.trainable_tokens_delta", 2, 4), "trainable tokens"),
    "half": (tensor(f"{PREFIX}p.lora_B.weight", 5, 2), "p.lora_A.weight: missing"),
    "half-embedding": (
        tensor(f"{PREFIX}e.lora_embedding_A", 2, 9), "e.lora_embedding_B: missing"),
    "both-kinds": (
        tensor(f"{PREFIX}q.lora_embedding_A", 2, 9) | tensor(f"{PREFIX}q.lora_embedding_B", 4, 2),
        "q: expected a linear layer or an embedding"),
    "embedding-rank": (
        tensor(f"{PREFIX}e.lora_embedding_A", 3, 9) | tensor(f"{PREFIX}e.lora_embedding_B", 4, 3),
        r"e: expected A \[2, 9\]"),
    "bias-without-lora_bias": (tensor(f"{PREFIX}q.lora_B.bias", 5), "expected none without"),
    "bias-of-nothing": (tensor(f"{PREFIX}p.lora_B.bias", 5), "p.lora_B.bias: expected"),
    "bias-of-another-size": (tensor(f"{PREFIX}q.lora_B.bias", 4), r"expected \[5\], got \[4\]"),
    "bias-matrix": (tensor(f"{PREFIX}p.bias", 5, 1), r"p.bias: expected a float vector"),
    "bias-beside-base_layer": (tensor(f"{PREFIX}q.bias", 5), "q.bias: expected a tensor of"),
    "base_layer-of-nothing": (tensor(f"{PREFIX}p.base_layer.bias", 5), "expected a tensor of"),
    "other-parameter": (tensor(f"{PREFIX}p.scale", 5), "p.scale: expected a key like"),
    "vector-weight": (tensor(f"{PREFIX}p.weight", 5), "p.weight: expected a key like"),
    "convolution": (
        tensor(f"{PREFIX}p.lora_A.weight", 2, 3, 1, 1), "p.lora_A.weight: expected a float matrix"),
    "nan": ({f"{PREFIX}p.bias": torch.tensor([1.0, float("nan")])}, "p.bias: .* NaN or Inf"),
}  # fmt: skip


@pytest.mark.parametrize("what", KEYS)
def test_keys_of_something_else_are_refused(what, tmp_path):
    folder = saved(tmp_path)
    more, says = KEYS[what]
    save_file({**load_file(folder / WEIGHTS), **more}, folder / WEIGHTS)
    with pytest.raises(le.FormatError, match=says) as caught:
        le.Adapter.load(folder)
    check_refusal(caught, str(folder / WEIGHTS))


# ---- files made to harm -----------------------------------------------------

json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 2**70) | st.floats() | st.text(max_size=4),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=6,
)
config_keys = st.sampled_from(
    ["peft_type", "r", "lora_alpha", "lora_dropout", "use_rslora", "lora_bias", "bias",
     "rank_pattern", "alpha_pattern", "target_modules", "modules_to_save", "init_lora_weights",
     "use_dora", "fan_in_fan_out", "layers_to_transform"]
)  # fmt: skip
wild = st.lists(st.sampled_from(["q", "base_layer", "bias", "weight", "lora_A", "lora_B",
                                 "lora_embedding_A", "lora_embedding_B", "modules_to_save", ""]),
                max_size=4).map(".".join)  # fmt: skip
tensors = st.dictionaries(
    wild.map(lambda name: PREFIX + name),
    st.tuples(
        st.sampled_from(["F32", "BF16", "F16", "F64", "I64", "U8"]),
        st.lists(st.integers(0, 3), max_size=3),
    ),
    max_size=2,
)
# {a part of a file that may be there: its tensors}
PARTS: dict[str, dict[str, tuple[str, list[int]]]] = {
    "linear": {A_KEY: ("F32", [2, 3]), B_KEY: ("BF16", [3, 2])},
    "lora_bias": {f"{PREFIX}q.lora_B.bias": ("F32", [3])},
    "embedding": {f"{PREFIX}e.lora_embedding_A": ("F16", [2, 5]),
                  f"{PREFIX}e.lora_embedding_B": ("F16", [3, 2])},
    "base": {f"{PREFIX}e.base_layer.weight": ("F16", [5, 3])},
    "bias": {f"{PREFIX}q.base_layer.bias": ("F32", [3]), f"{PREFIX}norm.bias": ("F32", [4])},
    "saved": {f"{PREFIX}head.weight": ("BF16", [4, 3]), f"{PREFIX}head.bias": ("BF16", [4])},
    "unused": {f"{PREFIX}head.original_module.bias": ("BF16", [4])},
}  # fmt: skip
_SIZES = {"F32": 4, "BF16": 2, "F16": 2, "F64": 8, "I64": 8, "U8": 1}
BASE = {"peft_type": "LORA", "r": 2, "lora_alpha": 4}


def weights_of(tensors: dict[str, tuple[str, list[int]]]) -> bytes:
    entries, at = {}, 0
    for key, (dtype, shape) in tensors.items():
        end = at + _SIZES[dtype] * int(np.prod(shape, dtype=int))
        entries[key] = {"dtype": dtype, "shape": shape, "data_offsets": [at, end]}
        at = end
    return raw_safetensors(entries, bytes(at))


def read(config: dict[str, Any], weights: bytes) -> le.Adapter:
    checked = peft_config.PeftConfig.read(json.dumps(config).encode(), "config")
    return peft_tensors.to_adapter(
        peft_tensors.read_tensors(weights, "weights"), checked, "weights"
    )


@given(st.dictionaries(config_keys, json_values, max_size=2), tensors)
def test_random_files_raise_format_errors_only(changes, more):
    files = ({**BASE, **changes}, weights_of({**PARTS["linear"], **more}))
    try:
        read(*files)
    except le.FormatError:
        with pytest.raises(le.FormatError, match=r"^(config|weights)[^\0]{0,990}$"):
            read(*files)


keys = st.sampled_from(["q", "e", "^q", "(q|e)", ".*", "q|x", "other"])
sane = st.fixed_dictionaries(
    {},
    optional={
        "lora_alpha": st.floats(-1e3, 1e3),
        "use_rslora": st.booleans(),
        "rank_pattern": st.dictionaries(keys, st.just(2), max_size=2),
        "alpha_pattern": st.dictionaries(keys, st.floats(-9, 9), max_size=3),
        "bias": st.sampled_from(["none", "all", "lora_only"]),
        "target_modules": json_values,
        "modules_to_save": st.sampled_from([None, ["head"]]),
        "of_later": json_values,
    },
)


@given(sane, st.sets(st.sampled_from(sorted(set(PARTS) - {"linear"}))), st.booleans())
def test_any_parts_are_read_and_written_back_the_same(changes, parts, keep_config):
    """With the config's own scalings, or all of them said anew."""
    parts = parts - ({"embedding", "base"} if "lora_bias" in parts else set())
    parts = parts - ({"base"} if "embedding" not in parts else set())
    made = {key: t for part in ("linear", *sorted(parts)) for key, t in PARTS[part].items()}
    config, weights = {**BASE, "lora_bias": "lora_bias" in parts, **changes}, weights_of(made)
    adapter = read(config, weights)
    assert set(peft_tensors.to_tensors(adapter)) == set(made)
    kept = adapter if keep_config else replace(adapter, peft_config={}, targets=frozenset())
    data = json.loads(peft_config.to_json(kept))
    if keep_config:
        assert repr({key: data[key] for key in config}) == repr(config)
    again = read(data, weights_bytes(adapter))
    assert weights_bytes(again) == weights_bytes(adapter)
    for kind in ("modules", "embeddings"):
        for name, w in getattr(adapter, kind).items():
            scaling = getattr(again, kind)[name].scaling
            assert scaling == pytest.approx(w.scaling, rel=1e-15, abs=0)


def weights_bytes(adapter: le.Adapter) -> bytes:
    from lora_engine.safetensors_file import to_bytes

    return to_bytes(peft_tensors.to_tensors(adapter))
