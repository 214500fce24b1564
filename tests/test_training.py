"""TrainingPipeline.train: epochs, thresholds, held-out samples, Ctrl-C, what is refused."""

from __future__ import annotations

import io
import signal
import sys
import threading

import numpy as np
import pytest
from helpers_files import weight_bits
from helpers_training import TARGET, samples, started

import lora_engine as le
from lora_engine import progress, reference
from lora_engine.learning import training

OPTIMIZERS = pytest.mark.parametrize("optimizer", ["sgd", "adamw"])


def loss_of(lora, held) -> float:
    """quality/2 ‖delta - target‖², mean over samples, in float64."""
    A, B, s = lora.weights("q")
    x, y = (np.stack([sample[i] for sample in held]) for i in (0, 1))
    gap = reference.lora_delta(x, A, B, s) - y
    return float((np.array([h.quality for h in held]) * (gap**2).sum(axis=1)).mean() / 2)


def test_an_epoch_is_a_step_a_sample_in_the_order_of_seed_and_epoch():
    given = samples(7)
    lora, pipe = started(learning_rate=0.02, seed=3)
    other, plain = started(learning_rate=0.02, seed=3)
    history = pipe.train(lora, given, module="q", epochs=2)
    losses = []
    for epoch in range(2):
        for i in np.random.default_rng([3, epoch]).permutation(7):
            x, y, quality = given[i][:3]
            losses.append(plain.train_step(other, x, TARGET(y, weight=quality), module="q").loss)
    for got, want in zip(lora.weights("q")[:2], other.weights("q")[:2], strict=True):
        assert np.allclose(got, want, rtol=1e-5, atol=1e-6)
    assert history.losses == pytest.approx([np.mean(losses[:7]), np.mean(losses[7:])], rel=1e-5)
    assert (history.steps, history.samples, history.stopped, history.note) == (
        14,
        7,
        "finished",
        "",
    )
    assert (history.validation_losses, history.best_epoch) == ((), 0)


@OPTIMIZERS
def test_the_last_batch_of_an_epoch_may_be_smaller(optimizer):
    lora, pipe = started(optimizer=optimizer, batch_size=3)
    assert pipe.train(lora, samples(7), module="q", epochs=2).steps == 6
    assert pipe.steps("q") == 6


@OPTIMIZERS
def test_training_lowers_the_loss_it_reports(optimizer):
    lora, pipe = started(optimizer=optimizer, learning_rate=0.02, batch_size=4)
    given = samples(16)
    before = loss_of(lora, given)
    history = pipe.train(lora, given, module="q", epochs=40, validation=given)
    assert history.validation_losses[0] == pytest.approx(before, rel=1e-5)
    assert min(history.validation_losses) == pytest.approx(loss_of(lora, given), rel=1e-5)
    assert loss_of(lora, given) < 0.6 * before
    assert len(history.losses) == 40
    assert len(history.validation_losses) == 41


def test_the_threshold_leaves_out_and_counts():
    good, bad = samples(5, quality=0.7), samples(4, seed=1, quality=0.69)
    mute = [s._replace(output_embedding=None) for s in samples(3, seed=2)]
    lora, pipe = started(quality_threshold=0.7)
    other, plain = started(quality_threshold=0.7)
    history = pipe.train(lora, [*bad[:2], *good, *mute, *bad[2:]], module="q")
    plain.train(other, good, module="q")
    assert weight_bits(lora) == weight_bits(other)
    assert (history.samples, history.below_threshold, history.without_target) == (5, 4, 3)


def test_with_nothing_to_imitate_it_says_so():
    lora, pipe = started()
    before = weight_bits(lora)
    for given in ([], samples(3, quality=0.1)):
        history = pipe.train(lora, given, module="q", epochs=5)
        assert "nothing was learned" in history.note
        assert (history.steps, history.losses) == (0, ())
    assert weight_bits(lora) == before


def test_feedback_by_quality_is_never_filtered():
    lora, pipe = started(quality_threshold=1.0)
    x = samples(1)[0].input_embedding
    for i, quality in enumerate((0.5, 0.0, 0.1, 0.9)):
        lora.forward(x, "q", explore=0.1)
        result = pipe.train_step(lora, x, le.Feedback.from_quality(quality), module="q")
        assert result.stepped is (i > 0), result.note


def test_total_steps_end_it():
    lora, pipe = started(lr_schedule="linear", total_steps=10)
    history = pipe.train(lora, samples(7), module="q", epochs=5, validation=samples(3, seed=1))
    assert (history.steps, history.stopped, len(history.losses)) == (10, "total_steps", 2)
    assert len(history.validation_losses) == 3
    again = pipe.train(lora, samples(7), module="q", epochs=5)
    assert (again.steps, again.stopped) == (0, "total_steps")
    assert "nothing was learned" in again.note


def diverging():
    """Samples, and held-out ones that training on them at first serves and then hurts."""
    given = samples(8, quality=1.0)
    held = [s._replace(output_embedding=0.3 * s.output_embedding) for s in given]
    return given, held


@OPTIMIZERS
def test_early_stopping_restores_the_best_weights(optimizer):
    given, held = diverging()
    config = {"optimizer": optimizer, "learning_rate": 0.01, "max_grad_norm": None}
    lora, pipe = started(**config)
    history = pipe.train(lora, given, module="q", epochs=200, validation=held, patience=3)
    assert history.stopped == "early stopping"
    best = history.best_epoch
    assert best == int(np.argmin(history.validation_losses))
    assert 0 < best == len(history.losses) - 3
    assert loss_of(lora, held) == pytest.approx(history.validation_losses[best], rel=1e-5)
    other, plain = started(**config)
    plain.train(other, given, module="q", epochs=best)
    assert weight_bits(lora) == weight_bits(other)


def test_weights_before_training_remain_where_all_others_are_worse():
    lora, pipe = started(learning_rate=0.1)
    x, _, _ = samples(1)[0][:3]
    held = [le.TrainingSample(x, lora.forward(x, "q"), 1.0)]
    before = weight_bits(lora)
    history = pipe.train(lora, samples(6), module="q", epochs=3, validation=held)
    assert (history.best_epoch, history.steps) == (0, 18)
    assert weight_bits(lora) == before


def test_patience_counts_epochs_without_an_improvement():
    lora, pipe = started(learning_rate=0.1)
    x = samples(1)[0].input_embedding
    held = [le.TrainingSample(x, lora.forward(x, "q"), 1.0)]
    history = pipe.train(lora, samples(6), module="q", epochs=50, validation=held, patience=2)
    assert (len(history.losses), history.stopped) == (2, "early stopping")


def test_blown_up_training_is_undone_by_validation():
    lora, pipe = started(learning_rate=1e4, max_grad_norm=None)
    before = weight_bits(lora)
    with np.errstate(all="ignore"):
        history = pipe.train(lora, samples(6), module="q", epochs=4, validation=samples(3, seed=1))
    assert history.refused > 0
    assert weight_bits(lora) == before


# ---- Ctrl-C -----------------------------------------------------------------


def press_at(monkeypatch, pipe, step: int, times: int = 1) -> None:
    """Ctrl-C in the middle of a step."""
    plain, taken = pipe._step, 0

    def pressed(m, module):
        nonlocal taken
        taken += 1
        result = None
        if taken == step:
            for _ in range(times):
                signal.raise_signal(signal.SIGINT)
        result = plain(m, module)
        return result

    monkeypatch.setattr(pipe, "_step", pressed)


@OPTIMIZERS
def test_ctrl_c_ends_the_step_and_training_goes_on_from_there(optimizer, monkeypatch, tmp_path):
    config = {"optimizer": optimizer, "batch_size": 2, "learning_rate": 0.01}
    given, path = samples(9), tmp_path / "checkpoint"
    lora, pipe = started(**config)
    press_at(monkeypatch, pipe, 7)
    with pytest.raises(KeyboardInterrupt):
        pipe.train(lora, given, module="q", epochs=3, checkpoint=path)
    assert pipe.steps("q") == 7
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    other, whole = started(**config)
    whole.train(other, given, module="q", epochs=3)
    resumed, again = started(**config)
    again.load(resumed, path)
    assert weight_bits(resumed) == weight_bits(lora)
    for one, runner in ((lora, pipe), (resumed, again)):
        history = runner.train(one, given, module="q", epochs=2)
        assert history.steps == 8
        assert weight_bits(one) == weight_bits(other)


@pytest.mark.parametrize("after", [4, 12])
def test_ctrl_c_keeps_the_best_weights_and_its_checkpoint_goes_on(after, monkeypatch, tmp_path):
    """Pressed while the best epoch is the last one measured, and after a worse one."""
    given, held = diverging()
    config = {"learning_rate": 0.02, "max_grad_norm": None}
    whole, plain = started(**config)
    history = plain.train(whole, given, module="q", epochs=12, validation=held)
    best = history.best_epoch
    assert 0 < best < 12
    lora, pipe = started(**config)
    press_at(monkeypatch, pipe, 8 * best + after)
    path = tmp_path / "checkpoint"
    with pytest.raises(KeyboardInterrupt):
        pipe.train(lora, given, module="q", epochs=12, validation=held, checkpoint=path)
    done = pipe.steps("q") // 8
    assert done == best + (after > 8)
    assert weight_bits(lora) == weight_bits(whole)
    resumed, again = started(**config)
    again.load(resumed, path)
    assert weight_bits(resumed) != weight_bits(whole)
    rest = again.train(resumed, given, module="q", epochs=12 - done, validation=held)
    assert rest[1:3] == history[1:3]
    assert weight_bits(resumed) == weight_bits(whole)


def test_an_epoch_of_other_samples_is_not_gone_on_with(monkeypatch):
    lora, pipe = started()
    press_at(monkeypatch, pipe, 2)
    with pytest.raises(KeyboardInterrupt):
        pipe.train(lora, samples(5), module="q")
    assert pipe.train(lora, samples(5, seed=1), module="q").steps == 5


def test_ctrl_c_twice_interrupts_at_once(monkeypatch):
    lora, pipe = started()
    press_at(monkeypatch, pipe, 3, times=2)
    with pytest.raises(KeyboardInterrupt):
        pipe.train(lora, samples(5), module="q")
    assert pipe.steps("q") == 2
    assert lora._modules["q"].samples == 0  # the batch under way was dropped
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert pipe.train(lora, samples(5), module="q").steps == 3


def test_in_another_thread_signals_are_left_alone():
    lora, pipe = started()
    thread = threading.Thread(target=pipe.train, args=(lora, samples(5)), kwargs={"module": "q"})
    thread.start()
    thread.join(timeout=30)
    assert pipe.steps("q") == 5


# ---- the bar ----------------------------------------------------------------


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize(
    ("stderr", "patience", "shown"),
    [(Terminal, 0.0, True), (Terminal, 60.0, False), (io.StringIO, 0.0, False)],
    ids=["long", "short", "no-terminal"],
)
def test_a_bar_is_shown_for_long_work_on_a_terminal(stderr, patience, shown, monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(progress, "_PATIENCE", patience)
    monkeypatch.setattr(sys, "stderr", stderr())
    lora, pipe = started()
    pipe.train(lora, samples(5), module="q")
    assert ("training q" in sys.stderr.getvalue()) == shown
    assert shown or not sys.stderr.getvalue()


def test_without_rich_there_is_no_bar(monkeypatch):
    monkeypatch.setattr(progress, "_PATIENCE", 0.0)
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setitem(sys.modules, "rich.console", None)
    lora, pipe = started()
    assert pipe.train(lora, samples(5), module="q").steps == 5
    assert not sys.stderr.getvalue()


# ---- what is refused --------------------------------------------------------

GOOD = samples(1)[0]


@pytest.mark.parametrize("where", ["samples", "validation"])
@pytest.mark.parametrize(
    ("error", "match", "changes"),
    [
        (ValueError, r"quality: expected a number from 0 to 1, got 1.5", {"quality": 1.5}),
        (ValueError, r"quality: expected .*, got -0.1", {"quality": -0.1}),
        (ValueError, r"quality: expected .*, got nan", {"quality": float("nan")}),
        (ValueError, r"quality: expected .*, got '1'", {"quality": "1"}),
        (ValueError, r"quality: expected .*, got True", {"quality": True}),
        (ValueError, r"input_embedding: expected shape \(7,\), got \(5,\)",
         {"input_embedding": np.ones(5, "f4")}),
        (ValueError, r"input_embedding: expected shape \(7,\), got \(1, 7\)",
         {"input_embedding": np.ones((1, 7), "f4")}),
        (ValueError, r"output_embedding: expected shape \(5,\), got \(7,\)",
         {"output_embedding": np.ones(7, "f4")}),
        (ValueError, r"input_embedding: expected finite numbers, got NaN or Inf",
         {"input_embedding": np.full(7, np.nan, "f4")}),
        (ValueError, r"output_embedding: expected finite numbers, got NaN or Inf",
         {"output_embedding": np.full(5, 1e300)}),
        (TypeError, r"input_embedding: expected numbers, got <U1", {"input_embedding": ["a"] * 7}),
        (TypeError, r"input_embedding: expected numbers, got object", {"input_embedding": None}),
    ],
)  # fmt: skip
def test_a_bad_sample_is_named_and_nothing_changes(error, match, changes, where):
    lora, pipe = started()
    before = weight_bits(lora)
    given = {"samples": [GOOD], "validation": [GOOD]}
    given[where] = [GOOD, GOOD, GOOD._replace(**changes)]
    with pytest.raises(error, match=rf"^TrainingPipeline.train: {where}\[2\]: {match}"):
        pipe.train(lora, module="q", **given)
    assert weight_bits(lora) == before
    assert pipe.steps("q") == 0


@pytest.mark.parametrize(
    ("error", "match", "given"),
    [
        (TypeError, r"samples\[0\]: expected a TrainingSample, got tuple", {"samples": [(1, 2)]}),
        (ValueError, "module: expected one of q, got 'k'", {"module": "k"}),
        (ValueError, "epochs: expected a whole number from 1, got 0", {"epochs": 0}),
        (ValueError, "epochs: expected a whole number from 1, got 1.5", {"epochs": 1.5}),
        (ValueError, "patience: expected None without validation, got 2", {"patience": 2}),
        (ValueError, "patience: expected a whole number from 1, got 0",
         {"patience": 0, "validation": [GOOD]}),
        (ValueError, "validation: expected samples from 0.5 on, got none",
         {"validation": samples(2, quality=0.2)}),
    ],
)  # fmt: skip
def test_a_bad_argument_is_named_and_nothing_changes(error, match, given):
    lora, pipe = started()
    before = weight_bits(lora)
    with pytest.raises(error, match=match):
        pipe.train(**{"lora": lora, "samples": [GOOD], "module": "q", **given})
    assert weight_bits(lora) == before


def test_gradients_that_wait_are_not_mixed_in():
    lora, pipe = started(batch_size=2)
    x, y = GOOD[:2]
    pipe.train_step(lora, x, TARGET(y), module="q")
    with pytest.raises(
        ValueError, match=r"expected no gradients that wait, got 1 rows in q: flush"
    ):
        pipe.train(lora, samples(4), module="q")
    pipe.flush(lora)
    assert pipe.train(lora, samples(4), module="q").steps == 2


def test_a_folder_for_the_checkpoint_is_looked_for_first(tmp_path):
    lora, pipe = started()
    path = tmp_path / "missing" / "checkpoint"
    with pytest.raises(FileNotFoundError, match=r"^TrainingPipeline.train: checkpoint: expected"):
        pipe.train(lora, samples(5), module="q", checkpoint=path)
    assert pipe.steps("q") == 0


def test_embeddings_may_be_lists_tensors_and_wider_floats():
    import torch

    x, y = GOOD[:2]
    moved = []
    for kind in (lambda a: a, list, torch.from_numpy, np.float64):
        lora, pipe = started()
        pipe.train(lora, [le.TrainingSample(kind(x), kind(y), 0.75)], module="q")
        moved.append(weight_bits(lora))
    assert all(bits == moved[0] for bits in moved)


def test_order_goes_through_everything_once_an_epoch():
    order = training.SampleOrder(5)
    first = order.rest(20)
    order.position = 8
    assert order.rest(20).tolist() == first[8:].tolist()
    order.end_epoch()
    second = order.rest(20)
    assert sorted(first) == sorted(second) == list(range(20))
    assert first.tolist() != second.tolist()
