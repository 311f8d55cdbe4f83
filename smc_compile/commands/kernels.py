"""``smc-compile kernels``: the kernels of every region, what their machine code uses, and whether they are right."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track

from smc_compile.bench.report import check_json_path, device_name, machine
from smc_compile.commands.arguments import check_device
from smc_compile.dev.kernel_audit.absent_device import TARGETS, target_named
from smc_compile.dev.kernel_audit.audited_regions import AuditedRegion, examine
from smc_compile.dev.kernel_audit.copy_rows_region import cache_shapes, examine_copy_rows
from smc_compile.dev.kernel_audit.interpreter import Interpreter
from smc_compile.dev.kernel_audit.kernel_tables import (
    hand_table,
    show_region,
    show_timed,
    summary,
    timed_summary,
)
from smc_compile.dev.kernel_audit.recorded_sessions import AuditedPair, positions, record_sessions
from smc_compile.dev.kernel_audit.time_copy_rows import time_copy_rows
from smc_compile.dev.kernel_audit.time_regions import Timed, time_region
from smc_compile.dev.kernel_audit.written_kernels import WRITTEN_BY_HAND, KernelCheck, check_by_hand
from smc_compile.errors import OptionError, SMCError
from smc_compile.options import INDUCTORS
from smc_compile.pairs.llama import LlamaConfig
from smc_compile.pairs.presets import DTYPES, PRESETS, Shape, find_preset

HELP = """\
List the kernels that a session runs, and check them.

A few sessions on a random pair show which regions there are and what they are called with. Inductor generates the
kernels of each; with --target for that GPU, which need not be there: Triton compiles them to machine code, and its
interpreter runs them on the CPU. Without --target they are C++ for this CPU. Results are compared with eager PyTorch
on the same arguments and uniforms, and each kernel is left out once to see that its output matters. Kernels written
by hand are checked on random shapes; those for a CPU are timed beside what Inductor generates from the same in tensor
code.
With --device each region runs there instead, is compared with eager PyTorch, and is timed beside eager PyTorch and
plain Inductor (our kernels in tensor code), in turn and with the caches flushed before each call; below it stands what
each kernel takes.
The exit status is 1 if anything fails. Kernels depend on widths, not on the number of layers: two stand for all.

  smc-compile kernels --target sm_90
  smc-compile kernels --target sm_80 --method speculative --json kernels.json
  smc-compile kernels --target sm_90 --preset bench --dtype bfloat16 --n-particles 8 --lookahead 6
  smc-compile kernels --device cuda --preset llama-8b --dtype bfloat16 --n-particles 8 --lookahead 8
"""
RUNS = 12  # of each kernel written by hand


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``kernels``."""
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--target", metavar="SM", help=f"a GPU, there or not: {', '.join(TARGETS)}")
    where.add_argument("--device", metavar="D", help="cpu or cuda: run and time the regions there")
    parser.add_argument("--compiler", choices=INDUCTORS, default=INDUCTORS[0], help="of ours, with --device")
    parser.add_argument("--method", choices=["smc", "speculative"], default="smc", help="whose regions")
    pair = parser.add_argument_group("pair")
    pair.add_argument("--preset", default="small", metavar="NAME", help=f"widths of both: {', '.join(PRESETS)}")
    pair.add_argument("--layers", type=int, default=2, metavar="L", help="layers of the target")
    pair.add_argument("--draft-layers", type=int, default=1, metavar="L", help="layers of the draft")
    pair.add_argument("--dtype", choices=sorted(DTYPES), default="float32", help="type of the weights")
    request = parser.add_argument_group("request")
    request.add_argument("--prompt-length", type=int, default=16, metavar="P", help="shortest prompt")
    request.add_argument("--n-particles", type=int, default=4, metavar="N", help="particles, or chains")
    request.add_argument("--lookahead", type=int, default=3, metavar="K", help="draft tokens a cycle")
    request.add_argument("--temperature", type=float, default=0.8, metavar="T", help="temperature")
    request.add_argument(
        "--top-k", type=int, metavar="K", help="default: 49/50 of the vocabulary; 0 leaves its kernels out"
    )
    request.add_argument("--top-p", type=float, default=0.99, metavar="P", help="1 leaves its kernels out")
    check = parser.add_argument_group("checks")
    check.add_argument("--sessions", type=int, default=3, metavar="S", help="sessions, each of other lengths and seeds")
    check.add_argument("--seed", type=int, default=0, metavar="S", help="seed of weights, prompts and sampling")
    check.add_argument("--json", metavar="FILE", help="write the rows to FILE")


def run(arguments: argparse.Namespace, console: Console) -> int:
    """List, check, print. Returns 1 if a check failed, else 0."""
    begin = time.perf_counter()
    target = target_named(arguments.target) if arguments.target else None
    pair = audited_pair(arguments)
    check_json_path(arguments.json)
    if arguments.device:
        check_device(arguments.device)
    elif arguments.compiler != INDUCTORS[0]:
        raise OptionError(
            f"--compiler {arguments.compiler} needs --device.",
            "it chooses products by timing them, and without a device nothing is timed",
            "add --device cpu or --device cuda",
        )
    console.print(describe(arguments, pair), style="dim", highlight=False)
    if arguments.device:
        return run_timed(arguments, pair, console)
    with console.status("sessions"):
        recorded = record_sessions(pair, arguments.sessions, arguments.seed, replayed=target is not None)
    interpreter = Interpreter(target)
    regions: list[AuditedRegion] = []
    try:
        for each in track(recorded, "regions", console=console, transient=True, disable=not console.is_terminal):
            regions.append(examine(each, target, interpreter, pair.dtype))
            show_region(regions[-1], console)
        if target and pair.method == "smc":
            regions.append(examine_copy_rows(cache_shapes(pair), RUNS, arguments.seed, target))
            show_region(regions[-1], console)
    finally:
        interpreter.close()
    outcomes = [] if target else written_by_hand(arguments.seed, console)
    conclude(arguments, summary(regions, outcomes, time.perf_counter() - begin), regions, outcomes, console)
    return status_of(regions, outcomes)


def run_timed(arguments: argparse.Namespace, pair: AuditedPair, console: Console) -> int:
    """Run the regions on a device, compare, time, print. Returns 1 if a result was wrong, else 0."""
    begin, device = time.perf_counter(), torch.device(arguments.device)
    regions: list[Timed] = []
    with console.status("sessions"):
        recorded = record_sessions(pair, arguments.sessions, arguments.seed, device.type == "cuda", device)
    outcomes: list[KernelCheck] = []
    try:
        for each in track(recorded, "regions", console=console, transient=True, disable=not console.is_terminal):
            regions.append(time_region(each, device, pair.dtype, arguments.compiler))
            show_timed(regions[-1], console)
        if device.type == "cuda" and pair.method == "smc":
            regions.append(time_copy_rows(pair, device))
            show_timed(regions[-1], console)
        if device.type == "cpu":
            outcomes = written_by_hand(arguments.seed, console)
    finally:  # Ctrl-C keeps what was timed
        conclude(arguments, timed_summary(regions, time.perf_counter() - begin), regions, outcomes, console)
    return status_of(regions, outcomes)


def conclude(
    arguments: argparse.Namespace,
    line: str,
    regions: Sequence[AuditedRegion | Timed],
    outcomes: list[KernelCheck],
    console: Console,
) -> None:
    """The last line, and the file of rows."""
    console.print()
    console.print(line, highlight=False)
    if arguments.json:
        write_rows(arguments, regions, outcomes)
        console.print(f"rows in {arguments.json}", style="dim", highlight=False)


def status_of(regions: Sequence[AuditedRegion | Timed], outcomes: list[KernelCheck]) -> int:
    """1 if a check failed, else 0."""
    return 0 if all(r.passes for r in regions) and all(o.passes for o in outcomes) else 1


def audited_pair(arguments: argparse.Namespace) -> AuditedPair:
    """The pair that the options describe.

    Raises:
        OptionError: when a number is out of range.
    """
    a = arguments
    for name in ("layers", "draft_layers", "prompt_length", "n_particles", "lookahead", "sessions"):
        if getattr(a, name) < 1:
            raise OptionError(f"--{name.replace('_', '-')} must be at least 1.", f"got {getattr(a, name)}")
    preset = find_preset(a.preset)
    # Random models agree on little: a cut that keeps few tokens would leave hardly a particle with any weight.
    top_k = 49 * preset.vocab // 50 if a.top_k is None else a.top_k
    if a.temperature <= 0 or top_k < 0 or not 0 < a.top_p <= 1:
        raise OptionError(
            "the distribution is out of range",
            f"temperature {a.temperature}, top-k {top_k}, top-p {a.top_p}",
            "use a temperature above 0, a top-k of 0 or more, a top-p above 0 and up to 1",
        )
    longest = positions(a.prompt_length, a.lookahead)

    def config(layers: int, shape: Shape) -> LlamaConfig:
        return LlamaConfig(preset.vocab, shape.dim, layers, shape.heads, shape.kv_heads, shape.hidden, longest)

    return AuditedPair(
        config(a.layers, preset.target),
        config(a.draft_layers, preset.draft),
        a.method,
        a.n_particles,
        a.lookahead,
        a.prompt_length,
        a.temperature,
        top_k,
        a.top_p,
        DTYPES[a.dtype],
    )


def describe(arguments: argparse.Namespace, pair: AuditedPair) -> str:
    """One line about what is listed."""
    where = "this CPU"
    if arguments.target:
        where = f"{arguments.target} ({TARGETS[arguments.target].name})"
    elif arguments.device:
        where = f"{device_name(torch.device(arguments.device))}, {arguments.compiler}"
    return (
        f"{where}, {arguments.method}, N={pair.n_particles}, K={pair.lookahead}, {arguments.dtype}, preset "
        f"{arguments.preset}: target {pair.target.n_layers} x {pair.target.dim}, draft {pair.draft.n_layers} x "
        f"{pair.draft.dim}, vocabulary {pair.target.vocab_size}"
    )


def written_by_hand(seed: int, console: Console) -> list[KernelCheck]:
    """Check, time and show the kernels in C++."""
    with console.status("kernels written by hand"):
        outcomes = [check_by_hand(entry, RUNS, seed) for entry in WRITTEN_BY_HAND]
    console.print()
    console.print(
        "[bold]written by hand[/bold], on random shapes against float64; microseconds beside Inductor's, caches flushed"
    )
    console.print(hand_table(outcomes))
    return outcomes


def write_rows(
    arguments: argparse.Namespace, regions: Sequence[AuditedRegion | Timed], outcomes: list[KernelCheck]
) -> None:
    """Store the rows with what they were checked on.

    Raises:
        SMCError: where the file cannot be written.
    """
    stored: dict[str, Any] = {name: value for name, value in vars(arguments).items() if name != "run"}
    rows = {
        "options": stored,
        "machine": machine(),
        "regions": [region.as_json() for region in regions],
        "written_by_hand": [asdict(outcome) | {"passes": outcome.passes} for outcome in outcomes],
    }
    try:
        Path(arguments.json).write_text(json.dumps(rows, indent=1, default=str) + "\n")
    except OSError as error:
        raise SMCError("the rows cannot be written", str(error)) from error
