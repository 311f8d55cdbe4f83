"""``smc-compile kernels``: every kernel of every region, what it is made of, and whether it is right."""

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
from rich.table import Table

from smc_compile.bench.report import check_json_path, device_name, machine
from smc_compile.commands.arguments import check_device
from smc_compile.dev.kernel_audit.absent_device import TARGETS, target_named
from smc_compile.dev.kernel_audit.copy_rows_region import examine_copy_rows
from smc_compile.dev.kernel_audit.interpreter import Interpreter
from smc_compile.dev.kernel_audit.recorded_sessions import Pair, positions, record_sessions
from smc_compile.dev.kernel_audit.regions import Kernel, Region, compared, examine, short_name
from smc_compile.dev.kernel_audit.time_copy_rows import time_copy_rows
from smc_compile.dev.kernel_audit.timed_tables import show_timed, timed_summary
from smc_compile.dev.kernel_audit.timing import Timed, time_region
from smc_compile.dev.kernel_audit.written_kernels import WRITTEN_BY_HAND, Outcome, check_by_hand
from smc_compile.errors import OptionError, SMCError
from smc_compile.options import INDUCTORS
from smc_compile.pairs.llama import LlamaConfig

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
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
# (vocabulary, then width, heads, heads of keys and values, width inside the MLP: of target and draft)
PRESETS: dict[str, tuple[int, tuple[int, int, int, int], tuple[int, int, int, int]]] = {
    "small": (500, (64, 4, 2, 128), (32, 2, 1, 64)),
    "bench": (32000, (1024, 16, 16, 2752), (512, 8, 8, 1664)),
    "llama-8b": (128256, (4096, 32, 8, 14336), (2048, 32, 8, 8192)),
}


NAME = 43  # columns of a kernel's name
RUNS = 12  # of each kernel written by hand


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``kernels``."""
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--target", metavar="SM", help=f"a GPU, there or not: {', '.join(TARGETS)}")
    where.add_argument("--device", metavar="D", help="cpu or cuda: run and time the regions there")
    parser.add_argument("--compiler", choices=INDUCTORS, default=INDUCTORS[0], help="of ours, with --device")
    parser.add_argument("--method", choices=["smc", "speculative"], default="smc", help="whose regions")
    pair = parser.add_argument_group("pair")
    pair.add_argument("--preset", choices=list(PRESETS), default="small", help="widths of target and draft")
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
    pair = pair_of(arguments)
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
    regions: list[Region] = []
    try:
        for each in track(recorded, "regions", console=console, transient=True, disable=not console.is_terminal):
            regions.append(examine(each, target, interpreter, pair.dtype))
            show(regions[-1], console)
        if target and pair.method == "smc":
            regions.append(examine_copy_rows(cache_shapes(pair), RUNS, arguments.seed, target))
            show(regions[-1], console)
    finally:
        interpreter.close()
    outcomes = [] if target else written_by_hand(arguments.seed, console)
    conclude(arguments, summary(regions, outcomes, time.perf_counter() - begin), regions, outcomes, console)
    return status_of(regions, outcomes)


def run_timed(arguments: argparse.Namespace, pair: Pair, console: Console) -> int:
    """Run the regions on a device, compare, time, print. Returns 1 if a result was wrong, else 0."""
    begin, device = time.perf_counter(), torch.device(arguments.device)
    regions: list[Timed] = []
    with console.status("sessions"):
        recorded = record_sessions(pair, arguments.sessions, arguments.seed, device.type == "cuda", device)
    outcomes: list[Outcome] = []
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
    regions: Sequence[Region | Timed],
    outcomes: list[Outcome],
    console: Console,
) -> None:
    """The last line, and the file of rows."""
    console.print()
    console.print(line, highlight=False)
    if arguments.json:
        write_json(arguments, regions, outcomes)
        console.print(f"rows in {arguments.json}", style="dim", highlight=False)


def status_of(regions: Sequence[Region | Timed], outcomes: list[Outcome]) -> int:
    """1 if a check failed, else 0."""
    return 0 if all(r.passes for r in regions) and all(o.passes for o in outcomes) else 1


def pair_of(arguments: argparse.Namespace) -> Pair:
    """The pair that the options describe.

    Raises:
        OptionError: when a number is out of range.
    """
    a = arguments
    for name in ("layers", "draft_layers", "prompt_length", "n_particles", "lookahead", "sessions"):
        if getattr(a, name) < 1:
            raise OptionError(f"--{name.replace('_', '-')} must be at least 1.", f"got {getattr(a, name)}")
    vocab, target, draft = PRESETS[a.preset]
    # Random models agree on little: a cut that keeps few tokens would leave hardly a particle with any weight.
    top_k = 49 * vocab // 50 if a.top_k is None else a.top_k
    if a.temperature <= 0 or top_k < 0 or not 0 < a.top_p <= 1:
        raise OptionError(
            "the distribution is out of range",
            f"temperature {a.temperature}, top-k {top_k}, top-p {a.top_p}",
            "use a temperature above 0, a top-k of 0 or more, a top-p above 0 and up to 1",
        )
    longest = positions(a.prompt_length, a.lookahead)

    def config(layers: int, shape: tuple[int, int, int, int]) -> LlamaConfig:
        dim, heads, kv_heads, hidden = shape
        return LlamaConfig(vocab, dim, layers, heads, kv_heads, hidden, longest)

    return Pair(
        config(a.layers, target),
        config(a.draft_layers, draft),
        a.method,
        a.n_particles,
        a.lookahead,
        a.prompt_length,
        a.temperature,
        top_k,
        a.top_p,
        DTYPES[a.dtype],
    )


def cache_shapes(pair: Pair) -> int:
    """How many shapes the caches of target and draft have: keys and values of a model are alike."""
    return len({(c.n_kv_heads, c.dim // c.n_heads) for c in (pair.target, pair.draft)})


def describe(arguments: argparse.Namespace, pair: Pair) -> str:
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


def show(region: Region, console: Console) -> None:
    """The region's heading, table and notes."""
    console.print()
    console.print(compared(region.name, region.calls, region.verdict, region.agrees), highlight=False)
    console.print(table_of(region))
    for line in notes(region):
        console.print(f"  {line}", highlight=False, markup=False)


def table_of(region: Region) -> Table:
    """One row a kernel, and one for each op of a library."""
    compiled = any(kernel.code for kernel in region.kernels)
    table = Table(box=None, pad_edge=False, padding=(0, 1))
    for name, justify in (("kernel", "left"), ("a cycle", "right")):
        table.add_column(name, justify=justify, no_wrap=True)  # type: ignore[arg-type]
    for name in ("regs", "spills", "shared", "loads", "stores") if compiled else ():
        table.add_column(name, justify="right")
    table.add_column("used", no_wrap=True)
    for kernel in region.kernels:
        numbers = machine_numbers(kernel) if compiled else []
        table.add_row(short_name(kernel.name, NAME), str(kernel.launches), *numbers, checked(kernel))
    for name, count in region.library.items():
        table.add_row(f"library  {name}", str(count), *([""] * 5 if compiled else []), "")
    return table


def machine_numbers(kernel: Kernel) -> list[str]:
    code = kernel.code
    if code is None:
        return [""] * 5
    return [str(n) for n in (code.registers, code.spills, code.shared, code.loads, code.stores)]


def checked(kernel: Kernel) -> str:
    if kernel.problem:
        return "[red]does not compile[/red]"
    if kernel.launches == 0:
        return "first cycle" if kernel.used else "[red]never launched[/red]"
    return "yes" if kernel.used else "[red]output unused[/red]"


def written_by_hand(seed: int, console: Console) -> list[Outcome]:
    """Check, time and show the kernels in C++."""
    with console.status("kernels written by hand"):
        outcomes = [check_by_hand(entry, RUNS, seed) for entry in WRITTEN_BY_HAND]
    console.print()
    console.print(
        "[bold]written by hand[/bold], on random shapes against float64; microseconds beside Inductor's, caches flushed"
    )
    console.print(hand_table(outcomes))
    return outcomes


def hand_table(outcomes: list[Outcome]) -> Table:
    """One row a kernel."""
    table = Table(box=None, pad_edge=False, padding=(0, 1))
    table.add_column("kernel", no_wrap=True)
    for name in ("runs", "error", "us", "Inductor", "ratio"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("timed at", no_wrap=True)
    for o in outcomes:
        error = f"{o.error:.0e}" if o.passes else f"[red]{o.error:.0e}, not {o.allowed:.0e}[/red]"
        ratio = f"{o.compiled_us / o.kernel_us:.1f}x"
        table.add_row(o.name, str(o.runs), error, f"{o.kernel_us:.0f}", f"{o.compiled_us:.0f}", ratio, o.where)
    return table


def notes(region: Region) -> list[str]:
    """Why a kernel did not compile."""
    return [f"{short_name(k.name, NAME)}: {k.problem}" for k in region.kernels if k.problem]


def summary(regions: list[Region], outcomes: list[Outcome], seconds: float) -> str:
    """One line about everything."""
    kernels = [kernel for region in regions for kernel in region.kernels]
    unique = {source for region in regions for source in region.sources.values()}
    failed = [r.name for r in regions if not r.passes] + [o.name for o in outcomes if not o.passes]
    codes = [kernel.code for kernel in kernels if kernel.code]
    launches, calls = sum(k.launches for k in kernels), sum(sum(r.library.values()) for r in regions)
    parts = [
        f"{len(regions)} regions, {len(kernels)} kernels ({len(unique)} different), "
        f"{launches} launches and {calls} library calls a cycle"
    ]
    if codes:
        parts.append(f"at most {max(c.registers for c in codes)} registers, {sum(c.spills > 0 for c in codes)} spill")
    parts.append(f"[red]failed: {', '.join(failed)}[/red]" if failed else "[green]all checks pass[/green]")
    return "; ".join([*parts, f"{seconds:.0f} s"])


def write_json(arguments: argparse.Namespace, regions: Sequence[Region | Timed], outcomes: list[Outcome]) -> None:
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
