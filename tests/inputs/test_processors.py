"""Processors are sorted by what they read; whatever cannot be told from a trace counts as reading the text."""

from __future__ import annotations

import functools
import math

import numpy as np
import pytest
import torch
from torch import nn

from smc_compile.errors import OptionError
from smc_compile.fingerprint import fingerprint
from smc_compile.inputs.processor_trials import reads_text
from smc_compile.inputs.processors import sort_processors

VOCAB = 12


def halved(ids, scores):
    return scores / 2


def top_three(ids, scores):
    return scores.masked_fill(scores < scores.topk(3).values[:, -1:], -math.inf)


def last_token(ids, scores):
    return scores + (torch.arange(scores.shape[1]) == ids[:, -1:])


def by_length(ids, scores):
    return scores * 2 if ids.shape[1] < 9 else scores


def by_size(ids, scores):
    return scores * ids.shape[1]


def row_by_row(ids, scores):
    return torch.stack([row / len({*text}) for text, row in zip(ids.tolist(), scores, strict=True)])


def rare(ids, scores):
    """Looks at the text only to find a token that a trial is unlikely to hold."""
    return torch.where((ids == 11).all(1, keepdim=True), -scores, scores)


def at_seven(ids, scores):
    """Branches at the very length with which a trial may trace."""
    return scores * 2 if ids.shape[1] == 7 else scores


class ByLength:
    def __init__(self, entries=20):
        self.table = torch.arange(float(entries))

    def __call__(self, ids, scores):
        return scores + self.table[int(ids.shape[1])]


class Counts:
    def __init__(self):
        self.calls = 0

    def __call__(self, ids, scores):
        self.calls += 1
        return scores / self.calls


class Scaled:
    def __init__(self, by):
        self.by = by

    def __call__(self, ids, scores):
        return scores * self.by


@pytest.mark.parametrize("processor", [halved, top_three, Scaled(2.0)])
def test_tensor_code_on_the_scores(processor):
    assert not reads_text(processor, VOCAB)


@pytest.mark.parametrize(
    "processor", [last_token, by_length, by_size, row_by_row, rare, at_seven, ByLength(), Counts()]
)
def test_what_reads_text_length_or_keeps_a_state(processor):
    assert reads_text(processor, VOCAB)


def test_a_trial_leaves_a_processor_as_it_was():
    counts = Counts()
    sort_processors([counts], ["temperature"], VOCAB)
    assert counts.calls == 0


def test_rules_reach_to_the_last_that_reads_the_text():
    found = sort_processors([halved, last_token, top_three], ["temperature"], VOCAB)
    assert (len(found.traced), len(found.on_host), len(found.warpers)) == (2, 0, 2)
    found = sort_processors([halved, row_by_row, top_three], ["temperature", "top_p"], VOCAB)
    assert (len(found.traced), len(found.on_host), len(found.warpers)) == (0, 2, 3)


def test_a_rule_behind_truncation_is_refused():
    with pytest.raises(OptionError, match="last_token reads the text, and comes after"):
        sort_processors([], ["temperature", "top_k"], VOCAB, after=[last_token])


class Slots:
    __slots__ = ("by",)

    def __init__(self, by):
        self.by = by

    def __call__(self, ids, scores):
        return scores * self.by


def banned(ids, scores, token):
    return scores.index_fill(1, torch.tensor([token]), -math.inf)


class Bias(nn.Module):
    def __init__(self, token):
        super().__init__()
        self.register_buffer("bias", torch.zeros(2000).index_fill(0, torch.tensor([token]), 9.0))

    def forward(self, ids, scores):
        return scores + self.bias[: scores.shape[1]]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (functools.partial(banned, token=3), functools.partial(banned, token=9)),
        (Bias(500), Bias(700)),
        (Scaled(np.arange(2000)), Scaled(np.arange(2000) + (np.arange(2000) == 1000))),
        (Scaled([torch.zeros(2000)]), Scaled([torch.zeros(2000).index_fill(0, torch.tensor([1000]), 1.0)])),
        (Scaled({"a": (1.0, 2.0)}), Scaled({"a": (1.0, 2.5)})),
        (Slots(1.0), Slots(2.0)),
    ],
    ids=["partial", "buffer", "array", "tensor in a list", "dict", "slots"],
)
def test_keys_see_every_setting(one, other):
    assert fingerprint(one) == fingerprint(one)
    assert fingerprint(one) != fingerprint(other)
    hash(fingerprint(one))


def test_a_rule_that_compiles_once_a_length_runs_by_hand():
    class Table:
        table = tuple(float(i) for i in range(30))

        def __call__(self, ids, scores):
            return scores + self.table[int(ids.shape[1])] * (torch.arange(scores.shape[1]) == ids[:, -1:])

    found = sort_processors([Table()], ["temperature"], VOCAB)
    assert (len(found.traced), len(found.on_host)) == (0, 1)


def test_keys_are_equal_for_equal_settings_and_only_then():
    def key(*processors):
        return sort_processors(processors, ["temperature"], VOCAB).key

    assert key(Scaled(2.0)) == key(Scaled(2.0))
    assert key(Scaled(2.0)) != key(Scaled(3.0))
    assert key(halved) != key(top_three)
    assert key(halved) != key(last_token)
    assert key(row_by_row) == key(Counts()), "rules by hand are in no program"
    assert fingerprint(Scaled(torch.ones(2))) != fingerprint(Scaled(torch.zeros(2)))
