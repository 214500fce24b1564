"""What goes into a merge: options and adapters, checked; and what in them is no delta."""

from __future__ import annotations

import math
import os
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from lora_engine.adapters.adapter import Adapter, Array, LoraWeights
from lora_engine.adapters.elementwise import weighted_sum
from lora_engine.adapters.micro_lora import MicroLoRA

METHODS = (
    "svd", "cat", "linear", "ties", "ties_svd", "dare_linear", "dare_ties", "magnitude_prune",
)  # fmt: skip
PRUNING = ("ties", "ties_svd", "dare_linear", "dare_ties", "magnitude_prune")  # take a density
CUTTING = ("svd", "ties_svd", "dare_linear", "magnitude_prune")  # take a rank


@dataclass(frozen=True)
class Options:
    method: str
    rank: int | None
    density: float
    majority: str
    seed: int

    def keeps(self, adapter: Adapter) -> bool:
        """Whether nothing of an adapter is pruned or cut."""
        loras = (*adapter.modules.values(), *adapter.embeddings.values())
        whole = self.rank is None or all(len(lora.A) <= self.rank for lora in loras)
        return whole and self.density >= 1

    def rng(self, name: str, part: int) -> np.random.Generator:
        """Draws of one adapter in one module, whatever else is merged."""
        key = np.array([self.seed, zlib.crc32(name.encode()) << 32 | part], np.uint64)
        return np.random.Generator(np.random.Philox(key=key))


class Part(NamedTuple):
    """An adapter that takes part; place: in the list that was given."""

    place: int
    name: str
    weight: float
    adapter: Adapter


class Term(NamedTuple):
    """One adapter's weights of a module; scale = weight times scaling."""

    part: Part
    lora: LoraWeights

    @property
    def weight(self) -> float:
        return self.part.weight

    @property
    def scale(self) -> float:
        return self.weight * self.lora.scaling


def bad(what: str, expected: str, got: Any) -> ValueError:
    return ValueError(f"merge_adapters: {what}: expected {expected}, got {got}")


def checked_options(
    method: Any, rank: Any, density: Any, majority_sign_method: Any, seed: Any
) -> Options:
    if method not in METHODS:
        raise bad("method", f"one of {', '.join(METHODS)}", repr(method))
    if rank is not None:
        if method not in CUTTING:
            raise bad("rank", f"None for {method} (svd cuts to a rank)", repr(rank))
        if isinstance(rank, bool) or not isinstance(rank, (int, np.integer)) or rank < 1:
            raise bad("rank", "a whole number of at least 1 or None", repr(rank))
    if method in PRUNING:
        number = isinstance(density, (int, float)) and not isinstance(density, bool)
        if not number or not 0 < density <= 1:
            raise bad("density", f"a number above 0, at most 1, for {method}", repr(density))
    elif density is not None:
        raise bad("density", f"None for {method}, which prunes nothing", repr(density))
    if majority_sign_method not in ("total", "frequency"):
        raise bad("majority_sign_method", "total or frequency", repr(majority_sign_method))
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**64:
        raise bad("seed", "a whole number from 0 to 2^64 - 1", repr(seed))
    kept = 1.0 if density is None else float(density)
    return Options(method, None if rank is None else int(rank), kept, majority_sign_method, seed)


def _as_adapter(name: str, source: Any) -> Adapter:
    if isinstance(source, Adapter):
        return source
    if isinstance(source, MicroLoRA):
        return Adapter.from_micro_lora(source)
    if isinstance(source, (str, os.PathLike)):
        return Adapter.load(source)
    raise TypeError(
        f"merge_adapters: {name}: expected an Adapter, a MicroLoRA or a folder,"
        f" got {type(source).__name__}"
    )


def checked_parts(adapters: Any) -> list[Part]:
    """Those of a weight that is not 0, read."""
    try:
        pairs = [(source, weight) for source, weight in adapters]
    except (TypeError, ValueError):
        raise TypeError(
            "merge_adapters: adapters: expected pairs (adapter, weight), got others"
        ) from None
    named = []
    for place, (source, weight) in enumerate(pairs):
        is_path = isinstance(source, (str, os.PathLike))
        name = os.fspath(source) if is_path else f"adapters[{place}]"
        number = isinstance(weight, (int, float, np.number)) and not isinstance(weight, bool)
        if not number or not math.isfinite(weight):
            raise bad(f"{name}: weight", "a finite number", repr(weight))
        if weight != 0:
            named.append((place, name, float(weight), source))
    if not named:
        raise bad("adapters", "at least one of a weight that is not 0", "none")
    return [Part(at, name, w, _as_adapter(name, source)) for at, name, w, source in named]


def shape_of(lora: LoraWeights) -> tuple[int, int]:
    return lora.A.shape[1], lora.B.shape[0]


def check_fit(parts: Sequence[Part]) -> None:
    """Raises ValueError where a module has another kind or shape from adapter to adapter."""
    seen: dict[str, tuple[str, str, tuple[int, int]]] = {}
    for part in parts:
        kinds = ("linear", part.adapter.modules), ("embedding", part.adapter.embeddings)
        for kind, loras in kinds:
            for name, lora in loras.items():
                what = f"{part.name}: {name}"
                first, was, shape = seen.setdefault(name, (part.name, kind, shape_of(lora)))
                if was != kind:
                    raise bad(what, f"{was} as in {first}", kind)
                if shape_of(lora) != shape:
                    raise bad(what, f"(in, out) = {shape} as in {first}", str(shape_of(lora)))
                finite = np.isfinite(lora.A).all() and np.isfinite(lora.B).all()
                if not finite or not math.isfinite(lora.scaling):
                    raise bad(what, "finite numbers", "NaN or Inf")


def merged_biases(parts: Sequence[Part]) -> dict[str, Array]:
    """Whole biases stand in for the base's: their sum is that of deltas where the weights are 1."""
    merged: dict[str, Array] = {}
    total = math.fsum(part.weight for part in parts)
    for name in dict.fromkeys(name for part in parts for name in part.adapter.biases):
        biases = []
        for part in parts:
            what, want = f"{part.name}: bias of {name}", parts[0].adapter.biases.get(name)
            if want is None or name not in part.adapter.biases:
                raise bad(what, "whole biases in all adapters, or in none", "one without")
            biases.append(part.adapter.biases[name])
            if biases[-1].shape != want.shape:
                raise bad(what, f"shape {want.shape}", str(biases[-1].shape))
        if abs(total - 1) > 1e-6:
            what = f"weights, with the bias of {name}"
            raise bad(what, "a sum of 1, as whole biases hold the base's too", f"{total:g}")
        merged[name] = weighted_sum(biases, [part.weight for part in parts])
    return merged


def kept_whole(parts: Sequence[Part]) -> dict[str, Any]:
    """modules_to_save, which are no deltas: those that all who have them agree on."""
    kept: dict[str, Any] = {}
    for part in parts:
        for name, tensor in part.adapter.modules_to_save.items():
            if not np.array_equal(kept.setdefault(name, tensor), tensor):
                raise bad(
                    f"{part.name}: {name}",
                    "the same weights in all adapters, as modules_to_save are not merged",
                    "others",
                )
    return kept
