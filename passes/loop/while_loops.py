"""``torch.while_loop`` as a counted loop: which values count, how many iterations there are, and that all are alike."""

from __future__ import annotations

import operator
from collections import deque
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import fx
from torch.utils._python_dispatch import _disable_current_modes

from smc_compile.errors import LoopError
from smc_compile.passes.fx_tools import call_node, describe, op_name
from smc_compile.passes.loop.draws import is_draw
from smc_compile.passes.loop.tensor_info import tensor_info
from smc_compile.passes.loop.token_labels import on_cpu

_FOLDED_DTYPES = (torch.int64, torch.int32, torch.bool)
_FOLD_LIMIT = 1 << 16
_MOST_ITERATIONS = 1 << 20


def decode_body(gm: fx.GraphModule, node: fx.Node) -> fx.GraphModule | None:
    """The body of a while_loop that draws tokens, else None."""
    if op_name(node) != "while_loop" or not isinstance(node.args[1], fx.Node):
        return None
    body = operator.attrgetter(str(node.args[1].target))(gm)
    return body if any(is_draw(inner) for inner in body.graph.nodes) else None


def evaluate_constants(nodes: Iterable[fx.Node], known: dict[fx.Node, Any]) -> dict[fx.Node, Any]:
    """The integers, and the small integer tensors, that follow from `known` alone."""
    values = dict(known)
    with _disable_current_modes(), torch.no_grad(), torch.device("cpu"):
        for node in nodes:
            if node.op in ("call_function", "call_method") and not is_draw(node) and _is_small(node):
                value = _evaluate(node, values)
                if value is not None:
                    values[node] = value
    return values


def _is_small(node: fx.Node) -> bool:
    value = node.meta.get("example_value")
    if not isinstance(value, torch.Tensor):
        return value is None or isinstance(value, int | torch.SymInt | torch.SymBool)
    info = tensor_info(node)
    sizes = info.shape if info is not None else value.shape
    whole = all(isinstance(size, int) and not isinstance(size, torch.SymInt) for size in sizes)
    return value.dtype in _FOLDED_DTYPES and (not whole or torch.Size(sizes).numel() <= _FOLD_LIMIT)


def _evaluate(node: fx.Node, values: dict[fx.Node, Any]) -> Any:
    sources = list(node.all_input_nodes)
    if op_name(node).startswith("new_") and sources and sources[0] not in values:
        value = sources[0].meta.get("example_value")
        if not isinstance(value, torch.Tensor):
            return None
        values = {**values, sources[0]: torch.empty(0, dtype=value.dtype)}  # only its dtype matters
    if any(source not in values for source in sources):
        return None
    args = on_cpu(fx.map_arg(node.args, values.__getitem__))
    kwargs = on_cpu(fx.map_arg(dict(node.kwargs), values.__getitem__))
    try:
        result = call_node(node, args, kwargs)
    except Exception:  # the values of an example need not suit the op
        return None
    folded = isinstance(result, torch.Tensor) and result.dtype in _FOLDED_DTYPES
    return result if folded or isinstance(result, int) else None


class Counted:
    """A while_loop whose condition depends on counters only.

    Args:
        values: for each operand its constant value, or None.
        carried: how many of the operands are carried from iteration to iteration.
    """

    def __init__(
        self, node: fx.Node, cond: fx.GraphModule, body: fx.GraphModule, values: Sequence[Any], carried: int
    ) -> None:
        self.node, self.cond, self.body = node, cond, body
        self.inputs = [n for n in body.graph.nodes if n.op == "placeholder"]
        self.cond_inputs = [n for n in cond.graph.nodes if n.op == "placeholder"]
        self.results = list(next(iter(reversed(body.graph.nodes))).args[0])  # type: ignore[arg-type]
        small = [v if isinstance(v, int) or (v is not None and v.numel() == 1) else None for v in values[:carried]]
        self.first: dict[int, Any] = {k: v for k, v in enumerate(small) if v is not None}
        self.fixed = {k: v for k, v in enumerate(values) if k >= carried and v is not None}
        while lost := [k for k, value in self.after(self.first).items() if value is None]:
            self.first = {k: v for k, v in self.first.items() if k not in lost}

    def run(self, counters: dict[int, Any], nodes: Iterable[fx.Node]) -> dict[fx.Node, Any]:
        """Constants of the body in the iteration with these counters."""
        return evaluate_constants(nodes, {self.inputs[k]: v for k, v in {**counters, **self.fixed}.items()})

    def after(self, counters: dict[int, Any]) -> dict[int, Any]:
        """The counters after one iteration; None for one that does not follow from the counters."""
        values = self.run(counters, self.body.graph.nodes)
        results = {k: self.results[k] for k in counters}
        return {k: values.get(r) if isinstance(r, fx.Node) else r for k, r in results.items()}

    def goes_on(self, counters: dict[int, Any]) -> bool:
        """Whether there is an iteration with these counters."""
        known = {self.cond_inputs[k]: v for k, v in {**counters, **self.fixed}.items()}
        result = next(iter(reversed(self.cond.graph.nodes))).args[0]
        value = evaluate_constants(self.cond.graph.nodes, known).get(result) if isinstance(result, fx.Node) else result
        if value is None:
            raise LoopError(
                "The condition of torch.while_loop does not only count iterations.",
                f"{describe(self.node)}: its condition depends on more than a counter and a number",
                "let the condition be `i < limit`, the counter start at a known number, and pass eos_token_id for "
                "the end of sequence",
            )
        return bool(value)

    def iterations(self) -> int:
        """How many iterations there are.

        Raises:
            LoopError: the condition is no count, or what depends on the counters does not change evenly.
        """
        counters, count = dict(self.first), 0
        varying = self.varying()
        recent: deque[dict[fx.Node, Any]] = deque(maxlen=4)
        while self.goes_on(counters):
            values = self.run(counters, varying)
            recent.append(values)
            for node in varying:
                self.check_even(node, [torch.as_tensor(v[node]) for v in recent if node in v])
            results = {k: self.results[k] for k in counters}
            counters = {k: values.get(r, counters[k]) if isinstance(r, fx.Node) else r for k, r in results.items()}
            count += 1
            if count > _MOST_ITERATIONS:
                raise LoopError(
                    "torch.while_loop does not end.",
                    f"{describe(self.node)} has made {count} iterations by its counter",
                    "let the body return i + 1",
                )
        return count

    def varying(self) -> list[fx.Node]:
        """The constants of the body that depend on a counter, and the nodes from which they follow."""
        values = self.run(self.first, self.body.graph.nodes)
        moving = {self.inputs[k] for k in self.first}
        for node in self.body.graph.nodes:
            if node in values and moving & set(node.all_input_nodes):
                moving.add(node)
        needed: set[fx.Node] = set(moving)
        for node in reversed(self.body.graph.nodes):
            if node in needed:
                needed.update(source for source in node.all_input_nodes if source in values)
        return [node for node in self.body.graph.nodes if node in needed and node.op != "placeholder"]

    def check_even(self, node: fx.Node, window: Sequence[torch.Tensor]) -> None:
        """Refuse integers that do not change by one step, and truth values whose changes do not move by one step."""
        if window[0].dtype == torch.bool:
            window = [(a ^ b).nonzero() for a, b in pairwise(window)]
        even = all(a.shape == b.shape for a, b in pairwise(window))
        steps = [b - a for a, b in pairwise(window)] if even else []
        if not even or any(not torch.equal(a, b) for a, b in pairwise(steps)):
            raise LoopError(
                "The iterations of torch.while_loop do not go on evenly.",
                f"{describe(node)} depends on the counter, but not as a*i + b",
                "count by a constant step and use the counter for positions only",
            )
