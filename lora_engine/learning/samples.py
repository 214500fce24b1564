"""What training takes: samples of requests, and feedback that waits for it."""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Sequence
from hashlib import sha256
from numbers import Real
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lora_engine.learning.feedback import Feedback

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


class Waiting(NamedTuple):
    """Feedback on the output of a module for x."""

    x: Any
    feedback: Feedback
    module: str


def _owned(value: Any) -> Any:
    """A copy of an array or tensor, as who serves may use its memory again."""
    if hasattr(value, "detach"):
        return value.detach().clone()
    return value.copy() if isinstance(value, np.ndarray) else value


class FeedbackBuffer:
    """Feedback from many threads that waits for one that trains; at most ``capacity`` of it.

    ``put`` never waits for training: when the buffer is full the oldest goes, as it is of the
    oldest weights, and is counted in ``dropped``. Safe to use from several threads.
    Raises ValueError for a capacity below 1.
    """

    def __init__(self, capacity: int = 1000) -> None:
        if isinstance(capacity, bool) or not isinstance(capacity, int) or capacity < 1:
            raise ValueError(
                f"FeedbackBuffer: capacity: expected a whole number of at least 1, got {capacity!r}"
            )
        self.capacity = capacity
        self._waiting: deque[Waiting] = deque()
        self._arrived = threading.Condition(threading.Lock())
        self._dropped = self._received = 0
        self._closed = False

    def __len__(self) -> int:
        """How much waits."""
        return len(self._waiting)

    @property
    def received(self) -> int:
        """How much was put in so far."""
        return self._received

    @property
    def dropped(self) -> int:
        """How much of it went unread because the buffer was full."""
        return self._dropped

    @property
    def closed(self) -> bool:
        return self._closed

    def put(self, x: Any, feedback: Any, module: str) -> bool:
        """Keeps copies of x and of the feedback's arrays; False, keeping nothing, once closed.

        Raises TypeError for what is no Feedback. Shapes are checked where it is learned.
        """
        if not isinstance(feedback, Feedback):
            got = type(feedback).__name__
            raise TypeError(f"FeedbackBuffer.put: feedback: expected a Feedback, got {got}")
        item = Waiting(_owned(x), Feedback(*map(_owned, feedback)), module)
        with self._arrived:
            if self._closed:
                return False
            if len(self._waiting) == self.capacity:
                self._waiting.popleft()
                self._dropped += 1
            self._waiting.append(item)
            self._received += 1
            self._arrived.notify()
        return True

    def drain(self, timeout: float | None = 0.0) -> list[Waiting]:
        """All that waits, oldest first, which then waits no more.

        Where nothing does, waits up to ``timeout`` seconds for it (None: until there is some,
        or the buffer is closed); an empty list then.
        """
        if timeout is not None and not 0.0 <= timeout < math.inf:
            raise ValueError(
                f"FeedbackBuffer.drain: timeout: expected 0 or more or None, got {timeout}"
            )
        with self._arrived:
            self._arrived.wait_for(lambda: self._waiting or self._closed, timeout)
            found = list(self._waiting)
            self._waiting.clear()
        return found

    def close(self) -> None:
        """Takes nothing more; who waits in ``drain`` is woken. What waits can still be drained."""
        with self._arrived:
            self._closed = True
            self._arrived.notify_all()
