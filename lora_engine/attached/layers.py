"""The layers of an attached model: each kind of base layer, and what is added to its output.

An attached module stays the object it was, with its parameters, buffers and name: only its class
is exchanged, for one of the same name that adds the rows' deltas to what its own forward returns.
A kind of base layer is a subclass of AttachedLayer in KINDS.
"""

from __future__ import annotations

import math
import sys
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

import lora_engine.torch_ops  # noqa: F401  defines the ops
from lora_engine.attached.placement import Placement
from lora_engine.attached.rows import Calls, NotCopied, Part, Rows
from lora_engine.attached.weights import PARAMETERS, Factors, Saved
from lora_engine.quant.bitsandbytes_layer import from_linear4bit
from lora_engine.quant.linear import NF4Linear

Tensor = torch.Tensor
_ops = torch.ops.lora_engine


class LayerState(NotCopied):
    """What an attached layer knows beyond its own: its path, whose calls it follows, its pools;
    packed: who stands in for it; sequence_first: it is told that x's dimension 0 is no batch."""

    def __init__(self, path: str, calls: Calls, packed: NF4Linear | None = None) -> None:
        self.path, self.calls, self.packed = path, calls, packed
        self.placements: dict[str, Placement] = {}  # by the dtype of the pool
        self.sequence_first = False


class Delta(NamedTuple):
    """A pool's handle, and slots and weights of x's rows, as batched_lora_delta takes them."""

    handle: Tensor
    ids: Tensor
    weights: Tensor | None


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

    @staticmethod
    def packed(module: Any, where: str) -> NF4Linear | None:
        """A layer that stands in for a base layer, of its own weights; ``where`` is for errors."""
        return None

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        y: Tensor = super().forward(*args, **kwargs)  # type: ignore[misc]
        rows = self._lora.calls.rows()
        if rows is None:
            return y
        x = args[0] if args else next(iter(kwargs.values()))
        return self.with_adapters(y, x, rows)

    def with_adapters(self, y: Tensor, x: Tensor, rows: Rows) -> Tensor:
        """y with what the rows' adapters add to it; y may be written to."""
        if y.ndim == 1:  # one row, without a batch
            return self.with_adapters(y[None], x[None], rows)[0]
        y = self.add(self._with_saved(y, x, rows), x, rows)
        for part in rows.bias_parts:
            biases = part.placed.weights.biases.get(self._lora.path)
            if biases is not None:
                bias = biases.delta(self.bias).to(y.dtype)
                y = add_part(y, bias.expand(1, *y.shape[1:]), part, rows, self._lora.path)
        return y

    def add(self, y: Tensor, x: Tensor, rows: Rows) -> Tensor:
        """y with the rows' deltas."""
        return y

    def _with_saved(self, y: Tensor, x: Tensor, rows: Rows) -> Tensor:
        """y, the base's output, of the whole weights that adapters have in place of the base's;
        in a mixture the weighted differences to the base's output are added."""
        base, path = y, self._lora.path
        for part in rows.saved_parts:
            saved = part.placed.weights.saved.get(path)
            if saved is None:
                continue
            elements = rows.elements(part, path, x.shape[0])
            if elements is None and len(rows.all_parts) == 1 and part.weights is None:
                return self.with_weights(x, saved)
            ours, theirs = (x, base) if elements is None else (x[elements], base[elements])
            change = self.with_weights(ours, saved).float() - theirs.float()
            y = add_part(y, change, part, rows, path)
        return y.to(base.dtype)

    def with_weights(self, x: Tensor, saved: Saved) -> Tensor:
        """The base layer's output with other weights."""
        raise NotImplementedError


class AttachedLinear(AttachedLayer):
    """nn.Linear and its subclasses."""

    BASE: type = torch.nn.Linear

    @staticmethod
    def sizes(module: Any) -> tuple[int, int]:
        return module.in_features, module.out_features

    @staticmethod
    def as_weight(delta: Tensor) -> Tensor:
        """A delta [out, in] as it is added to the layer's weight."""
        return delta

    def with_weights(self, x: Tensor, saved: Saved) -> Tensor:
        weight = saved.of("weight", self, x.dtype)
        assert weight is not None
        return F.linear(x, self.as_weight(weight), saved.of("bias", self, x.dtype))

    def deltas(self, x: Tensor, rows: Rows) -> list[Delta]:
        """What is added from each pool that the rows name a slot of."""
        state, found = self._lora, []
        batch = x.shape[0] if x.ndim > 1 else 1
        per = math.prod(x.shape[1:-1])
        for placement in state.placements.values():
            ids, weights = rows.spread(placement, state.path, batch, per)
            if ids is not None:
                found.append(Delta(placement.handle, ids, weights))
        return found

    def add(self, y: Tensor, x: Tensor, rows: Rows) -> Tensor:
        for delta in self.deltas(x, rows):
            y = add_delta(y, x, *delta)
        dtype = y.dtype
        for part in rows.torch_parts:
            factors = part.placed.weights.factors.get(self._lora.path)
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


class AttachedNF4(AttachedLinear):
    """NF4Linear: the first pool's deltas are added in the pass over the packed weight."""

    BASE = NF4Linear

    def forward(self, input: Tensor) -> Tensor:
        layer: Any = self._lora.packed or self
        rows = self._lora.calls.rows()
        if rows is None:
            y: Tensor = layer.with_deltas(input)
            return y
        fused = super().deltas(input, rows)[:1]
        y = layer.with_deltas(input, *(fused[0] if fused else ()))
        return self.with_adapters(y, input, rows)

    def deltas(self, x: Tensor, rows: Rows) -> list[Delta]:
        """Those that forward has not added yet."""
        return super().deltas(x, rows)[1:]


class AttachedLinear4bit(AttachedNF4):
    """bitsandbytes' Linear4bit, computed by an NF4Linear of the same bytes: bitsandbytes' own
    forward is never called while attached, so it cannot repack them."""

    @staticmethod
    def packed(module: Any, where: str) -> NF4Linear | None:
        return from_linear4bit(module, where)


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
        delta = self._rows_of(tokens, factors.A.t()) @ factors.B.t()
        return self._scaled(delta * factors.scaling)

    def with_weights(self, x: Tensor, saved: Saved) -> Tensor:
        base: Any = self
        weight = saved.of("weight", self, base.weight.dtype)
        assert weight is not None
        return self._scaled(self._rows_of(x, weight))

    def _rows_of(self, tokens: Tensor, table: Tensor) -> Tensor:
        base: Any = self
        return F.embedding(
            tokens, table, base.padding_idx, base.max_norm, base.norm_type,
            base.scale_grad_by_freq, base.sparse,
        )  # fmt: skip

    def _scaled(self, y: Tensor) -> Tensor:
        scale = getattr(self, "embed_scale", None)  # of layers that scale what they look up
        return y if scale is None else y * scale.to(y.dtype)


class AttachedNorm(AttachedLayer):
    """nn.LayerNorm, of which an adapter may hold the bias, or all."""

    BASE = torch.nn.LayerNorm

    def with_weights(self, x: Tensor, saved: Saved) -> Tensor:
        base: Any = self
        weight, bias = (saved.of(name, self, x.dtype) for name in PARAMETERS)
        return F.layer_norm(x, base.normalized_shape, weight, bias, base.eps)


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
    found: list[type[AttachedLayer]]
    found = [AttachedNF4, AttachedEmbedding, AttachedLinear, AttachedNorm]
    # Who has a layer of these has imported them.
    if (conv1d := sys.modules.get("transformers.pytorch_utils")) is not None:
        AttachedConv1D.BASE = conv1d.Conv1D
        found.insert(0, AttachedConv1D)
    if (bitsandbytes := sys.modules.get("bitsandbytes")) is not None:
        AttachedLinear4bit.BASE = bitsandbytes.nn.Linear4bit
        found.insert(0, AttachedLinear4bit)
    return tuple(found)
