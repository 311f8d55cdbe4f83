"""Re-emit a causal graph on T new positions: sizes, token-free tables, ordinary ops, the last position."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Self

import torch
from torch import fx

from smc_compile.errors import CacheError
from smc_compile.passes.axes.axis_types import (
    BATCH,
    CHOSEN,
    KEY,
    OTHER,
    QUERY,
    REPEAT,
    Axes,
    Axis,
    B,
    K,
    Q,
    Typing,
    expression,
    refuse,
)
from smc_compile.passes.axes.helpers import axis_index
from smc_compile.passes.axes.key_selection import choose_keys
from smc_compile.passes.cache.head_layout import product
from smc_compile.passes.cache.position_tables import (
    add,
    affine,
    at_positions,
    grows,
    is_fill,
    is_over_positions,
    multiply,
    sequence_size,
)
from smc_compile.passes.fx_tools import ancestors, arguments, erase_dead_code, op_name, output_values
from smc_compile.passes.ir import CacheSite

aten = torch.ops.aten

PREFILL, SCORE, ADVANCE = "prefill", "score", "advance"
SIZED = {
    "view",
    "reshape",
    "_unsafe_view",
    "expand",
    "expand_as",
    "flatten",
    "unflatten",
    "_reshape_alias",
    "view_copy",
    "broadcast_to",
}


EXACT = {"cat", "stack", "concat", "concatenate", "gather", "take_along_dim", "scatter", "scatter_add",
         "scatter_reduce", "slice_scatter", "select_scatter"}  # fmt: skip  # operands do not broadcast


class Emitter(ABC):
    """Re-emits the graph for one region: ``prefill`` over a prompt, or ``score``/``advance`` over T new tokens.

    Attributes:
        module: the graph, once it has run.
        sites: the caches that it found, in prefill.
    """

    def __init__(self, typing: Typing, tables: list[fx.Node], mode: str) -> None:
        self.typing, self.tables, self.mode = typing, tables, mode
        self.graph = fx.Graph()
        self.env: dict[fx.Node, Any] = {}
        self.sites: list[CacheSite] = []
        self.site_values: list[fx.Node] = []
        self._prompts: list[fx.Node] = []
        self._suffixes: list[fx.Node] = []
        self._aligned: dict[tuple[Any, ...], fx.Node] = {}
        self.module: fx.GraphModule

    # -- the walk ---------------------------------------------------------------------------------------------------

    def run(self) -> Self:
        lm = self.typing.lm
        self.tokens = self.graph.placeholder("tokens")
        if self.mode != PREFILL:
            self._incremental_inputs()
        for weight in lm.weights:
            self.env[weight] = self.graph.placeholder(weight.name)
        self.env[lm.ids] = self.tokens
        self.rows_in = self.call(aten.sym_size.int, self.tokens, 0)
        self.length = self.call(aten.sym_size.int, self.tokens, 1)
        live = ancestors(*output_values(lm.graph))
        for node in lm.graph.nodes:
            if node.op in ("call_function", "get_attr") and node in live:
                self._emit(node)
        (rows,) = output_values(lm.graph)
        result = self.env[rows]
        self.graph.output((result, *self.site_values) if self.mode == PREFILL else result)
        erase_dead_code(self.graph)
        self.graph.lint()
        self.module = fx.GraphModule(lm.graph_module, self.graph)
        return self

    def _incremental_inputs(self) -> None:
        """Placeholders in the order that CachedLM documents. Sites are counted by a dry prefill."""
        count = len(type(self)(self.typing, self.tables, PREFILL).run().sites)
        self.positions = self.graph.placeholder("positions")
        self.slots = self.graph.placeholder("slots")
        self.keys = self.graph.placeholder("keys")
        self._prompts = [self.graph.placeholder(f"prompt_{i}") for i in range(count)]
        self._suffixes = [self.graph.placeholder(f"suffix_{i}") for i in range(count)]
        self._table_inputs = [self.graph.placeholder(f"table_{i}") for i in range(len(self.tables))]

    def call(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        return self.graph.call_function(target, args, kwargs)

    def _emit(self, node: fx.Node) -> None:
        typing = self.typing
        if node not in typing.dependent:
            self._emit_token_free(node)
        elif node in typing.last:
            self.env[node] = self._last(node)
        elif op_name(node) == "topk" and node in typing.slots:
            self.env[node] = self._choice(node)
        elif self.mode != PREFILL and node in typing.attention:
            self.env[node] = self._attention(node)
        else:
            if node in typing.attention:
                self._prefill_sites(node)
            self.env[node] = self._default(node)

    def _emit_token_free(self, node: fx.Node) -> None:
        """Values without positions are recomputed (they fuse); others come from tables, except in prefill."""
        if self.mode == PREFILL:
            size = sequence_size(self.typing, node)
            if size is not None and all(user in self.typing.slots for user in node.users):
                return  # says how many keys are chosen, which choose_keys finds out
            self.env[node] = (
                affine(self.graph, self.length, size, self.typing)
                if size is not None
                else self.graph.node_copy(node, lambda n: self.env[n])
            )
        elif node in self.tables:
            self.env[node] = self._table_inputs[self.tables.index(node)]
        elif not grows(node):
            self.env[node] = self.graph.node_copy(node, lambda n: self.env[n])

    # -- sizes ------------------------------------------------------------------------------------------------------

    def _rows(self, node: fx.Node | None) -> Any:
        """The size of the batch axis: rows, or rows of tokens once the last position was selected."""
        if self.mode != SCORE or node not in self.typing.after_last:
            return self.rows_in
        if not hasattr(self, "_token_rows"):
            self._token_rows = self.call(multiply, self.rows_in, self.length)
        return self._token_rows

    def _size(self, axis: Axis, node: fx.Node | None, key_length: Any = None) -> Any:
        """An axis as an int or a node that computes it."""
        size: Any = 1
        constant = 1
        for atom in axis:
            if atom.kind in (OTHER, REPEAT):
                constant *= atom.size
                continue
            if atom.kind == CHOSEN:
                raise CacheError("no cache can be synthesized: a reshape of the keys that a query chose")
            factor = self._rows(node) if atom.kind == BATCH else self.length
            if atom.kind == KEY and self.mode != PREFILL:
                factor = key_length
            if factor is None:
                raise CacheError("internal: a reshape over keys without a known length")
            if atom.kind == KEY and atom.size:
                factor = self.call(add, factor, abs(atom.size))
            size = factor if size == 1 else self.call(multiply, size, factor)
        if isinstance(size, int):
            return size * constant
        return size if constant == 1 else self.call(multiply, size, constant)

    def _sizes(self, axes: Axes, node: fx.Node | None, key_length: Any = None) -> list[Any]:
        return [self._size(axis, node, key_length) for axis in axes]

    # -- ordinary ops -----------------------------------------------------------------------------------------------

    def _default(self, node: fx.Node) -> Any:
        name = op_name(node)
        typing = self.typing
        if name in SIZED:
            source = self.env[node.all_input_nodes[0]]
            sizes = self._sizes(typing.of(node), node, self._keys_of(source, node.all_input_nodes[0]))
            return self.call(
                aten.expand.default if "expand" in name or "broadcast" in name else aten.reshape.default, source, sizes
            )
        if name == "slice":
            return self._slice(node)
        axes = typing.axes[node]
        aligned = axes[0] if isinstance(axes, list) else axes
        exact = name in EXACT
        if name == "scaled_dot_product_attention":
            aligned = (*typing.of(arguments(node)["query"])[:-1], (K,))

        def place(value: fx.Node) -> Any:
            if typing.is_dependent(value) or value.op == "placeholder":
                return self.env[value]
            if isinstance(value.meta.get("val"), torch.SymInt):
                size = expression(value)
                if size.free_symbols:
                    raise refuse(node, "an op uses the total length as a number", "use torch.arange positions instead")
                return int(size)
            if is_over_positions(value) or self._has_batch(value, aligned, exact):
                return self._align(value, aligned, node, exact)
            return self.env[value]

        return self.graph.create_node("call_function", node.target, *fx.map_arg((node.args, node.kwargs), place))

    def _choice(self, node: fx.Node) -> fx.Node:
        """The keys that each query chooses, of as many slots as there are."""
        bound = arguments(node)
        d = axis_index(bound["dim"], len(self.typing.of(bound["input"])))
        count = self.typing.of(node)[0][d][0].size  # the axes of (values, numbers of keys) are a list of two
        return self.call(choose_keys, self.env[bound["input"]], count, d, bound["sorted"])

    def _keys_of(self, emitted: Any, source: fx.Node) -> Any:
        """The key length of an emitted score-like value, for reshapes that keep the key axis."""
        axes = self.typing.axes.get(source)
        if self.mode == PREFILL or not axes or isinstance(axes, list):
            return None
        for i, axis in enumerate(axes):
            if len(axis) == 1 and axis[0].kind == KEY:
                size = self.call(aten.sym_size.int, emitted, i)
                return size if not axis[0].size else self.call(add, size, -abs(axis[0].size))
        return None

    def _slice(self, node: fx.Node) -> Any:
        bound = arguments(node)
        source = self.env[bound["input"]]
        before, after = self.typing.of(bound["input"]), self.typing.of(node)
        d = axis_index(bound["dim"], len(before))
        if before == after:
            return source
        if before[d] and before[d][0].kind == KEY:
            extra = before[d][0].size
            bounds = (0, -extra) if extra > 0 else (-extra, 2**63 - 1)
            return self.call(aten.slice.Tensor, source, d, *bounds)
        return self.call(aten.slice.Tensor, source, d, bound["start"] or 0, bound["end"], bound["step"])

    def _has_batch(self, value: fx.Node, axes: Axes, exact: bool) -> bool:
        """A token-free value that was expanded to the traced batch must follow the region's batch instead."""
        sizes = value.meta["val"].shape
        if value.op == "placeholder" or len(sizes) > len(axes):
            return False
        pairs = zip(axes[len(axes) - len(sizes) :], sizes, strict=True)
        alone = exact or self.typing.lm.batch > 1  # else an axis of one broadcasts
        return any(B in axis and self._spans(axis, size) and (alone or axis != (B,)) for axis, size in pairs)

    def _spans(self, axis: Axis, size: Any) -> bool:
        """Whether a token-free axis of this size has an entry for each of ``axis``, and does not broadcast."""
        return bool(expression(size) == self.typing.axis_size(axis))

    def _align(self, value: fx.Node, axes: Axes, node: fx.Node, exact: bool, keys: Any = None) -> fx.Node:
        """Read a token-free value at the new positions: rows for a query axis, all keys for a key axis."""
        sizes = [expression(size) for size in value.meta["val"].shape]
        if keys is None and any(K in axis for axis in axes[len(axes) - len(sizes) :]):
            keys = self._key_length(node)
        signature = (value, axes, exact, keys, node in self.typing.after_last)
        if signature not in self._aligned:
            self._aligned[signature] = self._read_table(value, sizes, axes, node, exact, keys)
        return self._aligned[signature]

    def _read_table(
        self, value: fx.Node, sizes: list[Any], axes: Axes, node: fx.Node, exact: bool, keys: Any
    ) -> fx.Node:
        lead = len(axes) - len(sizes)
        mine = axes[lead:]
        target = [self._table_size(size, axis, node, keys) for size, axis in zip(sizes, mine, strict=True)]
        if is_fill(value):
            options = {"dtype": value.meta["val"].dtype, "device": value.meta["val"].device}
            return self.call(aten.full.default, target, value.args[1], **options)
        over = {
            axis[0].kind: lead + d for d, (size, axis) in enumerate(zip(sizes, mine, strict=True)) if size.free_symbols
        }
        if any(axes[d] not in ((Q,), (K,)) or sizes[d - lead] != self.typing.length for d in over.values()):
            raise refuse(node, "a table over positions meets an axis that is not the sequence")
        by_row = bool(over) and self.mode != PREFILL
        result, shared = self.env[value], True
        for d, (size, axis) in enumerate(zip(sizes, mine, strict=True)):
            if axis == (B,) and size == self.typing.lm.batch:
                result = self.call(aten.slice.Tensor, result, d, 0, 1)
            elif axis[:1] == (B,) and len(axis) > 1 and not size.free_symbols and self._spans(axis, size):
                result = self._over_rows(result, d, len(sizes), axis, None if by_row else self._rows(node))
                shared = False
        if by_row:
            result = self._at_positions(result, over, axes, node, exact or not shared)
        return self.call(aten.expand.default, result, target) if exact else result

    def _at_positions(
        self, table: fx.Node, over: dict[str, int], axes: Axes, node: fx.Node, every_row: bool
    ) -> fx.Node:
        """A table over positions as each request reads it: requests stand at positions of their own."""
        batch = next((d for d, axis in enumerate(axes) if B in axis), None)
        if batch is None or axes[batch][0] != B:
            raise refuse(node, "a table over positions meets a value in which requests are not the outer axis")
        places = (over.get(QUERY), over.get(KEY), batch, product(axes[batch]))
        return self.call(at_positions, table, *places, self.positions, self.keys, self.rows_in, len(axes), every_row)

    def _table_size(self, size: Any, axis: Axis, node: fx.Node, keys: Any) -> Any:
        """The size in this region of a token-free axis that had ``size`` in the trace and meets ``axis``."""
        if size == 1 and not (axis == (B,) and self.typing.lm.batch == 1):
            return 1
        depends = any(atom.kind in (BATCH, QUERY, KEY) for atom in axis)
        return self._size(axis, node, keys) if depends else int(size)

    def _over_rows(self, value: fx.Node, d: int, rank: int, axis: Axis, rows: Any) -> fx.Node:
        """A table whose axis ``d`` is [batch * heads] of the trace, as [rows * heads], or [heads] without ``rows``."""
        inner = product(axis)
        parted = self.call(aten.unflatten.int, value, d, [self.typing.lm.batch, inner])
        if rows is None:
            return self.call(aten.select.int, parted, d, 0)
        first = self.call(aten.slice.Tensor, parted, d, 0, 1)
        spread = [rows if i == d else -1 for i in range(rank + 1)]
        return self.call(aten.flatten.using_ints, self.call(aten.expand.default, first, spread), d, d + 1)

    def _key_length(self, node: fx.Node) -> Any:
        """P + S as the score-like operands of ``node`` have it: each layer reads its own, so that layers stay alike."""
        if self.mode == PREFILL:
            return self.length
        for source in node.all_input_nodes:
            source = self.typing.slots.get(source, source)  # numbers of keys: as many keys as were chosen from
            keys = self._keys_of(self.env.get(source), source) if self.typing.is_dependent(source) else None
            if keys is not None:
                return keys
        raise refuse(node, "a table over keys meets no attention scores")

    # -- the last position ------------------------------------------------------------------------------------------

    def _last(self, node: fx.Node) -> fx.Node:
        """``x[:, -1]``: every new position of a scored block counts as the last of its own prefix."""
        bound = arguments(node)
        source, axes = self.env[bound["input"]], self.typing.of(bound["input"])
        d = axis_index(bound["dim"], len(axes))
        keep = op_name(node) == "slice"
        if self.mode != SCORE:
            last = self.call(aten.select.int, source, d, -1)
            return self.call(aten.unsqueeze.default, last, d) if keep else last
        batch = axes.index((B,)) if (B,) in axes else -1
        if batch < 0:
            raise refuse(node, "the last position is selected after batch and positions were merged")
        others = [i for i in range(len(axes)) if i not in (batch, d)]
        moved = self.call(aten.permute.default, source, [batch, d, *others])
        folded = self.call(
            aten.reshape.default, moved, [self._rows(node), *self._sizes(tuple(axes[i] for i in others), node)]
        )
        order = [batch, *others]
        wanted = [i for i in range(len(axes)) if i != d]
        folded = self.call(aten.permute.default, folded, [order.index(i) for i in wanted])
        return self.call(aten.unsqueeze.default, folded, d) if keep else folded

    # -- where positions meet: AttentionEmitter ----------------------------------------------------------------------

    @abstractmethod
    def _attention(self, node: fx.Node) -> fx.Node:
        """The node in the new graph: attention over a cache."""

    @abstractmethod
    def _prefill_sites(self, node: fx.Node) -> None:
        """Note what a prefill hands to the cache at this node."""
