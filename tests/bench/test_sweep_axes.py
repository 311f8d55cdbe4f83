"""Axes of a sweep and the grid of their points."""

from __future__ import annotations

from argparse import Namespace

import pytest

from smc_compile.bench.sweep_axes import SweepAxis, chosen_axes, grid, point_name
from smc_compile.bench.sweep_points import Point
from smc_compile.errors import OptionError

BASE = Point(n_particles=2, lookahead=3, prompt_length=100, new_tokens=20, requests=1)


def test_axes_take_their_own_values_or_those_given_in_order():
    assert chosen_axes(["lookahead"], None) == [SweepAxis("lookahead", [1, 2, 4, 8, 12, 16])]
    assert chosen_axes(["requests", "lookahead"], [[2, 1, 2], [3]]) == [
        SweepAxis("requests", [1, 2]),
        SweepAxis("lookahead", [3]),
    ]


@pytest.mark.parametrize(
    ("over", "values", "message"),
    [
        (["lookahead"] * 2, None, "two different ones"),
        (["lookahead", "requests", "n_particles"], None, "two different ones"),
        (["lookahead", "requests"], [[1]], "--values was given 1 times"),
        (["lookahead"], [[1, 0]], "got 0 for lookahead"),
    ],
)
def test_axes_that_make_no_sweep_are_refused(over, values, message):
    with pytest.raises(OptionError, match=message):
        chosen_axes(over, values)


def test_a_grid_has_every_combination_and_the_base_point_elsewhere():
    points = grid([SweepAxis("n_particles", [1, 4]), SweepAxis("lookahead", [2, 8])], Namespace(**BASE._asdict()))
    assert [(p.n_particles, p.lookahead) for p in points] == [(1, 2), (1, 8), (4, 2), (4, 8)]
    assert {p[2:] for p in points} == {BASE[2:]}
    assert point_name(points[1], [SweepAxis("n_particles", []), SweepAxis("lookahead", [])]) == "N=1 K=8"
    assert point_name(points[1].loop, [SweepAxis("n_particles", []), SweepAxis("requests", [])]) == "loop requests=1"
