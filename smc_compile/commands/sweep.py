"""``smc-compile sweep``: how the cost of a cycle moves with N, K, prompt length, new tokens and requests."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import asdict
from statistics import median
from typing import Any

import torch
from rich.console import Console

from smc_compile.bench.ceilings import Ceilings, costs, measure_ceilings
from smc_compile.bench.figures import Row
from smc_compile.bench.plots import check_plot_path, draw
from smc_compile.bench.report import check_json_path, device_name, write_json
from smc_compile.bench.setting import build_pair, rates, set_threads, warn_of_emulation
from smc_compile.bench.sweep_axes import LETTERS, VALUES, SweepAxis, chosen_axes, fitting, grid, point_name, widest
from smc_compile.bench.sweep_figures import best_lookaheads, sweep_rows
from smc_compile.bench.sweep_points import Measured, measure_points, point_timer
from smc_compile.bench.tables import sweep_table
from smc_compile.commands.arguments import add_pair_arguments, check_arguments
from smc_compile.errors import OptionError
from smc_compile.pairs.llama import cache_numbers
from smc_compile.pairs.presets import DTYPES, configs, fill_in, weight_count

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
    target, draft, tuned = build_pair(arguments, target_config, draft_config, console)
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
    rows = sweep_rows([point for point in points if point in measured.timings], measured, sizes, ceilings)
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


def show(
    rows: Sequence[Row],
    failures: dict[str, str],
    measured: Measured,
    ceilings: Ceilings,
    axes: Sequence[SweepAxis],
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


def bound_line(ceilings: Ceilings) -> str:
    """What the bound is made of."""
    return f"{rates(ceilings)}: the bound is what a cycle must read and multiply at these rates"


def base_line(axes: Sequence[SweepAxis], arguments: argparse.Namespace) -> str:
    """What does not move, and where it runs."""
    return f"{standing(axes, arguments)}, {place_line(arguments)}"


def standing(axes: Sequence[SweepAxis], arguments: argparse.Namespace) -> str:
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


def headings(axes: Sequence[SweepAxis], arguments: argparse.Namespace) -> tuple[str, str]:
    """Title and second line of a plot."""
    target, draft = (weight_count(config) for config in configs(arguments, arguments.lookahead))
    pair = f"{millions(target)} target, {millions(draft)} draft"
    return f"Speed and cost of an SMC cycle: {pair}", f"{standing(axes, arguments)}  ·  {place_line(arguments)}"


def millions(count: int) -> str:
    """Parameters, in two or three digits."""
    return f"{count / 1e6:.0f}M" if count >= 1e7 else f"{count / 1e6:.2f}M"
