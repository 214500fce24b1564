"""Checkpoints of a TrainingPipeline: one safetensors file, with what is no tensor in its metadata.

``modules.<name>.<A, B, waiting or a moment>``, ``best.<A, B, losses>`` of a train that was cut
short and ``ewc.<key>`` are the tensors; the metadata names both configurations, steps, rows that
wait, the sample order, and a digest of all of it.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

import numpy as np

from lora_engine import atomic, safetensors_file
from lora_engine.adapters.exploration import Baseline, Noise, checked_noise, is_quality
from lora_engine.adapters.micro_lora import MicroLoRA
from lora_engine.errors import FormatError
from lora_engine.learning.protection import Protection
from lora_engine.learning.training import Best, SampleOrder
from lora_engine.safetensors_file import is_count, open_file, read_json, short

if TYPE_CHECKING:
    from lora_engine.learning.pipeline import TrainingPipeline

KEY, FORMAT = "lora_engine_training", 2
_EWC = "ewc."
_BEST = ("best.A", "best.B", "best.losses")
Tensors = dict[str, np.ndarray]
State = dict[str, Any]


def _name(module: str, what: str) -> str:
    return f"modules.{module}.{what}"


def content_digest(tensors: Tensors, state: State) -> str:
    """Of everything but the digest itself."""
    rest = {key: value for key, value in state.items() if key != "sha256"}
    found = hashlib.sha256(json.dumps(rest, sort_keys=True).encode())
    for name in sorted(tensors):
        array = tensors[name]
        found.update(f"{name}\0{array.dtype}{array.shape}".encode())
        found.update(array.tobytes())
    return found.hexdigest()


def _configs(pipe: TrainingPipeline, lora: MicroLoRA) -> State:
    """Both configurations as JSON holds them."""
    both = {"TrainingConfig": asdict(pipe.config), "MicroLoRAConfig": asdict(lora.config)}
    made: State = json.loads(json.dumps(both))
    return made


def save(pipe: TrainingPipeline, lora: MicroLoRA, path: str | os.PathLike[str]) -> None:
    """``TrainingPipeline.save``."""
    tensors: Tensors = {}
    modules: State = {}
    for name, m in lora._modules.items():
        track = pipe._tracks[name]
        A, B, _ = lora.weights(name)
        parts = {"A": A, "B": B, **track.kept}
        if m.samples and m.gradient is not None:
            parts["waiting"] = m.gradient
        tensors.update({_name(name, what): array for what, array in parts.items()})
        modules[name] = {
            "steps": track.steps, "adapts": m.steps, "waiting": m.samples, "refused": m.refused,
            "rated": m.rated, "baseline": m.baseline.value,
        }  # fmt: skip
    protected = pipe._protection.state()
    arrays = {k: v for k, v in protected.items() if isinstance(v, np.ndarray)}
    tensors.update({_EWC + key: array for key, array in arrays.items()})
    order, best = pipe._order, None
    if pipe._best is not None and pipe._best.weights is not None:
        best = {"digest": pipe._best.digest, "epoch": pipe._best.epoch}
        kept = (*pipe._best.weights, np.array(pipe._best.losses))
        tensors.update(zip(_BEST, kept, strict=True))
    state = {
        "format": FORMAT,
        **_configs(pipe, lora),
        "modules": modules,
        "exploration": lora._explorer.state(),
        "order": {"epoch": order.epoch, "position": order.position, "digest": order.digest},
        "best": best,
        "ewc": {k: v for k, v in protected.items() if k not in arrays},
    }
    state["sha256"] = content_digest(tensors, state)
    data = safetensors_file.to_bytes(tensors, KEY, json.dumps(state))

    def write(file: BinaryIO) -> None:
        file.write(data)

    atomic.replace_file(Path(os.path.realpath(path)), write)


# ---- reading ----------------------------------------------------------------


def load(pipe: TrainingPipeline, lora: Any, path: str | os.PathLike[str]) -> None:
    """``TrainingPipeline.load``."""
    if not isinstance(lora, MicroLoRA):
        got = type(lora).__name__
        raise TypeError(f"TrainingPipeline.load: lora: expected a MicroLoRA, got {got}")
    source = os.fspath(path)
    with open_file(Path(source)) as file:
        tensors, metadata = safetensors_file.from_bytes(file.read(), source)
    if KEY not in metadata:
        raise FormatError(f"{source}: {KEY}: expected a checkpoint's metadata, got none")
    state = read_json(metadata[KEY].encode(), f"{source}: {KEY}")
    if state.get("format") != FORMAT:
        got = short(repr(state.get("format")))
        raise FormatError(f"{source}: format: expected {FORMAT}, got {got}")
    check_configs("TrainingPipeline.load", source, state, _configs(pipe, lora))
    kept = _checked(source, state, tensors, pipe, lora)
    try:
        _apply(pipe, lora, kept)
    except (TypeError, ValueError, IndexError) as error:
        raise FormatError(f"{source}: {short(str(error))}") from None


class _Kept(NamedTuple):
    """A checkpoint's content, which fits the MicroLoRA; only EWC has not seen its part."""

    tensors: Tensors
    modules: State
    noise: Noise
    order: SampleOrder
    best: Best | None
    protected: State


def object_of(source: str, state: State, key: str) -> State:
    found = state.get(key)
    if not isinstance(found, dict):
        raise FormatError(f"{source}: {key}: expected an object, got {short(repr(found))}")
    return found


def check_configs(op: str, source: str, state: State, want: State) -> None:
    """Raises ValueError naming the first field in which a configuration differs."""
    for kind, fields in want.items():
        found = object_of(source, state, kind)
        for field in [*fields, *(f for f in found if f not in fields)]:
            here, there = fields.get(field), found.get(field)
            if here != there:
                raise ValueError(
                    f"{op}: {source}: expected a checkpoint of"
                    f" {kind}({short(field)}={short(repr(here))}), got one of {short(repr(there))}"
                )


def _checked(
    source: str, state: State, tensors: Tensors, pipe: TrainingPipeline, lora: MicroLoRA
) -> _Kept:
    def bad(key: str, expected: str) -> FormatError:
        return FormatError(f"{source}: {short(key)}: expected {expected}")

    modules, order, protected = (
        object_of(source, state, key) for key in ("modules", "order", "ewc")
    )
    want: dict[str, tuple[int, ...]] = {}
    for name in lora._modules:
        counts = modules.get(name)
        fields = ("steps", "adapts", "waiting", "refused")
        if not isinstance(counts, dict) or not all(is_count(counts.get(f)) for f in fields):
            raise bad(f"modules: {name}", "steps, adapts, waiting and refused, numbers from 0")
        if not isinstance(counts.get("rated"), bool):
            raise bad(f"modules: {name}: rated", "true or false")
        if counts.get("baseline") is not None and not is_quality(counts["baseline"]):
            raise bad(f"modules: {name}: baseline", "a number in 0..1 or null")
        rank, (d_in, d_out) = lora.config.rank, lora.config.shape(name)
        size = rank * (d_in + d_out)
        flat = [*pipe._optimizer.names, *(["waiting"] if counts["waiting"] else [])]
        want |= {_name(name, "A"): (rank, d_in), _name(name, "B"): (d_out, rank)}
        want |= {_name(name, what): (size,) for what in flat}
    best = _checked_best(state, tensors, lora, bad)
    others = (t for t in tensors if not t.startswith(_EWC) and not (best and t in _BEST))
    for key in [*want, *others]:
        array, shape = tensors.get(key), want.get(key)
        if shape is None or array is None:
            raise bad(key, "the tensors of the configuration, no more and no less")
        if array.shape != shape or array.dtype != np.float32 or not np.isfinite(array).all():
            raise bad(key, f"finite float32 {list(shape)}, got {array.dtype} {list(array.shape)}")
        if key.endswith(".second_moment") and array.min() < 0.0:
            raise bad(key, "squares, got a negative number")
    if state.get("sha256") != content_digest(tensors, state):
        raise bad("sha256", "the digest of the content, got another: the file is damaged")
    try:
        noise = checked_noise("exploration", state.get("exploration"))
    except ValueError as error:
        raise FormatError(f"{source}: {error}") from None
    if not all(is_count(order.get(f)) for f in ("epoch", "position")):
        raise bad("order", "epoch and position, numbers from 0")
    if not isinstance(order.get("digest"), str):
        raise bad("order: digest", "text")
    arrays = {k[len(_EWC) :]: v for k, v in tensors.items() if k.startswith(_EWC)}
    seen = SampleOrder(pipe.config.seed, order["epoch"], order["position"], order["digest"])
    return _Kept(tensors, modules, noise, seen, best, {**protected, **arrays})


def _checked_best(
    state: State, tensors: Tensors, lora: MicroLoRA, bad: Callable[[str, str], FormatError]
) -> Best | None:
    """The best weights of a train that was cut short, of the module that its digest names."""
    found = state.get("best")
    if found is None:
        return None
    if not isinstance(found, dict) or not isinstance(found.get("digest"), str):
        raise bad("best", "digest and epoch, or null")
    module = next((n for n in lora._modules if found["digest"].startswith(f"{n}: ")), None)
    if module is None:
        raise bad("best: digest", "one of a module of the configuration")
    for key, like in zip(_BEST, lora.weights(module)[:2], strict=False):
        array = tensors.get(key)
        good = array is not None and (array.dtype, array.shape) == (like.dtype, like.shape)
        if not good or not np.isfinite(tensors[key]).all():
            raise bad(key, f"finite float32 {list(like.shape)}")
    losses = tensors.get(_BEST[2])
    if losses is None or losses.dtype != np.float64 or losses.ndim != 1 or not len(losses):
        raise bad(_BEST[2], "float64 [n], at least one")
    if not is_count(found.get("epoch")) or found["epoch"] >= len(losses):
        raise bad("best: epoch", f"a number from 0 to {len(losses) - 1}")
    A, B = (tensors[key].copy() for key in _BEST[:2])
    return Best(found["digest"], losses.tolist(), found["epoch"], (A, B))


def _apply(pipe: TrainingPipeline, lora: MicroLoRA, kept: _Kept) -> None:
    """Puts a checked state in place; where EWC refuses its part, everything is as it was."""
    before = {name: lora.weights(name)[:2] for name in lora._modules}
    waited = {n: (m.gradient, m.samples, m.refused, m.rated) for n, m in lora._modules.items()}
    was_protected = pipe._protection.state() if pipe._lora is lora else None
    for name, m in lora._modules.items():
        m.gradient = None  # for the rollback to keep
        lora.set_weights(name, *(kept.tensors[_name(name, what)] for what in "AB"))
    try:
        protection = Protection(lora, pipe.config)
        protection.load_state(kept.protected)
    except BaseException:
        for name, m in lora._modules.items():
            lora.set_weights(name, *before[name])
            m.gradient, m.samples, m.refused, m.rated = waited[name]
        if was_protected is not None:
            pipe._protection.load_state(was_protected)
        raise
    pipe.init_for_lora(lora)
    pipe._protection, pipe._order, pipe._best = protection, kept.order, kept.best
    lora._explorer.go_on(kept.noise)
    for name, m in lora._modules.items():
        counts, track = kept.modules[name], pipe._tracks[name]
        m.baseline = Baseline(counts.get("baseline"))
        m.steps, m.samples, m.refused = counts["adapts"], counts["waiting"], counts["refused"]
        m.rated = counts["rated"]
        if m.samples:
            m.gradient = kept.tensors[_name(name, "waiting")].copy()
        track.steps = counts["steps"]
        track.kept = {
            what: kept.tensors[_name(name, what)].copy() for what in pipe._optimizer.names
        }
