"""From a model, a draft and options to the program that answers, kept for later calls."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

from torch import Tensor, nn

from smc_compile.errors import InputError
from smc_compile.inputs.processors import Processors
from smc_compile.options import Options, is_stateful
from smc_compile.program.build import build_program
from smc_compile.program.draft_distribution import draft_distribution_for
from smc_compile.program.guards import model_state, program_key
from smc_compile.program.lru import LRU
from smc_compile.program.model import compile_model
from smc_compile.program.program import Program
from smc_compile.runtime.algorithms.next_token import NextTokenDistribution

KEPT = 16  # programs; each holds its models
UNKNOWN_VOCABULARY = 1000  # scores that processors are tried with where the model does not say
programs: LRU[Hashable, Program] = LRU(KEPT)


def check_model(model: Any) -> None:
    """Raises InputError for what is no model, and for a model with an encoder."""
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise InputError(
            "the model is no decoder-only model",
            f"{type(model).__name__} reads its prompt with an encoder, and writes another text with a decoder",
            "use a causal language model: its text goes on behind the prompt",
        )
    if not isinstance(model, nn.Module) and not is_stateful(model):
        raise InputError("model must be an nn.Module or follow the step protocol", f"got {type(model).__name__}")


def vocabulary(model: Any, processors: Sequence[Any], options: Options, ids: Tensor) -> int:
    """How many scores ``processors`` are tried with; 0 without any."""
    if not processors:
        return 0
    if is_stateful(model):
        return int(getattr(model, "vocab_size", UNKNOWN_VOCABULARY))
    target = compile_model(model, NextTokenDistribution("logits"), options, ids, "target")
    return target.vocab_size or UNKNOWN_VOCABULARY


def program_for(model: Any, processors: Processors, greedy: bool, options: Options, ids: Tensor) -> Program:
    """The program of a model, its processors and options: compiled once.

    Raises:
        OptionError, InputError, CacheError, ValidationError: when the pair cannot be compiled.
    """
    key = program_key(options, model_state(model), processors.key, greedy)
    return programs.get_or_make(key, lambda: _compile(model, processors, greedy, options, ids))


def _compile(model: Any, processors: Processors, greedy: bool, options: Options, ids: Tensor) -> Program:
    distribution = NextTokenDistribution("greedy" if greedy else "logits", warpers=processors.warpers)
    draft_distribution = draft_distribution_for(processors.warpers, greedy)
    target = compile_model(model, distribution, options, ids, "target")
    on_host = bool(processors.on_host)
    return build_program(target, options, draft_distribution, ids, text_processors=processors.traced, on_host=on_host)
