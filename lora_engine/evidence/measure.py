"""What is measured of tasks learned one after another, and how it is said.

An accuracy array is [seeds, tasks learned, tasks]: row i is measured after task i was learned,
NaN where a task was not measured.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Doubles = NDArray[np.float64]


def final(accuracy: Doubles) -> Doubles:
    """[seeds]: mean over all tasks, after the last was learned."""
    return np.asarray(accuracy[:, -1].mean(axis=1))


def forgetting(accuracy: Doubles) -> Doubles:
    """[seeds]: mean over all tasks but the last of what each lost since it was learned."""
    learned = np.diagonal(accuracy, axis1=1, axis2=2)[:, :-1]
    return np.asarray((learned - accuracy[:, -1, :-1]).mean(axis=1))


def so_far(accuracy: Doubles) -> Doubles:
    """[seeds, tasks learned]: mean over the tasks learned until then."""
    return np.asarray(np.nanmean(accuracy, axis=2))


def points(values: Doubles) -> str:
    """Shares as points: mean and standard deviation over the seeds."""
    spread = values.std(ddof=1) if len(values) > 1 else 0.0
    return f"{100 * values.mean():.1f} ± {100 * spread:.1f}"


def chosen(scores: dict[float, float]) -> float:
    """The candidate with the best score."""
    return max(scores, key=scores.__getitem__)


def at_least(what: str, got: float, wanted: float) -> list[str]:
    """A sentence where ``got`` is below what was wanted; shares, said as points."""
    if got >= wanted:
        return []
    return [f"{what}: expected at least {100 * wanted:.1f} points, got {100 * got:.1f}"]
