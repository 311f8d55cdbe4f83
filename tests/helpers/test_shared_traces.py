"""A trace is shared by models that differ in the values of their weights alone."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers.model_parts import perturbed
from helpers.models import CACHEABLE
from helpers.shared_traces import structure, trace_structure_once
from helpers.toys import TableLM
from torch import nn

from smc_compile.program.model import LastLogits

IDS = torch.zeros(2, 2, dtype=torch.int64)
MODEL = CACHEABLE["llama"](layers=1)


def test_other_weights_share_the_graphs_and_bring_themselves():
    draft = perturbed(MODEL)
    first, second = (trace_structure_once(LastLogits(m), IDS, (), False, sampled=False) for m in (MODEL, draft))
    assert second.cached is first.cached
    for found, model in ((first, MODEL), (second, draft)):
        assert any(weight is model.head.weight for weight in found.owned())


def a_hook(model: nn.Module) -> None:
    model.register_forward_hook(lambda *_: None)


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.double(),
        lambda model: setattr(model, "scale", 2.0),
        lambda model: setattr(model, "table", torch.zeros(2)),
        lambda model: setattr(model.blocks[0].attention, "heads", 2),
        lambda model: setattr(model, "norm", nn.LayerNorm(16)),
        lambda model: model.train(),
        a_hook,
    ],
)
def test_anything_else_is_another_structure(change):
    model = copy.deepcopy(MODEL)
    assert structure(model) == structure(MODEL)
    change(model)
    assert structure(model) != structure(MODEL)


def test_what_is_validated_is_traced():
    step = LastLogits(TableLM(3).double())
    found = [trace_structure_once(step, IDS, (), True, sampled=False) for _ in range(2)]
    assert found[0].cached is not found[1].cached
    assert found[0].error is not None
