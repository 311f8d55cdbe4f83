"""Recover what a loop samples from: walk back from the draw to the logits or probabilities that fix its law."""

from __future__ import annotations

import logging
import operator
from dataclasses import dataclass, replace

import torch
from smc_compile.passes.axis_rules import arguments, op_name
from smc_compile.passes.ir import CausalLM, output_values, user_line
from torch import fx
from torch._dynamo.utils import counters

from smc_compile.errors import LoopError

log = logging.getLogger(__name__)

MOVEMENT = {
    "view",
    "reshape",
    "t",
    "transpose",
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
NOISE = {"exponential", "exponential_", "rand_like", "rand", "uniform", "randn", "randn_like", "bernoulli"}
NOISE_SAMPLES = 100_000  # KS distance of an exact sample stays below 0.0062 with probability 0.999
NOISE_TOLERANCE = 0.008


@dataclass(frozen=True)
class Sampler:
    """The law of the next token.

    Attributes:
        kind: "logits" (softmax of the rows), "probs" (rows are unnormalised probabilities) or "greedy" (argmax).
        temperature: the scalar that divides the logits, 1.0 when there is none.
        form: what the user wrote, in words.
    """

    kind: str
    temperature: float
    form: str


def match_sampler(lm: CausalLM) -> tuple[CausalLM, Sampler]:
    """Cut the draw off ``lm``: the returned graph ends in the rows [B, V] that fix the law.

    Raises:
        LoopError: when the draw is none of multinomial, exponential race, Gumbel-max or argmax.
    """
    (sink,) = output_values(lm.graph)
    draw = _through(sink)
    name = op_name(draw) if draw.op == "call_function" else draw.op
    if name == "multinomial":
        rows, kind, form = _multinomial(draw)
    elif name in ("argmax", "max", "topk") or draw.target is operator.getitem:
        rows, kind, form = _argmax(draw)
    else:
        raise LoopError(
            "the loop's sampler is not recognised",
            f"the token comes from {user_line(draw)}",
            "draw with torch.multinomial(probs, 1), argmax(probs / exponential noise), Gumbel-max or argmax",
        )
    temperature = _temperature(rows)
    cut = _cut(lm, rows)
    counters["smc_compile"][f"sampler_{kind}"] += 1
    log.debug("sampler: %s (%s, temperature %s)\n%s", form, kind, temperature, cut.graph)
    return cut, Sampler(kind, temperature, form)


def _through(node: fx.Node) -> fx.Node:
    """Skip ops that only move or cast the value."""
    while node.op == "call_function" and node.target is not operator.getitem and op_name(node) in MOVEMENT:
        node = node.all_input_nodes[0]
    return node


def _multinomial(draw: fx.Node) -> tuple[fx.Node, str, str]:
    bound = arguments(draw)
    if bound["num_samples"] != 1:
        raise LoopError(
            "the loop draws several tokens at once", user_line(draw), "draw one token a trip: multinomial(probs, 1)"
        )
    rows, kind = _law_of_probs(draw.args[0])  # type: ignore[arg-type]
    return rows, kind, "multinomial of softmax" if kind == "logits" else "multinomial of probabilities"


def _law_of_probs(probs: fx.Node) -> tuple[fx.Node, str]:
    """Logits under a final softmax are kept in log space; anything else is taken as probabilities."""
    source = probs
    while (
        op_name(source) in ("view", "reshape", "_to_copy", "to", "clone", "contiguous") and source.op == "call_function"
    ):
        if _rank(source) != 2 or _rank(source.all_input_nodes[0]) != 2:
            break
        source = source.all_input_nodes[0]
    if source.op == "call_function" and op_name(source) in ("softmax", "_softmax"):
        dim = source.args[1]
        logits = source.args[0]
        if dim in (-1, _rank(source) - 1) and _rank(logits) == 2:  # type: ignore[arg-type]
            return logits, "logits"  # type: ignore[return-value]
    return probs, "probs"


def _rank(node: fx.Node) -> int:
    return node.meta["val"].dim()


def _argmax(draw: fx.Node) -> tuple[fx.Node, str, str]:
    if draw.target is operator.getitem:
        draw = draw.args[0]  # type: ignore[assignment]
    scores = draw.args[0]
    assert isinstance(scores, fx.Node)
    dim = arguments(draw).get("dim")
    if dim not in (-1, _rank(scores) - 1):
        raise LoopError("the loop takes argmax over an axis that is not the vocabulary", user_line(draw), "use dim=-1")
    if not _noise_sources(scores):
        return scores, "greedy", "argmax (greedy)"
    scores = _through(scores)
    operands = [a for a in scores.args if isinstance(a, fx.Node)]
    if op_name(scores) == "div" and len(operands) == 2 and _is_noise(operands[1]) and not _noise_sources(operands[0]):
        _check_law(draw, operands[1], torch.distributions.Exponential(1.0), "exponential")
        rows, kind = _law_of_probs(operands[0])
        return rows, kind, "exponential race"
    if op_name(scores) in ("add", "sub") and len(operands) == 2 and not scores.kwargs:
        sign = -1 if op_name(scores) == "sub" else 1
        logits, noise = operands if not _noise_sources(operands[0]) else operands[::-1]
        if _is_noise(noise) and not _noise_sources(logits) and (sign == 1 or noise is operands[1]):
            _check_law(draw, noise, torch.distributions.Gumbel(0.0, 1.0), "standard Gumbel", sign)
            return logits, "logits", "Gumbel-max"
    raise LoopError(
        "the loop's sampler is not recognised",
        f"argmax of {user_line(scores)}",
        "write argmax(probs / noise) with noise ~ Exponential(1), or argmax(logits + noise) with standard Gumbel noise",
    )


def _closure(node: fx.Node) -> list[fx.Node]:
    seen, stack = {node}, [node]
    while stack:
        for source in stack.pop().all_input_nodes:
            if source not in seen:
                seen.add(source)
                stack.append(source)
    return [n for n in node.graph.nodes if n in seen]


def _noise_sources(node: fx.Node) -> list[fx.Node]:
    return [
        n
        for n in _closure(node)
        if n.op == "call_function" and n.target is not operator.getitem and op_name(n) in NOISE
    ]


def _is_noise(node: fx.Node) -> bool:
    """One random source, and everything after it pointwise."""
    sources = _noise_sources(node)
    if len(sources) != 1:
        return False
    after = [n for n in _closure(node) if sources[0] in _closure(n) and n is not sources[0]]
    return all(torch.Tag.pointwise in n.target.tags or op_name(n) in MOVEMENT for n in after)  # type: ignore[union-attr]


def _check_law(draw: fx.Node, noise: fx.Node, law: torch.distributions.Distribution, name: str, sign: int = 1) -> None:
    """Measure the noise: its Kolmogorov-Smirnov distance to the law that makes the argmax an exact draw."""
    sample = torch.sort(sign * _draw_noise(noise, NOISE_SAMPLES).double()).values
    cdf = law.cdf(sample)
    grid = torch.arange(1, NOISE_SAMPLES + 1, dtype=torch.float64) / NOISE_SAMPLES
    distance = max((cdf - grid).abs().max().item(), (cdf - grid + 1 / NOISE_SAMPLES).abs().max().item())
    if not distance < NOISE_TOLERANCE:
        raise LoopError(
            f"the noise of the loop's sampler is not {name}, so argmax does not draw from softmax",
            f"{user_line(noise)}: Kolmogorov-Smirnov distance {distance:.3f}, allowed {NOISE_TOLERANCE}",
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
    if name.startswith("exponential"):
        value.exponential_(bound["lambd"], generator=generator)
    elif name in ("rand_like", "rand", "uniform"):
        value.uniform_(bound.get("from", 0.0) or 0.0, bound.get("to", 1.0) or 1.0, generator=generator)
    else:
        value.normal_(generator=generator)
    env = {source: value}
    for node in _closure(noise):
        if node is source or node.op != "call_function" or not any(n in env for n in node.all_input_nodes):
            continue
        if op_name(node) in MOVEMENT:
            env[node] = env[node.all_input_nodes[0]]
        else:
            args = fx.map_arg(node.args, lambda n: env[n])
            env[node] = node.target(*args, **node.kwargs)  # type: ignore[operator, misc]
    return env[noise]


def _temperature(rows: fx.Node) -> float:
    """The scalar by which logits are divided, found by walking back over vocabulary-wide code; 1.0 if none."""
    node = rows
    for _ in range(64):
        if node.op != "call_function" or node.target is operator.getitem:
            return 1.0
        name = op_name(node)
        if name in ("div", "mul") and len(node.args) == 2 and isinstance(node.args[1], (int, float)):
            factor = float(node.args[1])
            return factor if name == "div" else 1.0 / factor
        if name in ("linear", "matmul", "mm", "bmm", "addmm", "select", "embedding", "topk", "sort"):
            return 1.0
        sources = [n for n in node.all_input_nodes if n.meta["val"].dim() == rows.meta["val"].dim()]
        if not sources:
            return 1.0
        node = sources[0]
    return 1.0


def _cut(lm: CausalLM, rows: fx.Node) -> CausalLM:
    """A copy of the graph that returns ``rows``."""
    graph = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    for node in lm.graph.nodes:
        if node.op != "output":
            env[node] = graph.node_copy(node, lambda n: env[n])
    graph.output((env[rows],))
    graph.eliminate_dead_code(is_impure_node=lambda node: node.op in ("placeholder", "output"))
    module = fx.GraphModule(lm.graph_module, graph)
    cut = replace(lm, graph_module=module, ids=env[lm.ids], weights=tuple(env[w] for w in lm.weights))
    cut.verify()
    return cut
