"""Consolidation: what sessions learned, merged into the adapter that all are served with.

A session is served D_0 + D_k, the consolidated adapter's delta and its own fast one's. A merge
makes the new D_0; the sessions' own are zeroed after it. Session k asks for D_0 + D_k, so
strategies that average give D_0 + sum_k w_k D_k with sum w = 1, cut to a rank:

- "average": equal weights.
- "quality_weighted": w_k proportional to mean quality times samples.
- "best_only": equal weights of the 20 % best by mean quality, at least one.
- "ewc_merge": the D that minimises sum_k w_k ‖U_k^½ (D - target_k) V_k^½‖², Fisher information
  u_k v_kᵀ, w_k quality times samples; the consolidated adapter takes part with its own.
- "ensemble": nothing is merged: ``ensemble`` mixes the sessions' adapters row by row.

``reference_consolidation`` has the formulas; on the CPU they run in C++, without the GIL.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lora_engine import reference_consolidation as reference
from lora_engine.adapters.config import MAX_FLOAT
from lora_engine.adapters.pool import AdapterPool

STRATEGIES = ("ewc_merge", "average", "quality_weighted", "best_only", "ensemble")
BEST_PART = 0.2


class Consolidated(NamedTuple):
    """A merge: what ``pool.set(base, A, B, scaling)`` takes.

    versions: the version of the base and of each slot that was merged; a slot whose version is
    another now learned meanwhile. sweeps: of the alternating solves, 0 for the other strategies.
    """

    A: Any
    B: Any
    scaling: float
    versions: tuple[int, ...]
    sweeps: int


def check_strategy(where: str, strategy: Any) -> None:
    """Raises ValueError unless it is one of STRATEGIES."""
    if strategy not in STRATEGIES:
        raise ValueError(f"{where}: expected one of {', '.join(STRATEGIES)}, got {strategy!r}")


def _per_slot(name: str, values: Any, count: int, most: float) -> NDArray[np.float64]:
    given = np.asarray(values, np.float64)
    if given.shape != (count,):
        raise ValueError(f"consolidate: {name}: expected shape ({count},), got {given.shape}")
    if not ((given >= 0) & (given <= most)).all():
        raise ValueError(f"consolidate: {name}: expected values of 0 to {most:g}, got others")
    return given


def strategy_weights(strategy: str, quality: Any, samples: Any) -> NDArray[np.float64]:
    """What each session weighs, float64 [K].

    quality: mean quality of a session's applied samples, 0 to 1, [K]; samples: how many, [K].
    They sum to 1 but for "ewc_merge", whose Fisher information is a mean over samples, so that
    quality times samples are in its units. Sessions that are all worth nothing weigh 0 each.
    Raises ValueError (an unknown strategy, "ensemble", K = 0, values out of range).
    """
    check_strategy("consolidate: strategy", strategy)
    if strategy == "ensemble":
        raise ValueError(
            "consolidate: strategy: expected one that merges, got ensemble, which keeps adapters"
        )
    count = len(np.atleast_1d(quality))
    if count == 0:
        raise ValueError("consolidate: slots: expected at least one slot, got none")
    worth = _per_slot("quality", quality, count, 1.0)
    number = _per_slot("samples", samples, count, MAX_FLOAT)
    if strategy == "average":
        return np.full(count, 1.0 / count)
    if strategy == "best_only":
        best = int(np.ceil(BEST_PART * count))
        chosen = np.zeros(count)
        chosen[np.argsort(-worth, kind="stable")[:best]] = 1.0 / best
        return chosen
    weights: NDArray[np.float64] = worth * number
    total = weights.sum()
    return weights / total if strategy == "quality_weighted" and total > 0 else weights


def consolidate(
    pool: AdapterPool,
    base: int,
    slots: Sequence[int],
    strategy: str = "ewc_merge",
    *,
    quality: Any,
    samples: Any,
    base_samples: float = 0.0,
    u: Any = None,
    v: Any = None,
    summed: bool = False,
    rank: int | None = None,
    max_sweeps: int = 8,
    tolerance: float = 1e-3,
    num_threads: int = 1,
) -> Consolidated:
    """The merge of the slots' adapters into the base's; the pool is not changed.

    quality, samples [K]: as in ``strategy_weights``. For "ewc_merge": base_samples, what the base
    weighs; u [n, out] and v [n, in], float32, a row a slot id of the pool, the mean Fisher
    factors (``lora_fisher_factors`` over the number of samples); summed: the slots' rows are sums
    over their samples, the base's means. rank: of the result, default the base's; its scaling
    is the base's. max_sweeps, tolerance: when the iterations end;
    num_threads: how many threads may work on it.

    Slots are read one after another, each under its lock: an adapter that learns meanwhile is
    merged as it was before or after.

    Raises ValueError (shapes, ranges, NaN, an unknown strategy, K = 0, a slot twice), TypeError
    (dtypes), IndexError (slots).
    """
    sessions = strategy_weights(strategy, quality, samples)
    ids = np.ascontiguousarray(slots, np.int32)
    if ids.shape != sessions.shape:
        raise ValueError(
            f"consolidate: slots: expected as many as quality has, {len(sessions)}, got {ids.shape}"
        )
    if len(pool.slices) != 1:
        raise ValueError(
            f"consolidate: pool: expected a pool of one slice, got {len(pool.slices)} slices"
        )
    _, _, scaling = pool.get(base)
    rank = pool.ranks(base)[0] if rank is None else rank
    fisher = strategy == "ewc_merge"
    if fisher and (u is None or v is None):
        raise ValueError("consolidate: u, v: expected Fisher factors for ewc_merge, got None")
    merge = getattr(pool._backend, "consolidate", None) or _by_reference(pool)
    weights = np.concatenate([[base_samples], sessions]).astype(np.float32)
    counts = np.concatenate([[1.0], samples]).astype(np.float32) if fisher and summed else None
    A = np.empty((max(rank, 0), pool.in_features), np.float32)
    B = np.empty((pool.out_features, max(rank, 0)), np.float32)
    _, _, versions, _, sweeps = merge(
        pool._storage, base, ids, weights, u if fisher else None, v if fisher else None, counts,
        rank, scaling, max_sweeps, tolerance, num_threads, A, B,
    )  # fmt: skip
    return Consolidated(A, B, scaling, tuple(versions), sweeps)


def _read(pool: AdapterPool, slot: int) -> tuple[reference.Delta, int]:
    """A slot's adapter and its version, both of one moment."""
    while True:
        version = pool.version(slot)
        adapter = reference.Delta(*pool.get(slot))
        if pool.version(slot) == version:
            return adapter, version


def _check_finite(name: str, values: Any) -> None:
    if not np.isfinite(values).all():
        raise ValueError(f"consolidate: {name}: expected finite values, got NaN or Inf")


def _fisher_rows(name: str, values: Any, slots: list[int]) -> Any:
    rows = np.asarray(values, np.float64)
    if rows.ndim != 2 or len(rows) <= max(slots):
        raise ValueError(f"consolidate: {name}: expected a row for each slot, got {rows.shape}")
    _check_finite(name, rows[slots])
    if (rows[slots] < 0).any():
        raise ValueError(f"consolidate: {name}: expected values of 0 or more, got others")
    return rows[slots]


def _by_reference(pool: AdapterPool) -> Any:
    """The merge in NumPy, for pools that are not in the C++ core."""

    def merge(
        _: Any, base: int, ids: Any, weights: Any, u: Any, v: Any, counts: Any, rank: int,
        scaling: float, max_sweeps: int, tolerance: float, num_threads: int, A: Any, B: Any,
    ) -> tuple[Any, Any, list[int], int, int]:  # fmt: skip
        order = [base, *ids.tolist()]
        if len(set(order)) < len(order):
            raise ValueError("consolidate: slots: expected each slot once, and not the base")
        if not 1 <= rank <= min(pool.in_features, pool.out_features):
            raise ValueError(f"consolidate: rank: expected 1 to the smaller size, got {rank}")
        read = [_read(pool, slot) for slot in order]
        (first, *parts), versions = (list(column) for column in zip(*read, strict=True))
        for delta in (first, *parts):
            _check_finite("slots", delta.A)
            _check_finite("slots", delta.B)
        if u is None:
            merged = reference.svd_merge(first, parts, weights[1:], rank, scaling)
        else:
            factors = _fisher_rows("u", u, order), _fisher_rows("v", v, order)
            if counts is not None:
                factors = factors[0] / counts[:, None], factors[1] / counts[:, None]
            merged = reference.ewc_merge(
                first, parts, weights, *factors, rank, scaling, max_sweeps, tolerance
            )
        A[...], B[...] = merged.A, merged.B
        return A, B, versions, 0, len(merged.objectives) // 2

    return merge


def ensemble(
    x: Any, base: int, slots: Sequence[int], mean_inputs: Any, temperature: float = 0.1
) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """Which adapters serve each row, and by how much: ids int32 and weights float32 [n, K + 1],
    as ``pool.forward`` takes them. The base weighs 1, the slots softmax(cosine / temperature).

    x [n, in] or [in]; mean_inputs [K, in]: the mean input of each slot's samples. A row or a mean
    of zeros has cosine 0. K = 0: the base alone. Raises ValueError (shapes, a temperature that is
    not above 0, NaN or Inf).
    """
    rows = np.atleast_2d(np.asarray(x, np.float32))
    means = np.asarray(mean_inputs, np.float32)
    if rows.ndim != 2 or means.shape != (len(slots), rows.shape[-1]):
        raise ValueError(
            f"ensemble: mean_inputs: expected shape ({len(slots)}, {rows.shape[-1]}) for x"
            f" {rows.shape}, got {means.shape}"
        )
    if not 0 < temperature < np.inf:
        raise ValueError(f"ensemble: temperature: expected a number above 0, got {temperature}")
    for name, values in (("x", rows), ("mean_inputs", means)):
        if not np.isfinite(values).all():
            raise ValueError(f"ensemble: {name}: expected finite values, got NaN or Inf")
    ids = np.tile(np.array([base, *slots], np.int32), (len(rows), 1))
    weights = np.ones(ids.shape, np.float32)
    if len(slots):
        scores = (_units(rows) @ _units(means).T) / np.float32(temperature)
        powers = np.exp(scores - scores.max(axis=1, keepdims=True))
        weights[:, 1:] = powers / powers.sum(axis=1, keepdims=True)
    return ids, weights


def _units(rows: NDArray[np.float32]) -> NDArray[np.float32]:
    largest = np.abs(rows).max(axis=1, keepdims=True, initial=0)  # its square may overflow
    rows = rows / np.where(largest > 0, largest, 1)
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    units: NDArray[np.float32] = rows / np.where(norms > 0, norms, np.float32(1))
    return units
