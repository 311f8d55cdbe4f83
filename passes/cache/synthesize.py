"""Turn a causal graph into its incremental form: the same ops on T new positions, earlier keys and values cached."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from torch import fx
from torch._dynamo.utils import counters

from smc_compile.passes.axes.axis_types import OTHER, REPEAT, B, Typing, refuse
from smc_compile.passes.axes.infer import type_axes
from smc_compile.passes.cache.attention_emitter import AttentionEmitter
from smc_compile.passes.cache.emitter import ADVANCE, PREFILL, SCORE
from smc_compile.passes.cache.position_tables import frontier, growing_axes, may_shift, table_graph
from smc_compile.passes.fx_tools import output_values
from smc_compile.passes.ir import CachedLM, CacheSite, CausalLM

log = logging.getLogger(__name__)


def synthesize_cache(lm: CausalLM) -> CachedLM:
    """Derive prefill, score and advance graphs for ``lm``.

    Raises:
        CacheError: naming the op that has no incremental form.
    """
    typing = type_axes(lm)
    (rows,) = output_values(lm.graph)
    _require_rows(typing, rows)
    tables = frontier(typing)
    prefill = AttentionEmitter(typing, tables, PREFILL).run()
    score = AttentionEmitter(typing, tables, SCORE).run()
    advance = AttentionEmitter(typing, tables, ADVANCE).run()
    cached = CachedLM(
        prefill=prefill.module,
        score=score.module,
        advance=advance.module,
        tables=table_graph(typing, tables),
        sites=tuple(prefill.sites),
        table_axes=tuple(growing_axes(node) for node in tables),
        shifting=tuple(may_shift(typing, node) for node in tables),
        vocab_size=int(rows.meta["val"].shape[-1]),
        max_positions=lm.max_positions,
        attention=tuple(typing.attention.values()),
        report=_report(typing, prefill.sites, tables),
    )
    counters["smc_compile"]["attention_over_cache"] += len(typing.attention)
    counters["smc_compile"]["token_free_tables"] += len(tables)
    for name in (PREFILL, SCORE, ADVANCE):
        log.debug("cached %s\n%s", name, getattr(cached, name).graph)
    return cached


def _require_rows(typing: Typing, rows: fx.Node) -> None:
    if rows not in typing.after_last:
        raise refuse(rows, "the loop does not sample from the last position", "sample from logits[:, -1]")
    axes = typing.of(rows)
    if len(axes) != 2 or axes[0] != (B,) or any(atom.kind not in (OTHER, REPEAT) for atom in axes[1]):
        raise refuse(rows, f"the sampler's input has axes {axes}, not [batch, vocabulary]", "sample from logits[:, -1]")


def _report(typing: Typing, sites: Sequence[CacheSite], tables: Sequence[fx.Node]) -> list[str]:
    roles = list(typing.attention.values())
    lines = [
        f"attention: {roles.count('sdpa')} scaled_dot_product_attention, {roles.count('score')} written as matmul",
        f"caches: {len(sites)} tensors, {sum(site.bytes_per_token for site in sites)} bytes per token",
        f"token-free tables: {', '.join(node.name for node in tables) or 'none'}",
    ]
    return lines
