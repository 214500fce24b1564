"""MicroLoRAConfig: what a MicroLoRA adapts, and how."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

PRESETS: dict[str, tuple[int, tuple[str, ...], bool]] = {
    # name: (rank, target modules, gradient_checkpointing), as the RuvLLM guide's tuning tables
    "low_latency": (1, ("q_proj",), False),
    "balanced": (2, ("q_proj", "v_proj"), False),
    "high_quality": (4, ("q_proj", "k_proj", "v_proj", "o_proj"), False),
    "minimal_memory": (1, ("q_proj",), True),
}


@dataclass(frozen=True)
class MicroLoRAConfig:
    """in_features, out_features: the shape of every target module, unless
    ``shapes={"k_proj": (4096, 1024)}`` says otherwise. rank: 1 or 2 is micro.
    alpha: scaling is alpha / rank, or alpha / sqrt(rank) with use_rslora
    (Kalajdzievski 2023). dropout: part of x dropped in ``adapt``, 0 <= p < 1.
    gradient_checkpointing: under torch autograd, recompute h = A x in the
    backward pass instead of keeping it. seed: of the first A and of dropout.

    Raises ValueError for a value out of range.
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
                got = getattr(self, name)
                raise ValueError(f"MicroLoRAConfig: {name}: expected {expected}, got {got!r}")

        check("in_features", self.in_features >= 1, "at least 1")
        check("out_features", self.out_features >= 1, "at least 1")
        check("rank", 1 <= self.rank <= 65536, "1 to 65536")
        check("alpha", math.isfinite(self.alpha), "a finite number")
        check("dropout", 0.0 <= self.dropout < 1.0, "0 <= p < 1")
        check("seed", self.seed >= 0, "0 or more")
        check("target_modules", not isinstance(self.target_modules, str), "a sequence of names")
        check("target_modules", len(self.target_modules) > 0, "at least one name")
        names = tuple(self.target_modules)
        check("target_modules", len(set(names)) == len(names), "names that differ")
        object.__setattr__(self, "target_modules", names)
        for name, shape in (self.shapes or {}).items():
            check("shapes", name in names, f"names in target_modules, not {name!r}")
            check("shapes", len(shape) == 2 and min(shape) >= 1, "(in, out) of at least 1")

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
