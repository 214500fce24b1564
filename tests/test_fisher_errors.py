"""Ops 5 and 6: bad input; errors name op, argument, expected, got, and nothing was written."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers import f64

import lora_engine as le


def problem():
    rng = np.random.default_rng(8)
    shapes = (20, 33), (20, 17), (2, 33), (17, 2)
    return [rng.standard_normal(s).astype("f4") for s in shapes]


def ints(*values):
    return np.array(values, "i4")


FISHER = {
    "x-width": (
        {"x": np.ones((20, 32), "f4")},
        ValueError,
        r"x: expected shape .*33\], got \[20, 32\]",
    ),
    "grad-rows": (
        {"grad": np.ones((19, 17), "f4")},
        ValueError,
        r"grad: .*20, 17\], got \[19, 17\]",
    ),
    "grad-width": ({"grad": np.ones((20, 16), "f4")}, ValueError, r"grad: .*\[20, 16\]"),
    "grad-dtype": (
        {"grad": torch.ones(20, 17).bfloat16()},
        TypeError,
        "grad: expected float32, the dtype of x",
    ),
    "x-float64": (
        {"x": np.ones((20, 33))},
        TypeError,
        "x: expected float32, bfloat16 or float16",
    ),
    "A-int32": (
        {"A": np.ones((2, 33), "i4")},
        TypeError,
        "A: expected float32, bfloat16 or float16",
    ),
    "B-rank": (
        {"B": np.ones((17, 3), "f4")},
        ValueError,
        r"B: expected shape .*2\], got \[17, 3\]",
    ),
    "B-dtype": (
        {"B": torch.ones(17, 2).bfloat16()},
        TypeError,
        "B: expected float32, the dtype of A",
    ),
    "scaling": ({"scaling": float("nan")}, ValueError, "scaling: expected a finite number"),
    "segments-dtype": (
        {"segments": np.array([0, 20])},
        TypeError,
        "segments: expected int32, got int64",
    ),
    "segments-float": (
        {"segments": np.array([0, 20], "f4")},
        TypeError,
        "segments: expected int32, got float32",
    ),
    "segments-none": (
        {"segments": ints()},
        ValueError,
        r"segments: expected offsets \[S\+1\], at least one",
    ),
    "segments-2d": (
        {"segments": ints([0, 20])},
        ValueError,
        r"segments: expected offsets \[S\+1\]",
    ),
    "segments-first": ({"segments": ints(1, 20)}, ValueError, "segments: expected 0 first, got 1"),
    "segments-last": (
        {"segments": ints(0, 19)},
        ValueError,
        "segments: expected the number of rows last, 20, got 19",
    ),
    "segments-beyond": ({"segments": ints(0, 21)}, ValueError, "segments: .*last, 20, got 21"),
    "segments-descending": (
        {"segments": ints(0, 9, 8, 20)},
        ValueError,
        "segments: expected ascending offsets, got 8 after 9 at 2",
    ),
    "segments-negative": (
        {"segments": ints(0, -1, 20)},
        ValueError,
        "segments: expected ascending offsets, got -1",
    ),
    "out-single": (
        {"out": np.zeros((2, 33))},
        TypeError,
        r"out: expected a pair of arrays \(F_A, F_B\)",
    ),
    "out-three": ({"out": (None,) * 3}, TypeError, "out: expected a pair of arrays"),
    "out-none": ({"out": (None, None)}, TypeError, "F_A: expected a NumPy array or a torch tensor"),
    "F_A-shape": (
        {"F_A": np.zeros((2, 32))},
        ValueError,
        r"F_A: expected shape \[r, in\] = \[2, 33\], got \[2, 32\]",
    ),
    "F_B-shape": (
        {"F_B": np.zeros((2, 17))},
        ValueError,
        r"F_B: expected shape \[out, r\] = \[17, 2\], got \[2, 17\]",
    ),
    "F_B-dtype": (
        {"F_B": np.zeros((17, 2), "i4")},
        TypeError,
        "F_B: expected float64 or float32, got int32",
    ),
    "F_B-int64": (
        {"F_B": np.zeros((17, 2), "i8")},
        TypeError,
        "F_B: expected float64 or float32, got int64",
    ),
    "F_B-bfloat16": (
        {"F_B": torch.zeros(17, 2).bfloat16()},
        TypeError,
        "F_B: expected float64 or float32, got bfloat16",
    ),
    "F_A-repeats": (
        {"F_A": torch.zeros(1, 33).expand(2, 33)},
        ValueError,
        "F_A: expected each element at its own address",
    ),
    "F_A-is-A": (
        {"F_A": "A"},
        ValueError,
        "F_A: expected memory of its own, got memory shared with A",
    ),
    "F_B-is-F_A": (
        {"F_B": "F_A"},
        ValueError,
        "F_B: expected memory of its own, got memory shared with F_A",
    ),
}


@pytest.mark.parametrize("case", FISHER)
def test_refusals(case):
    changes, error, message = FISHER[case]
    x, grad, A, B = problem()
    memory = np.full(66, 5.0)
    args = {"x": x, "grad": grad, "A": A, "B": B, "scaling": 1.0, "segments": None}
    outputs = {"F_A": memory.reshape(2, 33), "F_B": np.full((17, 2), 5.0, "f4")}
    for name, value in changes.items():
        if name in outputs:
            shared = {"A": A, "F_A": memory[:34].reshape(17, 2)}
            outputs[name] = shared[value] if isinstance(value, str) else value
        else:
            args[name] = value
    args.setdefault("out", tuple(outputs.values()))
    watched = [a for a in (*args.values(), *outputs.values()) if hasattr(a, "shape")]
    before = [f64(a).tobytes() for a in watched]
    with pytest.raises(error, match="lora_fisher: " + message):
        le.lora_fisher(**args)
    assert [f64(a).tobytes() for a in watched] == before


def test_factors_refuse():
    x, grad, *_ = problem()
    with pytest.raises(ValueError, match=r"lora_fisher_factors: grad: .*got \[19, 17\]"):
        le.lora_fisher_factors(x, grad[:19])
    with pytest.raises(ValueError, match=r"u: expected shape \[out\] = .*17\], got \[33\]"):
        le.lora_fisher_factors(x, grad, out=(np.zeros(33), np.zeros(17)))
    with pytest.raises(ValueError, match=r"v: expected memory of its own.* with x"):
        le.lora_fisher_factors(x, grad, out=(np.zeros(17), x[3]))
    with pytest.raises(TypeError, match="u: expected float64 or float32, got float16"):
        le.lora_fisher_factors(x, grad, out=(np.zeros(17, "f2"), np.zeros(33)))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"g": np.ones((3, 4), "f4")}, ValueError, r"g: expected shape like F .*got \[3, 4\]"),
        (
            {"g": np.ones((4, 3))},
            TypeError,
            "g: expected float32, bfloat16 or float16",
        ),
        (
            {"F": np.ones((4, 3))},
            TypeError,
            "F: expected float32, bfloat16 or float16",
        ),
        ({"F": np.ones((1, 4, 3), "f4")}, ValueError, "F: expected shape"),
        ({"gamma": float("inf")}, ValueError, "gamma: expected a finite number, got inf"),
        ({"scale": float("nan")}, ValueError, "scale: expected a finite number, got nan"),
        ({"g": "F"}, ValueError, "F: expected memory of its own, got memory shared with g"),
        ({"F": torch.ones(1, 3).expand(4, 3)}, ValueError, "F: expected each element at its own"),
    ],
    ids=["shape", "g-float64", "F-float64", "dimensions", "gamma", "scale", "overlap", "repeats"],
)
def test_accumulate_refuses(changes, error, message):
    args = {"F": np.ones((4, 3), "f4"), "g": np.ones((4, 3), "f4"), "gamma": 0.5, "scale": 1.0}
    args |= changes
    if isinstance(args["g"], str):
        args["g"] = args["F"]
    before = f64(args["F"]).tobytes()
    with pytest.raises(error, match="fisher_accumulate: " + message):
        le.fisher_accumulate(**args)
    assert f64(args["F"]).tobytes() == before
