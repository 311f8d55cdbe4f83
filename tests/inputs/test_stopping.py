"""Stop strings end a sequence with the token that completes them."""

from __future__ import annotations

import pytest
import torch

from smc_compile.errors import OptionError
from smc_compile.inputs.stopping import strings_stop
from smc_compile.runtime.state.request import Rows


class Letters:
    """Token i is the i-th of these pieces; encodes letter by letter."""

    pieces = ("a", "b", "c", "ab", "\n", "ca\n")

    def encode(self, text, add_special_tokens=False):
        return [self.pieces.index(letter) for letter in text if letter in self.pieces]

    def decode(self, ids, skip_special_tokens=False):
        return "".join(self.pieces[i] for i in ids)


def stopped(strings, texts, prompt=1):
    stop = strings_stop(strings, Letters(), len(texts), prompt)
    rows = Rows(torch.arange(len(texts)), torch.zeros(len(texts), dtype=torch.int64))
    return stop(torch.tensor(texts), rows).tolist()


def test_a_string_may_span_tokens_and_end_inside_one():
    texts = [[0, 0, 1, 2], [0, 3, 2, 2], [0, 1, 3, 5], [0, 0, 0, 0]]
    assert stopped(["abc"], texts) == [True, True, True, False]


def test_the_prompt_does_not_count():
    assert stopped("ab", [[3, 2, 2], [0, 1, 2], [2, 0, 1]]) == [False, False, True]


def test_each_request_has_its_own():
    assert stopped([["ab"], ["c", "\n"], []], [[0, 3], [0, 2], [0, 3]]) == [True, True, False]


def test_a_string_that_the_tokenizer_cannot_make_is_refused():
    with pytest.raises(OptionError, match=r"cannot make the stop string 'ax'[\s\S]*reads 'a'"):
        strings_stop(["ax"], Letters(), 1, 1)
    with pytest.raises(OptionError, match="not empty"):
        strings_stop([[""]], Letters(), 1, 1)
    with pytest.raises(OptionError, match="2 lists for 3 requests"):
        strings_stop([["a"], ["b"]], Letters(), 3, 1)
    with pytest.raises(OptionError, match="need a tokenizer"):
        strings_stop(["a"], None, 1, 1)


def test_none_is_none():
    assert strings_stop(None, None, 1, 1) is None
