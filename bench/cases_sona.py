"""Sona: a request's feedback, and the background pass end to end."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

import lora_engine as le
from bench import check, inputs, steps
from bench.case import OURS, Case, Contender, Traffic

RANK, SAMPLES, SHARED, KINDS = 2, 10_000, 6, 256
MODULE = "q_proj"


def make(lr: float = 0.01, **changes: Any) -> le.Sona:
    """One module of 4096 features, whose samples are all merged."""
    n = inputs.FEATURES
    micro = le.MicroLoRAConfig(n, n, rank=RANK, alpha=4.0, target_modules=(MODULE,))
    return le.Sona(
        le.SonaConfig(micro_lora=micro, instant_lr=lr, max_pending_samples=10**12, **changes)
    )


def feedback(seed: int = 0) -> tuple[inputs.F32, list[le.Feedback]]:
    """x [256, in], and gradients toward a map that all sessions have in common."""
    rng, n = np.random.default_rng(seed), inputs.FEATURES
    P, Q = (rng.standard_normal((SHARED, n), dtype=np.float32) for _ in range(2))
    x = rng.standard_normal((KINDS, SHARED), dtype=np.float32) @ Q
    x += 0.5 * rng.standard_normal(x.shape, dtype=np.float32)
    noise = rng.standard_normal(x.shape, dtype=np.float32)
    grad = -1e-4 * (x @ Q.T) @ P + 0.01 * noise
    return x, [le.Feedback.from_gradient(g) for g in grad.astype(np.float32)]


def teach(sona: le.Sona, sessions: int, seed: int = 0) -> None:
    """10,000 samples, of the sessions in turn."""
    x, given = feedback(seed)
    for i in range(SAMPLES):
        k = (7 * i + i // KINDS) % KINDS
        sona.instant_adapt(x[k], given[k], session=i % sessions)


# ---- at once ----------------------------------------------------------------------------


def instant(ewc: bool) -> list[Contender]:
    data = inputs.make(1, RANK)
    x, grad = data.x[0], 0.1 * data.grad[0]
    given = le.Feedback.from_gradient(grad)
    rng = np.random.default_rng(1)
    u, v = (rng.random(inputs.FEATURES, dtype=np.float32) for _ in range(2))

    def served(lr: float) -> le.Sona:
        sona = make(lr) if ewc else make(lr, ewc_lambda=0.0)
        m = sona._modules[MODULE]
        if ewc:
            with m.lock:
                m.take_fisher(u, v, SAMPLES, m.served.consolidated)
        assert sona.instant_adapt(x, given, session=0).applied
        return sona

    timed = served(steps.TIMED_LR)

    def verify() -> None:
        sona = served(0.01)
        m = sona._modules[MODULE]
        slot = m.served.fast[0].slot
        A, B, scaling = m.pool.get(slot)
        assert sona.instant_adapt(x, given, session=0).applied
        penalty = None
        if m.ewc:
            anchor = np.zeros_like(B)
            rows = (u[None], v[None], m.A[None], anchor[None])
            penalty = check.Penalty(m.ewc.ewc_lambda, "delta", *rows)
        before = data._replace(A=A[None], B=B[None], grad=grad[None], scaling=scaling)
        for name, got, want in zip(
            "AB", m.pool.get(slot)[:2], check.step(before, 0.01, penalty), strict=True
        ):
            check.require(f"instant_adapt: {name}", got, want)

    def call() -> None:
        timed.instant_adapt(x, given, session=0)

    return [Contender(OURS, call, verify)]


# ---- in the background ---------------------------------------------------------------------


def background(sessions: int) -> list[Contender]:
    """The pass and its rollback, after which the same samples wait again."""
    sona = make()
    teach(sona, sessions)

    def call() -> le.learning.background.BackgroundResult:
        result = sona.background()
        sona.rollback()
        return result

    def verify() -> None:
        result = sona.background()
        assert (result.applied, result.samples_used) == (True, SAMPLES), f"background: {result}"
        A, B, _ = sona.consolidated().weights(MODULE)
        x = feedback()[0][:4]
        m = sona._modules[MODULE]
        parts = [one.astype(np.float64) for one in (x, A.T, B.T)]
        want, magnitude = (
            m.scaling * (rows @ a @ b) for rows, a, b in (parts, [abs(p) for p in parts])
        )
        assert want.any(), "background: nothing was merged"
        got = sona.forward(x, session="nobody")
        check.require("background: served", got, check.Expected(want, magnitude))
        sona.rollback()

    return [Contender(OURS, call, verify)]


_WEIGHTS, _ROW = inputs.weight_bytes(1, RANK), inputs.row_bytes(1)


def _instant(ewc: bool) -> Case:
    held = 2 * _ROW + _WEIGHTS if ewc else 0  # u and v, and anchors as large as the weights
    sums = 2 * _ROW
    return Case(
        "sona.instant_adapt" + (" with ewc" if ewc else ""),
        "4096, r=2, one row",
        partial(instant, ewc),
        traffic=Traffic(
            2 * _ROW + held, 2 * (_WEIGHTS + sums), _WEIGHTS + sums + 2 * _ROW + held, threads=1
        ),
    )


def _background(sessions: int) -> Case:
    # Each adapter's weights and its Fisher sums, which are as long as weights of rank 1.
    read = inputs.weight_bytes(sessions + 1, RANK) + inputs.weight_bytes(sessions + 1, 1)
    return Case(
        "sona.background",
        f"4096, r=2, {SAMPLES:,} samples of {sessions:,} sessions",
        partial(background, sessions),
        traffic=Traffic(read, 2 * _WEIGHTS, read + _WEIGHTS, threads=1),
    )


CASES = (_instant(False), _instant(True), _background(100), _background(1000))
