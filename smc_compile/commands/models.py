"""``smc-compile models``: which decoders of the transformers library compile, found out by trying each of them."""

from __future__ import annotations

import argparse
import contextlib
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor, nn

from smc_compile.bench.measure import progress_bar
from smc_compile.bench.report import check_json_path, write_json
from smc_compile.bench.tables import number
from smc_compile.errors import CacheError, OptionError, SMCError
from smc_compile.own_cache import OwnCache
from smc_compile.pairs.tiny_transformers import Float64Throughout, LastLogits64, build, library
from smc_compile.passes.pipeline import Traced, trace_model
from smc_compile.program.model import TRACE_BATCH
from smc_compile.program.model_calls import gathered_experts, logits_of, traceable

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

CONTEXT = 16  # positions at which masks are read
ATTENTION = {"sdpa": (None,), "eager": ("eager",), "both": (None, "eager")}


@dataclass(frozen=True)
class Row:
    """One family with one implementation of attention.

    ``status`` is "compiled", "own cache" (refused, with our reason, but the model's own cache serves), "refused",
    "failed" (an error of another kind: a defect of ours), "no decoder" (positions read later ones) or "not built" (no
    tiny model that maps tokens to logits came out of the configuration). What follows ``reason`` is None unless
    compiled; the own cache has an ``error``, too.
    """

    family: str
    attention: str
    status: str
    reason: str | None = None
    attention_ops: str | None = None
    windows: list[int] | None = None
    tables: int | None = None
    error: float | None = None
    bytes_per_token: int | None = None
    seconds: float | None = None


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
    rows: list[Row] = []
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


def families() -> list[str]:
    """The model types that transformers maps to a causal language model.

    Raises:
        OptionError: when transformers is not installed.
    """
    library()
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


# ---- one family -----------------------------------------------------------------------------------------------------


def try_family(family: str, implementations: Sequence[str | None]) -> list[Row]:
    """A row for each implementation of attention; one that the family does not offer gives no row of its own."""
    rows: list[Row] = []
    for implementation in implementations:
        row = try_model(family, implementation)
        if all(row.attention != other.attention for other in rows):
            rows.append(row)
    return rows


def try_model(family: str, implementation: str | None) -> Row:
    """Build, run and compile one tiny model."""
    try:
        with _quiet():
            model = build(family, implementation)
            looks_ahead = reads_later_tokens(model)
    except Exception as error:  # a configuration that does not fit our sizes can fail in any way
        return Row(family, implementation or "-", "not built", _first_line(error))
    attention = getattr(model.config, "_attn_implementation", None) or "-"
    if looks_ahead:
        return Row(family, attention, "no decoder", "earlier logits change when the last token does")
    start = time.perf_counter()
    try:
        with _quiet():
            ids = torch.zeros(TRACE_BATCH, 2, dtype=torch.int64)
            traced = trace_model(LastLogits64(model), ids, (), check=True, sampled=False)
    except SMCError as error:
        return try_own_cache(family, attention, model, error)
    except Exception as error:  # the table is there to find these
        return Row(family, attention, "failed", _first_line(error))
    return Row(
        family,
        attention,
        "compiled",
        attention_ops=attention_ops(traced),
        windows=windows(traced),
        tables=len(traced.cached.table_axes),
        error=traced.error,
        bytes_per_token=sum(site.bytes_per_token for site in traced.cached.sites),
        seconds=time.perf_counter() - start,
    )


def reads_later_tokens(model: nn.Module) -> bool:
    """Whether the logits of earlier positions change when the last token does: then the model is no decoder."""
    ids = torch.tensor([[3, 4, 5, 6], [3, 4, 5, 7]])
    with Float64Throughout(), traceable(model):
        logits = logits_of(model, ids)
    return not torch.allclose(logits[0, :-1], logits[1, :-1], atol=1e-5, equal_nan=True)


def try_own_cache(family: str, attention: str, model: nn.Module, refusal: SMCError) -> Row:
    """The row of a model for which no cache could be derived: does its own serve?"""
    start = time.perf_counter()
    reason = _reason(refusal)
    try:
        with _quiet(), Float64Throughout(), gathered_experts(model):
            error = _own_cache(model).error
    except CacheError as failure:
        return Row(family, attention, "refused", f"{reason}; its own cache: {_reason(failure)}")
    except Exception as failure:  # a library's cache can fail in any way
        return Row(family, attention, "refused", f"{reason}; its own cache: {_first_line(failure)}")
    return Row(family, attention, "own cache", reason, error=error, seconds=time.perf_counter() - start)


def _own_cache(model: nn.Module) -> OwnCache:
    """The model with its own cache; where it makes none, one of the library that it may fill."""
    try:
        return OwnCache(model)
    except CacheError as failure:
        if "no cache of its own" not in failure.what:
            raise
    return OwnCache(model, partial(library().DynamicCache, config=model.config))


def _reason(error: SMCError) -> str:
    why = error.why.splitlines()[0] if error.why else ""
    return f"{error.what.removeprefix('no cache can be synthesized: ')} ({why})"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the notes of transformers on configurations and kernels."""
    logging = library().utils.logging
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(verbosity)


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    first = " ".join(lines[:2]) if lines and lines[0].endswith(":") else "".join(lines[:1])
    return f"{type(error).__name__}: {first}"


def attention_ops(traced: Traced) -> str:
    """How many attentions were found, and whether fused ("sdpa") or written out ("matmul")."""
    roles = list(traced.cached.attention)
    found = {"sdpa": roles.count("sdpa"), "matmul": roles.count("score")}
    return " + ".join(f"{count} {name}" for name, count in found.items() if count) or "none"


def windows(traced: Traced) -> list[int]:
    """How many positions a query sees at most, for each mask that hides earlier ones."""
    tables = traced.cached.tables(CONTEXT, *traced.owned())
    seen = [_visible(table) for table, axes in zip(tables, traced.cached.table_axes, strict=True) if len(axes) == 2]
    return sorted({count for count in seen if count < CONTEXT})


def _visible(mask: Tensor) -> int:
    """The largest number of keys that a row of a mask [..., Q, K] lets through; float masks hide with huge numbers."""
    shown = mask if mask.dtype == torch.bool else mask > -1e4
    if shown[..., 0, -1].all():  # a table of what is hidden: the first query sees no later key
        shown = ~shown
    return int(shown.sum(-1).max())


# ---- showing --------------------------------------------------------------------------------------------------------


def show(rows: Sequence[Row], console: Console) -> None:
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


def compiled_table(rows: Sequence[Row]) -> Table:
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


def own_table(rows: Sequence[Row]) -> Table:
    """The families whose own cache serves, how far it is from the model without it, and why none was derived."""
    table = Table(box=None, padding=(0, 1), header_style="bold", pad_edge=False)
    table.add_column("own cache", width=24, no_wrap=True, overflow="ellipsis")
    table.add_column("largest\nerror", justify="right", no_wrap=True)
    table.add_column("why no cache was derived", width=60, no_wrap=True, overflow="ellipsis")
    for row in rows:
        table.add_row(escape(row.family), f"{row.error:.0e}", escape(row.reason or ""))
    return table


def others_table(rows: Sequence[Row]) -> Table:
    """Why the others did not compile, one line each."""
    table = Table(box=None, padding=(0, 1), header_style="bold", pad_edge=False)
    for title, width in (("family", 24), ("attention", 9), ("", 10), ("reason", 51)):
        table.add_column(title, width=width, no_wrap=True, overflow="ellipsis")
    for row in rows:
        table.add_row(escape(row.family), row.attention, row.status, escape(row.reason or ""))
    return table
