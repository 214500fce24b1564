"""What a call's rows are in a compiled graph: tensors, and the op that spreads them over a layer's
rows.

Nothing of what is named is seen by a trace: names, mixtures, their sizes, one row for all and none
at all are one graph. So numbers and weights have two rows and two columns at least (a compiler
makes constants of the sizes 0 and 1), and what else must be known is the sizes of an empty tensor.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from lora_engine.torch_library import define

Tensor = torch.Tensor


class Traced(NamedTuple):
    """numbers int32 [n, k] of adapters, 0 for none; weights float32 like it; layout: empty,
    [2, 0, 1 + repeat] where one row stands for all, else [3 + count, 0, 1 + repeat]."""

    numbers: Tensor
    weights: Tensor
    layout: Tensor


def traced(
    numbers: Sequence[Sequence[int]],
    weights: Sequence[Sequence[float]],
    uniform: bool,
    repeat: int,
    device: torch.device,
) -> Traced:
    """Of rows of one width."""
    layout = _layout(2 if uniform else 3 + len(numbers), 1 + repeat, device)
    return Traced(
        _open(torch.tensor(_padded(numbers, 0), dtype=torch.int32, device=device), 0, 1),
        _open(torch.tensor(_padded(weights, 1.0), device=device), 0, 1),
        layout,
    )


def _padded(rows: Sequence[Sequence[Any]], none: Any) -> list[list[Any]]:
    """With a second column and a second row, like the first, where there is one only."""
    wide = [[*row, none] if len(row) < 2 else [*row] for row in rows]
    return wide + (wide or [[none, none]]) * max(2 - len(wide), 0)


def _open(tensor: Tensor, *dimensions: int) -> Tensor:
    torch._dynamo.maybe_mark_dynamic(tensor, list(dimensions))
    return tensor


@functools.lru_cache(256)
def _layout(kind: int, repeats: int, device: torch.device) -> Tensor:
    return _open(torch.empty((kind, 0, repeats), device=device), 0, 2)


def runs_of(count: int, repeat: int, batch: int, where: str) -> int:
    """How many of a layer's elements in a row belong to one of ``count`` rows; ValueError where
    they are neither as many nor ``repeat`` times as many."""
    if batch == count:
        return 1
    if batch == count * repeat:
        return repeat
    raise ValueError(
        f"adapter_names: expected one for each of the {batch} elements that come to {where}, got"
        f" {count}"
    )


def spread_out(
    table: Tensor, numbers: Tensor, weights: Tensor | None, elements: int, per: int
) -> tuple[Tensor, Tensor | None]:
    """New (ids, weights) [elements per, k], of numbers and weights [elements, k], or [1, k] for
    all."""
    count, width = numbers.shape
    shape = (elements, per, width)
    ids = table[numbers].view(count, 1, width).expand(shape).reshape(-1, width)
    if weights is not None:
        weights = weights.view(count, 1, width).expand(shape)
        weights = weights.clone(memory_format=torch.contiguous_format).view(-1, width)
    return ids, weights


def _spread(
    table: Tensor, numbers: Tensor, weights: Tensor, layout: Tensor, batch: int, per: int
) -> tuple[Tensor, Tensor]:
    count, repeat = layout.shape[0] - 3, layout.shape[2] - 1
    if count < 0:
        elements, rows = batch, 1
    else:
        per *= runs_of(count, repeat, batch, "a compiled layer")
        elements = rows = count
    ids, spread = spread_out(table, numbers[:rows], weights[:rows], elements, per)
    assert spread is not None
    return ids, spread


define(
    "spread_rows(Tensor table, Tensor numbers, Tensor weights, Tensor layout, SymInt batch,"
    " SymInt per) -> (Tensor, Tensor)",
    _spread,
    lambda table, numbers, weights, layout, batch, per: (
        table.new_empty((batch * per, numbers.shape[1])),
        weights.new_empty((batch * per, numbers.shape[1])),
    ),
)
