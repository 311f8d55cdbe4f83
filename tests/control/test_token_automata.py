"""A language and a vocabulary make tables that spell what the bytes spell, whatever the tokens."""

from __future__ import annotations

import itertools
import random

import pytest
import torch

from smc_compile.control.byte_automata import from_regex, from_texts
from smc_compile.control.token_automata import cross, joined
from smc_compile.runtime.algorithms.automata import FAR, Automaton, after_token, allowed

EOS = 4
TOKENS = [b"a", b"b", b"ab", "é".encode()[:1], None, "é".encode()[1:], b"", b"ba"]
PATTERN = "(ab|é)*b?"


def tables() -> Automaton:
    return joined([cross(from_regex(PATTERN), TOKENS, [EOS])], torch.device("cpu"))[0]


def test_tokens_lead_where_their_bytes_lead():
    automaton, language = tables(), from_regex(PATTERN)
    for size in range(5):
        for ids in itertools.product([0, 1, 2, 3, 5, 7], repeat=size):
            state = torch.tensor(0)
            for token in ids:
                state = after_token(automaton, state, torch.tensor(token))
            at = language.after(b"".join(TOKENS[i] or b"" for i in ids))
            assert bool(automaton.distance[state] < FAR) == (at != language.sink)
            assert bool(automaton.distance[state] == 0) == bool(language.accepting[at])


def test_an_end_follows_a_whole_text_alone_and_nothing_follows_it():
    automaton = tables()
    never = torch.tensor(FAR)
    assert bool(allowed(automaton, torch.tensor(0), never)[EOS])
    behind = after_token(automaton, torch.tensor(0), torch.tensor(EOS))
    assert not allowed(automaton, behind, never).any()
    half = after_token(automaton, torch.tensor(0), torch.tensor(3))
    assert allowed(automaton, half, never).nonzero()[:, 0].tolist() == [5]
    assert not bool(allowed(automaton, torch.tensor(0), never)[6]), "a token without bytes would never end"


def test_a_budget_leaves_what_can_still_become_whole():
    language = from_texts([b"ab" * 3, b"b"])
    automaton = joined([cross(language, TOKENS, [EOS])], torch.device("cpu"))[0]
    at = [allowed(automaton, torch.tensor(0), torch.tensor(left)).nonzero()[:, 0].tolist() for left in (0, 1, 2, 3, 5)]
    assert at == [[1], [1], [1, 2], [0, 1, 2], [0, 1, 2]]  # b alone; ab, ab, ab; a, ba, ba, b


def test_several_languages_share_a_table():
    patterns = ["a*", "(ab)*", "b|é", PATTERN]
    parts = [cross(from_regex(p), TOKENS, [EOS]) for p in patterns]
    automaton, starts = joined(parts, torch.device("cpu"))
    drawn = random.Random(0)
    for part, start in zip(parts, starts, strict=True):
        alone = joined([part], torch.device("cpu"))[0]
        for _ in range(200):
            here, there = torch.tensor(0), torch.tensor(start)
            for token in drawn.choices(range(len(TOKENS)), k=4):
                left = torch.tensor(drawn.choice([1, 3, FAR]))
                assert torch.equal(allowed(alone, here, left), allowed(automaton, there, left))
                here = after_token(alone, here, torch.tensor(token))
                there = after_token(automaton, there, torch.tensor(token))


@pytest.mark.parametrize("size", [1, 3, 50])
def test_tables_that_are_built_in_parts_are_the_same(size: int, monkeypatch):
    whole = cross(from_regex(PATTERN), TOKENS, [EOS])
    monkeypatch.setattr("smc_compile.control.token_automata.AT_ONCE", size)
    parts = cross(from_regex(PATTERN), TOKENS, [EOS])
    assert (whole.successor == parts.successor).all()
    assert (whole.classes == parts.classes).all()
