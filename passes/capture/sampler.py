"""Recover what a loop samples from: back from the draw to the logits or probabilities that fix its distribution."""

from __future__ import annotations

import logging
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import fx
from torch._dynamo.utils import counters

from smc_compile.errors import LoopError
from smc_compile.passes.fx_tools import (
    ancestors,
    arguments,
    descendants,
    describe,
    erase_dead_code,
    op_name,
    output_values,
    run_node,
)
from smc_compile.passes.ir import CausalLM
from smc_compile.passes.rewrites import new_node

log = logging.getLogger(__name__)
aten = torch.ops.aten

MOVEMENT = {
    "view",
    "reshape",
    "t",
    "transpose",
    "permute",
    "numpy_T",
    "flatten",
    "squeeze",
    "unsqueeze",
    "_to_copy",
    "to",
    "clone",
    "contiguous",
    "expand",
    "alias",
    "detach",
}
NOISE = {"exponential", "rand_like", "rand", "uniform", "randn", "randn_like", "normal_functional"}
OFF_IN_EVAL = {"dropout", "native_dropout", "feature_dropout", "scaled_dot_product_attention", "rrelu"}
NOISE_SAMPLES = 100_000  # KS distance of an exact sample stays below 0.0062 with probability 0.999
NOISE_TOLERANCE = 0.008


@dataclass(frozen=True)
class Sampler:
    """The distribution of the next token.

    Attributes:
        kind: "logits" (softmax of the rows), "probs" (rows are unnormalised probabilities) or "greedy" (argmax).
        temperature: the scalar that divides the logits, 1.0 when there is none.
        form: what the user wrote, in words.
    """

    kind: str
    temperature: float
    form: str


def match_sampler(lm: CausalLM) -> tuple[CausalLM, Sampler]:
    """Cut the draw off ``lm``: the returned graph ends in the rows [B, V] that fix the distribution.

    Raises:
        LoopError: when the draw is none of multinomial, exponential race, Gumbel-max or argmax.
    """
    (sink,) = output_values(lm.graph)
    draw = _through(sink)
    orders: list[fx.Node] = []
    while _name(draw) == "gather" and _is_order(draw):  # what is drawn is a rank, and the token stands at it
        orders.append(draw.args[0])  # type: ignore[arg-type]
        draw = _through(draw.args[2])  # type: ignore[arg-type]
    if _name(draw) == "multinomial":
        rows, kind, form = _multinomial(draw)
    elif _name(draw) == "argmax" or _is_index_of(draw, "max", "topk"):
        rows, kind, form = _argmax(draw)
    else:
        raise LoopError(
            "the loop's sampler is not recognised",
            f"the token comes from {describe(draw)}",
            "draw with torch.multinomial(probs, 1), argmax(probs / exponential noise), Gumbel-max or argmax",
        )
    if noise := _noise_sources(rows):
        raise LoopError(
            "the probabilities that the loop samples from are random themselves",
            describe(noise[0]),
            "compute them from the logits alone",
        )
    temperature = temperature_of(rows, kind)
    cut = _cut(lm, rows, orders, kind)
    form += " in sorted space" if orders else ""
    counters["smc_compile"][f"sampler_{kind}"] += 1
    log.debug("sampler: %s (%s, temperature %s)\n%s", form, kind, temperature, cut.graph)
    return cut, Sampler(kind, temperature, form)


def _name(node: fx.Node) -> str:
    return op_name(node) if node.op == "call_function" and node.target is not operator.getitem else ""


def _through(node: fx.Node) -> fx.Node:
    """Skip ops that only move or cast the value."""
    while _name(node) in MOVEMENT or _is_only(node):
        node = node.all_input_nodes[0]
    return node


def _is_only(node: fx.Node) -> bool:
    """Whether a node selects the one element of an axis: ``multinomial(probs, 1)[:, 0]``."""
    if _name(node) != "select":
        return False
    size = node.args[0].meta["val"].shape[node.args[1]]  # type: ignore[union-attr, index]
    return isinstance(size, int) and size == 1


def _is_index_of(node: fx.Node, *names: str) -> bool:
    """Whether a node is the indices that one of the named ops returns beside its values."""
    return node.target is operator.getitem and bool(node.args[1] == 1) and _name(node.args[0]) in names  # type: ignore[arg-type]


def _is_order(gather: fx.Node) -> bool:
    """Whether a gather reads its row [B, V or less] of tokens by rank, none of them twice."""
    order = gather.args[0]
    by = _ranking(order)  # type: ignore[arg-type]
    last = (-1, 1)
    return by is not None and _rank(order) == 2 and gather.args[1] in last and arguments(by)["dim"] in last  # type: ignore[arg-type]


def _ranking(order: fx.Node) -> fx.Node | None:
    """The sort, topk or argsort that made ``order``, or None; its first argument is what it ranks."""
    while _name(order) in ("slice", "to", "_to_copy", "clone", "contiguous"):
        order = order.all_input_nodes[0]
    if _is_index_of(order, "sort", "topk"):
        return order.args[0]  # type: ignore[return-value]
    return order if _name(order) == "argsort" else None


def _multinomial(draw: fx.Node) -> tuple[fx.Node, str, str]:
    bound = arguments(draw)
    if bound["num_samples"] != 1:
        raise LoopError(
            "the loop draws several tokens at once",
            describe(draw),
            "draw one token an iteration: multinomial(probs, 1)",
        )
    rows, kind = _distribution_of_probs(draw.args[0])  # type: ignore[arg-type]
    return rows, kind, "multinomial of softmax" if kind == "logits" else "multinomial of probabilities"


def _distribution_of_probs(probs: fx.Node) -> tuple[fx.Node, str]:
    """Logits under a final softmax are kept in log space; anything else is taken as probabilities."""
    source = probs
    while _name(source) in ("view", "reshape", "squeeze", "_to_copy", "to", "clone", "contiguous"):
        before = source.all_input_nodes[0]
        if before.meta["val"].shape[-1] != source.meta["val"].shape[-1]:
            break
        source = before
    if _name(source) in ("softmax", "_softmax") and source.args[1] in (-1, _rank(source) - 1):
        return source.args[0], "logits"  # type: ignore[return-value]
    return probs, "probs"


def _rank(node: fx.Node) -> int:
    return node.meta["val"].dim()


def _argmax(draw: fx.Node) -> tuple[fx.Node, str, str]:
    if draw.target is operator.getitem:
        draw = draw.args[0]  # type: ignore[assignment]
    if arguments(draw).get("k", 1) != 1:
        raise LoopError(
            "the loop draws several tokens at once", describe(draw), "draw one token an iteration: topk(x, 1)"
        )
    scores = draw.args[0]
    assert isinstance(scores, fx.Node)
    dim = arguments(draw).get("dim")
    if dim not in (-1, _rank(scores) - 1):
        raise LoopError("the loop takes argmax over an axis that is not the vocabulary", describe(draw), "use dim=-1")
    if not _noise_sources(scores):
        return scores, "greedy", "argmax (greedy)"
    scores = _through(scores)
    operands = [a for a in scores.args if isinstance(a, fx.Node)]
    if (
        op_name(scores) == "div"
        and len(operands) == 2
        and _is_noise(operands[1], scores)
        and not _noise_sources(operands[0])
    ):
        _check_distribution(operands[1], "exponential")
        rows, kind = _distribution_of_probs(operands[0])
        return rows, kind, "exponential race"
    if op_name(scores) in ("add", "sub") and len(operands) == 2 and not scores.kwargs:
        sign = -1 if op_name(scores) == "sub" else 1
        logits, noise = operands if not _noise_sources(operands[0]) else operands[::-1]
        if _is_noise(noise, scores) and not _noise_sources(logits) and (sign == 1 or noise is operands[1]):
            _check_distribution(noise, "standard Gumbel", sign)
            return logits, "logits", "Gumbel-max"
    raise LoopError(
        "the loop's sampler is not recognised",
        f"argmax of {describe(scores)}",
        "write argmax(probs / noise) with noise ~ Exponential(1), or argmax(logits + noise) with standard Gumbel noise",
    )


def _noise_sources(node: fx.Node) -> list[fx.Node]:
    """The random ops that a value is computed from, in order."""
    random = torch.Tag.nondeterministic_seeded
    named = [n for n in sorted(ancestors(node)) if _name(n) and _name(n) not in OFF_IN_EVAL]
    return [n for n in named if random in getattr(n.target, "tags", ())]


def _is_noise(node: fx.Node, scores: fx.Node) -> bool:
    """One random source, a value for each token of the vocabulary, and everything after it pointwise."""
    sources = _noise_sources(node)
    if len(sources) != 1 or _name(sources[0]) not in NOISE:
        return False
    if sources[0].meta["val"].shape[-1] != scores.meta["val"].shape[-1]:
        return False
    after = {sources[0]}
    for n in sorted(ancestors(node)):
        if after.isdisjoint(n.all_input_nodes) or n is sources[0]:
            continue
        if not (torch.Tag.pointwise in n.target.tags or op_name(n) in MOVEMENT):  # type: ignore[union-attr]
            return False
        if not after.issuperset(n.all_input_nodes):
            return False
        after.add(n)
    return True


CDF: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "exponential": lambda x: -torch.expm1(-x.clamp(min=0)),
    "standard Gumbel": lambda x: torch.exp(-torch.exp(-x)),
}


def _check_distribution(noise: fx.Node, name: str, sign: int = 1) -> None:
    """Measure the noise: its Kolmogorov-Smirnov distance to the distribution that makes the argmax an exact draw."""
    sample = torch.sort(sign * _draw_noise(noise, NOISE_SAMPLES).double()).values
    cdf = CDF[name](sample)
    grid = torch.arange(1, NOISE_SAMPLES + 1, dtype=torch.float64) / NOISE_SAMPLES
    distance = max((cdf - grid).abs().max().item(), (cdf - grid + 1 / NOISE_SAMPLES).abs().max().item())
    if not distance < NOISE_TOLERANCE:
        raise LoopError(
            f"the noise of the loop's sampler is not {name}, so argmax does not draw from softmax",
            f"{describe(noise)}: Kolmogorov-Smirnov distance {distance:.3f}, allowed {NOISE_TOLERANCE}",
            f"use {name} noise, scaled by nothing (divide the logits by the temperature instead)",
        )


def _draw_noise(noise: fx.Node, count: int) -> torch.Tensor:
    """Evaluate the pointwise chain from the random source on ``count`` values."""
    (source,) = _noise_sources(noise)
    generator = torch.Generator().manual_seed(0)
    name = op_name(source)
    dtype = torch.float64 if source.meta["val"].dtype == torch.float64 else torch.float32
    value = torch.empty(count, dtype=dtype)
    bound = arguments(source)
    if name == "exponential":
        value.exponential_(bound["lambd"], generator=generator)
    elif name in ("rand_like", "rand", "uniform"):
        value.uniform_(bound.get("from", 0.0), bound.get("to", 1.0), generator=generator)
    else:
        value.normal_(bound.get("mean", 0.0), bound.get("std", 1.0), generator=generator)
    values = {source: value}
    for node in sorted(ancestors(noise) & descendants(source) - {source}):
        moved = op_name(node) in MOVEMENT
        values[node] = values[node.all_input_nodes[0]] if moved else run_node(node, values)
    return values[noise]


def temperature_of(rows: fx.Node, kind: str) -> float:
    """The scalar that divides the logits, found on the way back from ``rows`` to the model's output; 1.0 if none."""
    node, in_logits = rows, kind != "probs"  # a factor of probabilities is no temperature
    while node.op == "call_function":
        name, factor = _name(node), node.args[1] if len(node.args) > 1 else None
        if in_logits and name in ("div", "mul") and isinstance(factor, (int, float)) and factor:
            return float(factor) if name == "div" else 1.0 / factor
        if name in ("linear", "matmul", "mm", "bmm", "addmm", "select", "embedding"):
            return 1.0
        in_logits = in_logits or name in ("softmax", "_softmax", "exp")
        sources = node.all_input_nodes if not name else [n for n in node.all_input_nodes if _is_like(n, rows)]
        if not sources:
            return 1.0
        node = sources[0]
    return 1.0


def _is_like(node: fx.Node, rows: fx.Node) -> bool:
    value = node.meta["val"]
    return isinstance(value, torch.Tensor) and value.is_floating_point() and value.dim() == rows.meta["val"].dim()


def _cut(lm: CausalLM, rows: fx.Node, orders: Sequence[fx.Node], kind: str) -> CausalLM:
    """A copy of the graph that returns ``rows`` as [B, V], brought back to the vocabulary through ``orders``."""

    def by_token(copies: Mapping[fx.Node, fx.Node]) -> fx.Node:
        result = copies[rows]
        if _rank(rows) == 3 and rows.meta["val"].shape[1] == 1:  # logits[:, -1:]
            result = new_node(result, aten.squeeze.dim, result, 1)
        for order in reversed(orders):
            ranked = copies[_ranking(order).args[0]]  # type: ignore[union-attr, index]
            result = _by_token(result, copies[order], ranked, 0.0 if kind == "probs" else -math.inf)
        return result

    return ending_in(lm, by_token)


def ending_in(lm: CausalLM, result: Callable[[Mapping[fx.Node, fx.Node]], fx.Node]) -> CausalLM:
    """A copy of a model that returns ``result``, which is given the copy of each node and may add nodes."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in lm.graph.nodes:
        if node.op != "output":
            copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output((result(copies),))
    erase_dead_code(graph)
    module = fx.GraphModule(lm.graph_module, graph)
    ended = replace(lm, graph_module=module, ids=copies[lm.ids], weights=tuple(copies[w] for w in lm.weights))
    ended.verify()
    return ended


def _by_token(ranks: fx.Node, order: fx.Node, ranked: fx.Node, missing: float) -> fx.Node:
    """``ranks`` [B, k] scattered to the tokens that ``order`` names: rows [B, V], ``missing`` where there is none."""
    rows = new_node(ranked, aten.full_like.default, ranked, missing, dtype=ranks.meta["val"].dtype)
    return new_node(ranks, aten.scatter.src, rows, -1, order, ranks)
