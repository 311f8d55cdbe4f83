"""Turn a causal graph into its incremental form: the same ops on T new positions, earlier keys and values cached."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx
from torch._dynamo.utils import counters

from smc_compile.errors import CacheError
from smc_compile.passes.axis_helpers import arguments, axis_index, op_name
from smc_compile.passes.cached_attention import (
    attention_over_cache,
    causal_mask,
    entries_over_cache,
    hidden_by,
    hidden_later,
    masked,
    mix_over_cache,
    scores_over_cache,
    write_cache,
)
from smc_compile.passes.head_layout import HeadLayout, padded, product
from smc_compile.passes.ir import CachedLM, CacheSite, CausalLM, output_values
from smc_compile.passes.key_selection import choose_keys
from smc_compile.passes.position_tables import (
    add,
    affine,
    at_positions,
    frontier,
    growing_axes,
    grows,
    is_fill,
    is_over_positions,
    live_nodes,
    may_shift,
    multiply,
    sequence_size,
    table_graph,
)
from smc_compile.passes.sequence_axes import (
    BATCH,
    CHOSEN,
    KEY,
    OTHER,
    QUERY,
    REPEAT,
    Atom,
    Axes,
    Axis,
    B,
    K,
    Q,
    Typing,
    expression,
    refuse,
    type_axes,
)

log = logging.getLogger(__name__)
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


def synthesize_cache(lm: CausalLM) -> CachedLM:
    """Derive prefill, score and advance graphs for ``lm``.

    Raises:
        CacheError: naming the op that has no incremental form.
    """
    typing = type_axes(lm)
    (rows,) = output_values(lm.graph)
    _require_rows(typing, rows)
    tables = frontier(typing)
    prefill = _Emitter(typing, tables, PREFILL).run()
    score = _Emitter(typing, tables, SCORE).run()
    advance = _Emitter(typing, tables, ADVANCE).run()
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


class _Emitter:
    """Re-emits the graph for one region: ``prefill`` over a prompt, or ``score``/``advance`` over T new tokens."""

    def __init__(self, typing: Typing, tables: list[fx.Node], mode: str) -> None:
        self.typing, self.tables, self.mode = typing, tables, mode
        self.graph = fx.Graph()
        self.env: dict[fx.Node, Any] = {}
        self.sites: list[CacheSite] = []
        self.site_values: list[fx.Node] = []
        self._site_of: dict[tuple[Any, ...], int] = {}
        self._prompts: list[fx.Node] = []
        self._suffixes: list[fx.Node] = []
        self._written: dict[int, fx.Node] = {}
        self._aligned: dict[tuple[Any, ...], fx.Node] = {}
        self._later: fx.Node | None = None
        self.module: fx.GraphModule

    # -- the walk ---------------------------------------------------------------------------------------------------

    def run(self) -> _Emitter:
        lm = self.typing.lm
        self.tokens = self.graph.placeholder("tokens")
        if self.mode != PREFILL:
            self._incremental_inputs()
        for weight in lm.weights:
            self.env[weight] = self.graph.placeholder(weight.name)
        self.env[lm.ids] = self.tokens
        self.rows_in = self.call(aten.sym_size.int, self.tokens, 0)
        self.length = self.call(aten.sym_size.int, self.tokens, 1)
        live = live_nodes(lm.graph)
        for node in lm.graph.nodes:
            if node.op in ("call_function", "get_attr") and node in live:
                self._emit(node)
        (rows,) = output_values(lm.graph)
        result = self.env[rows]
        self.graph.output((result, *self.site_values) if self.mode == PREFILL else result)
        self.graph.eliminate_dead_code(is_impure_node=lambda node: node.op in ("placeholder", "output"))
        self.graph.lint()
        self.module = fx.GraphModule(lm.graph_module, self.graph)
        return self

    def _incremental_inputs(self) -> None:
        """Placeholders in the order that CachedLM documents. Sites are counted by a dry prefill."""
        count = len(_Emitter(self.typing, self.tables, PREFILL).run().sites)
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
        d = axis_index(bound["dim"], len(self.typing.of(bound["self"])))
        count = self.typing.of(node)[0][d][0].size  # the axes of (values, numbers of keys) are a list of two
        return self.call(choose_keys, self.env[bound["self"]], count, d, bound["sorted"])

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
        source = self.env[bound["self"]]
        before, after = self.typing.of(bound["self"]), self.typing.of(node)
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
        return any(B in axis and self._is_whole(axis, size) and (alone or axis != (B,)) for axis, size in pairs)

    def _is_whole(self, axis: Axis, size: Any) -> bool:
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
            elif axis[:1] == (B,) and len(axis) > 1 and not size.free_symbols and self._is_whole(axis, size):
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
        source, axes = self.env[bound["self"]], self.typing.of(bound["self"])
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

    # -- attention --------------------------------------------------------------------------------------------------

    def _attention(self, node: fx.Node) -> fx.Node:
        role = self.typing.attention[node]
        if role == "score":
            query, key = node.args[0], node.args[1]
            return self._scores(node, query, key, self.typing.of(node))  # type: ignore[arg-type]
        if role == "mix":
            return self._mix(self.env[node.args[0]], self.typing.of(node.args[0]), node.args[1], self.typing.of(node))  # type: ignore[index, arg-type]
        return self._spread(node) if role == "spread" else self._sdpa(node)

    def _sdpa(self, node: fx.Node) -> fx.Node:
        """scaled_dot_product_attention over the caches: at once where one mask serves all heads, else step by step."""
        bound = arguments(node)
        query, key, value = bound["query"], bound["key"], bound["value"]
        axes = self.typing.of(query)
        scale = bound["scale"] or 1 / math.sqrt(query.meta["val"].shape[-1])
        scaled = self.call(aten.mul.Tensor, self.env[query], float(scale))
        key_axes = self.typing.of(key)
        swapped = (*key_axes[:-2], key_axes[-1], key_axes[-2])
        heads, theirs = (
            HeadLayout(axes[:-2], axes[-2], padded(of, len(axes))[:-2]) for of in (swapped, self.typing.of(value))
        )
        if heads == theirs and self._serves_all_heads(bound["attn_mask"], axes):
            return self._attend(node, bound, scaled, swapped, heads)
        score_axes = (*axes[:-1], (K,))
        scores = self._scores(node, query, key, score_axes, scaled, swapped)
        dtype = torch.promote_types(query.meta["val"].dtype, torch.float32)
        scores = self.call(aten._to_copy.default, scores, dtype=dtype)
        if bound["is_causal"]:
            batch = next(d for d, axis in enumerate(score_axes) if B in axis)
            scores = self.call(causal_mask, scores, batch, product(score_axes[batch]), self.positions, self.keys)
        if bound["attn_mask"] is not None:
            scores = self.call(masked, scores, self._mask(node, bound["attn_mask"], scores, score_axes))
        probs = self.call(aten.softmax.int, scores, -1)
        probs = self.call(aten._to_copy.default, probs, dtype=value.meta["val"].dtype)
        return self._mix(probs, score_axes, value, self.typing.of(node))

    def _attend(
        self, node: fx.Node, bound: dict[str, Any], query: fx.Node, key_axes: Axes, heads: HeadLayout
    ) -> fx.Node:
        axes, value = self.typing.of(bound["query"]), bound["value"]
        value_axes = self.typing.of(value)
        keys = self._cache(bound["key"], self._canonical_keys(bound["key"], key_axes, True, True), ("key", True))
        values = self._cache(value, self._canonical_keys(value, value_axes, False, False), ("value", False))
        width = product(axes[-1])
        grouped = self._ordered(query, heads, width)
        grouped = self.call(
            aten.reshape.default, grouped, [self.rows_in, heads.kv_heads, heads.groups, self.length, width]
        )
        hidden = self._hidden(node, bound["attn_mask"], (*axes[:-1], (K,)), keys)
        mixed = self.call(attention_over_cache, grouped, keys[0], values[0], keys[1], values[1], hidden)
        return self._from_canonical(mixed, heads, self.typing.of(node), product(value_axes[-1]))

    def _hidden(self, node: fx.Node, mask: fx.Node | None, axes: Axes, keys: tuple[fx.Node, fx.Node]) -> fx.Node:
        """[1 or B or R, T, P+S]: the keys that a query does not see."""
        if mask is None:
            if self._later is None:
                self._later = self.call(hidden_later, self.positions, self.keys)
            return self._later
        prompt, suffix = (self.call(aten.sym_size.int, cache, 2) for cache in keys)
        kept = (
            self.env[mask]
            if self.typing.is_dependent(mask)
            else self._align(mask, axes, node, False, self.call(add, prompt, suffix))
        )
        return self.call(hidden_by, kept, self.length)

    def _serves_all_heads(self, mask: fx.Node | None, axes: Axes) -> bool:
        """Whether a mask keeps or hides keys for all heads alike; None stands for the causal one."""
        if mask is None:
            return True
        value = mask.meta["val"]
        lead = (1,) * (len(axes) - value.dim()) + tuple(value.shape[:-2])
        alike = all(size == 1 for size in lead[1:]) and (lead[0] == 1 or axes[0] == (B,))
        return bool(value.dtype == torch.bool and value.dim() > 1 and value.shape[-1] != 1 and alike)

    def _spread(self, node: fx.Node) -> fx.Node:
        """A value per position shown to each query: what the cache holds of it, along an axis of keys."""
        value: fx.Node = node.args[0]  # type: ignore[assignment]
        out = self.typing.of(node)
        axes = padded(self.typing.of(value), len(out))
        prompt, suffix = self._cache(value, self._canonical_keys(value, (*axes, ()), False, False), ("spread", False))
        held = self.call(entries_over_cache, prompt, suffix)  # [R, H, P+S]
        keys = self.call(aten.sym_size.int, held, 2)
        atoms = [K if axis == (Q,) else axis[0] for axis in axes if axis]
        order = sorted(range(len(atoms)), key=lambda i: {BATCH: 0, KEY: 2}.get(atoms[i].kind, 1))
        held = self.call(aten.reshape.default, held, [self._size((atoms[i],), None, keys) for i in order])
        held = self.call(aten.permute.default, held, [order.index(i) for i in range(len(atoms))])
        lined_up = tuple((K,) if axis == (Q,) else axis for axis in axes)
        held = self.call(aten.reshape.default, held, self._sizes(lined_up, None, keys))
        return self.call(aten.expand.default, held, self._sizes(out, None, keys))

    def _mask(self, node: fx.Node, mask: fx.Node, scores: fx.Node, axes: Axes) -> Any:
        if self.typing.is_dependent(mask):
            return self.env[mask]
        return self._align(mask, axes, node, False, self._last_size(scores, axes))

    def _scores(
        self, node: fx.Node, query: fx.Node, key: fx.Node, out: Axes, emitted: Any = None, key_axes: Axes | None = None
    ) -> fx.Node:
        """query [..., q, d] @ key [..., d, k] over the cache; ``emitted`` and ``key_axes`` override the graph's own."""
        axes = self.typing.of(query)
        swapped = key_axes is not None
        key_axes = key_axes or self.typing.of(key)
        heads = HeadLayout(axes[:-2], axes[-2], padded(key_axes, len(axes))[:-2])
        new = self._canonical_keys(key, key_axes, swapped, last_is_position=True)
        prompt, suffix = self._cache(key, new, ("key", swapped))
        canonical = self._to_canonical(emitted or self.env[query], heads, product(axes[-1]))
        scores = self.call(scores_over_cache, canonical, prompt, suffix)
        return self._from_canonical(scores, heads, out, self.call(aten.sym_size.int, scores, 3))

    def _last_size(self, value: Any, axes: Axes) -> fx.Node:
        return self.call(aten.sym_size.int, value, len(axes) - 1)

    def _mix(self, probs: Any, axes: Axes, value: fx.Node, out: Axes) -> fx.Node:
        """probs [..., q, k] @ value [..., k, d] over the cache."""
        value_axes = self.typing.of(value)
        heads = HeadLayout(axes[:-2], axes[-2], padded(value_axes, len(axes))[:-2])
        new = self._canonical_keys(value, value_axes, False, last_is_position=False)
        prompt, suffix = self._cache(value, new, ("value", False))
        canonical = self._to_canonical(probs, heads, self._last_size(probs, axes))
        mixed = self.call(mix_over_cache, canonical, prompt, suffix)
        return self._from_canonical(mixed, heads, out, product(value_axes[-1]))

    def _prefill_sites(self, node: fx.Node) -> None:
        role = self.typing.attention[node]
        bound = arguments(node) if role == "sdpa" else dict.fromkeys(("key", "value"), node.args[-1])
        if role == "spread":
            held: fx.Node = node.args[0]  # type: ignore[assignment]
            axes = (*padded(self.typing.of(held), len(self.typing.of(node))), ())
            self._site(held, self._canonical_keys(held, axes, False, False), axes, False, ("spread", False))
        if role in ("score", "sdpa"):
            key: fx.Node = bound["key"]  # type: ignore[assignment]
            axes = self.typing.of(key)
            swapped = role == "sdpa"
            axes = (*axes[:-2], axes[-1], axes[-2]) if swapped else axes
            self._site(key, self._canonical_keys(key, axes, swapped, True), axes, True, ("key", swapped))
        if role in ("mix", "sdpa"):
            value: fx.Node = bound["value"]  # type: ignore[assignment]
            axes = self.typing.of(value)
            self._site(value, self._canonical_keys(value, axes, False, False), axes, False, ("value", False))

    def _site(self, operand: fx.Node, canonical: fx.Node, axes: Axes, is_key: bool, use: tuple[str, bool]) -> None:
        identity = (operand, use)
        if identity in self._site_of:
            return
        width = product(axes[-2] if is_key else axes[-1])
        heads = product(tuple(atom for axis in axes[:-2] for atom in axis if atom.kind == OTHER))
        self._site_of[identity] = len(self.sites)
        self.sites.append(CacheSite(f"{operand.name}.{use[0]}", heads, width, operand.meta["val"].dtype))
        self.site_values.append(canonical)

    def _cache(self, operand: fx.Node, new: fx.Node, use: tuple[str, bool]) -> tuple[fx.Node, fx.Node]:
        """Write this block's entries once, and return the prompt and the written suffix."""
        identity = (operand, use)
        site = self._site_of.setdefault(identity, len(self._site_of))
        if site not in self._written:
            self._written[site] = self.call(write_cache, self._suffixes[site], self.slots, new)
        return self._prompts[site], self._written[site]

    def _canonical_keys(self, operand: fx.Node, axes: Axes, swapped: bool, last_is_position: bool) -> fx.Node:
        """An operand's new entries as [R, H, T, d]; repeated heads are kept once.

        ``axes`` ends in [d, positions] if ``last_is_position`` else [positions, d]; ``swapped`` says that the emitted
        value has its last two axes the other way round (the key of scaled_dot_product_attention).
        """
        value = self.env[operand]
        if swapped:
            value = self.call(aten.transpose.int, value, -2, -1)
        atoms = [(atom, i) for i, axis in enumerate(axes) for atom in axis]
        value = self.call(aten.reshape.default, value, [self._size((atom,), None) for atom, _ in atoms])
        for position in reversed(range(len(atoms))):
            if atoms[position][0].kind == REPEAT:
                value = self.call(aten.select.int, value, position, 0)
                del atoms[position]
        width_axis = len(axes) - 2 if last_is_position else len(axes) - 1

        def rank(entry: tuple[Atom, int]) -> int:
            atom, i = entry
            return 0 if atom.kind == BATCH else 2 if atom.kind == QUERY else 3 if i == width_axis else 1

        order = sorted(range(len(atoms)), key=lambda i: rank(atoms[i]))
        value = self.call(aten.permute.default, value, order)
        heads = product(tuple(atom for atom, i in atoms if rank((atom, i)) == 1))
        width = product(tuple(atom for atom, i in atoms if rank((atom, i)) == 3))
        return self.call(aten.reshape.default, value, [self.rows_in, heads, self.length, width])

    def _to_canonical(self, value: Any, heads: HeadLayout, width: Any) -> fx.Node:
        """[batch..., q, w] -> [R, H, G*T, w]: grouped query heads fold into rows."""
        value = self._ordered(value, heads, width)
        folded = self.call(multiply, self.length, heads.groups) if heads.groups != 1 else self.length
        return self.call(aten.reshape.default, value, [self.rows_in, heads.kv_heads, folded, width])

    def _ordered(self, value: Any, heads: HeadLayout, width: Any) -> fx.Node:
        """[batch..., q, w] -> the atoms in the order batch, key heads, repeats, positions, and w."""
        sizes = [self._size((atom,), None) for atom in heads.atoms]
        value = self.call(aten.reshape.default, value, [*sizes, width])
        return self.call(aten.permute.default, value, [*heads.order, len(heads.atoms)])

    def _from_canonical(self, value: fx.Node, heads: HeadLayout, out: Axes, width: Any) -> fx.Node:
        """[R, H, G*T, w] or [R, H, G, T, w] -> axes ``out``."""
        ordered = [heads.atoms[i] for i in heads.order]
        value = self.call(aten.reshape.default, value, [*(self._size((atom,), None) for atom in ordered), width])
        inverse = [heads.order.index(i) for i in range(len(heads.order))]
        value = self.call(aten.permute.default, value, [*inverse, len(inverse)])
        return self.call(aten.reshape.default, value, [*self._sizes(out[:-1], None), width])
