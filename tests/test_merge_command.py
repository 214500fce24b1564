"""``lora-engine merge``, and merging folders that PEFT wrote."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers_merge import Base, delta, deltas, gap, layers, peft_model, random_adapter

import lora_engine as le
from lora_engine import cli
from lora_engine.merge_command import folder_and_weight


def merge(*args) -> int:
    return cli.main(["merge", *map(str, args)])


@pytest.fixture
def folders(tmp_path):
    for seed, name in ((1, "a"), (2, "b")):
        adapter = random_adapter(seed, {"m.q": 3, "m.v": 2 + seed}, 0.5)
        replace(adapter, peft_config={"base_model_name_or_path": "some/base"}).save(tmp_path / name)
    return tmp_path


def files(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def test_what_it_writes_and_says(folders, capsys):
    a, b, out = (folders / name for name in ("a", "b", "out"))
    assert merge(out, a, f"{b}:-0.25", "--rank", 4) == 0
    lines = capsys.readouterr().out.splitlines()
    merged = le.Adapter.load(out)
    assert merged.peft_config["base_model_name_or_path"] == "some/base"
    want = le.merge_adapters([(a, 1.0), (b, -0.25)], rank=4)
    parts = deltas(le.Adapter.load(a)), deltas(le.Adapter.load(b))
    for name, lora in merged.modules.items():
        assert lora.A.tobytes() == want.modules[name].A.tobytes()
        assert lora.B.tobytes() == want.modules[name].B.tobytes()
        full = parts[0][name] - 0.25 * parts[1][name]
        line = next(line for line in lines if line.startswith(name))
        _, ranks, rank, error = line.split()
        assert ranks == {"m.q": "3+3", "m.v": "3+4"}[name]
        assert rank == "4"
        assert float(error.rstrip("%")) == pytest.approx(100 * gap(delta(lora), full), abs=0.006)
    assert lines[-1].startswith(f"svd of 1 {a}, -0.25 {b}: 2 modules, ")


def test_a_folder_that_exists_is_left_alone_without_force(folders, capsys):
    a, b = folders / "a", folders / "b"
    before = files(b)
    assert merge(b, a) == 1
    assert f"{b}: expected a new folder, got one that exists" in capsys.readouterr().err
    assert files(b) == before
    assert merge(b, a, f"{b}:1", "--force") == 0
    want = le.merge_adapters([(a, 1.0), (folders / "a", 0.0)])
    assert len(le.Adapter.load(b).modules["m.q"].A) == 6
    assert len(want.modules["m.q"].A) == 3


@pytest.mark.parametrize(
    ("other", "args", "message"),
    [
        (random_adapter(3, {"m.q": 3}, size=(24, 21)), [], "c: m.q: expected .*got \\(24, 21\\)"),
        (random_adapter(3, {"m.q": 4}), ["--method", "ties", "--density", "0.5"], "c: m.q: .*rank"),
        (random_adapter(3, {"m.q": 4}), ["--method", "ties"], "density: expected"),
        (None, [], "c.adapter_config.json: expected an adapter folder's file, got none"),
    ],
    ids=["shape", "rank", "density", "missing"],
)  # fmt: skip
def test_what_does_not_fit_is_named_and_nothing_written(other, args, message, folders, capsys):
    if other is not None:
        other.save(folders / "c")
    before = sorted(p.name for p in folders.iterdir())
    assert merge(folders / "out", folders / "a", folders / "c", *args) == 1
    import re

    assert re.search(message, capsys.readouterr().err)
    assert sorted(p.name for p in folders.iterdir()) == before


def test_ctrl_c_leaves_the_folder_as_it_was(folders, monkeypatch, capsys):
    from lora_engine.adapters import merge as module

    before = files(folders / "b")
    merged_module, done = module._merged_module, []

    def interrupted(name, *args):
        if done:
            raise KeyboardInterrupt
        done.append(name)
        return merged_module(name, *args)

    monkeypatch.setattr(module, "_merged_module", interrupted)
    assert merge(folders / "b", folders / "a", folders / "b", "--force") == 130
    assert files(folders / "b") == before
    assert sorted(p.name for p in folders.iterdir()) == ["a", "b"]


def test_a_damaged_folder_is_refused(folders, capsys):
    (folders / "a" / "adapter_model.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{]      ")
    assert merge(folders / "out", folders / "a", folders / "b") == 1
    assert "adapter_model.safetensors" in capsys.readouterr().err
    assert not (folders / "out").exists()


def test_weights_of_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x:2").mkdir()
    assert folder_and_weight("a") == ("a", 1.0)
    assert folder_and_weight("a:0.5") == ("a", 0.5)
    assert folder_and_weight("a:-1e-2") == ("a", -0.01)
    assert folder_and_weight("x:2") == ("x:2", 1.0)
    assert folder_and_weight("c:/a") == ("c:/a", 1.0)


def test_as_a_process(folders):
    command = [sys.executable, "-m", "lora_engine.cli", "merge", "out", "a:0.5", "b:0.5"]
    done = subprocess.run(command, cwd=folders, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads((folders / "out" / "adapter_config.json").read_text())["peft_type"] == "LORA"


def test_many_modules_are_summed_up(tmp_path, capsys):
    for seed in (1, 2):
        random_adapter(seed, {f"m{i}": 2 for i in range(45)}).save(tmp_path / str(seed))
    assert merge(tmp_path / "out", tmp_path / "1", tmp_path / "2", "--rank", 2) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + 40 + 2
    errors = [float(line.split()[-1].rstrip("%")) for line in lines[1:41]]
    assert errors == sorted(errors, reverse=True)
    assert lines[-2].startswith("and 5 modules of which at most ")


@pytest.mark.parametrize("use_rslora", [False, True], ids=["alpha/r", "rslora"])
def test_folders_of_peft_merged_and_loaded_again(use_rslora, tmp_path):
    from peft import PeftModel

    def quietly(call, *args, **kwargs):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return call(*args, **kwargs)

    configs = {
        "a": {"r": 3, "lora_alpha": 5, "rank_pattern": {"second": 5}, "use_rslora": use_rslora},
        "b": {"r": 2, "target_modules": ["first"], "use_rslora": use_rslora},
    }
    model = peft_model(configs)
    quietly(model.save_pretrained, tmp_path)
    merged = le.merge_adapters([(tmp_path / "a", 0.7), (tmp_path / "b", -1.2)])
    merged.save(tmp_path / "merged")
    again = quietly(PeftModel.from_pretrained, Base(), tmp_path / "merged").eval()
    tokens = torch.arange(30)
    got, base = again(tokens).detach(), Base()
    for name, layer in layers(model).items():
        want = 0.7 * quietly(layer.get_delta_weight, "a")
        if name == "first":
            want = want - 1.2 * layer.get_delta_weight("b")
        weight = getattr(base, name).weight.data
        weight += want.detach()
    assert np.allclose(got, base(tokens).detach(), rtol=1e-4, atol=1e-3)
    assert (got - Base()(tokens)).abs().max() > 1


def test_whole_tensors_are_kept_where_they_agree():
    head = {"score.weight": np.ones((2, 3), "f4")}
    config = {"modules_to_save": ["score"]}
    a = replace(random_adapter(1, {"q": 2}), modules_to_save=head, peft_config=config)
    b = random_adapter(2, {"q": 2})
    merged = le.merge_adapters([(b, 0.5), (a, 0.5)])
    assert merged.modules_to_save["score.weight"].tobytes() == head["score.weight"].tobytes()
    assert merged.peft_config["modules_to_save"] == ["score"]
    c = replace(b, modules_to_save={"score.weight": np.zeros((2, 3), "f4")})
    with pytest.raises(ValueError, match=r"adapters\[1\]: score.weight: expected the same"):
        le.merge_adapters([(a, 0.5), (c, 0.5)])
