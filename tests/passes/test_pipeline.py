"""The passes in their order, timed, with validation on request."""

from __future__ import annotations

import pytest
import torch
from helpers.traces import Last, Step, model
from torch import nn

from smc_compile.errors import CacheError, LoopError
from smc_compile.passes.pipeline import trace_model

PASSES = [
    "export_step", "decompose", "causal_lm", "rewrite_captured", "share_subexpressions", "bound_length",
    "handle_all_rows", "check_other_lengths", "check_as_called", "match_sampler", "split_sampler", "synthesize_cache",
    "early_head", "rewrite_cached", "validate", "outline_layers",
]  # fmt: skip
IDS = torch.zeros(2, 2, dtype=torch.long)


def draw(x):
    return torch.multinomial(x[:, -1].softmax(-1), 1)


@pytest.mark.parametrize("check", [True, False])
def test_pipeline_names_its_passes_and_validates_on_request(check: bool) -> None:
    traced = trace_model(Step(draw), IDS, (), check)
    assert list(traced.seconds) == [name for name in PASSES if check or name != "validate"]
    assert traced.sampler is not None
    assert (traced.error is not None) == check


def test_a_step_that_returns_logits_has_no_sampler() -> None:
    traced = trace_model(Last(model("one_layer_one_head")), IDS, (), check=True, sampled=False)
    assert traced.sampler is None
    assert traced.error < 1e-12
    assert len(traced.cached.sites) == 2


def test_a_step_that_returns_logits_is_no_sampler() -> None:
    with pytest.raises(LoopError, match="not recognised"):
        trace_model(Step(lambda x: torch.tanh(x)[:, -1]), IDS, (), check=False)


def test_dropout_that_is_still_active_asks_for_eval() -> None:
    step = Step(lambda x: draw(nn.functional.dropout(x, 0.5)))
    with pytest.raises(CacheError, match=r"model\.eval\(\)"):
        trace_model(step, IDS, (), check=True)
