"""Programs for loops whose model reads the last W tokens only, and for the drafts beside them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

from smc_compile.options import Options
from smc_compile.program.build import CompileDraft
from smc_compile.program.checks import position_limit
from smc_compile.program.model import Model
from smc_compile.runtime.algorithms.next_token import Mixture, NextTokenDistribution
from smc_compile.runtime.execution.incremental import CachedModel
from smc_compile.runtime.execution.window import WindowModel

FARTHER = 4  # a draft's positions are tried up to so many windows


def in_window(model: Model, window: int) -> Model:
    """The model on the last ``window`` tokens of every text, which it reads again for each token."""
    assert model.traced is not None
    assert isinstance(model.runtime, CachedModel)
    graphs = model.traced.cached
    runtime = WindowModel(graphs.prefill, model.runtime.weights, window, graphs.vocab_size)
    return replace(model, runtime=runtime, max_positions=None, trained_positions=None, window=window)


def draft_beside(window: int, compile_draft: CompileDraft) -> CompileDraft:
    """Compiles the draft of a target with a window. Any draft will do: it reads the whole text where it can.

    Where its positions end, it reads the last ones too.
    """

    def compiled(
        model: Any, distribution: NextTokenDistribution | Mixture, options: Options, ids: Tensor, role: str
    ) -> Model:
        draft = compile_draft(model, distribution, options, ids, role)
        if not isinstance(draft.runtime, CachedModel):
            return draft
        limit = position_limit(draft, FARTHER * window)
        return draft if limit is None else in_window(draft, min(limit, window))

    return compiled
