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
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from numbers import Integral
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from lora_engine.adapters import micro_folder, peft_format
from lora_engine.adapters.exploration import Baseline, Noise, checked_noise
from lora_engine.adapters.micro_lora import MicroLoRA
from lora_engine.errors import FormatError
from lora_engine.learning.background import JOINED_RANKS
from lora_engine.learning.checkpoint import check_configs, content_digest, object_of
from lora_engine.learning.sona_module import Array, Fast, Member, Module, Served
from lora_engine.safetensors_file import from_bytes, is_count, read_json, short, to_bytes

if TYPE_CHECKING:
    from lora_engine.learning.sona import Sona

FILE, KEY, FORMAT = "lora_engine_sona.safetensors", "lora_engine_sona", 2
SESSIONS = "sessions"
_COUNTS = ("instants", "background", "background_rejected", "background_failed", "deep",
           "deep_rejected")  # fmt: skip
_SUMS = ("seconds", "quality")
Tensors = dict[str, np.ndarray]
State = dict[str, Any]


# ---- writing ----------------------------------------------------------------


def _name_of(module: str, session: Any) -> Any:
    """A session's name as JSON holds it."""
    whole = isinstance(session, Integral) and not isinstance(session, bool)
    name = int(session) if whole else session
    if not _is_name(name):
        raise ValueError(
            f"Sona.save: {module}: session: expected text, a whole number of 64 bits or None for"
            f" each session that is saved, got {short(repr(session))}"
        )
    return name


def _is_name(name: Any) -> bool:
    if isinstance(name, str):
        try:
            name.encode()
        except UnicodeEncodeError:
            return False
        return True
    return name is None or (type(name) is int and -(1 << 63) <= name < 1 << 63)


def _stacked(rows: Sequence[Array], width: int) -> Array:
    return np.concatenate([np.zeros((0, width), np.float32), *(np.atleast_2d(r) for r in rows)])


def _adapters(m: Module, slots: Sequence[int], kind: str) -> Tensors:
    got = [m.pool.get(slot) for slot in slots]
    return {
        f"{kind}_ranks": np.array([len(A) for A, _, _ in got], np.int64),
        f"{kind}_A": _stacked([A for A, _, _ in got], m.in_features),
        f"{kind}_B": _stacked([B.T for _, B, _ in got], m.out_features),
    }


def _record(m: Module, slot: int) -> tuple[Array, Array, Array] | None:
    """(u, v, anchor A) of what holds a session's adapter; its anchor B is zero."""
    if m.ewc is None:
        return None
    try:
        (u,), (v,), (A,), _ = m.ewc._storage.get(slot)
    except ValueError:
        return None
    return u, v, A


def _module_tensors(m: Module) -> tuple[Tensors, State]:
    """The tensors of a module, and its sessions' names; the lock is held."""
    fast = m.served.fast
    slots = np.array([one.slot for one in fast.values()], np.int64)
    records = [_record(m, one.slot) for one in fast.values()]
    there = [record for record in records if record is not None]
    rated = {s: b.value for s, b in m.baselines.items() if b.value is not None}
    x, target = m.held_out.samples()
    tensors = {
        **_adapters(m, [one.slot for one in fast.values()], "fast"),
        **_adapters(m, [member.slot for member in m.served.members], "member"),
        "u": m.sums.u[slots],
        "v": m.sums.v[slots],
        "inputs": _stacked([one.inputs for one in fast.values()], m.in_features),
        "quality": np.array([one.quality for one in fast.values()], np.float64),
        "pending": np.array([one.pending for one in fast.values()], np.int64),
        "held": np.array([record is not None for record in records], np.int64),
        "held_u": _stacked([record[0] for record in there], m.out_features),
        "held_v": _stacked([record[1] for record in there], m.in_features),
        "held_A": _stacked([record[2] for record in there], m.in_features),
        "baselines": np.array([*rated.values()], np.float64),
        "directions": _stacked([one.direction for one in m.served.members], m.in_features),
        "member_quality": np.array([one.quality for one in m.served.members], np.float64),
        "fisher_u": _stacked([m.fisher[0]] if m.fisher else [], m.out_features),
        "fisher_v": _stacked([m.fisher[1]] if m.fisher else [], m.in_features),
        "samples": np.array([m.samples], np.float64),
        "held_out_x": x,
        "held_out_target": target,
        "held_out_count": np.array([m.held_out.count], np.int64),
        "held_out_seen": np.array([m.held_out.seen], np.int64),
    }
    names: dict[str, Any] = {"fast": fast, "baselines": rated}
    return (
        {f"modules.{m.name}.{field}": array for field, array in tensors.items()},
        {kind: [_name_of(m.name, s) for s in of] for kind, of in names.items()},
    )


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
            arrays, sessions[name] = _module_tensors(m)
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
    sessions: dict[str, dict[str, list[Any]]]
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
            _restore(m, *weights[name], kept)
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
            _check_module(m, tensors, sessions[name])
    except ValueError as error:
        if isinstance(error, FormatError):
            raise
        raise FormatError(f"{source}: {short(str(error))}") from None
    known = {f"modules.{name}.{field}" for name in sona._modules for field in _FIELDS}
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
            good = isinstance(listed, list) and all(map(_is_name, listed))
            if not good or len(set(listed)) != len(listed):
                raise ValueError(
                    f"{SESSIONS}: {name}: {kind}: expected texts, numbers of 64 bits and null,"
                    " each once"
                )
    return found


_FIELDS = (
    "fast_ranks", "fast_A", "fast_B", "member_ranks", "member_A", "member_B", "u", "v", "inputs",
    "quality", "pending", "held", "held_u", "held_v", "held_A", "baselines", "directions",
    "member_quality", "fisher_u", "fisher_v", "samples", "held_out_x", "held_out_target",
    "held_out_count", "held_out_seen",
)  # fmt: skip
_SIGNED = frozenset({"fast_A", "fast_B", "member_A", "member_B", "inputs", "held_A",
                     "directions", "held_out_x", "held_out_target"})  # fmt: skip


def _check_module(m: Module, tensors: Tensors, names: dict[str, list[Any]]) -> None:
    """Raises ValueError naming the tensor that is not as the others and the module want it."""

    def take(
        field: str, shape: tuple[int, ...], dtype: Any = np.float32, most: float = np.inf
    ) -> Any:
        key = f"modules.{m.name}.{field}"
        array = tensors.get(key)
        if array is None or array.dtype != dtype or array.shape != shape:
            got = "none" if array is None else f"{array.dtype} {list(array.shape)}"
            raise ValueError(f"{key}: expected {np.dtype(dtype)} {list(shape)}, got {got}")
        if not np.isfinite(array).all() or (array > most).any():
            raise ValueError(f"{key}: expected finite numbers of at most {most:g}, got others")
        if field not in _SIGNED and (array < 0).any():
            raise ValueError(f"{key}: expected numbers of 0 or more, got others")
        return array

    def ranks(field: str, count: int) -> Array:
        found: Array = take(field, (count,), np.int64, JOINED_RANKS * m.rank)
        if (found < 1).any():
            raise ValueError(f"modules.{m.name}.{field}: expected ranks from 1, got others")
        return found

    d_in, d_out, sessions = m.in_features, m.out_features, len(names["fast"])
    own, kept = ranks("fast_ranks", sessions), len(tensors.get(f"modules.{m.name}.directions", ()))
    others = ranks("member_ranks", kept)
    for kind, found in (("fast", own), ("member", others)):
        take(f"{kind}_A", (int(found.sum()), d_in))
        take(f"{kind}_B", (int(found.sum()), d_out))
    for field, width in (("u", d_out), ("v", d_in), ("inputs", d_in)):
        take(field, (sessions, width))
    pending = take("pending", (sessions,), np.int64, 1 << 53)
    quality = take("quality", (sessions,), np.float64)
    if (quality > pending * (1 + 1e-9)).any():
        raise ValueError(f"modules.{m.name}.quality: expected at most 1 a sample, got more")
    held = take("held", (sessions,), np.int64, 1) > 0
    take("held_u", (int(held.sum()), d_out))
    take("held_v", (int(held.sum()), d_in))
    take("held_A", (int(own[held].sum()), d_in))
    take("baselines", (len(names["baselines"]),), np.float64, 1.0)
    take("directions", (kept, d_in))
    take("member_quality", (kept,), np.float64, 1.0 + 1e-9)
    fisher = min(1, len(tensors.get(f"modules.{m.name}.fisher_u", ())))
    take("fisher_u", (fisher, d_out))
    take("fisher_v", (fisher, d_in))
    take("samples", (1,), np.float64)
    take("held_out_seen", (1,), np.int64)
    count = int(take("held_out_count", (1,), np.int64)[0])
    for field, width in (("held_out_x", d_in), ("held_out_target", d_out)):
        take(field, (min(count, len(m.held_out.x)), width))


# ---- putting it in place ------------------------------------------------------


def _restore(m: Module, A: Array, B: Array, kept: _Kept | None) -> None:
    """Serves the weights as the consolidated ones; sessions as they were kept, else anew."""
    with m.lock:
        old, served = m.served, Served(m.pool.add(A, B, m.scaling), {}, {})
        m.forget()
        m.fisher, m.samples = None, 0.0
        m.baselines = {}
        m.held_out.clear()
        if kept is not None:
            served = _restored(m, served, kept)
        m.served = served
        m.pool.remove_all(old.slots())


def _restored(m: Module, served: Served, kept: _Kept) -> Served:
    """What was served, in slots of its own, and all else that the module knew."""
    t = {field: kept.tensors[f"modules.{m.name}.{field}"] for field in _FIELDS}
    names = kept.sessions[m.name]
    m.baselines = {
        session: Baseline(value)
        for session, value in zip(names["baselines"], t["baselines"].tolist(), strict=True)
    }
    m.samples = float(t["samples"][0])
    n = len(t["held_out_x"])
    m.held_out.x[:n], m.held_out.target[:n] = t["held_out_x"], t["held_out_target"]
    m.held_out.count, m.held_out.seen = int(t["held_out_count"][0]), int(t["held_out_seen"][0])
    if len(t["fisher_u"]):
        m.fisher = (t["fisher_u"][0].copy(), t["fisher_v"][0].copy())
        if m.ewc is not None:
            m.ewc.set(served.consolidated, *m.fisher)
    anchors = iter(np.split(t["held_A"], np.cumsum(t["fast_ranks"][t["held"] > 0])[:-1]))
    factors = iter(zip(t["held_u"], t["held_v"], strict=True))
    for i, (session, (A, B)) in enumerate(zip(names["fast"], _factors(t, "fast"), strict=True)):
        fast = Fast(m.pool.add(A, B, m.scaling), m.in_features)
        m.sums.begin(fast.slot)
        m.sums.u[fast.slot], m.sums.v[fast.slot] = t["u"][i], t["v"][i]
        fast.inputs[:] = t["inputs"][i]
        fast.quality, fast.pending = float(t["quality"][i]), int(t["pending"][i])
        if t["held"][i]:
            (u, v), anchor = next(factors), next(anchors)
            if m.ewc is not None:
                m.ewc._storage.restore(fast.slot, [u], [v], [anchor], [np.zeros_like(B)])
        served.fast[session] = fast
    members = [
        Member(m.pool.add(A, B, m.scaling), direction.copy(), quality)
        for (A, B), direction, quality in zip(
            _factors(t, "member"), t["directions"], t["member_quality"].tolist(), strict=True
        )
    ]
    return served._replace(members=tuple(members))


def _factors(t: Tensors, kind: str) -> Iterator[tuple[Array, Array]]:
    """(A [r, in], B [out, r]) of each adapter of a kind."""
    end = 0
    for rank in t[f"{kind}_ranks"].tolist():
        begin, end = end, end + rank
        yield t[f"{kind}_A"][begin:end], np.ascontiguousarray(t[f"{kind}_B"][begin:end].T)


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
