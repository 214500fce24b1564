"""Search whose order of results learns from clicks: one adapter a user, on the query's embedding.

The adapter is on the query and not inside the encoder: then all users share one index of passages
that never has to be encoded anew, and a click is learned in tens of microseconds, with the
encoder's weights untouched and in any format.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

import lora_engine as le
from lora_engine import ops
from lora_engine.text_demo.encoder import F32

SHOWN = 100  # results that a user pages through, at most
TEMPERATURE = 0.05  # of the softmax over the results' scores
MAX_NORM = 1.0
SETTLED = 100  # clicks after which the learning rate is half of what it was at first
LR_RATIO = 4.0  # LoRA+: of B's learning rate over A's

Ints = NDArray[np.int64]


class Results(NamedTuple):
    """passages [k], the best first, and their scores."""

    passages: Ints
    scores: F32


def adapted(pool: le.AdapterPool, slot: int, queries: F32) -> F32:
    """The queries' embeddings [n, width] with a user's delta; slot -1: as they are."""
    y: F32 = pool.forward(queries, np.full(len(queries), slot, np.int32), out=queries.copy())
    return y


def search(index: F32, query: F32, shown: int = SHOWN) -> Results:
    """The passages [p, width] with the largest dot products with a query [width]."""
    scores = index @ query
    best = np.argsort(-scores, kind="stable")[:shown]
    return Results(best, scores[best])


def click_gradient(index: F32, results: Results, clicked: int) -> F32:
    """dL/dq [1, width] of L = -log softmax(scores / t)[clicked], over what was shown
    (InfoNCE: van den Oord et al. 2018, eq. 4), times t: the step does not depend on t.

    Raises ValueError where ``clicked`` was not shown.
    """
    if clicked not in results.passages:
        raise ValueError(f"click: expected a passage that was shown, got {clicked}")
    logits = results.scores / TEMPERATURE
    chance = np.exp(logits - logits.max())
    chance /= chance.sum()
    gradient: F32 = (chance @ index[results.passages] - index[clicked])[None]
    return gradient.astype(np.float32)


def learn(
    pool: le.AdapterPool, slot: int, query: F32, gradient: F32, lr: float, clicks: int
) -> ops.BatchedAdaptResult:
    """One click's step on a user's adapter, smaller the more clicks there were before.

    query, gradient [1, width]."""
    ids = np.array([slot], np.int32)
    lr /= 1 + clicks / SETTLED
    return pool.adapt(query, gradient, ids, lr, max_norm=MAX_NORM, lr_ratio=LR_RATIO)


def ranks(index: F32, queries: F32, wanted: NDArray[np.bool_]) -> Ints:
    """Of each query the rank, from 1, of the first passage that is wanted; those with the same
    score come before it. wanted [n, p]."""
    scores = queries @ index.T
    best = np.where(wanted, scores, -np.inf).max(axis=1, keepdims=True)
    return np.asarray((~wanted & ~(scores < best)).sum(axis=1) + 1)


class Quality(NamedTuple):
    """recall: share of the queries whose first result is wanted. mrr: mean of 1 / rank."""

    recall: float
    mrr: float

    @classmethod
    def of(cls, found: Ints) -> Quality:
        return cls(float(np.mean(found == 1)), float(np.mean(1.0 / found)))
