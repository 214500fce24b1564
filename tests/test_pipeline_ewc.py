"""TrainingPipeline with EWC: both forms under both optimizers, and in checkpoints."""

from __future__ import annotations

import numpy as np
import pytest
from helpers_files import trained, weight_bits
from helpers_training import TARGET, drawn, samples, started

import lora_engine as le

pytestmark = [
    pytest.mark.usefixtures("backend"),
    pytest.mark.parametrize("form", ["factor", "delta"]),
    pytest.mark.parametrize("optimizer", ["sgd", "adamw"]),
]


def made(form: str, optimizer: str, ewc_lambda: float = 5.0, **config):
    lora = trained(7, 5, target_modules=("q", "k"), shapes={"k": (7, 3)})
    return started(
        lora,
        optimizer=optimizer,
        ewc_form=form,
        ewc_lambda=ewc_lambda,
        learning_rate=0.02,
        **config,
    )


def steps(lora, pipe, first: int, last: int) -> None:
    for i in range(first, last):
        x, y = drawn(1, i)[0]
        pipe.train_step(lora, x, TARGET(y), module="q")
        pipe.train_step(lora, x, TARGET(y[:3]), module="k")


def test_resumed_steps_give_the_same_bits(form, optimizer, tmp_path):
    """Saved amid a batch of the second task: records, anchors and the average go with it."""
    path = tmp_path / "checkpoint"
    lora, pipe = made(form, optimizer, batch_size=2)
    steps(lora, pipe, 0, 9)
    assert pipe.start_new_task(lora)
    steps(lora, pipe, 9, 14)
    pipe.save(lora, path)
    other, again = made(form, optimizer, batch_size=2)
    again.load(other, path)
    assert again._protection.ewc.penalty() == pipe._protection.ewc.penalty() > 0
    for one, runner in ((lora, pipe), (other, again)):
        steps(one, runner, 14, 20)
        assert runner.start_new_task(one)
        steps(one, runner, 20, 24)
        runner.save(one, tmp_path / f"end {one is lora}")
    assert weight_bits(lora) == weight_bits(other)
    ends = [(tmp_path / f"end {which}").read_bytes() for which in (True, False)]
    assert ends[0] == ends[1]


def test_ewc_holds_an_adapter_near_its_first_task(form, optimizer):
    first, second = samples(6, seed=1), samples(6, seed=2)
    x = np.stack([s.input_embedding for s in first])
    moved = []
    for ewc_lambda in (0.0, 5.0, 1e4):
        lora, pipe = made(form, optimizer, ewc_lambda)
        pipe.train(lora, first, module="q", epochs=20)
        learned = lora.forward(x, "q")
        assert pipe.start_new_task(lora) == (ewc_lambda > 0)
        pipe.train(lora, second, module="q", epochs=20)
        moved.append(float(np.linalg.norm(lora.forward(x, "q") - learned)))
    assert moved[2] < 0.5 * moved[1] < 0.5 * moved[0]


def test_putting_the_best_weights_back_keeps_the_records(form, optimizer):
    lora, pipe = made(form, optimizer)
    pipe.train(lora, samples(6, seed=1), module="q", epochs=5)
    pipe.start_new_task(lora)
    steps(lora, pipe, 0, 5)
    held = [
        le.TrainingSample(s.input_embedding, lora.forward(s.input_embedding, "q"), 1.0)
        for s in samples(3, seed=3)
    ]
    before, penalty = weight_bits(lora), pipe._protection.ewc.penalty()
    history = pipe.train(lora, samples(6, seed=2), module="q", epochs=3, validation=held)
    assert history.best_epoch == 0
    assert weight_bits(lora) == before
    assert pipe._protection.ewc.penalty() == penalty > 0


def test_a_detected_task_is_consolidated(form, optimizer):
    lora = trained(7, 5)
    config = le.TrainingConfig(
        optimizer=optimizer, ewc_form=form, ewc_lambda=1.0, learning_rate=1e-4
    )
    pipe = le.TrainingPipeline(config, boundary=le.TaskBoundary())
    pipe.init_for_lora(lora)
    fired = []
    for i in range(300):
        x, y = drawn(1, i)[0]
        scale = np.float32(1.0 if i < 200 else 20.0)
        fired.append(pipe.train_step(lora, x, TARGET(y * scale), module="q").new_task)
    assert not any(fired[:200])
    assert any(fired[200:])
    assert pipe._protection.ewc.penalty() > 0
