"""Config files that are damaged or made to harm, and missing files."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from helpers_files import (
    CONFIG,
    FILES,
    KEPT,
    OWN,
    STATE,
    WEIGHTS,
    check_refusal,
    edit_config,
    saved,
    trained,
    weight_bits,
)

import lora_engine as le

# ---- hostile configs --------------------------------------------------------

CONFIGS = {
    "peft_type-none": ("peft_type", {"peft_type": None}),
    "peft_type-IA3": ("peft_type", {"peft_type": "IA3"}),
    "r-0": ("r", {"r": 0}),
    "r-minus-1": ("r", {"r": -1}),
    "r-10^12": ("r", {"r": 10**12}),
    "r-10^400": ("r", {"r": 10**400}),
    "r-1.5": ("r", {"r": 1.5}),
    "r-text": ("r", {"r": "2"}),
    "r-true": ("r", {"r": True}),
    "r-null": ("r", {"r": None}),
    "r-list": ("r", {"r": [2]}),
    "r-nan": ("r", {"r": float("nan")}),
    "r-infinity": ("r", {"r": float("inf")}),
    "r-3": (r"q: expected A \[3, 6\]", {"r": 3}),
    "alpha-text": ("lora_alpha", {"lora_alpha": "4"}),
    "alpha-nan": ("lora_alpha", {"lora_alpha": float("nan")}),
    "alpha-10^400": ("lora_alpha", {"lora_alpha": 10**400}),
    "alpha-1e300": ("lora_alpha", {"lora_alpha": 1e300}),
    "alpha-null": ("lora_alpha", {"lora_alpha": None}),
    "alpha-long-list": ("lora_alpha", {"lora_alpha": [0] * 10_000}),
    "dropout-1": ("lora_dropout", {"lora_dropout": 1.0}),
    "dropout-negative": ("lora_dropout", {"lora_dropout": -0.5}),
    "dropout-null": ("lora_dropout", {"lora_dropout": None}),
    "rslora-text": ("use_rslora", {"use_rslora": "false"}),
    "rslora-1": ("use_rslora", {"use_rslora": 1}),
    "dora": ("use_dora", {"use_dora": True}),
    "qalora": ("use_qalora", {"use_qalora": True}),
    "bdlora": ("use_bdlora", {"use_bdlora": {"nblocks": 2}}),
    "kasa": ("kasa_config", {"kasa_config": {"beta": 1}}),
    "alora": ("alora_invocation_tokens", {"alora_invocation_tokens": [1, 2]}),
    "lora_bias": ("lora_bias", {"lora_bias": True}),
    "rank_pattern": ("rank_pattern", {"rank_pattern": {"q": 3}}),
    "rank_pattern-regex": ("rank_pattern", {"rank_pattern": {"(a+)+$": 3}}),
    "alpha_pattern": ("alpha_pattern", {"alpha_pattern": {"q": 3}}),
    "modules_to_save": ("modules_to_save", {"modules_to_save": ["lm_head"]}),
    "bias-all": ("bias", {"bias": "all"}),
    "bias-list": ("bias", {"bias": []}),
}


@pytest.mark.parametrize("what", CONFIGS)
def test_hostile_config_is_refused(what, tmp_path):
    folder = saved(tmp_path)
    names, changes = CONFIGS[what]
    edit_config(folder, **changes)
    where = WEIGHTS if what == "r-3" else CONFIG
    with pytest.raises(le.FormatError, match=f"{names}: ?" if where == CONFIG else names) as caught:
        le.MicroLoRA.load(folder)
    check_refusal(caught, str(folder / where))
    assert str(caught.value).count(str(folder)) == 1


NO_CONFIGS = {
    "empty": b"",
    "null": b"null",
    "array": b"[]",
    "text": b'"LORA"',
    "number": b"1e999",
    "cut": b'{"r": 2',
    "deep": b"[" * 100_000,
    "deep-object": b'{"a":' * 100_000,
    "deep-inside": b'{"r": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "huge": b'{"r": 2, "x": "' + b"x" * (2 << 20) + b'"}',
    "huge-spaces": b'{"r": 2}' + b" " * (2 << 20),
    "not-utf8": b'{"peft_type": "\xff"}',
    "utf16": '{"r": 2}'.encode("utf-16"),
    "bom": b"\xef\xbb\xbf{}",
    "many-digits": b'{"r": ' + b"1" * 100_000 + b"}",
    "nul": b'{"r": 2}\0',
}


@pytest.mark.parametrize("what", NO_CONFIGS)
def test_config_that_is_no_json_object_is_refused(what, tmp_path):
    folder = saved(tmp_path)
    (folder / CONFIG).write_bytes(NO_CONFIGS[what])
    with pytest.raises(le.FormatError, match=f"{CONFIG}: expected") as caught:
        le.MicroLoRA.load(folder)
    check_refusal(caught, str(folder / CONFIG))


@pytest.mark.parametrize(
    ("listed", "order"),
    [
        (["b", "a"], ("b", "a")),
        (["a", "b"], ("a", "b")),
        (["b", "b", "a"], ("b", "a")),
        (["c", "b"], ("b", "a")),
        (["b", ["a"], {}, 3, None], ("b", "a")),
        ([], ("a", "b")),
        ("all-linear", ("a", "b")),
        ("(a+)+$", ("a", "b")),
        (None, ("a", "b")),
        (3, ("a", "b")),
        ({"a": 1}, ("a", "b")),
    ],
    ids=repr,
)
def test_modules_come_from_the_weights_in_the_listed_order(listed, order, tmp_path):
    lora = trained(target_modules=("b", "a"))
    folder = saved(tmp_path, lora)
    (folder / STATE).unlink()
    edit_config(folder, target_modules=listed)
    loaded = le.MicroLoRA.load(folder)
    assert loaded.config.target_modules == order
    assert weight_bits(loaded) == weight_bits(lora)


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
@pytest.mark.parametrize("instead", ["nothing", "folder", "pipe", "dangling link"])
def test_missing_file_is_named(name, instead, tmp_path):
    folder = saved(tmp_path)
    (folder / name).unlink()
    if instead == "folder":
        (folder / name).mkdir()
    elif instead == "pipe":
        os.mkfifo(folder / name)
    elif instead == "dangling link":
        (folder / name).symlink_to("nowhere")
    with pytest.raises(FileNotFoundError, match=f"{name}: expected an adapter folder's file"):
        le.MicroLoRA.load(folder)


def test_missing_folder_is_named(tmp_path):
    (tmp_path / "file").write_text("x")
    for folder in ("nowhere", "file", "file/below"):
        with pytest.raises((FileNotFoundError, NotADirectoryError), match=folder):
            le.MicroLoRA.load(tmp_path / folder)


def test_files_may_be_links(tmp_path):
    """As in the hub's cache, where a folder links to blobs."""
    folder = saved(tmp_path)
    for name in FILES:
        (folder / name).rename(tmp_path / name)
        (folder / name).symlink_to(Path("..") / name)
    assert weight_bits(le.MicroLoRA.load(folder)) == OWN
    assert not caught_by_links(folder, tmp_path)


def caught_by_links(folder: Path, blobs: Path) -> list[str]:
    """Saves over the links and returns the blobs that it changed."""
    before = {name: (blobs / name).read_bytes() for name in FILES}
    trained(draw=9).save(folder)
    assert weight_bits(le.MicroLoRA.load(folder)) == KEPT
    return [name for name in FILES if (blobs / name).read_bytes() != before[name]]
