"""compose_sequential and compose_parallel."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import lora_engine as le
from lora_engine import reference


def lora(seed: int, rank: int = 2, shape: tuple[int, int] = (12, 12), names=("q",)) -> le.MicroLoRA:
    made = le.MicroLoRA(le.MicroLoRAConfig(*shape, rank=rank, target_modules=names, seed=seed))
    rng = np.random.default_rng(seed)
    for name in names:
        A, B = rng.standard_normal((rank, shape[0])), rng.standard_normal((shape[1], rank))
        made.set_weights(name, (A / 3).astype("f4"), (B / 3).astype("f4"))
    return made


def delta(x, adapter):
    return reference.lora_delta(x, *adapter.weights("q"))


ADAPTERS = [lora(i, rank=i) for i in (1, 2, 3)]


@pytest.mark.parametrize("kind", ["numpy", "torch", "bfloat16"])
@pytest.mark.parametrize("rows", [(), (5,), (0,)], ids=str)
def test_in_turn_and_mean(kind, rows):
    x = np.random.default_rng(0).standard_normal((*rows, 12)).astype("f4")
    given = x.copy() if kind == "numpy" else torch.from_numpy(x.copy())
    if kind == "bfloat16":
        given = given.bfloat16()
        x = given.float().numpy()
    turn, mean = x.astype("f8"), 0.0
    for adapter in ADAPTERS:
        turn = turn + delta(turn, adapter)
        mean = mean + delta(x, adapter) / 3
    tolerance = 0.05 if kind == "bfloat16" else 1e-5
    for compose, want in ((le.compose_sequential, turn), (le.compose_parallel, mean)):
        got = compose(ADAPTERS)(given, "q")
        assert type(got) is type(given)
        assert got.dtype == given.dtype
        assert got.shape == want.shape
        got = got if kind == "numpy" else got.float().numpy()
        assert np.allclose(got, want, atol=tolerance, rtol=tolerance)
    assert np.array_equal(x, given if kind == "numpy" else given.float().numpy())  # untouched


def test_order_matters_in_turn_only_and_later_learning_is_seen():
    x = np.random.default_rng(0).standard_normal((5, 12)).astype("f4")
    first, second = lora(1), lora(2)
    turn = le.compose_sequential([first, second])
    back = le.compose_sequential([second, first])
    assert np.abs(turn(x, "q") - back(x, "q")).max() > 0.1
    mean = le.compose_parallel([first, second])
    before = mean(x, "q")
    first.adapt(x, le.Feedback.from_gradient(np.ones_like(x)), "q", lr=0.1)
    want = (delta(x, first) + delta(x, second)) / 2
    assert np.abs(before - want).max() > 0.1
    assert np.allclose(mean(x, "q"), want, atol=1e-5)


def test_oblong_modules_can_be_averaged_and_not_chained():
    pair = [lora(1, shape=(12, 7)), lora(2, shape=(12, 7))]
    x = np.ones((3, 12), "f4")
    want = (delta(x, pair[0]) + delta(x, pair[1])) / 2
    assert np.allclose(le.compose_parallel(pair)(x, "q"), want, atol=1e-5)
    message = r"compose_sequential: adapters\[0\]: q: expected \(in, out\) = \(12, 12\).*\(12, 7\)"
    with pytest.raises(ValueError, match=message):
        le.compose_sequential(pair)(x, "q")


@pytest.mark.parametrize("compose", [le.compose_sequential, le.compose_parallel])
def test_refusals(compose):
    name = compose.__name__
    with pytest.raises(ValueError, match=f"{name}: adapters: expected at least one"):
        compose([])
    with pytest.raises(TypeError, match=rf"{name}: adapters\[1\]: expected a MicroLoRA, got str"):
        compose([lora(1), "folder"])
    both = compose([lora(1), lora(2, names=("q", "v"))])
    with pytest.raises(ValueError, match=rf"{name}: module: expected one of q \(adapters\[0\]\)"):
        both(np.ones(12, "f4"), "v")
    wide = compose([lora(1), lora(2, shape=(12, 13))])
    with pytest.raises(ValueError, match=rf"{name}: adapters\[1\]: q: .*got \(12, 13\)"):
        wide(np.ones(12, "f4"), "q")
    with pytest.raises(ValueError, match="x: expected"):
        compose([lora(1)])(np.ones((2, 11), "f4"), "q")
