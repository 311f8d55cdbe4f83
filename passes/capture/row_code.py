"""Tensor code that was traced for the batch of a loop, on any number of rows.

A trace for B requests holds B as a number. So rows are run B at a time, side by side under ``vmap``; what fills up the
last B is thrown away. With B = 1 each row is by itself, as in the loop. With more, no row may read another, and all
must be treated alike: ``check_rows`` proves it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode

from smc_compile.errors import CacheError, LoopError
from smc_compile.passes.axes.axis_types import B, Typing
from smc_compile.passes.axes.helpers import plain
from smc_compile.passes.axes.infer import type_nodes
from smc_compile.passes.fx_tools import arguments, describe, op_name, output_values, reachable, run_node
from smc_compile.passes.ir import CausalLM
from smc_compile.passes.rewrites import new_node

aten = torch.ops.aten

PROOF_LENGTH = 5  # of the texts in a proof: any will do


@dataclass(frozen=True)
class RowCode:
    """``(*parts [B, ...], *weights) -> [B, V]``, called on parts [R, ...].

    Attributes:
        graph_module: its placeholders are the parts and the weights.
        batch: B.
        dtypes: of the parts.
        weights: which of its model's weights it reads.
    """

    graph_module: fx.GraphModule
    batch: int
    dtypes: tuple[torch.dtype, ...]
    weights: tuple[int, ...]

    def __call__(self, parts: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
        rows = parts[0].shape[0]
        groups = -(-rows // self.batch)
        grouped = [
            _filled_up(part.to(dtype), groups * self.batch).unflatten(0, (groups, self.batch))
            for part, dtype in zip(parts, self.dtypes, strict=True)
        ]
        in_dims = (*(0 for _ in grouped), *(None for _ in weights))
        result: Tensor = torch.vmap(self.graph_module, in_dims=in_dims)(*grouped, *weights)
        return result.flatten(0, 1)[:rows]

    def of(self, weights: Sequence[Tensor]) -> list[Tensor]:
        """What it reads of all weights of its model."""
        return [weights[at] for at in self.weights]


def _filled_up(part: Tensor, rows: int) -> Tensor:
    """More rows like the last one, so that there are so many."""
    missing = rows - part.shape[0]
    return torch.cat([part, part[-1:].expand(missing, *part.shape[1:])]) if missing else part


# ---- that rows are apart ---------------------------------------------------------------------------------------------


def check_rows(code: RowCode) -> None:
    """Prove that no row reads another, and that no weight has a value for each row.

    Raises:
        LoopError: naming the op for which that cannot be shown.
    """
    if code.batch == 1:
        return
    lm = _at_one_length(code)
    parts = [node for node in lm.graph.find_nodes(op="placeholder") if node not in lm.weights]
    typing = Typing(lm, sympy.Symbol("positions"))
    for part in parts:
        typing.dependent.add(part)
        typing.axes[part] = ((B,), *(plain(int(size)) for size in part.meta["val"].shape[1:]))
    try:
        type_nodes(typing)
    except CacheError as error:
        raise _mixed(error.node, error.what.partition(": ")[2]) from error
    (result,) = output_values(lm.graph)
    if typing.axes[result][0] != (B,):
        raise _mixed(result, "its rows are not those of the requests")
    for node in sorted(typing.dependent):
        for source in node.all_input_nodes:
            if source not in typing.dependent and _meets_rows(typing, node, source) and _differs_by_row(source, lm):
                raise _mixed(node, f"`{source.name}` has a value of its own for each request")


def _mixed(node: fx.Node | None, why: str) -> LoopError:
    where = describe(node) if node is not None else "an op"
    return LoopError(
        "The sampler reads the text, and not for each request by itself.",
        f"{where}: {why}",
        "write it along dim=1 or dim=-1, alike for all rows; or call the loop with one prompt, ids [1, P]; "
        "smc_compile.generate(model, draft, ids, logits_processor=[...]) takes processors of any kind",
    )


def _meets_rows(typing: Typing, node: fx.Node, source: fx.Node) -> bool:
    """Whether a value that does not depend on the rows has an axis where the rows of ``node`` stand."""
    shape, axes = source.meta["val"].shape, typing.axes[node]
    found = axes if isinstance(axes, tuple) else axes[0]
    pairs = zip(reversed(shape), reversed(found), strict=False)
    return any(axis == (B,) and size != 1 for size, axis in pairs)


def _differs_by_row(node: fx.Node, lm: CausalLM) -> bool:
    """Whether a value may hold something else for each row: it comes from a weight, and was not repeated."""
    if node in lm.weights:
        return True
    if op_name(node) in ("expand", "repeat", "full", "zeros", "ones"):
        sources = [source for source in node.all_input_nodes if isinstance(source.meta["val"], Tensor)]
        return any(s.meta["val"].shape[:1] == node.meta["val"].shape[:1] and _differs_by_row(s, lm) for s in sources)
    return any(_differs_by_row(source, lm) for source in node.all_input_nodes)


def _at_one_length(code: RowCode) -> CausalLM:
    """The code for texts of ``PROOF_LENGTH`` tokens: sizes are numbers, and every node carries its value."""
    graph, values, copies = fx.Graph(), dict[fx.Node, Any](), dict[fx.Node, Any]()
    placeholders: list[fx.Node] = []
    with FakeTensorMode(allow_non_fake_inputs=True):
        for node in code.graph_module.graph.nodes:
            if node.op == "output":
                graph.output(fx.map_arg(node.args[0], copies.__getitem__))
                continue
            values[node] = _example(node) if node.op == "placeholder" else run_node(node, values)
            if not isinstance(values[node], Tensor | tuple | list):
                copies[node] = values[node]  # a size
                continue
            if node.target is aten.new_full.default:  # it reads no value of the text, see ``_copied``
                args, kwargs = fx.map_arg((node.args[1:], dict(node.kwargs)), copies.__getitem__)
                copies[node] = graph.call_function(aten.full.default, args, kwargs)
            else:
                copies[node] = graph.node_copy(node, copies.__getitem__)
            copies[node].meta = {**node.meta, "val": values[node]}
            placeholders += [copies[node]] if node.op == "placeholder" else []
    module = fx.GraphModule(code.graph_module, graph)
    weights = tuple(placeholders[len(code.dtypes) :])
    return CausalLM(module, placeholders[0], weights, code.batch, None)


def _example(node: fx.Node) -> Tensor:
    """A value for a placeholder, whose size is ``PROOF_LENGTH`` where it is a length."""
    value = node.meta["val"]
    shape = [size if isinstance(size, int) else PROOF_LENGTH for size in value.shape]
    return torch.empty(shape, dtype=value.dtype, device=value.device)


# ---- parts of a graph ------------------------------------------------------------------------------------------------


def between(lm: CausalLM, parts: Sequence[fx.Node], result: fx.Node) -> RowCode:
    """What ``result`` is computed by from ``parts``. Scores of shape [B, 1, V] or [V] are given and returned as [B, V].

    Args:
        parts: the ids or scores, all that ``result`` depends on besides weights and the length of the text.
    """
    needed = backwards(result, parts)
    weights = tuple(at for at, weight in enumerate(lm.weights) if weight in needed)
    graph, copies = fx.Graph(), dict[fx.Node, fx.Node]()
    given = [graph.placeholder(part.name) for part in parts]
    for part, placeholder in zip(parts, given, strict=True):
        placeholder.meta = {**part.meta, "val": _as_rows_value(part, lm)}
    for at in weights:
        copies[lm.weights[at]] = graph.node_copy(lm.weights[at])
    for part, placeholder in zip(parts, given, strict=True):
        copies[part] = _from_rows(placeholder, part, lm)
    for node in lm.graph.nodes:
        if node in needed and node not in copies:
            copies[node] = _copied(node, copies, given[0])
    graph.output(as_rows(copies[result], result, lm))
    module = fx.GraphModule(lm.graph_module, graph, class_name="Rows")
    return RowCode(module, lm.batch, tuple(part.meta["val"].dtype for part in parts), weights)


def _copied(node: fx.Node, copies: dict[fx.Node, fx.Node], text: fx.Node) -> fx.Node:
    """A copy of a node in the graph of ``text``, in a form that ``vmap`` runs for texts of every length."""
    graph = text.graph
    args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), copies.__getitem__)
    if node.target is aten.sym_size.int:
        copy = graph.call_method("size", args)
    elif node.target is aten.full.default:  # one for each row: ``vmap`` fixes the length where it has to repeat one
        copy = graph.call_function(aten.new_full.default, (text, *args), _placed(kwargs, node))
    elif node.target is aten.slice_scatter.default and isinstance(node.meta["val"].shape[arguments(node)["dim"]], int):
        copy = _put(node, args[0], args[1], graph)
    elif node.target is aten.fill.Tensor:
        copy = _filled(node, args[0], args[1], text)
    elif node.target is aten.bincount.default and _counts_tokens(node):
        copy = _counted(node, args[0], text)
    else:
        return graph.node_copy(node, copies.__getitem__)
    copy.meta = {**node.meta}
    return copy


def _put(node: fx.Node, tensor: Any, part: Any, graph: fx.Graph) -> fx.Node:
    """``slice_scatter`` whose start and end are counted from the front."""
    bound = arguments(node)
    start, end, _ = slice(bound["start"], bound["end"]).indices(node.meta["val"].shape[bound["dim"]])
    return graph.call_function(node.target, (tensor, part, bound["dim"], start, end, bound["step"]))  # type: ignore[arg-type]


def _filled(node: fx.Node, tensor: Any, value: Any, text: fx.Node) -> fx.Node:
    """``fill`` by a tensor of one number, as a choice that always takes it."""
    graph, dtype = text.graph, node.meta["val"].dtype
    always = graph.call_function(aten.full_like.default, (tensor, True), {"dtype": torch.bool})
    number = graph.call_function(aten._to_copy.default, (value,), {"dtype": dtype})
    return graph.call_function(aten.where.self, (always, number, tensor))


def _placed(kwargs: dict[str, Any], node: fx.Node) -> dict[str, Any]:
    """Where a new tensor stands, and of what type it is."""
    return {"dtype": node.meta["val"].dtype, "device": kwargs.get("device", node.meta["val"].device)}


def _counts_tokens(node: fx.Node) -> bool:
    """Whether a ``bincount`` has so many bins as it names: the trace took it for that, and so does what reads it."""
    bound = arguments(node)
    return bound["weights"] is None and tuple(node.meta["val"].shape) == (bound["minlength"],)


def _counted(node: fx.Node, tokens: Any, text: fx.Node) -> fx.Node:
    """``bincount`` as a sum of ones: the number of its bins depends on no value."""
    graph, dtype = text.graph, node.meta["val"].dtype
    bins = graph.call_function(aten.new_full.default, (text, [arguments(node)["minlength"]], 0), {"dtype": dtype})
    length = graph.call_method("size", (tokens, 0))
    ones = graph.call_function(aten.new_full.default, (text, [length], 1), {"dtype": dtype})
    return graph.call_function(aten.scatter_add.default, (bins, 0, tokens, ones))


def backwards(result: fx.Node, stops: Iterable[fx.Node]) -> set[fx.Node]:
    """What a node is computed from, itself included, up to ``stops`` and not beyond."""
    ends = set(stops)
    return reachable([result], lambda node: [] if node in ends else node.all_input_nodes)


def is_scores(node: fx.Node, lm: CausalLM, vocabulary: int) -> bool:
    """Whether a node holds a number for each request and token: [B, V], [B, 1, V], or [V] for one request."""
    value = node.meta.get("val")
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return False
    if not all(isinstance(size, int) for size in value.shape):  # a comparison would fix a size that is a symbol
        return False
    shapes = [(lm.batch, vocabulary), (lm.batch, 1, vocabulary), *([(vocabulary,)] if lm.batch == 1 else [])]
    return tuple(value.shape) in shapes


def as_rows(scores: fx.Node, original: fx.Node, lm: CausalLM) -> fx.Node:
    """``scores``, a copy of ``original``, as [B, V]."""
    if original is lm.ids or original.meta["val"].dim() == 2:
        return scores
    if original.meta["val"].dim() == 3:
        return new_node(scores, aten.squeeze.dim, scores, 1)
    return new_node(scores, aten.unsqueeze.default, scores, 0)


def _as_rows_value(part: fx.Node, lm: CausalLM) -> Tensor:
    """The value of a part, without data, as [B, V]."""
    value: Tensor = part.meta["val"]
    if part is lm.ids or value.dim() == 2:
        return value
    with value.fake_mode:  # type: ignore[attr-defined]
        return value.squeeze(1) if value.dim() == 3 else value.unsqueeze(0)


def _from_rows(rows: fx.Node, part: fx.Node, lm: CausalLM) -> fx.Node:
    """``rows`` [B, V] in the shape of ``part``."""
    rank = part.meta["val"].dim()
    if part is lm.ids or rank == 2:
        return rows
    return new_node(rows, *((aten.unsqueeze.default, rows, 1) if rank == 3 else (aten.squeeze.dim, rows, 0)))
