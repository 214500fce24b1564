"""One target module's part of a Sona's file: its tensors and its sessions' names."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from numbers import Integral
from typing import Any

import numpy as np

from lora_engine.adapters.exploration import Baseline
from lora_engine.learning.background import JOINED_RANKS
from lora_engine.learning.sona_module import Array, Member, Module, Served
from lora_engine.safetensors_file import short

Tensors = dict[str, np.ndarray]
Names = dict[str, list[Any]]  # whose the rows of "fast" and "baselines" are


# ---- writing ----------------------------------------------------------------


def _name_of(module: str, session: Any) -> Any:
    """A session's name as JSON holds it."""
    whole = isinstance(session, Integral) and not isinstance(session, bool)
    name = int(session) if whole else session
    if not is_name(name):
        raise ValueError(
            f"Sona.save: {module}: session: expected text, a whole number of 64 bits or None for"
            f" each session that is saved, got {short(repr(session))}"
        )
    return name


def is_name(name: Any) -> bool:
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


def to_tensors(m: Module) -> tuple[Tensors, Names]:
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


# ---- reading ----------------------------------------------------------------


FIELDS = (
    "fast_ranks", "fast_A", "fast_B", "member_ranks", "member_A", "member_B", "u", "v", "inputs",
    "quality", "pending", "held", "held_u", "held_v", "held_A", "baselines", "directions",
    "member_quality", "fisher_u", "fisher_v", "samples", "held_out_x", "held_out_target",
    "held_out_count", "held_out_seen",
)  # fmt: skip
_SIGNED = frozenset({"fast_A", "fast_B", "member_A", "member_B", "inputs", "held_A",
                     "directions", "held_out_x", "held_out_target"})  # fmt: skip


def check(m: Module, tensors: Tensors, names: Names) -> None:
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


def restore(m: Module, A: Array, B: Array, tensors: Tensors | None, names: Names) -> None:
    """Serves the weights as the consolidated ones; sessions as they were kept, else anew."""
    with m.lock:
        old, served = m.served, Served(m.pool.add(A, B, m.scaling), {}, {})
        m.forget()
        m.fisher, m.samples = None, 0.0
        m.baselines = {}
        m.held_out.clear()
        if tensors is not None:
            served = _restored(m, served, tensors, names)
        m.served = served
        m.pool.remove_all(old.slots())


def _restored(m: Module, served: Served, tensors: Tensors, names: Names) -> Served:
    """What was served, in slots of its own, and all else that the module knew."""
    t = {field: tensors[f"modules.{m.name}.{field}"] for field in FIELDS}
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
        fast = m.fast_of(m.pool.add(A, B, m.scaling))
        m.sums.begin(fast.slot)
        m.sums.u[fast.slot], m.sums.v[fast.slot] = t["u"][i], t["v"][i]
        if m.mean_inputs:
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
