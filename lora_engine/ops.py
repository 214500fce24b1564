"""One function per op. Arguments are checked by the backend, before any memory is touched.

Arrays are NumPy arrays or torch tensors, on the CPU or all on one GPU, contiguous or
strided, float32 or float16 (as tensors also bfloat16); a vector stands for one row. Sums
are float32; a result has the dtype of x. Errors name op, argument, expected and got: ValueError
(shape, range, overlap, device), TypeError (dtype), IndexError (slot).
"""

from __future__ import annotations

from functools import cache
from numbers import Real
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from lora_engine import _C
from lora_engine.backends import backend_of

if TYPE_CHECKING:
    from lora_engine.adapters.pool import AdapterPool
    from lora_engine.learning.ewc import EWC
    from lora_engine.quant.nf4 import NF4Tensor

NO_ADAPTER, APPLIED, NOT_FINITE, NOT_OBSERVED = 0, 1, 2, 3  # le_outcome of lora_engine.h
NOTES = {
    NO_ADAPTER: "no adapter was named: nothing was learned",
    APPLIED: "",
    NOT_FINITE: "the gradient or the step holds NaN or Inf: the adapter is untouched",
}


NO_ROWS = "x has no rows: nothing was learned"


class BatchedAdaptResult(NamedTuple):
    """What became of each row: applied [n] bool, and in words what was not. On a GPU applied
    is a tensor there, which the host has not waited for."""

    applied: Any
    note: str


def _is_number(value: Any) -> bool:
    return isinstance(value, Real)


def make_step(
    backend: Any,
    lr: float,
    max_norm: float | None = None,
    lr_ratio: float = 1.0,
    train_A: bool = True,
    weight_decay: float = 0.0,
    ewc: EWC | None = None,
) -> Any:
    """The parameters of a step in a backend's form; raises TypeError, ValueError."""
    if max_norm is not None and not (_is_number(max_norm) and max_norm > 0):
        raise ValueError(
            f"batched_adapt: max_norm: expected a number above 0 or None, got {max_norm!r}"
        )
    for name, value in (("lr", lr), ("lr_ratio", lr_ratio), ("weight_decay", weight_decay)):
        if not _is_number(value):
            raise TypeError(f"batched_adapt: {name}: expected a number, got {value!r}")
    if ewc is not None and not hasattr(ewc, "_storage"):
        raise TypeError(f"batched_adapt: ewc: expected an EWC or None, got {type(ewc).__name__}")
    storage = None if ewc is None else ewc._storage
    limit = 0.0 if max_norm is None else float(max_norm)
    return backend.Step(
        float(lr), limit, float(lr_ratio), bool(train_A), float(weight_decay), storage
    )


def lora_delta(
    x: Any, A: Any, B: Any, scaling: float, out: Any = None, accumulate: bool = False
) -> Any:
    """scaling (x Aᵀ) Bᵀ (LoRA: Hu et al. 2021, eq. 3).

    x [n, in], A [r, in], B [out, r]; x and out share a dtype, A and B share a
    dtype. Returns [n, out], or ``out`` (with accumulate: added to what it held).
    Fastest where B is the transpose of a contiguous array.
    """
    return backend_of(x).lora_delta(x, A, B, scaling, out, accumulate)


def batched_lora_delta(
    x: Any,
    pool: AdapterPool,
    ids: Any,
    weights: Any = None,
    out: Any = None,
    accumulate: bool = True,
) -> Any:
    """y_i += sum_j w_ij s_j B_j (A_j x_i): each row has its own adapter or mixture.

    x [n, in]; ids int32 [n] or [n, k], a slot of the pool or -1 for none;
    weights float32, shaped like ids, default ones. Ranks may differ from slot
    to slot. Returns [n, out], or ``out``: added to, or with accumulate=False
    overwritten. A row of -1 keeps the bits of ``out`` (zeros where it is
    overwritten or new). A row's result does not depend on the other rows.
    """
    return pool._storage.forward(x, ids, weights, out, accumulate)


def batched_adapt(
    x: Any,
    grad: Any,
    pool: AdapterPool,
    ids: Any,
    lr: float,
    *,
    weights: Any = None,
    max_norm: float | None = None,
    lr_ratio: float = 1.0,
    train_A: bool = True,
    weight_decay: float = 0.0,
    ewc: EWC | None = None,
) -> BatchedAdaptResult:
    """One gradient step for every adapter that the rows name.

    x [n, in], grad = dL/dy [n, out] of x's dtype, ids and weights as in
    ``batched_lora_delta``. From the values before the step, h = A x:
    gB = mean over the adapter's rows of w s grad hᵀ, gA = mean of
    w s (Bᵀ grad) xᵀ. Then, in one pass: clipping to ``max_norm`` (gA and gB
    together), LoRA+ (lr_B = lr_ratio lr; Hayou et al. 2024), LoRA-FA
    (train_A=False; Zhang et al. 2023), decoupled weight decay, and the proximal
    EWC step where ``ewc`` is given. An adapter whose gradient holds NaN or Inf,
    or whose step would leave the range of the pool's dtype, is left untouched,
    and its rows are reported as not applied.
    """
    step = make_step(pool._backend, lr, max_norm, lr_ratio, train_A, weight_decay, ewc)
    outcomes = pool._storage.adapt(x, grad, ids, weights, step)
    applied = outcomes == APPLIED
    if getattr(outcomes, "is_cuda", False):
        return BatchedAdaptResult(applied, "on the device: applied says which rows were learned")
    missed = len(applied) - int(np.count_nonzero(applied))
    if not missed:
        return BatchedAdaptResult(applied, "")
    counts = {what: int(np.count_nonzero(outcomes == what)) for what in (NO_ADAPTER, NOT_FINITE)}
    note = "; ".join(f"{n} rows: {NOTES[what]}" for what, n in counts.items() if n)
    return BatchedAdaptResult(applied, note)


def nf4_quantize(W: Any, blocksize: int = 64, double_quant: bool = False) -> NF4Tensor:
    """W [rows, cols], float32, bfloat16 or float16, in 4 bits a weight, as bitsandbytes has it.

    Each weight over its block's largest magnitude becomes the nearest of 16 codes
    (NF4: Dettmers et al. 2023, appendix E). blocksize: a power of two from 32 to
    4096; double_quant: the magnitudes in 8 bits (section 3). Raises TypeError
    (dtype), ValueError (shape, blocksize, NaN or Inf in W).
    """
    made: NF4Tensor = _nf4_tensor().from_float(W, blocksize, double_quant)
    return made


def nf4_dequantize(w: NF4Tensor, out: Any = None) -> Any:
    """code * absmax in float32, then one rounding to the dtype of ``out``.

    Returns a new float32 array [rows, cols], or ``out``: float32, bfloat16 or float16.
    """
    return _packed("nf4_dequantize", w).to_float(out=out)


def nf4_linear(
    x: Any,
    w: NF4Tensor,
    bias: Any = None,
    pool: AdapterPool | None = None,
    ids: Any = None,
    weights: Any = None,
    out: Any = None,
    compute: str | None = None,
) -> Any:
    """x dequant(W)ᵀ + bias, and with a pool each row's delta (``batched_lora_delta``).

    x [..., in] float32, bfloat16 or float16: its n rows are those of all leading
    dimensions; w [out, in], decoded on the way and never whole (QLoRA: Dettmers et
    al. 2023, eq. 5); bias [out], any of these dtypes; ids [n] or [n, k] and weights as in
    ``batched_lora_delta``, for a pool of w's sizes. compute: "float32", or "bfloat16":
    x is rounded to it, and the codes or the decoded weights may be, whichever is faster
    for so many rows on this CPU (sums are float32); None: x's dtype, float32 for float16.
    Returns [..., out], or ``out``, overwritten. A row of -1 has the bits it has without
    a pool.

    A torch x or bias that requires grad is differentiated through (``out`` is then not
    taken), from the packed weights; the backward pass adds the adapters' gradients to
    what ``pool.gradient`` gives and ``pool.apply_updates`` applies. Where neither does,
    nothing is recorded and no adapter learns: call ``x.requires_grad_()`` for a layer
    whose input is data. Raises ValueError, TypeError, IndexError (slot).
    """
    _packed("nf4_linear", w)
    if (pool is None) != (ids is None) or (ids is None and weights is not None):
        raise ValueError("nf4_linear: pool, ids: expected both, or neither and no weights")
    if pool is not None and not hasattr(pool, "_storage"):
        raise TypeError(f"nf4_linear: pool: expected an AdapterPool, got {type(pool).__name__}")
    if not isinstance(compute, (str, type(None))):
        raise TypeError(f"nf4_linear: compute: expected a name or None, got {compute!r}")
    if getattr(x, "ndim", 0) > 2:
        shape = (*x.shape[:-1], w.shape[0])
        rows = x.reshape(-1, x.shape[-1])
        y = nf4_linear(rows, w, bias, pool, ids, weights, _rows_of(out, shape), compute)
        return y.reshape(shape) if out is None else out
    if getattr(x, "requires_grad", False) or getattr(bias, "requires_grad", False):
        from lora_engine import torch_ops

        if torch_ops.recording():
            return torch_ops.nf4_linear(x, bias, w, pool, ids, weights, out, compute)
        x, bias = torch_ops.detached(x), torch_ops.detached(bias)
    storage = None if pool is None else pool._storage
    backend = backend_of(x)
    packed = w.storage(backend)
    return backend.nf4_linear(x, packed, bias, storage, ids, weights, out, compute)


def _rows_of(out: Any, shape: tuple[int, ...]) -> Any:
    """An output of this shape as the rows of its leading dimensions, in the same memory."""
    if out is None:
        return None
    got = tuple(np.shape(out))
    if got != shape:
        raise ValueError(f"nf4_linear: out: expected shape {list(shape)}, got {list(got)}")
    try:
        if hasattr(out, "detach"):
            return out.view(-1, shape[-1])
        rows = out.view()
        rows.shape = (-1, shape[-1])
        return rows
    except (AttributeError, RuntimeError, ValueError):
        raise ValueError(
            "nf4_linear: out: expected leading dimensions that are one in memory, got strides"
            f" {out.stride() if hasattr(out, 'stride') else out.strides}"
        ) from None


@cache
def _nf4_tensor() -> Any:
    """The class, imported at first use."""
    from lora_engine.quant.nf4 import NF4Tensor

    return NF4Tensor


def _packed(op: str, w: Any) -> NF4Tensor:
    if not isinstance(w, _nf4_tensor()):
        raise TypeError(f"{op}: w: expected an NF4Tensor, got {type(w).__name__}")
    packed: NF4Tensor = w
    return packed


def ewc_step(
    theta: Any,
    grad: Any,
    fisher: Any,
    anchor: Any,
    lr: float,
    ewc_lambda: float,
    *,
    seed: int = 0,
    version: int = 0,
) -> None:
    """theta <- (theta - lr g + lr c F anchor) / (1 + lr c F), c = 2 ewc_lambda, in place.

    All [n] or [n, m] of one shape; fisher and anchor float32. The proximal step
    for the penalty ewc_lambda sum F (theta - anchor)² (EWC: Kirkpatrick et al.
    2017, eq. 3); it does not diverge however large ewc_lambda is. A theta of
    16 bits is rounded stochastically, keyed (seed, version); in float16 it stays
    within 65504.
    """
    backend_of(theta).ewc_step(theta, grad, fisher, anchor, lr, ewc_lambda, seed, version)


def fisher_accumulate(F: Any, g: Any, gamma: float, scale: float) -> None:
    """F <- gamma F + scale g∘g, in place and in one pass: the running Fisher information of
    online EWC (Schwarz et al. 2018, Progress & Compress, section 3).

    F and g [n] or [n, m] of one shape; their dtypes may differ. Computed in float32, rounded
    to nearest in F's dtype. Raises ValueError (shape, overlap, gamma or scale not finite),
    TypeError (dtype).
    """
    backend_of(F).fisher_accumulate(F, g, gamma, scale)


def lora_fisher(
    x: Any,
    grad: Any,
    A: Any,
    B: Any,
    scaling: float,
    segments: Any = None,
    *,
    out: tuple[Any, Any] | None = None,
) -> tuple[Any, Any]:
    """(F_A [r, in], F_B [out, r]): sums over samples of squared per-sample gradients of A and B.

    The diagonal of the empirical Fisher information (EWC: Kirkpatrick et al. 2017, eq. 3)
    times the number of samples. x [n, in], grad = dL/dy [n, out] of x's dtype; A [r, in],
    B [out, r]. One row a sample: F_B = s² (grad∘grad)ᵀ(h∘h), F_A = s² (g∘g)ᵀ(x∘x),
    h = A x, g = Bᵀ grad. ``segments``: int32 offsets [S+1], ascending, 0 first and n last:
    sample i is rows segments[i] to segments[i+1], whose gradients are summed first and
    squared then; it may be empty. No per-sample gradient of a row is formed. On a GPU the
    offsets are not read for a check, which would be a wait: one outside [0, n] counts as the
    nearer end, and where one descends the sample is empty.

    Returns new float32 arrays; or ``out``, a pair of float64 or float32 arrays, which is
    added to. Sums inside a call are kept in float64, so 10 million samples keep a relative
    error under 1e-6; over many calls that takes a float64 ``out``. Squares are taken in
    float32: values beyond about 1e-18 to 1e18 vanish or overflow.

    Raises ValueError (shape, segments, overlap, scaling not finite), TypeError (dtype).
    """
    pair: tuple[Any, Any] = backend_of(x).lora_fisher(x, grad, A, B, scaling, segments, out)
    return pair


def lora_fisher_factors(
    x: Any, grad: Any, *, out: tuple[Any, Any] | None = None
) -> tuple[Any, Any]:
    """(u [out], v [in]): the sums over rows of grad∘grad and of x∘x.

    u vᵀ stands for the Fisher information of ΔW (the diagonals of K-FAC's factors: Martens
    and Grosse 2015, eq. 1). x [n, in], grad [n, out] of x's dtype; precision, ``out`` and
    errors as in ``lora_fisher``.
    """
    pair: tuple[Any, Any] = backend_of(x).lora_fisher_factors(x, grad, out)
    return pair


def set_num_threads(num_threads: int) -> None:
    """How many threads an op may use: 1 to 4096; at the start, the CPUs the process may use."""
    _C.set_num_threads(num_threads)


def get_num_threads() -> int:
    """How many threads an op may use."""
    return int(_C.get_num_threads())
