"""MicroLoRAConfig: what a MicroLoRA adapts, and how."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real
from typing import Any

import numpy as np

MAX_SIZE = 2**31 - 1
MAX_FLOAT = 3.4028234663852886e38

PRESETS: dict[str, tuple[int, tuple[str, ...], bool]] = {
    # name: (rank, target modules, gradient_checkpointing), as the RuvLLM guide's tuning tables
    "low_latency": (1, ("q_proj",), False),
    "balanced": (2, ("q_proj", "v_proj"), False),
    "high_quality": (4, ("q_proj", "k_proj", "v_proj", "o_proj"), False),
    "minimal_memory": (1, ("q_proj",), True),
}


def _whole(value: Any) -> int | None:
    """The value as an int, NumPy's included; None where it is no whole number."""
    try:
        return None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        return None


def is_name(value: Any) -> bool:
    """Whether files can hold it as a module's name."""
    return isinstance(value, str) and value != "" and value.isprintable()


@dataclass(frozen=True)
class MicroLoRAConfig:
    """in_features, out_features: the shape of every target module, unless
    ``shapes={"k_proj": (4096, 1024)}`` says otherwise. rank: 1 or 2 is micro.
    alpha: scaling is alpha / rank, or alpha / sqrt(rank) with use_rslora
    (Kalajdzievski 2023). dropout: part of x dropped in ``adapt``, 0 <= p < 1.
    gradient_checkpointing: under torch autograd, recompute h = A x in the
    backward pass instead of keeping it. seed: of the first A and of dropout.

    Raises ValueError for a value of another kind or out of range.
    """

    in_features: int
    out_features: int
    rank: int = 2
    alpha: float = 4.0
    dropout: float = 0.0
    target_modules: Sequence[str] = ("q_proj", "v_proj")
    shapes: Mapping[str, tuple[int, int]] | None = field(default=None)
    use_rslora: bool = False
    gradient_checkpointing: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        def check(name: str, ok: bool, expected: str) -> None:
            if not ok:
                got = repr(getattr(self, name))[:200]
                raise ValueError(f"MicroLoRAConfig: {name}: expected {expected}, got {got}")

        def whole(name: str, low: int, high: int, expected: str) -> None:
            value = _whole(getattr(self, name))
            check(name, value is not None and low <= value <= high, expected)
            object.__setattr__(self, name, value)

        def number(name: str, expected: str) -> float:
            value = getattr(self, name)
            check(name, isinstance(value, Real) and not isinstance(value, bool), expected)
            check(name, abs(value) <= MAX_FLOAT, expected)  # and no NaN
            object.__setattr__(self, name, float(value))
            return float(value)

        whole("in_features", 1, MAX_SIZE, "a whole number of at least 1")
        whole("out_features", 1, MAX_SIZE, "a whole number of at least 1")
        whole("rank", 1, 65536, "a whole number from 1 to 65536")
        whole("seed", 0, 2**64 - 1, "a whole number from 0 to 2^64 - 1")
        number("alpha", "a number within float32's range")
        check("dropout", 0.0 <= number("dropout", "0 <= p < 1") < 1.0, "0 <= p < 1")
        for name in ("use_rslora", "gradient_checkpointing"):
            check(name, isinstance(getattr(self, name), (bool, np.bool_)), "True or False")
            object.__setattr__(self, name, bool(getattr(self, name)))
        names = self.target_modules
        # No set: the order of the names fixes what each module draws from the seed.
        ordered = isinstance(names, Sequence) and not isinstance(names, (str, bytes))
        check("target_modules", ordered, "a sequence of names")
        names = tuple(names)
        check("target_modules", len(names) > 0, "at least one name")
        check("target_modules", all(map(is_name, names)), "names of printable text")
        check("target_modules", len(set(names)) == len(names), "names that differ")
        object.__setattr__(self, "target_modules", names)
        if self.shapes is not None:
            check("shapes", isinstance(self.shapes, Mapping), "{name: (in, out)}")
            shapes = {}
            for name, shape in self.shapes.items():
                check("shapes", name in names, f"names in target_modules, not {name!r}")
                pair = tuple(map(_whole, shape)) if isinstance(shape, (tuple, list)) else ()
                fits = len(pair) == 2 and all(n is not None and 1 <= n <= MAX_SIZE for n in pair)
                check("shapes", fits, "(in, out), whole numbers of at least 1")
                shapes[name] = pair
            object.__setattr__(self, "shapes", shapes)

    @property
    def scaling(self) -> float:
        """alpha / rank, or alpha / sqrt(rank) with rsLoRA."""
        return self.alpha / (math.sqrt(self.rank) if self.use_rslora else self.rank)

    def shape(self, module: str) -> tuple[int, int]:
        """(in, out) of a target module."""
        default = (self.in_features, self.out_features)
        return (self.shapes or {}).get(module, default)

    @classmethod
    def for_hidden_dim(cls, hidden_dim: int, rank: int = 2) -> MicroLoRAConfig:
        """Square modules of hidden_dim, alpha = 2 rank."""
        return cls(hidden_dim, hidden_dim, rank=rank, alpha=2.0 * rank)

    @classmethod
    def preset(cls, name: str, hidden_dim: int) -> MicroLoRAConfig:
        """One of "low_latency", "balanced", "high_quality" or "minimal_memory"."""
        if name not in PRESETS:
            known = ", ".join(PRESETS)
            raise ValueError(f"MicroLoRAConfig.preset: name: expected one of {known}, got {name!r}")
        rank, modules, checkpointing = PRESETS[name]
        return cls(
            hidden_dim,
            hidden_dim,
            rank=rank,
            alpha=2.0 * rank,
            target_modules=modules,
            gradient_checkpointing=checkpointing,
        )
