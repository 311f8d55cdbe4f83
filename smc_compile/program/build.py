"""From a compiled target and options to a program: its draft, and what records its cycles."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import Tensor

from smc_compile.errors import OptionError
from smc_compile.options import Options
from smc_compile.program.checks import check_devices, cut_off, shared_vocabulary
from smc_compile.program.method import method_for, refuse_cuts, refuse_states, with_method
from smc_compile.program.model import Model, compile_model
from smc_compile.program.program import Program
from smc_compile.runtime.algorithms.next_token import Mixture, NextTokenDistribution
from smc_compile.runtime.execution.incremental import CachedModel
from smc_compile.runtime.sessions.replay import Record, cuda_graphs

# (draft, its distribution, options, ids [B, P], "draft") -> the draft in its incremental form
CompileDraft = Callable[[Any, NextTokenDistribution | Mixture, Options, Tensor, str], Model]


def recorder_for(options: Options, *models: Model) -> Record | None:
    """What records cycles to be replayed: on a GPU, where the caches are ours and stay where they are."""
    place = models[0].placement
    ours = all(isinstance(model.runtime, CachedModel) for model in models)
    if not options.cuda_graph or not ours or place is None or place[0].type != "cuda":
        return None
    return cuda_graphs(place[0])


def build_program(
    target: Model,
    options: Options,
    draft_distribution: NextTokenDistribution | Mixture,
    ids: Tensor,
    compile_draft: CompileDraft = compile_model,
    **text_processors: Any,
) -> Program:
    """The target with the draft that ``options`` name, which follows ``draft_distribution``.

    Raises:
        OptionError: the method needs a draft and there is none, or cannot use this one.
        InputError: draft and target do not fit each other.
    """
    method = method_for(target, options)
    if method == "autoregressive":
        options = with_method(options, target)
        return Program(target, None, options, record=recorder_for(options, target), **text_processors)
    if options.draft is None:
        raise OptionError(
            "no draft model was given",
            f'method "{method}" needs a draft that proposes tokens',
            'pass draft=small_model, or method="autoregressive" for the exact one-token loop',
        )
    draft = compile_draft(options.draft, draft_distribution, options, ids, "draft")
    options = with_method(options, target, draft)
    method = method_for(target, options)
    if method in ("speculative", "auto"):
        refuse_states(method, target, draft)
    elif options.max_divergence < 1:
        refuse_cuts(target, draft)
    check_devices(target, draft)
    vocab = shared_vocabulary(target, draft)
    warnings = cut_off(target, draft, vocab)
    target, draft = (replace(side, distribution=side.distribution.cut(vocab)) for side in (target, draft))
    record = recorder_for(options, target, draft)
    return Program(target, draft, options, record=record, warnings=tuple(warnings), **text_processors)
