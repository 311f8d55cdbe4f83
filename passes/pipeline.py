"""All passes in their order, each with one input and one output type.

    `recover_loop`    Dynamo's graph of a loop -> DecodeLoop, which holds one iteration: the step
    `trace_model`     step -> ExportedProgram -> CausalLM -> (CausalLM, Sampler) -> CachedLM

A value is verified after each pass that makes or changes it, where it can be (``CausalLM.verify``).
"""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, fx, nn
from torch.export import ExportedProgram

from smc_compile.errors import CacheError, LoopError, SMCError
from smc_compile.passes.axes.infer import type_axes
from smc_compile.passes.cache.synthesize import synthesize_cache
from smc_compile.passes.capture import shape_only, single_positions  # noqa: F401  (they register rewrites)
from smc_compile.passes.capture.as_called import check_as_called
from smc_compile.passes.capture.decompositions import decompose
from smc_compile.passes.capture.export_lm import (
    OwnedWeights,
    causal_lm,
    export_step,
    lengths_to_compare,
    longest_comparable,
    require_any_length,
    share_subexpressions,
    untraceable,
)
from smc_compile.passes.capture.length_bound import bound_length
from smc_compile.passes.capture.other_lengths import check_other_lengths
from smc_compile.passes.capture.picked_rows import handle_all_rows
from smc_compile.passes.capture.sampler import Sampler, match_sampler
from smc_compile.passes.capture.sampler_faults import as_sampler_fault
from smc_compile.passes.capture.text_sampler import TextSampler, check_groups, split_sampler
from smc_compile.passes.ir import CachedLM, CausalLM
from smc_compile.passes.loop.alike import compare_iterations, even_parts
from smc_compile.passes.loop.as_written import PaddedIteration, cached_iterations
from smc_compile.passes.loop.branches import Ends, drawn_tokens, find_ends
from smc_compile.passes.loop.cache_buffers import without_buffers
from smc_compile.passes.loop.concretise import Concrete
from smc_compile.passes.loop.draws import is_draw
from smc_compile.passes.loop.iterations import Iterations, iteration_nodes
from smc_compile.passes.loop.known_masks import fold_known_masks, ones_inputs
from smc_compile.passes.loop.kv_loop import cache_in_words, carries_cache, known_integers, lengths_in_prompt
from smc_compile.passes.loop.lengths import Lengths
from smc_compile.passes.loop.lookups import simplify_lookups
from smc_compile.passes.loop.needs_value import UnlikeIterations
from smc_compile.passes.loop.one_row import sample_rows
from smc_compile.passes.loop.ones_masks import drop_ones_masks
from smc_compile.passes.loop.padded_buffer import (
    draw_inputs,
    last_positions,
    lengths_in_buffer,
    padded_length,
    padding_of,
)
from smc_compile.passes.loop.preparation import Preparation
from smc_compile.passes.loop.recover import DecodeLoop, RecoveredStep, decode_loop, find_tokens
from smc_compile.passes.loop.refusals import (
    refuse_autocast,
    refuse_counted_cache,
    refuse_long_inputs,
    refuse_other_randomness,
    refuse_padding,
    refuse_uncounted_tokens,
    refuse_unrecognised_feedback,
)
from smc_compile.passes.loop.step_graph import build_step
from smc_compile.passes.loop.tensor_info import tensor_info
from smc_compile.passes.loop.windows import window_of
from smc_compile.passes.lower import skinny_products  # noqa: F401  (registers a rewrite)
from smc_compile.passes.lower.early_head import early_head
from smc_compile.passes.lower.outline_layers import outline_layers
from smc_compile.passes.rewrites import rewrite_cached, rewrite_captured
from smc_compile.passes.validate import validate

log = logging.getLogger(__name__)
MOST_PARTS = 8  # of a loop whose iterations are not alike: each is a program, and begins with a prompt of its own


@dataclass(frozen=True)
class Traced:
    """A step after all passes.

    Attributes:
        sampler: what the step samples from; None when the step returns logits.
        owned: the weights that the step owns itself; they precede the explicit ones in ``lm.weights``.
        error: largest relative difference between cached and original rows, None when not validated.
        seconds: time of each pass.
        text: what the step does with the text behind its model's logits, which ``lm`` then ends in; None if nothing.
    """

    lm: CausalLM
    sampler: Sampler | None
    cached: CachedLM
    owned: OwnedWeights
    error: float | None
    seconds: dict[str, float] = field(default_factory=dict)
    text: TextSampler | None = None


class Passes:
    """Runs passes one after the other, and keeps the time of each by its name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def run(self, function: Callable[..., Any], *inputs: Any) -> Any:
        start = time.perf_counter()
        result = function(*inputs)
        if isinstance(result, CausalLM):
            result.verify()
        self.seconds[function.__name__] = time.perf_counter() - start
        return result


def trace_model(step: nn.Module, ids: Tensor, weights: Sequence[Tensor], check: bool, sampled: bool = True) -> Traced:
    """Run every pass on ``step(ids [B, S], *weights)``, which returns a draw, or logits [B, V] if not ``sampled``.

    Raises:
        CacheError, LoopError, ValidationError: from the pass that refuses.
    """
    passes = Passes()
    lm, owned = capture(step, ids, weights, passes)
    sampler, text = None, None
    whole, unsplit = lm, None
    if sampled:
        whole, sampler = passes.run(match_sampler, lm)
        try:
            lm, text = passes.run(split_sampler, whole, sampler) or (whole, None)
        except LoopError as refusal:  # it may read the text position by position, as a model does
            lm, unsplit = whole, refusal
    try:
        cached = passes.run(synthesize_cache, lm)
    except CacheError as refusal:
        raise unsplit or (as_sampler_fault(lm, refusal) if sampled else refusal) from None
    if text is not None:
        _check_text_sampler(text, [*owned(), *weights])
    cached = passes.run(early_head, cached)
    cached = passes.run(rewrite_cached, cached)
    error = passes.run(validate, lm, cached, [*owned(), *weights]) if check else None
    cached = passes.run(outline_layers, cached)
    return Traced(lm, sampler, cached, owned, error, passes.seconds, text)


def _check_text_sampler(text: TextSampler, weights: Sequence[Tensor]) -> None:
    """Run both halves on random rows.

    Raises:
        LoopError: rows depend on each other.
    """
    check_groups(text.reading, weights, texts=True)
    if text.behind is not None:
        check_groups(text.behind, weights, texts=False)


def capture(
    step: nn.Module, ids: Tensor, weights: Sequence[Tensor] = (), passes: Passes | None = None
) -> tuple[CausalLM, OwnedWeights]:
    """``step(ids [B, S], *weights) -> [B, ...]`` as a causal model, and the weights that the step owns itself.

    Raises:
        CacheError: when the step cannot be traced for a symbolic length, with the tracer's reason.
    """
    passes = passes or Passes()
    program = _exported(step, ids, weights, passes)
    owned = OwnedWeights(step, program)
    lm = require_any_length(passes.run(causal_lm, program))
    lm = passes.run(rewrite_captured, lm)
    lm = passes.run(share_subexpressions, lm)
    lm = passes.run(bound_length, lm)
    lm = passes.run(handle_all_rows, lm)
    if (longest := longest_comparable(program)) is not None:
        lm = replace(lm, max_positions=min(longest, lm.max_positions or longest))
    lm = passes.run(check_other_lengths, step, lm, lengths_to_compare(program), [*owned(), *weights], weights)
    lm = passes.run(check_as_called, step, lm, [*owned(), *weights], weights)
    log.debug("captured step\n%s", lm.graph_module.print_readable(print_output=False))
    return lm, owned


def _exported(step: nn.Module, ids: Tensor, weights: Sequence[Tensor], passes: Passes) -> ExportedProgram:
    """The step as a functional program with a symbolic length."""
    try:
        return passes.run(decompose, passes.run(export_step, step, ids, weights))
    except SMCError:  # the step itself refused
        raise
    except Exception as error:  # the tracer raises many types; all mean the same to the user
        _refuse_what_pins_the_length(step, ids, weights)
        raise untraceable(error) from error


def _refuse_what_pins_the_length(step: nn.Module, ids: Tensor, weights: Sequence[Tensor]) -> None:
    """A recurrent op pins the length: trace for that one length and let the axis analysis name the op.

    Raises:
        CacheError: naming the op, if there is one, or why the step cannot be traced for one length either.
    """
    try:
        program = decompose(export_step(step, ids, weights, symbolic=False))
    except SMCError:
        raise
    except Exception as error:
        raise untraceable(error) from error
    type_axes(causal_lm(program))


# ---- from Dynamo's graph to one iteration --------------------------------------------------------------------------


def recover_loop(
    gm: fx.GraphModule, example_inputs: Sequence[Any], tokens_only: bool = False, parts: bool = False
) -> DecodeLoop | None:
    """The decode loop in a graph, or None if no token is drawn and fed back.

        prompt -> [iteration 0] -> token 0 -> [iteration 1] -> token 1 -> ...    becomes    step(ids [B, S]) -> token

    With ``tokens_only`` the graph may end its texts (see `loop.branches`), and what it returns is not looked at: the
    function that it was made of runs on the tokens. With ``parts`` its iterations need not all be alike, and there may
    be one alone.

    Raises:
        UnlikeIterations: its iterations are not alike, and there are no ``parts``, or too many.
        LoopError: there is a loop, but not one that can be compiled.
    """
    preparation = Preparation(gm, example_inputs)
    concrete, marks = preparation.run()  # sizes become numbers; of a while_loop, the first iterations
    nodes = list(concrete.graph.nodes)
    if not any(is_draw(node) for node in nodes):
        log.info("no sampling and no argmax in the graph: left as it is")
        return None
    fewest = 1 if parts else 2
    found = find_tokens(nodes, fewest)  # which cell of which tensor holds which token
    if found is None:
        refuse_unrecognised_feedback(nodes)
        log.info("no token is drawn from a sequence and fed back (one iteration is no loop): left as it is")
        return None
    layouts, tokens = found
    ends = None
    if tokens_only:
        drawn = drawn_tokens(nodes, tokens)
        ends = find_ends(gm, nodes, tokens, drawn, marks, layouts.batch)
        pairs = [(nodes.index(token), nodes.index(draw)) for token, draw in zip(tokens, drawn, strict=True)]
        preparation = replace(preparation, replaced=tuple(pair for pair in pairs if pair[0] != pair[1]))
        if preparation.replaced:
            concrete, _ = preparation.run()
            nodes = list(concrete.graph.nodes)
            layouts, tokens = find_tokens(nodes, fewest) or found
    cached = len(tokens) > 1 and carries_cache(layouts, tokens)
    ones = [] if cached else ones_inputs(nodes, example_inputs, layouts.prompt)
    refuse_padding(nodes, example_inputs, layouts.prompt, ones)
    if not cached and fold_known_masks(concrete.graph, layouts.prompt, ones):
        nodes = list(concrete.graph.nodes)
        layouts, tokens = find_tokens(nodes, fewest) or (layouts, tokens)
    refuse_autocast(nodes)
    refuse_uncounted_tokens(concrete, tokens)
    if cached:
        iterations = Iterations(layouts, tokens, cached=True)
        step = _first_step(preparation, concrete, iterations)
    else:
        simplify_lookups(layouts)
        iterations = Iterations(layouts, tokens, window=window_of(layouts, tokens))
        try:
            step = _common_step(gm, iterations)
        except UnlikeIterations as error:
            if not parts:
                raise
            return _loop_in_parts(gm, concrete, iterations, error, ends, ones, not tokens_only)
    return decode_loop(concrete, iterations, step, ends, ones, not tokens_only)


def _loop_in_parts(
    gm: fx.GraphModule,
    concrete: Concrete,
    iterations: Iterations,
    error: UnlikeIterations,
    ends: Ends | None,
    ones: Sequence[fx.Node],
    outputs: bool,
) -> DecodeLoop:
    """The loop with those of its iterations that are alike as parts.

    Raises:
        UnlikeIterations: ``error``, with what stands against parts.
    """
    parts = even_parts(iterations)
    if len(parts) > MOST_PARTS:
        why = f"{error.why}; there are {len(parts)} parts, and may be {MOST_PARTS}"
        raise UnlikeIterations(error.what, why, error.fix)
    steps = [_common_step(gm, part) for part in parts]
    if concrete.remaining or iterations.window is not None or any(step.padded is not None for step in steps):
        raise error
    pairs = zip(parts, steps, strict=True)
    found = tuple(decode_loop(concrete, part, step, ends, ones, outputs=False) for part, step in pairs)
    stops = itertools.accumulate(part.iterations for part in found)
    report = [
        f"iterations {stop - p.iterations} to {stop - 1} are alike: a part with a program of its own"
        for stop, p in zip(stops, found, strict=True)
    ]
    whole = decode_loop(concrete, iterations, steps[0], ends, ones, outputs)
    return replace(whole, parts=found, report=[*whole.report, *report])


def _common_step(gm: fx.GraphModule, iterations: Iterations) -> RecoveredStep:
    """The step of a loop whose iterations all read the whole text: what is common to them."""
    closures = [iteration_nodes(iterations, iteration) for iteration in range(len(iterations.tokens))]
    closure = closures[0]
    refuse_other_randomness(closure, iterations.tokens[0])
    growing = compare_iterations(iterations)
    report = [f"one iteration has {len(closure)} nodes; {len(growing)} integers grow with the sequence length"]
    columns = padded_length(iterations, closure)
    if columns is not None:
        return _unpadded_step(gm, iterations, closure, growing, columns, report)
    step, invariants = build_step(gm, iterations, closure, growing)
    drop_ones_masks(step)
    step = sample_rows(step, closure)
    last = len(closures) - 1
    shortest = iterations.length(last) + 1 if iterations.read_ends(closures[last], last) else 0
    return RecoveredStep(step, invariants, closure, report, shortest=shortest)


def _unpadded_step(
    gm: fx.GraphModule,
    iterations: Iterations,
    closure: Sequence[fx.Node],
    growing: Lengths,
    columns: int,
    report: Sequence[str],
) -> RecoveredStep:
    """The step of a loop that reads the text in a buffer of so many columns: it reads the text alone."""
    lengths = {**growing, **lengths_in_buffer(iterations, closure, growing, columns)}
    last = last_positions(closure, growing)
    lengths = {leaf: affine for leaf, affine in lengths.items() if leaf not in last}
    step, invariants = build_step(gm, iterations, closure, lengths, last)
    seen = draw_inputs(iterations.tokens[0], closure)
    written, _ = build_step(gm, iterations, closure, growing, seen=seen, padded=True)
    rewritten, _ = build_step(gm, iterations, closure, lengths, last, seen=seen)
    padded = PaddedIteration(written, rewritten, padding_of(iterations, closure), columns, bool(seen))
    report = [*report, f"read in a padded buffer of {columns} columns"]
    return RecoveredStep(step, invariants, closure, report, padded=padded)


def _first_step(preparation: Preparation, concrete: Concrete, iterations: Iterations) -> RecoveredStep:
    """The step of a loop that hands on a cache: its first iteration, without the cache."""
    refuse_counted_cache(concrete)
    closure = iteration_nodes(iterations, 0)
    lengths = lengths_in_prompt(preparation.at, iterations, closure)
    written, inputs = build_step(preparation.gm, iterations, closure, lengths)
    drop_ones_masks(written)
    refuse_long_inputs(inputs, iterations.layouts.prompt)
    integers = known_integers(concrete, preparation.example_inputs, inputs)
    free = without_buffers(written, iterations.layouts.batch, [tensor_info(node) for node in inputs], integers)
    known = [(node, int(value)) for node, value in zip(inputs, integers, strict=True) if value is not None]
    invariants = list(itertools.compress(inputs, free.kept))
    cached = cached_iterations(preparation, concrete, iterations, free.step, invariants)
    refuse_other_randomness(closure, iterations.tokens[0])
    return RecoveredStep(free.step, invariants, closure, [cache_in_words(free)], known, cached=cached)
