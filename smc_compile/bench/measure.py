"""Timing several ways to generate side by side.

Every contestant is warmed up first (that is where compilation happens, reported apart). Then all of them run once a
round, in turn, so that a machine which slows down slows all of them; a ratio is the median over rounds of the ratio
within a round.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from torch import Tensor

from smc_compile.bench.against_eager import Agreement
from smc_compile.bench.ceilings import PassCost
from smc_compile.bench.peak_memory import peak_bytes, reset_peak
from smc_compile.errors import SMCError
from smc_compile.result import Generation

Produced = Tensor | Generation
CPU = torch.device("cpu")
NAMES = {"eager": "eager loop", "autoregressive": "compiled loop"}  # of methods, in a table
UNCOMPILED = ("eager", "transformers", "assisted")


@dataclass(frozen=True)
class Contestant:
    """One way to generate: ``run(seed)`` gives the sequences [B, P+n], or a Generation that holds them.

    ``method`` is "eager", "autoregressive", "speculative", "smc", "auto", or the name of a peer ("transformers", ...).
    """

    method: str
    run: Callable[[int], Produced]
    new_tokens: int
    n_particles: int | None = None
    lookahead: int | None = None
    note: str | None = None
    warm_up: Callable[[int], Produced] | None = None  # a shorter first call than ``run``
    batch: int = 1
    passes: Sequence[PassCost] | None = None  # what a step reads and multiplies at least
    steps: Callable[[], int] | None = None  # of the last run, where a step is no token and ``run`` gives no Generation
    peer: bool = False  # somebody else's code: where it fails, the others go on
    max_divergence: float | None = None  # where blocks are cut, if that is told

    @property
    def name(self) -> str:
        numbers = [
            f"N={self.n_particles}"
            if self.n_particles is not None and (self.method, self.n_particles) != ("speculative", 1)
            else "",
            f"K={self.lookahead}" if self.lookahead is not None else "",
            cut_name(self.max_divergence),
        ]
        shape = " ".join(text for text in numbers if text)
        return NAMES.get(self.method, self.method) + (f"  {shape}" if shape else "")


def cut_name(max_divergence: float | None) -> str:
    """Where blocks are cut, in a table."""
    if max_divergence is None:
        return ""
    return f"cut {max_divergence:g}" if max_divergence < 1 else "whole"


@dataclass(frozen=True)
class TimedCall:
    """One timed call. ``seconds`` is wall-clock without compilation."""

    seconds: float
    compile_seconds: float
    sequences: Tensor
    generation: Generation | None
    steps: int = 1  # cycles, or tokens of a one-token loop
    peak_bytes: int | None = None  # the most memory held during the call


@dataclass(frozen=True)
class Result:
    """All calls of one contestant: the first, which compiled, and the timed ones."""

    contestant: Contestant
    first: TimedCall
    runs: list[TimedCall]


@dataclass
class Measurement:
    """What was measured, in the order of the table.

    Attributes:
        results: contestants with at least one timed call, each of as many rounds.
        failures: contestants that have none, and why.
        interrupted: whether Ctrl-C ended it; only whole rounds are in ``results`` then, or what ran of the first.
        agreements: of each of ours with the eager model, by name.
    """

    results: list[Result] = field(default_factory=list)
    failures: dict[str, str] = field(default_factory=dict)
    interrupted: bool = False
    agreements: dict[str, Agreement] = field(default_factory=dict)


def measure(
    contestants: Sequence[Contestant],
    repeats: int,
    seed: int,
    console: Console,
    device: torch.device = CPU,
    check: Callable[[str, Generation], Agreement] | None = None,
) -> Measurement:
    """Warm every contestant up, then run all of them in turn, ``repeats`` rounds.

    SMC is warmed up first: a bad N or K is then reported before anything slow has run. Ctrl-C ends the measurement and
    keeps what has been measured.

    Args:
        check: compares a generation of ours, given its name, with the eager model before anything is timed.
            It raises where the generation is wrong.
    """
    first: dict[int, TimedCall] = {}
    runs: dict[int, list[TimedCall]] = {index: [] for index in range(len(contestants))}
    failures: dict[int, str] = {}
    agreements: dict[str, Agreement] = {}
    interrupted = False
    with progress_bar(console) as progress:
        task = progress.add_task("", total=len(contestants) * (repeats + 1))
        try:
            for index, contestant in reversed(list(enumerate(contestants))):
                verb = "warming up" if contestant.method in UNCOMPILED else "compiling"
                progress.update(task, description=f"{verb} {contestant.name}")
                warm_up = replace(contestant, run=contestant.warm_up or contestant.run)
                answer = attempted(warm_up, seed, device)
                if isinstance(answer, TimedCall):
                    first[index] = answer
                else:
                    failures[index] = answer
                progress.advance(task)
                if check and isinstance(answer, TimedCall) and answer.generation:
                    progress.update(task, description=f"checking {contestant.name} against the eager model")
                    agreements[contestant.name] = check(contestant.name, answer.generation)
            for round_ in range(repeats):
                for index, contestant in enumerate(contestants):
                    progress.update(task, description=f"round {round_ + 1} of {repeats}: {contestant.name}")
                    answer = failures.get(index) or attempted(contestant, seed + round_, device)
                    if isinstance(answer, TimedCall):
                        runs[index].append(answer)
                    else:
                        failures[index] = answer
                    progress.advance(task)
        except KeyboardInterrupt:
            interrupted = True
    return replace(conclude(contestants, first, runs, failures, interrupted), agreements=agreements)


def conclude(
    contestants: Sequence[Contestant],
    first: dict[int, TimedCall],
    runs: dict[int, list[TimedCall]],
    failures: dict[int, str],
    interrupted: bool,
) -> Measurement:
    """Whole rounds only, so that ratios compare what ran next to each other; or what ran of the first round."""
    living = [index for index in runs if index not in failures]
    rounds = max(1, min((len(runs[index]) for index in living), default=0))
    measured = [index for index in living if runs[index]]
    missing = {contestants[index].name: why for index, why in sorted(failures.items())}
    missing |= {contestants[index].name: "interrupted before its first round" for index in living if not runs[index]}
    results = [Result(contestants[index], first[index], runs[index][:rounds]) for index in measured]
    return Measurement(results, missing, interrupted)


def attempted(contestant: Contestant, seed: int, device: torch.device) -> TimedCall | str:
    """A timed call, or why a peer failed; our own errors are raised."""
    if not contestant.peer:
        return timed(contestant, seed, device)
    try:
        return timed(contestant, seed, device)
    except Exception as error:
        return reason(error)


def reason(error: Exception) -> str:
    """One line about an error, such as one of somebody else's code."""
    if isinstance(error, SMCError):
        return f"{error.what} {error.why}".strip()
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def timed(contestant: Contestant, seed: int, device: torch.device = CPU) -> TimedCall:
    """Call once, wait for the device, and set compilation apart."""
    watched = reset_peak(device)
    begin = time.perf_counter()
    answer = contestant.run(seed)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    seconds = time.perf_counter() - begin
    peak = peak_bytes(device) if watched else None
    if isinstance(answer, Tensor):
        steps = contestant.steps() if contestant.steps else contestant.new_tokens
        return TimedCall(seconds, 0.0, answer, None, steps, peak)
    compiling = answer.stats.compile_seconds
    steps = answer.stats.cycles if contestant.method != "autoregressive" else contestant.new_tokens
    return TimedCall(max(seconds - compiling, 1e-9), compiling, answer.sequences, answer, max(1, steps), peak)


def progress_bar(console: Console) -> Progress:
    """A bar that disappears when done."""
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description:<34}"),
        BarColumn(30),
        TimeElapsedColumn(),
        console=console,
        transient=True,
        refresh_per_second=4,  # it shares two cores with what is being timed
        disable=not console.is_terminal,
    )
