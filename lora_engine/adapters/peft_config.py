"""adapter_config.json: what it says of ranks and scalings, and how it is written."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from lora_engine.adapters.config import MAX_FLOAT
from lora_engine.adapters.patterns import Patterns, key_of
from lora_engine.errors import FormatError
from lora_engine.safetensors_file import read_json, short

if TYPE_CHECKING:
    from lora_engine.adapters.adapter import Adapter, LoraWeights

MAX_JSON = 1 << 20
MAX_RANK = 65536

# Each makes of the same A and B another delta, or adapts what is no module. By PEFT 0.21.
VARIANTS = (
    "use_dora", "use_qalora", "use_bdlora", "alora_invocation_tokens", "arrow_config",
    "kasa_config", "velora_config", "monteclora_config", "target_parameters",
    "trainable_token_indices", "layer_replication",
)  # fmt: skip
# Each has changed the base's weights, which PEFT does again when it loads such a folder. What
# PEFT converts (path_initial_model_for_weight_conversion) says True.
_CHANGES_BASE = ("pissa", "corda", "olora", "loftq", "lora_ga")
_DEFAULTS: dict[str, Any] = {
    "peft_type": "LORA",
    "task_type": None,
    "base_model_name_or_path": None,
    "fan_in_fan_out": False,
    "bias": "none",
    "inference_mode": True,
    "init_lora_weights": True,
    "modules_to_save": None,
    "lora_dropout": 0.0,
}


class Scalings(NamedTuple):
    """The part of a config that fixes every module's rank and scaling, under PEFT's keys."""

    r: int
    lora_alpha: float
    use_rslora: bool
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]


class PeftConfig:
    """A checked adapter_config.json of plain LoRA."""

    def __init__(self, raw: Mapping[str, Any], source: str) -> None:
        """Raises FormatError naming the source and the key."""
        self.raw, self.source = raw, source
        self._check_variant()
        self.rank = self._rank("r", raw.get("r"))
        self.alpha = self._number("lora_alpha", raw.get("lora_alpha", 8))
        self.dropout = self._number("lora_dropout", raw.get("lora_dropout", 0.0))
        if not 0.0 <= self.dropout < 1.0:
            raise self.refused("lora_dropout", "0 <= p < 1")
        self.use_rslora = self._flag("use_rslora")
        self.lora_bias = self._flag("lora_bias")
        self._ranks = self._patterns("rank_pattern", self._rank)
        self._alphas = self._patterns("alpha_pattern", self._number)

    @classmethod
    def read(cls, data: bytes, source: str) -> PeftConfig:
        """From a file's bytes. Raises FormatError."""
        if len(data) > MAX_JSON:
            raise FormatError(f"{source}: expected at most {MAX_JSON} bytes, got more")
        return cls(read_json(data, source), source)

    def refused(self, key: str, expected: str, got: Any = ...) -> FormatError:
        got = short(repr(self.raw.get(key) if got is ... else got))
        return FormatError(f"{self.source}: {key}: expected {expected}, got {got}")

    def _check_variant(self) -> None:
        if self.raw.get("peft_type") != "LORA":
            raise self.refused("peft_type", "LORA")
        for key in VARIANTS:
            if self.raw.get(key):
                raise self.refused(key, "nothing: that variant of LoRA is not read")
        init = self.raw.get("init_lora_weights")
        if isinstance(init, str) and init.lower().startswith(_CHANGES_BASE):
            raise self.refused(
                "init_lora_weights",
                "an adapter of the unchanged base (PEFT converts one where it is saved with"
                " path_initial_model_for_weight_conversion)",
            )
        if self.raw.get("bias", "none") not in ("none", "all", "lora_only"):
            raise self.refused("bias", "none, all or lora_only")

    def _flag(self, key: str) -> bool:
        value = self.raw.get(key, False)
        if not isinstance(value, bool):
            raise self.refused(key, "true or false")
        return value

    def _number(self, key: str, value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise self.refused(key, "a number", value)
        if not abs(value) <= MAX_FLOAT:  # beyond float32 nothing is stored; NaN is beyond it too
            raise self.refused(key, "a number within float32's range", value)
        return float(value)

    def _rank(self, key: str, value: Any) -> int:
        number = self._number(key, value)
        if number != int(number) or not 1 <= number <= MAX_RANK:
            raise self.refused(key, f"a whole number from 1 to {MAX_RANK}", value)
        return int(number)

    def _patterns(self, key: str, checked: Any) -> Patterns:
        found = self.raw.get(key)
        if found is None:
            found = {}
        if not isinstance(found, dict):
            raise self.refused(key, "an object")
        entries = {k: checked(f"{key}: {short(k)}", value) for k, value in found.items()}
        return Patterns(entries, f"{self.source}: {key}")

    def rank_of(self, module: str) -> int:
        rank: int | None = self._ranks.find(module)
        return self.rank if rank is None else rank

    def scaling_of(self, module: str) -> float:
        """alpha / rank, or alpha / sqrt(rank) with rsLoRA."""
        alpha: float | None = self._alphas.find(module)
        return _scaling(
            self.alpha if alpha is None else alpha, self.rank_of(module), self.use_rslora
        )


def _scaling(alpha: float, rank: int, use_rslora: bool) -> float:
    return alpha / (math.sqrt(rank) if use_rslora else rank)


# ---- writing ----------------------------------------------------------------


def _alpha(scaling: float, rank: int, use_rslora: bool) -> float:
    """The number that gives the scaling again, to the bit where there is one."""
    near = scaling * (math.sqrt(rank) if use_rslora else rank)
    whole = float(round(near))
    around = (whole, near, math.nextafter(near, -math.inf), math.nextafter(near, math.inf))
    alpha = next((a for a in around if _scaling(a, rank, use_rslora) == scaling), near)
    return int(alpha) if alpha.is_integer() else alpha


def _most_common(values: Mapping[str, Any]) -> Any:
    return Counter(values.values()).most_common(1)[0][0]


def _pattern(values: Mapping[str, Any], default: Any) -> dict[str, Any]:
    """Entries for the modules whose value is not the default, each matching no other module."""
    ends = {path[at + 1 :] for path in values for at, c in enumerate(path) if c == "."}
    return {key_of(p, p in ends): value for p, value in values.items() if value != default}


def scalings(adapter: Adapter) -> Scalings:
    """Those of the adapter's own config where they fit its modules, else new ones."""
    weights: dict[str, LoraWeights] = {**adapter.modules, **adapter.embeddings}
    ranks = {path: w.A.shape[0] for path, w in weights.items()}
    raw = adapter.peft_config
    use_rslora = bool(raw.get("use_rslora", False))
    if "r" in raw:
        kept = PeftConfig({**raw, "peft_type": "LORA"}, "peft_config")
        fits = (
            kept.rank_of(path) == ranks[path] and kept.scaling_of(path) == w.scaling
            for path, w in weights.items()
        )
        if all(fits):
            patterns = (raw.get(key) or {} for key in ("rank_pattern", "alpha_pattern"))
            return Scalings(kept.rank, raw.get("lora_alpha", 8), use_rslora, *patterns)
    alphas = {path: _alpha(w.scaling, ranks[path], use_rslora) for path, w in weights.items()}
    rank, alpha = _most_common(ranks), _most_common(alphas)
    return Scalings(rank, alpha, use_rslora, _pattern(ranks, rank), _pattern(alphas, alpha))


def to_json(adapter: Adapter) -> bytes:
    """The config of an adapter: what it was read with, changed only where it no longer fits."""
    paths = [*adapter.modules, *adapter.embeddings]
    config = {**_DEFAULTS, **adapter.peft_config, **scalings(adapter)._asdict()}
    if not adapter.targets or set(paths) != adapter.targets:
        config["target_modules"] = paths
    has_bias = any(w.bias_delta is not None for w in adapter.modules.values())
    if has_bias or config.get("lora_bias"):
        config["lora_bias"] = has_bias
    if adapter.biases and "bias" not in adapter.peft_config:
        config["bias"] = "lora_only" if set(adapter.biases) <= set(paths) else "all"
    return (json.dumps(config, indent=2) + "\n").encode()
