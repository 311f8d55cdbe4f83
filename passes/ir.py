"""The values that pass from one compiler pass to the next, each with the rules it must keep."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx

from smc_compile.errors import SMCError
from smc_compile.passes.fx_tools import mutated_inputs, output_values


@dataclass(frozen=True)
class CausalLM:
    """One iteration of a decode loop as a functional ATen graph: ``ids [B, S] -> rows [B, V]`` at the last position.

    Attributes:
        graph_module: its placeholders are the token ids and the weights, in any order; S is symbolic, B is ``batch``.
        ids: the placeholder of the token ids.
        weights: the other placeholders, in the order in which weights are passed.
        batch: the batch size of the trace (a constant of the graph, generalised by axis typing).
        max_positions: the longest S that the export found legal, or None.
    """

    graph_module: fx.GraphModule
    ids: fx.Node
    weights: tuple[fx.Node, ...]
    batch: int
    max_positions: int | None

    @property
    def graph(self) -> fx.Graph:
        return self.graph_module.graph

    def arguments(self, ids: Tensor, weights: Sequence[Tensor]) -> list[Tensor]:
        """What the graph module is called with: ids [B, S] and the weights in the order of its placeholders."""
        given = {self.ids: ids, **dict(zip(self.weights, weights, strict=True))}
        return [given[node] for node in self.graph.find_nodes(op="placeholder")]

    def verify(self) -> None:
        """Check that the graph is well-formed: lint, one output, a value on every node, no write in place.

        Raises:
            SMCError: naming what is not.
        """
        self.graph.lint()
        if len(output_values(self.graph)) != 1:
            raise SMCError("internal: a causal model has exactly one output")
        for node in self.graph.nodes:
            if node.op != "output" and "val" not in node.meta:
                raise SMCError(f"internal: node {node.name} carries no value")
            if mutated_inputs(node):
                raise SMCError(f"internal: node {node.name} writes in place")


@dataclass(frozen=True)
class CacheSite:
    """One tensor that attention reads at every earlier position: keys or values of one layer.

    The cached tensor is [rows, ``heads``, positions, ``width``]; ``heads`` counts distinct heads (before a GQA expand).
    """

    name: str
    heads: int
    width: int
    dtype: torch.dtype

    @property
    def bytes_per_token(self) -> int:
        return self.heads * self.width * self.dtype.itemsize


@dataclass(frozen=True)
class CachedLM:
    """The incremental form of a causal model. R = B*N rows, T new tokens, P prompt and S suffix positions.

    Attributes:
        prefill: ``(ids [B, P], *weights) -> (row [B, V], prompt [B, H, P, d] per site...)``.
        score: ``(tokens [R, T], positions [B, T], slots [B, T], keys [B, P+S], *prompts, *suffixes, *tables,
            *weights) -> rows [R*T, V]``; writes the new tokens' keys and values into the suffixes ([R, H, S, d]) at
            ``slots`` in place. ``positions`` say where the new tokens of each request stand, ``keys`` where its cached
            ones do; a key later than every query (padding, a free slot) is one that the model's own causality hides.
        advance: as ``score``, but only the last position's ``rows [R, V]``.
        tables: ``(length: int, *weights) -> [length-sized tensors]``, the token-free values, evaluated once a call.
        sites: the caches.
        max_positions: the longest sequence the model can take, or None when it has no limit that the trace shows.
    """

    prefill: fx.GraphModule
    score: fx.GraphModule
    advance: fx.GraphModule
    tables: fx.GraphModule
    sites: tuple[CacheSite, ...]
    table_axes: tuple[tuple[int, ...], ...]  # of each table, the axes that grow with its length
    shifting: tuple[bool, ...]  # of each table, whether a number added to all its entries of a row changes nothing
    vocab_size: int
    max_positions: int | None
    attention: tuple[str, ...] = ()  # "sdpa", or "score" and "mix" for each attention written as products
    report: list[str] = field(default_factory=list)
