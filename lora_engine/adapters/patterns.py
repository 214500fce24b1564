"""PEFT's rank_pattern and alpha_pattern: a value for the modules that a key matches.

PEFT matches a module's path by ``re.match(rf"(.*\\.)?({key})$", path)``, and the first entry that
does wins. Keys come from files, and Python's regexes can take exponential time. So keys that are
plain text, which nearly all are, are matched as text; others are refused unless the number of
ways in which they can match a text is small.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from time import monotonic
from typing import Any

from lora_engine.errors import FormatError
from lora_engine.safetensors_file import short

MAX_NAME = 1000  # characters of a module's path
MAX_REGEX = 256
MAX_WAYS = 10**6  # in which a regex matches a path of _LENGTH characters
MAX_SECONDS = 5.0  # of all matching of regexes of a config
_LENGTH = 64

# A dot counts as text, as in PEFT's own files; PEFT documents "^" for a whole path.
_PLAIN = re.compile(r"(\^?)((?:[^\\^$*+?{}\[\]()|]|\\[^A-Za-z0-9])+)\$?")
_TOKEN = re.compile(
    r"(?P<atom>\\[A-Za-z]|\\[^A-Za-z0-9]|\[\^?\]?(?:\\.|[^\\\]])*\]|[^\\\[\]()|*+?{}])"
    r"|(?P<open>\((?:\?:)?)(?!\?)|(?P<close>\))|(?P<bar>\|)"
)
_COUNT = re.compile(
    r"(?P<star>[*+])\??|(?P<opt>\?)\??|\{(?P<low>\d{0,4})(?P<comma>,?)(?P<high>\d{0,4})\}\??"
)


def literal(key: str) -> tuple[str, bool] | None:
    """The text that a key stands for, and whether only as a whole path; None for a regex."""
    found = _PLAIN.fullmatch(key)
    if found is None:
        return None
    return re.sub(r"\\(.)", r"\1", found[2], flags=re.DOTALL), bool(found[1])


def key_of(path: str, others: bool) -> str:
    """A key that matches a path; ``others``: and no path that ends with it."""
    plain = literal(path)
    text = path if plain is not None and plain[0] == path else re.escape(path)
    return f"^{text}" if others else text


class _Regex:
    """How many ways a regex has to match; raises ValueError for what is refused."""

    def __init__(self, text: str) -> None:
        self.text, self.at = text, 0
        self.ways, _ = self.branches()
        if self.at != len(text):
            raise ValueError("without unmatched parentheses")

    def branches(self) -> tuple[int, bool]:
        ways, choice = self.sequence()
        while self.at < len(self.text) and self.text[self.at] == "|":
            self.at += 1
            more, _ = self.sequence()
            ways, choice = ways + more, True
        return ways, choice

    def sequence(self) -> tuple[int, bool]:
        """(ways, whether it holds a quantifier or an alternative)."""
        ways, choice = 1, False
        while self.at < len(self.text):
            token = _TOKEN.match(self.text, self.at)
            if token is None:
                raise ValueError("of characters, classes, groups and quantifiers")
            if token["close"] or token["bar"]:
                break
            self.at = token.end()
            item, inner = 1, False
            if token["open"]:
                item, inner = self.branches()
                if self.at >= len(self.text):
                    raise ValueError("without unmatched parentheses")
                self.at += 1
            times = self.quantifier()
            if times is not None and inner:
                raise ValueError("without nested quantifiers")
            ways *= item * (times or 1)
            choice = choice or inner or times is not None
            if ways > MAX_WAYS:
                raise ValueError("with fewer quantifiers and alternatives")
        return ways, choice

    def quantifier(self) -> int | None:
        """In how many ways what is before it can be repeated; None where nothing is."""
        found = _COUNT.match(self.text, self.at)
        if found is None:
            return None
        self.at = found.end()
        if found["star"]:
            return _LENGTH
        if found["opt"]:
            return 2
        low = int(found["low"] or 0)
        if not found["comma"]:
            return 1
        high = min(int(found["high"]), _LENGTH) if found["high"] else _LENGTH
        return max(high - low, 0) + 1


def _compile(key: str) -> re.Pattern[str]:
    """Raises ValueError saying what was expected."""
    if len(key) > MAX_REGEX:
        raise ValueError(f"of at most {MAX_REGEX} characters")
    _Regex(key)
    try:
        return re.compile(rf"(.*\.)?({key})$")
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"that compiles ({error})") from None


class Patterns:
    """Values by the first key that matches a path."""

    def __init__(self, entries: Mapping[str, Any], where: str) -> None:
        """Raises FormatError, which begins with ``where``, for a key that is refused."""
        self.where = where
        self.values = list(entries.values())
        self.texts: dict[tuple[str, bool], int] = {}
        self.regexes: list[tuple[int, re.Pattern[str]]] = []
        self.seconds = 0.0
        for index, key in enumerate(entries):
            text = literal(key)
            if text is not None:
                self.texts.setdefault(text, index)
                continue
            try:
                self.regexes.append((index, _compile(key)))
            except ValueError as error:
                raise FormatError(
                    f"{where}: {short(key)}: expected text or a regex {error}"
                ) from None

    def find(self, path: str) -> Any | None:
        """The value for a module's path, None where no key matches. Raises FormatError."""
        best = self.texts.get((path, True), len(self.values))
        at = 0
        while self.texts:
            best = min(best, self.texts.get((path[at:], False), best))
            at = path.find(".", at) + 1
            if at == 0:
                break
        if self.regexes and len(path) > MAX_REGEX:
            raise FormatError(f"{self.where}: {short(path)}: too long a path to match by a regex")
        for index, regex in self.regexes:
            if index > best:
                break
            start = monotonic()
            found = regex.match(path)
            self.seconds += monotonic() - start
            if self.seconds > MAX_SECONDS:
                raise FormatError(f"{self.where}: expected regexes that are matched in seconds")
            if found:
                best = index
        return self.values[best] if best < len(self.values) else None
