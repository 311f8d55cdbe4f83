"""``smc-compile bench``: what each method costs on weights of given shapes."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import asdict

import torch
from rich.console import Console
from torch import Tensor

from smc_compile.bench.against_eager import Agreement, checked, difference
from smc_compile.bench.ceilings import Ceilings, measure_ceilings
from smc_compile.bench.figures import Row, make_rows
from smc_compile.bench.line_up import EAGER_TOKENS, Peer, all_contestants
from smc_compile.bench.measure import Contestant, Measurement, measure
from smc_compile.bench.report import check_json_path, write_json
from smc_compile.bench.setting import (
    build_pair,
    rates,
    set_threads,
    warn_of_emulation,
    where,
)
from smc_compile.bench.tables import compile_line, range_line, rows_table
from smc_compile.commands.arguments import add_pair_arguments, check_arguments, pair_shapes
from smc_compile.options import INDUCTORS
from smc_compile.pairs.llama import Llama
from smc_compile.pairs.nested import Tuned
from smc_compile.pairs.presets import DTYPES, configs, fill_in
from smc_compile.pairs.random_weights import parameter_count, random_prompt
from smc_compile.result import Generation

HELP = """\
Measure cost on weights of given shapes, beside the loops of others.

Ways to generate from the same prompt take turns in one run: the plain loop in eager mode; transformers with its own
cache, alone and assisted by the draft (where it is installed); the compiled one-token loop; exact speculation; SMC at
each pair of --n-particles and --lookahead; and what is taken without options. The table shows medians, ratios within a
round, and the share of what the machine reads and multiplies at best. The weights say nothing about text: the target
contains the draft, with noise added until --acceptance of the drafted tokens are accepted. The defaults are a
Llama-shaped target of 336M parameters and a draft of 31M, in bfloat16. Before anything is timed, the log-probabilities
of ours are compared with the eager model's. Ctrl-C ends the measurement and keeps whole rounds.

  smc-compile bench
  smc-compile bench --preset 0.5b-60m --acceptance 0.9 --n-particles 8 16 --lookahead 6 --json rows.json
  smc-compile bench --layers 4 --draft-layers 1 --vocab 4096 --acceptance none --dtype float32
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``bench``."""
    add_pair_arguments(parser)
    request = parser.add_argument_group("request")
    request.add_argument("--prompt-length", type=int, default=128, metavar="P", help="tokens of the prompt")
    request.add_argument("--new-tokens", type=int, default=256, metavar="T", help="tokens to generate")
    request.add_argument("--temperature", type=float, default=0.8, metavar="T", help="temperature")
    request.add_argument("--n-particles", type=int, nargs="+", default=[4, 2], metavar="N", help="particles")
    request.add_argument(
        "--lookahead", type=int, nargs="+", default=[8], metavar="K", help="draft tokens a cycle; one, or one per N"
    )
    request.add_argument(
        "--chains", type=int, nargs="+", default=[1], metavar="N", help="chains of exact speculation, at each K"
    )
    peers = parser.add_argument_group("rows of others")
    peers.add_argument(
        "--assistant-tokens",
        type=int,
        nargs="+",
        default=[2, 4, 8],
        metavar="K",
        help="draft tokens of assisted transformers; the fastest in a short pilot is timed",
    )
    peers.add_argument("--skip-eager", action="store_true", help="leave the eager loop out")
    peers.add_argument("--skip-transformers", action="store_true", help="leave the loops of transformers out")
    peers.add_argument("--skip-assisted", action="store_true", help="leave assisted transformers out")
    peers.add_argument("--skip-speculative", action="store_true", help="leave exact speculation out")
    peers.add_argument("--skip-auto", action="store_true", help='leave method="auto" out, which runs without options')
    run_ = parser.add_argument_group("measurement")
    run_.add_argument("--repeats", type=int, default=3, metavar="R", help="timed rounds")
    run_.add_argument(
        "--compiler", choices=INDUCTORS, default=INDUCTORS[0], help="of ours; max-autotune times products first"
    )
    run_.add_argument("--threads", type=int, metavar="T", help="CPU threads (default: torch's choice)")
    run_.add_argument("--json", metavar="FILE", help="write the rows to FILE")


def run(arguments: argparse.Namespace, console: Console, further_peers: Mapping[str, Peer] | None = None) -> None:
    """Measure, print the table, write the JSON file.

    Args:
        further_peers: by name, loops of others that take part besides those of transformers.

    Raises:
        KeyboardInterrupt: after all that, where it was interrupted.
    """
    shapes = pair_shapes(arguments.n_particles, arguments.lookahead)
    check_json_path(arguments.json)
    target, draft, ids, tuned = prepare(arguments, max(k for _, k in shapes), console)
    contestants, missing = all_contestants(target, draft, ids, arguments, shapes, console, further_peers or {})
    place = DTYPES[arguments.dtype], torch.device(arguments.device)
    ceilings = measure_ceilings(*place)

    def check(name: str, generation: Generation) -> Agreement:
        return checked(name, difference(target, generation, arguments.temperature), place[0])

    measured = measure(contestants, arguments.repeats, arguments.seed, console, place[1], check)
    measured.failures = missing | measured.failures
    if not measured.interrupted:
        ceilings = ceilings.better(measure_ceilings(*place))
    rows = make_rows(measured.results, ceilings)
    show(measured, rows, ceilings, arguments, console)
    if arguments.json:
        stored = {name: value for name, value in vars(arguments).items() if name != "run"}
        write_json(
            arguments.json,
            "bench",
            stored,
            rows,
            target_parameters=parameter_count(target),
            draft_parameters=parameter_count(draft),
            tuned=asdict(tuned) if tuned else None,
            ceilings=asdict(ceilings),
            not_measured=measured.failures,
            against_eager={name: agreement._asdict() for name, agreement in measured.agreements.items()},
            interrupted=measured.interrupted,
        )
        console.print(f"rows in {arguments.json}", style="dim", highlight=False)
    if measured.interrupted:
        raise KeyboardInterrupt


def prepare(
    arguments: argparse.Namespace, lookahead: int, console: Console
) -> tuple[Llama, Llama, Tensor, Tuned | None]:
    """Check and complete the arguments, build the pair and the prompt [1, P], and say what they are.

    Raises:
        OptionError: where an option or the memory does not allow it.
    """
    fill_in(arguments)
    check_arguments(arguments)
    set_threads(arguments)
    target_config, draft_config = configs(arguments, lookahead)
    target, draft, tuned = build_pair(arguments, target_config, draft_config, console)
    console.print(where(arguments), highlight=False, style="dim")
    warn_of_emulation(arguments, console)
    console.print()
    ids = random_prompt(
        target_config.vocab_size, arguments.prompt_length, target.embedding.weight.device, arguments.seed
    )
    return target, draft, ids, tuned


def show(
    measured: Measurement, rows: list[Row], ceilings: Ceilings, arguments: argparse.Namespace, console: Console
) -> None:
    """The table, and below it how to read it and what is not in it."""
    names = [result.contestant.name for result in measured.results]
    if measured.interrupted:
        rounds = max((row["repeats"] for row in rows), default=0)
        console.print(f"interrupted: {rounds} of {arguments.repeats} rounds measured", style="yellow", highlight=False)
    if rows:
        console.print(rows_table(rows, names, console.width, list(measured.failures)))
        console.print()
    for name, why in measured.failures.items():
        console.print(f"{name}: not measured: {why}", markup=False, highlight=False)
    if not rows:
        return
    contestants = [result.contestant for result in measured.results]
    lines = [
        *footnotes(contestants, rows, arguments),
        agreement_line(measured.agreements),
        range_line(rows, names),
        ceilings_line(ceilings),
        compile_line(measured.results),
    ]
    for line in lines:
        console.print(line, style="dim", markup=False, highlight=False)


def ceilings_line(ceilings: Ceilings) -> str:
    """What the bound is made of."""
    return f"{rates(ceilings)}: bandwidth and arithmetic are shares of that, for what a step must read and multiply"


def agreement_line(agreements: dict[str, Agreement]) -> str:
    """One line about how near ours are to the eager model."""
    if not agreements:
        return "nothing of ours was compared with the eager model"
    name, worst = max(agreements.items(), key=lambda item: item[1].mean)
    return (
        f"log-probabilities of ours are those of the eager model, but for {worst.mean:.0e} nats on average and "
        f"{worst.largest:.0e} at most ({name})"
    )


def footnotes(contestants: list[Contestant], rows: list[Row], arguments: argparse.Namespace) -> list[str]:
    """How to read the table."""
    notes = [f"{contestant.name}: {contestant.note}" for contestant in contestants if contestant.note]
    repeats = max(row["repeats"] for row in rows)
    rounds = "one round" if repeats == 1 else f"medians of {repeats} interleaved rounds"
    tokens = " to ".join(str(n) for n in sorted({row["tokens"] for row in rows if row["method"] != "eager"}))
    notes.append(f"{rounds} of {tokens or EAGER_TOKENS} tokens, prompt included")
    notes.append("step: a cycle of SMC or speculation, or a token of a loop; accepted: drafted tokens kept a cycle")
    if any(row["peak_bytes"] is not None for row in rows):
        held = "of the process, everybody's weights included" if arguments.device == "cpu" else "of all tensors"
        notes.append(f"peak: the most memory {held}, in a round")
    notes.append("nats off: how far the law of the timed texts may be from the target's, by kl_bound; 0 is exact")
    notes.append("random weights: there is no text to read")
    return notes
