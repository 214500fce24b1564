"""Dynamic rank: growing and shrinking adapters by their singular values."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from lora_engine.adapters.adapter import Adapter, LoraWeights
from lora_engine.adapters.low_rank import Svd, stacked, svd_of_sum
from lora_engine.adapters.micro_lora import MicroLoRA


class Resized(NamedTuple):
    """result: of the kind that was given. ranks and errors by module ("" for weights alone):
    ‖lost‖ / ‖delta‖, Frobenius; 0 where nothing was cut."""

    result: Any
    ranks: dict[str, int]
    errors: dict[str, float]


def singular_values(A: Any, B: Any, scaling: float) -> np.ndarray:
    """Those of the delta s B A, descending, float64 [r]: how much each direction carries.

    A [r, in], B [out, r], of any float dtype NumPy knows; O((in + out) r²).
    """
    found = np.zeros(len(A))
    S = _svd(A, B, scaling).S
    found[: len(S)] = S
    return found


def _svd(A: Any, B: Any, scaling: float) -> Svd:
    if np.ndim(A) != 2 or np.ndim(B) != 2 or np.shape(A)[0] != np.shape(B)[1]:
        raise ValueError(
            f"resize_rank: expected A [r, in] and B [out, r], got {np.shape(A)} and {np.shape(B)}"
        )
    if not (np.isfinite(A).all() and np.isfinite(B).all()):
        raise ValueError("resize_rank: A, B: expected finite numbers, got NaN or Inf")
    return svd_of_sum(stacked([B]), stacked([np.asarray(A).T]), np.full(len(A), scaling))


def _measured(w: LoraWeights, tolerance: float, max_rank: int | None) -> int:
    """The least rank that keeps all but the tolerance; twice the rank where all of it is needed."""
    S = singular_values(*w[:3])
    lost = np.sqrt(np.cumsum((S**2)[::-1])[::-1])  # by cutting to 0, 1, 2, ...
    needed = max(int((lost > tolerance * lost[0]).sum()), 1)
    rank = 2 * needed if needed == len(S) else needed
    return min(rank, max_rank or rank)


def _resized(w: LoraWeights, rank: int, seed: int) -> tuple[LoraWeights, float]:
    A, B, r = w.A, w.B, len(w.A)
    if rank == r:
        return w, 0.0
    if rank > r:
        bound = 1.0 / math.sqrt(A.shape[1])  # Kaiming-uniform, a = sqrt 5, as a fresh adapter
        drawn = np.random.default_rng(seed).uniform(-bound, bound, (rank - r, A.shape[1]))
        B = np.concatenate([B, np.zeros((len(B), rank - r), np.float32)], axis=1)
        return w._replace(A=np.concatenate([A, drawn.astype(np.float32)]), B=B), 0.0
    svd = _svd(A, B, w.scaling)
    cut = svd.cut(rank)
    new_A, new_B = np.zeros((rank, A.shape[1]), np.float32), np.zeros((len(B), rank), np.float32)
    new_A[: len(cut.S)], new_B[:, : len(cut.S)] = cut.factors()
    root = math.sqrt(abs(w.scaling)) or 1.0  # the scaling stays
    new_A /= root
    new_B /= math.copysign(root, w.scaling)
    return w._replace(A=new_A, B=new_B), cut.error


def resize_rank(
    adapter: Any,
    rank: int | None = None,
    *,
    tolerance: float | None = None,
    max_rank: int | None = None,
    seed: int = 0,
) -> Resized:
    """The adapter at another rank; what was given is not changed.

    adapter: (A, B, scaling) as ``AdapterPool.get`` gives them (and ``set`` takes them: a slot
    may have any rank), an ``Adapter``, or a ``MicroLoRA``. rank: of every module; or tolerance:
    each module gets the least rank whose loss, by its singular values, is at most this part of
    the delta's norm, and one that needs every direction it has twice its rank, up to max_rank.
    (As AdaLoRA, Zhang et al. 2023, arXiv:2303.10512, allots ranks by singular values.) The
    modules of a MicroLoRA share a rank: the largest that is wanted.

    Growing appends rows to A, drawn from the seed as a fresh adapter's, and zeros to B: the delta
    is the same. Shrinking is the nearest delta of the rank (Eckart and Young 1936), A and B
    balanced; ``errors`` says what it lost. The scaling stays, so alpha follows the rank. A new
    MicroLoRA starts with no step counts, baselines or gradients that wait.

    Raises ValueError (neither or both of rank and tolerance, rank with max_rank, ranges,
    shapes), TypeError.
    """
    if (rank is None) == (tolerance is None):
        raise ValueError("resize_rank: expected one of rank and tolerance, got both or neither")
    if rank is not None and max_rank is not None:
        raise ValueError("resize_rank: max_rank: expected none with rank, as tolerance's limit")
    for name, value in (("rank", rank), ("max_rank", max_rank)):
        if value is not None and (isinstance(value, bool) or int(value) != value or value < 1):
            raise ValueError(f"resize_rank: {name}: expected at least 1, got {value!r}")
    if tolerance is not None and not 0 <= tolerance < 1:
        raise ValueError(f"resize_rank: tolerance: expected 0 <= t < 1, got {tolerance!r}")

    def wanted(w: LoraWeights) -> int:
        return _measured(w, tolerance, max_rank) if tolerance is not None else int(rank or 1)

    if isinstance(adapter, MicroLoRA):
        return _micro_lora(adapter, wanted, seed)
    if isinstance(adapter, Adapter):
        ranks: dict[str, int] = {}
        errors: dict[str, float] = {}
        kinds: list[dict[str, LoraWeights]] = [{}, {}]
        for kind, given in zip(kinds, (adapter.modules, adapter.embeddings), strict=True):
            for name, w in given.items():
                kind[name], errors[name] = _resized(w, wanted(w), seed)
                ranks[name] = len(kind[name].A)
        return Resized(replace(adapter, modules=kinds[0], embeddings=kinds[1]), ranks, errors)
    if not isinstance(adapter, tuple) or len(adapter) < 3:
        raise TypeError(
            "resize_rank: adapter: expected (A, B, scaling), an Adapter or a MicroLoRA,"
            f" got {type(adapter).__name__}"
        )
    A, B, scaling = adapter[:3]
    weights = LoraWeights(np.asarray(A, np.float32), np.asarray(B, np.float32), float(scaling))
    new, error = _resized(weights, wanted(weights), seed)
    return Resized(tuple(new[:3]), {"": len(new.A)}, {"": error})


def _micro_lora(lora: MicroLoRA, wanted: Any, seed: int) -> Resized:
    weights = {name: LoraWeights(*lora.weights(name)) for name in lora.config.target_modules}
    rank = max(wanted(w) for w in weights.values())
    power = 0.5 if lora.config.use_rslora else 1.0
    alpha = lora.config.scaling * rank**power
    new = MicroLoRA(replace(lora.config, rank=rank, alpha=alpha))
    errors = {}
    for name, w in weights.items():
        changed, errors[name] = _resized(w, rank, seed)
        new.set_weights(name, changed.A, changed.B)
    return Resized(new, dict.fromkeys(weights, rank), errors)
