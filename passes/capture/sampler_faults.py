"""Refusals of the axis analysis that are the sampler's fault, not the model's: in words that fit a sampler."""

from __future__ import annotations

import torch
from torch import fx

from smc_compile.errors import CacheError, LoopError
from smc_compile.passes.fx_tools import ancestors, describe, op_name
from smc_compile.passes.ir import CausalLM

aten = torch.ops.aten
_MIX_TOKENS = frozenset(
    ["gather", "scatter", "scatter_add", "scatter_reduce", "index_put", "index", "sum", "bincount", "amax", "any",
     "squeeze", "max", "cumsum", "one_hot", "isin", "unfold"]
)  # fmt: skip


def as_sampler_fault(lm: CausalLM, error: CacheError) -> CacheError | LoopError:
    """The refusal of an op behind the selection of the last position in the sampler's words; others as they are."""
    node = error.node
    chosen = first_choices(lm)
    if node is None or not chosen or node in ancestors(*chosen):
        return error
    if op_name(node) in _MIX_TOKENS and _reads_tokens(lm, node, chosen):
        return LoopError(
            "The sampler reads the tokens of the text.",
            f"{describe(node)}: what a token is drawn from depends on earlier tokens in another way than by the model",
            "write it as a function of ids and of logits = model(ids)[:, -1]; smc_compile.generate(model, draft, ids, "
            "logits_processor=[...]) takes processors that read the text",
        )
    if "line up" in error.what or "mixes requests" in error.what:
        return LoopError(
            "The sampler loses the axis of the requests.",
            f"{describe(node)}: a value of each request meets the vocabulary, or one request is picked",
            "keep both axes: logits[:, -1], values[:, -1:], torch.cat([ids, token], 1) with ids [1, P] for one prompt",
        )
    return LoopError(
        "The sampler has an op that has no form for many rows.",
        f"{describe(node)}: {error.what.partition(': ')[2]}",
        "write it with ops along the vocabulary, dim=-1",
    )


def first_choices(lm: CausalLM) -> list[fx.Node]:
    """Where the last position is selected: writes in place select it again behind the sampler's ops."""
    found: list[fx.Node] = []
    for node in lm.graph.nodes:
        if _selects_position(node):
            behind = ancestors(node)
            if lm.ids in behind and behind.isdisjoint(found):
                found.append(node)
    return found


def _selects_position(node: fx.Node) -> bool:
    """``x[:, -1]`` or a slice of one position, along an axis that grows with the text."""
    if node.target not in (aten.select.int, aten.slice.Tensor):
        return False
    source = node.args[0]
    value = source.meta["val"]  # type: ignore[union-attr]
    dim = node.args[1] if len(node.args) > 1 else 0
    if not value.is_floating_point() or isinstance(value.shape[dim], int):
        return False
    left = node.meta["val"].shape[dim] if node.target is aten.slice.Tensor else 1
    return isinstance(left, int) and left == 1


def _reads_tokens(lm: CausalLM, node: fx.Node, chosen: list[fx.Node]) -> bool:
    """Whether the ids reach a node without going through the model's last position."""
    pending, seen = [node], set(chosen)
    while pending:
        for source in pending.pop().all_input_nodes:
            if source is lm.ids:
                return True
            if source not in seen and source.target is not aten.sym_size.int:
                seen.add(source)
                pending.append(source)
    return False
