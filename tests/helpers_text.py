"""What the tests of the text demo share: real text, drawn embeddings, an encoder that draws."""

from __future__ import annotations

import numpy as np

from lora_engine.text_demo import corpus, users

WIDTH = 48


class Sentences:
    """In place of the encoder: a passage's row says what it is about (its section) and which
    tastes like it, a query's what it is about; any other text's is drawn from its length."""

    width = WIDTH

    def __init__(self, nf4: bool = False):
        self.asked = 0
        passages, queries = users.text()
        rng = np.random.default_rng(0)
        about = rng.standard_normal((passages[-1].section + 1, WIDTH))
        liked = rng.standard_normal((len(corpus.TASTES), WIDTH))
        common = rng.standard_normal(WIDTH)  # as real sentences' have: A can find it
        self._rows = {q.text: about[passages[q.passage].section] + common for q in queries}
        for p in passages:
            likes = [bool(t.likes and t.likes.search(p.text)) for t in corpus.TASTES]
            self._rows[p.words] = about[p.section] + likes @ liked
        self._noise = 0.9 if nf4 else 0.7

    def encode(self, texts, done=lambda _: None):
        self.asked += 1
        rng = np.random.default_rng(len(texts))
        rows = np.array(
            [
                self._rows[t]
                if t in self._rows
                else np.random.default_rng(len(t)).standard_normal(WIDTH)
                for t in texts
            ]
        )
        rows += self._noise * rng.standard_normal(rows.shape)
        done(len(texts))
        return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def world():
    return users.encoded(Sentences(), None, lambda _: None)
