"""Recovers the decode loop from the unrolled graph that Dynamo hands to a backend.

    prompt --> [trip 0] --> token 0 --> [trip 1] --> token 1 --> ...        becomes        step(ids) -> token

1. `concretise`: sizes become numbers, so one static path remains.
2. `token_layout.interpret`: which token stands in which cell of every integer value.
3. The tokens are the columns that some node reads behind the prompt; `trip_graph` proves that trip t is a function of
   the prompt and tokens 0..t-1 alone, and the same function for every t.
4. Outputs are described by how they are put together from prompt and tokens.

The result holds for one batch size and one prompt length (those of `example_inputs`); `step` itself takes any length.
"""

from __future__ import annotations

import itertools
import logging
import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch import fx

from smc_compile.errors import LoopError

from .token_layout import (
    TOKEN_DTYPES,
    Layouts,
    TensorInfo,
    interpret,
    is_random,
    mutated_inputs,
    op_name,
    plain_tensor,
    tensor_info,
)
from .trip_graph import NO_CACHE, Trips, build_step, compare_trips, describe, trip_nodes

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class OutputLayout:
    """How one output of the loop is put together.

    Attributes:
        segments: what follows what along time: "prompt", "tokens".
        axes: the axes of the output, of "batch", "time" and "one" (an axis of size 1).
        padding: constants in the columns after the segments.
        dtype: of the output.
    """

    segments: tuple[str, ...]
    axes: tuple[str, ...] = ("batch", "time")
    padding: tuple[int, ...] = ()
    dtype: torch.dtype = torch.int64

    def build(self, prompt: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """The output for prompt [B, P] and tokens [B, n]."""
        parts = {"prompt": prompt, "tokens": tokens}
        columns = [parts[segment] for segment in self.segments]
        if self.padding:
            columns.append(tokens.new_tensor(self.padding).expand(tokens.shape[0], -1))
        value = torch.cat(columns, dim=1).to(self.dtype)  # [B, time]
        if "batch" not in self.axes:
            value = value.squeeze(0)
        elif self.axes.index("time") < self.axes.index("batch"):
            value = value.t()
        for axis, name in enumerate(self.axes):
            if name == "one":
                value = value.unsqueeze(axis)
        return value


@dataclass(frozen=True)
class DecodeLoop:
    """A decode loop as data.

    Attributes:
        step: ``forward(ids [B, S], *invariants) -> token`` of one trip, for any S.
        prompt_index: which placeholder of the original graph is the prompt.
        invariant_indices: which placeholders feed the other inputs of `step`.
        trips: how many tokens the loop draws.
        outputs: how each output of the graph is put together.
        report: what was found, in lines for a person.
        fixed_floats: (placeholder, value) of Python floats that Dynamo lifted to inputs and that `step` holds as
            constants: the result is wrong for other values. Temperatures and the like stay inputs.
    """

    step: fx.GraphModule
    prompt_index: int
    invariant_indices: tuple[int, ...]
    trips: int
    prompt_length: int
    batch: int
    outputs: tuple[OutputLayout, ...]
    report: list[str] = field(default_factory=list)
    fixed_floats: tuple[tuple[int, float], ...] = ()


def recover_loop(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> DecodeLoop | None:
    """The decode loop in `gm`, or None if it holds no token that is drawn and fed back (then it is not ours).

    Raises:
        LoopError: there is a loop, but not one that can be compiled.
    """
    _refuse_while_loop(gm)
    graph, fixed_floats = concretise(gm, example_inputs)
    nodes = list(graph.nodes)
    if not any(is_draw(node) for node in nodes):
        log.info("no sampling and no argmax in the graph: left as it is")
        return None
    found = _find_tokens(nodes)
    if found is None:
        _refuse_unrecognised_feedback(nodes)
        log.info("no token is drawn from a sequence and fed back (a loop of one trip counts as none): left as it is")
        return None
    layouts, tokens = found
    _refuse_hidden_state(nodes)
    trips = Trips(layouts, tokens)
    closures = [trip_nodes(trips, trip) for trip in range(len(tokens))]
    _check_randomness(closures[0], tokens[0])
    growing = compare_trips(trips)
    step, invariants = build_step(gm, trips, closures[0], growing)
    outputs = tuple(_output_layout(trips, output) for output in _output_nodes(nodes))
    placeholders = [node for node in nodes if node.op == "placeholder"]
    return DecodeLoop(
        step=step,
        prompt_index=placeholders.index(layouts.prompt),
        invariant_indices=tuple(placeholders.index(node) for node in invariants),
        trips=len(tokens),
        prompt_length=layouts.prompt_length,
        batch=layouts.batch,
        outputs=outputs,
        report=_report(trips, closures[0], growing, outputs),
        fixed_floats=fixed_floats,
    )


# ---- sizes become numbers ------------------------------------------------------------------------------------------


class _Sizes:
    """Values of symbolic sizes, taken from the inputs at hand."""

    def __init__(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> None:
        self.values: dict[sympy.Expr, sympy.Integer] = {}
        placeholders = [node for node in gm.graph.nodes if node.op == "placeholder"]
        for node, real in zip(placeholders, example_inputs, strict=False):
            symbolic = node.meta.get("example_value")
            if isinstance(symbolic, torch.SymInt):
                self.bind(symbolic, real)
            elif isinstance(symbolic, torch.Tensor) and isinstance(real, torch.Tensor):
                for size, real_size in zip(symbolic.shape, real.shape, strict=True):
                    self.bind(size, real_size)

    def bind(self, symbolic: Any, real: Any) -> None:
        if isinstance(symbolic, torch.SymInt) and isinstance(real, int) and not isinstance(real, torch.SymInt):
            self.values[symbolic.node.expr] = sympy.Integer(real)

    def __call__(self, value: Any) -> Any:
        """A plain int or bool for a symbolic one."""
        if not isinstance(value, torch.SymInt | torch.SymBool):
            return value
        known = sympy.sympify(value.node.expr).xreplace(self.values)
        plain = known if known.is_number or known in (sympy.true, sympy.false) else value.node.hint
        return bool(plain) if isinstance(value, torch.SymBool) else int(plain)


def _constant(value: Any, sizes: _Sizes) -> tuple[bool, Any]:
    """(True, v) if a node's example value is a size, a shape or a truth value."""
    if isinstance(value, int | torch.SymInt | torch.SymBool):
        return True, sizes(value)
    if isinstance(value, tuple | list) and all(isinstance(v, int | torch.SymInt) for v in value):
        return True, tuple(sizes(v) for v in value)
    return False, None


def concretise(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> tuple[fx.Graph, tuple[tuple[int, float], ...]]:
    """A copy of the graph in which every size is a number; nodes know their ``meta["tensor"]``.

    Also returns the lifted floats that became constants, as (placeholder, value).
    """
    sizes = _Sizes(gm, example_inputs)
    placeholders = [node for node in gm.graph.nodes if node.op == "placeholder"]
    inputs = dict(zip(placeholders, example_inputs, strict=False))
    graph = fx.Graph()
    known: dict[fx.Node, Any] = {}
    floats: dict[fx.Node, fx.Node] = {}  # a float read from a tensor -> the tensor
    fixed: dict[int, float] = {}

    def operand(source: fx.Node) -> Any:
        """The copy of a node or the number that it is; a lifted float that must be a number becomes one."""
        value = plain_tensor(inputs.get(floats[source])) if source in floats else None
        if value is None:
            return known[source]
        fixed[placeholders.index(floats[source])] = value.item()
        return value.item()

    for node in gm.graph.nodes:
        value = node.meta.get("example_value")
        is_constant, constant = _constant(value, sizes)
        if is_constant and node.op not in ("placeholder", "output"):
            known[node] = constant
            continue
        args, kwargs = fx.map_arg(_with_tensor_floats(node, floats), operand)
        copy = graph.create_node(node.op, node.target, args, kwargs, node.name)
        copy.meta = dict(node.meta)
        known[node] = constant if is_constant else copy
        if isinstance(value, torch.SymFloat) and node.target == "item":
            floats[node] = node.args[0]
        if isinstance(value, torch.Tensor):
            shape = tuple(sizes(size) for size in value.shape)
            copy.meta["tensor"] = TensorInfo(shape, value.dtype, value.untyped_storage()._cdata)
        if node.op == "get_attr":
            copy.meta["constant"] = operator.attrgetter(node.target)(gm)
    return graph, tuple(sorted(fixed.items()))


_TENSOR_ARITHMETIC = frozenset(["add", "sub", "mul", "truediv", "div", "pow", "rsub", "lt", "le", "gt", "ge", "clamp"])


def _with_tensor_floats(node: fx.Node, floats: dict[fx.Node, fx.Node]) -> tuple[Any, Any]:
    """Reads a lifted Python float as the 0-dim tensor that holds it, so that its value stays an input of `step`."""
    if not floats or not any(source in floats for source in node.all_input_nodes):
        return node.args, node.kwargs
    name, args = op_name(node), node.args
    if name == "embedding" and len(args) > 4 and args[3] is None:
        return (*args[:4], 2.0, *args[5:]), node.kwargs  # norm_type counts only with max_norm
    if name == "dropout" and len(args) > 2 and args[2] is False:
        return (args[0], 0.0, *args[2:]), node.kwargs
    if name in _TENSOR_ARITHMETIC and isinstance(node.meta.get("example_value"), torch.Tensor):
        return fx.map_arg((args, node.kwargs), lambda source: floats.get(source, source))
    return args, node.kwargs


# ---- tokens --------------------------------------------------------------------------------------------------------


def _is_argmax(node: fx.Node) -> bool:
    if op_name(node) in ("argmax", "argmin"):
        return True
    if op_name(node) != "getitem" or not isinstance(node.args[0], fx.Node):
        return False
    return op_name(node.args[0]) in ("max", "topk", "sort") and bool(node.args[1] == 1)


def is_draw(node: fx.Node) -> bool:
    """True for calls that may pick a token."""
    return is_random(node) or _is_argmax(node)


def _find_tokens(nodes: Sequence[fx.Node]) -> tuple[Layouts, list[fx.Node]] | None:
    """The prompt and the nodes whose results follow it in what the model reads or the function returns."""
    for prompt in filter(_may_be_prompt, nodes):
        layouts = interpret(nodes, prompt)
        tokens = _tokens_behind(layouts)
        if len(tokens) >= 2:
            return layouts, tokens
    return None


def _may_be_prompt(node: fx.Node) -> bool:
    info = tensor_info(node)
    if node.op != "placeholder" or info is None or info.dtype not in TOKEN_DTYPES:
        return False
    return len(info.shape) in (1, 2) and info.numel > 0 and bool(node.users)


def _tokens_behind(layouts: Layouts) -> list[fx.Node]:
    """The tokens of the longest history that is read, and of the outputs for those no trip reads."""
    history = layouts.history(())
    longest: tuple[int, ...] = ()
    for reading in layouts.readings.values():
        columns = reading.columns or ()
        if columns[: len(history)] != history:
            continue
        tail = tuple(itertools.takewhile(layouts.is_token, columns[len(history) :]))
        longest = max(longest, tail, key=len)
    tokens = [source for column in longest if (source := layouts.source(column)) is not None]
    if not tokens:
        return []
    last = layouts.order[tokens[-1]]
    fresh = {
        layouts.source(column)
        for labels in layouts.outputs.values()
        for column in labels.unique().tolist()
        if layouts.is_token(column)
    }
    late = [source for source in fresh if source is not None and layouts.order[source] > last]
    return tokens + sorted(late, key=layouts.order.__getitem__)


def _refuse_unrecognised_feedback(nodes: Sequence[fx.Node]) -> None:
    """Refuses a loop in which tokens are looked up again, though not as a sequence that starts with the prompt."""
    if not any(_may_be_prompt(node) or is_random(node) for node in nodes):
        return  # codebooks are looked up by argmax too
    drawn: set[fx.Node] = set()  # depends on a draw
    looked_up: set[fx.Node] = set()  # depends on a look-up of something drawn
    writers: dict[int, fx.Node] = {}
    for node in nodes:
        sources = set(node.all_input_nodes)
        sources |= {writers[i.storage] for s in node.all_input_nodes if (i := tensor_info(s)) and i.storage in writers}
        if is_draw(node) and sources & looked_up:
            raise LoopError(
                "Tokens are drawn and fed back, but the decode loop could not be recovered.",
                f"{describe(node)} depends on an earlier draw, yet no node reads prompt + tokens as one sequence",
                f"let the prompt be an integer tensor [B, P] given as an argument, and {NO_CACHE}",
            )
        lookup = op_name(node) in ("embedding", "index_select", "one_hot", "getitem")
        places = {a for a in node.all_input_nodes if (i := tensor_info(a)) and i.dtype in TOKEN_DTYPES}
        if sources & looked_up or (lookup and places & drawn and tensor_info(node) and _is_float(node)):
            looked_up.add(node)
        if is_draw(node) or sources & drawn:
            drawn.add(node)
            writers.update({i.storage: node for t in mutated_inputs(node) if (i := tensor_info(t))})
            drawn.update(mutated_inputs(node))


def _is_float(node: fx.Node) -> bool:
    info = tensor_info(node)
    return info is not None and info.dtype.is_floating_point


# ---- what may not be in a trip -------------------------------------------------------------------------------------


def _refuse_hidden_state(nodes: Sequence[fx.Node]) -> None:
    for node in nodes:
        if "autocast" in op_name(node):
            raise LoopError(
                "The decode loop switches autocast on inside.",
                f"{describe(node)} changes the precision of the operators after it",
                "put the autocast around the call of the compiled function, or convert the model with model.to(dtype)",
            )


def _refuse_while_loop(gm: fx.GraphModule) -> None:
    """torch.while_loop keeps its buffer at full length, so that the model reads padding behind the tokens."""
    for node in gm.graph.nodes:
        if op_name(node) != "while_loop" or not isinstance(node.args[1], fx.Node):
            continue
        body = operator.attrgetter(str(node.args[1].target))(gm)
        if any(is_draw(inner) for inner in body.graph.nodes):
            raise LoopError(
                "A decode loop written with torch.while_loop cannot be compiled yet.",
                f"{describe(node)} draws tokens in its body",
                "write it as a Python for loop over the number of new tokens",
            )


def _active_dropout(node: fx.Node) -> bool:
    name = op_name(node)
    if name == "scaled_dot_product_attention":
        rate = node.kwargs.get("dropout_p", node.args[4] if len(node.args) > 4 else 0.0)
        return rate not in (0, 0.0)
    if "dropout" not in name:
        return False
    rate = node.kwargs.get("p", node.args[1] if len(node.args) > 1 else 0.5)
    training = node.kwargs.get("training", node.kwargs.get("train", node.args[2] if len(node.args) > 2 else True))
    return bool(training) and rate not in (0, 0.0)


def _check_randomness(nodes: Sequence[fx.Node], token: fx.Node) -> None:
    """One source of randomness at most, the one that draws the token."""
    for node in nodes:
        if _active_dropout(node):
            raise LoopError(
                "The model is in training mode with dropout.",
                f"{describe(node)} drops values at random",
                "call model.eval() before compiling",
            )
    noise = [node for node in nodes if is_random(node)]
    if len(noise) > 1:
        raise LoopError(
            "A trip of the decode loop draws random numbers more than once.",
            f"{describe(noise[0])} and {describe(noise[1])}; only the draw of the token may be random",
            "remove the other noise, or call model.eval()",
        )
    if not any(is_draw(node) for node in nodes):
        raise LoopError(
            "The tokens of the decode loop are not drawn.",
            f"{describe(token)} follows the prompt, but depends on no sampling and no argmax",
            "draw each token with torch.multinomial(probs, 1) or logits.argmax(-1)",
        )
    if mutated_inputs(token):
        raise LoopError(
            "A token is changed after it was drawn.",
            f"{describe(token)} writes to it in place, at places that depend on values",
            "leave the end-of-sequence handling out of the loop and pass eos_token_id instead",
        )


# ---- outputs -------------------------------------------------------------------------------------------------------


def _output_nodes(nodes: Sequence[fx.Node]) -> list[Any]:
    returned = nodes[-1].args[0]
    return list(returned) if isinstance(returned, tuple | list) else [returned]


def _output_layout(trips: Trips, output: Any) -> OutputLayout:
    layouts = trips.layouts
    labels = layouts.outputs.get(output) if isinstance(output, fx.Node) else None
    if labels is None:
        found = describe(output) if isinstance(output, fx.Node) else repr(output)
        what, fix = "Only tokens can be returned from a decode loop.", "return the token ids and nothing else"
        raise LoopError(what, f"{found} is returned, which is not made of tokens", fix)
    info = tensor_info(output)
    assert info is not None
    parts = dict(zip(("prompt", "tokens"), layouts.labels(trips.tokens), strict=True))
    for segments in (("prompt", "tokens"), ("tokens",), ("prompt",)):
        length = sum(parts[segment].shape[1] for segment in segments)
        for axes in _axes(tuple(labels.shape), layouts.batch, length):
            pads = labels.shape[axes.index("time")] - length
            last_row = labels.movedim(axes.index("time"), -1).reshape(-1, labels.shape[axes.index("time")])[-1]
            padding = last_row[len(last_row) - pads :].tolist()
            layout = OutputLayout(segments, axes, tuple(padding))
            same = not any(layouts.source(value) for value in padding) and torch.equal(
                layout.build(parts["prompt"], parts["tokens"]), labels
            )
            if same:
                return OutputLayout(segments, axes, tuple(padding), info.dtype)
    columns = _columns_in_words(trips, labels)
    raise LoopError(
        "An output of the decode loop is not the whole sequence.",
        f"{describe(output)} of shape {tuple(labels.shape)} holds {columns}",
        "return prompt + tokens, or all tokens as one tensor (torch.stack or torch.cat a list of tokens)",
    )


def _columns_in_words(trips: Trips, labels: torch.Tensor) -> str:
    by_row = labels.reshape(trips.layouts.batch, -1) if labels.ndim else labels.reshape(1, 1)
    return trips.spell(tuple(by_row[0].tolist()))


def _axes(shape: tuple[int, ...], batch: int, length: int) -> Iterator[tuple[str, ...]]:
    """Readings of a shape as batch, time and axes of size 1."""
    if len(shape) > 4:
        return
    for axes in itertools.product(("batch", "time", "one"), repeat=len(shape)):
        if axes.count("time") != 1 or axes.count("batch") > 1 or (batch > 1 and "batch" not in axes):
            continue
        if axes.count("one") and "batch" not in axes:
            continue
        sizes = {"batch": batch, "one": 1}
        pairs = list(zip(axes, shape, strict=True))
        if all(size >= length if axis == "time" else size == sizes[axis] for axis, size in pairs):
            yield axes


def _report(
    trips: Trips, nodes: Sequence[fx.Node], growing: dict[Any, tuple[int, int]], outputs: Sequence[OutputLayout]
) -> list[str]:
    layouts = trips.layouts
    draws = [node for node in nodes if is_draw(node)]
    pads = [f" + {len(layout.padding)} constants" if layout.padding else "" for layout in outputs]
    returned = [" + ".join(layout.segments) + pad for layout, pad in zip(outputs, pads, strict=True)]
    return [
        f"decode loop of {len(trips.tokens)} trips",
        f"prompt `{layouts.prompt.name}` [{layouts.batch}, {layouts.prompt_length}]",
        f"token drawn by {describe(draws[-1])}",
        f"one trip has {len(nodes)} nodes; {len(growing)} integers grow with the sequence length",
        *(f"returns {text}" for text in returned),
    ]
