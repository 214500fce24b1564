"""What the op tests share: drawn inputs in every layout, and the error measure."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch

import lora_engine as le
from lora_engine import reference

# ‖out - ref‖ <= TOLERANCE ‖ |s||x||A|ᵀ|B|ᵀ + |y| ‖, by the dtype of x and out.
TOLERANCE = {"float32": 1e-6, "bfloat16": 4e-3, "float16": 1e-3}
# Of weights after a step: a stochastic rounding is off by less than one unit in the last place.
STORED = {"float32": 2e-6, "bfloat16": 2.0**-7, "float16": 2.0**-10}

DTYPES = ("float32", "bfloat16", "float16")
KINDS = ("numpy", "torch")
DTYPE_PAIRS = [(x, w) for x in DTYPES for w in DTYPES]


def kinds_of(*dtypes: str) -> tuple[str, ...]:
    """The kinds of array that come in all of these dtypes: NumPy has no bfloat16."""
    return ("torch",) if "bfloat16" in dtypes else KINDS


def f64(a: Any) -> np.ndarray:
    """float64 of a NumPy array or torch tensor."""
    if isinstance(a, torch.Tensor):
        return a.detach().double().cpu().numpy()
    return np.asarray(a, dtype=np.float64)


def to_dtype(values: np.ndarray, dtype: str, kind: str = "torch") -> Any:
    """The values as a tensor or NumPy array of dtype."""
    if kind == "numpy":
        return np.ascontiguousarray(values, dtype=dtype)
    return torch.from_numpy(np.ascontiguousarray(values, np.float32)).to(getattr(torch, dtype))


def strided(a: Any, layout: str) -> Any:
    """The same matrix in another layout: "rows" (padded), "columns" (transposed), "steps"."""
    n, m = a.shape
    new = (
        (lambda *s: a.new_full(s, float("nan")))
        if isinstance(a, torch.Tensor)
        else (lambda *s: np.full(s, np.nan, a.dtype))
    )
    if layout == "contiguous":
        return a
    if layout == "rows":
        view = new(n, m + 5)[:, 3 : 3 + m]
    elif layout == "columns":
        view = new(m, n).T
    else:
        view = new(2 * n, 3 * m)[::2, ::3]
    view[...] = a
    return view


LAYOUTS = ("contiguous", "rows", "columns", "steps")


def poisoned(like: Any, n: int, width: int) -> Any:
    """An output full of NaN, of the kind and dtype of ``like``."""
    if isinstance(like, torch.Tensor):
        return like.new_full((n, width), float("nan"))
    return np.full((n, width), np.nan, like.dtype)


def bits(a: Any) -> bytes:
    """The bytes of an array, NaN included."""
    if isinstance(a, torch.Tensor):
        width = {2: torch.int16, 4: torch.int32}[a.element_size()]
        return a.cpu().contiguous().view(width).numpy().tobytes()
    return np.ascontiguousarray(a).tobytes()


def delta_error(out: Any, ref: np.ndarray, magnitude: np.ndarray) -> float:
    """‖out - ref‖ / ‖magnitude‖, the design's measure."""
    scale = np.linalg.norm(magnitude)
    gap = np.linalg.norm(f64(out) - ref)
    return float(gap / scale) if scale else float(gap)


def magnitude(x: Any, A: Any, B: Any, scaling: float) -> np.ndarray:
    """|s| |x| |A|ᵀ |B|ᵀ."""
    return abs(scaling) * np.abs(f64(x)) @ np.abs(f64(A)).T @ np.abs(f64(B)).T


class Filled(NamedTuple):
    """A pool and, slot by slot, what is in it as the reference sees it."""

    pool: le.AdapterPool
    adapters: dict[int, reference.Adapter]

    def refresh(self) -> dict[int, reference.Adapter]:
        """What is in the pool now."""
        return {slot: read_adapter(self.pool, slot) for slot in self.adapters}


def read_adapter(pool: le.AdapterPool, slot: int) -> reference.Adapter:
    A, B, scaling = pool.get(slot)
    return (
        reference.Adapter(A, B, scaling) if pool._sliced else reference.Adapter([A], [B], scaling)
    )


def fill_pool(
    rng: np.random.Generator,
    in_features: int,
    slices: tuple[int, ...],
    ranks: list[Any],
    dtype: str = "float32",
    **options: Any,
) -> Filled:
    """A pool with an adapter of each rank; a rank may be a tuple, one a slice (0: missing)."""
    sliced = len(slices) > 1
    pool = le.AdapterPool(in_features, slices if sliced else slices[0], dtype=dtype, **options)
    adapters = {}
    for rank in ranks:
        per_slice = rank if isinstance(rank, tuple) else (rank,) * len(slices)
        A = [
            rng.standard_normal((r, in_features)).astype("f4") if r or not sliced else None
            for r in per_slice
        ]
        B = [
            rng.standard_normal((out, r)).astype("f4") if r or not sliced else None
            for r, out in zip(per_slice, slices, strict=True)
        ]
        scaling = float(rng.uniform(0.5, 2.0))
        slot = pool.add(A, B, scaling) if sliced else pool.add(A[0], B[0], scaling)
        adapters[slot] = read_adapter(pool, slot)
    return Filled(pool, adapters)


def batch_magnitude(
    x: Any,
    adapters: dict[int, reference.Adapter],
    outs: tuple[int, ...],
    ids: Any,
    weights: Any = None,
) -> np.ndarray:
    """The magnitude of a batch: the reference of the absolute values."""
    absolute = {
        slot: reference.Adapter(
            [None if m is None else np.abs(m) for m in a.A],
            [None if m is None else np.abs(m) for m in a.B],
            abs(a.scaling),
        )
        for slot, a in adapters.items()
    }
    w = None if weights is None else np.abs(f64(weights))
    return reference.batched_lora_delta(np.abs(f64(x)), absolute, outs, np.asarray(ids), w)
