"""batched_adapt of 256 users, plain and with EWC in both forms, against the byte floor."""

from __future__ import annotations

from functools import partial

import numpy as np

import lora_engine as le
from bench import check, inputs, steps
from bench.case import OURS, Case, Contender, Traffic

USERS, RANK = 256, 2
LAMBDA = 1.0


def _stacked(pool: le.AdapterPool) -> tuple[inputs.F32, inputs.F32]:
    A, B, _ = zip(*(pool.get(slot) for slot in range(len(pool))), strict=True)
    return np.stack(A), np.stack(B)


def plain() -> list[Contender]:
    data = inputs.make(USERS, RANK)

    def make(lr: float) -> steps.Run:
        pool = inputs.make_pool(data)

        def call() -> None:
            assert not pool.adapt(data.x, data.grad, data.ids, lr=lr).note

        return steps.Run(call, lambda: _stacked(pool))

    expected = check.step(data, steps.CHECKED_LR)
    return [steps.contender(OURS, {"pool.adapt": make}, expected)]


def with_ewc(
    form: str, users: int = USERS, rank: int = RANK, features: int = inputs.FEATURES
) -> list[Contender]:
    """The records' anchors are other weights than those at the step."""
    data = inputs.make(users, rank, features=features)
    rng = np.random.default_rng(1)
    like = (data.A, data.B) if form == "factor" else (data.grad, data.x)
    first, second = (rng.random(w.shape, dtype=np.float32) for w in like)

    def anchored() -> tuple[le.AdapterPool, le.EWC]:
        pool = inputs.make_pool(data)
        ewc = le.EWC(pool, LAMBDA, form=form)
        for slot in range(users):
            ewc.set(slot, first[slot], second[slot])
        pool.adapt(data.x, data.grad, data.ids, lr=steps.CHECKED_LR)
        return pool, ewc

    def make(lr: float) -> steps.Run:
        pool, ewc = anchored()

        def call() -> None:
            assert not pool.adapt(data.x, data.grad, data.ids, lr=lr, ewc=ewc).note

        return steps.Run(call, lambda: _stacked(pool))

    A, B = _stacked(anchored()[0])
    penalty = check.Penalty(LAMBDA, form, first, second, data.A, data.B)
    expected = check.step(data._replace(A=A, B=B), steps.CHECKED_LR, penalty)
    return [steps.contender(OURS, {"pool.adapt(ewc=)": make}, expected)]


_WEIGHTS, _ROWS = inputs.weight_bytes(USERS, RANK), inputs.row_bytes(USERS)
_SHAPE = "4096, r=2, 256 users"
CASES = (
    Case(
        "batched_adapt",
        _SHAPE,
        plain,
        within=1.5,
        traffic=Traffic(2 * _ROWS, 2 * _WEIGHTS, _WEIGHTS + 2 * _ROWS, threads=0),
        flops=8 * RANK * inputs.FEATURES * USERS,
    ),
    Case(
        "batched_adapt with ewc (factor)",
        _SHAPE,
        partial(with_ewc, "factor"),
        within=1.3,
        # Fisher and anchors are as large as the weights.
        traffic=Traffic(
            2 * _ROWS + 2 * _WEIGHTS, 2 * _WEIGHTS, 3 * _WEIGHTS + 2 * _ROWS, threads=0
        ),
    ),
    Case(
        "batched_adapt with ewc (delta)",
        _SHAPE,
        partial(with_ewc, "delta"),
        within=1.3,
        # Anchors are as large as the weights, u and v as x and grad.
        traffic=Traffic(4 * _ROWS + _WEIGHTS, 2 * _WEIGHTS, 2 * _WEIGHTS + 4 * _ROWS, threads=0),
    ),
)
