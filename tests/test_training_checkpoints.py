"""Checkpoints of a TrainingPipeline: the same bits, kills, other configurations, damage."""

from __future__ import annotations

import json
import signal
from types import SimpleNamespace

import numpy as np
import pytest
from helpers_files import (
    check_refusal,
    header_of,
    raw_safetensors,
    run_python,
    trained,
    weight_bits,
)
from helpers_training import TARGET, drawn, samples, started

import lora_engine as le
from lora_engine import safetensors_file
from lora_engine.learning import checkpoint, protection

OPTIMIZERS = pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
CONFIG = {
    "learning_rate": 0.02, "batch_size": 3, "lr_schedule": "one_cycle", "warmup_steps": 2,
    "total_steps": 30, "weight_decay": 0.1, "seed": 4,
}  # fmt: skip


def made(optimizer: str, **more):
    """A pipeline over two modules, with dropout: its masks go on too."""
    shapes = {"k": (7, 3)}
    lora = trained(7, 5, target_modules=("q", "k"), shapes=shapes, dropout=0.2, seed=9)
    return started(lora, optimizer=optimizer, **{**CONFIG, **more})


def steps(lora, pipe, first: int, last: int) -> None:
    """Steps of both modules; 3 rows are a batch, so these ranges leave some waiting."""
    for i in range(first, last):
        x, y = drawn(1, i)[0]
        pipe.train_step(lora, x, TARGET(y), module="q")
        if i % 2:
            pipe.train_step(lora, x, TARGET(y[:3]), module="k")


def whole_state(lora, pipe, path) -> bytes:
    pipe.save(lora, path)
    return path.read_bytes()


IN_A_FRESH_PROCESS = """
import sys
sys.path.insert(0, {tests!r})
from pathlib import Path
from test_training_checkpoints import made, samples, steps
lora, pipe = made({optimizer!r})
pipe.load(lora, {path!r})
{go_on}
pipe.save(lora, {path!r})
"""


def go_on_elsewhere(path, optimizer: str, what: str) -> None:
    tests = str(__import__("pathlib").Path(__file__).parent)
    text = IN_A_FRESH_PROCESS.format(tests=tests, path=str(path), optimizer=optimizer, go_on=what)
    child = run_python("-c", text)
    assert child.returncode == 0, child.stderr


@OPTIMIZERS
def test_resumed_steps_give_the_same_bits(optimizer, tmp_path):
    lora, pipe = made(optimizer)
    steps(lora, pipe, 0, 10)
    pipe.save(lora, tmp_path / "half")
    assert lora._modules["q"].samples  # a batch is under way
    steps(lora, pipe, 10, 20)
    go_on_elsewhere(tmp_path / "half", optimizer, "steps(lora, pipe, 10, 20)")
    assert (tmp_path / "half").read_bytes() == whole_state(lora, pipe, tmp_path / "whole")
    assert pipe.steps("q") == 6


@OPTIMIZERS
def test_resumed_epochs_give_the_same_bits(optimizer, tmp_path):
    lora, pipe = made(optimizer)
    pipe.train(lora, samples(8), module="q", epochs=2, checkpoint=tmp_path / "half")
    pipe.train(lora, samples(8), module="q", epochs=2)
    go_on_elsewhere(
        tmp_path / "half", optimizer, "pipe.train(lora, samples(8), module='q', epochs=2)"
    )
    assert (tmp_path / "half").read_bytes() == whole_state(lora, pipe, tmp_path / "whole")
    other, once = made(optimizer)
    once.train(other, samples(8), module="q", epochs=4)
    assert weight_bits(other) == weight_bits(lora)


@OPTIMIZERS
def test_resumed_validation_gives_the_same_bits(optimizer, monkeypatch, tmp_path):
    """Cut after an epoch that is worse than the best: the best weights, losses and patience."""
    given = samples(8, quality=1.0)
    held = [s._replace(output_embedding=0.3 * s.output_embedding) for s in given]
    options = {"module": "q", "validation": held, "patience": 6}
    rates = {"total_steps": 60, "learning_rate": 0.3 if optimizer == "sgd" else 0.1}
    lora, pipe = made(optimizer, **rates)
    history = pipe.train(lora, given, epochs=12, **options)
    assert 0 < history.best_epoch < 11
    other, cut = made(optimizer, **rates)
    save, saved = checkpoint.save, []

    def saves(*args):
        save(*args)
        saved.append(1)
        if len(saved) == history.best_epoch + 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "save", saves)
    with pytest.raises(KeyboardInterrupt):
        cut.train(other, given, epochs=12, checkpoint=tmp_path / "half", **options)
    monkeypatch.undo()
    resumed, again = made(optimizer, **rates)
    again.load(resumed, tmp_path / "half")
    rest = again.train(resumed, given, epochs=12 - len(saved), **options)
    assert rest[1:3] == history[1:3]
    assert rest.stopped == history.stopped
    assert len(history.losses) == len(saved) + len(rest.losses)
    assert whole_state(resumed, again, tmp_path / "a") == whole_state(lora, pipe, tmp_path / "b")


def by_quality(lora, pipe, first: int, last: int) -> None:
    for i in range(first, last):
        x, y = drawn(1, i)[0]
        delta = lora.forward(x, "q", explore=0.3)
        feedback = le.Feedback.from_quality(1.0 / (1.0 + float(delta @ y) ** 2))
        pipe.train_step(lora, x, feedback, module="q")


def test_resumed_learning_by_quality_gives_the_same_bits(tmp_path):
    """The baseline and the noise of exploration go on."""
    lora, pipe = made("sgd")
    by_quality(lora, pipe, 0, 8)
    pipe.save(lora, tmp_path / "checkpoint")
    by_quality(lora, pipe, 8, 20)
    other, resumed = made("sgd")
    by_quality(other, resumed, 50, 55)
    resumed.load(other, tmp_path / "checkpoint")
    assert other._modules["q"].samples == 1
    assert other._modules["q"].rated  # its step is to be bounded
    by_quality(other, resumed, 8, 20)
    assert weight_bits(other) == weight_bits(lora)
    assert other._modules["q"].baseline.value == lora._modules["q"].baseline.value
    assert other._modules["k"].baseline.value is None


def test_a_save_changes_nothing_and_repeats_itself(tmp_path):
    lora, pipe = made("adamw")
    steps(lora, pipe, 0, 8)
    first = whole_state(lora, pipe, tmp_path / "a")
    assert whole_state(lora, pipe, tmp_path / "b") == first
    pipe.load(lora, tmp_path / "a")
    assert whole_state(lora, pipe, tmp_path / "b") == first


def test_a_load_needs_no_start_and_drops_what_was(tmp_path):
    lora, pipe = made("adamw")
    steps(lora, pipe, 0, 6)
    state = whole_state(lora, pipe, tmp_path / "a")
    steps(lora, pipe, 6, 13)
    pipe.load(lora, tmp_path / "a")
    assert whole_state(lora, pipe, tmp_path / "b") == state
    fresh = trained(7, 5, draw=8, target_modules=("q", "k"), shapes={"k": (7, 3)}, dropout=0.2,
                    seed=9)  # fmt: skip
    other = le.TrainingPipeline(pipe.config)
    other.load(fresh, tmp_path / "a")
    assert whole_state(fresh, other, tmp_path / "b") == state


# ---- kills ------------------------------------------------------------------

KILLED = """
import os, signal, sys
sys.path.insert(0, {tests!r})
from test_training_checkpoints import made, steps
lora, pipe = made("adamw")
pipe.load(lora, {path!r})
steps(lora, pipe, 6, 12)
plain, calls = getattr(os, {call!r}), 0
def killed(*args):
    if {before}:
        os.kill(os.getpid(), signal.SIGKILL)
    result = plain(*args)
    os.kill(os.getpid(), signal.SIGKILL)
os.{call} = killed
pipe.save(lora, {path!r})
"""


@pytest.mark.parametrize(
    ("call", "before", "new"),
    [("fsync", True, False), ("fsync", False, False), ("replace", True, False),
     ("replace", False, True)],
    ids=["before-fsync", "after-fsync", "before-rename", "after-rename"],
)  # fmt: skip
def test_a_kill_leaves_the_old_checkpoint_or_the_new(call, before, new, tmp_path):
    lora, pipe = made("adamw")
    steps(lora, pipe, 0, 6)
    path = tmp_path / "checkpoint"
    old = whole_state(lora, pipe, path)
    tests = str(__import__("pathlib").Path(__file__).parent)
    text = KILLED.format(tests=tests, path=str(path), call=call, before=before)
    child = run_python("-c", text)
    assert child.returncode == -signal.SIGKILL, child.stderr
    assert (path.read_bytes() != old) == new
    pipe.load(lora, path)
    assert pipe.steps("q") == (4 if new else 2)
    pipe.save(lora, path)
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint"]  # what was left is swept


# ---- what is refused --------------------------------------------------------


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """A checkpoint with everything in it, and what it holds."""
    lora, pipe = made("adamw")
    steps(lora, pipe, 0, 10)
    path = tmp_path_factory.mktemp("kept") / "checkpoint"
    pipe.save(lora, path)
    data = path.read_bytes()
    tensors, metadata = safetensors_file.from_bytes(data, "kept")
    return SimpleNamespace(
        path=path, data=data, tensors=tensors, state=json.loads(metadata[checkpoint.KEY])
    )


def refused(error, match, path, lora, pipe, tmp_path):
    """A load that raises and leaves all as it was."""
    before = whole_state(lora, pipe, tmp_path / "before")
    with pytest.raises(error, match=match) as caught:
        pipe.load(lora, path)
    assert whole_state(lora, pipe, tmp_path / "after") == before
    return caught


OTHER = {
    "learning_rate": 0.5, "quality_threshold": 0.6, "fisher_samples": 7, "ewc_form": "factor",
    "online_ewc_gamma": 0.5, "optimizer": "sgd", "lr_schedule": "cosine", "warmup_steps": 3,
    "total_steps": 31, "lr_gamma": 0.5, "lr_step_size": 4, "batch_size": 4,
    "max_grad_norm": None, "weight_decay": 0.2, "seed": 5,
}  # fmt: skip


@pytest.mark.parametrize("field", OTHER)
def test_another_training_configuration_is_refused(field, kept, tmp_path):
    lora, pipe = made(**{"optimizer": "adamw", field: OTHER[field]})
    steps(lora, pipe, 20, 24)
    match = rf"expected a checkpoint of TrainingConfig\({field}=.*\), got one of "
    refused(ValueError, match, kept.path, lora, pipe, tmp_path)


@pytest.mark.parametrize(
    ("field", "config"),
    [
        ("rank", {"rank": 3}), ("alpha", {"alpha": 5.0}), ("dropout", {"dropout": 0.3}),
        ("in_features", {"d_in": 8}), ("shapes", {"shapes": {"k": (7, 4)}}),
        ("target_modules", {"target_modules": ("k", "q")}), ("seed", {"seed": 1}),
        ("use_rslora", {"use_rslora": True}),
    ],
)  # fmt: skip
def test_another_adapter_is_refused(field, config, kept, tmp_path):
    plain = {"d_in": 7, "d_out": 5, "target_modules": ("q", "k"), "shapes": {"k": (7, 3)},
             "dropout": 0.2, "seed": 9}  # fmt: skip
    lora, pipe = started(trained(**{**plain, **config}), optimizer="adamw", **CONFIG)
    match = rf"expected a checkpoint of MicroLoRAConfig\({field}="
    refused(ValueError, match, kept.path, lora, pipe, tmp_path)


def test_a_cut_file_is_refused_wherever_it_is_cut(kept, tmp_path):
    lora, pipe = made("adamw")
    path = tmp_path / "cut"
    rng = np.random.default_rng(0)
    for end in [0, 1, 7, 8, 9, len(kept.data) - 1, *rng.integers(0, len(kept.data), 30)]:
        path.write_bytes(kept.data[:end])
        check_refusal(refused(le.FormatError, "expected", path, lora, pipe, tmp_path), str(path))


def test_a_flipped_bit_is_refused_wherever_it_is(kept, tmp_path):
    lora, pipe = made("adamw")
    path, before = tmp_path / "flipped", weight_bits(lora)
    for at in range(0, len(kept.data), 5):
        data = bytearray(kept.data)
        data[at] ^= 1
        path.write_bytes(data)
        with pytest.raises(ValueError):  # FormatError, or a configuration that became another
            pipe.load(lora, path)
    assert weight_bits(lora) == before
    assert pipe.steps("q") == 0


def rewritten(kept, path, tensors=None, **state):
    """The checkpoint with changes, and a digest that fits them."""
    tensors = {**kept.tensors, **(tensors or {})}
    tensors = {k: v for k, v in tensors.items() if v is not None}
    whole = {**kept.state, **state}
    if "sha256" not in state:
        whole["sha256"] = checkpoint.content_digest(tensors, whole)
    path.write_bytes(safetensors_file.to_bytes(tensors, checkpoint.KEY, json.dumps(whole)))
    return path


MODULE = {"steps": 1, "adapts": 1, "waiting": 1, "refused": 0, "rated": False}
KEPT = {"best.A": np.ones((2, 7), "f4"), "best.B": np.ones((5, 2), "f4")}
BEST = {"digest": "q: 1 2", "epoch": 0}


@pytest.mark.parametrize(
    ("match", "changes"),
    [
        ("format: expected 2, got 1", {"format": 1}),
        ("TrainingConfig: expected an object, got None", {"TrainingConfig": None}),
        ("modules: expected an object", {"modules": []}),
        ("modules: k: expected steps", {"modules": {"q": MODULE}}),
        ("modules: q: expected steps", {"modules": {"q": {**MODULE, "steps": -1}, "k": MODULE}}),
        ("modules: q: expected steps", {"modules": {"q": {**MODULE, "adapts": 1.5}, "k": MODULE}}),
        ("modules: q: expected steps", {"modules": {"q": {**MODULE, "waiting": True},
                                                    "k": MODULE}}),
        ("modules: q: baseline: expected a number",
         {"modules": {"q": {**MODULE, "baseline": 1.5}, "k": MODULE}}),
        ("modules: q: baseline: expected a number",
         {"modules": {"q": {**MODULE, "baseline": True}, "k": MODULE}}),
        ("modules: q: rated: expected true",
         {"modules": {"q": {**MODULE, "rated": 1}, "k": MODULE}}),
        ("best: expected digest", {"best": {"epoch": 0}}),
        ("best: digest: expected one of a module", {"best": {**BEST, "digest": "v: 1 2"}}),
        ("best.A: expected finite float32 .2, 7.", {"best": BEST}),
        ("best.losses: expected float64", {"best": BEST, "tensors": KEPT}),
        ("best: epoch: expected a number from 0 to 1",
         {"best": {**BEST, "epoch": 2}, "tensors": {**KEPT, "best.losses": np.ones(2)}}),
        ("best.A: expected the tensors of the conf", {"tensors": KEPT}),
        ("exploration: expected state", {"exploration": None}),
        ("exploration: state: expected a number of 128 bits",
         {"exploration": {"state": 1 << 128, "has_uint32": 0, "uinteger": 0}}),
        ("EWC state: .*: expected a key", {"tensors": {"ewc.what": np.ones(3, "f4")}}),
        ("order: expected an object", {"order": 3}),
        ("order: expected epoch", {"order": {"epoch": -1, "position": 0, "digest": ""}}),
        ("order: digest: expected text", {"order": {"epoch": 1, "position": 0, "digest": 2}}),
        ("ewc: expected an object", {"ewc": None}),
        ("sha256: expected the digest", {"sha256": "0"}),
        ("modules.q.A: expected the tensors", {"tensors": {"modules.q.A": None}}),
        ("modules.k.first_moment: .* no more", {"tensors": {"modules.k.first_moment": None}}),
        ("modules.z.A: expected the tensors", {"tensors": {"modules.z.A": np.ones(3, "f4")}}),
        ("modules.q.A: expected finite float32", {"tensors": {"modules.q.A": np.ones((2, 8))}}),
        ("modules.q.A: expected finite float32", {"tensors": {"modules.q.A": np.ones((2, 7))}}),
        ("modules.q.B: expected finite float32", {"tensors": {"modules.q.B":
                                                              np.full((5, 2), np.nan, "f4")}}),
        ("modules.q.second_moment: expected squares",
         {"tensors": {"modules.q.second_moment": np.full(24, -1, "f4")}}),
    ],
)  # fmt: skip
def test_content_that_does_not_fit_is_named(match, changes, kept, tmp_path):
    lora, pipe = made("adamw")
    path = rewritten(kept, tmp_path / "changed", **changes)
    check_refusal(refused(le.FormatError, match, path, lora, pipe, tmp_path), str(path))


def test_an_unchanged_rewrite_is_taken(kept, tmp_path):
    lora, pipe = made("adamw")
    pipe.load(lora, rewritten(kept, tmp_path / "same"))
    assert whole_state(lora, pipe, tmp_path / "again") == kept.data


@pytest.mark.parametrize("metadata", [..., {"format": "pt"}, {checkpoint.KEY: "["}])
def test_another_safetensors_file_is_refused(metadata, tmp_path):
    lora, pipe = made("sgd")
    path = tmp_path / "other"
    path.write_bytes(raw_safetensors({}, metadata=metadata))
    assert "lora_engine_training" in str(
        refused(le.FormatError, "expected", path, lora, pipe, tmp_path).value
    )


def test_a_missing_file_and_another_lora_are_refused(tmp_path):
    lora, pipe = made("sgd")
    refused(FileNotFoundError, "nothing", tmp_path / "nothing", lora, pipe, tmp_path)
    with pytest.raises(TypeError, match="load: lora: expected a MicroLoRA, got str"):
        pipe.load("lora", tmp_path / "nothing")
    with pytest.raises(ValueError, match="save: lora: expected the one of init_for_lora"):
        pipe.save(trained(), tmp_path / "nothing")
    with pytest.raises(ValueError, match="expected the one of init_for_lora, got none"):
        le.TrainingPipeline().save(lora, tmp_path / "nothing")


def test_metadata_is_one_entry(kept):
    """safetensors writes several in any order: the same state would give other bytes."""
    assert list(header_of(kept.data)["__metadata__"]) == [checkpoint.KEY]


class Kept:
    """An EWC of which only the state matters; refuses a negative count."""

    def __init__(self, lora, config):
        self.values = {"q.count": np.zeros(2, "f4")}

    def state(self):
        return dict(self.values)

    def load_state(self, state):
        if state["q.count"].min() < 0:
            raise ValueError("EWC.load_state: q.count: expected 0 or more")
        self.values = dict(state)


def test_the_state_of_ewc_goes_with_it(monkeypatch, tmp_path):
    monkeypatch.setattr(protection, "_new_ewc", Kept)
    lora, pipe = made("adamw", ewc_lambda=1.0)
    pipe._protection.ewc.values["q.count"] = np.array([1, 2], "f4")
    path = tmp_path / "checkpoint"
    pipe.save(lora, path)
    other, again = made("adamw", ewc_lambda=1.0)
    again.load(other, path)
    assert again._protection.ewc.values["q.count"].tolist() == [1, 2]


def test_where_ewc_refuses_its_part_all_is_as_it_was(monkeypatch, tmp_path):
    monkeypatch.setattr(protection, "_new_ewc", Kept)
    lora, pipe = made("adamw", ewc_lambda=1.0)
    pipe._protection.ewc.values["q.count"] = np.array([-1, 2], "f4")
    path = tmp_path / "checkpoint"
    pipe.save(lora, path)
    other, again = made("adamw", ewc_lambda=1.0)
    again._protection.ewc.values["q.count"] = np.array([3, 4], "f4")
    steps(other, FreeOfEwc(again), 0, 7)
    refused(ValueError, "q.count: expected 0 or more", path, other, again, tmp_path)
    assert again._protection.ewc.values["q.count"].tolist() == [3, 4]


class FreeOfEwc:
    """train_step where the stand-in knows no steps: gradients wait, none is applied."""

    def __init__(self, pipe):
        self.pipe = pipe

    def train_step(self, lora, x, feedback, module):
        grad = feedback.output_gradient(lora, x, module)
        self.pipe._accumulate(lora._module(module), x, grad)
