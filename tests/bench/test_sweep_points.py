"""Points of a sweep: what is timed, what it leaves in memory, and what is refused."""

from __future__ import annotations

import io

import pytest
import torch
from rich.console import Console

from smc_compile.bench import sweep_points
from smc_compile.bench.sweep_points import (
    Measured,
    Point,
    Timing,
    cache_bytes,
    measure_points,
    middle,
    point_timer,
    program_of,
    too_large,
)
from smc_compile.errors import InputError
from smc_compile.inputs.requests import build_request, request_seeds, settings_of
from smc_compile.pairs.llama import Llama, LlamaConfig, cache_numbers
from smc_compile.pairs.random_weights import build_models
from smc_compile.program.from_model import programs

interpreted = pytest.mark.usefixtures("interpreted")
TARGET = LlamaConfig(64, 32, 2, 4, 2, 48, 64)
DRAFT = LlamaConfig(64, 16, 1, 2, 2, 24, 64)
PER_TOKEN = 4 * (cache_numbers(TARGET) + cache_numbers(DRAFT))
BASE = Point(n_particles=2, lookahead=3, prompt_length=5, new_tokens=20, requests=1)
QUIET = Console(file=io.StringIO())


@pytest.fixture(scope="module")
def pair() -> tuple[Llama, Llama]:
    given = {"dtype": torch.float32, "device": torch.device("cpu"), "seed": 0, "acceptance": None, "temperature": 1.0}
    return build_models(TARGET, DRAFT, **given)[:2]


@pytest.fixture(autouse=True)
def uncompiled(monkeypatch):
    """Dynamo alone: Inductor is not what is tested."""
    monkeypatch.setattr(sweep_points, "COMPILER", "eager")


# ---- which cycles ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [1, 2, 5, 17])
@pytest.mark.parametrize("cycles", [1, 4])
def test_timed_cycles_lie_around_the_middle_and_hold_neither_the_first_nor_the_last(width, cycles):
    for new_tokens in range(3 * width + 3, 200):
        begin, timed = middle(new_tokens, width, cycles)
        end = begin + (2 + timed) * width
        assert 1 <= timed <= cycles
        assert begin >= 2
        assert end < new_tokens
        if timed == cycles:  # as near to the middle as whole tokens allow, beside where the first cycle keeps it off
            assert abs(begin - (new_tokens - end)) <= 1 or begin == 2


def test_too_few_new_tokens_are_refused_with_the_number_that_is_enough():
    with pytest.raises(InputError, match="at least 18 new tokens"):
        middle(17, 5, 4)
    assert middle(18, 5, 4)[1] == 1


@interpreted
@pytest.mark.parametrize("lookahead", [3, 0])
def test_a_session_gives_the_same_tokens_cycle_by_cycle(pair, lookahead):
    session = program_of(BASE._replace(lookahead=lookahead), *pair).session
    ids = torch.arange(10).view(2, 5)
    request = build_request(ids, 9, request_seeds(7, ids), settings=settings_of(2, temperature=0.9))
    runs = list(session.cycles(request))
    assert len(runs) == (3 if lookahead else 9)  # before the first cycle, and after each
    whole = session.run(request)
    rows = runs[-1].p.tokens.view(2, -1, runs[-1].p.tokens.shape[1])
    assert torch.equal(rows[:, :, :9], whole.particles[:, :, 5:14])


# ---- one point ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("point", [BASE, BASE.loop])
def test_a_timing_tells_where_the_time_of_a_cycle_goes(pair, point):
    timing = point_timer(*pair, 1.0, cycles=2)(point, 0)
    assert timing.cycles == 2
    assert timing.seconds == pytest.approx(sum(timing.parts.values()))
    assert timing.parts["score"] > 0
    assert (timing.parts["draft"] > 0) == (point.lookahead > 0)
    assert timing.compile_seconds > 0  # before what is timed


@interpreted
def test_a_replayed_cycle_does_not_tell_where_its_time_goes(pair, monkeypatch):
    monkeypatch.setattr("smc_compile.program.build.recorder_for", lambda *_: lambda work: work)
    with programs.emptied():
        timing = point_timer(*pair, 1.0, cycles=2)(BASE, 0)
    assert timing.seconds > 0
    assert timing.parts == {}


@interpreted
def test_memory_grows_with_n_in_the_suffixes_alone(pair):
    time_point = point_timer(*pair, 1.0, cycles=1)
    many = BASE._replace(n_particles=3, requests=2)
    for point in (many, many._replace(prompt_length=9, new_tokens=33)):
        timing = time_point(point, 0)
        assert (timing.prompt_bytes, timing.suffix_bytes) == cache_bytes(point, PER_TOKEN)
    one, four = (cache_bytes(BASE._replace(n_particles=n), PER_TOKEN) for n in (1, 4))
    assert four == (one[0], 4 * one[1])


def test_what_does_not_fit_is_told_before_with_the_most_particles_that_do():
    big = BASE._replace(n_particles=64)
    free = 300_000
    why = too_large(big, TARGET, DRAFT, 4, free)
    assert why is not None
    fits = int(why.rpartition("N=")[2].split()[0])
    assert 1 < fits < 64
    assert too_large(big._replace(n_particles=fits), TARGET, DRAFT, 4, free) is None
    assert too_large(big._replace(n_particles=fits + 1), TARGET, DRAFT, 4, free) is not None
    assert "not even N=1 fits" in (too_large(big, TARGET, DRAFT, 4, 1000) or "")
    assert too_large(big, TARGET, DRAFT, 4, None) is None


# ---- all points -----------------------------------------------------------------------------------------------------


def fake_timing(seconds: float) -> Timing:
    return Timing(seconds, dict.fromkeys(sweep_points.PARTS, seconds / 4), 1, 0, 0.0, 10, 20, None)


def measured_with(time_point, count: int = 3, repeats: int = 2) -> tuple[list[Point], Measured]:
    points = [BASE._replace(n_particles=n) for n in range(1, count + 1)]
    return points, measure_points(points, [str(p.n_particles) for p in points], time_point, repeats, 0, QUIET)


@interpreted
def test_a_point_past_the_positions_is_named_and_the_rest_goes_on(pair):
    points = [BASE, BASE._replace(prompt_length=60)]
    measured = measure_points(points, ["short", "long"], point_timer(*pair, 1.0, 1), 2, 0, QUIET)
    assert [len(timings) for timings in measured.timings.values()] == [2]
    assert "exceed the target's maximum positions 60 + 20 - 1 > 64" in measured.failures[points[1]]


def test_an_allocation_that_fails_is_named_and_any_other_error_is_raised():
    def time_point(point: Point, seed: int) -> Timing:
        if point.n_particles == 2:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes.")
        return fake_timing(1.0)

    points, measured = measured_with(time_point)
    assert list(measured.failures) == [points[1]]
    assert list(measured.timings) == [points[0], points[2]]

    def broken(point: Point, seed: int) -> Timing:
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        measured_with(broken)


def test_ctrl_c_keeps_every_run():
    calls = []

    def time_point(point: Point, seed: int) -> Timing:
        calls.append(point)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return fake_timing(1.0)

    points, measured = measured_with(time_point)
    assert measured.interrupted
    assert calls == [*points, *points[:2]]  # points take turns
    assert [len(measured.timings[point]) for point in points] == [2, 1, 1]
    calls[:] = calls[:4]  # now in the very first run of a point
    assert measured_with(time_point)[1].timings == {}
