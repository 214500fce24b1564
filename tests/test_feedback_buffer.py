"""FeedbackBuffer: bounded, fed by many threads, closed cleanly."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch
from helpers_files import trained, weight_bits

import lora_engine as le

X, Y = np.ones(6, "f4"), np.zeros(5, "f4")


def numbered(i: int) -> np.ndarray:
    return np.full(6, i, "f4")


def test_feedback_comes_out_in_the_order_it_came_in():
    buffer = le.FeedbackBuffer(4)
    for i in range(3):
        assert buffer.put(numbered(i), le.Feedback.from_target(Y), "q")
    assert len(buffer) == 3
    assert [item.x[0] for item in buffer.drain()] == [0, 1, 2]
    assert (len(buffer), buffer.drain()) == (0, [])
    assert (buffer.received, buffer.dropped) == (3, 0)


def test_the_oldest_goes_when_it_is_full_and_is_counted():
    buffer = le.FeedbackBuffer(3)
    for i in range(8):
        assert buffer.put(numbered(i), le.Feedback.from_target(Y), "q")
    assert [item.x[0] for item in buffer.drain()] == [5, 6, 7]
    assert (buffer.received, buffer.dropped) == (8, 5)


@pytest.mark.parametrize("kind", ["numpy", "torch"])
def test_memory_of_the_caller_may_be_used_again(kind):
    x, g = (X.copy(), Y.copy()) if kind == "numpy" else (torch.ones(6), torch.zeros(5))
    buffer = le.FeedbackBuffer()
    buffer.put(x, le.Feedback.from_gradient(g), "q")
    x[:], g[:] = 7, 7
    (item,) = buffer.drain()
    assert (float(item.x[0]), float(item.feedback.gradient[0])) == (1.0, 0.0)


def test_closed_it_takes_nothing_and_gives_what_it_has():
    buffer = le.FeedbackBuffer()
    buffer.put(X, le.Feedback.from_target(Y), "q")
    buffer.close()
    buffer.close()
    assert buffer.closed
    assert not buffer.put(X, le.Feedback.from_target(Y), "q")
    assert len(buffer.drain(timeout=None)) == 1
    assert buffer.drain(timeout=None) == []  # and does not wait for ever
    assert buffer.received == 1


def test_who_waits_is_woken_by_feedback_and_by_closing():
    buffer, found = le.FeedbackBuffer(), []

    def drains():
        while items := buffer.drain(timeout=None):
            found.extend(items)

    thread = threading.Thread(target=drains)
    thread.start()
    for i in range(10):
        buffer.put(numbered(i), le.Feedback.from_target(Y), "q")
    while len(buffer):
        pass
    buffer.close()
    thread.join(timeout=10)
    assert not thread.is_alive()
    assert [item.x[0] for item in found] == list(range(10))


def test_many_threads_lose_nothing_that_is_not_counted():
    buffer, drained = le.FeedbackBuffer(16), []
    feedback = le.Feedback.from_target(Y)

    def puts():
        for _ in range(300):
            buffer.put(X, feedback, "q")

    threads = [threading.Thread(target=puts) for _ in range(4)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        found = buffer.drain(timeout=0.001)
        assert len(found) <= 16
        drained += found
    drained += buffer.drain()
    assert buffer.received == 1200
    assert len(drained) + buffer.dropped == 1200


@pytest.mark.parametrize("capacity", [0, -1, 1.5, None, True, "3"])
def test_bad_capacity_is_named(capacity):
    with pytest.raises(ValueError, match=r"^FeedbackBuffer: capacity: expected .*, got "):
        le.FeedbackBuffer(capacity)


@pytest.mark.parametrize("timeout", [-1.0, float("nan"), float("inf")])
def test_bad_timeout_is_named(timeout):
    with pytest.raises(ValueError, match=r"^FeedbackBuffer.drain: timeout: expected 0 or more"):
        le.FeedbackBuffer().drain(timeout)


def test_what_is_no_feedback_is_refused():
    buffer = le.FeedbackBuffer()
    with pytest.raises(TypeError, match=r"^FeedbackBuffer.put: feedback: expected a Feedback"):
        buffer.put(X, Y, "q")
    assert (len(buffer), buffer.received) == (0, 0)


def test_a_quality_needs_its_own_direction():
    """The thread that trains has traces of its own, of other outputs."""
    lora = trained()
    pipe = le.TrainingPipeline(le.TrainingConfig(learning_rate=0.05, max_grad_norm=None))
    pipe.init_for_lora(lora)
    pipe.train_step(lora, X, le.Feedback.from_quality(0.5), "q")
    buffer = le.FeedbackBuffer()
    lora.forward(X, "q", explore=0.1)
    with pytest.raises(ValueError, match=r"^FeedbackBuffer.put: .* a trace or an output"):
        buffer.put(X, le.Feedback.from_quality(1.0), "q")
    assert (len(buffer), buffer.received) == (0, 0)
    _, trace = lora.forward(X, "q", explore=0.1, return_trace=True)
    lora.forward(X, "q", explore=0.1)
    noise = trace.noise.copy()
    buffer.put(X, le.Feedback.from_quality(1.0, trace=trace), "q")
    trace.noise[:] = np.nan  # its memory may be used again
    before = lora.forward(X, "q")
    assert pipe.train_buffer(lora, buffer) == (1, 0, ())
    assert (lora.forward(X, "q") - before) @ noise > 0
    assert pipe.train_step(lora, X, le.Feedback.from_quality(0.9), "q").applied  # its own trace


def test_a_pipeline_learns_from_it_as_from_steps():
    lora, other = trained(), trained()
    pipes = []
    for one in (lora, other):
        pipes.append(le.TrainingPipeline(le.TrainingConfig(learning_rate=0.05)))
        pipes[-1].init_for_lora(one)
    buffer, rng = le.FeedbackBuffer(), np.random.default_rng(0)
    for _ in range(5):
        x, y = (rng.standard_normal(d, dtype="f4") for d in (6, 5))
        buffer.put(x, le.Feedback.from_target(y), "q")
        pipes[1].train_step(other, x, le.Feedback.from_target(y), module="q")
    assert pipes[0].train_buffer(lora, buffer) == (5, 0, ())
    assert weight_bits(lora) == weight_bits(other)
    assert pipes[0].train_buffer(lora, buffer) == (0, 0, ())


def test_what_does_not_fit_stops_nothing_else():
    lora = trained()
    pipe = le.TrainingPipeline()
    pipe.init_for_lora(lora)
    buffer = le.FeedbackBuffer()
    for x, y, module in (
        (X, Y, "q"), (X[:3], Y, "q"), (X * np.nan, Y, "q"), (X, Y, "k"), (X, Y, "q"),
    ):  # fmt: skip
        buffer.put(x, le.Feedback.from_target(y), module)
    result = pipe.train_buffer(lora, buffer)
    assert (result.applied, result.refused) == (2, 3)
    assert len(result.notes) == 3
    assert pipe.steps("q") == 2
