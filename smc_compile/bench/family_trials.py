"""One family of the transformers library tried: a tiny model of it is built, traced, given a cache and compared."""

from __future__ import annotations

import contextlib
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from smc_compile.errors import CacheError, SMCError
from smc_compile.own_cache import OwnCache
from smc_compile.pairs.tiny_transformers import Float64Throughout, LastLogits64, build, library
from smc_compile.passes.pipeline import Traced, trace_model
from smc_compile.program.model import TRACE_BATCH
from smc_compile.program.model_calls import gathered_experts, logits_of, traceable

CONTEXT = 16  # positions at which masks are read


@dataclass(frozen=True)
class FamilyTrial:
    """One family with one implementation of attention.

    ``status`` is "compiled", "own cache" (refused, with our reason, but the model's own cache serves), "refused",
    "failed" (an error of another kind: a defect of ours), "no decoder" (positions read later ones) or "not built" (no
    tiny model that maps tokens to logits came out of the configuration). Fields after ``reason`` are None unless
    compiled, but that an own cache has an ``error`` too.
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


def families() -> list[str]:
    """The model types that transformers maps to a causal language model.

    Raises:
        OptionError: when transformers is not installed.
    """
    library()
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def try_family(family: str, implementations: Sequence[str | None]) -> list[FamilyTrial]:
    """A row for each implementation of attention; one that the family does not offer gives no row of its own."""
    rows: list[FamilyTrial] = []
    for implementation in implementations:
        row = try_model(family, implementation)
        if all(row.attention != other.attention for other in rows):
            rows.append(row)
    return rows


def try_model(family: str, implementation: str | None) -> FamilyTrial:
    """Build, run and compile one tiny model."""
    try:
        with _quiet():
            model = build(family, implementation)
            looks_ahead = reads_later_tokens(model)
    except Exception as error:  # a configuration that does not fit our sizes can fail in any way
        return FamilyTrial(family, implementation or "-", "not built", _first_line(error))
    attention = getattr(model.config, "_attn_implementation", None) or "-"
    if looks_ahead:
        return FamilyTrial(family, attention, "no decoder", "earlier logits change when the last token does")
    start = time.perf_counter()
    try:
        with _quiet():
            ids = torch.zeros(TRACE_BATCH, 2, dtype=torch.int64)
            traced = trace_model(LastLogits64(model), ids, (), check=True, sampled=False)
    except SMCError as error:
        return try_own_cache(family, attention, model, error)
    except Exception as error:  # the table is there to find these
        return FamilyTrial(family, attention, "failed", _first_line(error))
    return FamilyTrial(
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


def try_own_cache(family: str, attention: str, model: nn.Module, refusal: SMCError) -> FamilyTrial:
    """The row of a model for which no cache could be derived: does its own serve?"""
    start = time.perf_counter()
    reason = _reason(refusal)
    try:
        with _quiet(), Float64Throughout(), gathered_experts(model):
            error = _own_cache(model).error
    except CacheError as failure:
        return FamilyTrial(family, attention, "refused", f"{reason}; its own cache: {_reason(failure)}")
    except Exception as failure:  # a library's cache can fail in any way
        return FamilyTrial(family, attention, "refused", f"{reason}; its own cache: {_first_line(failure)}")
    return FamilyTrial(family, attention, "own cache", reason, error=error, seconds=time.perf_counter() - start)


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
