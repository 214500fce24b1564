"""Learning on a device: the steps of a pool in a device's memory, and EWC for them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from lora_engine.backends.reference import Step
from lora_engine.backends.triton_arrays import (
    check_dtype,
    check_finite,
    check_output,
    check_overlap,
    check_shape,
    matrix,
    refuse,
    tensor,
)
from lora_engine.kernels import batched_adapt as kernels
from lora_engine.kernels import ewc_step as _ewc_step
from lora_engine.kernels import steps
from lora_engine.kernels.ewc_delta import WIDEST, work_elements
from lora_engine.kernels.rounding import host_key
from lora_engine.kernels.steps import Records

if TYPE_CHECKING:
    from lora_engine.backends.triton_pool import Pool


def _single(value: float) -> np.float32:
    with np.errstate(over="ignore"):
        return np.float32(value)


def _checked(op: str, pool: Pool, step: Step) -> steps.Step:
    """The step in the numbers that kernels take, computed in float32."""
    lr, ratio, decay = _single(step.lr), _single(step.lr_ratio), _single(step.weight_decay)
    with np.errstate(over="ignore", invalid="ignore"):
        lr_B = lr * ratio
        strongest = lr * max(np.float32(1), ratio) * decay
    for name, value in (
        ("lr", lr), ("lr_ratio", ratio), ("max_norm", _single(step.max_norm)),
        ("weight_decay", decay), ("lr * lr_ratio", lr_B), ("lr * weight_decay", strongest),
    ):  # fmt: skip
        check_finite(op, name, float(value))
        if value < 0:
            raise refuse(ValueError, op, name, "a number from 0", value)
    ewc: Any = step.ewc
    if ewc is not None and ewc.pool is not pool:
        raise refuse(ValueError, op, "ewc", "one made for this pool", "one of another")
    one = np.float32(1)
    return steps.Step(
        lr_A=float(lr), lr_B=float(lr_B), decay_A=float(one - lr * decay),
        decay_B=float(one - lr_B * decay), max_norm=float(step.max_norm), train_A=step.train_A,
        seed=pool.seed, records=None if ewc is None else ewc.records(),
    )  # fmt: skip


def _samples(op: str, pool: Pool, x: Any, grad: Any) -> tuple[torch.Tensor, torch.Tensor]:
    rows = matrix(op, "x", x, None, pool.in_features)
    if rows.device != pool.device:
        where = f"a tensor on {pool.device}, where the pool is"
        raise refuse(ValueError, op, "x", where, rows.device)
    up = matrix(op, "grad", grad, rows.shape[0], sum(pool.outs), rows)
    check_dtype(op, "grad", up.dtype, rows.dtype, ", the dtype of x")
    return rows, up


def adapt(pool: Pool, x: Any, grad: Any, ids: Any, weights: Any, step: Step) -> Any:
    """uint8 [n], what became of each row: on a GPU a tensor, which nobody has waited for."""
    op = "batched_adapt"
    with pool.lock:
        pool.raise_bad_id()
        rows, up = _samples(op, pool, x, grad)
        how = _checked(op, pool, step)
        batch = pool.batch(op, ids, weights, rows, False)
        outcomes = kernels.batched_adapt(pool.adapters, rows, up, batch.ids, batch.weights, how)
    return outcomes if outcomes.is_cuda else outcomes.numpy()


def _read(made: steps.Outcome) -> tuple[int, float]:
    """Of the first run: waits for the device."""
    outcome, norm = torch.stack([made.outcomes[0].double(), made.norms[0]]).tolist()
    return int(outcome), norm


def adapt_slot(pool: Pool, x: Any, grad: Any, slot: int, step: Step) -> tuple[int, float]:
    """(outcome, norm of the mean gradient)."""
    op = "batched_adapt"
    with pool.lock:
        pool.check_uncaptured(op)
        rows, up = _samples(op, pool, x, grad)
        how = _checked(op, pool, step)
        ranks = pool.slot(op, slot).ranks
        if not rows.shape[0] or not any(ranks):
            return 0, 0.0
        return _read(kernels.adapt_slot(pool.adapters, rows, up, slot, how))


# ---- accumulated gradients: one flat buffer in the order of storage ----


def gradient_size(pool: Pool, slot: int) -> int:
    ranks = pool.slot("AdapterPool.gradient_size", slot).ranks
    return sum(r * (pool.in_features + out) for r, out in zip(ranks, pool.outs, strict=True))


def _buffer(op: str, pool: Pool, slot: int, gradient: Any) -> torch.Tensor:
    """The buffer as a tensor; an array stays where it is."""
    given = (
        torch.from_numpy(gradient)
        if isinstance(gradient, np.ndarray)
        else tensor(op, "gradient", gradient)
    )
    check_dtype(op, "gradient", given.dtype, torch.float32)
    check_shape(op, "gradient", given.unsqueeze(0), 1, gradient_size(pool, slot))
    if given.numel() > 1 and given.stride(0) != 1:
        raise refuse(ValueError, op, "gradient", "a contiguous array", f"stride {given.stride(0)}")
    return given


def gradient(pool: Pool, x: Any, grad: Any, slot: int, h: Any, gradient: Any) -> tuple[int, float]:
    """(outcome, norm of the sum over rows), which is added to ``gradient`` where it is finite.

    h, A x where the caller kept it, saves nothing here: it is computed beside Bᵀ grad.
    """
    op = "AdapterPool.gradient"
    with pool.lock:
        pool.check_uncaptured(op)
        rows, up = _samples(op, pool, x, grad)
        to = _buffer(op, pool, slot, gradient)
        check_output(op, "gradient", gradient, to)
        check_overlap(op, "gradient", to, "x", rows)
        check_overlap(op, "gradient", to, "grad", up)
        if not rows.shape[0]:
            return 0, 0.0
        made = torch.empty(to.numel(), dtype=torch.float32, device=pool.device)
        norm = float(kernels.gradient_of(pool.adapters, rows, up, slot, made))
        if not norm <= np.finfo(np.float32).max:
            return 2, norm
        to += made.to(to.device)
        return 1, norm


def apply(pool: Pool, gradient: Any, slot: int, scale: float, step: Step) -> tuple[int, float]:
    """A step with ``scale`` times an accumulated gradient; (outcome, its norm)."""
    op = "AdapterPool.apply"
    with pool.lock:
        pool.check_uncaptured(op)
        how = _checked(op, pool, step)
        check_finite(op, "scale", scale)
        given = _buffer(op, pool, slot, gradient)
        if not given.numel():
            return 0, 0.0
        return _read(kernels.apply(pool.adapters, given.to(pool.device), slot, scale, how))


# ---- EWC ----


def ewc_step(
    theta: Any, grad: Any, fisher: Any, anchor: Any, lr: float, ewc_lambda: float,
    seed: int, version: int,
) -> None:  # fmt: skip
    op = "ewc_step"
    to = matrix(op, "theta", theta)
    others = {"grad": grad, "fisher": fisher, "anchor": anchor}
    given = {name: matrix(op, name, a, to.shape[0], to.shape[1], to) for name, a in others.items()}
    for name in ("fisher", "anchor"):
        check_dtype(op, name, given[name].dtype, torch.float32)
    check_output(op, "theta", theta, to)
    for name, other in given.items():
        check_overlap(op, "theta", to, name, other)
    step, lam = _from_zero(op, "lr", lr), _from_zero(op, "ewc_lambda", ewc_lambda)
    pull = float(np.float32(2) * lam * step)
    key = host_key(seed, 0, version)
    g, f, at = given.values()
    _ewc_step.ewc_step(to, g, f, at, float(step), pull, key)


def _from_zero(op: str, name: str, value: float) -> np.float32:
    check_finite(op, name, float(_single(value)))
    if value < 0:
        raise refuse(ValueError, op, name, "0 or more", value)
    return _single(value)


class _Record(NamedTuple):
    """Of one slot, made at an epoch of it: parts of memory, one after another, which kernels
    find by the address of the first."""

    memory: torch.Tensor
    epoch: int


class Ewc:
    """As ``_C.Ewc``: records on the device of the pool, and a table of their addresses."""

    def __init__(self, pool: Pool, form: str, ewc_lambda: float) -> None:
        if form not in ("factor", "delta"):
            raise refuse(ValueError, "EWC", "form", "factor or delta", form)
        self.pool, self.form = pool, form
        self.ewc_lambda = float(_from_zero("EWC", "ewc_lambda", ewc_lambda))
        self._records: dict[int, _Record] = {}
        # A place for each slot from the start: a captured graph sees records that come later.
        slots = pool.adapters.ranks.shape[0]
        self._table = torch.zeros((slots, 2), dtype=torch.int64, device=pool.device)

    def records(self) -> Records:
        """What kernels read; no more than the pool's slots."""
        return Records(self._table, 2.0 * self.ewc_lambda, self.form == "delta")

    def set(self, slot: int, first: list[Any], second: list[Any]) -> None:
        """(F_A, F_B) of each slice, with the slot's weights as the anchor."""
        self._record("EWC.set", slot, first, second, None)

    def restore(
        self, slot: int, first: list[Any], second: list[Any], A: list[Any], B: list[Any]
    ) -> None:
        """What ``get`` gave."""
        self._record("EWC.restore", slot, first, second, (A, B))

    def _record(self, op: str, slot: int, first: list[Any], second: list[Any], anchor: Any) -> None:
        with self.pool.lock:
            held = self.pool.slot(op, slot)
            fisher = self._delta_parts if self.form == "delta" else self._factor_parts
            before, after = fisher(op, held.ranks, first, second)
            weights = self._weights(slot) if anchor is None else self._anchor(op, slot, *anchor)
            memory = torch.cat([*before, weights, *after])
            if len(self._table) <= slot:
                larger = self._table.new_zeros((self.pool.adapters.ranks.shape[0], 2))
                larger[: len(self._table)] = self._table
                self._table = larger
            self._records[slot] = _Record(memory, held.epoch)
            self._table[slot] = torch.tensor([memory.data_ptr(), held.epoch])

    def _factor_parts(
        self, op: str, ranks: tuple[int, ...], F_A: list[Any], F_B: list[Any]
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """What a record holds before the anchor and after it."""
        parts, device = [], self.pool.device
        for s, (rank, out) in enumerate(zip(ranks, self.pool.outs, strict=True)):
            if rank:
                a = _fisher(op, "fisher_A", F_A[s], (rank, self.pool.in_features), device)
                b = _fisher(op, "fisher_B", F_B[s], (out, rank), device)
                parts += [a.reshape(-1), b.T.reshape(-1)]
        return parts, []

    def _delta_parts(
        self, op: str, ranks: tuple[int, ...], u: list[Any], v: list[Any]
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """As ``_factor_parts``; before the anchor, room for the solver."""
        if max(ranks) > WIDEST:
            raise refuse(ValueError, op, "slot", f"a rank of at most {WIDEST}", max(ranks))
        us, vs, device = [], [], self.pool.device
        for s, (rank, out) in enumerate(zip(ranks, self.pool.outs, strict=True)):
            width = self.pool.in_features
            us.append(
                _fisher(op, "u", u[s], (out,), device) if rank else torch.zeros(out).to(device)
            )
            vs.append(
                _fisher(op, "v", v[s], (width,), device) if rank else torch.zeros(width).to(device)
            )
        work = torch.zeros(2 * work_elements(ranks), device=device)
        return [work], [*us, *vs]

    def get(self, slot: int) -> tuple[list[Any], list[Any], list[Any], list[Any]]:
        """(first, second, anchor A, anchor B) by slice, float32; None for a missing one."""
        with self.pool.lock:
            held = self.pool.slot("EWC.get", slot)
            record = self._records.get(slot)
            if record is None or record.epoch != held.epoch:
                want = "one with a record"
                raise refuse(ValueError, "EWC.get", "slot", want, f"slot {slot}, which has none")
            ranks, width, outs = held.ranks, self.pool.in_features, self.pool.outs
            size = sum(r * (width + out) for r, out in zip(ranks, outs, strict=True))
            values = record.memory.cpu().numpy()
        if self.form == "factor":
            return (*self._unflat(values[:size], ranks), *self._unflat(values[size:], ranks))
        begin = 2 * work_elements(ranks)
        sizes = np.cumsum([size, *outs, *[width] * (len(outs) - 1)])
        anchor, *parts = np.split(values[begin:], sizes)
        kept = [p.copy() if rank else None for p, rank in zip(parts, 2 * ranks, strict=True)]
        return kept[: len(outs)], kept[len(outs) :], *self._unflat(anchor, ranks)

    def _unflat(self, flat: np.ndarray, ranks: tuple[int, ...]) -> tuple[list[Any], list[Any]]:
        """Of values in the order of ``_weights``: those shaped as A and as B, by slice."""
        first: list[Any] = []
        second: list[Any] = []
        at, width = 0, self.pool.in_features
        for rank, out in zip(ranks, self.pool.outs, strict=True):
            middle, end = at + rank * width, at + rank * (width + out)
            first.append(flat[at:middle].reshape(rank, width).copy() if rank else None)
            second.append(flat[middle:end].reshape(rank, out).T.copy() if rank else None)
            at = end
        return first, second

    def _anchor(self, op: str, slot: int, A: list[Any], B: list[Any]) -> torch.Tensor:
        """Given anchors, checked, in the order of ``_weights``."""
        now = self.pool.get(slot)
        for given, factors in ((A, now[0]), (B, now[1])):
            for g, f in zip(given, factors, strict=True):
                if f is not None and f.size and np.shape(g) != f.shape:
                    raise refuse(
                        ValueError, op, "anchor", f"shape {list(f.shape)}", list(np.shape(g))
                    )
        return self._flat(A, B)

    def _weights(self, slot: int) -> torch.Tensor:
        """A slot's weights as float32, in the order of storage without gaps."""
        A, B, _ = self.pool.get(slot)
        return self._flat(A, B)

    def _flat(self, A: list[Any], B: list[Any]) -> torch.Tensor:
        flat = [m.reshape(-1) for a, b in zip(A, B, strict=True) if a is not None for m in (a, b.T)]
        made = torch.from_numpy(np.concatenate(flat)) if flat else torch.empty(0)
        return made.to(self.pool.device)

    def remove(self, slot: int) -> None:
        with self.pool.lock:
            self.pool.slot("EWC.remove", slot)
            if self._records.pop(slot, None):
                self._table[slot] = 0

    def _live(self) -> list[tuple[int, torch.Tensor]]:
        """Slots and records of adapters that are still there."""
        held = self.pool.epochs()
        return [(s, r.memory) for s, r in sorted(self._records.items()) if held.get(s) == r.epoch]

    def penalty(self) -> float:
        with self.pool.lock:
            total = 0.0
            for slot, memory in self._live():
                if self.form == "delta":
                    total += self._delta_penalty(slot, memory)
                else:
                    fisher, anchor = memory.double().view(2, -1)
                    total += float((fisher * (self._weights(slot) - anchor) ** 2).sum())
        return self.ewc_lambda * total

    def _delta_penalty(self, slot: int, memory: torch.Tensor) -> float:
        """As ``reference_ewc.delta_penalty``, over the slices of a slot."""
        ranks, width, outs = self.pool.ranks(slot), self.pool.in_features, self.pool.outs
        now = self._weights(slot).double()
        begin = 2 * work_elements(tuple(ranks))
        sizes = [len(now), *outs, *[width] * len(outs)]
        anchor, *weights = torch.split(memory[begin:].double(), sizes)
        total, at = 0.0, 0
        for rank, out, u, v in zip(
            ranks, outs, weights[: len(outs)], weights[len(outs) :], strict=True
        ):
            middle, end = at + rank * width, at + rank * (width + out)
            a, a_star = (t[at:middle].view(rank, width) for t in (now, anchor))
            b, b_star = (t[middle:end].view(rank, out) for t in (now, anchor))
            left, right = torch.cat([b - b_star, b_star]), torch.cat([a, a - a_star])
            total += float((((left * u) @ left.T) * ((right * v) @ right.T)).sum())
            at = end
        return total * float(self.pool.adapters.scalings[slot]) ** 2


def _fisher(
    op: str, name: str, array: Any, shape: tuple[int, ...], device: torch.device
) -> torch.Tensor:
    """Checked Fisher information, from wherever it is."""
    given = torch.from_numpy(array) if isinstance(array, np.ndarray) else array
    if not isinstance(given, torch.Tensor):
        raise refuse(TypeError, op, name, "a float32 array", type(array).__name__)
    check_dtype(op, name, given.dtype, torch.float32)
    if given.shape != shape:
        raise refuse(ValueError, op, name, f"shape {list(shape)}", list(given.shape))
    given = given.detach().to(device)
    bad = given[~((given >= 0) & (given <= 3.4e38))]
    if bad.numel():
        want = "finite values of 0 or more"
        raise refuse(ValueError, op, name, want, f"{float(bad[0]):g}")
    return given
