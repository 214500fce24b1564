"""The background pass: ewc_merge of 1, 100 and 1,000 sessions against reading them once."""

from __future__ import annotations

from functools import partial

import numpy as np

import lora_engine as le
from bench import inputs
from bench.case import OURS, Case, Contender, Traffic
from lora_engine import reference_consolidation as reference
from lora_engine.learning.consolidation import Consolidated, consolidate

RANK, SHARED, SAMPLES = 2, 6, 10_000


def _pool(sessions: int, rng: np.random.Generator) -> le.AdapterPool:
    """The base and the sessions: adapters that have directions in common, and noise."""
    pool = le.AdapterPool(inputs.FEATURES, inputs.FEATURES)
    common_A = rng.standard_normal((SHARED, inputs.FEATURES), dtype=np.float32)
    common_B = rng.standard_normal((inputs.FEATURES, SHARED), dtype=np.float32)
    for _ in range(sessions + 1):
        A = rng.standard_normal((RANK, SHARED), dtype=np.float32) @ common_A
        B = common_B @ rng.standard_normal((SHARED, RANK), dtype=np.float32)
        A += 0.5 * rng.standard_normal(A.shape, dtype=np.float32)
        B += 0.5 * rng.standard_normal(B.shape, dtype=np.float32)
        pool.add(0.01 * A, 0.01 * B, 2.0)
    return pool


def build(sessions: int) -> list[Contender]:
    rng = np.random.default_rng(0)
    pool = _pool(sessions, rng)
    u, v = (rng.random((sessions + 1, inputs.FEATURES), dtype=np.float32) ** 2 for _ in range(2))
    slots = np.arange(1, sessions + 1, dtype=np.int32)
    quality, samples = np.ones(sessions), np.full(sessions, SAMPLES // sessions)

    def call() -> Consolidated:
        return consolidate(
            pool, 0, slots, quality=quality, samples=samples, base_samples=SAMPLES / 2, u=u, v=v
        )

    def verify() -> None:
        base, *parts = (reference.Delta(*pool.get(slot)) for slot in range(sessions + 1))
        got = call()
        objectives = [
            reference.ewc_objective(base, parts, [SAMPLES / 2, *samples], u, v, delta)
            for delta in (reference.Delta(got.A, got.B, got.scaling), base)
        ]
        assert objectives[0] < objectives[1], "consolidate: no better than the base as it was"

    return [Contender(OURS, call, verify)]


def _case(sessions: int) -> Case:
    # Each adapter's weights and its Fisher factors, which are as long as weights of rank 1.
    read = inputs.weight_bytes(sessions + 1, RANK) + inputs.weight_bytes(sessions + 1, 1)
    written = inputs.weight_bytes(1, RANK)
    return Case(
        "consolidate, ewc_merge",
        f"4096, r=2, {sessions:,} sessions",
        partial(build, sessions),
        traffic=Traffic(read, 2 * written, read + written, threads=1),
    )


CASES = tuple(_case(sessions) for sessions in (1, 100, 1000))
