"""Errors of the engine's own."""

from __future__ import annotations


class FormatError(ValueError):
    """A file is not what its format says; the message names file and key."""


class StoreLocked(RuntimeError):
    """An AdapterStore's folder is open already. pid: of the process that holds it, or None."""

    def __init__(self, folder: str, pid: int | None) -> None:
        super().__init__(folder, pid)
        self.folder, self.pid = folder, pid

    def __str__(self) -> str:
        holder = "another process" if self.pid is None else f"process {self.pid}"
        return (
            f"AdapterStore: folder: expected one that is not open, got {self.folder}:"
            f" {holder} holds it"
        )
