"""Users of different tastes who search, click, and are measured on sections held out."""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

import lora_engine as le
from lora_engine.text_demo import corpus, search
from lora_engine.text_demo.encoder import F32, Encoder
from lora_engine.text_demo.search import Ints, Quality

MODULE = "embedding"  # the adapted layer's name in PEFT folders
RANK, ALPHA = 4, 8.0
LEARNING_RATES = (0.03, 0.1, 0.3)
PASSES = 2  # over the queries that a user learns from
CHECKPOINTS = 8


class World(NamedTuple):
    """The text, and what an encoder makes of it. embeddings [passages, width], embedded
    [queries, width]; wanted[taste] [queries, passages]."""

    passages: list[corpus.Passage]
    queries: list[corpus.Query]
    embeddings: F32
    embedded: F32
    wanted: dict[str, NDArray[np.bool_]]

    def having(self, taste: str, part: str) -> Ints:
        """The queries of a part to which a user of that taste finds something."""
        of_part = np.array([q.part == part for q in self.queries])
        return np.flatnonzero(of_part & self.wanted[taste].any(axis=1))

    def ranks(self, taste: str, part: str, pool: le.AdapterPool, slot: int) -> Ints:
        at = self.having(taste, part)
        moved = search.adapted(pool, slot, self.embedded[at])
        return search.ranks(self.embeddings, moved, self.wanted[taste][at])


def text(most: int | None = None) -> tuple[list[corpus.Passage], list[corpus.Query]]:
    """The passages, the first ``most`` of them, and the queries."""
    passages = corpus.passages(most)
    return passages, corpus.queries(passages)


def world(
    passages: list[corpus.Passage], queries: list[corpus.Query], index: F32, embedded: F32
) -> World:
    """The text with its embeddings, and what each taste wants."""
    wanted = {taste.name: corpus.wanted(passages, queries, taste) for taste in corpus.TASTES}
    return World(passages, queries, index, embedded, wanted)


def encoded(encoder: Encoder, most: int | None, done: Callable[[int], object]) -> World:
    """The world as an encoder sees it; ``done`` is told how many more texts are encoded."""
    passages, queries = text(most)
    index = encoder.encode([p.words for p in passages], done)
    return world(passages, queries, index, encoder.encode([q.text for q in queries], done))


class Learned(NamedTuple):
    """One user. clicks and curve [checkpoints + 1]: quality on the sections held out after so
    many clicks, the frozen model's first. ranks: of the held-out queries, in the end. adapt,
    searching: seconds of each call."""

    taste: str
    clicks: list[int]
    curve: list[Quality]
    ranks: Ints
    adapt: list[float]
    searching: list[float]


def learn(
    world: World, taste: str, pool: le.AdapterPool, slot: int, lr: float, part: str = "held out"
) -> Learned:
    """Shows a user results for one query after another, and learns from each click. What is
    wanted and ranks first of what is shown is clicked; without any such there is no click."""
    rng = np.random.default_rng(0)
    at = world.having(taste, "learn")
    order = np.concatenate([rng.permutation(at) for _ in range(PASSES)])
    ends = {round(len(order) * (i + 1) / CHECKPOINTS) for i in range(CHECKPOINTS)}
    found = world.ranks(taste, part, pool, -1)
    clicks, curve = [0], [Quality.of(found)]
    adapt: list[float] = []
    searching: list[float] = []
    for turn, q in enumerate(order, 1):
        query = world.embedded[q : q + 1]
        start = perf_counter()
        shown = search.search(world.embeddings, search.adapted(pool, slot, query)[0])
        searching.append(perf_counter() - start)
        good = world.wanted[taste][q][shown.passages]
        if good.any():
            clicked = int(shown.passages[good.argmax()])
            gradient = search.click_gradient(world.embeddings, shown, clicked)
            start = perf_counter()
            result = search.learn(pool, slot, query, gradient, lr, len(adapt))
            adapt.append(perf_counter() - start)
            if not result.applied.all():
                raise RuntimeError(f"demo: lr {lr}: {result.note}")
        if turn in ends:
            found = world.ranks(taste, part, pool, slot)
            clicks.append(len(adapt))
            curve.append(Quality.of(found))
    return Learned(taste, clicks, curve, found, adapt, searching)


def choose_learning_rate(world: World, done: Callable[[int], object]) -> dict[float, float]:
    """Mean MRR over the tastes with each learning rate, on sections kept for this."""
    means = {}
    for lr in LEARNING_RATES:
        of_tastes = []
        for taste in world.wanted:
            if len(world.having(taste, "tune")):
                with_lr = new_pool(world.embeddings.shape[1])
                of_tastes.append(learn(world, taste, with_lr, 0, lr, "tune").curve[-1].mrr)
            done(1)
        means[lr] = float(np.mean(of_tastes))
    return means


def new_pool(width: int) -> le.AdapterPool:
    """One fresh adapter."""
    from lora_engine.adapters import initial

    pool = le.AdapterPool(width, width)
    A, B = initial.weights(np.random.default_rng(0), RANK, width, width)
    pool.add(A, B, ALPHA / RANK)
    return pool
