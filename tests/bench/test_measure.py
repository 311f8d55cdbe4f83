"""Timing in turn: peers that fail, Ctrl-C in the middle, memory."""

from __future__ import annotations

import io
from collections.abc import Callable

import pytest
import torch
from helpers.fake_results import fake_generation
from rich.console import Console

from smc_compile import Generation
from smc_compile.bench.against_eager import Agreement
from smc_compile.bench.measure import Contestant, Measurement, measure, reason
from smc_compile.errors import ValidationError

WARM_UP = 1  # call before the rounds
QUIET = Console(file=io.StringIO())


def contestant(name: str, raises: dict[int, BaseException] | None = None, peer: bool = False) -> Contestant:
    """One that raises at the given calls, counted from 1; the first warms up."""
    calls = 0

    def run(seed: int) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if raises and calls in raises:
            raise raises[calls]
        return torch.full((1, 5), seed)

    return Contestant(name, run, 3, peer=peer)


def rounds(measured: Measurement) -> dict[str, int]:
    return {result.contestant.method: len(result.runs) for result in measured.results}


def test_every_round_has_a_seed_of_its_own():
    (result,) = measure([contestant("a")], 3, 7, QUIET).results
    assert [int(run.sequences[0, 0]) for run in result.runs] == [7, 8, 9]


@pytest.mark.parametrize("call", [1, 2, 4])
def test_a_peer_that_fails_is_named_and_the_rest_goes_on(call):
    measured = measure([contestant("a"), contestant("b", {call: ValueError("no such\nthing")}, True)], 3, 0, QUIET)
    assert rounds(measured) == {"a": 3}
    assert measured.failures == {"b": "ValueError: no such"}
    assert not measured.interrupted


def test_an_error_of_our_own_is_raised():
    with pytest.raises(ValueError, match="ours"):
        measure([contestant("a", {2: ValueError("ours")})], 1, 0, QUIET)


@pytest.mark.parametrize(
    ("call", "measured_rounds", "missing"),
    [
        (WARM_UP, {}, {"a", "b", "c"}),
        (WARM_UP + 1, {"a": 1}, {"b", "c"}),  # in the first round: what ran of it is kept
        (WARM_UP + 2, {"a": 1, "b": 1, "c": 1}, set()),
        (WARM_UP + 3, {"a": 2, "b": 2, "c": 2}, set()),
    ],
)
def test_an_interrupt_keeps_whole_rounds(call, measured_rounds, missing):
    three = [contestant("a"), contestant("b", {call: KeyboardInterrupt()}), contestant("c")]
    measured = measure(three, 3, 0, QUIET)
    assert measured.interrupted
    assert rounds(measured) == measured_rounds
    assert set(measured.failures) == missing


def test_a_second_interrupt_is_not_caught():
    def show() -> None:
        measured = measure([contestant("a", {2: KeyboardInterrupt()})], 1, 0, QUIET)
        assert measured.interrupted
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        show()


def test_the_peak_of_a_call_is_its_own():
    def holding(numbers: int) -> Callable[[int], torch.Tensor]:
        def run(seed: int) -> torch.Tensor:
            return torch.ones(numbers)[:1].clone().view(1, 1)

        return run

    large, small = measure([Contestant("a", holding(10**8), 1), Contestant("b", holding(1), 1)], 1, 0, QUIET).results
    peaks = [result.runs[0].peak_bytes for result in (large, small)]
    if None in peaks:
        pytest.skip("this system does not tell")
    assert peaks[0] - peaks[1] == pytest.approx(4e8, rel=0.2)


def test_steps_are_tokens_or_counted():
    counted = Contestant("assisted", lambda seed: torch.zeros(1, 5), 3, steps=lambda: 2)
    tokens = Contestant("transformers", lambda seed: torch.zeros(1, 5), 3)
    assert [r.runs[0].steps for r in measure([counted, tokens], 1, 0, QUIET).results] == [2, 3]


def test_reasons_take_one_line():
    assert reason(ValidationError("It differs.", "by 3%")) == "It differs. by 3%"
    assert reason(RuntimeError("first\nsecond")) == "RuntimeError: first"
    assert reason(NotImplementedError()) == "NotImplementedError"


def test_ours_are_checked_before_anything_is_timed():
    order: list[str] = []

    def run(seed: int) -> Generation:
        order.append("run")
        return fake_generation("smc", 1.0)

    def check(name: str, given: Generation) -> Agreement:
        order.append("check")
        return Agreement(0.0, 1.0)

    ours, theirs = Contestant("smc", run, 3), contestant("transformers")
    assert measure([ours, theirs], 1, 0, QUIET, check=check).agreements == {"smc": Agreement(0.0, 1.0)}
    assert order == ["run", "check", "run"]

    def refuse(name: str, given: Generation) -> Agreement:
        raise ValidationError("wrong")

    with pytest.raises(ValidationError, match="wrong"):
        measure([ours], 1, 0, QUIET, check=refuse)
