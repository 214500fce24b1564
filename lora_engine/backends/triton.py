"""The ops of ``lora_engine._C`` as Triton kernels, for torch tensors on a GPU."""

from __future__ import annotations

from typing import Any

from lora_engine.backends.reference import Step  # noqa: F401  the registry looks here for it
from lora_engine.backends.triton_adapt import (  # noqa: F401  the registry looks here for them
    Ewc,
    ewc_step,
)
from lora_engine.backends.triton_arrays import (
    check_dtype,
    check_finite,
    check_overlap,
    matrix,
    output,
)
from lora_engine.backends.triton_fisher import (  # noqa: F401
    fisher_accumulate,
    lora_fisher,
    lora_fisher_factors,
)
from lora_engine.backends.triton_nf4 import (  # noqa: F401
    Nf4,
    nf4_decode,
    nf4_encode,
    nf4_linear,
    nf4_linear_backward,
)
from lora_engine.backends.triton_pool import (  # noqa: F401  the registry looks here for them
    Pool,
    pool_device,
)
from lora_engine.kernels import lora_delta as _lora_delta


def lora_delta(x: Any, A: Any, B: Any, scaling: float, out: Any, accumulate: bool) -> Any:
    op = "lora_delta"
    rows = matrix(op, "x", x)
    a = matrix(op, "A", A, None, rows.shape[1], rows)
    b = matrix(op, "B", B, None, a.shape[0], rows)
    check_dtype(op, "B", b.dtype, a.dtype, ", the dtype of A")
    check_finite(op, "scaling", scaling)
    to = output(op, x, rows, out, b.shape[0])
    for name, other in (("A", a), ("B", b)):
        check_overlap(op, "out", to.rows, name, other)
    _lora_delta.lora_delta(rows, a, b, float(scaling), to.rows, accumulate and out is not None)
    return to.result
