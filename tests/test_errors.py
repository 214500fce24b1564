"""Bad input: each error names op, argument, expected and got, and nothing was written."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers import bits, fill_pool

import lora_engine as le

N, IN, OUT = 3, 16, 8


def good():
    """Arguments of a forward and an adapt that work."""
    rng = np.random.default_rng(0)
    return {
        "x": rng.standard_normal((N, IN)).astype("f4"),
        "out": rng.standard_normal((N, OUT)).astype("f4"),
        "grad": rng.standard_normal((N, OUT)).astype("f4"),
        "ids": np.array([0, 1, -1], np.int32),
        "weights": np.ones(N, "f4"),
    }


def read_only(a):
    a = a.copy()
    a.flags.writeable = False
    return a


def freed(tensor):
    """A tensor whose storage was given back, as sharded training does."""
    tensor.untyped_storage().resize_(0)
    return tensor


def shared(a, width):
    """Two views of one buffer, by one element apart."""
    buffer = np.zeros(N * IN + 1, "f4")
    return buffer[: N * IN].reshape(N, IN), buffer[1 : 1 + N * width].reshape(N, width)


CASES = {
    "x-width": (
        {"x": np.ones((N, IN - 1), "f4")},
        ValueError,
        r"x: expected shape \[n, in\] = \[n, 16\], got \[3, 15\]",
    ),
    "x-three-dimensions": (
        {"x": np.ones((1, N, IN), "f4")},
        ValueError,
        r"x: expected shape .*got \[1, 3, 16\]",
    ),
    "x-scalar": (
        {"x": np.float32(1.0)},
        TypeError,
        "x: expected a NumPy array or a torch tensor, got float32",
    ),
    "x-list": (
        {"x": [[1.0] * IN] * N},
        TypeError,
        "x: expected a NumPy array or a torch tensor, got list",
    ),
    "x-none": ({"x": None}, TypeError, "x: expected a NumPy array or a torch tensor, got NoneType"),
    "x-float64": (
        {"x": np.ones((N, IN))},
        TypeError,
        "x: expected float32, bfloat16 or float16, got float64",
    ),
    "x-int32": (
        {"x": np.ones((N, IN), "i4")},
        TypeError,
        "x: expected float32, bfloat16 or float16, got int32",
    ),
    "x-uint16": (
        {"x": np.ones((N, IN), "u2")},
        TypeError,
        "x: expected float32, bfloat16 or float16, got uint16",
    ),
    "x-swapped": (
        {"x": np.ones((N, IN), ">f4")},
        ValueError,
        "x: expected an aligned array of native byte order",
    ),
    "x-unaligned": (
        {"x": np.frombuffer(bytes(N * IN * 4 + 1), "u1")[1:].view("f4").reshape(N, IN)},
        ValueError,
        "x: expected an aligned array",
    ),
    "x-meta-device": (
        {"x": torch.ones(N, IN, device="meta")},
        ValueError,
        "x: expected a tensor on the cpu, got one on meta",
    ),
    "x-requires-grad": (
        {"x": torch.ones(N, IN, requires_grad=True)},
        ValueError,
        "x: expected a tensor outside autograd",
    ),
    "x-negated": (
        {"x": torch.ones(N, IN, dtype=torch.complex64).conj().imag},
        ValueError,
        "x: expected plain memory, got a tensor with the negative bit set",
    ),
    "x-without-memory": (
        {"x": freed(torch.ones(N, IN))},
        ValueError,
        "x: expected an array with memory, got one without",
    ),
    "x-sparse": (
        {"x": torch.ones(N, IN).to_sparse()},
        TypeError,
        "x: expected a dense tensor .*got torch.float32, torch.sparse_coo",
    ),
    "x-masked": (
        {"x": np.ma.masked_array(np.ones((N, IN), "f4"), mask=True)},
        TypeError,
        "x: expected a plain array, got a masked one",
    ),
    "ids-length": (
        {"ids": np.zeros(N + 1, "i4")},
        ValueError,
        "ids: expected one a row of x, 3, got 4",
    ),
    "ids-int64": (
        {"ids": np.zeros(N, "i8")},
        TypeError,
        "ids: expected int32, got int64",
    ),
    "ids-float": ({"ids": np.zeros(N, "f4")}, TypeError, "ids: expected int32, got float32"),
    "ids-beyond": (
        {"ids": np.array([0, 3, 1], "i4")},
        IndexError,
        "ids: expected -1 or one of the pool's 3 slots, got 3 at row 1",
    ),
    "ids-minus-two": (
        {"ids": np.array([0, -2, 1], "i4")},
        IndexError,
        "ids: expected -1 or .*got -2 at row 1",
    ),
    "ids-removed": (
        {"ids": np.array([0, 2, 1], "i4")},
        IndexError,
        "slot: expected a slot in use, got 2, which was removed",
    ),
    "weights-shape": (
        {"weights": np.ones((N, 2), "f4")},
        ValueError,
        r"weights: expected shape like ids.*got \[3, 2\]",
    ),
    "weights-dtype": (
        {"weights": np.ones(N, "i4")},
        TypeError,
        "weights: expected float32, got int32",
    ),
}
FORWARD = {
    "out-width": (
        {"out": np.ones((N, OUT + 1), "f4")},
        ValueError,
        r"out: expected shape .*\[3, 8\], got \[3, 9\]",
    ),
    "out-rows": (
        {"out": np.ones((N + 1, OUT), "f4")},
        ValueError,
        r"out: expected shape .*\[3, 8\], got \[4, 8\]",
    ),
    "out-dtype": (
        {"out": torch.ones(N, OUT, dtype=torch.bfloat16)},
        TypeError,
        "out: expected float32, the dtype of x, got bfloat16",
    ),
    "out-read-only": (
        {"out": read_only(np.ones((N, OUT), "f4"))},
        ValueError,
        "out: expected a writable array",
    ),
    "out-broadcast": (
        {"out": torch.ones(1, OUT).expand(N, OUT)},
        ValueError,
        "out: expected each element at its own address",
    ),
    "out-rows-inside-rows": (
        {"out": torch.ones(64).as_strided((N, OUT), (4, 1))},
        ValueError,
        "out: expected each element at its own address",
    ),
    "out-is-x": (
        dict(zip(("x", "out"), shared(None, OUT), strict=True)),
        ValueError,
        "out: expected memory of its own, got memory shared with x",
    ),
}
ADAPT = {
    "grad-rows": (
        {"grad": np.ones((N - 1, OUT), "f4")},
        ValueError,
        r"grad: expected shape .*\[3, 8\], got \[2, 8\]",
    ),
    "grad-dtype": (
        {"grad": torch.ones(N, OUT).bfloat16()},
        TypeError,
        "grad: expected float32, the dtype of x",
    ),
    "lr-negative": ({"lr": -0.1}, ValueError, "lr: expected a number from 0, got -0.1"),
    "lr-nan": ({"lr": float("nan")}, ValueError, "lr: expected a finite number, got nan"),
    "lr-ratio": ({"lr_ratio": float("inf")}, ValueError, "lr_ratio: expected a finite number"),
    "max-norm": (
        {"max_norm": -1.0},
        ValueError,
        "max_norm: expected a number above 0 or None, got -1.0",
    ),
    "weight-decay": ({"weight_decay": -1.0}, ValueError, "weight_decay: expected a number from 0"),
}


def a_pool():
    held = fill_pool(np.random.default_rng(1), IN, (OUT,), [2, 3, 1])
    held.pool.remove(2)
    del held.adapters[2]
    return held


@pytest.mark.parametrize("case", [*CASES, *FORWARD])
def test_forward(case):
    changes, error, message = {**CASES, **FORWARD}[case]
    args = good() | changes
    out = args["out"]
    before = bits(out)
    held = a_pool()
    with pytest.raises(error, match="batched_lora_delta: " + message):
        held.pool.forward(args["x"], args["ids"], args["weights"], out=out)
    assert bits(out) == before


@pytest.mark.parametrize("case", [*CASES, *ADAPT])
def test_adapt(case):
    changes, error, message = {**CASES, **ADAPT}[case]
    args = good() | {"lr": 0.1} | changes
    held = a_pool()
    before = held.refresh()
    extra = {k: args[k] for k in ("lr_ratio", "max_norm", "weight_decay") if k in args}
    with pytest.raises(error, match="batched_adapt: " + message):
        held.pool.adapt(
            args["x"], args["grad"], args["ids"], args["lr"], weights=args["weights"], **extra
        )
    after = held.refresh()
    for slot, adapter in before.items():
        assert bits(after[slot].A[0]) == bits(adapter.A[0])
        assert bits(after[slot].B[0]) == bits(adapter.B[0])
        assert held.pool.version(slot) == 1


LORA_DELTA = {
    "A-width": (
        {"A": np.ones((2, IN + 1), "f4")},
        ValueError,
        r"x: expected shape .*17\], got \[3, 16\]",
    ),
    "B-rank": (
        {"B": np.ones((OUT, 3), "f4")},
        ValueError,
        r"B: expected shape .*, 2\], got \[8, 3\]",
    ),
    "B-dtype": (
        {"B": torch.ones(OUT, 2).bfloat16()},
        TypeError,
        "B: expected float32, the dtype of A",
    ),
    "scaling-nan": (
        {"scaling": float("nan")},
        ValueError,
        "scaling: expected a finite number, got nan",
    ),
    "out-is-A": (
        {"out": "A"},
        ValueError,
        "out: expected memory of its own, got memory shared with A",
    ),
}


@pytest.mark.parametrize("case", LORA_DELTA)
def test_lora_delta(case):
    changes, error, message = LORA_DELTA[case]
    buffer = np.ones(N * OUT + 2 * IN, "f4")
    args = {
        "x": np.ones((N, IN), "f4"),
        "A": buffer[-2 * IN :].reshape(2, IN),
        "B": np.ones((OUT, 2), "f4"),
        "scaling": 1.0,
        "out": np.full((N, OUT), 5.0, "f4"),
    } | changes
    if isinstance(args["out"], str):
        args["out"] = buffer[-N * OUT :].reshape(N, OUT)
    before = bits(args["out"])
    with pytest.raises(error, match="lora_delta: " + message):
        le.lora_delta(**args)
    assert bits(args["out"]) == before


@pytest.mark.parametrize("count", [0, -1, 5000])
def test_thread_count(count):
    before = le.get_num_threads()
    with pytest.raises(ValueError, match="num_threads: expected 1 to 4096"):
        le.set_num_threads(count)
    assert le.get_num_threads() == before


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"A": np.ones((2, IN - 1), "f4")},
            ValueError,
            r"A: expected shape \[r, in\] = \[n, 16\], got \[2, 15\]",
        ),
        (
            {"B": np.ones((OUT, 3), "f4")},
            ValueError,
            r"B: expected shape \[out, r\] = \[8, 2\], got \[8, 3\]",
        ),
        (
            {"A": np.ones((2, IN))},
            TypeError,
            "A: expected float32, bfloat16 or float16, got float64",
        ),
        ({"scaling": float("inf")}, ValueError, "scaling: expected a finite number"),
    ],
    ids=["A-shape", "B-shape", "A-dtype", "scaling"],
)
def test_add_and_set(change, error, message):
    held = a_pool()
    args = {"A": np.ones((2, IN), "f4"), "B": np.ones((OUT, 2), "f4"), "scaling": 1.0} | change
    before, size = bits(held.pool.get(0)[0]), held.pool.nbytes
    with pytest.raises(error, match=r"AdapterPool\.add: " + message):
        held.pool.add(**args)
    with pytest.raises(error, match=r"AdapterPool\.set: " + message):
        held.pool.set(0, **args)
    assert (bits(held.pool.get(0)[0]), held.pool.nbytes, held.pool.version(0)) == (before, size, 1)


def test_an_output_that_cannot_be_allocated_is_a_memory_error():
    with pytest.raises((MemoryError, ValueError)):
        le.lora_delta(np.ones((4, 3), "f4"), np.ones((0, 3), "f4"), np.ones((2**50, 0), "f4"), 1.0)
