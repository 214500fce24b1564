"""rank_pattern and alpha_pattern: PEFT's own matching, and keys made to hang."""

from __future__ import annotations

import time
import warnings

import pytest
from hypothesis import given
from hypothesis import strategies as st

import lora_engine as le
from lora_engine.adapters.patterns import Patterns, key_of

parts = st.sampled_from(["q", "v", "layers", "0", "1", "qv", "a-b", "ü"])
names = st.lists(parts, min_size=1, max_size=4).map(".".join)
KEYS = [
    "q", "q.v", "0.q", "^q", "^layers.0.q", r"layers\.0\.q", "q$", ".*q", "layers.*v", "(q|v)",
    r"\d", r"layers\.[01]\.q", "layers.(0|1).(q|v)", "q?v", "a-b", r"a\-b", "ü", "[qv]", ".{1,3}",
    "(?:layers|q).+", "", "^", r"\w+\.\d+", "v|q",
]  # fmt: skip


def peft(keys: list[str], name: str) -> str | None:
    from peft.utils.other import get_pattern_key

    missing = get_pattern_key(keys, name)
    return missing if missing in keys else None


@given(st.lists(st.sampled_from(KEYS), unique=True, max_size=6), names)
def test_the_first_key_that_peft_matches_wins(keys, name):
    assert Patterns({key: key for key in keys}, "test").find(name) == peft(keys, name)


any_name = st.text(
    st.characters(blacklist_categories=("Cs", "Cc")) | st.sampled_from(".*+?[](){}|^$\\"),
    min_size=1, max_size=12,
)  # fmt: skip


@given(any_name, any_name)
def test_a_written_key_matches_its_path_in_peft_and_here(name, other):
    for alone in (False, True):
        key = key_of(name, alone)
        assert peft([key], name) == key
        assert Patterns({key: 1}, "test").find(name) == 1
        below = f"{other}.{name}"
        assert Patterns({key: 1}, "test").find(below) == (None if alone else 1)


HOSTILE = {
    "(a+)+": "nested quantifiers",
    "(a*)*": "nested quantifiers",
    "(a|a)*": "nested quantifiers",
    "((a{1,9}){1,9}){1,9}": "nested quantifiers",
    "(?:.*a){20}": "nested quantifiers",
    "(.*)*$": "nested quantifiers",
    "a?" * 60: "fewer quantifiers",
    "(a|a)" * 40: "fewer quantifiers",
    ".*" * 30 + "x": "fewer quantifiers",
    "[ab]*" * 20: "fewer quantifiers",
    "(?=(a+))": "characters, classes",
    r"(a*)\1": "characters, classes",
    "a**": "characters, classes",
    "(a": "unmatched",
    "a)": "unmatched",
    "[z-a]": "that compiles",
    "(a)" * 100: "256 characters",
}


@pytest.mark.parametrize("key", HOSTILE, ids=lambda k: k[:20])
def test_keys_made_to_hang_are_refused(key):
    with pytest.raises(le.FormatError, match=f"^test: .*{HOSTILE[key]}"):
        Patterns({key: 1}, "test")


tokens = st.sampled_from(
    ["a", ".", "*", "+", "?", "(", ")", "|", "[a]", "{2}", "{1,}", "b", r"\.", "^", "$", ".*"]
)


@given(st.lists(tokens, max_size=40).map("".join))
def test_any_key_is_refused_or_matched_soon(key):
    """The text is the worst there is for backtracking, of the longest kind that is matched."""
    start = time.monotonic()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            patterns = Patterns({key: 1}, "test")
            for name in ("a" * 256, "a" * 255 + "!"):
                patterns.find(name)
        except le.FormatError:
            pass
    assert time.monotonic() - start < 60


def test_long_paths_are_for_text_only():
    assert Patterns({"q": 1}, "test").find("x." * 400 + "q") == 1
    with pytest.raises(le.FormatError, match="too long a path"):
        Patterns({".*q": 1}, "test").find("x." * 400 + "q")
