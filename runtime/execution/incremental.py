"""A language model while it generates: prefill once, then rows that advance and whose states particles copy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from smc_compile.errors import InputError
from smc_compile.runtime.algorithms.tensors import mark_dynamic
from smc_compile.runtime.execution.region import compile_function
from smc_compile.runtime.state.region_types import Forward, Places, State, unify
from smc_compile.runtime.state.request import Request


class IncrementalGraphs(Protocol):
    """The graphs of a model with a synthesized cache, as the compiler gives them (see passes.ir.CachedLM)."""

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
    @property
    def vocab_size(self) -> int: ...
    @property
    def max_positions(self) -> int | None: ...


class RuntimeModel(Protocol):
    """How a session sees a model."""

    score: Forward
    advance: Forward
    whole: bool  # score and advance compile with the region around them; False: they call compiled pieces themselves
    forgets: bool  # what was read behind a position may be dropped: nothing that comes later depends on it

    def begin(self, request: Request, n_particles: int, capacity: int) -> tuple[Tensor, Any, State]:
        """Prefill the prompts: rows [B, V], the shared context, and the state of B*N rows."""
        ...

    def state_bytes(self, positions: int) -> int:
        """Bytes of the state of one row with so many positions, at least."""
        ...

    def logit_bytes(self) -> int:
        """Bytes of the logits at one position in float32; 0 where the size of the vocabulary is not known."""
        ...

    def copy_rows(self, state: State, dead: Tensor, source: Tensor, since: int, used: int) -> None:
        """Overwrite rows ``dead`` by rows ``source``, in place.

        Only slots ``since`` to ``used`` of the suffixes are copied: those before are the same, those after are empty.
        """
        ...

    def grow(self, state: State, size: int) -> State:
        """The state with suffixes of ``size`` slots."""
        ...

    def take(self, context: Any, state: State, requests: Tensor, rows: Tensor) -> tuple[Any, State]:
        """Context and state of these requests and rows."""
        ...

    def rows(self, state: State, rows: Tensor) -> State:
        """The state of these rows, one of which may come several times."""
        ...


class CachedModel:
    """A model whose cache the compiler derived.

    State: one suffix [R, H, S, d] per site, where keys or values are cached; it changes in place. Context: prompts
    [B, H, P, d], position tables, weights. A later token writes over what was read behind its position.
    """

    forgets = True

    def __init__(
        self, graphs: IncrementalGraphs, weights: Callable[[], list[Tensor]], compiler: str, name: str
    ) -> None:
        self._graphs, self.weights = graphs, weights
        self.whole = not hasattr(graphs.advance, "with_pieces")  # see passes.lower.outline_layers.Layered
        self.score = _incremental_body(_compile_pieces(graphs.score, f"{name}_score", compiler), self.whole)
        self.advance = _incremental_body(_compile_pieces(graphs.advance, f"{name}_advance", compiler), self.whole)

    def begin(self, request: Request, n_particles: int, capacity: int) -> tuple[Tensor, Any, State]:
        weights = self.weights()
        length = int(request.positions_read.max()) + 1  # one for keys that no query sees
        rows, *prompts = by_length(request, lambda ids: self._graphs.prefill(ids, *weights), positions=2)
        prompts = [mark_dynamic(p.contiguous(), 2) for p in prompts]
        tables = self._tables(length, max(length, request.reach), weights)
        return rows, (prompts, tables, weights), self._suffixes(prompts, n_particles, capacity)

    def grow(self, state: State, size: int) -> State:
        return [mark_dynamic(F.pad(suffix, (0, 0, 0, size - suffix.shape[2])), 2) for suffix in state]

    def take(self, context: Any, state: State, requests: Tensor, rows: Tensor) -> tuple[Any, State]:
        prompts, tables, weights = context
        prompts = [mark_dynamic(p[requests], 2) for p in prompts]
        return (prompts, tables, weights), self.rows(state, rows)

    def rows(self, state: State, rows: Tensor) -> State:
        return [mark_dynamic(suffix[rows], 2) for suffix in state]

    def state_bytes(self, positions: int) -> int:
        return positions * sum(site.bytes_per_token for site in self._graphs.sites)

    def logit_bytes(self) -> int:
        return self._graphs.vocab_size * 4

    def has_tables(self, length: int) -> bool:
        """Whether the model has positions up to ``length``: a table of learned ones ends somewhere."""
        try:
            self._graphs.tables(length, *self.weights())
        except (IndexError, RuntimeError):
            return False
        return True

    def _tables(self, length: int, reach: int, weights: list[Tensor]) -> list[Tensor]:
        """Position tables for ``length`` positions, the last of which is not read, filled up to ``reach``."""
        length -= self._graphs.max_positions == length - 1
        try:
            tables = self._graphs.tables(length, *weights)
        except (IndexError, RuntimeError):  # the model's own tables end
            length -= 1
            tables = self._graphs.tables(length, *weights)
        return [
            mark_dynamic(lengthened(table, axes, reach - length), *axes)
            for table, axes in zip(tables, self._graphs.table_axes, strict=True)
        ]

    def copy_rows(self, state: State, dead: Tensor, source: Tensor, since: int, used: int) -> None:
        for suffix in state:
            suffix[dead, :, since:used] = suffix[source, :, since:used]

    @staticmethod
    def _suffixes(prompts: Sequence[Tensor], n_particles: int, capacity: int) -> State:
        return [
            mark_dynamic(p.new_zeros(p.shape[0] * n_particles, p.shape[1], capacity, p.shape[3]), 2) for p in prompts
        ]


def lengthened(table: Tensor, axes: Sequence[int], by: int) -> Tensor:
    """``table`` with ``by`` more positions along ``axes``, where no query stands.

    Along one axis they go on evenly, as positions do. With two, queries and keys, they hold what the first query sees
    of the last key: nothing.
    """
    for axis in axes if by else ():
        others = [other for other in axes if other != axis]
        last = table.narrow(axis, table.shape[axis] - 1, 1)
        if others:
            first = last.narrow(others[0], 0, 1)
            more = [first.expand_as(last)] * by
        elif table.is_floating_point() or table.dtype == torch.int64:
            step = last - table.narrow(axis, max(table.shape[axis] - 2, 0), 1)
            more = [last + step * (k + 1) for k in range(by)]
        else:
            more = [last] * by
        table = torch.cat([table, *more], axis)
    return table.contiguous()


def _compile_pieces(graph: Any, name: str, compiler: str) -> Callable[..., Any]:
    """A graph in pieces with each piece compiled, one for all layers.

    A whole graph stays as it is: it is compiled with the region around it.
    """
    if not hasattr(graph, "with_pieces"):
        return graph
    head, layer, tail = (
        compile_function(_as_function(piece), f"{name}_{part}", compiler)
        for piece, part in zip(graph.pieces, ("head", "layer", "tail"), strict=True)
    )
    split: Callable[..., Any] = graph.with_pieces((head, layer, tail))
    return split


def _as_function(piece: Callable[..., Any]) -> Callable[..., Any]:
    def run(*inputs: Any) -> Any:
        return piece(*inputs)

    return run


def _incremental_body(graph: Callable[..., Any], whole: bool) -> Forward:
    def forward(tokens: Tensor, places: Places, state: State, context: Any) -> tuple[Tensor, State]:
        prompts, tables, weights = context
        if whole:
            unify(prompts, 2)
            unify(state, 2)
        return graph(tokens, *places, *prompts, *state, *tables, *weights), []  # suffixes change in place

    return forward


class StatefulModel:
    """A model that carries its own state: ``step(tokens [R, T], pos, state) -> (logits [R, T, V], state)``.

    ``pos`` is the position of the first new token: a scalar, or [R] when the prompts differ in length.

    State: the tensors of the model's own state, rows first. Context: nothing.
    """

    forgets = False

    def __init__(self, model: Any) -> None:
        self.model = model
        self._spec: Any = None
        self._ragged = False
        self._row_bytes: int | None = None
        self.whole = getattr(model, "traceable", True)  # False: its step runs as Python (see smc_compile.own_cache)
        self.score = self._body(all_positions=True)
        self.advance = self._body(all_positions=False)

    def begin(self, request: Request, n_particles: int, capacity: int) -> tuple[Tensor, Any, State]:
        self._ragged = bool((request.lengths != request.lengths[0]).any())
        if self._ragged and getattr(self.model, "one_length", False):
            raise InputError(
                "prompts of different lengths cannot share a batch with this model",
                f"{type(self.model).__name__} keeps one length for all rows of its cache",
                "generate for the prompts of each length in a call of their own",
            )
        rows, *leaves = by_length(request, self._prefill)
        return rows, (), [leaf.repeat_interleave(n_particles, 0) for leaf in leaves]

    def _prefill(self, ids: Tensor) -> list[Tensor]:
        state = self.model.initial_state(ids.shape[0])
        logits, state = self.model.step(ids, torch.zeros((), dtype=torch.int64, device=ids.device), state)
        leaves, self._spec = pytree.tree_flatten(state)
        return [logits[:, -1], *leaves]

    def state_bytes(self, positions: int) -> int:
        if self._row_bytes is None:  # the initial state counts; it may grow
            leaves = pytree.tree_leaves(self.model.initial_state(1))
            self._row_bytes = sum(leaf.nbytes for leaf in leaves if isinstance(leaf, Tensor))
        return self._row_bytes

    def logit_bytes(self) -> int:
        return int(getattr(self.model, "vocab_size", 0)) * 4

    def copy_rows(self, state: State, dead: Tensor, source: Tensor, since: int, used: int) -> None:
        for leaf in state:
            leaf[dead] = leaf[source]

    def grow(self, state: State, size: int) -> State:
        return state

    def take(self, context: Any, state: State, requests: Tensor, rows: Tensor) -> tuple[Any, State]:
        return context, self.rows(state, rows)

    def rows(self, state: State, rows: Tensor) -> State:
        return [leaf[rows] for leaf in state]

    def _body(self, all_positions: bool) -> Forward:
        def forward(tokens: Tensor, places: Places, state: State, context: Any) -> tuple[Tensor, State]:
            first = places.positions[:, 0]  # [B]
            # Requests of one length are at one position, but for those that have finished and stay at their last.
            pos = first.repeat_interleave(tokens.shape[0] // first.shape[0]) if self._ragged else first.amax()
            logits, new = self.model.step(tokens, pos, pytree.tree_unflatten(state, self._spec))
            rows = logits.flatten(0, 1) if all_positions else logits[:, -1]
            return rows, pytree.tree_leaves(new)

        return forward


def by_length(
    request: Request, prefill: Callable[[Tensor], Sequence[Tensor]], positions: int | None = None
) -> list[Tensor]:
    """``prefill(ids [b, P'])`` for the prompts of each length P' without padding; the results [B, ...] of all.

    Results after the first may have an axis ``positions`` of size P'. It is filled up to P with zeros.
    """
    groups = request.lengths.unique().tolist()
    if len(groups) == 1 and (positions is None or groups[0] == request.ids.shape[1]):
        return list(prefill(request.ids[:, -groups[0] :]))
    results: list[Tensor] = []
    for length in groups:
        rows = (request.lengths == length).nonzero()[:, 0]
        for i, part in enumerate(prefill(request.ids[rows, -length:])):
            sizes = [request.batch, *part.shape[1:]]
            if positions is not None and i > 0:
                sizes[positions] = request.ids.shape[1]
            if len(results) <= i:
                results.append(part.new_zeros(sizes))
            place = results[i] if positions is None or i == 0 else results[i].narrow(positions, 0, length)
            place[rows] = part
    return results
