"""The ops whose cost grows, each built at a point: ours, held to the reference."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np

import lora_engine as le
from bench import cases_pool_adapt, check, inputs
from bench.case import OURS, Contender, Traffic
from bench.steps import CHECKED_LR, TIMED_LR
from lora_engine import reference

MODULE = "q_proj"
SCALING = 2.0


class Point(NamedTuple):
    """One batch. Each row names one of the adapters, in turn; threads 0: all."""

    rows: int = 32
    rank: int = 8
    adapters: int = 32
    hidden: int = 4096
    threads: int = 0


class Op(NamedTuple):
    """build: ours, to be held to the reference. traffic: what must move at a point. axes: the
    sizes that it has."""

    build: Callable[[Point], Contender]
    traffic: Callable[[Point], Traffic]
    axes: tuple[str, ...]


# ---- one adapter ------------------------------------------------------------------------------


class _One:
    """One adapter and the rows that it is given."""

    def __init__(self, point: Point) -> None:
        data = inputs.make(point.rows, point.rank, features=point.hidden)
        self.x, self.grad, self.y = data.x, data.grad, data.y
        self.A, self.B = data.A[0], data.B[0]
        self.lora = inputs.make_lora(data._replace(scaling=SCALING), MODULE)


def _lora_forward(point: Point) -> Contender:
    one = _One(point)

    def call() -> Any:
        return one.lora.forward(one.x, MODULE, out=one.y)

    def verify() -> None:
        one.y.fill(np.nan)
        values, sizes = (
            reference.lora_delta(*(sign(a) for a in (one.x, one.A, one.B)), SCALING)
            for sign in (np.asarray, np.abs)
        )
        check.require(f"lora.forward, {point}", call(), check.Expected(values, sizes))

    return Contender(OURS, call, verify)


def _lora_adapt(point: Point) -> Contender:
    """Held to the reference once, as that step is then where the timed ones go on."""
    one = _One(point)
    feedback = le.Feedback.from_gradient(one.grad)
    ids = np.zeros(point.rows, np.int32)

    def step(lr: float) -> None:
        assert one.lora.adapt(one.x, feedback, MODULE, lr=lr).applied

    def stepped(sign: Callable[[Any], Any], lr: float) -> reference.Adapter:
        adapters = {0: reference.Adapter([sign(one.A)], [sign(one.B)], SCALING)}
        after, _ = reference.batched_adapt(
            sign(one.x), sign(one.grad), adapters, [point.hidden], ids, reference.Step(lr=lr)
        )
        return after[0]

    def verify() -> None:
        step(CHECKED_LR)
        _require_step(
            f"lora.adapt, {point}",
            one.lora.weights(MODULE)[:2],
            stepped(np.asarray, CHECKED_LR),
            stepped(np.abs, -CHECKED_LR),
        )

    return Contender(OURS, lambda: step(TIMED_LR), verify)


def _lora_fisher(point: Point) -> Contender:
    one = _One(point)
    arrays = one.x, one.grad, one.A, one.B

    def call() -> Any:
        return le.lora_fisher(*arrays, SCALING)

    def verify() -> None:
        values = reference.lora_fisher(*arrays, SCALING)
        sizes = reference.lora_fisher(*map(np.abs, arrays), SCALING)
        for name, got, want, size in zip("AB", call(), values, sizes, strict=True):
            check.require(f"lora_fisher, {point}: F_{name}", got, check.Expected(want, size))

    return Contender(OURS, call, verify)


def _fisher_accumulate(point: Point) -> Contender:
    """F of hidden x hidden."""
    rng = np.random.default_rng(0)
    F = rng.random((point.hidden, point.hidden), dtype=np.float32)
    g = rng.standard_normal(F.shape, dtype=np.float32)
    to = F.copy()

    def call() -> Any:
        return le.fisher_accumulate(to, g, 0.95, 0.05)

    def verify() -> None:
        to[...] = F
        call()
        values = reference.fisher_accumulate(F, g, 0.95, 0.05)
        check.require(f"fisher_accumulate, {point}", to, check.Expected(values, values))

    return Contender(OURS, call, verify)


def _require_step(what: str, got: Any, values: reference.Adapter, sizes: reference.Adapter) -> None:
    """A magnitude is the step from absolute values, its sign turned."""
    for name, now, want, most in zip(
        "AB", got, (values.A, values.B), (sizes.A, sizes.B), strict=True
    ):
        check.require(f"{what}: {name}", now, check.Expected(want[0], most[0]))


# ---- many adapters ----------------------------------------------------------------------------


class _Batch:
    """Adapters in a pool, rows that name them in turn."""

    def __init__(self, point: Point) -> None:
        rng = np.random.default_rng(0)
        n, hidden, rank = point.rows, point.hidden, point.rank

        def normal(*shape: int) -> Any:
            return rng.standard_normal(shape, dtype=np.float32)

        A = normal(point.adapters, rank, hidden) * np.float32(0.01)
        B = normal(point.adapters, hidden, rank) * np.float32(0.02)
        self.hidden, self.pool = hidden, le.AdapterPool(hidden, hidden)
        slots = [self.pool.add(a, b, SCALING) for a, b in zip(A, B, strict=True)]
        self.ids = np.array([slots[i % len(slots)] for i in range(n)], np.int32)
        self.x, self.y = normal(n, hidden), normal(n, hidden)
        self.grad = normal(n, hidden) * np.float32(0.01)
        self.weights = dict(zip(slots, zip(A, B, strict=True), strict=True))

    def adapters(self, sign: Callable[[Any], Any]) -> dict[int, reference.Adapter]:
        return {
            s: reference.Adapter([sign(self.weights[s][0])], [sign(self.weights[s][1])], SCALING)
            for s in set(self.ids.tolist())
        }


def _forward(point: Point) -> Contender:
    batch = _Batch(point)
    x, y, ids, pool = batch.x, batch.y, batch.ids, batch.pool

    def call() -> Any:
        return pool.forward(x, ids, out=y, accumulate=False)

    def delta(sign: Any) -> Any:
        return reference.batched_lora_delta(sign(x), batch.adapters(sign), [batch.hidden], ids)

    def verify() -> None:
        y.fill(np.nan)
        expected = check.Expected(delta(np.asarray), delta(np.abs))
        check.require(f"pool.forward, {point}", call(), expected)

    return Contender(OURS, call, verify)


def _adapt(point: Point) -> Contender:
    """Held to the reference once, as that step is then where the timed ones go on."""
    batch = _Batch(point)

    def step(lr: float) -> None:
        assert not batch.pool.adapt(batch.x, batch.grad, batch.ids, lr=lr).note

    def stepped(sign: Any, lr: float) -> dict[int, reference.Adapter]:
        x, grad = sign(batch.x), sign(batch.grad)
        after, _ = reference.batched_adapt(
            x, grad, batch.adapters(sign), [batch.hidden], batch.ids, reference.Step(lr=lr)
        )
        return after

    def verify() -> None:
        step(CHECKED_LR)
        values, magnitudes = stepped(np.asarray, CHECKED_LR), stepped(np.abs, -CHECKED_LR)
        for slot, want in values.items():
            got = batch.pool.get(slot)[:2]
            _require_step(f"pool.adapt, {point}", got, want, magnitudes[slot])

    return Contender(OURS, lambda: step(TIMED_LR), verify)


def _adapt_with_ewc(form: str, point: Point) -> Contender:
    """Each row has an adapter of its own."""
    (ours,) = cases_pool_adapt.with_ewc(form, point.rows, point.rank, point.hidden)
    return ours


def _nf4_linear(point: Point) -> Contender:
    rng = np.random.default_rng(0)
    w = le.nf4_quantize(rng.standard_normal((point.hidden, point.hidden), dtype=np.float32))
    x = rng.standard_normal((point.rows, point.hidden), dtype=np.float32)
    y = np.full_like(x, np.nan)

    def call() -> Any:
        return le.nf4_linear(x, w, out=y)

    def verify() -> None:
        W = w.to_float()
        expected = check.Expected(reference.nf4_linear(x, W), np.abs(x) @ np.abs(W).T)
        check.require(f"nf4_linear, {point}", call(), expected)

    return Contender(OURS, call, verify)


# ---- what must move ----------------------------------------------------------------------------


def _sizes(point: Point, used: int) -> tuple[int, int]:
    """Bytes of so many adapters' weights, and of x, of grad or of y."""
    return (
        used * 2 * point.rank * point.hidden * inputs.ITEM,
        point.rows * point.hidden * inputs.ITEM,
    )


def _forward_traffic(point: Point, used: int = 1) -> Traffic:
    weights, row = _sizes(point, used)
    return Traffic(weights + row, row, weights + 2 * row, point.threads)


def _adapt_traffic(point: Point, used: int = 1) -> Traffic:
    weights, row = _sizes(point, used)
    return Traffic(2 * row, 2 * weights, weights + 2 * row, point.threads)


def _ewc_traffic(form: str, point: Point) -> Traffic:
    """In form factor Fisher and anchors are as large as the weights; in form delta the anchors
    are, u and v as x and grad."""
    weights, row = _sizes(point, point.rows)
    held = 2 * weights if form == "factor" else weights + 2 * row
    return Traffic(2 * row + held, 2 * weights, weights + 2 * row + held, point.threads)


def _of_pool(traffic: Callable[[Point, int], Traffic]) -> Callable[[Point], Traffic]:
    return lambda point: traffic(point, min(point.adapters, point.rows))


def _fisher_traffic(point: Point) -> Traffic:
    weights, row = _sizes(point, 1)
    return Traffic(2 * row + weights, weights, 2 * (row + weights), point.threads)


def _accumulate_traffic(point: Point) -> Traffic:
    size = point.hidden**2 * inputs.ITEM
    return Traffic(size, 2 * size, 2 * size, point.threads)


def _nf4_traffic(point: Point) -> Traffic:
    packed, (_, row) = point.hidden**2 * 9 // 16, _sizes(point, 0)
    return Traffic(packed + row, row, packed + 2 * row, point.threads)


_ROWS = ("rows", "hidden", "threads")
_ONE = ("rows", "rank", "hidden", "threads")
_POOL = ("rows", "rank", "adapters", "hidden", "threads")
OPS: dict[str, Op] = {
    "lora.forward": Op(_lora_forward, _forward_traffic, _ONE),
    "lora.adapt": Op(_lora_adapt, _adapt_traffic, _ONE),
    "pool.forward": Op(_forward, _of_pool(_forward_traffic), _POOL),
    "pool.adapt": Op(_adapt, _of_pool(_adapt_traffic), _POOL),
    "pool.adapt, ewc factor": Op(
        partial(_adapt_with_ewc, "factor"), partial(_ewc_traffic, "factor"), _ONE
    ),
    "pool.adapt, ewc delta": Op(
        partial(_adapt_with_ewc, "delta"), partial(_ewc_traffic, "delta"), _ONE
    ),
    "nf4_linear": Op(_nf4_linear, _nf4_traffic, _ROWS),
    "lora_fisher": Op(_lora_fisher, _fisher_traffic, _ONE),
    "fisher_accumulate": Op(_fisher_accumulate, _accumulate_traffic, ("hidden", "threads")),
}
