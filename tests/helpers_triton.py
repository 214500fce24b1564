"""What the tests of the Triton backend share: on a GPU where there is one, else interpreted."""

from __future__ import annotations

import os
from typing import Any

import hypothesis
import numpy as np
import pytest
import torch
from helpers import to_dtype

from lora_engine.backends import chosen

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FULL = os.environ.get("LORA_ENGINE_TEST_PROFILE") == "full"
# The interpreter takes some 40 ms for each block of a launch.
NO_SHRINKING = (hypothesis.Phase.explicit, hypothesis.Phase.generate)
few = hypothesis.settings(
    max_examples=60 if FULL else 3, deadline=None, derandomize=not FULL, phases=NO_SHRINKING
)
interpreted = pytest.mark.skipif(DEVICE == "cuda", reason="NumPy arrays are for the interpreter")


@pytest.fixture(scope="module")
def triton_backend():
    """Runs a module's tests on the Triton backend."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LORA_ENGINE_BACKEND", "triton")
        chosen.cache_clear()
        yield
    chosen.cache_clear()


def on_device(values: np.ndarray, dtype: str = "float32") -> torch.Tensor:
    """The values as a tensor of dtype, where the kernels run."""
    return to_dtype(values, dtype).to(DEVICE)


def indices(values: Any) -> torch.Tensor:
    """Slot ids or offsets, where the kernels run."""
    return torch.as_tensor(np.asarray(values, np.int32), device=DEVICE)
