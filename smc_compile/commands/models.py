"""``smc-compile models``: which decoders of the transformers library compile, found out by trying each of them."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from smc_compile.bench.family_trials import FamilyTrial, families, try_family
from smc_compile.bench.measure import progress_bar
from smc_compile.bench.report import check_json_path, write_json
from smc_compile.bench.tables import number
from smc_compile.errors import OptionError
from smc_compile.pairs.tiny_transformers import library

HELP = """\
Try to compile the decoders of the transformers library.

For each family a tiny model with random weights is built from the family's own configuration (two layers, or as many as
hold each kind of layer; a window of six positions where it has windows), traced, given a cache, and compared with the
original in float64. One for which no cache can be derived is tried with its own (smc_compile.OwnCache). Nothing is
downloaded. The default is a list of common families; --all tries every causal language model that the installed
transformers knows, which takes a quarter of an hour.

  smc-compile models
  smc-compile models --only llama gemma2 --attention both
  smc-compile models --all --json models.json
"""
COMMON = """
    llama mistral qwen2 qwen3 gemma2 gemma3_text phi3 gpt2 gpt_neo gptj falcon bloom opt starcoder2 olmo2 smollm3
    granite cohere2 stablelm gpt_oss mixtral qwen3_moe
"""
ATTENTION = {"sdpa": (None,), "eager": ("eager",), "both": (None, "eager")}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``models``."""
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--only", nargs="+", metavar="FAMILY", default=COMMON.split(), help="families by model type")
    which.add_argument("--all", action="store_true", help="every causal language model of transformers")
    parser.add_argument(
        "--attention",
        choices=sorted(ATTENTION),
        default="sdpa",
        help="fused attention, where a family offers it, or matmul and softmax",
    )
    parser.add_argument("--json", metavar="FILE", help="write the rows to FILE")


def run(arguments: argparse.Namespace, console: Console) -> None:
    """Try each family, print what came out; after Ctrl-C what came out so far."""
    check_json_path(arguments.json)
    known = families()
    names = known if arguments.all else arguments.only
    unknown = [name for name in names if name not in known]
    if unknown:
        raise OptionError(f"unknown family {unknown[0]!r}", f"transformers has {', '.join(known)}")
    rows: list[FamilyTrial] = []
    try:
        with progress_bar(console) as progress:
            task = progress.add_task("", total=len(names))
            for name in names:
                progress.update(task, description=name)
                rows.extend(try_family(name, ATTENTION[arguments.attention]))
                progress.advance(task)
    finally:
        show(rows, console)
        if arguments.json:
            stored = {key: value for key, value in vars(arguments).items() if key != "run"}
            version = library().__version__
            write_json(arguments.json, "models", stored, [asdict(row) for row in rows], transformers=version)
            console.print(f"rows in {arguments.json}", style="dim", highlight=False)


def show(rows: Sequence[FamilyTrial], console: Console) -> None:
    """The families that compiled as a table, those with a cache of their own, the others with their reason, a count."""
    compiled = [row for row in rows if row.status == "compiled"]
    own = [row for row in rows if row.status == "own cache"]
    others = [row for row in rows if row.status not in ("compiled", "own cache")]
    if compiled:
        console.print(compiled_table(compiled))
        console.print()
    if own:
        console.print(own_table(own))
        console.print()
    if others:
        console.print(others_table(others))
        console.print()
    counts = {status: sum(row.status == status for row in rows) for status in dict.fromkeys(r.status for r in rows)}
    console.print(", ".join(f"{count} {status}" for status, count in counts.items()) or "nothing tried")


def compiled_table(rows: Sequence[FamilyTrial]) -> Table:
    """What was found in each family that compiled, and how far the cached form is from the original in float64."""
    table = Table(box=None, padding=(0, 1), header_style="bold", pad_edge=False)
    table.add_column("family", no_wrap=True)
    for title in ("attention", "window", "tables", "largest\nerror", "bytes per\ntoken", "seconds"):
        table.add_column(title, justify="left" if title == "attention" else "right", no_wrap=True)
    for row in rows:
        table.add_row(
            escape(row.family),
            row.attention_ops,
            ", ".join(map(str, row.windows or [])) or "[dim]-[/dim]",
            str(row.tables),
            f"{row.error:.0e}",
            str(row.bytes_per_token),
            number(row.seconds),
        )
    return table


def own_table(rows: Sequence[FamilyTrial]) -> Table:
    """The families whose own cache serves, how far it is from the model without it, and why none was derived."""
    table = Table(box=None, padding=(0, 1), header_style="bold", pad_edge=False)
    table.add_column("own cache", width=24, no_wrap=True, overflow="ellipsis")
    table.add_column("largest\nerror", justify="right", no_wrap=True)
    table.add_column("why no cache was derived", width=60, no_wrap=True, overflow="ellipsis")
    for row in rows:
        table.add_row(escape(row.family), f"{row.error:.0e}", escape(row.reason or ""))
    return table


def others_table(rows: Sequence[FamilyTrial]) -> Table:
    """Why the others did not compile, one line each."""
    table = Table(box=None, padding=(0, 1), header_style="bold", pad_edge=False)
    for title, width in (("family", 24), ("attention", 9), ("", 10), ("reason", 51)):
        table.add_column(title, width=width, no_wrap=True, overflow="ellipsis")
    for row in rows:
        table.add_row(escape(row.family), row.attention, row.status, escape(row.reason or ""))
    return table
