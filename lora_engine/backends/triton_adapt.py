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
        """(F_A, F_B) or (u, v) of each slice, with the slot's weights as the anchor."""
        self._record("EWC.set", slot, first, second)

    def restore(
        self, slot: int, first: list[Any], second: list[Any], A: list[Any], B: list[Any]
    ) -> None:
        """The same with anchors of the caller's."""
        self._record("EWC.restore", slot, first, second, (A, B))

    def get(self, slot: int) -> tuple[list[Any], ...]:
        """(first, second, anchor_A, anchor_B) as NumPy arrays, None for a missing slice."""
        op = "EWC.get"
        with self.pool.lock:
            held = self.pool.slot(op, slot)
            record = self._records.get(slot)
            if record is None or record.epoch != held.epoch:
                what = f"slot {slot}, which has none"
                raise refuse(ValueError, op, "slot", "one with a record", what)
            begin = 2 * work_elements(held.ranks) if self.form == "delta" else 0
            flat = record.memory[begin:].cpu().numpy()
        width, outs = self.pool.in_features, self.pool.outs
        elements = sum(r * (width + out) for r, out in zip(held.ranks, outs, strict=True))
        if self.form == "factor":
            return *self._factors(held.ranks, flat), *self._factors(held.ranks, flat[elements:])
        u = np.split(flat[elements:], np.cumsum([*outs, *[width] * len(outs)])[:-1])
        pairs = [
            [w.copy() if rank else None for w, rank in zip(part, held.ranks, strict=True)]
            for part in (u[: len(outs)], u[len(outs) :])
        ]
        return *pairs, *self._factors(held.ranks, flat)

    def _factors(self, ranks: tuple[int, ...], flat: Any) -> tuple[list[Any], list[Any]]:
        """A and B of each slice, from the order of storage."""
        A: list[Any] = []
        B: list[Any] = []
        at, width = 0, self.pool.in_features
        for rank, out in zip(ranks, self.pool.outs, strict=True):
            middle, end = at + rank * width, at + rank * (width + out)
            A.append(flat[at:middle].reshape(rank, width).copy() if rank else None)
            B.append(flat[middle:end].reshape(rank, out).T.copy() if rank else None)
            at = end
        return A, B

    def _record(
        self, op: str, slot: int, first: list[Any], second: list[Any], anchor: Any = None
    ) -> None:
        with self.pool.lock:
            held = self.pool.slot(op, slot)
            stars = self._weights(slot)
            if anchor is not None:
                A, B = anchor
                stars = self._flat(op, "anchor_A", "anchor_B", held.ranks, A, B, None)
            if self.form == "delta":
                memory = self._delta_record(op, held.ranks, first, second, stars)
            else:
                fisher = self._flat(op, "fisher_A", "fisher_B", held.ranks, first, second)
                memory = torch.cat([fisher, stars])
            if len(self._table) <= slot:
                larger = self._table.new_zeros((self.pool.adapters.ranks.shape[0], 2))
                larger[: len(self._table)] = self._table
                self._table = larger
            self._records[slot] = _Record(memory, held.epoch)
            self._table[slot] = torch.tensor([memory.data_ptr(), held.epoch])

    def _flat(
        self, op: str, name_A: str, name_B: str, ranks: tuple[int, ...], A: list[Any],
        B: list[Any], least: float | None = 0.0,
    ) -> torch.Tensor:  # fmt: skip
        """Checked arrays shaped like the factors, in the order of storage without gaps."""
        parts, device = [torch.empty(0, device=self.pool.device)], self.pool.device
        for s, (rank, out) in enumerate(zip(ranks, self.pool.outs, strict=True)):
            if rank:
                a = _float32(op, name_A, A[s], (rank, self.pool.in_features), device, least)
                b = _float32(op, name_B, B[s], (out, rank), device, least)
                parts += [a.reshape(-1), b.T.reshape(-1)]
        return torch.cat(parts)

    def _delta_record(
        self, op: str, ranks: tuple[int, ...], u: list[Any], v: list[Any], stars: torch.Tensor
    ) -> torch.Tensor:
        if max(ranks) > WIDEST:
            raise refuse(ValueError, op, "slot", f"a rank of at most {WIDEST}", max(ranks))
        us, vs, device = [], [], self.pool.device
        for s, (rank, out) in enumerate(zip(ranks, self.pool.outs, strict=True)):
            width = self.pool.in_features
            us.append(
                _float32(op, "u", u[s], (out,), device) if rank else torch.zeros(out).to(device)
            )
            vs.append(
                _float32(op, "v", v[s], (width,), device) if rank else torch.zeros(width).to(device)
            )
        work = torch.zeros(2 * work_elements(ranks), device=device)
        return torch.cat([work, stars, *us, *vs])

    def _weights(self, slot: int) -> torch.Tensor:
        """A slot's weights as float32, in the order of storage without gaps."""
        A, B, _ = self.pool.get(slot)
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


def _float32(
    op: str, name: str, array: Any, shape: tuple[int, ...], device: torch.device,
    least: float | None = 0.0,
) -> torch.Tensor:  # fmt: skip
    """Checked Fisher information or (least None) weights, from wherever they are."""
    given = torch.from_numpy(array) if isinstance(array, np.ndarray) else array
    if not isinstance(given, torch.Tensor):
        raise refuse(TypeError, op, name, "a float32 array", type(array).__name__)
    check_dtype(op, name, given.dtype, torch.float32)
    if given.shape != shape:
        raise refuse(ValueError, op, name, f"shape {list(shape)}", list(given.shape))
    given = given.detach().to(device)
    bad = given[~((given >= (-3.4e38 if least is None else least)) & (given <= 3.4e38))]
    if bad.numel():
        want = "finite values" if least is None else "finite values of 0 or more"
        raise refuse(ValueError, op, name, want, f"{float(bad[0]):g}")
    return given
