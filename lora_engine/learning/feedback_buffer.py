"""FeedbackBuffer: feedback that waits to be learned from, while serving goes on."""

from __future__ import annotations

import math
import threading
from collections import deque
from typing import Any, NamedTuple

import numpy as np

from lora_engine.adapters.exploration import Trace
from lora_engine.learning.feedback import Feedback


class Waiting(NamedTuple):
    """Feedback on the output of a module for x."""

    x: Any
    feedback: Feedback
    module: str


def _owned(value: Any) -> Any:
    """A copy of an array or tensor, as who serves may use its memory again."""
    if isinstance(value, Trace):
        return value._replace(noise=_owned(value.noise))
    if hasattr(value, "detach"):
        return value.detach().clone()
    return value.copy() if isinstance(value, np.ndarray) else value


class FeedbackBuffer:
    """Feedback from many threads that waits for one that trains; at most ``capacity`` of it.

    A quality comes with the trace or the output that it is of: the last trace of a thread is its
    own, and whoever trains has another thread's.

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
        """Whether it takes nothing more."""
        return self._closed

    def put(self, x: Any, feedback: Any, module: str) -> bool:
        """Keeps copies of x and of the feedback's arrays; False, keeping nothing, once closed.

        Raises TypeError for what is no Feedback, ValueError for a quality with neither a trace
        (``forward(explore=, return_trace=True)``) nor an output: the thread that trains has not
        explored. Shapes are checked where it is learned.
        """
        if not isinstance(feedback, Feedback):
            got = type(feedback).__name__
            raise TypeError(f"FeedbackBuffer.put: feedback: expected a Feedback, got {got}")
        if feedback.needs_trace:
            raise ValueError(
                "FeedbackBuffer.put: feedback: expected a trace or an output with a quality, got"
                " neither: forward(explore=, return_trace=True) gives one"
            )
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
