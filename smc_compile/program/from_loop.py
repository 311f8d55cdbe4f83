"""From a recovered decode loop to a program, and from a program's tokens back to what the loop returns."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor

from smc_compile.errors import LoopError, OptionError
from smc_compile.fingerprint import forget_traced
from smc_compile.inputs.requests import build_request, check_prompt, request_seeds
from smc_compile.options import Options
from smc_compile.passes.loop.branches import EndTokens
from smc_compile.passes.loop.recover import DecodeLoop
from smc_compile.passes.pipeline import Traced, trace_model
from smc_compile.program.build import CompileDraft, build_program
from smc_compile.program.cropped_texts import draft_beside, in_window
from smc_compile.program.draft_calls import compile_called, needs_more
from smc_compile.program.guards import program_key
from smc_compile.program.loop_finder import step_text
from smc_compile.program.lru import LRU
from smc_compile.program.model import compile_model, with_cache
from smc_compile.program.opaque_models import with_models
from smc_compile.program.program import Program
from smc_compile.program.text_rules import RunSampler, check_rule, sampler_to_run
from smc_compile.runtime.algorithms.next_token import NextTokenDistribution
from smc_compile.runtime.state.request import Request

KEPT = 16  # programs, for loops that are compiled again (another n, another prompt length)
programs: LRU[Hashable, LoopProgram] = LRU(KEPT)
_checked: WeakSet[DecodeLoop] = WeakSet()


@dataclass(frozen=True)
class LoopProgram:
    """A program whose target reads its weights from ``weights``: the arguments of the current call.

    Attributes:
        owned: the weights that the step holds itself.
        sampler: what reads the text behind the target's logits; None if nothing does.
    """

    program: Program
    weights: list[Tensor]
    owned: Callable[[], list[Tensor]]
    sampler: RunSampler | None = None

    def request(
        self, loop: DecodeLoop, arguments: Sequence[Any], iterations: int, options: Options, seeds: Tensor | None = None
    ) -> Request:
        """The request that a call of the loop's graph makes; the call's weights are taken up for it.

        Args:
            seeds: [B]; by default those that follow from the options.
        """
        self.weights[:] = _weights(loop, arguments)
        if self.sampler is not None:
            self.sampler.take([*self.owned(), *self.weights])
        on_host = self.sampler.on_host if self.sampler is not None else ()
        ids = prompt_of(loop, arguments)
        ends = self.end_tokens(loop, arguments)
        seeds = request_seeds(options.seed, ids) if seeds is None else seeds
        if options.eos_token_id is not None and ends.ids and options.eos_token_id not in ends.ids:
            raise OptionError(
                "eos_token_id is not the token by which the loop ends its texts",
                f"eos_token_id={options.eos_token_id}, and the loop ends them with {list(ends.ids)}",
                "leave eos_token_id out",
            )
        eos_ids = list(ends.ids) or options.eos_token_id
        return build_request(ids, iterations, seeds, eos_ids=eos_ids, pad=ends.pad, text_processors=on_host)

    @property
    def vocabulary(self) -> int:
        """How many tokens the target knows."""
        assert self.program.target.vocab_size is not None
        return self.program.target.vocab_size

    def end_tokens(self, loop: DecodeLoop, arguments: Sequence[Any]) -> EndTokens:
        """The tokens by which the loop itself ends its texts."""
        return loop.ends.tokens(arguments, self.vocabulary) if loop.ends is not None else EndTokens()


def program_for(
    loop: DecodeLoop,
    arguments: Sequence[Any],
    options: Options,
    window: int | None = None,
    states: tuple[Hashable, ...] = (),
) -> LoopProgram:
    """The program of a loop: compiled once for loops whose steps, inputs, models and options agree.

    Args:
        window: how many tokens the step sees of longer texts; None for all.
        states: of the models that are one node each in the step.

    Raises:
        LoopError: the loop was compiled for another number than one of ``arguments``, or it does not compute what its
            step computes, or it keeps a cache and its sampler reads the text.
        OptionError, InputError, CacheError, ValidationError: target and draft cannot be compiled.
    """
    for index, value in loop.fixed_floats:
        if float(arguments[index]) != value:
            raise LoopError(
                "a number that the loop was compiled with has changed",
                f"it was {value}, it is {float(arguments[index])}",
                "pass it as a tensor, or call torch._dynamo.reset() before changing it",
            )
    check_prompt(prompt_of(loop, arguments))
    loop.check_ones(arguments)
    if loop not in _checked:  # another loop with the same step may treat its padding or its cache in another way
        loop.check(arguments)
        _checked.add(loop)
    weights = _weights(loop, arguments)
    inputs = tuple((tuple(w.shape), w.dtype, w.device) for w in weights)
    key = program_key(options, step_text(loop.step.graph), loop.batch, inputs, window, states)
    program = programs.get_or_make(key, lambda: _compile(loop, arguments, weights, options, window))
    if program.sampler is not None and loop.cached is not None:  # a loop without a cache may have the same program
        raise LoopError(
            "The sampler reads the tokens of the text, in a loop that keeps a cache.",
            f"{program.sampler.where}: only the first iteration shows which tokens it reads",
            "write the loop without a cache, model(ids)[:, -1]: the compiler makes its own",
        )
    return program


def loop_outputs(loop: DecodeLoop, arguments: Sequence[Any], sequences: Tensor) -> tuple[Tensor | None, ...]:
    """What the loop's graph returns for ``sequences`` [B, P+n]; None for a cache that was made outside of the loop."""
    prompt = prompt_of(loop, arguments)
    tokens = sequences[:, prompt.shape[1] :]
    return tuple(layout and layout.build(prompt, tokens) for layout in loop.outputs)


def prompt_of(loop: DecodeLoop, arguments: Sequence[Any]) -> Tensor:
    """The prompt as [B, P]; a loop may take one prompt [P]."""
    prompt: Tensor = arguments[loop.prompt_index]
    return prompt[None] if prompt.dim() == 1 else prompt


def _weights(loop: DecodeLoop, arguments: Sequence[Any]) -> list[Tensor]:
    """What every iteration reads besides the tokens, as tensors."""
    found = [arguments[i] for i in loop.invariant_indices]
    return [value if isinstance(value, Tensor) else torch.tensor(value) for value in found]


def _compile(
    loop: DecodeLoop, arguments: Sequence[Any], weights: list[Tensor], options: Options, window: int | None
) -> LoopProgram:
    ids = prompt_of(loop, arguments)
    step, text = with_models(loop.step), ids.new_zeros(loop.batch, max(2, loop.shortest))
    try:
        traced = trace_model(step, text, weights, options.validate)
    finally:
        forget_traced(step)
    assert traced.sampler is not None
    current, kind = list(weights), traced.sampler.kind
    sampler = _text_sampler(traced, weights, options, window)
    if sampler is not None:
        distribution, draft_distribution = sampler.distribution, sampler.draft_distribution
    else:
        distribution = NextTokenDistribution(kind)
        draft_distribution = NextTokenDistribution(
            "greedy" if kind == "greedy" else "logits", traced.sampler.temperature
        )
    target = with_cache(traced, lambda: [*traced.owned(), *current], options, "target", distribution)
    compile_draft: CompileDraft = compile_called if needs_more(options.draft) else compile_model
    if window is not None:
        target, compile_draft = in_window(target, window), draft_beside(window, compile_draft)
    rules = (sampler.rule,) if sampler is not None else ()
    traced_rules, on_host = (rules, False) if sampler is None or sampler.traced else ((), True)
    program = build_program(
        target, options, draft_distribution, ids, compile_draft, text_processors=traced_rules, on_host=on_host
    )
    if sampler is not None:
        check_rule(sampler, program)
    return LoopProgram(program, current, traced.owned, sampler)


def _text_sampler(traced: Traced, weights: Sequence[Tensor], options: Options, window: int | None) -> RunSampler | None:
    """What reads the text behind the target's logits, if anything does."""
    if traced.text is None or traced.sampler is None:
        return None
    given, vocabulary = [*traced.owned(), *weights], traced.cached.vocab_size
    return sampler_to_run(traced.text, traced.sampler.kind, given, vocabulary, window)
