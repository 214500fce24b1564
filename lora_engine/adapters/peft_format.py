"""PEFT's adapter folder: adapter_config.json and adapter_model.safetensors.

What the engine knows beyond PEFT lies beside them in a state file that carries
the weights' digest. Files are read as hostile: sizes are checked before
anything is allocated.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from lora_engine import atomic
from lora_engine.adapters.adapter import Adapter
from lora_engine.adapters.peft_config import MAX_JSON, PeftConfig, to_json
from lora_engine.adapters.peft_tensors import read_tensors, to_adapter, to_tensors
from lora_engine.errors import FormatError
from lora_engine.safetensors_file import to_bytes

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
STATE_FILE = "lora_engine_state.safetensors"
PICKLE_FILE = "adapter_model.bin"
FILES = frozenset({CONFIG_FILE, WEIGHTS_FILE, STATE_FILE})


class Folder(NamedTuple):
    """The files of an adapter folder, of one state of it; the config is checked."""

    path: Path
    config: PeftConfig
    weights: bytes
    state: bytes | None
    beside: Mapping[str, bytes]  # those of the other files asked for that are there

    @property
    def source(self) -> str:
        """The weights' name in messages."""
        return str(self.path / WEIGHTS_FILE)


def read_folder(folder: str | os.PathLike[str], beside: Iterable[str] = ()) -> Folder:
    """beside: names of other files to read.

    Raises FormatError naming file and key, FileNotFoundError, OSError.
    """
    path = Path(os.path.realpath(folder))
    limits = {CONFIG_FILE: MAX_JSON, WEIGHTS_FILE: None, STATE_FILE: None, PICKLE_FILE: 0}
    files = atomic.read_files(path, {**limits, **dict.fromkeys(beside)})
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if name in files:
            continue
        if name == WEIGHTS_FILE and PICKLE_FILE in files:
            raise FormatError(
                f"{path / PICKLE_FILE}: expected {WEIGHTS_FILE} in its place: no pickle is read"
            )
        raise FileNotFoundError(f"{path / name}: expected an adapter folder's file, got none")
    config = PeftConfig.read(files[CONFIG_FILE], str(path / CONFIG_FILE))
    others = {name: data for name, data in files.items() if name not in limits}
    return Folder(path, config, files[WEIGHTS_FILE], files.get(STATE_FILE), others)


def adapter_of(folder: Folder) -> Adapter:
    """What the folder's files hold. Raises FormatError naming file and key."""
    return to_adapter(read_tensors(folder.weights, folder.source), folder.config, folder.source)


def load(folder: str | os.PathLike[str]) -> Adapter:
    return adapter_of(read_folder(folder))


def digest(weights: bytes) -> str:
    """What a state file keeps of the weights that it belongs to."""
    return hashlib.sha256(weights).hexdigest()


def save(
    folder: str | os.PathLike[str],
    adapter: Adapter,
    state: Callable[[bytes], bytes] | None = None,
    beside: Mapping[str, bytes] | None = None,
) -> None:
    """Replaces the folder whole; other files in it are kept.

    state: makes the state file from the weights' bytes; None keeps the one there is, if it
    belongs to the same weights. beside: other files that are written with it. Raises ValueError,
    OSError.
    """
    weights = to_bytes(to_tensors(adapter))
    files = {CONFIG_FILE: to_json(adapter), WEIGHTS_FILE: weights, **(beside or {})}
    if state is not None:
        files[STATE_FILE] = state(weights)
    else:
        old = atomic.read_files(
            Path(os.path.realpath(folder)), {WEIGHTS_FILE: None, STATE_FILE: None}
        )
        if old.get(WEIGHTS_FILE) == weights and STATE_FILE in old:
            files[STATE_FILE] = old[STATE_FILE]

    def write(to: Path) -> None:
        for name, data in files.items():
            atomic.write_file(to / name, data)

    atomic.replace_folder(Path(folder), write, FILES | files.keys())
