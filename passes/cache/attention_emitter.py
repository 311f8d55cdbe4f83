"""Re-emit attention over caches: new keys and values are written once, then read with the prompt's."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from smc_compile.passes.axes.axis_types import BATCH, KEY, OTHER, QUERY, REPEAT, Atom, Axes, B, K, Q, Typing
from smc_compile.passes.cache.attention_ops import (
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
from smc_compile.passes.cache.emitter import Emitter
from smc_compile.passes.cache.head_layout import HeadLayout, padded, product
from smc_compile.passes.cache.position_tables import add, multiply
from smc_compile.passes.fx_tools import arguments
from smc_compile.passes.ir import CacheSite

aten = torch.ops.aten


class AttentionEmitter(Emitter):
    """An emitter that finds the caches and what reads them."""

    def __init__(self, typing: Typing, tables: list[fx.Node], mode: str) -> None:
        super().__init__(typing, tables, mode)
        self._site_of: dict[tuple[Any, ...], int] = {}
        self._written: dict[int, fx.Node] = {}
        self._later: fx.Node | None = None

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
