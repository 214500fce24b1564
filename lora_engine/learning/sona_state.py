"""What a Sona knows beyond its consolidated adapters, as a file beside their PEFT folder.

``modules.<name>.<field>`` are the tensors, a row a session or member, those of adapters stacked
over their ranks; ``sessions`` is JSON, whose they are. The metadata holds counters, the noise of
exploration, the digest of the weights and one of all of it.
"""

from __future__ import annotations

import json
import os
import warnings
from collections import Counter
from contextlib import ExitStack
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from lora_engine.adapters import micro_folder, peft_format
from lora_engine.adapters.exploration import Noise, checked_noise
from lora_engine.adapters.micro_lora import MicroLoRA
from lora_engine.errors import FormatError
from lora_engine.learning import sona_module_state as module_state
from lora_engine.learning.checkpoint import check_configs, content_digest, object_of
from lora_engine.learning.sona_module import Array
from lora_engine.learning.sona_module_state import Names, Tensors
from lora_engine.safetensors_file import from_bytes, is_count, read_json, short, to_bytes

if TYPE_CHECKING:
    from lora_engine.learning.sona import Sona

FILE, KEY, FORMAT = "lora_engine_sona.safetensors", "lora_engine_sona", 2
SESSIONS = "sessions"
_COUNTS = ("instants", "background", "background_rejected", "background_failed", "deep",
           "deep_rejected")  # fmt: skip
_SUMS = ("seconds", "quality")
State = dict[str, Any]


# ---- writing ----------------------------------------------------------------


def _configs(sona: Sona) -> State:
    """What of the configuration the state is of, as JSON holds it."""
    micro, held_out = asdict(sona.config.micro_lora), sona.config.held_out
    both: State = json.loads(
        json.dumps({"MicroLoRAConfig": micro, "SonaConfig": {"held_out": held_out}})
    )
    return both


def save(sona: Sona, folder: str | os.PathLike[str]) -> None:
    """``Sona.save``."""
    with ExitStack() as locks:  # so that all is of one moment
        locks.enter_context(sona._pass_lock)
        for m in sona._modules.values():
            locks.enter_context(m.lock)
        lora = sona.consolidated()
        tensors: Tensors = {}
        sessions: State = {}
        for name, m in sona._modules.items():
            arrays, sessions[name] = module_state.to_tensors(m)
            tensors |= arrays
        with sona._lock:
            counts = {"instants": sona._instants, **{n: sona._counts[n] for n in _COUNTS[1:]}}
            sums = {"seconds": sona._seconds, "quality": sona._quality}
            skipped = dict(sona._skipped)
        noise = sona._explorer.state()
    tensors[SESSIONS] = np.frombuffer(json.dumps(sessions).encode(), np.uint8)
    state = {
        "format": FORMAT,
        **_configs(sona),
        "counts": counts,
        "sums": sums,
        "skipped": skipped,
        "exploration": noise,
        "weights_sha256": peft_format.digest(lora.export_weights()),
    }
    state["sha256"] = content_digest(tensors, state)
    lora._save_with(folder, {FILE: to_bytes(tensors, KEY, json.dumps(state))})


# ---- reading ----------------------------------------------------------------


class _Kept(NamedTuple):
    """A file's content, which fits the Sona."""

    tensors: Tensors
    sessions: dict[str, Names]
    state: State
    noise: Noise


def load(sona: Sona, folder: str | os.PathLike[str]) -> None:
    """``Sona.load``."""
    files = peft_format.read_folder(folder, (FILE,))
    adapter, config, _ = micro_folder.load(files)
    weights, kept = _weights(sona, MicroLoRA._holding(adapter, config)), None
    if FILE in files.beside:
        kept = _read(sona, files)
    with sona._pass_lock:
        for name, m in sona._modules.items():
            names = {} if kept is None else kept.sessions[name]
            tensors = None if kept is None else kept.tensors
            module_state.restore(m, *weights[name], tensors, names)
        with sona._lock:
            _restore_counters(sona, kept)


def _weights(sona: Sona, loaded: MicroLoRA) -> dict[str, tuple[Array, Array]]:
    weights = {}
    for name, m in sona._modules.items():
        A, B, scaling = loaded.weights(name)
        if A.shape != m.A.shape or B.shape != m.B.shape:
            raise ValueError(
                f"Sona.load: {name}: expected A {m.A.shape} and B {m.B.shape},"
                f" got {A.shape} and {B.shape}"
            )
        weights[name] = (A, B * np.float32(scaling / m.scaling))
    return weights


def _read(sona: Sona, files: peft_format.Folder) -> _Kept | None:
    """The checked content of a file; None, with a warning, where it is of other weights."""
    source = str(files.path / FILE)
    tensors, metadata = from_bytes(files.beside[FILE], source)
    state = read_json(metadata.get(KEY, "").encode(), f"{source}: {KEY}")

    def bad(key: str, expected: str) -> FormatError:
        return FormatError(f"{source}: {short(key)}: expected {expected}")

    if state.get("format") != FORMAT:
        raise bad("format", f"{FORMAT}, got {short(repr(state.get('format')))}")
    if state.get("weights_sha256") != peft_format.digest(files.weights):
        warnings.warn(f"engine state dropped: {source}: it belongs to other weights", stacklevel=4)
        return None
    if state.get("sha256") != content_digest(tensors, state):
        raise bad("sha256", "the digest of the content, got another: the file is damaged")
    check_configs("Sona.load", source, state, _configs(sona))
    counts, sums, skipped = (object_of(source, state, key) for key in ("counts", "sums", "skipped"))
    for key, found, names in (("counts", counts, _COUNTS), ("skipped", skipped, (*skipped,))):
        if set(found) != set(names) or not all(is_count(found[name]) for name in names):
            raise bad(key, "numbers from 0 by name")
    for name in _SUMS:
        value: Any = sums.get(name)
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not number or not 0.0 <= value < np.inf:
            raise bad(f"sums: {name}", "a number of 0 or more")
    try:
        noise = checked_noise("exploration", state.get("exploration"))
        sessions = _sessions(sona, tensors.pop(SESSIONS, None), source)
        for name, m in sona._modules.items():
            module_state.check(m, tensors, sessions[name])
    except ValueError as error:
        if isinstance(error, FormatError):
            raise
        raise FormatError(f"{source}: {short(str(error))}") from None
    known = {f"modules.{name}.{field}" for name in sona._modules for field in module_state.FIELDS}
    for key in tensors.keys() - known:
        raise bad(key, "the tensors of the configuration, no more")
    return _Kept(tensors, sessions, state, noise)


def _sessions(sona: Sona, text: Any, source: str) -> State:
    """Names by module; raises ValueError, FormatError."""
    if text is None or text.dtype != np.uint8:
        raise ValueError(f"{SESSIONS}: expected text, got none")
    found = read_json(text.tobytes(), f"{source}: {SESSIONS}")
    for name in sona._modules:
        names = found.get(name)
        if not isinstance(names, dict) or set(names) != {"fast", "baselines"}:
            raise ValueError(f"{SESSIONS}: {name}: expected fast and baselines")
        for kind, listed in names.items():
            good = isinstance(listed, list) and all(map(module_state.is_name, listed))
            if not good or len(set(listed)) != len(listed):
                raise ValueError(
                    f"{SESSIONS}: {name}: {kind}: expected texts, numbers of 64 bits and null,"
                    " each once"
                )
    return found


# ---- putting it in place ------------------------------------------------------


def _restore_counters(sona: Sona, kept: _Kept | None) -> None:
    sona._pending = sona._waiting()
    counts: State = dict.fromkeys(_COUNTS, 0)
    sums: State = dict.fromkeys(_SUMS, 0.0)
    skipped: State = {}
    if kept is not None:
        counts, sums, skipped = (kept.state[key] for key in ("counts", "sums", "skipped"))
        sona._explorer.go_on(kept.noise)
    sona._instants, sona._seconds = counts["instants"], float(sums["seconds"])
    sona._quality = float(sums["quality"])
    sona._counts = Counter({name: counts[name] for name in _COUNTS[1:]})
    sona._skipped = Counter(skipped)
