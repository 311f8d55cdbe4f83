"""Rows of a sweep as a table."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from rich.table import Table

from smc_compile.bench.figures import Row
from smc_compile.bench.tables import number, percent

Cell = Callable[[Row], str | None]


def milliseconds(name: str) -> Cell:
    return lambda row: number(row[name])


def megabytes(name: str) -> Cell:
    return lambda row: number(row[name] / 1e6)


def over_loop(row: Row) -> str | None:
    """Speed beside the one-token loop's on the same requests."""
    loop = row["loop_tokens_per_second"]
    return None if loop is None else number(row["tokens_per_second"] / loop, "x")


COLUMNS: list[tuple[str, Cell]] = [
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
    cells = {title: [cell(row) for row in rows] for title, cell in [*columns, *COLUMNS]}
    cells = {title: column for title, column in cells.items() if any(text is not None for text in column)}
    best = max(row["tokens_per_second"] for row in rows)
    table = Table(box=None, padding=(0, 1, 0, 0), header_style="bold", pad_edge=False)
    for title in cells:
        table.add_column(title, justify="right", no_wrap=True)
    for index, row in enumerate(rows):
        texts = [column[index] or "[dim]-[/dim]" for column in cells.values()]
        table.add_row(*texts, style="bold green" if row["tokens_per_second"] == best else None)
    return table
