"""A sampler that reads the tokens of the text, such as one with a repetition penalty, cut off its model.

    ids -> [model] -> logits -> [reading: ids, logits -> scores] -> [behind: scores -> rows] -> draw

The model is left as one that any loop may have. ``reading`` is a rule on the text: it applies to the target and to the
draft. ``behind`` no longer reads the text: temperature and truncation belong to the target alone, since a draft that
truncates could not propose every token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx
from torch._dynamo.utils import counters

from smc_compile.errors import LoopError
from smc_compile.passes.capture.row_code import RowCode, as_rows, backwards, between, check_rows, is_scores
from smc_compile.passes.capture.sampler import Sampler, ending_in, temperature_of
from smc_compile.passes.capture.sampler_faults import first_choices
from smc_compile.passes.closeness import NARROW
from smc_compile.passes.fx_tools import descendants, describe, op_name, output_values
from smc_compile.passes.ir import CausalLM
from smc_compile.passes.rewrites import new_node

aten = torch.ops.aten
PRODUCTS = frozenset(
    ["linear", "mm", "bmm", "matmul", "addmm", "baddbmm", "_int_mm", "scaled_dot_product_attention", "convolution"]
)
TRIED = (1, 2, 3, 8, 13)  # lengths of texts, with which groups of rows are compared with one group


@dataclass(frozen=True)
class TextSampler:
    """What stands between a model's logits and the draw, where it reads the text.

    Attributes:
        reading: ``(ids [B, S], logits [B, V], *weights) -> scores [B, V]``.
        behind: ``(scores [B, V], *weights) -> rows [B, V]``, of which the ``Sampler`` tells the kind; None where they
            are the scores.
        probs: whether the scores are probabilities, and no logits.
        temperature: what divides the scores in ``behind``; 1.0 where nothing does.
        where: the op that reads the text, and its line.
    """

    reading: RowCode
    behind: RowCode | None
    probs: bool
    temperature: float
    where: str


def split_sampler(lm: CausalLM, sampler: Sampler) -> tuple[CausalLM, TextSampler] | None:
    """The model that ends in its logits [B, V], and the sampler behind it; None where the sampler reads no text.

    Args:
        lm: ends in the rows that fix the distribution.

    Raises:
        LoopError: the sampler reads the text, and cannot be cut off the model, or is no rule for each request.
    """
    (rows,) = output_values(lm.graph)
    firsts = first_choices(lm)
    reader = _reader(lm, rows, firsts)
    if reader is None:
        return None
    vocabulary = int(rows.meta["val"].shape[-1])
    logits = _logits(lm, rows, firsts, reader, vocabulary)
    scores = _scores(lm, rows, logits, vocabulary)
    model = _model_ending_in(lm, logits)
    reading = between(lm, [lm.ids, logits], scores)
    behind = None if scores is rows else between(lm, [scores], rows)
    check_rows(reading)
    if behind is not None:
        check_rows(behind)
    # Only a softmax over the vocabulary makes probabilities; greedy loops take the largest, whatever the scores are.
    probs = sampler.kind != "greedy" and (
        sampler.kind == "probs" if behind is None else _is_probs(scores, backwards(scores, [lm.ids, logits]))
    )
    temperature = _temperature_in(behind, sampler.kind) if behind is not None else 1.0
    counters["smc_compile"]["text_sampler"] += 1
    return model, TextSampler(reading, behind, probs, temperature, describe(reader))


def check_groups(code: RowCode, weights: Sequence[Tensor], texts: bool) -> None:
    """Compare rows that are run in several groups with rows that are run as the loop runs them.

    Args:
        texts: whether the first part is a text [R, L].

    Raises:
        LoopError: a row depends on others, or on where it stands.
    """
    generator = torch.Generator().manual_seed(0)
    scores = next(n for n in code.graph_module.graph.find_nodes(op="placeholder") if n.meta["val"].is_floating_point())
    vocabulary, device = int(scores.meta["val"].shape[-1]), scores.meta["val"].device
    rows, own = 3 * code.batch, code.of(weights)
    order = torch.randperm(rows, generator=generator)
    for length in TRIED if texts else TRIED[:1]:
        ids = torch.randint(vocabulary, (rows, length), generator=generator)
        given = torch.randn(rows, vocabulary, generator=generator, dtype=torch.float64)
        parts = [part.to(device, dtype) for part, dtype in zip([ids, given][1 - texts :], code.dtypes, strict=True)]
        groups = list(zip(*(part.split(code.batch) for part in parts), strict=True))
        with torch.no_grad():
            try:
                expected = torch.cat([code.graph_module(*group, *own) for group in groups])
            except (RuntimeError, IndexError):  # shorter than what it reads of a text
                continue
            try:
                actual = code([part[order][:-1] for part in parts], own)
            except RuntimeError as error:  # an op for which vmap has no rule, or a wrong one
                raise LoopError(
                    "The sampler reads the text, and has an op that cannot be run for many rows.",
                    str(error).splitlines()[0][:300],
                    "write it with other ops; smc_compile.generate(model, draft, ids, logits_processor=[...]) takes "
                    "processors that read the text, whatever they do",
                ) from error
        wanted = expected[order][:-1].double()
        coarse = expected.dtype in NARROW
        if not torch.allclose(actual.double(), wanted, 2e-2 if coarse else 1e-4, 2e-2 if coarse else 1e-5, True):
            raise LoopError(
                "The sampler reads the text, and not for each request by itself.",
                f"for texts of {length} tokens, rows that are run in another order get another answer",
                "write it along dim=1 or dim=-1, alike for all rows; or call the loop with one prompt, ids [1, P]",
            )


# ---- where to cut ----------------------------------------------------------------------------------------------------


def _reader(lm: CausalLM, rows: fx.Node, firsts: Sequence[fx.Node]) -> fx.Node | None:
    """The first op that brings the text to the rows by another way than the model's last position."""
    past = backwards(rows, firsts)
    if not firsts or not set(firsts) & past:
        return None
    tokens = _by_value(lm.ids) & past - set(firsts)
    behind = descendants(*firsts)
    return next((n for n in lm.graph.nodes if n in behind & past and set(n.all_input_nodes) & tokens - behind), None)


def _by_value(ids: fx.Node) -> set[fx.Node]:
    """The nodes that depend on the tokens, and not on their number alone."""
    found = {ids}
    for node in ids.graph.nodes:
        if node.target is not aten.sym_size.int and found & set(node.all_input_nodes):
            found.add(node)
    return found


def _logits(lm: CausalLM, rows: fx.Node, firsts: Sequence[fx.Node], reader: fx.Node, vocabulary: int) -> fx.Node:
    """The first scores behind the last position through which all goes, and behind which no model is left.

    Raises:
        LoopError: there are none.
    """
    behind = descendants(*firsts) - descendants(reader)
    for node in lm.graph.nodes:
        if node not in behind or not is_scores(node, lm, vocabulary) or _row_of(lm, node) is None:
            continue
        sampler = backwards(rows, [node])
        alone = node in sampler and not sampler & set(firsts) - {node}
        if alone and not any(op_name(n) in PRODUCTS for n in sampler - {node}):
            return node
    raise LoopError(
        "The sampler reads the tokens of the text.",
        f"{describe(reader)}: what a token is drawn from depends on earlier tokens, and not by a rule on the text and "
        "on the logits [B, V] of the last position alone",
        "write it as a function of ids and of logits = model(ids)[:, -1]; smc_compile.generate(model, draft, ids, "
        "logits_processor=[...]) takes processors that read the text",
    )


def _scores(lm: CausalLM, rows: fx.Node, logits: fx.Node, vocabulary: int) -> fx.Node:
    """The first scores behind which nothing reads the text, or its length, or the logits again."""
    for node in lm.graph.nodes:
        if node in (lm.ids, logits) or not is_scores(node, lm, vocabulary):
            continue
        behind = backwards(rows, [node])
        if node in behind and lm.ids not in behind and logits not in behind:
            return node
    return rows


def _model_ending_in(lm: CausalLM, logits: fx.Node) -> CausalLM:
    """A copy of the model that returns its logits as rows [B, V]."""
    row = _row_of(lm, logits)
    assert row is not None
    if row is logits:
        return ending_in(lm, lambda copies: as_rows(copies[logits], logits, lm))
    # the last position of all rows, in the place of that of the one row
    return ending_in(lm, lambda copies: new_node(copies[logits], aten.select.int, copies[row], 1, logits.args[2]))


def _row_of(lm: CausalLM, scores: fx.Node) -> fx.Node | None:
    """Scores with rows; for ``y[0, -1]`` of shape [V], y [1, S, V]; None for other scores without rows."""
    if scores.meta["val"].dim() > 1:
        return scores
    source = scores.args[0] if scores.target is aten.select.int else None
    if not isinstance(source, fx.Node) or source.target is not aten.select.int or source.args[1:] not in _FIRST:
        return None
    return source.args[0] if source.args[0].meta["val"].dim() == 3 else None  # type: ignore[union-attr, return-value]


_FIRST = ((0, 0), (0, -1))  # of one row


def _is_probs(scores: fx.Node, nodes: set[fx.Node]) -> bool:
    """Whether scores are probabilities: going back, a softmax is met before a logarithm."""
    node, rank = scores, scores.meta["val"].dim()
    while node in nodes and node.op == "call_function":
        if op_name(node) in ("softmax", "_softmax"):
            return True
        if op_name(node) in ("log", "log_softmax", "_log_softmax"):
            return False
        values = [(n, n.meta.get("val")) for n in node.all_input_nodes if n in nodes]
        like = [n for n, value in values if isinstance(value, Tensor) and value.is_floating_point()]
        like = [n for n in like if n.meta["val"].dim() == rank] or like
        if not like:
            return False
        node = like[0]
    return False


def _temperature_in(code: RowCode, kind: str) -> float:
    """As ``temperature_of``, of a part of the sampler."""
    (result,) = output_values(code.graph_module.graph)
    return temperature_of(result, kind)
