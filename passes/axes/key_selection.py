"""Sparse attention: a query chooses the keys it attends to, by a ``topk`` over its scores.

``topk`` returns numbers of keys. In the cached form the keys are the P+S slots of a cache, so these are numbers of
slots. They are right where they mark the same keys in a mask over slots (``scatter``), and wrong as any other number.

Slots that a query does not see (later tokens, padding, not yet written) must not displace others. So the scores must
hide them before the choice; ``validate.check_hidden`` checks that on values. Where a query sees fewer than k keys,
hidden slots fill up the k, as later positions do in the original, and the same mask hides both. Of equal scores
``topk`` may take any: only then may the two forms choose differently.
"""

from __future__ import annotations

from operator import getitem

import sympy
import torch
from torch import Tensor, fx

from smc_compile.passes.axes.axis_types import CHOSEN, Atom, Axes, Axis, K, Q, Typing, expression, refuse
from smc_compile.passes.axes.helpers import axis_index, merge_axis, operand_axes, settle, tensors
from smc_compile.passes.fx_tools import arguments, op_name, reachable

# Ops that hand numbers of keys on as they are. A reshape is none of them: how many are chosen depends on the region.
HANDED_ON = {"_to_copy", "to", "clone", "contiguous", "detach", "alias", "unsqueeze", "squeeze", "transpose", "permute"}


def choose_keys(scores: Tensor, count: int, dim: int, in_order: bool) -> tuple[Tensor, Tensor]:
    """The best ``count`` entries along ``dim`` and where they stand; all of them where there are fewer, or for 0."""
    keys = scores.shape[dim]
    values, slots = torch.topk(scores, min(count or keys, keys), dim, sorted=in_order)
    return values, slots


def is_over_keys(typing: Typing, node: fx.Node) -> bool:
    """Whether a ``topk`` runs along the positions that attention reads."""
    bound = arguments(node)
    axes = typing.of(bound["input"])
    return axes[axis_index(bound["dim"], len(axes))] == (K,)


def choice(typing: Typing, node: fx.Node) -> list[Axes]:
    """Axes of both results of a ``topk`` over keys, values and indices: the scores', with a CHOSEN axis for keys.

    The choice is recorded in ``typing``.
    """
    bound = arguments(node)
    scores = bound["input"]
    if not bound["largest"]:
        raise refuse(node, "the keys with the least scores are chosen, but hidden keys have the least", "negate them")
    if not _is_masked(typing, scores):
        raise refuse(
            node,
            "keys are chosen by scores that no mask over positions hides, so later tokens take part in the choice",
            'mask the scores before topk: scores.masked_fill(~causal, float("-inf")).topk(k, -1)',
        )
    count = _count(typing, node, expression(bound["k"]))
    typing.chosen_sizes[count] = expression(bound["k"])
    typing.slots[node] = scores
    typing.hiding.append(scores)
    axes = list(typing.of(scores))
    axes[axis_index(bound["dim"], len(axes))] = (Atom(CHOSEN, count),)
    return [tuple(axes)] * 2


def _count(typing: Typing, node: fx.Node, k: sympy.Expr) -> int:
    """How many keys are chosen of enough of them: k, or the k of min(k, S); 0 stands for all."""
    if k == typing.length:
        return 0
    limits = [k] if k.is_Integer else list(k.args)
    numbers = [int(limit) for limit in limits if limit.is_Integer]
    is_least = k.is_Integer or (type(k).__name__ == "Min" and set(limits) == {sympy.Integer(numbers[0]), typing.length})
    if len(numbers) != 1 or not is_least or numbers[0] < 1:
        raise refuse(node, f"{k} keys are chosen, which depends on the length", "choose min(k, S) keys, k a constant")
    return numbers[0]


def _is_masked(typing: Typing, scores: fx.Node) -> bool:
    """Whether something on the way from the products to the scores combines them with a table over [Q, K]."""
    over_keys = reachable([scores], lambda node: [s for s in node.all_input_nodes if _has_keys(typing, s)])
    return any(_is_table(typing, source) for node in over_keys for source in node.all_input_nodes)


def _has_keys(typing: Typing, node: fx.Node) -> bool:
    axes = typing.axes.get(node)
    return isinstance(axes, tuple) and (K,) in axes


def _is_table(typing: Typing, node: fx.Node) -> bool:
    """Whether a token-free value has two axes over positions."""
    value = node.meta.get("val")
    if node in typing.dependent or not isinstance(value, torch.Tensor):
        return False
    return sum(bool(expression(size).free_symbols) for size in value.shape) == 2


def follow_slots(typing: Typing, node: fx.Node) -> None:
    """Mark a node that hands numbers of keys on; refuse one that reads them as numbers.

    Raises:
        CacheError: naming the op.
    """
    sources = [source for source in node.all_input_nodes if source in typing.slots]
    if not sources:
        return
    if node.target is getitem and node.args[0] in typing.slots:  # (values, numbers of keys)
        if node.args[1] == 1:
            typing.slots[node] = typing.slots[sources[0]]
    elif op_name(node) in HANDED_ON:
        typing.slots[node] = typing.slots[sources[0]]
    elif op_name(node) != "scatter" or sources != [arguments(node)["index"]]:
        raise refuse(
            node,
            "the numbers of the chosen keys are used as numbers, but a cache keeps keys in an order of its own",
            "only mark the chosen keys with them: mask.scatter(-1, indices, value)",
        )


def refuse_numbers_of_keys(node: fx.Node) -> None:
    """Refuse a reduction over keys that says where among them it found its value, if anything reads that."""
    finds = op_name(node) in ("argmax", "argmin")
    reads = [user for user in node.users if user.target is getitem and user.args[1] == 1 and user.users]
    if finds or (op_name(node) in ("max", "min", "median") and reads):
        raise refuse(node, f"{op_name(node)} gives the number of a key", "choose it with topk and mark it with scatter")


def scatter_over_keys(typing: Typing, node: fx.Node) -> Axes:
    """Axes of ``x [..., Q, K].scatter(dim, chosen, value)``: a mark on each chosen key, rows as in ``x``."""
    bound = arguments(node)
    source, d = bound["input"], axis_index(bound["dim"], node.meta["val"].dim())
    sizes = [expression(size) for size in node.meta["val"].shape]
    written = tensors([bound["index"], bound.get("src")])
    axes = operand_axes(typing, source)
    if axes[d] not in (None, (K,)) or sizes[d] != typing.length:
        raise refuse(node, "the chosen keys are marked along an axis that is not that of the keys")
    for part in written:
        rows = [expression(size) for i, size in enumerate(part.meta["val"].shape) if i != d]
        if rows != [size for i, size in enumerate(sizes) if i != d]:
            raise refuse(node, "chosen keys are marked in some rows only", "expand the mask after the scatter")
    merged: list[Axis] = []
    for i, size in enumerate(sizes):
        axis = axes[i]
        for part in written if i != d else []:
            axis = merge_axis(node, axis, operand_axes(typing, part)[i])
        merged.append((K,) if i == d else settle(typing, node, axis, size))
    if (Q,) not in merged:
        raise refuse(node, "keys are chosen, but not once for each position")
    return tuple(merged)
