"""``smc-compile quality``: speed against error, on the shipped pair."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from smc_compile.bench.error_plot import draw_quality
from smc_compile.bench.figures import Row, make_rows
from smc_compile.bench.measure import measure
from smc_compile.bench.plots import check_plot_path
from smc_compile.bench.report import check_json_path, device_name, write_json
from smc_compile.bench.speed_and_error import Task, best_within, errors, way, with_errors
from smc_compile.bench.tables import compile_line, number
from smc_compile.commands.arguments import check_least, pair_shapes, prompt_ids
from smc_compile.options import MAX_KL
from smc_compile.pairs.shipped import PROMPT, load_pair

HELP = """\
Show speed against error: how fast each way to write is, and how far its texts are from the target's law.

The shipped pair of models, or another one, continues a prompt: by the compiled one-token loop and by exact
speculation, which have no error; by SMC at several N, with blocks that are cut where the models part and with whole
ones; and by "auto", which keeps to a floor. The error is the mean of kl_bound a token over
independent texts, which bounds how far their law is from the target's; speeds are medians of rounds in which all take
turns. Takes about ten minutes on two cores, most of it compilation.

  smc-compile quality --plot quality.svg
  smc-compile quality --n-particles 4 8 --lookahead 2 4 8 --max-divergence 0.2 0.35 1 --json rows.json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``quality``."""
    parser.add_argument("--pair", metavar="FOLDER", help="a pair by examples/train_pair.py (default: the shipped)")
    parser.add_argument("--prompt", metavar="TEXT", help="text to continue (default: the head of a function)")
    parser.add_argument("--n-particles", type=int, nargs="+", default=[2, 4, 8], metavar="N", help="particles")
    parser.add_argument(
        "--lookahead", type=int, nargs="+", default=[4], metavar="K", help="draft tokens a cycle; one, or one per N"
    )
    parser.add_argument(
        "--max-divergence", type=float, nargs="+", default=[0.35, 1.0], metavar="D",
        help="where blocks are cut; 1 keeps them whole",
    )  # fmt: skip
    parser.add_argument("--exact-lookahead", type=int, default=3, metavar="K", help="of exact speculation")
    parser.add_argument("--skip-auto", action="store_true", help='leave "auto" out')
    parser.add_argument("--max-kl-per-token", type=float, default=MAX_KL, metavar="D", help='the floor of "auto"')
    parser.add_argument("--max-new-tokens", type=int, default=96, metavar="T", help="tokens to generate")
    parser.add_argument("--temperature", type=float, default=0.8, metavar="T", help="temperature")
    parser.add_argument("--repeats", type=int, default=3, metavar="R", help="timed rounds")
    parser.add_argument("--texts", type=int, default=64, metavar="M", help="independent texts whose error is measured")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="seed of the timed rounds")
    parser.add_argument("--json", metavar="FILE", help="write the rows to FILE")
    parser.add_argument("--plot", metavar="FILE", help="draw the rows: FILE ends in .svg or .png (needs matplotlib)")


def run(arguments: argparse.Namespace, console: Console) -> None:
    """Measure, print the table, draw, write."""
    check_json_path(arguments.json)
    check_plot_path(arguments.plot)
    check_least(arguments, repeats=1, texts=2, max_new_tokens=2)
    target, draft, tokenizer, _ = load_pair(folder=arguments.pair)
    ids = prompt_ids(tokenizer, PROMPT if arguments.prompt is None else arguments.prompt)
    task = Task(target, draft, ids, arguments.max_new_tokens, arguments.temperature)
    settings = settings_of(arguments)
    contestants = [way(task, options) for options in settings]
    measured = measure(contestants, arguments.repeats, arguments.seed, console)
    if measured.interrupted:
        raise KeyboardInterrupt
    found = errors(task, contestants, settings, arguments.texts, console)
    names = [contestant.name for contestant in contestants]
    rows = with_errors(make_rows(measured.results), names, found)
    console.print(place(arguments), style="dim", highlight=False)
    console.print()
    console.print(quality_table(rows, names))
    console.print()
    for line in [*lines(rows, names, arguments.max_kl_per_token), compile_line(measured.results)]:
        console.print(line, style="dim", highlight=False)
    if arguments.plot:
        title = f"Speed against error: {arguments.pair or 'the shipped pair'}"
        draw_quality(rows, arguments.plot, title, place(arguments))
        console.print(f"plot in {arguments.plot}", style="dim", highlight=False)
    if arguments.json:
        stored = {name: value for name, value in vars(arguments).items() if name != "run"}
        write_json(arguments.json, "quality", stored, rows)
        console.print(f"rows in {arguments.json}", style="dim", highlight=False)


def settings_of(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """The options of each way."""
    smc = [
        {"method": "smc", "n_particles": n, "lookahead": k, "max_divergence": cut}
        for cut in arguments.max_divergence
        for n, k in pair_shapes(arguments.n_particles, arguments.lookahead)
    ]
    auto = [] if arguments.skip_auto else [{"method": "auto", "max_kl_per_token": arguments.max_kl_per_token}]
    exact = {"method": "speculative", "n_particles": 1, "lookahead": arguments.exact_lookahead}
    return [{"method": "autoregressive"}, exact, *smc, *auto]


def place(arguments: argparse.Namespace) -> str:
    """What is generated, and where."""
    threads = torch.get_num_threads()
    return (
        f"{arguments.max_new_tokens} tokens at temperature {arguments.temperature:g}, float32, "
        f"{device_name(torch.device('cpu'))}, {threads} thread{'s' if threads > 1 else ''}, torch {torch.__version__}"
    )


def quality_table(rows: Sequence[Row], names: Sequence[str]) -> Table:
    """A row for each way."""
    table = Table(box=None, padding=(0, 1, 0, 0), header_style="bold", pad_edge=False)
    table.add_column("method", no_wrap=True)
    for title in ("tokens/s", "over\nloop", "nats a token\nfrom the target", "log p\na token", "mean\nESS"):
        table.add_column(title, justify="right", no_wrap=True)
    best = max(row["tokens_per_second"] for row in rows)
    for row, name in zip(rows, names, strict=True):
        exact = row["method"] in ("autoregressive", "speculative")
        far = "exact" if exact else f"{row['kl_per_token']:.4f} ± {row['kl_per_token_stderr']:.4f}"
        table.add_row(
            name,
            number(row["tokens_per_second"]),
            number(row["speedup_over_autoregressive"], "x"),
            far,
            f"{row['mean_log_prob']:.3f} ± {row['mean_log_prob_stderr']:.3f}",
            number(row["mean_ess"]) or "-",
            style="bold green" if row["tokens_per_second"] == best else None,
        )
    return table


def lines(rows: Sequence[Row], names: Sequence[str], floor: float) -> list[str]:
    """How to read the table."""
    dropped = [name for row, name in zip(rows, names, strict=True) if row["texts_with_dropped_blocks"]]
    return [
        f"the fastest within {floor:g} nats a token: {best_within(rows, names, floor)}; of the exact ones: "
        f"{best_within(rows, names, 0.0)}",
        f"errors: {rows[0]['texts']} texts each; speeds: medians of {rows[0]['repeats']} rounds",
        *[f"{name}: nan, since blocks were dropped whose particles would all have died" for name in dropped],
    ]
