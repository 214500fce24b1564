"""SonaConfig: how fast a Sona learns, and how it consolidates."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from numbers import Real
from typing import Any

from lora_engine.adapters.config import MicroLoRAConfig
from lora_engine.learning.consolidation import check_strategy
from lora_engine.learning.ewc import EWC_LAMBDA, GAMMA

# (background_interval_ms, ewc_lambda over the default's, max_pending_samples), after the tables
# of the RuvLLM fine-tuning guide, "Performance Tuning"; the ranks and modules are those of
# MicroLoRAConfig's presets.
_PRESETS: dict[str, tuple[float, float, int]] = {
    "low_latency": (200.0, 0.0, 1000),
    "balanced": (100.0, 1.0, 1000),
    "high_quality": (50.0, 5.0, 1000),
    "minimal_memory": (100.0, 1.0, 100),
}


@dataclass(frozen=True)
class SonaConfig:
    """micro_lora: shape, rank and modules; its seed draws every A.

    instant_lr, max_grad_norm: of a request's step on its session's adapter; by a quality the
    norm is at most 1.
    background_interval_ms, background_min_samples: ``maybe_background`` runs when this much
    time has passed (a thread waits 1 ms at least) and this many samples wait.
    max_pending_samples: how many rows may wait; a call with more still changes its session's
    adapter, and counts for no merge.
    consolidation: "ewc_merge", "average", "quality_weighted", "best_only", "ensemble".
    ewc_lambda, ewc_gamma: the penalty (delta form) on leaving what is consolidated, 0 for none,
    and what is kept of the Fisher information at each consolidation; defaults of ``EWC``.
    deep_trigger_threshold: summed quality of applied samples that calls for a deep run;
    deep_lr, deep_epochs, deep_batch_size, quality_threshold: of that run; the first three are
    what lora_engine/evidence/adapters.py learns a task with.
    held_out: one in ten samples of a module, the last so many, are kept to judge a merge by.
    ensemble_size: adapters that strategy keeps.

    Raises ValueError, TypeError.
    """

    micro_lora: MicroLoRAConfig = field(
        default_factory=lambda: MicroLoRAConfig.for_hidden_dim(4096)
    )
    instant_lr: float = 0.01
    max_grad_norm: float = 1.0
    background_interval_ms: float = 100.0
    background_min_samples: int = 10
    max_pending_samples: int = 1000
    consolidation: str = "ewc_merge"
    ewc_lambda: float = EWC_LAMBDA
    ewc_gamma: float = GAMMA
    deep_trigger_threshold: float = 100.0
    deep_lr: float = 0.1
    deep_epochs: int = 10
    deep_batch_size: int = 32
    quality_threshold: float = 0.5
    held_out: int = 100
    ensemble_size: int = 8

    def __post_init__(self) -> None:
        micro: Any = self.micro_lora
        if not isinstance(micro, MicroLoRAConfig):
            got = type(micro).__name__
            raise TypeError(f"SonaConfig: micro_lora: expected a MicroLoRAConfig, got {got}")
        for name in ("instant_lr", "max_grad_norm", "deep_lr"):
            self._number(name, 0.0, math.inf, "a number above 0", above=True)
        for name in ("background_interval_ms", "ewc_lambda", "deep_trigger_threshold"):
            self._number(name, 0.0, math.inf, "0 or more")
        for name in ("ewc_gamma", "quality_threshold"):
            self._number(name, 0.0, 1.0, "a number in 0..1")
        for name in ("background_min_samples", "max_pending_samples", "deep_epochs",
                     "deep_batch_size", "held_out", "ensemble_size"):  # fmt: skip
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"SonaConfig: {name}: expected 1 or more, got {value!r}")
        check_strategy("SonaConfig: consolidation", self.consolidation)

    def _number(
        self, name: str, low: float, high: float, expected: str, above: bool = False
    ) -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, Real):
            raise TypeError(f"SonaConfig: {name}: expected a number, got {value!r}")
        number = float(value)
        if not math.isfinite(number) or not low <= number <= high or (above and number == low):
            raise ValueError(f"SonaConfig: {name}: expected {expected}, got {value!r}")

    @classmethod
    def preset(cls, name: str, hidden_dim: int = 4096, **changes: Any) -> SonaConfig:
        """ "low_latency", "balanced", "high_quality" or "minimal_memory", as the guide's tables.

        changes: other fields, over the preset's. Raises ValueError for another name.
        """
        if name not in _PRESETS:
            known = ", ".join(_PRESETS)
            raise ValueError(f"SonaConfig.preset: name: expected one of {known}, got {name!r}")
        interval, times, pending = _PRESETS[name]
        made: dict[str, Any] = {
            "micro_lora": MicroLoRAConfig.preset(name, hidden_dim),
            "background_interval_ms": interval,
            "ewc_lambda": EWC_LAMBDA * times,
            "max_pending_samples": pending,
        }
        return cls(**{**made, **changes})
