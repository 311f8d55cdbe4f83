"""The leaves of calls: numbered by `flatten`, replaced by `replace_leaves`."""

from __future__ import annotations

import operator

import pytest
import torch
from torch import fx

from smc_compile.passes.loop.leaves import flatten, replace_leaves

GRAPH = fx.Graph()
X, Y = GRAPH.placeholder("x"), GRAPH.placeholder("y")


def test_words_tell_the_nesting():
    node = GRAPH.call_function(operator.getitem, (X, slice(1, None)))
    leaves = ["sequence of 2", X, "slice", "sequence of 3", 1, None, None, "dict []", "sequence of 0"]
    assert flatten(node) == leaves


@pytest.mark.parametrize(
    ("args", "kwargs"),
    [
        ((X, slice(3, 5)), {}),
        (((X, Y), 3), {"dim": 5}),
        ((X, (slice(None), 3, slice(None, 5))), {}),
        ((X, [3, (5, Y)]), {"out": None, "size": (7, 3)}),
    ],
)
def test_leaves_are_replaced_by_number(args, kwargs):
    node = GRAPH.call_function(torch.add, args, kwargs)
    numbers = [at for at, leaf in enumerate(flatten(node)) if leaf in (3, 5)]
    replaced = replace_leaves(node, dict.fromkeys(numbers, 9), {X: "x", Y: "y"})
    expected = str((args, kwargs)).replace("3", "9").replace("5", "9").replace("x", "'x'").replace("y", "'y'")
    assert str(replaced) == expected
    assert replace_leaves(node, {}, {X: X, Y: Y}) == (node.args, node.kwargs)
