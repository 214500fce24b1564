"""Folders that are replaced whole: a kill at any moment leaves the old one or the new."""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


def write_file(path: Path, data: bytes) -> None:
    """A new file whose bytes have reached the disk."""
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _exchange(a: Path, b: Path) -> bool:
    """Swaps two folders in one step; False where the system cannot."""
    try:
        call = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError):
        return False
    if call(_AT_FDCWD, os.fsencode(a), _AT_FDCWD, os.fsencode(b), _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
        return False
    raise OSError(code, os.strerror(code), os.fspath(b))


def _set_aside(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.old")


def recover(folder: Path) -> None:
    """Finishes a replacement that a kill cut short on a system without exchange."""
    old = _set_aside(folder)
    if not folder.exists() and old.is_dir():
        os.rename(old, folder)


def _alive(pid: str) -> bool:
    return pid.isdigit() and Path(f"/proc/{pid}").exists()


def _sweep(folder: Path) -> None:
    """Removes what killed savers of this folder left beside it."""
    for left in folder.parent.glob(f".{folder.name}.tmp-*"):
        if not _alive(left.name.rsplit(".tmp-", 1)[1].split("-")[0]):
            shutil.rmtree(left, ignore_errors=True)


def replace_folder(folder: Path, write: Callable[[Path], None], ours: frozenset[str]) -> None:
    """Calls ``write`` on a temporary sibling, then puts that in the folder's place.

    Files of the old folder other than ``ours`` are carried over. If anything
    raises, Ctrl-C included, the folder is as it was.
    """
    folder = Path(os.path.realpath(folder))
    folder.parent.mkdir(parents=True, exist_ok=True)
    recover(folder)
    _sweep(folder)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.tmp-{os.getpid()}-", dir=folder.parent))
    try:
        os.chmod(temporary, 0o755)
        if folder.exists():
            for entry in folder.iterdir():
                if entry.name not in ours and entry.is_file():
                    os.link(entry, temporary / entry.name)
                elif entry.name not in ours:
                    shutil.copytree(entry, temporary / entry.name, symlinks=True)
        write(temporary)
        _sync_folder(temporary)
        if not folder.exists():
            os.rename(temporary, folder)
        elif not _exchange(temporary, folder):
            old = _set_aside(folder)
            shutil.rmtree(old, ignore_errors=True)
            os.rename(folder, old)
            os.rename(temporary, folder)
            shutil.rmtree(old, ignore_errors=True)
        _sync_folder(folder.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
