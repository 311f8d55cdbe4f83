"""Languages over bytes: regular expressions match what Python's re matches; products, finite languages, least forms."""

from __future__ import annotations

import itertools
import random
import re

import numpy as np
import pytest

from smc_compile.control import Choices, Regex
from smc_compile.control.byte_automata import from_regex, from_texts, minimal, product
from smc_compile.errors import OptionError

# Letters of one to four bytes, the first and last of each length, those around the surrogates, and what patterns name.
CHARACTERS = 'abcdABx\n _1"\\-}{\x00\x7f\x80\u07ff\u0800\ud7ff\ue000\uffff\U00010000\U0010ffffé你\U0001f600'
PATTERNS = [
    "(a|b)*c", "[ab]{2,4}", "a?b*c+|d", "(ab|a)(bc|c)?", ".", ".*", "[^a]é?", "", "x{0,5}", r"\w+", r"\d*", r"\s?a",
    r"\W", r"\S", r"\D+", r"[^\W_]+", "(?i)ab", "(?s).", "a*?b", "[é-你]", "[^é-你]+", "(?:ab)+", r'"[^"\\]*"',
    r"[\d_]", r"\(?=", "[(?=]+", r"[$^]", r"\$\^", r"[\]^]b", r"\\b",
    "(?P<n>a)b", r"[\]\-a]+", r"\n|\t", r"[^\n]", r"\.", "a{2}", "a{,3}", "a{2,}", "你|é{2}",
]  # fmt: skip


def fits(automaton, text: str) -> bool:
    return bool(automaton.accepting[automaton.after(text.encode())])


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_pattern_matches_what_re_matches(pattern: str):
    """All texts of one letter, and 3,000 of up to five."""
    language, expected = from_regex(pattern), re.compile(pattern, re.ASCII)
    drawn = random.Random(pattern)
    texts = ["", *CHARACTERS] + ["".join(drawn.choices(CHARACTERS, k=drawn.randint(2, 5))) for _ in range(3000)]
    assert [t for t in texts if fits(language, t) != bool(expected.fullmatch(t))] == []


@pytest.mark.parametrize("broken", [b"\x80", b"\xc0\x80", b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"\xe4\xbd", b"\xff"])
def test_bytes_that_are_no_utf8_fit_nothing(broken: bytes):
    language = from_regex("(?s).*")
    assert not language.accepting[language.after(broken)]


def test_a_prefix_of_a_character_is_a_prefix_of_a_text():
    potential = Regex("[^a]")
    assert potential.prefix("你".encode()[:2]) == 0.0
    assert potential.complete("你".encode()[:2]) == -np.inf
    assert (potential.prefix("a"), potential.complete("b"), potential.complete(b"b")) == (-np.inf, 0.0, 0.0)


def test_a_product_has_the_texts_of_both():
    both = product(from_regex("[ab]*a"), from_regex("(ab|ba|a)*"))
    for size in range(7):
        for letters in itertools.product("ab", repeat=size):
            text = "".join(letters)
            assert fits(both, text) == bool(re.fullmatch("[ab]*a", text) and re.fullmatch("(ab|ba|a)*", text))
    named = Regex("[ab]*") * Choices(["ab", "cd"])
    assert named.complete("ab") == 0.0
    assert named.complete("cd") == -np.inf
    assert named.name == "Regex('[ab]*') * Choices of 2"


def test_a_finite_language_has_its_texts_alone():
    language = from_texts([b"no", b"yes", b"not", "é".encode()])
    assert [t for t in ("no", "yes", "not", "é", "n", "", "yess", "nod") if fits(language, t)] == [
        "no", "yes", "not", "é",
    ]  # fmt: skip


def test_the_least_automaton_has_one_state_for_each_rest():
    """Of a*b: before b, behind b, the sink. Of a text of at most 50 letters: one for each length, and the sink."""
    assert len(from_regex("(aa*)?b|b").successor) == 3
    assert len(from_regex("x{0,50}").successor) == 52
    nothing = minimal(np.array([[1] * 256, [1] * 256], dtype=np.int32), np.zeros(2, dtype=bool))
    assert not nothing.accepting.any()
    assert nothing.after(b"a") == nothing.sink


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("^ab$", r"it has an anchor(.|\n)*leave"),
        (r"a|\bfoo", "word boundary"),
        (r"(a)\1", "refers back to a group"),
        (r"(?P<x>a)(?P=x)", "refers back to a group"),
        ("(", "unterminated subpattern"),
        ("a(?=b)b", "looks ahead"),
        ("(?<!a)b", "looks ahead or behind"),
        ("(?>a*)b", "atomic group"),
        ("[]a]", "a class in it begins with ]"),
        ("a[^]b]", "a class in it begins with ]"),
        ("(?x)a b", "Flag x"),
        ("(?i:ß)", "ignores the case of letters"),
        ("(?i:[é-ÿ])", "ignores the case of letters"),
        ("(?#note)a", "cannot be compiled"),
        ("a{}", "a pair of braces is empty"),
        ("a{", "does not know its syntax"),
        ("a++b", "atomic group"),
        (3, "a pattern must be a string"),
    ],
)
def test_what_is_no_regular_expression_is_refused(pattern, message: str):
    with pytest.raises(OptionError, match=message):
        Regex(pattern)


def test_potentials_that_exclude_each_other_are_refused():
    with pytest.raises(OptionError, match=r"no text fits(.|\n)*exclude each other"):
        Regex("a*b") * Regex("b*a")


@pytest.mark.parametrize("texts", [[], "yes", [1], ["a", None]])
def test_choices_must_be_strings(texts):
    with pytest.raises(OptionError, match="choices must be strings"):
        Choices(texts)


def test_the_package_that_is_missing_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "interegular", None)
    with pytest.raises(OptionError, match=r"needs the package interegular(.|\n)*smc_compile\[control\]"):
        Regex("a")
