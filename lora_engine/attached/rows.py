"""What the rows of a forward pass name: numbers of adapters, and how a layer spreads them."""

from __future__ import annotations

import contextlib
import functools
import math
import numbers
import threading
import weakref
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import is_dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.utils._pytree import tree_leaves

from lora_engine.attached.spread import runs_of, spread_out, traced

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
        if one == BASE or one is None:
            continue  # the base is always there, once; None fills up what a Router names
        if one not in known:
            names = ", ".join(known) or "none"
            raise ValueError(f"{op}: expected attached adapters ({names}) or {BASE}, got {one!r}")
        if isinstance(weight, bool) or not isinstance(weight, numbers.Real):
            raise TypeError(f"{op}: {one}: expected a number as its weight, got {weight!r}")
        if not math.isfinite(weight):
            raise ValueError(f"{op}: {one}: expected a finite weight, got {weight}")
        found.append((known[one], float(weight)))
    return found


class Rows:
    """The adapters of a batch's elements, resolved once, before anything runs.

    It holds what it names: an adapter that is replaced or removed meanwhile keeps its slots
    until the last forward, or backward, pass that began with it is done. any: not the base alone.

    numbers int32 [count, k], 0 for none; weights float32 like numbers, None for ones; traced: the
    same for a compiled graph. uniform: one row stands for a batch of any size.
    """

    def __init__(
        self,
        mixtures: Sequence[Sequence[tuple[Placed, float]]],
        uniform: bool,
        device: torch.device,
        by_torch: frozenset[Placed],
        repeat: int = 1,
    ) -> None:
        self.any = any(mixtures)
        self.uniform = uniform
        self.repeat = repeat  # how often generate() may have repeated each element, in runs
        width = max([1, *(len(mixture) for mixture in mixtures)])
        slots = [[0] * width for _ in mixtures]
        weights = [[1.0] * width for _ in mixtures]
        named: dict[Placed, tuple[list[int], list[float]]] = {}
        for i, mixture in enumerate(mixtures):
            for j, (placed, weight) in enumerate(mixture):
                at, with_ = named.setdefault(placed, ([], []))
                at.append(i)
                with_.append(weight)
                if placed not in by_torch:
                    slots[i][j], weights[i][j] = placed.number, weight
        plain = all(w == 1.0 for row in weights for w in row)
        self.traced = traced(slots, weights, uniform, repeat, device)
        numbers, factors = (t[: len(slots), :width].contiguous() for t in self.traced[:2])
        self.numbers = numbers
        self.weights = None if plain else factors
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
        if self.uniform:
            return 1
        return runs_of(self.numbers.shape[0], self.repeat, batch, path or "the model")

    def spread(
        self, placement: Placement, path: str, batch: int, per: int
    ) -> tuple[Tensor | None, Tensor | None]:
        """(ids, weights) of a layer's rows: ``batch`` elements of ``per`` rows each.

        ids is None where no row names an adapter of this layer.
        """
        if torch.compiler.is_compiling():
            rows = (tensor.to(placement.table.device) for tensor in self.traced)
            ids, weights = torch.ops.lora_engine.spread_rows(placement.table, *rows, batch, per)
            return ids, weights
        kept = self._spread.get(placement)
        if kept is not None and kept[0] == batch and kept[1] == per:
            return kept[2], kept[3]
        if self.in_pools.isdisjoint(placement.slots):
            found: tuple[Tensor | None, Tensor | None] = (None, None)
        else:
            with torch.inference_mode(False):  # it is kept for calls outside that mode too
                found = self._spread_over(placement.table, path, batch, per)
        self._spread[placement] = (batch, per, *found)
        return found

    def _spread_over(
        self, table: Tensor, path: str, batch: int, per: int
    ) -> tuple[Tensor, Tensor | None]:
        numbers = self.numbers.to(table.device)
        weights = None if self.weights is None else self.weights.to(table.device)
        elements = batch if self.uniform else len(numbers)
        per *= self.runs(path, batch)
        ids, weights = spread_out(table, numbers, weights, elements, per)
        return (ids.view(-1), None) if ids.shape[1] == 1 and weights is None else (ids, weights)

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


class NotCopied:
    """What an attached model holds of one handle, whose slots a copy would share."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError(
            "attach: copy, pickle: expected a model without adapters, got an attached one: detach"
            " it first, or save its state_dict and h.save(name, folder)"
        )


class Calls(NotCopied):
    """What the layers of one attached model look up: this thread's call, else the default."""

    default: Rows  # for layers that are called by themselves

    def __init__(self) -> None:
        self.local = threading.local()  # .rows: while a call of this thread runs
        self._passes: deque[tuple[int, weakref.ref[Rows]]] = deque(maxlen=256)

    def rows(self) -> Rows | None:
        """Of a layer's call, None for the base alone."""
        rows = self.now()
        return rows if torch.compiler.is_compiling() or rows.any else None

    def now(self) -> Rows:
        """The same, for the base too."""
        rows: Any = getattr(self.local, "rows", False)
        if rows is False and not torch.compiler.is_compiling():
            rows = self._of_backward()
        found: Rows = self.default if rows is False else rows
        return found

    def follow(self, output: Any) -> None:
        """What a backward pass through a call's output computes again, as a checkpoint does,
        follows the rows of the call."""
        if torch._C._functorch.peek_interpreter_stack() is not None:
            return  # where nothing is checkpointed
        hook = functools.partial(self._begin, self.local.rows)
        for leaf in tree_leaves(output):
            for value in vars(leaf).values() if is_dataclass(leaf) else (leaf,):
                if isinstance(value, Tensor) and value.grad_fn is not None:
                    value.register_hook(hook)  # type: ignore[no-untyped-call]

    def _begin(self, rows: Rows, grad: Tensor) -> None:
        entry = torch._C._current_graph_task_id(), weakref.ref(rows)
        if entry not in self._passes:
            self._passes.append(entry)

    def _of_backward(self) -> Any:
        """The rows of the call whose backward pass runs here, False for none."""
        task = torch._C._current_graph_task_id()
        if task == -1:
            return False
        found = {rows() for of, rows in tuple(self._passes) if of == task} - {None}
        if len(found) > 1:
            raise RuntimeError(
                "adapter_names: backward: expected layers that transformers checkpoints, got one"
                " that is computed again by a checkpoint of another kind in a pass through calls"
                " of other names: call backward for each"
            )
        return found.pop() if found else False

    @contextlib.contextmanager
    def within(self, rows: Rows) -> Iterator[None]:
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
