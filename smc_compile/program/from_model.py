"""From a model, a draft and options to the program that answers, kept for later calls."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from smc_compile.errors import InputError
from smc_compile.inputs.processors import Processors
from smc_compile.options import Options, is_stateful
from smc_compile.program.build import build_program
from smc_compile.program.model import Model, compile_model, require_eval, stateful
from smc_compile.program.program import Program
from smc_compile.runtime.algorithms.next_token import SETTINGS, Mixture, NextTokenDistribution, Warper

WIDE_SHARE = 0.1  # of the draft's distribution without truncation, where the target truncates


KEPT = 16  # programs kept; the oldest goes first, and with it its hold on the model


_programs: OrderedDict[Any, Program] = OrderedDict()


def check_model(model: Any) -> None:
    if not isinstance(model, nn.Module) and not is_stateful(model):
        raise InputError("model must be an nn.Module or follow the step protocol", f"got {type(model).__name__}")


def vocabulary(model: Any, processors: Sequence[Any], options: Options, ids: Tensor) -> int:
    """How many scores processors are tried with: the model's, or a thousand where a stateful model does not say."""
    if not processors:
        return 0
    if is_stateful(model):
        return int(getattr(model, "vocab_size", 1000))
    return compile_target(model, NextTokenDistribution("logits"), options, ids).vocab_size or 1000


def program_for(model: Any, processors: Processors, greedy: bool, options: Options, ids: Tensor) -> Program:
    """One program per (model, draft, distribution, options without the seed).

    Raises:
        OptionError, InputError, CacheError, ValidationError: when the pair cannot be compiled.
    """
    chosen = tuple(value for name, value in vars(options).items() if name not in ("draft", "seed", "eos_token_id"))
    signature = (id(model), id(options.draft), processors.key, greedy, chosen, _place(model), _place(options.draft))
    if signature not in _programs:
        _programs[signature] = _compile(model, processors, greedy, options, ids)
    _programs.move_to_end(signature)
    while len(_programs) > KEPT:
        _programs.popitem(last=False)
    return _programs[signature]


def last_program() -> Program:
    """The program that answered last."""
    return next(reversed(_programs.values()))


def _place(model: Any) -> tuple[torch.device, torch.dtype] | None:
    parameters = model.parameters() if isinstance(model, nn.Module) else iter(())
    return next(((p.device, p.dtype) for p in parameters), None)


def _compile(model: Any, processors: Processors, greedy: bool, options: Options, ids: Tensor) -> Program:
    distribution = NextTokenDistribution("greedy" if greedy else "logits", warpers=processors.warpers)
    draft_distribution = draft_distribution_for(processors.warpers, greedy, options)
    target = compile_target(model, distribution, options, ids)
    on_host = bool(processors.on_host)
    return build_program(target, options, draft_distribution, ids, text_processors=processors.traced, on_host=on_host)


def draft_distribution_for(
    warpers: Sequence[Warper], greedy: bool, options: Options
) -> NextTokenDistribution | Mixture:
    """What the draft follows: rejection accepts most where the draft truncates as the target does, and no token need be
    in reach; for SMC all must be."""
    if greedy:
        return NextTokenDistribution("greedy", warpers=tuple(warpers))
    distribution = proposal(warpers, options.draft_temperature)
    return (
        replace(distribution, share=0.0)
        if options.method == "speculative" and isinstance(distribution, Mixture)
        else distribution
    )


def proposal(warpers: Sequence[Warper], draft_temperature: float | None) -> NextTokenDistribution | Mixture:
    """The draft follows its temperature and, mixed with that alone, what else the target's distribution does to scores."""
    temperature = SETTINGS["temperature"][0]
    own = temperature if draft_temperature is None else divide(draft_temperature)
    wide = NextTokenDistribution("logits", warpers=(own,))
    if all(warper is temperature for warper in warpers):
        return wide
    narrow = NextTokenDistribution(
        "logits", warpers=tuple(own if warper is temperature else warper for warper in warpers)
    )
    return Mixture(narrow, wide, WIDE_SHARE)


def divide(temperature: float) -> Warper:
    def divided(scores: Tensor, _: Any) -> Tensor:
        return scores / temperature

    return divided


def compile_target(model: Any, distribution: NextTokenDistribution, options: Options, ids: Tensor) -> Model:
    if is_stateful(model):
        return stateful(model, distribution)
    require_eval(model, "model")
    return compile_model(model, distribution, options, ids, "target")
