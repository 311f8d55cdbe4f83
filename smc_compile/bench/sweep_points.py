"""The points of a sweep, and what a cycle costs at one: a few cycles in the middle of the suffix, timed.

Cost depends on where a cycle stands, not on the values in the cache. So a run begins with the prompt, goes to the
middle of the new tokens at once, where its suffixes grow as far as there and then by half, and stops after a few
cycles.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from rich.console import Console

from smc_compile.auto.cost_model import CycleModel, cycle_model
from smc_compile.bench.measure import progress_bar, reason
from smc_compile.errors import InputError, SMCError
from smc_compile.inputs.processors import sort_processors
from smc_compile.inputs.requests import build_request, request_seeds, settings_of
from smc_compile.options import Options
from smc_compile.pairs.llama import Llama, LlamaConfig, cache_numbers
from smc_compile.pairs.random_weights import random_prompt
from smc_compile.program.checks import check_request
from smc_compile.program.from_model import program_for
from smc_compile.program.program import Program
from smc_compile.runtime.execution.memory import Need, readable, row_bytes
from smc_compile.runtime.sessions.autoregressive import AutoregressiveSession
from smc_compile.runtime.sessions.run import Run
from smc_compile.runtime.sessions.smc import SMCSession
from smc_compile.runtime.state.request import Request
from smc_compile.runtime.state.suffix_sizes import capacity_of

COMPILER = "inductor"
GROWING = 2  # cycles before those that are timed
PARTS = ("draft", "score", "resample", "host")
REGIONS = {"draft": ("draft_head", "draft_step"), "score": ("score", "target_step"), "resample": ("weigh",)}


class Point(NamedTuple):
    """The settings that a sweep moves. K = 0 is the one-token loop, whose cycle is a token."""

    n_particles: int
    lookahead: int
    prompt_length: int
    new_tokens: int
    requests: int

    @property
    def loop(self) -> Point:
        """The one-token loop on the same requests."""
        return self._replace(n_particles=1, lookahead=0)


@dataclass(frozen=True)
class Timing:
    """Seconds of a cycle in one round, and bytes that its caches hold."""

    seconds: float
    parts: dict[str, float]  # of PARTS; they sum to ``seconds``. Empty where cycles were replayed: parts are not timed
    cycles: int  # how many were timed
    resamplings: int  # of a request, in these cycles
    compile_seconds: float
    prompt_bytes: int  # once a request
    suffix_bytes: int  # of all particles
    predicted: float | None  # seconds by the cost model; None of the one-token loop


TimePoint = Callable[[Point, int], Timing]  # point, seed


@dataclass
class Measured:
    """Every round that was run.

    Attributes:
        timings: of each point, one a round.
        failures: points without any, and why.
        interrupted: whether Ctrl-C ended it.
    """

    timings: dict[Point, list[Timing]] = field(default_factory=dict)
    failures: dict[Point, str] = field(default_factory=dict)
    interrupted: bool = False


def measure_points(
    points: Sequence[Point], names: Sequence[str], time_point: TimePoint, repeats: int, seed: int, console: Console
) -> Measured:
    """Time all points in turn, ``repeats`` rounds. A point that is refused is left out from then on; Ctrl-C ends the
    measurement and keeps every run."""
    measured = Measured()
    with progress_bar(console) as progress:
        task = progress.add_task("", total=len(points) * repeats)
        try:
            for round_ in range(repeats):
                for point, name in zip(points, names, strict=True):
                    verb = "compiling" if round_ == 0 else f"round {round_ + 1} of {repeats}:"
                    progress.update(task, description=f"{verb} {name}")
                    time_or_refuse(point, time_point, seed + round_, measured)
                    progress.advance(task)
        except KeyboardInterrupt:
            measured.interrupted = True
    return measured


def time_or_refuse(point: Point, time_point: TimePoint, seed: int, measured: Measured) -> None:
    """Time a point that has not failed once more, or note why it fails."""
    if point in measured.failures:
        return
    try:
        timing = time_point(point, seed)
    except (SMCError, MemoryError, RuntimeError) as error:
        if not isinstance(error, SMCError) and not out_of_memory(error):
            raise
        measured.failures[point] = reason(error)
        measured.timings.pop(point, None)
    else:
        measured.timings.setdefault(point, []).append(timing)


def out_of_memory(error: Exception) -> bool:
    """Whether an allocation failed; on a CPU torch says so in words only."""
    words = ("can't allocate memory", "not enough memory")
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(word in str(error) for word in words)


def point_timer(target: Llama, draft: Llama, temperature: float, cycles: int) -> TimePoint:
    """How to time ``cycles`` cycles at a point. Sessions, and what they compiled, stay for the next round."""
    device = target.embedding.weight.device
    programs: dict[tuple[int, int], Program] = {}
    models: list[CycleModel] = []  # counted and calibrated once

    def time_point(point: Point, seed: int) -> Timing:
        span = middle(point.new_tokens, point.lookahead + 1, cycles)
        key = point.n_particles, point.lookahead
        if key not in programs:
            programs[key] = program_of(point, target, draft)
        program = programs[key]
        ids = random_prompt(target.config.vocab_size, point.requests * point.prompt_length, device, seed)
        ids = ids.view(point.requests, point.prompt_length)
        settings = settings_of(point.requests, temperature=temperature)
        request = build_request(ids, point.new_tokens, request_seeds(seed, ids), settings=settings)
        check_request(request, program.target, program.draft)
        session = program.session
        assert isinstance(session, (SMCSession, AutoregressiveSession))
        if point.lookahead and not models:
            models.append(cycle_model(program.target, program.draft))
        return time_cycles(session, request, *span, predictor(models[0], point) if point.lookahead else None)

    return time_point


def predictor(model: CycleModel, point: Point) -> Callable[[float, float], float]:
    """(slots of a suffix, slots that are filled) -> predicted seconds of a cycle."""
    return lambda slots, held: model.seconds_at(
        point.n_particles, point.lookahead, point.prompt_length, slots, held, point.requests
    )


def program_of(point: Point, target: Llama, draft: Llama) -> Program:
    """SMC of N and K, or the one-token loop."""
    smc = {"draft": draft, "n_particles": point.n_particles, "lookahead": point.lookahead}
    given = smc if point.lookahead else {"method": "autoregressive"}
    device = target.embedding.weight.device
    processors = sort_processors((), ["temperature"], target.config.vocab_size, device=device)
    ids = torch.zeros(1, 1, dtype=torch.int64, device=device)
    return program_for(target, processors, False, Options.parse(given | {"compiler": COMPILER}), ids)


def middle(new_tokens: int, width: int, cycles: int) -> tuple[int, int]:
    """After how many tokens to begin, and how many cycles of ``width`` tokens to time.

    These cycles, and two before them in which the suffixes grow, lie around the middle of the new tokens; none is the
    first or the last.

    Raises:
        InputError: where not even one fits.
    """
    timed = min(cycles, (new_tokens - 3) // width - GROWING)
    if timed < 1:
        raise InputError(
            f"{new_tokens} new tokens are too few to time a cycle of {width}.",
            f"a cycle in the middle is timed, after {GROWING} that are not",
            f"ask for at least {(GROWING + 1) * width + 3} new tokens",
        )
    return max(2, (new_tokens - (GROWING + timed) * width) // 2), timed


def time_cycles(
    session: SMCSession | AutoregressiveSession,
    request: Request,
    begin: int,
    timed: int,
    predict: Callable[[float, float], float] | None,
) -> Timing:
    """Prefill, go to where ``begin`` tokens are generated, run two cycles, which compile, and time those after."""
    compiled = sum(region.compile_seconds for region in session.regions)
    running = session.cycles(request)
    run = next(running)
    run.p.state.generated.fill_(begin)
    run.p.made.fill_(begin)
    run.unread = 2
    run.p.state.weights.shared.fill_(begin - 1)  # by then all particles descend from one that is not long gone
    for _ in range(GROWING):
        next(running)
    first, before, resamplings, start = run.p.generated, spent(session, run), run.stats.resamplings, now(request)
    for _ in range(timed):
        next(running)
    seconds = now(request) - start
    after = spent(session, run)
    passed = {name: (after[name] - before[name]) / timed for name in after}
    seconds = seconds / timed - passed.pop("compile")
    parts = {} if run.stats.replayed else passed | {"host": max(seconds - sum(passed.values()), 0.0)}
    return Timing(
        seconds=seconds,
        parts=parts,
        cycles=timed,
        resamplings=run.stats.resamplings - resamplings,
        compile_seconds=sum(region.compile_seconds for region in session.regions) - compiled,
        prompt_bytes=sum(cache.nbytes for prompts, *_ in run.contexts for cache in prompts),
        suffix_bytes=sum(cache.nbytes for cache in [*run.p.state.target, *run.p.state.draft]),
        predicted=predict and predict(run.p.state.target[0].shape[2], (first + run.p.generated) / 2),
    )


def spent(session: SMCSession | AutoregressiveSession, run: Run) -> dict[str, float]:
    """Seconds so far of each part but the host, and of compilation."""
    regions = session.regions
    found = {part: sum(r.seconds for r in regions if r.name in names) for part, names in REGIONS.items()}
    found["resample"] += run.clock.resample_seconds
    return found | {"compile": sum(region.compile_seconds for region in regions)}


def now(request: Request) -> float:
    """The clock in seconds, after the device has finished its work."""
    if request.ids.device.type == "cuda":
        torch.cuda.synchronize(request.ids.device)
    return time.perf_counter()


# ---- memory ---------------------------------------------------------------------------------------------------------


def cache_bytes(point: Point, bytes_per_token: int) -> tuple[int, int]:
    """Of the prompts, and of the suffixes of all particles once they hold the whole answer."""
    rows, capacity = point.requests * point.n_particles, capacity_of(point.new_tokens, point.lookahead + 1)
    return point.requests * point.prompt_length * bytes_per_token, rows * capacity * bytes_per_token


def too_large(point: Point, target: LlamaConfig, draft: LlamaConfig, itemsize: int, free: int | None) -> str | None:
    """Why a point cannot fit into ``free`` bytes, with the largest N that does; None where it may."""
    per_token, width = itemsize * (cache_numbers(target) + cache_numbers(draft)), point.lookahead + 1
    prompts, suffix = cache_bytes(point._replace(n_particles=1), per_token)
    row = row_bytes(suffix // point.requests, capacity_of(point.new_tokens, width), width, 4 * target.vocab_size)
    need = Need(prompts, point.requests * row)
    if free is None or need.of(point.n_particles) <= free:
        return None
    n, fits = point.n_particles, need.most(free)
    return (
        f"caches, tokens and logits take at least {readable(need.of(n))}, and {readable(free)} are free: "
        f"{readable(need.shared)} for the prompts, {readable(need.each)} for each of {n} particles; "
        + (f"N={fits} fits" if fits else "not even N=1 fits")
    )
