"""N and K among candidates: which one, why, and what a pilot tells."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from smc_compile.auto.choice import (
    Candidate,
    Choice,
    acceptance_rate,
    best,
    effective_particles,
    expected_tokens,
    fastest,
    weight_variance,
)
from smc_compile.errors import OptionError
from smc_compile.options import Options


def candidate(n: int, k: int, ms: float, ess: float | None = None) -> Candidate:
    return Candidate(n, k, 1e-3 * ms * (k + 1), k + 1, 1e-3 * ms, ess)


GRID = [candidate(n, k, ms=n / k, ess=n * math.exp(-0.2 * k)) for n in (4, 8, 16) for k in (1, 2, 4)]


def asked(**options: object) -> Options:
    return Options.parse({"n_particles": "auto", "lookahead": "auto", **options})


def test_the_fastest_with_enough_effective_particles():
    chosen = fastest(GRID, asked(ess_floor=5.0))
    assert (chosen.n_particles, chosen.lookahead) == (8, 2), "4 are too few, and 8 with K=4 leave 3.6"


def test_the_most_particles_and_then_the_fewest_draft_tokens_that_the_time_allows():
    chosen = best(GRID, asked(time_budget=8.0))
    assert (chosen.n_particles, chosen.lookahead) == (16, 2)


def test_both_floors_hold():
    chosen = best(GRID, asked(time_budget=2.5, ess_floor=3.0))
    assert (chosen.n_particles, chosen.lookahead) == (8, 4)


@pytest.mark.parametrize(
    ("floors", "message"),
    [
        ({"ess_floor": 20.0}, r"the best \(N=16, K=1\) leaves 13.1 effective particles"),
        ({"time_budget": 0.5}, r"the fastest \(N=4, K=4\) takes 1.00 ms a token"),
        ({"time_budget": 1.5, "ess_floor": 9.0}, "takes 1.00 ms a token; the best"),
    ],
)
def test_floors_that_nothing_keeps_to_are_refused_with_what_is_nearest(floors, message):
    with pytest.raises(OptionError, match=message):
        fastest(GRID, asked(**floors))


def test_what_was_chosen_takes_the_place_of_auto():
    options = Choice(tuple(GRID), GRID[4], "").applied(asked(ess_floor=5.0))
    assert (options.n_particles, options.lookahead) == (8, 2)
    assert not options.is_auto
    assert options == replace(Options(), n_particles=8, lookahead=2)


def test_a_report_shows_the_neighbours_and_marks_the_choice():
    lines = Choice(tuple(GRID), GRID[4], "the fastest", "pilot: found").report()
    assert lines[0] == "N=8, K=2: the fastest"
    assert lines[1] == "pilot: found"
    marked = [line for line in lines if line.startswith(">")]
    assert [line.split()[1:3] for line in marked] == [["8", "2"]]
    shown = [tuple(map(int, line.lstrip("> ").split()[:2])) for line in lines[3:]]
    assert shown == [(4, 2), (8, 1), (8, 2), (8, 4), (16, 2)]
    assert max(map(len, lines)) <= 96
    assert {len(line) for line in lines[2:]} == {len(lines[2])}


def test_particles_lose_worth_with_every_token():
    assert effective_particles(100, 3, 0.0) == 100
    assert effective_particles(100, 3, 0.5) == pytest.approx(100 * math.exp(-1.5))
    assert effective_particles(4, 16, 5.0) == 1.0, "one is always left"
    assert effective_particles(100, 3, math.inf) == 0.0


def test_accepted_tokens_follow_from_the_rate_and_back():
    assert expected_tokens(0.5, 3) == pytest.approx((1 - 0.5**4) / (1 - 0.5))
    for rate in (0.0, 0.3, 0.84, 1.0):
        accepted = sum(rate**k for k in range(1, 5))
        assert acceptance_rate(accepted, 4) == pytest.approx(rate, abs=1e-9)


def test_the_variance_of_a_token_is_that_of_the_weights_over_what_was_drafted():
    """4 of 5 tokens of a cycle are drafted; particles without weight are left out."""
    log_w = torch.tensor([[0.0, 4.0, -math.inf], [0.0, 0.0, 0.0]])
    lengths = torch.tensor([[10, 10, 10], [5, 5, 5]])
    pilot = SimpleNamespace(log_weights=log_w, particle_lengths=lengths)
    assert weight_variance(pilot) == pytest.approx((8 / 8 + 0) / 2)
    pilot.log_weights = torch.tensor([[0.0, -math.inf, -math.inf], [0.0, 0.0, 0.0]])
    assert weight_variance(pilot) == math.inf
