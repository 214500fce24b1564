"""Python's own documentation (pydoc_data.topics) as passages, queries, and what users click.

Nothing here depends on a model: which passage a user wants is a rule over the text.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

SHORTEST, LONGEST = 60, 900  # characters of a passage, without runs of spaces
SECTION = 20  # passages at most
PARTS = ("learn", "held out", "learn", "tune", "learn", "held out")  # of sections, in turn

_UNDERLINE = re.compile(r'^(=|-|\*|~|"|\^|#)\1{2,}$')
_SENTENCE = re.compile(r"(?<=[.!?:])\s+(?=[A-Z\"*“])")


class Passage(NamedTuple):
    """text: as it is printed in the documentation, less ``query``, the first sentence."""

    topic: str
    section: int
    text: str
    query: str

    @property
    def words(self) -> str:
        """For the encoder: without line ends and runs of spaces."""
        return " ".join(self.text.split())


class Query(NamedTuple):
    """A sentence that somebody searches with; passage: the one it was taken from."""

    text: str
    passage: int
    part: str


class Taste(NamedTuple):
    """A kind of reader: who, and which passages they like; None: whatever a sentence was from."""

    name: str
    wants: str
    likes: re.Pattern[str] | None


def _taste(name: str, wants: str, pattern: str) -> Taste:
    return Taste(name, wants, re.compile(pattern))


TASTES = (
    _taste("grammar", "rules of the grammar", r"::="),
    _taste("history", "what changed in which version", r"(?:New|Changed|Deprecated) (?:in|since)"),
    _taste("links", "where to read on", r"\b[Ss]ee (?:also|section|the|[*A-Z])|\bPEP \d"),
    _taste("errors", "which exceptions are raised", r'"\w+Error"|(?:Error|xception)"? is raised'),
    Taste("plain", "the passage a sentence is from", None),
)  # the last has nothing to learn: is it harmed?


def _paragraphs(text: str) -> list[str]:
    """Paragraphs, each with the indented block that it announces by a colon; no headings."""
    found: list[str] = []
    for raw in re.split(r"\n[ \t]*\n", text):
        lines = [line.rstrip() for line in raw.splitlines() if line.strip()]
        if len(lines) == 2 and _UNDERLINE.match(lines[1]):
            continue
        if not lines:
            continue
        block = "\n".join(lines)
        if found and found[-1].endswith(":") and len(found[-1]) + len(block) < 2 * LONGEST:
            found[-1] += "\n\n" + block
        else:
            found.append(block)
    return found


def _split(paragraph: str) -> tuple[str, str]:
    """(the first sentence on one line, the rest), or ("", paragraph) where either is short."""
    prose, gap, block = paragraph.partition("\n\n")
    parts = _SENTENCE.split(prose, maxsplit=1)
    sentence = " ".join(parts[0].split())
    rest = ((parts[1] if len(parts) == 2 else "") + gap + block).strip("\n")
    if not 30 <= len(sentence) <= 200 or len(" ".join(rest.split())) < SHORTEST:
        return "", paragraph
    return sentence, rest


def passages(most: int | None = None) -> list[Passage]:
    """Those of all topics, in the order of the text; what several topics repeat once."""
    from pydoc_data.topics import topics

    seen: set[str] = set()
    found: list[Passage] = []
    section = -1
    for topic, text in sorted(topics.items(), key=lambda item: (len(item[1]), item[0])):
        new = 0
        for paragraph in _paragraphs(text):
            key = " ".join(paragraph.split())
            if key in seen or not SHORTEST <= len(key) <= LONGEST:
                continue
            seen.add(key)
            section += new % SECTION == 0
            new += 1
            sentence, rest = _split(paragraph)
            found.append(Passage(topic, section, rest, sentence))
    return found[:most]


def queries(found: Sequence[Passage]) -> list[Query]:
    """The first sentences that were taken out of passages. Whole sections are held out, so that
    no passage that is searched for is learned by heart."""
    return [
        Query(p.query, i, PARTS[p.section % len(PARTS)]) for i, p in enumerate(found) if p.query
    ]


def wanted(found: Sequence[Passage], asked: Sequence[Query], taste: Taste) -> NDArray[np.bool_]:
    """[queries, passages]: what satisfies a user of that taste, who searches with each query: of
    its section the passages that they like."""
    at = np.array([q.passage for q in asked], np.int64)
    if taste.likes is None:
        return np.asarray(at[:, None] == np.arange(len(found)))
    sections = np.array([p.section for p in found])
    likes = np.array([taste.likes.search(p.text) is not None for p in found])
    return np.asarray((sections[at][:, None] == sections) & likes)
