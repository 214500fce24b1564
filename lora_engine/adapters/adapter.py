"""Adapter: what a PEFT adapter folder holds, in memory: plain arrays, no slots, no learning."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from lora_engine.adapters.micro_lora import MicroLoRA

Array = NDArray[np.float32]


class LoraWeights(NamedTuple):
    """One module's adapter: the delta of a row x is scaling (B (A x)), plus ``bias_delta``.

    A [r, in], B [out, r], float32. bias_delta: scaling times PEFT's lora_B.bias [out], or None.
    """

    A: Array
    B: Array
    scaling: float
    bias_delta: Array | None = None


@dataclass(frozen=True, eq=False)
class Adapter:
    """The adapters of a model's modules, by the module's path in the model.

    modules: of linear layers (and of PEFT's Conv1D, in [r, in] and [out, r] too).
    embeddings: of embedding layers, A [r, rows], B [dim, r]; the delta of a token is
    scaling B A[:, token]. biases: whole biases [out] that stand in for the base's (PEFT's
    ``bias="all"`` or ``"lora_only"``, which names modules without an adapter too). Ranks and
    scalings may differ from module to module.

    modules_to_save: other whole tensors that stand in for the base's, by the parameter's path
    ("score.weight"): those of PEFT's modules_to_save, and an embedding matrix that PEFT wrote
    beside its adapter. float32, or whole numbers as they are. unused: tensors that PEFT writes
    and that change no output, by their path in the file. lora_biases: PEFT's lora_B.bias as
    read, by module, for writing it back to the bit; used while bias_delta is its multiple.

    peft_config: adapter_config.json as read, unknown keys kept; {} for an adapter made here.
    targets: the modules and embeddings that peft_config's target_modules stands for. dtype: of
    the weights in a file, "float32", "bfloat16" or "float16"; dtypes: of tensors with another,
    by their key in the file.
    """

    modules: Mapping[str, LoraWeights]
    embeddings: Mapping[str, LoraWeights] = field(default_factory=dict)
    biases: Mapping[str, Array] = field(default_factory=dict)
    peft_config: Mapping[str, Any] = field(default_factory=dict)
    dtype: str = "float32"
    modules_to_save: Mapping[str, NDArray[Any]] = field(default_factory=dict)
    unused: Mapping[str, NDArray[Any]] = field(default_factory=dict)
    lora_biases: Mapping[str, Array] = field(default_factory=dict)
    targets: Collection[str] = frozenset()
    dtypes: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Adapter:
        """Any LoRA folder that PEFT writes; weights are widened to float32.

        Refused by name: DoRA and every other variant whose delta is not scaling B A, folders
        whose training changed the base's weights (PiSSA, ...), a pickle in place of
        safetensors. Raises FormatError naming file and key, FileNotFoundError, OSError.
        """
        from lora_engine.adapters import peft_format

        return peft_format.load(folder)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """A folder that PEFT loads with equal outputs, in ``dtype``.

        What was loaded and not changed is written back with the same weight bytes. The folder
        is replaced whole: a kill leaves the old one or the new. Whatever else it holds is
        kept; engine state is, where it belongs to these weights. Raises ValueError, before
        anything is written, for weights that do not fit together or do not fit the dtype,
        OSError.
        """
        from lora_engine.adapters import peft_format

        peft_format.save(folder, self)

    @classmethod
    def from_micro_lora(cls, lora: MicroLoRA) -> Adapter:
        """A copy of a MicroLoRA's weights, with its config."""
        from lora_engine.adapters import micro_folder

        factors = {name: lora.weights(name)[:2] for name in lora.config.target_modules}
        return micro_folder.to_adapter(lora.config, factors, lora._peft_config)
