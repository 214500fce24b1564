"""Adapter: what a PEFT adapter folder holds, in memory: plain arrays, no slots, no learning."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]


class LoraWeights(NamedTuple):
    """One module's adapter: the delta of a row x is scaling (B (A x)), plus ``bias_delta``.

    A [r, in], B [out, r], float32. bias_delta: scaling times PEFT's lora_B.bias [out], or None.
    """

    A: Array
    B: Array
    scaling: float
    bias_delta: Array | None = None


@dataclass(frozen=True)
class Adapter:
    """The adapters of a model's modules, by the module's path in the model.

    modules: of linear layers (and of PEFT's Conv1D, in [r, in] and [out, r] too).
    embeddings: of embedding layers, A [r, rows], B [dim, r]; the delta of a token is
    scaling B A[:, token]. biases: whole biases [out] that stand in for the base's (PEFT's
    ``bias="all"`` or ``"lora_only"``). Ranks and scalings may differ from module to module.
    peft_config: adapter_config.json as read, unknown keys kept; {} for an adapter made here.
    dtype: of the weights in a file, "float32", "bfloat16" or "float16".
    """

    modules: Mapping[str, LoraWeights]
    embeddings: Mapping[str, LoraWeights] = field(default_factory=dict)
    biases: Mapping[str, Array] = field(default_factory=dict)
    peft_config: Mapping[str, Any] = field(default_factory=dict)
    dtype: str = "float32"
