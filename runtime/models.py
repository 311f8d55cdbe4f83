"""A language model while it generates: prefill once, then advance rows whose state particles permute."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .compiled import compile_function, mark_dynamic
from .regions import Forward, State, unify


class IncrementalGraphs(Protocol):
    """What the compiler hands over for a model with a synthesized cache (see passes.ir.CachedLM)."""

    @property
    def prefill(self) -> Callable[..., Any]: ...
    @property
    def score(self) -> Callable[..., Any]: ...
    @property
    def advance(self) -> Callable[..., Any]: ...
    @property
    def tables(self) -> Callable[..., Any]: ...
    @property
    def sites(self) -> Sequence[Any]: ...
    @property
    def table_axes(self) -> Sequence[tuple[int, ...]]: ...


class RuntimeModel(Protocol):
    """How a session sees a model."""

    score: Forward
    advance: Forward
    whole: bool  # False: the model calls compiled pieces itself

    def begin(self, ids: Tensor, n_particles: int, capacity: int, length: int) -> tuple[Tensor, Any, State]:
        """Prefill ``ids [B, P]``: rows [B, V], the shared context, and the state of B*N rows."""
        ...

    def copy_rows(self, state: State, dead: Tensor, source: Tensor, used: int) -> None:
        """Overwrite rows ``dead`` by rows ``source``, in place; ``used`` positions of a suffix hold anything."""
        ...


class CachedModel:
    """A model whose cache the compiler derived.

    State: one suffix [R, H, S, d] per site. Context: prompts, tables, weights.
    """

    def __init__(
        self, graphs: IncrementalGraphs, weights: Callable[[], list[Tensor]], compiler: str, name: str
    ) -> None:
        self._graphs, self.weights = graphs, weights
        self.whole = not hasattr(graphs.advance, "with_pieces")  # repeated layers come in pieces: see Layered
        self.score = _incremental_body(_compile_pieces(graphs.score, f"{name}_score", compiler), self.whole)
        self.advance = _incremental_body(_compile_pieces(graphs.advance, f"{name}_advance", compiler), self.whole)

    def begin(self, ids: Tensor, n_particles: int, capacity: int, length: int) -> tuple[Tensor, Any, State]:
        weights = self.weights()
        tables = list(self._graphs.tables(length, *weights))
        rows, *prompts = self._graphs.prefill(ids, *weights)  # as it is: large products, nothing for a compiler to gain
        prompts = [mark_dynamic(p.contiguous(), 2) for p in prompts]
        tables = [mark_dynamic(t.contiguous(), *axes) for t, axes in zip(tables, self._graphs.table_axes, strict=True)]
        return rows, (prompts, tables, weights), self._suffixes(prompts, n_particles, capacity)

    def has_tables(self, length: int) -> bool:
        """Whether the model's position tables reach ``length``: a table of learned positions ends somewhere."""
        try:
            self._graphs.tables(length, *self.weights())
        except (IndexError, RuntimeError):
            return False
        return True

    def copy_rows(self, state: State, dead: Tensor, source: Tensor, used: int) -> None:
        for suffix in state:
            suffix[dead, :, :used] = suffix[source, :, :used]

    @staticmethod
    def _suffixes(prompts: Sequence[Tensor], n_particles: int, capacity: int) -> State:
        return [
            mark_dynamic(p.new_zeros(p.shape[0] * n_particles, p.shape[1], capacity, p.shape[3]), 2) for p in prompts
        ]


def _compile_pieces(graph: Any, name: str, compiler: str) -> Callable[..., Any]:
    """A split graph with its pieces compiled, one layer for all; a whole graph compiles with the region around it."""
    if not hasattr(graph, "with_pieces"):
        return graph
    head, layer, tail = (
        compile_function(_as_function(piece), f"{name}_{part}", compiler)
        for piece, part in zip(graph.pieces, ("head", "layer", "tail"), strict=True)
    )

    return torch._dynamo.disable(graph.with_pieces((head, layer, tail)))


def _as_function(piece: Callable[..., Any]) -> Callable[..., Any]:
    def run(*inputs: Any) -> Any:
        return piece(*inputs)

    return run


def _incremental_body(graph: Callable[..., Any], whole: bool) -> Forward:
    def forward(tokens: Tensor, positions: Tensor, slots: Tensor, state: State, context: Any) -> tuple[Tensor, State]:
        prompts, tables, weights = context
        if whole:
            unify(prompts, 2)
            unify(state, 2)
        return graph(tokens, positions, slots, *prompts, *state, *tables, *weights), []  # suffixes change in place

    return forward


class StatefulModel:
    """A model that carries its own state: ``step(tokens [R, T], pos, state) -> (logits [R, T, V], state)``."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self._spec: Any = None
        self.whole = getattr(model, "traceable", True)  # False: its step stays in Python (see smc_compile.own_cache)
        self.score = self._body(all_positions=True)
        self.advance = self._body(all_positions=False)

    def begin(self, ids: Tensor, n_particles: int, capacity: int, length: int) -> tuple[Tensor, Any, State]:
        state = self.model.initial_state(ids.shape[0])
        logits, state = self.model.step(ids, torch.zeros((), dtype=torch.int64, device=ids.device), state)
        leaves, self._spec = pytree.tree_flatten(state)
        return logits[:, -1], (), [leaf.repeat_interleave(n_particles, 0) for leaf in leaves]

    def copy_rows(self, state: State, dead: Tensor, source: Tensor, used: int) -> None:
        for leaf in state:
            leaf[dead] = leaf[source]

    def _body(self, all_positions: bool) -> Forward:
        def forward(
            tokens: Tensor, positions: Tensor, slots: Tensor, state: State, context: Any
        ) -> tuple[Tensor, State]:
            logits, new = self.model.step(tokens, positions[0], pytree.tree_unflatten(state, self._spec))
            rows = logits.flatten(0, 1) if all_positions else logits[:, -1]
            return rows, pytree.tree_leaves(new)

        return forward
