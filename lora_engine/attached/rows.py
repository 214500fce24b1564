"""What the rows of a forward pass name: numbers of adapters, and how a layer spreads them."""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

if TYPE_CHECKING:
    from lora_engine.attached.placement import Placed, Placement

Tensor = torch.Tensor
BASE = "__base__"  # PEFT's name for no adapter
Name = str | Mapping[str, float] | None


class Part(NamedTuple):
    """One adapter in a batch: which rows name it (None: all), and with what weights."""

    placed: Placed
    rows: Tensor | None  # int64
    weights: Tensor | None  # float32 [len(rows)], or [1] for all; None: ones


def mixture_of(op: str, name: Any, known: Mapping[str, Placed]) -> list[tuple[Placed, float]]:
    """The adapters that a name, a mixture or None stands for; none for the base."""
    if name is None or name == BASE:
        return []
    if isinstance(name, str):
        name = {name: 1.0}
    if not isinstance(name, Mapping):
        raise TypeError(f"{op}: expected a name or {{name: weight}}, got {name!r}")
    if not name:
        raise ValueError(f"{op}: expected at least one adapter in a mixture, got {{}}")
    found = []
    for one, weight in name.items():
        if one == BASE:
            continue  # the base is always there, once
        if one not in known:
            names = ", ".join(known) or "none"
            raise ValueError(f"{op}: expected attached adapters ({names}) or {BASE}, got {one!r}")
        if isinstance(weight, bool) or not isinstance(weight, (int, float)):
            raise TypeError(f"{op}: {one}: expected a number as its weight, got {weight!r}")
        if not math.isfinite(weight):
            raise ValueError(f"{op}: {one}: expected a finite weight, got {weight}")
        found.append((known[one], float(weight)))
    return found


class Rows:
    """The adapters of a batch's elements, resolved once, before anything runs.

    It holds what it names: an adapter that is replaced or removed meanwhile keeps its slots
    until the last forward, or backward, pass that began with it is done.

    numbers int32 [count, k], 0 for none; weights float32 like numbers, None for ones. uniform:
    one row stands for a batch of any size.
    """

    def __init__(
        self,
        mixtures: Sequence[Sequence[tuple[Placed, float]]],
        uniform: bool,
        device: torch.device,
        by_torch: frozenset[Placed],
        repeat: int = 1,
    ) -> None:
        self.uniform = uniform
        self.repeat = repeat  # how often generate() may have repeated each element, in runs
        width = max([1, *(len(mixture) for mixture in mixtures)])
        numbers = [[0] * width for _ in mixtures]
        weights = [[1.0] * width for _ in mixtures]
        named: dict[Placed, tuple[list[int], list[float]]] = {}
        for i, mixture in enumerate(mixtures):
            for j, (placed, weight) in enumerate(mixture):
                at, with_ = named.setdefault(placed, ([], []))
                at.append(i)
                with_.append(weight)
                if placed not in by_torch:
                    numbers[i][j], weights[i][j] = placed.number, weight
        plain = all(w == 1.0 for row in weights for w in row)
        self.numbers = torch.tensor(numbers, dtype=torch.int32, device=device)
        self.weights = None if plain else torch.tensor(weights, device=device)
        self.in_pools = frozenset(p.number for p in named if p not in by_torch)
        parts = []
        for placed, (at, with_) in named.items():
            ones = all(w == 1.0 for w in with_)
            parts.append(
                Part(
                    placed,
                    None if uniform else torch.tensor(at, device=device),
                    None if ones else torch.tensor(with_, device=device),
                )
            )
        self.all_parts = tuple(parts)
        self.torch_parts = tuple(part for part in parts if part.placed in by_torch)
        self.bias_parts = tuple(part for part in parts if part.placed.weights.biases)
        self.saved_parts = tuple(part for part in parts if part.placed.weights.saved)
        self._spread: dict[Placement, tuple[int, int, Tensor | None, Tensor | None]] = {}

    def runs(self, path: str, batch: int) -> int:
        """How many elements of x in a row belong to one row here."""
        count = self.numbers.shape[0]
        if self.uniform or batch == count:
            return 1
        if batch == count * self.repeat:
            return self.repeat
        raise ValueError(
            f"adapter_names: expected one for each of the {batch} elements that come to"
            f" {path or 'the model'}, got {count}"
        )

    def spread(
        self, placement: Placement, path: str, batch: int, per: int
    ) -> tuple[Tensor | None, Tensor | None]:
        """(ids, weights) of a layer's rows: ``batch`` elements of ``per`` rows each.

        ids is None where no row names an adapter of this layer.
        """
        if torch.compiler.is_compiling():
            return self._spread_out(placement, path, batch, per)
        kept = self._spread.get(placement)
        if kept is not None and kept[0] == batch and kept[1] == per:
            return kept[2], kept[3]
        if self.in_pools.isdisjoint(placement.slots):
            found: tuple[Tensor | None, Tensor | None] = (None, None)
        else:
            found = self._spread_out(placement, path, batch, per)
        self._spread[placement] = (batch, per, *found)
        return found

    def _spread_out(
        self, placement: Placement, path: str, batch: int, per: int
    ) -> tuple[Tensor, Tensor | None]:
        count, width = self.numbers.shape
        n = batch if self.uniform else count
        per = per * self.runs(path, batch)
        ids = (
            placement.table[self.numbers.to(placement.table.device)]
            .view(count, 1, width)
            .expand(n, per, width)
        )
        weights = self.weights
        if weights is not None:
            weights = weights.view(count, 1, width).expand(ids.shape).reshape(-1, width)
        ids = ids.reshape(-1, width)
        return (ids.view(-1), None) if width == 1 and weights is None else (ids, weights)

    def elements(self, part: Part, path: str, batch: int) -> Tensor | None:
        """The batch's elements that name a part; None for all."""
        if part.rows is None:
            return None
        runs = self.runs(path, batch)
        if runs == 1:
            return part.rows
        steps = torch.arange(runs, device=part.rows.device)
        return (part.rows[:, None] * runs + steps).view(-1)

    def weights_of(self, part: Part, path: str, batch: int, ndim: int) -> Tensor | None:
        """The part's weights, to multiply what its elements give, of ``ndim`` dimensions."""
        if part.weights is None:
            return None
        weights = part.weights
        if part.rows is not None:
            weights = weights.repeat_interleave(self.runs(path, batch))
        return weights.view(-1, *(1,) * (ndim - 1))


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1


class NotCopied:
    """What an attached model holds of one handle, whose slots a copy would share."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError(
            "attach: copy, pickle: expected a model without adapters, got an attached one: detach"
            " it first, or save its state_dict and h.save(name, folder)"
        )


class Calls(NotCopied):
    """What the layers of one attached model look up: this thread's call, else the default."""

    def __init__(self) -> None:
        self.local = threading.local()  # .rows: while a call of this thread runs
        self.recorded = False  # whether a call with names was under autograd
        self.default: Rows | None = None  # for layers that are called by themselves

    def rows(self) -> Rows | None:
        """Of a layer's call, None for the base alone."""
        rows: Any = getattr(self.local, "rows", False)
        if rows is not False:
            found: Rows | None = rows
            return found
        if self.recorded and not torch.compiler.is_compiling() and _in_backward():
            raise RuntimeError(
                "adapter_names: backward: expected layers that transformers checkpoints, got"
                " one that is computed again by a checkpoint of another kind, which does not keep"
                " the names of the call: use set_adapter"
            )
        return self.default

    @contextlib.contextmanager
    def within(self, rows: Rows | None) -> Iterator[None]:
        """Around a call: its rows for this thread, and then those before."""
        before = getattr(self.local, "rows", False)
        self.local.rows = rows
        try:
            yield
        finally:
            if before is False:
                del self.local.rows
            else:
                self.local.rows = before
