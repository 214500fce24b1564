"""Long work: a bar on a terminal, and Ctrl-C that waits for the step under way."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from time import perf_counter
from typing import Any

_PATIENCE = 1.0  # seconds of work before there is a bar


class Bar:
    """A bar on standard error once the work has taken a second; on terminals, and with rich."""

    def __init__(self, what: str, total: int | None = None) -> None:
        """total: None where it is not known yet; set it once it is."""
        self._what, self.total, self._done = what, total, 0
        self._start = perf_counter()
        self._bar: Any = None
        self._wanted = sys.stderr is not None and sys.stderr.isatty()

    def __enter__(self) -> Bar:
        return self

    def advance(self, done: int, loss: float | None = None) -> None:
        self._done += done
        if self._wanted and self._bar is None and perf_counter() - self._start > _PATIENCE:
            self._show()
        if self._bar is not None:
            note = "" if loss is None else f"loss {loss:.4g}"
            self._bar.update(0, completed=self._done, total=self.total, note=note)

    def _show(self) -> None:
        try:
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
        except ImportError:
            self._wanted = False
            return
        self._bar = Progress(
            TextColumn(self._what),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            console=Console(stderr=True),
        )
        self._bar.add_task(self._what, total=self.total, note="")
        self._bar.start()

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()


@contextlib.contextmanager
def interrupts_held() -> Iterator[Callable[[], bool]]:
    """Gives a function that says whether Ctrl-C was pressed, which then raises nothing.

    If it was, KeyboardInterrupt follows at the end. Pressed again it interrupts at once. In
    another than the main thread, or where the process handles SIGINT in a way of its own,
    nothing is held.
    """
    ours = (
        threading.current_thread() is threading.main_thread()
        and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    )
    if not ours:
        yield lambda: False
        return
    pressed = threading.Event()

    def hold(*_: object) -> None:
        pressed.set()
        signal.signal(signal.SIGINT, signal.default_int_handler)

    signal.signal(signal.SIGINT, hold)
    try:
        yield pressed.is_set
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if pressed.is_set():
        raise KeyboardInterrupt
