"""Merging adapters into one: weighted sums of their deltas, and merges by elements."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from lora_engine.adapters.adapter import Adapter, Array, LoraWeights
from lora_engine.adapters.elementwise import (
    drop,
    elected_mean,
    least_kept,
    trim,
    weighted_sum,
)
from lora_engine.adapters.low_rank import Svd, stacked, svd_of_dense, svd_of_sum
from lora_engine.adapters.merge_inputs import (
    PRUNING,
    Options,
    Term,
    bad,
    check_fit,
    checked_options,
    checked_parts,
    kept_whole,
    merged_biases,
    shape_of,
)

_OF_FACTORS = ("ties", "dare_ties")  # merge A with A and B with B
_BLOCK = 1 << 22  # elements of a dense delta that are made at a time
# What a config says of the one adapter's weights: `Adapter.save` says it of the merged ones.
_OWN_KEYS = (
    "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "target_modules",
    "init_lora_weights", "lora_dropout", "lora_bias", "bias", "layers_to_transform",
    "layers_pattern", "exclude_modules", "modules_to_save",
)  # fmt: skip


class MergedModule(NamedTuple):
    """What became of a module: ranks of the adapters that have it, rank of the result, and
    ‖merged - what the method asks for‖ / ‖what it asks for‖, Frobenius: what a cut left out."""

    name: str
    ranks: tuple[int, ...]
    rank: int
    error: float


class Merged(NamedTuple):
    adapter: Adapter
    modules: tuple[MergedModule, ...]


# ---- one module -------------------------------------------------------------


def _pruned(name: str, term: Term, options: Options) -> Term:
    """A and B each with the density of elements that the method keeps."""
    A, B = term.lora.A, term.lora.B
    if options.method.startswith("dare"):
        rng = options.rng(name, term.part.place)
        A, B = drop(A, options.density, rng), drop(B, options.density, rng)
    elif options.method in ("ties", "magnitude_prune"):
        A, B = trim(A, options.density), trim(B, options.density)
    return term._replace(lora=term.lora._replace(A=A, B=B))


def _of_svd(svd: Svd, like: Term) -> LoraWeights:
    if not len(svd.S):  # the terms cancel: a zero adapter of rank 1
        return LoraWeights(like.lora.A[:1].copy(), np.zeros_like(like.lora.B[:, :1]), 1.0)
    A, B = svd.factors()
    return LoraWeights(A, B, 1.0)


def _summed(terms: Sequence[Term], rank: int | None) -> tuple[LoraWeights, float]:
    """sum of the terms' deltas, cut to a rank."""
    scales = np.concatenate([np.full(len(t.lora.A), t.scale) for t in terms])
    svd = svd_of_sum(
        stacked([t.lora.B for t in terms]), stacked([t.lora.A.T for t in terms]), scales
    )
    cut = svd if rank is None else svd.cut(rank)
    return _of_svd(cut, terms[0]), cut.error


def _concatenated(terms: Sequence[Term]) -> LoraWeights:
    """B_i side by side, and w_i s_i A_i below each other."""
    A = np.concatenate([(t.scale * t.lora.A.astype(np.float64)) for t in terms])
    return LoraWeights(A.astype(np.float32), np.concatenate([t.lora.B for t in terms], 1), 1.0)


def _of_factors(name: str, terms: Sequence[Term], options: Options) -> LoraWeights:
    """TIES on A and on B; the root of |w s| on either side, and its sign on A's."""
    first = terms[0].lora
    for term in terms:
        if len(term.lora.A) != len(first.A):
            raise bad(
                f"{term.part.name}: {name}",
                f"rank {len(first.A)} as in {terms[0].part.name} for {options.method}"
                " (svd and ties_svd take ranks that differ)",
                f"rank {len(term.lora.A)}",
            )
    roots = [math.sqrt(abs(t.scale)) for t in terms]
    signed = [math.copysign(r, t.scale) for r, t in zip(roots, terms, strict=True)]
    A = elected_mean([t.lora.A for t in terms], signed, options.majority)
    return LoraWeights(A, elected_mean([t.lora.B for t in terms], roots, options.majority), 1.0)


def _ties_of_deltas(terms: Sequence[Term], options: Options) -> tuple[LoraWeights, float]:
    """TIES on the deltas themselves, then the SVD of what comes out."""
    d_in, d_out = shape_of(terms[0].lora)
    step = max(_BLOCK // d_in, 1)
    rows = [slice(start, start + step) for start in range(0, d_out, step)]

    def delta(t: Term, block: slice) -> Any:
        return np.float32(t.lora.scaling) * (t.lora.B[block] @ t.lora.A)

    dense = np.empty((d_out, d_in), np.float32)
    least = []
    for t in terms:
        if options.density < 1:
            for block in rows:
                np.abs(delta(t, block), out=dense[block])
        least.append(least_kept(dense, options.density) if options.density < 1 else 0.0)
    weights = [t.weight for t in terms]
    for block in rows:
        tensors = [delta(t, block) for t in terms]
        for tensor, smallest in zip(tensors, least, strict=True):
            tensor[np.abs(tensor) < smallest] = 0
        dense[block] = elected_mean(tensors, weights, options.majority)
    rank = options.rank or max(len(t.lora.A) for t in terms)
    svd = svd_of_dense(dense, rank)
    return _of_svd(svd, terms[0]), svd.error


def _bias(name: str, terms: Sequence[Term], options: Options) -> Array | None:
    """The biases that come with the deltas, by the same method; they hold the scaling."""
    having = [t for t in terms if t.lora.bias_delta is not None]
    if not having:
        return None
    biases = [t.lora.bias_delta for t in having if t.lora.bias_delta is not None]
    weights = [t.weight for t in having]
    if options.method.startswith("dare"):
        rngs = [options.rng(f"{name}.bias", t.part.place) for t in having]
        biases = [drop(b, options.density, rng) for b, rng in zip(biases, rngs, strict=True)]
    elif options.method in PRUNING:
        biases = [trim(b, options.density) for b in biases]
    if "ties" in options.method:
        return elected_mean(biases, weights, options.majority)
    return weighted_sum(biases, weights)


def _merged_module(
    name: str, terms: Sequence[Term], options: Options
) -> tuple[LoraWeights, MergedModule]:
    ranks = tuple(len(t.lora.A) for t in terms)
    error = 0.0
    alone = len(terms) == 1 and options.density >= 1
    if alone and (options.rank is None or ranks[0] <= options.rank):
        lora = terms[0].lora
        merged = lora._replace(scaling=terms[0].scale)  # its own bits
    elif options.method == "cat":
        merged = _concatenated(terms)
    elif options.method == "ties_svd":
        merged, error = _ties_of_deltas(terms, options)
    else:
        pruned = [_pruned(name, t, options) for t in terms]
        if options.method in _OF_FACTORS:
            merged = _of_factors(name, pruned, options)
        else:
            merged, error = _summed(pruned, options.rank)
    merged = merged._replace(bias_delta=_bias(name, terms, options))
    if not (np.isfinite(merged.A).all() and np.isfinite(merged.B).all()):
        raise bad(name, "a sum within float32's range", "Inf")
    return merged, MergedModule(name, ranks, len(merged.A), error)


# ---- whole adapters ---------------------------------------------------------


def merge(
    adapters: Sequence[tuple[Any, float]],
    method: str = "svd",
    rank: int | None = None,
    *,
    density: float | None = None,
    majority_sign_method: str = "total",
    seed: int = 0,
    on_module: Callable[[int, MergedModule], None] | None = None,
) -> Merged:
    """``merge_adapters``, with what became of each module.

    on_module(of how many, module) is called after each.
    """
    options = checked_options(method, rank, density, majority_sign_method, seed)
    parts = checked_parts(adapters)
    check_fit(parts)
    _, _, weight, first = parts[0]
    if len(parts) == 1 and weight == 1 and options.keeps(first):
        loras = {**first.modules, **first.embeddings}
        kept = [MergedModule(n, (len(w.A),), len(w.A), 0.0) for n, w in loras.items()]
        return Merged(replace(first), tuple(kept))
    biases, whole = merged_biases(parts), kept_whole(parts)
    kinds: list[list[Mapping[str, LoraWeights]]] = [
        [part.adapter.modules for part in parts],
        [part.adapter.embeddings for part in parts],
    ]
    names = [dict.fromkeys(name for loras in kind for name in loras) for kind in kinds]
    total, done, out = sum(map(len, names)), [], []
    for kind, of_kind in zip(kinds, names, strict=True):
        merged = {}
        for name in of_kind:
            terms = [
                Term(part, loras[name])
                for part, loras in zip(parts, kind, strict=True)
                if name in loras
            ]
            with np.errstate(over="ignore", invalid="ignore"):  # it checks what comes out
                merged[name], report = _merged_module(name, terms, options)
            done.append(report)
            if on_module is not None:
                on_module(total, report)
        out.append(merged)
    config = {k: v for k, v in first.peft_config.items() if k not in _OWN_KEYS}
    saved = [name for p in parts for name in p.adapter.peft_config.get("modules_to_save") or ()]
    if whole:
        config["modules_to_save"] = list(dict.fromkeys(saved))
    adapter = Adapter(out[0], out[1], biases, config, modules_to_save=whole)
    return Merged(adapter, tuple(done))


def merge_adapters(
    adapters: Sequence[tuple[Any, float]],
    method: str = "svd",
    rank: int | None = None,
    *,
    density: float | None = None,
    majority_sign_method: str = "total",
    seed: int = 0,
) -> Adapter:
    """One adapter of several, ``[(adapter, weight), ...]``.

    An adapter is an ``Adapter``, a ``MicroLoRA`` or a PEFT folder. Weights may be negative; one
    of weight 0 is left out. Ranks and scalings may differ; of a module that only some adapt, the
    others' delta is 0. D_i = s_i B_i A_i below; embeddings are merged as linear layers are.

    - "svd": sum w_i D_i, and with ``rank`` the nearest of that rank (Eckart and Young 1936), by
      an SVD in the bases of the stacked factors: O((in + out) R²), R the sum of ranks. rank=None
      keeps the numerical rank of the sum: its singular values above 2^-21 of the largest.
    - "linear": sum w_i D_i at that rank.
    - "cat": sum w_i D_i as [B_1 B_2 ...] and [w_1 s_1 A_1; w_2 s_2 A_2; ...]: the sum of ranks.
    - "magnitude_prune": A_i and B_i with their ``density`` of largest elements, then as "svd".
    - "dare_linear": A_i and B_i with a random ``density`` of their elements, over density, then
      as "svd": an unbiased sum w_i D_i (DARE: Yu et al. 2024, arXiv:2311.03099).
    - "ties", "dare_ties": A_i and B_i trimmed, or dropped as in DARE, then a sign elected and
      averaged for each element of A and of B (TIES: Yadav et al. 2023, arXiv:2306.01708,
      algorithm 1), sqrt(|w_i s_i|) on either side. Ranks must be equal. Elements of factors have
      a meaning in common only where adapters share their start. Weights here, and of "ties_svd",
      scale what is averaged, as in PEFT: an adapter with itself is itself at 1 each, half at 0.5.
    - "ties_svd": TIES on the D_i themselves, which are made in blocks of rows; takes one dense
      float32 [out, in] and some blocks of 16 MB an adapter. rank=None: the largest of the ranks.

    density: part that is kept, above 0, at most 1. majority_sign_method: "total" or "frequency".
    seed: of what DARE drops; a draw depends on seed, module and place in the list alone. These
    and ``method`` have the names of PEFT's ``add_weighted_adapter``, whose deltas come out,
    except where PEFT's are not what the method says:

    - its linear, dare_linear and magnitude_prune add A and B separately, which brings in
      sqrt(|w_i w_j s_i s_j|) B_i A_j: an adapter merged with itself at 0.5 each comes out double;
    - with use_rslora its result is sqrt(rank) times too large (svd, cat, and all others);
    - of a single adapter it takes "linear", whatever the method, rank or density;
    - it elects signs without the weights', so that what is subtracted votes as if it were added;
    - it leaves out lora_B's biases.

    ``bias_delta`` is merged by the same method. Whole biases hold the base's, so their weighted
    sum is right only where the weights sum to 1 and all have them: ValueError elsewhere. Other
    whole tensors (modules_to_save) are kept where those who have them agree, ValueError elsewhere.
    A module that one adapter alone has keeps the bits of A and B where nothing is pruned or cut;
    with weight 1 all of it: ``merge_adapters([(a, 1.0)])`` equals a. The result is float32 else.

    The inputs are not changed. Raises ValueError (options, shapes that differ, naming adapter and
    module), TypeError, FormatError and FileNotFoundError (folders).
    """
    return merge(
        adapters, method, rank, density=density, majority_sign_method=majority_sign_method,
        seed=seed,
    ).adapter  # fmt: skip
