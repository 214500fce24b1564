"""Bad input to nf4_linear: each error names op, argument, expected and got; nothing is written."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers import bits, fill_pool

import lora_engine as le
from lora_engine.backends import chosen

N, IN, OUT = 3, 64, 8
W = le.nf4_quantize(np.random.default_rng(0).standard_normal((OUT, IN)).astype("f4"))
POOL = fill_pool(np.random.default_rng(1), IN, (OUT,), [1, 2]).pool
SMALL = fill_pool(np.random.default_rng(1), IN, (OUT - 1,), [1]).pool
IDS = np.array([0, -1, 1], "i4")
BUFFER = np.zeros(N * IN + 1, "f4")

CASES = {
    "w-float": (
        {"w": np.ones((OUT, IN), "f4")},
        TypeError,
        "w: expected an NF4Tensor, got",
    ),
    "x-width": (
        {"x": np.ones((N, IN - 1), "f4")},
        ValueError,
        r"x: expected shape \[n, in\] = \[n, 64\], got \[3, 63\]",
    ),
    "x-dtype": ({"x": np.ones((N, IN))}, TypeError, "x: expected float32, bfloat16 or float16"),
    "x-none": ({"x": None}, TypeError, "x: expected a NumPy array or a torch tensor, got NoneType"),
    "x-packed": ({"x": np.ones((N, IN), "u1")}, TypeError, "x: expected .*, got uint8"),
    "x-meta": ({"x": torch.ones(N, IN, device="meta")}, ValueError, "x: expected a tensor on the"),
    "out-shape": (
        {"out": np.zeros((N, OUT + 1), "f4")},
        ValueError,
        r"out: expected shape \[n, out\] = \[3, 8\], got \[3, 9\]",
    ),
    "out-dtype": (
        {"out": np.zeros((N, OUT), "f2")},
        TypeError,
        "out: expected float32, the dtype of x, got float16",
    ),
    "out-on-x": (
        {"x": BUFFER[: N * IN].reshape(N, IN), "out": BUFFER[1 : 1 + N * OUT].reshape(N, OUT)},
        ValueError,
        "out: expected memory of its own, got memory shared with x",
    ),
    "bias-size": ({"bias": np.ones(OUT + 1, "f4")}, ValueError, r"bias: expected shape \[out\]"),
    "bias-dtype": (
        {"bias": np.ones(OUT)},
        TypeError,
        "bias: expected float32, bfloat16",
    ),
    "pool-size": (
        {"pool": SMALL, "ids": IDS},
        ValueError,
        r"pool: expected one of \[in, out\] = \[64, 8\], got \[64, 7\]",
    ),
    "pool-alone": ({"pool": POOL}, ValueError, "pool, ids: expected both, or neither"),
    "ids-alone": ({"ids": IDS}, ValueError, "pool, ids: expected both, or neither"),
    "weights-alone": ({"weights": np.ones(N, "f4")}, ValueError, "pool, ids: expected both"),
    "ids-beyond": (
        {"pool": POOL, "ids": np.array([0, 2, 1], "i4")},
        IndexError,
        "ids: expected -1 or one of the pool's 2 slots, got 2 at row 1",
    ),
    "ids-below": (
        {"pool": POOL, "ids": np.array([0, -2, 1], "i4")},
        IndexError,
        "ids: expected .*got -2",
    ),
    "ids-length": ({"pool": POOL, "ids": IDS[:2]}, ValueError, "ids: expected one a row of x, 3"),
    "ids-dtype": ({"pool": POOL, "ids": IDS.astype("i8")}, TypeError, "ids: expected int32"),
    "weights-shape": (
        {"pool": POOL, "ids": IDS, "weights": np.ones((N, 2), "f4")},
        ValueError,
        "weights: expected shape like ids",
    ),
    "compute": ({"compute": "int8"}, ValueError, "compute: expected float32, bfloat16 or None"),
}


@pytest.mark.parametrize("name", CASES)
def test_it_is_refused_before_damage(name):
    changes, error, message = CASES[name]
    args = {"x": np.ones((N, IN), "f4"), "w": W, "out": np.full((N, OUT), 5.0, "f4")} | changes
    before = bits(args["out"])
    with pytest.raises(error, match="nf4_linear: " + message):
        le.nf4_linear(**args)
    assert bits(args["out"]) == before


def test_a_slot_that_was_removed():
    pool = fill_pool(np.random.default_rng(1), IN, (OUT,), [1, 2]).pool
    pool.remove(1)
    y = np.full((N, OUT), 5.0, "f4")
    with pytest.raises(IndexError, match="nf4_linear: "):
        le.nf4_linear(np.ones((N, IN), "f4"), W, pool=pool, ids=IDS, out=y)
    assert (y == 5.0).all()


def test_an_output_over_the_packed_bytes():
    packed = np.zeros(256 * 64 // 2, np.uint8)
    held = chosen().Nf4(packed, 256, 64, 64, np.ones(256, "f4"), None, None, 0, 0.0)
    over = packed[: 8 * 256 * 4].view("f4").reshape(8, 256)
    with pytest.raises(ValueError, match="out: expected memory of its own, got memory shared with"):
        chosen().nf4_linear(np.ones((8, 64), "f4"), held, None, None, None, None, over, None)
    assert not packed.any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"packed": np.zeros(255, "u1")}, "packed: expected 256 elements, got 255"),
        ({"absmax": np.ones(9, "f4")}, "absmax: expected 8 elements, got 9"),
        ({"packed": np.zeros(512, "u1")[::2]}, "packed: expected contiguous memory"),
        ({"rows": 0}, r"shape: expected rows and cols from 1, got \[0, 64\]"),
        ({"rows": 2**60, "cols": 2**60}, "shape: expected rows and cols from 1"),
    ],
)
def test_a_handle_of_the_wrong_sizes(change, message):
    args = {
        "packed": np.zeros(256, "u1"), "rows": 8, "cols": 64, "blocksize": 64,
        "absmax": np.ones(8, "f4"),
    }  # fmt: skip
    with pytest.raises(ValueError, match="Nf4: " + message):
        le._C.Nf4(**(args | change))


def test_removed_memory_is_refused():
    freed = torch.ones(N, IN)
    freed.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match="nf4_linear: x: expected an array with memory"):
        le.nf4_linear(freed, W)
