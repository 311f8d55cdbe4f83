"""Timing several ways to generate side by side, and showing and storing the result.

Every contestant is warmed up first (that is where compilation happens, reported apart). Then all of them run once a
round, in turn, so that a machine which slows down slows all of them; a ratio is the median over rounds of the ratio
within a round.
"""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor, nn

from smc_compile.bounds import Ceilings, Costs, cycle_bound, loop_bound
from smc_compile.errors import OptionError
from smc_compile.generate import generate
from smc_compile.result import Generation

Model = Callable[[Tensor], Tensor]  # ids [B, S] -> logits [B, S, V]
Row = dict[str, Any]


NAMES = {"eager": "eager loop", "autoregressive": "compiled loop"}  # of methods, in a table


@dataclass(frozen=True)
class Contestant:
    """One way to generate: ``run(seed)`` gives the sequences [B, P+n], or a Generation that holds them."""

    method: str  # "eager", "transformers", "autoregressive" or "smc"
    run: Callable[[int], Tensor | Generation]
    new_tokens: int
    n_particles: int | None = None
    lookahead: int | None = None
    note: str | None = None
    warm_up: Callable[[int], Tensor | Generation] | None = None  # a shorter first call than ``run``
    batch: int = 1
    bound: Callable[[Ceilings], float] | None = None  # seconds a cycle takes at least

    @property
    def name(self) -> str:
        if self.n_particles is not None:
            return f"smc  N={self.n_particles} K={self.lookahead}"
        return NAMES.get(self.method, self.method)


@dataclass(frozen=True)
class Run:
    """One timed call. ``seconds`` is wall-clock without compilation."""

    seconds: float
    compile_seconds: float
    sequences: Tensor
    generation: Generation | None


@dataclass(frozen=True)
class Result:
    """All calls of one contestant: the first, which compiled, and the timed ones."""

    contestant: Contestant
    first: Run
    runs: list[Run]


def plain_loop(model: Model, ids: Tensor, max_new_tokens: int, temperature: float) -> Tensor:
    """Decoding as people write it: the whole sequence through the model for every token."""
    for _ in range(max_new_tokens):
        logits = model(ids)[:, -1]
        probs = torch.softmax(logits / temperature, -1)
        ids = torch.cat([ids, torch.multinomial(probs, 1)], -1)
    return ids


def contest(
    target: nn.Module,
    draft: nn.Module,
    ids: Tensor,
    *,
    max_new_tokens: int,
    temperature: float,
    shapes: Sequence[tuple[int, int]],
    eager_tokens: int | None,
    sizes: tuple[Costs, Costs] | None = None,
) -> list[Contestant]:
    """The plain loop (unless ``eager_tokens`` is None), the compiled loop, and SMC at each (N, K) of ``shapes``.

    ``sizes`` of target and draft give each the least that a cycle can cost.
    """

    def eager(seed: int, tokens: int = eager_tokens or 0) -> Tensor:
        torch.manual_seed(seed)
        with torch.no_grad():
            return plain_loop(target, ids, tokens, temperature)

    def eager_warm_up(seed: int) -> Tensor:
        return eager(seed, min(4, eager_tokens or 0))

    def compiled(method: str, n_particles: int, lookahead: int) -> Callable[[int], Generation]:
        def run(seed: int) -> Generation:
            return generate(
                target,
                draft,
                ids,
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                n_particles=n_particles,
                lookahead=lookahead,
                seed=seed,
                method=method,
            )

        return run

    prompt = ids.shape[1]

    def of_cycle(n: int, k: int) -> Callable[[Ceilings], float] | None:
        return (lambda at: cycle_bound(at, *sizes, n, k, prompt, max_new_tokens)) if sizes else None

    of_loop = (lambda at: loop_bound(at, sizes[0], prompt, max_new_tokens)) if sizes else None
    smc = [Contestant("smc", compiled("smc", n, k), max_new_tokens, n, k, bound=of_cycle(n, k)) for n, k in shapes]
    loop = Contestant("autoregressive", compiled("autoregressive", *shapes[0]), max_new_tokens, bound=of_loop)
    if eager_tokens is None:
        return [loop, *smc]
    note = (
        None
        if eager_tokens == max_new_tokens
        else f"timed on the first {eager_tokens} tokens, its cheapest; each is a pass over the whole text"
    )
    eager_loop = Contestant("eager", eager, eager_tokens, note=note, warm_up=eager_warm_up)
    return [eager_loop, loop, *smc]


def timed(contestant: Contestant, seed: int) -> Run:
    """Call once, wait for the device, and set compilation apart."""
    begin = time.perf_counter()
    answer = contestant.run(seed)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    seconds = time.perf_counter() - begin
    if isinstance(answer, Tensor):
        return Run(seconds, 0.0, answer, None)
    compiling = answer.stats.compile_seconds
    return Run(max(seconds - compiling, 1e-9), compiling, answer.sequences, answer)


def measure(contestants: Sequence[Contestant], repeats: int, seed: int, console: Console) -> list[Result]:
    """Warm every contestant up, then run all of them in turn, ``repeats`` rounds.

    SMC is warmed up first: a bad N or K is then reported before anything slow has run.
    """
    first: dict[int, Run] = {}
    runs: dict[int, list[Run]] = {index: [] for index in range(len(contestants))}
    with progress_bar(console) as progress:
        task = progress.add_task("", total=len(contestants) * (repeats + 1))
        for index, contestant in reversed(list(enumerate(contestants))):
            verb = "warming up" if contestant.method in ("eager", "transformers") else "compiling"
            progress.update(task, description=f"{verb} {contestant.name}")
            first[index] = timed(replace(contestant, run=contestant.warm_up or contestant.run), seed)
            progress.advance(task)
        for round_ in range(repeats):
            for index, contestant in enumerate(contestants):
                progress.update(task, description=f"round {round_ + 1} of {repeats}: {contestant.name}")
                runs[index].append(timed(contestant, seed + round_))
                progress.advance(task)
    return [Result(contestant, first[index], runs[index]) for index, contestant in enumerate(contestants)]


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


# ---- rows -----------------------------------------------------------------------------------------------------------


def make_rows(results: Sequence[Result], ceilings: Ceilings | None = None) -> list[Row]:
    """One row per contestant, in the words of the JSON file; None where a column does not apply."""
    return [make_row(result, results, ceilings) for result in results]


def make_row(result: Result, results: Sequence[Result], ceilings: Ceilings | None) -> Row:
    """The figures of one contestant."""
    contestant, runs = result.contestant, result.runs
    speeds = [speed(result, round_) for round_ in range(len(runs))]
    generations = [run.generation for run in runs if run.generation is not None]
    is_smc = contestant.method == "smc"
    cycle = median(cycle_seconds(contestant, run) for run in runs)
    bound = contestant.bound(ceilings) if contestant.bound and ceilings else None
    return {
        "method": contestant.method,
        "n_particles": contestant.n_particles,
        "lookahead": contestant.lookahead,
        "tokens": contestant.new_tokens,
        "repeats": len(runs),
        "tokens_per_second": median(speeds),
        "tokens_per_second_min": min(speeds),
        "tokens_per_second_max": max(speeds),
        "speedup_over_eager": speedup(result, results, "eager"),
        "speedup_over_autoregressive": speedup(result, results, "autoregressive"),
        "ms_per_cycle": 1e3 * cycle,
        "bound_ms_per_cycle": None if bound is None else 1e3 * bound,
        "share_of_bound": None if bound is None else bound / cycle,
        **{
            f"{part}_share": median_share(generations, part) if is_smc or part not in SMC_PARTS else None
            for part in PARTS
        },
        "mean_ess": mean_ess(generations) if is_smc else None,
        "mean_log_prob": None,
        "mean_log_prob_stderr": None,
        "compile_seconds": result.first.compile_seconds if result.first.generation else None,
        "first_call_seconds": result.first.seconds + result.first.compile_seconds if result.first.generation else None,
        "note": contestant.note,
    }


PARTS = ("prefill", "draft", "score", "resample", "host")
SMC_PARTS = ("draft", "resample")


def speed(result: Result, round_: int) -> float:
    """Tokens a second in one round."""
    return result.contestant.batch * result.contestant.new_tokens / result.runs[round_].seconds


def speedup(result: Result, results: Sequence[Result], over: str) -> float | None:
    """Median over rounds of the ratio to method ``over`` in the same round; None if it did not run."""
    base = next((other for other in results if other.contestant.method == over), None)
    if base is None:
        return None
    return median(speed(result, round_) / speed(base, round_) for round_ in range(len(result.runs)))


def cycle_seconds(contestant: Contestant, run: Run) -> float:
    """Seconds of one cycle, without prefill; a cycle of a one-token loop is a token."""
    if run.generation is None or contestant.method != "smc":
        prefill = run.generation.stats.prefill_seconds if run.generation else 0.0
        return (run.seconds - prefill) / contestant.new_tokens
    stats = run.generation.stats
    return (run.seconds - stats.prefill_seconds) / max(1, stats.cycles)


def median_share(generations: Sequence[Generation], part: str) -> float | None:
    """Share of ``part`` in the time of a generation; None for a loop that does not report it."""
    if not generations:
        return None
    return median(getattr(g.stats, f"{part}_seconds") / max(g.stats.seconds, 1e-12) for g in generations)


def mean_ess(generations: Sequence[Generation]) -> float | None:
    """Median over rounds of the mean over cycles; None if no cycle was needed."""
    means = [float(g.ess.double().mean()) for g in generations if g.ess.numel()]
    return median(means) if means else None


# ---- showing and storing --------------------------------------------------------------------------------------------


def rows_table(rows: Sequence[Row], names: Sequence[str], width: int = 100) -> Table:
    """The rows as a table at most 100 columns wide, or 80 where ``width`` is less than 100.

    Columns empty in every row are left out; the spread gives way to log p, or to an eager loop beside bounds.
    """
    columns: list[tuple[str, Callable[[Row], str | None]]] = [
        ("tokens/s", lambda row: number(row["tokens_per_second"])),
        ("min-max", lambda row: f"{number(row['tokens_per_second_min'])}-{number(row['tokens_per_second_max'])}"),
        ("over\neager", lambda row: number(row["speedup_over_eager"], "x")),
        ("over\nloop", lambda row: number(row["speedup_over_autoregressive"], "x")),
        ("ms per\ncycle", lambda row: number(row["ms_per_cycle"])),
        ("of\nbound", lambda row: percent(row["share_of_bound"])),
        ("pre-\nfill", lambda row: percent(row["prefill_share"])),
        ("draft", lambda row: percent(row["draft_share"])),
        ("score", lambda row: percent(row["score_share"])),
        ("resam-\nple", lambda row: percent(row["resample_share"])),
        ("host", lambda row: percent(row["host_share"])),
        ("mean\nESS", lambda row: number(row["mean_ess"])),
        ("log p\n/token", lambda row: None if row["mean_log_prob"] is None else f"{row['mean_log_prob']:.3f}"),
    ]
    table = Table(box=None, padding=(0, 1), header_style="bold", pad_edge=False)
    table.add_column("method", no_wrap=True)
    full = [name for name in ("speedup_over_eager", "share_of_bound") if any(row[name] is not None for row in rows)]
    scored = any(row["mean_log_prob"] is not None for row in rows)
    hidden = ["min-max"] if scored or len(full) == 2 else []
    hidden += ["pre-\nfill", "resam-\nple", "host"] if width < 100 else []
    shown = [
        (title, cell) for title, cell in columns if title not in hidden and any(cell(row) is not None for row in rows)
    ]
    for title, _ in shown:
        table.add_column(title, justify="right", no_wrap=True)
    best = max(row["tokens_per_second"] for row in rows)
    for row, name in zip(rows, names, strict=True):
        cells = [cell(row) or "[dim]-[/dim]" for _, cell in shown]
        table.add_row(escape(name), *cells, style="bold green" if row["tokens_per_second"] == best else None)
    return table


def number(value: float | None, unit: str = "") -> str | None:
    """Three significant digits, never an exponent."""
    if value is None:
        return None
    digits = 0 if abs(value) >= 99.95 else 1 if abs(value) >= 9.995 else 2
    return f"{value:.{digits}f}{unit}"


def percent(value: float | None) -> str | None:
    return None if value is None else f"{100 * value:.0f}%"


def compile_line(results: Sequence[Result]) -> str:
    """Compile seconds of each method; a method compiled later reuses what an earlier one built."""
    compiled = [r for r in results if r.first.generation is not None]
    parts = [f"{r.contestant.name} {r.first.compile_seconds:.1f} s" for r in reversed(compiled)]
    return "compiled once, not in the table: " + ", ".join(parts)


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    return {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.platform(),
    }


def cpu_name() -> str:
    """The processor's own name where Linux tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def check_json_path(path: str | None) -> None:
    """Refuse a file that cannot be written before minutes have been spent."""
    if path is None:
        return
    if Path(path).is_dir():
        raise OptionError(f"Cannot write {path}.", "it is a folder", "name a file")
    if not Path(path).absolute().parent.is_dir():
        raise OptionError(f"Cannot write {path}.", f"{Path(path).absolute().parent} is not a folder")


def write_json(path: str, command: str, arguments: dict[str, Any], rows: Sequence[Row], **more: Any) -> None:
    """Store rows with what they were measured on."""
    date = datetime.now(UTC).isoformat(timespec="seconds")
    report = {
        "command": command,
        "date": date,
        "arguments": arguments,
        "machine": machine(),
        **more,
        "rows": list(rows),
    }
    Path(path).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
