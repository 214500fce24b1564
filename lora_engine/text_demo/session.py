"""The searches and clicks of a page's users, safe to use from several threads."""

from __future__ import annotations

import threading
from collections import OrderedDict
from time import perf_counter
from typing import Any

import numpy as np

import lora_engine as le
from lora_engine.text_demo import corpus, search
from lora_engine.text_demo.encoder import F32, Encoder
from lora_engine.text_demo.search import Quality
from lora_engine.text_demo.users import World

LEARNING_RATE = 0.1  # what ``demo --text`` chooses
RESULTS = 10  # of a page
MOST_CHARACTERS = 500  # of a query
_KEPT = 256  # queries' embeddings
_CURVE = 500  # points a user, the latest


class Session:
    """Users, by their taste, whose adapters are in a store and learn from clicks."""

    def __init__(self, world: World, encoder: Encoder, store: le.AdapterStore) -> None:
        self.world = world
        self.store = store
        self._encoder = encoder
        self._lock = threading.Lock()
        self._embedded: OrderedDict[str, F32] = OrderedDict()
        self._clicks = dict.fromkeys(world.wanted, 0)
        self._turns = dict.fromkeys(world.wanted, 0)
        self._curves: dict[str, list[Quality]] = {
            taste: [self._quality(taste)] for taste in world.wanted
        }

    def _slot(self, user: str) -> int:
        if user not in self.world.wanted:
            raise ValueError(f"user: expected one of {', '.join(self.world.wanted)}, got another")
        return self.store.slot(user)

    def _quality(self, user: str) -> Quality:
        return Quality.of(self.world.ranks(user, "held out", self.store.pool, self._slot(user)))

    def _embed(self, query: str) -> F32:
        if not query.strip() or len(query) > MOST_CHARACTERS:
            raise ValueError(f"query: expected 1 to {MOST_CHARACTERS} characters, got {len(query)}")
        if query not in self._embedded:
            self._embedded[query] = self._encoder.encode([query])
            if len(self._embedded) > _KEPT:
                self._embedded.popitem(last=False)
        return self._embedded[query]

    # ---- what the page asks for; each returns what JSON can say ----

    def state(self, user: str) -> dict[str, Any]:
        """Who there is, and how well a user is served."""
        with self._lock:
            self._slot(user)
            wants = {taste.name: taste.wants for taste in corpus.TASTES}
            return {"users": wants, **self._learned(user)}

    def _learned(self, user: str) -> dict[str, Any]:
        curve = self._curves[user]
        return {"mrr": [q.mrr for q in curve], "recall": [q.recall for q in curve]}

    def search(self, user: str, query: str) -> dict[str, Any]:
        """The best passages; was: the rank that the frozen model gives each."""
        with self._lock:
            embedded = self._embed(query)
            moved = search.adapted(self.store.pool, self._slot(user), embedded)
            found = search.search(self.world.embeddings, moved[0], RESULTS)
            frozen = self.world.embeddings @ embedded[0]
        results = [
            {
                "passage": int(at),
                "topic": self.world.passages[at].topic,
                "text": self.world.passages[at].text,
                "was": int((frozen > frozen[at]).sum()) + 1,
            }
            for at in found.passages
        ]
        return {"results": results}

    def click(self, user: str, query: str, passage: int) -> dict[str, Any]:
        """Learns from a click on what ``search`` showed; us: how long that took."""
        with self._lock:
            return self._click(user, self._embed(query), passage, RESULTS)

    def _click(self, user: str, embedded: F32, passage: int, shown: int) -> dict[str, Any]:
        slot, pool = self._slot(user), self.store.pool
        results = search.search(
            self.world.embeddings, search.adapted(pool, slot, embedded)[0], shown
        )
        gradient = search.click_gradient(self.world.embeddings, results, passage)
        start = perf_counter()
        learned = search.learn(pool, slot, embedded, gradient, LEARNING_RATE, self._clicks[user])
        microseconds = (perf_counter() - start) * 1e6
        self._clicks[user] += 1
        curve = self._curves[user]
        curve.append(self._quality(user))
        del curve[1:-_CURVE]  # the first is the frozen model's, where the adapter was fresh
        return {"us": microseconds, "note": learned.note, **self._learned(user)}

    def simulate(self, user: str) -> dict[str, Any]:
        """The user's taste searches and clicks once, by a query that is not held out."""
        with self._lock:
            self._slot(user)
            at = self.world.having(user, "learn")
            for _ in at:
                q = at[self._turns[user] * 7 % len(at)]  # neighbours are of one section
                self._turns[user] += 1
                embedded = self.world.embedded[q : q + 1]
                moved = search.adapted(self.store.pool, self._slot(user), embedded)
                shown = search.search(self.world.embeddings, moved[0]).passages
                good = self.world.wanted[user][q][shown]
                if good.any():
                    clicked = int(shown[np.argmax(good)])
                    said = self._click(user, embedded, clicked, search.SHOWN)
                    return {"query": self.world.queries[q].text, **said}
            return {"query": "", "us": 0.0, "note": "nothing to click", **self._learned(user)}
