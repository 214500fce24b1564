"""A folder that one process holds at a time."""

from __future__ import annotations

import fcntl
import os
import time
from pathlib import Path

from lora_engine.errors import StoreLocked

_NAME = "lock"
_PATIENCE = 0.5  # seconds in which a new holder writes its number down


class FolderLock:
    """Holds a folder until ``release``, or the end of the process, however it comes.

    The system's lock on an open file (flock): none that a dead process left is in the way. The
    file holds the process's number, for others to name it. A fork shares the open file, and
    has to ``forget`` it, so that it is not held beyond its parent's life.
    """

    def __init__(self, folder: Path) -> None:
        self._file: int | None = os.open(folder / _NAME, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            pid = _holder(self._file)
            self.forget()
            raise StoreLocked(str(folder), pid) from None
        except BaseException:
            self.forget()
            raise
        os.ftruncate(self._file, 0)
        os.pwrite(self._file, b"%d\n" % os.getpid(), 0)

    def forget(self) -> None:
        """Closes this process's share of it."""
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def release(self) -> None:
        """Lets others have the folder, even where a fork still shares the file."""
        if self._file is not None:
            os.ftruncate(self._file, 0)
            fcntl.flock(self._file, fcntl.LOCK_UN)
            self.forget()


def _holder(file: int) -> int | None:
    """The process that a lock file names, once there is such a process."""
    until = time.monotonic() + _PATIENCE
    while True:
        text = os.pread(file, 32, 0).strip()
        if text.isdigit() and Path(f"/proc/{text.decode()}").exists():
            return int(text)
        if time.monotonic() > until:
            return None
        time.sleep(0.01)
