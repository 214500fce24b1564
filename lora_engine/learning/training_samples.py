"""Samples of requests: what training imitates."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import sha256
from numbers import Real
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

F32 = NDArray[np.float32]


class TrainingSample(NamedTuple):
    """A request that was served, and how good its output was.

    input_embedding [in]: x; output_embedding [out]: the delta to imitate, None where there is
    none; quality in 0..1. The rest describes the request, and training does not read it.
    """

    input_embedding: Any
    output_embedding: Any
    quality: float
    query: str | None = None
    response: str | None = None
    latency_ms: float | None = None
    token_count: int | None = None
    session_id: str | None = None


class Imitation(NamedTuple):
    """Samples as training reads them: those over the threshold, checked."""

    x: list[F32]
    target: list[F32]
    quality: F32
    below_threshold: int
    without_target: int

    def digest(self) -> str:
        """A number that other samples do not have."""
        found = sha256(self.quality.tobytes())
        for arrays in (self.x, self.target):
            for array in arrays:
                found.update(array.tobytes())
        return found.hexdigest()


def _vector(where: str, value: Any, size: int) -> F32:
    """The value as float32 [size], finite."""
    if hasattr(value, "detach"):
        value = value.detach().float().cpu().numpy()
    array = np.asarray(value)
    if array.dtype.kind not in "fiu":
        raise TypeError(f"{where}: expected numbers, got {array.dtype}")
    if array.shape != (size,):
        raise ValueError(f"{where}: expected shape ({size},), got {array.shape}")
    with np.errstate(over="ignore"):
        vector = np.ascontiguousarray(array, np.float32)
    if not np.isfinite(vector).all():
        raise ValueError(f"{where}: expected finite numbers, got NaN or Inf")
    return vector


def _quality(where: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, Real) or not 0.0 <= float(value) <= 1.0:
        raise ValueError(f"{where}: quality: expected a number from 0 to 1, got {value!r}")
    return float(value)


def imitation(
    where: str, samples: Sequence[TrainingSample], shape: tuple[int, int], threshold: float
) -> Imitation:
    """The samples to imitate: those with an output_embedding and a quality from threshold on.

    All are checked, also those left out. shape: (in, out) of the module. Raises TypeError and
    ValueError naming ``where``, the sample and the field.
    """
    x: list[F32] = []
    targets: list[F32] = []
    qualities: list[float] = []
    below = without = 0
    sample: Any
    for i, sample in enumerate(samples):
        at = f"{where}[{i}]"
        if not isinstance(sample, TrainingSample):
            raise TypeError(f"{at}: expected a TrainingSample, got {type(sample).__name__}")
        quality = _quality(at, sample.quality)
        row = _vector(f"{at}: input_embedding", sample.input_embedding, shape[0])
        if sample.output_embedding is None:
            without += 1
            continue
        target = _vector(f"{at}: output_embedding", sample.output_embedding, shape[1])
        if quality < threshold:
            below += 1
            continue
        x.append(row)
        targets.append(target)
        qualities.append(quality)
    return Imitation(x, targets, np.array(qualities, np.float32), below, without)
