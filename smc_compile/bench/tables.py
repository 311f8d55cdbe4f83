"""The tables of ``bench``, ``demo`` and ``sweep``, and lines about them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from rich.markup import escape
from rich.table import Table

from smc_compile.bench.figures import Row
from smc_compile.bench.measure import UNCOMPILED, Result

WIDEST = 100
BENCH_COLUMNS: list[tuple[str, Callable[[Row], str | None]]] = [
    ("tokens/s", lambda row: number(row["tokens_per_second"])),
    ("min-max", lambda row: f"{number(row['tokens_per_second_min'])}-{number(row['tokens_per_second_max'])}"),
    ("over\neager", lambda row: number(row["speedup_over_eager"], "x")),
    ("over\nloop", lambda row: number(row["speedup_over_autoregressive"], "x")),
    ("ms per\nstep", lambda row: number(row["ms_per_cycle"])),
    ("of\nbound", lambda row: percent(row["share_of_bound"])),
    ("band-\nwidth", lambda row: percent(row["share_of_bandwidth"])),
    ("arith-\nmetic", lambda row: percent(row["share_of_arithmetic"])),
    ("pre-\nfill", lambda row: percent(row["prefill_share"])),
    ("draft", lambda row: percent(row["draft_share"])),
    ("score", lambda row: percent(row["score_share"])),
    ("resam-\nple", lambda row: percent(row["resample_share"])),
    ("host", lambda row: percent(row["host_share"])),
    ("accep-\nted", lambda row: number(row["mean_accepted"])),
    ("mean\nESS", lambda row: number(row["mean_ess"])),
    ("nats off\n/token", lambda row: None if row["kl_per_token"] is None else f"{row['kl_per_token']:.3f}"),
    ("peak\nGB", lambda row: None if row["peak_bytes"] is None else number(row["peak_bytes"] / 1e9)),
    ("log p\n/token", lambda row: None if row["mean_log_prob"] is None else f"{row['mean_log_prob']:.3f}"),
]
# What gives way where the table would be too wide, first to last; all of it is in the JSON file.
GIVE_WAY = (
    "min-max",
    "pre-\nfill",
    "of\nbound",
    "over\neager",
    "peak\nGB",
    "resam-\nple",
    "host",
    "arith-\nmetic",
    "band-\nwidth",
    "mean\nESS",
    "accep-\nted",
)


def rows_table(rows: Sequence[Row], names: Sequence[str], width: int = WIDEST, missing: Sequence[str] = ()) -> Table:
    """The rows as a table at most ``width`` and 100 columns wide; columns empty in every row are left out.

    ``missing`` names contestants without figures.
    """
    cells = {title: [cell(row) for row in rows] for title, cell in BENCH_COLUMNS}
    cells = {title: column for title, column in cells.items() if any(text is not None for text in column)}
    first = max(len(name) for name in ("method", *names, *missing))
    for title in fitting(cells, min(width, WIDEST) - first):
        del cells[title]
    table = Table(box=None, padding=(0, 1, 0, 0), header_style="bold", pad_edge=False)
    table.add_column("method", no_wrap=True)
    for title in cells:
        table.add_column(title, justify="right", no_wrap=True)
    best = max((row["tokens_per_second"] for row in rows), default=None)
    for index, (row, name) in enumerate(zip(rows, names, strict=True)):
        texts = [column[index] or "[dim]-[/dim]" for column in cells.values()]
        table.add_row(escape(name), *texts, style="bold green" if row["tokens_per_second"] == best else None)
    for name in missing:
        table.add_row(escape(name), *["-"] * len(cells), style="dim")
    return table


def fitting(cells: dict[str, list[str | None]], room: int) -> list[str]:
    """Titles that must go so that the rest, each after a space, fits into ``room``."""
    widths = {
        title: 1 + max(*map(len, title.split("\n")), *(len(text or "-") for text in column), 0)
        for title, column in cells.items()
    }
    gone: list[str] = []
    for title in GIVE_WAY:
        if sum(widths.values()) <= room:
            break
        if widths.pop(title, None) is not None:
            gone.append(title)
    return gone


def number(value: float | None, unit: str = "") -> str | None:
    """Three significant digits, never an exponent."""
    if value is None:
        return None
    digits = 0 if abs(value) >= 99.95 else 1 if abs(value) >= 9.995 else 2
    return f"{value:.{digits}f}{unit}"


def percent(value: float | None) -> str | None:
    return None if value is None else f"{100 * value:.0f}%"


def compile_line(results: Sequence[Result]) -> str:
    """Compile seconds of each method, and those of the first call of a peer that compiles.

    A method compiled later reuses what an earlier one built.
    """
    compiled = [r for r in results if r.first.generation is not None]
    parts = [f"{r.contestant.name} {r.first.compile_seconds:.1f} s" for r in reversed(compiled)]
    peers = [r for r in results if r.contestant.peer and r.contestant.method not in UNCOMPILED]
    parts += [f"{r.contestant.name} {r.first.seconds:.1f} s" for r in peers]
    return "compiled once, not in the table: " + ", ".join(parts)


def range_line(rows: Sequence[Row], names: Sequence[str]) -> str:
    """Least and most tokens/s of the rounds of each row."""
    parts = [
        f"{name} {number(row['tokens_per_second_min'])}-{number(row['tokens_per_second_max'])}"
        for row, name in zip(rows, names, strict=True)
    ]
    return "tokens/s, slowest and fastest round: " + ", ".join(parts)


Cell = Callable[[Row], str | None]


def milliseconds(name: str) -> Cell:
    return lambda row: number(row[name])


def megabytes(name: str) -> Cell:
    return lambda row: number(row[name] / 1e6)


def over_loop(row: Row) -> str | None:
    """Speed beside the one-token loop's on the same requests."""
    loop = row["loop_tokens_per_second"]
    return None if loop is None else number(row["tokens_per_second"] / loop, "x")


SWEEP_COLUMNS: list[tuple[str, Cell]] = [
    ("tokens/s", lambda row: number(row["tokens_per_second"])),
    ("over\nloop", over_loop),
    ("of\nbound", lambda row: percent(row["share_of_bound"])),
    ("ms per\ncycle", milliseconds("ms_per_cycle")),
    ("pre-\ndicted", milliseconds("predicted_ms_per_cycle")),
    ("draft\nms", milliseconds("draft_ms")),
    ("score\nms", milliseconds("score_ms")),
    ("resam-\nple", milliseconds("resample_ms")),
    ("host\nms", milliseconds("host_ms")),
    ("read\nMB", megabytes("bytes_per_cycle")),
    ("prompt\nMB", megabytes("prompt_cache_bytes")),
    ("suffixes\nMB", megabytes("suffix_cache_bytes")),
]


def sweep_table(rows: Sequence[Row], axes: Mapping[str, str]) -> Table:
    """At most 100 columns wide; ``axes`` names what moves, by field. The fastest row stands out."""
    columns = [(letter, lambda row, name=name: str(row[name])) for name, letter in axes.items()]
    cells = {title: [cell(row) for row in rows] for title, cell in [*columns, *SWEEP_COLUMNS]}
    cells = {title: column for title, column in cells.items() if any(text is not None for text in column)}
    best = max(row["tokens_per_second"] for row in rows)
    table = Table(box=None, padding=(0, 1, 0, 0), header_style="bold", pad_edge=False)
    for title in cells:
        table.add_column(title, justify="right", no_wrap=True)
    for index, row in enumerate(rows):
        texts = [column[index] or "[dim]-[/dim]" for column in cells.values()]
        table.add_row(*texts, style="bold green" if row["tokens_per_second"] == best else None)
    return table
