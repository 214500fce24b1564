"""The layers of an attached model: each kind of base layer, and what is added to its output.

An attached module stays the object it was, with its parameters, buffers and name: only its class
is exchanged, for one of the same name that adds the rows' deltas to what its own forward returns.
A kind of base layer is a subclass of AttachedLayer in KINDS.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
import torch.nn.functional as F

import lora_engine.torch_ops  # noqa: F401  defines the ops
from lora_engine.attached.placement import Placement
from lora_engine.attached.rows import Calls, Part, Rows
from lora_engine.attached.weights import Factors

Tensor = torch.Tensor
_ops = torch.ops.lora_engine


class LayerState:
    """What an attached layer knows beyond its own: its path, whose calls it follows, its class
    before, its pools."""

    def __init__(self, path: str, calls: Calls, base_class: type) -> None:
        self.path, self.calls, self.base_class = path, calls, base_class
        self.placements: dict[str, Placement] = {}  # by the dtype of the pool


class AttachedLayer:
    """In front of a base layer's class. ``BASE``: the class that it is for."""

    BASE: type
    _lora: LayerState
    training: bool
    bias: Any

    def __init_subclass__(cls, **_: Any) -> None:
        """Not the base class's, which is for classes that people write."""

    @staticmethod
    def sizes(module: Any) -> tuple[int, int]:
        """(in, out) of a base layer."""
        raise NotImplementedError

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        y: Tensor = super().forward(*args, **kwargs)  # type: ignore[misc]
        rows = self._lora.calls.rows()
        if rows is None:
            return y
        x = args[0] if args else next(iter(kwargs.values()))
        alone = y.ndim == 1  # one row, without a batch
        if alone:
            y, x = y[None], x[None]
        y = self.add(y, x, rows)
        for part in rows.bias_parts:
            biases = part.placed.weights.biases.get(self._lora.path)
            if biases is not None:
                bias = biases.delta(self.bias).to(y.dtype)
                y = add_part(y, bias.expand(1, *y.shape[1:]), part, rows, self._lora.path)
        return y[0] if alone else y

    def add(self, y: Tensor, x: Tensor, rows: Rows) -> Tensor:
        """y with the deltas of the rows' adapters; y may be written to."""
        return y


class AttachedLinear(AttachedLayer):
    """nn.Linear and its subclasses."""

    BASE = torch.nn.Linear

    @staticmethod
    def sizes(module: Any) -> tuple[int, int]:
        return module.in_features, module.out_features

    @staticmethod
    def as_weight(delta: Tensor) -> Tensor:
        """A delta [out, in] as it is added to the layer's weight."""
        return delta

    def add(self, y: Tensor, x: Tensor, rows: Rows) -> Tensor:
        state = self._lora
        for placement in state.placements.values():
            batch = x.shape[0]
            per = x.numel() // max(x.shape[-1] * batch, 1)
            ids, weights = rows.spread(placement, state.path, batch, per)
            if ids is not None:
                y = add_delta(y, x, placement.handle, ids, weights)
        dtype = y.dtype
        for part in rows.torch_parts:
            factors = part.placed.weights.factors.get(state.path)
            if factors is not None:
                y = self._add_by_torch(y, x, part, factors, rows)
        return y.to(dtype)

    def _add_by_torch(
        self, y: Tensor, x: Tensor, part: Part, factors: Factors, rows: Rows
    ) -> Tensor:
        """As PEFT has it, in torch's own ops: what autograd records for A and B, and dropout."""
        elements = rows.elements(part, self._lora.path, x.shape[0])
        x = (x if elements is None else x[elements]).to(factors.A.dtype)
        x = F.dropout(x, part.placed.dropout, self.training)
        delta = F.linear(F.linear(x, factors.A), factors.B) * factors.scaling
        return add_part(y, delta, part, rows, self._lora.path)


def add_delta(y: Tensor, x: Tensor, handle: Tensor, ids: Tensor, weights: Tensor | None) -> Tensor:
    """y + the deltas of x's rows, in y's memory where autograd does not record.

    Rows of no adapter keep their bits. x is taken in y's dtype, as the base layer took it under
    autocast.
    """
    flat = x.reshape(-1, x.shape[-1])
    if flat.dtype != y.dtype:
        flat = flat.to(y.dtype)
    out = y.reshape(-1, y.shape[-1])
    if torch.is_grad_enabled() and (y.requires_grad or x.requires_grad):
        delta = _ops.batched_lora_delta(flat, handle, ids, weights)
        named = (ids if ids.ndim == 2 else ids[:, None]).amax(1, keepdim=True) >= 0
        out = torch.where(named, out + delta, out)  # -0 + 0 has other bits
    else:
        _ops.batched_lora_delta_(out, flat, handle, ids, weights)
    return out.view(y.shape)


class AttachedConv1D(AttachedLinear):
    """transformers' Conv1D, of GPT-2: its weight is [in, out]."""

    @staticmethod
    def sizes(module: Any) -> tuple[int, int]:
        return module.nx, module.nf

    @staticmethod
    def as_weight(delta: Tensor) -> Tensor:
        return delta.t()


class AttachedEmbedding(AttachedLayer):
    """nn.Embedding: the delta of a token is scaling B A[:, token]."""

    BASE = torch.nn.Embedding

    @staticmethod
    def sizes(module: Any) -> tuple[int, int]:
        return module.num_embeddings, module.embedding_dim

    def add(self, y: Tensor, x: Tensor, rows: Rows) -> Tensor:
        path = self._lora.path
        for part in rows.all_parts:
            factors = part.placed.weights.factors.get(path)
            if factors is not None:
                y = add_part(y, self._delta(x, part, factors, rows), part, rows, path)
        return y

    def _delta(self, tokens: Tensor, part: Part, factors: Factors, rows: Rows) -> Tensor:
        elements = rows.elements(part, self._lora.path, tokens.shape[0])
        tokens = tokens if elements is None else tokens[elements]
        base: Any = self
        h = F.embedding(
            tokens, factors.A.t(), base.padding_idx, base.max_norm, base.norm_type,
            base.scale_grad_by_freq, base.sparse,
        )  # fmt: skip
        delta = (h @ factors.B.t()) * factors.scaling
        scale = getattr(base, "embed_scale", None)  # of layers that scale what they look up
        return delta if scale is None else delta * scale.to(delta.dtype)


class AttachedNorm(AttachedLayer):
    """nn.LayerNorm, of which an adapter may hold the bias."""

    BASE = torch.nn.LayerNorm


def add_part(y: Tensor, delta: Tensor, part: Part, rows: Rows, path: str) -> Tensor:
    """y + the weighted delta of one adapter's elements; the others keep their bits."""
    batch = y.shape[0]
    weights = rows.weights_of(part, path, batch, delta.ndim)
    if weights is not None:
        delta = delta * weights.to(delta.dtype)
    elements = rows.elements(part, path, batch)
    if elements is None:
        return y + delta
    delta = delta.expand(len(elements), *y.shape[1:])
    y = y.to(torch.promote_types(y.dtype, delta.dtype))
    return y.index_add(0, elements, delta.to(y.dtype))


def kinds() -> tuple[type[AttachedLayer], ...]:
    """The kinds of base layer, the most special first."""
    conv1d = sys.modules.get("transformers.pytorch_utils")  # who has such a layer imported it
    if conv1d is None:
        return (AttachedEmbedding, AttachedLinear, AttachedNorm)
    AttachedConv1D.BASE = conv1d.Conv1D
    return (AttachedConv1D, AttachedEmbedding, AttachedLinear, AttachedNorm)
