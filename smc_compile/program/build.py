"""From a compiled target and options to a program: its method, its draft, and how its cycles are recorded."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from torch import Tensor

from smc_compile.errors import OptionError
from smc_compile.options import Options, is_stateful
from smc_compile.program.checks import shared_vocabulary
from smc_compile.program.model import (
    Model,
    compile_model,
    method_for,
    placement,
    require_eval,
    stateful,
)
from smc_compile.program.program import Program
from smc_compile.runtime.algorithms.next_token import Mixture, NextTokenDistribution
from smc_compile.runtime.execution.incremental import CachedModel
from smc_compile.runtime.sessions.replay import Record, cuda_graphs


def recorder_for(options: Options, *models: Model) -> Record | None:
    """What records cycles to be replayed: on a GPU, where the caches are ours and stay where they are."""
    place = placement(models[0])
    ours = all(isinstance(model.runtime, CachedModel) for model in models)
    if not options.cuda_graph or not ours or place is None or place[0].type != "cuda":
        return None
    return cuda_graphs(place[0])


def build_program(
    target: Model,
    options: Options,
    draft_distribution: NextTokenDistribution | Mixture,
    ids: Tensor,
    draft_model: Callable[[Any, Options, NextTokenDistribution | Mixture, Tensor], Model] | None = None,
    **text_processors: Any,
) -> Program:
    """Add the draft that ``options`` name, which follows ``draft_law``.

    ``draft_model`` compiles a draft that is called in another way than with ids alone.

    Raises:
        OptionError: when the method needs a draft and there is none.
        InputError: when draft and target do not fit each other.
    """
    method = method_for(target, options)
    if method == "autoregressive":
        return Program(target, None, options, record=recorder_for(options, target), **text_processors)
    if options.draft is None:
        raise OptionError(
            "no draft model was given",
            f'method "{method}" needs a draft that proposes tokens',
            'pass draft=small_model, or method="autoregressive" for the exact one-token loop',
        )
    start = time.perf_counter()
    draft = (draft_model or compile_draft)(options.draft, options, draft_distribution, ids)
    if method == "speculative":
        refuse_states(target, draft)
    vocab = shared_vocabulary(target, draft)
    target.distribution, draft.distribution = target.distribution.cut(vocab), draft.distribution.cut(vocab)
    seconds, record = time.perf_counter() - start, recorder_for(options, target, draft)
    return Program(target, draft, options, analysis_seconds=seconds, record=record, **text_processors)


def refuse_states(target: Model, draft: Model) -> None:
    """Rejected tokens are hidden in a cache by their position; a state has taken them in."""
    for name, model in (("target", target), ("draft", draft)):
        if not isinstance(model.runtime, CachedModel):
            raise OptionError(
                f'method "speculative" cannot use this {name}',
                "it carries a state of its own (step protocol), which cannot be rolled back when tokens are rejected",
                'use method="smc" or "autoregressive", or a model that the compiler can make a cache for',
            )


def compile_draft(model: Any, options: Options, distribution: NextTokenDistribution | Mixture, ids: Tensor) -> Model:
    """The draft's own incremental form; its rows are raw logits."""
    if is_stateful(model):
        return stateful(model, distribution)
    require_eval(model, "draft")
    return compile_model(model, distribution, options, ids, "draft")
