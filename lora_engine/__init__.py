"""lora_engine: LoRA adapters applied per row and learned online.

The engine needs NumPy and safetensors; torch is taken where it is there.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lora_engine.adapters.adapter import Adapter
from lora_engine.adapters.config import MicroLoRAConfig
from lora_engine.adapters.micro_lora import AdaptResult, MicroLoRA
from lora_engine.adapters.pool import AdapterPool
from lora_engine.backends import backends
from lora_engine.errors import FormatError, StoreLocked
from lora_engine.learning.ewc import EWC
from lora_engine.learning.feedback import Feedback
from lora_engine.ops import (
    BatchedAdaptResult,
    batched_adapt,
    batched_lora_delta,
    ewc_step,
    fisher_accumulate,
    get_num_threads,
    lora_delta,
    lora_fisher,
    lora_fisher_factors,
    nf4_dequantize,
    nf4_linear,
    nf4_quantize,
    set_num_threads,
)

if TYPE_CHECKING:
    from lora_engine.adapters.adapter import Adapter
    from lora_engine.adapters.compose import compose_parallel, compose_sequential
    from lora_engine.adapters.merge import merge_adapters
    from lora_engine.adapters.router import Router
    from lora_engine.adapters.store import AdapterStore
    from lora_engine.adapters.variants.delta_lora import delta_lora
    from lora_engine.adapters.variants.int8 import Int8LoRA
    from lora_engine.adapters.variants.resize import resize_rank
    from lora_engine.adapters.variants.vera import Vera
    from lora_engine.hf import Attached, attach
    from lora_engine.learning.feedback_buffer import FeedbackBuffer
    from lora_engine.learning.pipeline import TrainingPipeline
    from lora_engine.learning.sona import Sona
    from lora_engine.learning.sona_config import SonaConfig
    from lora_engine.learning.task_boundary import TaskBoundary
    from lora_engine.learning.training_config import TrainingConfig
    from lora_engine.learning.training_samples import TrainingSample
    from lora_engine.quant.linear import NF4Linear
    from lora_engine.quant.load import load_quantized
    from lora_engine.quant.model import quantize
    from lora_engine.quant.nf4 import NF4Tensor

__version__ = "0.1.0"

__all__ = [
    "EWC",
    "AdaptResult",
    "Adapter",
    "AdapterPool",
    "AdapterStore",
    "Attached",
    "BatchedAdaptResult",
    "Feedback",
    "FeedbackBuffer",
    "FormatError",
    "Int8LoRA",
    "MicroLoRA",
    "MicroLoRAConfig",
    "NF4Linear",
    "NF4Tensor",
    "Router",
    "Sona",
    "SonaConfig",
    "StoreLocked",
    "TaskBoundary",
    "TrainingConfig",
    "TrainingPipeline",
    "TrainingSample",
    "Vera",
    "attach",
    "backends",
    "batched_adapt",
    "batched_lora_delta",
    "compose_parallel",
    "compose_sequential",
    "delta_lora",
    "ewc_step",
    "fisher_accumulate",
    "get_num_threads",
    "load_quantized",
    "lora_delta",
    "lora_fisher",
    "lora_fisher_factors",
    "merge_adapters",
    "nf4_dequantize",
    "nf4_linear",
    "nf4_quantize",
    "quantize",
    "resize_rank",
    "set_num_threads",
]


_AT_FIRST_USE = {
    "Int8LoRA": "lora_engine.adapters.variants.int8",
    "Vera": "lora_engine.adapters.variants.vera",
    "delta_lora": "lora_engine.adapters.variants.delta_lora",
    "resize_rank": "lora_engine.adapters.variants.resize",
    "Attached": "lora_engine.hf",
    "AdapterStore": "lora_engine.adapters.store",
    "Adapter": "lora_engine.adapters.adapter",
    "FeedbackBuffer": "lora_engine.learning.feedback_buffer",
    "NF4Linear": "lora_engine.quant.linear",
    "NF4Tensor": "lora_engine.quant.nf4",
    "Router": "lora_engine.adapters.router",
    "Sona": "lora_engine.learning.sona",
    "SonaConfig": "lora_engine.learning.sona_config",
    "TaskBoundary": "lora_engine.learning.task_boundary",
    "TrainingConfig": "lora_engine.learning.training_config",
    "TrainingPipeline": "lora_engine.learning.pipeline",
    "TrainingSample": "lora_engine.learning.training_samples",
    "attach": "lora_engine.hf",
    "compose_parallel": "lora_engine.adapters.compose",
    "compose_sequential": "lora_engine.adapters.compose",
    "load_quantized": "lora_engine.quant.load",
    "merge_adapters": "lora_engine.adapters.merge",
    "quantize": "lora_engine.quant.model",
}


def __getattr__(name: str) -> Any:
    """What is imported at first use: together it takes longer than the rest."""
    if name in _AT_FIRST_USE:
        return getattr(import_module(_AT_FIRST_USE[name]), name)
    raise AttributeError(f"module 'lora_engine' has no attribute {name!r}")
