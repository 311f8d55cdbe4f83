"""``smc-compile sweep``: how the cost of a cycle moves with N, K, prompt length, new tokens and requests."""

from __future__ import annotations

import argparse
import itertools
import math
from collections.abc import Sequence
from dataclasses import asdict
from statistics import median, median_low
from typing import Any, NamedTuple

import torch
from rich.console import Console

from smc_compile.bench.ceilings import Ceilings, Costs, costs, cycle_passes, least_seconds, measure_ceilings
from smc_compile.bench.figures import Row
from smc_compile.bench.plots import check_plot_path, draw
from smc_compile.bench.report import check_json_path, device_name, write_json
from smc_compile.bench.setting import build_pair, rates, set_threads, warn_of_emulation
from smc_compile.bench.sweep_points import PARTS, Measured, Point, Timing, measure_points, point_timer, too_large
from smc_compile.bench.sweep_tables import sweep_table
from smc_compile.commands.arguments import add_pair_arguments, check_arguments
from smc_compile.errors import OptionError
from smc_compile.pairs.llama import cache_numbers
from smc_compile.pairs.presets import DTYPES, configs, fill_in, weight_count
from smc_compile.runtime.execution.memory import free_bytes

HELP = """\
Show how the cost of a cycle moves with N, K, prompt length, new tokens and requests.

One axis moves at a time, or two as a grid; everything else stays at the base point. At each point a few cycles in the
middle of the new tokens are timed, with caches as large as they are there, after a prefill that does not count:
tokens/s are those of decoding. The bound is what the machine, measured on the spot, needs at least to read and
multiply. Points take turns, so that a machine which slows down slows all. What does not fit in memory is named and
left out; Ctrl-C keeps what was measured.

  smc-compile sweep
  smc-compile sweep --over prompt_length --values 128 1024 8192 --plot prompt.svg
  smc-compile sweep --over n_particles lookahead --values 1 4 16 --values 2 4 8 --json grid.json --plot grid.png
  smc-compile sweep --over new_tokens --layers 4 --draft-layers 1 --vocab 4096 --acceptance none --dtype float32
"""
VALUES = {  # of each axis, where none are given
    "n_particles": [1, 2, 4, 8, 16, 32, 64],
    "lookahead": [1, 2, 4, 8, 12, 16],
    "prompt_length": [128, 512, 2048, 8192],
    "new_tokens": [64, 256, 1024, 2048],
    "requests": [1, 2, 4, 8],
}
LETTERS = {"n_particles": "N", "lookahead": "K", "prompt_length": "prompt", "new_tokens": "new", "requests": "requests"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``sweep``."""
    axes = parser.add_argument_group("axes")
    axes.add_argument(
        "--over", nargs="+", choices=list(VALUES), default=["n_particles"], metavar="AXIS",
        help=f"what moves, one or two of {', '.join(VALUES)}",
    )  # fmt: skip
    axes.add_argument(
        "--values", type=int, nargs="+", action="append", metavar="V",
        help="its values; once for each axis (default: powers of two, as far as one usually goes)",
    )  # fmt: skip
    base = parser.add_argument_group("base point")
    base.add_argument("--n-particles", type=int, default=8, metavar="N", help="particles")
    base.add_argument("--lookahead", type=int, default=4, metavar="K", help="draft tokens a cycle")
    base.add_argument("--prompt-length", type=int, default=128, metavar="P", help="tokens of the prompt")
    base.add_argument(
        "--new-tokens", type=int, default=64, metavar="T", help="tokens to generate; cycles in the middle are timed"
    )
    base.add_argument("--requests", type=int, default=1, metavar="B", help="requests at once")
    base.add_argument("--temperature", type=float, default=0.8, metavar="T", help="temperature")
    add_pair_arguments(parser)
    run_ = parser.add_argument_group("measurement")
    run_.add_argument("--cycles", type=int, default=4, metavar="C", help="timed cycles a point and round")
    run_.add_argument("--repeats", type=int, default=3, metavar="R", help="timed rounds")
    run_.add_argument("--skip-loop", action="store_true", help="leave the compiled one-token loop out")
    run_.add_argument("--threads", type=int, metavar="T", help="CPU threads (default: torch's choice)")
    run_.add_argument("--json", metavar="FILE", help="write the rows to FILE")
    run_.add_argument("--plot", metavar="FILE", help="draw the rows: FILE ends in .svg or .png (needs matplotlib)")


class Axis(NamedTuple):
    name: str
    values: list[int]


def run(arguments: argparse.Namespace, console: Console) -> None:
    """Measure, print the table, write the files; raises KeyboardInterrupt after that where it was interrupted."""
    axes = chosen_axes(arguments.over, arguments.values)
    check_json_path(arguments.json)
    check_plot_path(arguments.plot)
    fill_in(arguments)
    check_arguments(arguments, ("n_particles", "lookahead", "requests", "cycles"))
    set_threads(arguments)
    points, refused = fitting(grid(axes, arguments), arguments)
    target_config, draft_config = configs(*widest(points, arguments))
    target, draft, tuned = build_pair(arguments, target_config, draft_config, 0, console)
    console.print(base_line(axes, arguments), highlight=False, style="dim")
    warn_of_emulation(arguments, console)
    console.print()
    place = DTYPES[arguments.dtype], torch.device(arguments.device)
    ceilings = measure_ceilings(*place)
    loops = [] if arguments.skip_loop else list(dict.fromkeys(point.loop for point in points))
    asked = [*loops, *points]
    timer = point_timer(target, draft, arguments.temperature, arguments.cycles)
    names = [point_name(point, axes) for point in asked]
    measured = measure_points(asked, names, timer, arguments.repeats, arguments.seed, console)
    measured.failures = refused | measured.failures
    if not measured.interrupted:
        ceilings = ceilings.better(measure_ceilings(*place))
    sizes = costs(target, cache_numbers(target_config)), costs(draft, cache_numbers(draft_config))
    rows = make_rows([point for point in points if point in measured.timings], measured, sizes, ceilings)
    failures = {point_name(point, axes): why for point, why in measured.failures.items()}
    show(rows, failures, measured, ceilings, axes, arguments, console)
    if arguments.json:
        stored = {name: value for name, value in vars(arguments).items() if name != "run"}
        more: dict[str, Any] = {
            "axes": {axis.name: axis.values for axis in axes},
            "tuned": asdict(tuned) if tuned else None,
            "ceilings": asdict(ceilings),
            "not_measured": failures,
            "interrupted": measured.interrupted,
        }
        write_json(arguments.json, "sweep", stored, rows, **more)
        console.print(f"rows in {arguments.json}", style="dim", highlight=False)
    if arguments.plot and rows:
        draw(rows, [axis.name for axis in axes], arguments.plot, *headings(axes, arguments))
        console.print(f"plot in {arguments.plot}", style="dim", highlight=False)
    if measured.interrupted:
        raise KeyboardInterrupt


# ---- points ---------------------------------------------------------------------------------------------------------


def chosen_axes(over: Sequence[str], values: Sequence[list[int]] | None) -> list[Axis]:
    """Raises OptionError unless there are one or two, each once, with values of at least 1."""
    if len(over) > 2 or len(set(over)) < len(over):
        raise OptionError("--over takes one axis, or two different ones.", f"got {' '.join(over)}")
    if values is not None and len(values) != len(over):
        raise OptionError(
            "--over and --values do not go together.",
            f"{len(over)} axes, and --values was given {len(values)} times",
            "give --values once for each axis, in the order of --over, or leave it out",
        )
    axes = [Axis(name, sorted(set(own))) for name, own in zip(over, values or [VALUES[n] for n in over], strict=True)]
    for axis in axes:
        if axis.values[0] < 1:
            raise OptionError("--values must be at least 1.", f"got {axis.values[0]} for {axis.name}")
    return axes


def grid(axes: Sequence[Axis], arguments: argparse.Namespace) -> list[Point]:
    """The base point with every combination of values on the axes, the last axis fastest."""
    base = Point(*(getattr(arguments, name) for name in Point._fields))
    names = [axis.name for axis in axes]
    return [
        base._replace(**dict(zip(names, values, strict=True)))
        for values in itertools.product(*(axis.values for axis in axes))
    ]


def fitting(points: Sequence[Point], arguments: argparse.Namespace) -> tuple[list[Point], dict[Point, str]]:
    """Points whose caches may fit beside the weights, and why the others cannot: before anything is allocated.

    Raises:
        OptionError: where none fits.
    """
    target, draft = configs(arguments, arguments.lookahead)
    free = free_bytes(torch.device(arguments.device))
    itemsize = DTYPES[arguments.dtype].itemsize
    room = None if free is None else free - itemsize * (weight_count(target) + weight_count(draft))
    reasons = {point: too_large(point, target, draft, itemsize, room) for point in points}
    refused = {point: why for point, why in reasons.items() if why is not None}
    if len(refused) == len(points):
        raise OptionError("No point of the sweep fits in memory.", next(iter(refused.values())), "ask for less")
    return [point for point in points if point not in refused], refused


def widest(points: Sequence[Point], arguments: argparse.Namespace) -> tuple[argparse.Namespace, int]:
    """Arguments that give the models positions enough for every point, and the largest K."""
    longest = {name: max(getattr(p, name) for p in points) for name in ("prompt_length", "new_tokens")}
    return argparse.Namespace(**(vars(arguments) | longest)), max(point.lookahead for point in points)


def point_name(point: Point, axes: Sequence[Axis]) -> str:
    """What tells a point from the others."""
    names = [axis.name for axis in axes if point.lookahead or axis.name not in ("n_particles", "lookahead")]
    words = [f"{LETTERS[name]}={getattr(point, name)}" for name in names]
    return " ".join(words if point.lookahead else ["loop", *words])


# ---- figures --------------------------------------------------------------------------------------------------------


def make_rows(points: Sequence[Point], measured: Measured, sizes: tuple[Costs, Costs], ceilings: Ceilings) -> list[Row]:
    """One row a point, in the words of the JSON file. The parts are those of the median round."""
    return [make_row(point, measured.timings, sizes, ceilings) for point in points]


def make_row(point: Point, timings: dict[Point, list[Timing]], sizes: tuple[Costs, Costs], ceilings: Ceilings) -> Row:
    rounds = timings[point]
    middle = median_low(timing.seconds for timing in rounds)
    typical = next(timing for timing in rounds if timing.seconds == middle)
    batch, tokens = point.requests, point.requests * (point.lookahead + 1)
    rows, prompts = batch * point.n_particles, batch * point.prompt_length
    passes = cycle_passes(*sizes, rows, point.lookahead, prompts, point.new_tokens)
    bound = least_seconds(ceilings, passes)
    loops = timings.get(point.loop, [])
    loop = batch / median_low(timing.seconds for timing in loops) if loops else None
    return {
        **point._asdict(),
        "repeats": len(rounds),
        "cycles": typical.cycles,
        "tokens_per_second": tokens / middle,
        "tokens_per_second_min": tokens / max(timing.seconds for timing in rounds),
        "tokens_per_second_max": tokens / min(timing.seconds for timing in rounds),
        "bound_tokens_per_second": tokens / bound,
        "loop_tokens_per_second": loop,
        "ms_per_cycle": 1e3 * middle,
        "predicted_ms_per_cycle": None if typical.predicted is None else 1e3 * typical.predicted,
        **{f"{part}_ms": 1e3 * typical.parts[part] if typical.parts else None for part in PARTS},
        "bound_ms_per_cycle": 1e3 * bound,
        "share_of_bound": bound / middle,
        "bytes_per_cycle": sum(one.bytes for one in passes),
        "prompt_cache_bytes": typical.prompt_bytes,
        "suffix_cache_bytes": typical.suffix_bytes,
        "resamplings_per_cycle": median(timing.resamplings / timing.cycles for timing in rounds),
        "compile_seconds": rounds[0].compile_seconds,
    }


# ---- words ----------------------------------------------------------------------------------------------------------


def show(
    rows: Sequence[Row],
    failures: dict[str, str],
    measured: Measured,
    ceilings: Ceilings,
    axes: Sequence[Axis],
    arguments: argparse.Namespace,
    console: Console,
) -> None:
    """The table, what is not in it, and how to read it."""
    if measured.interrupted:
        wanted = math.prod(len(axis.values) for axis in axes)
        text = f"interrupted: {len(rows)} of {wanted} points measured, some in fewer rounds than {arguments.repeats}"
        console.print(text, style="yellow", highlight=False)
    if rows:
        console.print(sweep_table(rows, {axis.name: LETTERS[axis.name] for axis in axes}))
        console.print()
    for name, why in failures.items():
        console.print(f"{name}: not measured: {why}", markup=False, highlight=False)
    if not rows and not measured.interrupted:
        raise OptionError("No point of the sweep could be measured.", "each is named above with its reason")
    for line in [*footnotes(rows), bound_line(ceilings)] if rows else []:
        console.print(line, style="dim", markup=False, highlight=False)


def footnotes(rows: Sequence[Row]) -> list[str]:
    """How to read the table."""
    spread = max(row["tokens_per_second_max"] / row["tokens_per_second_min"] for row in rows)
    return [
        f"medians of {max(row['repeats'] for row in rows)} rounds, decoding alone; the fastest round of a point is up "
        f"to {spread:.2f}x its slowest; compiled once, not in the table: "
        f"{sum(row['compile_seconds'] for row in rows):.0f} s",
        "read: weights and caches, at half of the new tokens; prompt, suffixes: the caches as they were allocated",
        prediction_line(rows),
    ]


def prediction_line(rows: Sequence[Row]) -> str:
    """How far the model that chooses "auto" is off."""
    errors = sorted(abs(row["predicted_ms_per_cycle"] / row["ms_per_cycle"] - 1) for row in rows)
    line = (
        "predicted: by counted costs and rates measured before, as for n_particles or lookahead 'auto'; off by "
        f"{median(errors):.0%} in the middle, {errors[-1]:.0%} at most"
    )
    picks = best_lookaheads(rows)
    return line + (f"; fastest K, predicted and measured: {', '.join(picks)}" if picks else "")


def best_lookaheads(rows: Sequence[Row]) -> list[str]:
    """The K with the most tokens a second as predicted and as measured, for each set of rows with several K."""

    def fastest(mine: Sequence[Row], milliseconds: str) -> int:
        return int(max(mine, key=lambda row: (row["lookahead"] + 1) / row[milliseconds])["lookahead"])

    others = [name for name in Point._fields if name != "lookahead"]
    moving = [name for name in others if len({row[name] for row in rows}) > 1]
    groups: dict[tuple[int, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in moving), []).append(row)
    return [
        " ".join(f"{LETTERS[name]}={value}" for name, value in zip(moving, key, strict=True))
        + f"{' ' if key else ''}{fastest(mine, 'predicted_ms_per_cycle')} and {fastest(mine, 'ms_per_cycle')}"
        for key, mine in groups.items()
        if len(mine) > 1 and len({row["lookahead"] for row in mine}) > 1
    ]


def bound_line(ceilings: Ceilings) -> str:
    """What the bound is made of."""
    return f"{rates(ceilings)}: the bound is what a cycle must read and multiply at these rates"


def base_line(axes: Sequence[Axis], arguments: argparse.Namespace) -> str:
    """What does not move, and where it runs."""
    return f"{standing(axes, arguments)}, {place_line(arguments)}"


def standing(axes: Sequence[Axis], arguments: argparse.Namespace) -> str:
    """The part of the base point that stays."""
    words = {
        "n_particles": f"N={arguments.n_particles}",
        "lookahead": f"K={arguments.lookahead}",
        "prompt_length": f"prompt of {arguments.prompt_length}",
        "new_tokens": f"{arguments.new_tokens} new tokens",
        "requests": f"{arguments.requests} request" + ("s" if arguments.requests > 1 else ""),
    }
    return ", ".join(text for name, text in words.items() if name not in {axis.name for axis in axes})


def place_line(arguments: argparse.Namespace) -> str:
    """Type, machine and version."""
    device = device_name(torch.device(arguments.device))
    threads = torch.get_num_threads()
    return f"{arguments.dtype}, {device}, {threads} thread{'s' if threads > 1 else ''}, torch {torch.__version__}"


def headings(axes: Sequence[Axis], arguments: argparse.Namespace) -> tuple[str, str]:
    """Title and second line of a plot."""
    target, draft = (weight_count(config) for config in configs(arguments, arguments.lookahead))
    pair = f"{millions(target)} target, {millions(draft)} draft"
    return f"Speed and cost of an SMC cycle: {pair}", f"{standing(axes, arguments)}  ·  {place_line(arguments)}"


def millions(count: int) -> str:
    """Parameters, in two or three digits."""
    return f"{count / 1e6:.0f}M" if count >= 1e7 else f"{count / 1e6:.2f}M"
