"""What was measured on this device: the files that ``lora-engine tune`` writes, and their keys.

A file holds, for one device and the versions that it was measured with, choices by key. It is
looked for in the user's folder ($LORA_ENGINE_TUNED, else $XDG_CACHE_HOME/lora_engine/tuned, else
~/.cache/lora_engine/tuned), then among the packaged ones (``devices/``). One that is damaged, of
other versions or of another device is refused with one warning. Only the standard library is
needed here: the C++ core is tuned by the same files.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import stat
import sys
import warnings
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any, BinaryIO

FORMAT = 1
MAX_BYTES = 16 << 20  # of a file
PACKAGED = Path(__file__).with_name("devices")


def folder() -> Path | None:
    """The user's; None where the user has no home."""
    chosen = os.environ.get("LORA_ENGINE_TUNED")
    if chosen:
        return Path(chosen)
    base = os.environ.get("XDG_CACHE_HOME", "")
    try:
        home = Path(base) if os.path.isabs(base) else Path.home() / ".cache"
    except RuntimeError:  # a container's user id that no passwd names, say
        return None
    return home / "lora_engine" / "tuned"


def folders() -> list[Path]:
    """Where files are looked for, in order."""
    user = folder()
    return [PACKAGED] if user is None else [user, PACKAGED]


def file_name(device: dict[str, Any]) -> str:
    """``nvidia-h200-sm-90-132.json``: a device's identity as a file is named."""
    words = "-".join(str(value) for value in device.values())
    return re.sub("[^a-z0-9]+", "-", words.lower()).strip("-")[:120] + ".json"


def versions(*packages: ModuleType) -> dict[str, str]:
    """Of the engine, whose part this is, and of these."""
    engine = sys.modules[(__package__ or "").partition(".")[0]]
    return {p.__name__: str(p.__version__) for p in (engine, *packages)}


def digest(files: Iterable[Path]) -> str:
    """Of the files' names and bytes: what is measured with other code does not hold."""
    found = hashlib.sha256()
    for path in sorted(files):
        data = path.read_bytes()
        found.update(f"{path.name} {len(data)} ".encode() + data)
    return found.hexdigest()[:16]


class Refused(ValueError):
    """Why a file is not used."""


def open_regular(path: Path) -> BinaryIO:
    """Opens a file without waiting for a pipe's writer. Raises OSError for what is no file."""
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise OSError(errno.EINVAL, "expected a regular file", os.fspath(path))
    return open(handle, "rb")


def read(path: Path) -> dict[str, Any]:
    """What a file holds; raises Refused where it is damaged, FileNotFoundError."""
    try:
        with open_regular(path) as file:
            data = file.read(MAX_BYTES + 1)
        if len(data) > MAX_BYTES:
            raise Refused(f"expected at most {MAX_BYTES} bytes")
        content = json.loads(data)
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(path) from None
    except (OSError, ValueError, RecursionError) as error:
        raise Refused(f"it cannot be read: {str(error)[:200]}") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise Refused(f"expected a tuned file of format {FORMAT}")
    for name, kinds in (("device", (str, int)), ("versions", (str,)), ("choices", (dict,))):
        part = content.get(name)
        if not isinstance(part, dict) or not all(isinstance(v, kinds) for v in part.values()):
            raise Refused(f"{name}: expected an object of {kinds[0].__name__}")
    return content


def check(content: dict[str, Any], device: dict[str, Any], of: dict[str, str]) -> None:
    """Raises Refused for a file of another device or of other versions."""
    for name, here in (("device", device), ("versions", of)):
        if content[name] != here:
            got = json.dumps(content[name])[:300]
            raise Refused(f"it was made with {name} {got}, here is {json.dumps(here)}")


_REFUSED: set[Path] = set()


def refuse(path: Path, why: str) -> None:
    """Warns of a file, or of a choice in it, once a file."""
    if path not in _REFUSED:
        _REFUSED.add(path)
        text = f"{path}: not used: {why}; run `lora-engine tune`"
        warnings.warn(text, stacklevel=_levels_to_caller())


def _levels_to_caller() -> int:
    """Up to the first frame that is not the engine's, ``refuse`` the first: ops reach it in
    many ways."""
    engine = (__package__ or "").partition(".")[0]
    levels = 0
    frame: FrameType | None = sys._getframe()
    while frame is not None and str(frame.f_globals.get("__name__")).partition(".")[0] == engine:
        levels, frame = levels + 1, frame.f_back
    return levels


@cache
def _choices(path: Path, device: tuple[Any, ...], of: tuple[Any, ...]) -> dict[str, Any]:
    try:
        content = read(path)
        check(content, dict(device), dict(of))
    except FileNotFoundError:
        return {}
    except Refused as why:
        refuse(path, str(why))
        return {}
    found: dict[str, Any] = content["choices"]
    return found


def choice(key: str, device: dict[str, Any], of: dict[str, str]) -> tuple[dict[str, Any], Path]:
    """What was chosen for a key, and in which file; an empty choice where there is none."""
    name = file_name(device)
    for place in folders():
        found = _choices(place / name, tuple(device.items()), tuple(of.items()))
        if key in found:
            return found[key], place / name
    return {}, PACKAGED / name


def forget() -> None:
    """Files are read anew at the next look-up."""
    _choices.cache_clear()
    _REFUSED.clear()
