"""Files and folders that are replaced whole: a kill at any moment leaves the old one or the new."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import glob
import os
import shutil
import stat
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import BinaryIO

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


def write_file(path: Path, data: bytes) -> None:
    """A new file whose bytes have reached the disk."""
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def make_folder(folder: Path) -> None:
    """Makes a folder, and puts its name on disk, where there is none."""
    if not folder.is_dir():
        make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        sync_folder(folder.parent)


def _exchange(a: Path, b: Path) -> bool:
    """Swaps two folders in one step; False where the system cannot."""
    try:
        call = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError):
        return False
    if call(_AT_FDCWD, os.fsencode(a), _AT_FDCWD, os.fsencode(b), _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EPERM):
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


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.tmp-{os.getpid()}-{uuid.uuid4().hex}")


def _abandoned(path: Path) -> list[Path]:
    """What killed savers of this file or folder left beside it."""
    found = path.parent.glob(f".{glob.escape(path.name)}.tmp-*")
    return [p for p in found if not _alive(p.name.rsplit(".tmp-", 1)[1].split("-")[0])]


def _sweep(folder: Path) -> None:
    for left in _abandoned(folder):
        shutil.rmtree(left, ignore_errors=True)
    if folder.exists():
        shutil.rmtree(_set_aside(folder), ignore_errors=True)


def _has_mounts(folder: Path) -> bool:
    """Whether the folder is a mount point or holds one."""
    try:
        mounts = Path("/proc/self/mountinfo").read_bytes().splitlines()
    except OSError:
        return False
    name = os.fsencode(folder)
    for plain in (b"\\", b" ", b"\t", b"\n"):  # as mountinfo writes them
        name = name.replace(plain, b"\\%03o" % ord(plain))
    return any((mount.split()[4] + b"/").startswith(name + b"/") for mount in mounts)


def _check_replaceable(folder: Path) -> None:
    """Raises before a process is left without its folder, or a mount without its files."""
    try:
        here = Path.cwd()
    except FileNotFoundError:
        here = None
    if here is not None and (folder == here or folder in here.parents):
        raise ValueError(
            f"{folder}: expected a folder that can be replaced whole, got the working folder"
            " or one above it"
        )
    if _has_mounts(folder):
        raise OSError(errno.EBUSY, "expected a folder without mount points", os.fspath(folder))


def _link(source: str | Path, to: str | Path) -> None:
    """The same file under a second name, or where the disk has no such thing a copy."""
    try:
        os.link(source, to, follow_symlinks=False)
    except OSError:
        shutil.copy2(source, to, follow_symlinks=False)


def _carry_over(folder: Path, to: Path, ours: frozenset[str]) -> None:
    for entry in folder.iterdir():
        if entry.name in ours:
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.copytree(entry, to / entry.name, symlinks=True, copy_function=_link)
        else:
            _link(entry, to / entry.name)


def replace_folder(folder: Path, write: Callable[[Path], None], ours: frozenset[str]) -> None:
    """Calls ``write`` on a temporary sibling, then puts that in the folder's place.

    Whatever else the old folder holds than ``ours`` is carried over, and so are
    its permissions. If anything raises, Ctrl-C included, the folder is as it was.
    Raises ValueError for the working folder and those above it, OSError.
    """
    folder = Path(os.path.realpath(folder))
    _check_replaceable(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    recover(folder)
    _sweep(folder)
    temporary = _temporary(folder)
    try:
        os.mkdir(temporary)
        replaces = folder.exists()
        if replaces:
            _carry_over(folder, temporary, ours)
        write(temporary)
        if replaces:
            os.chmod(temporary, stat.S_IMODE(folder.stat().st_mode))
        sync_folder(temporary)
        if not replaces:
            os.rename(temporary, folder)
        elif not _exchange(temporary, folder):
            old = _set_aside(folder)
            os.rename(folder, old)
            os.rename(temporary, folder)
            shutil.rmtree(old, ignore_errors=True)
        sync_folder(folder.parent)
    finally:
        recover(folder)
        shutil.rmtree(temporary, ignore_errors=True)


def replace_file(path: Path, write: Callable[[BinaryIO], None]) -> None:
    """Calls ``write`` on a temporary sibling, then puts that in the file's place.

    The old file's permissions are kept; if anything raises, the file is as it
    was. Raises OSError.
    """
    for left in _abandoned(path):
        with contextlib.suppress(OSError):
            left.unlink()
    temporary = _temporary(path)
    try:
        with open(temporary, "xb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        if path.exists():
            os.chmod(temporary, stat.S_IMODE(path.stat().st_mode))
        os.replace(temporary, path)
        sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


# ---- reading ----------------------------------------------------------------


def _read_at(handle: int, name: str, limit: int | None) -> bytes | None:
    """A file of an open folder, cut after limit + 1 bytes; None where there is none."""
    try:
        file = os.open(name, os.O_RDONLY | os.O_NONBLOCK, dir_fd=handle)  # no wait for a pipe
    except FileNotFoundError:
        return None
    if not stat.S_ISREG(os.fstat(file).st_mode):
        os.close(file)
        return None
    with open(file, "rb") as opened:
        return opened.read(-1 if limit is None else limit + 1)


def _is_at(handle: int, folder: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), os.stat(folder))
    except FileNotFoundError:
        return False


def read_files(folder: Path, limits: Mapping[str, int | None]) -> dict[str, bytes]:
    """Those of the named files that are there, all of one state of the folder.

    limits: the most bytes of each; of a longer file one byte more is read. Where
    the folder is replaced meanwhile, its old files or all of the new are read.
    """
    while True:
        recover(folder)
        try:
            handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        except (FileNotFoundError, NotADirectoryError):
            return {}
        try:
            read = {name: _read_at(handle, name, limit) for name, limit in limits.items()}
            if None not in read.values() or _is_at(handle, folder):
                return {name: data for name, data in read.items() if data is not None}
        finally:
            os.close(handle)
