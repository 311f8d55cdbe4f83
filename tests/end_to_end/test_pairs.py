"""Target and draft whose heads are padded differently: rows that one of them lacks are never drawn."""

from __future__ import annotations

import logging

import pytest
import torch
from helpers.model_parts import perturbed
from helpers.toys import TableLM
from torch import Tensor, nn

from smc_compile import generate
from smc_compile.errors import InputError

pytestmark = pytest.mark.usefixtures("interpreted")

VOCAB = 398
OPTIONS = {"n_particles": 4, "lookahead": 2, "seed": 0, "compiler": "eager", "validate": False}


class Padded(nn.Module):
    """``model`` with further rows of logits, likelier than all others: only a rule keeps them from being drawn."""

    def __init__(self, model: nn.Module, extra: int) -> None:
        super().__init__()
        self.model, self.extra = model, extra

    def forward(self, ids: Tensor) -> Tensor:
        logits = self.model(ids)
        return torch.cat([logits, logits.new_full((*logits.shape[:-1], self.extra), 50.0)], -1)


@pytest.mark.parametrize(("of_target", "of_draft"), [(3, 0), (0, 3)])
@pytest.mark.parametrize("settings", [{}, {"temperature": 0.7, "top_k": 40}])
def test_padding_is_cut_off_with_a_warning(of_target, of_draft, settings, caplog):
    """The smaller head decides: the distribution is that of the models without the rows that are missing there."""
    target = TableLM(VOCAB).double()
    draft = perturbed(target, 0.3)
    ids = torch.tensor([[1, 7, 3]])
    expected = generate(target, draft, ids, max_new_tokens=9, **settings, **OPTIONS)
    caplog.set_level(logging.WARNING)
    pair = Padded(target, of_target) if of_target else target, Padded(draft, of_draft) if of_draft else draft
    actual = generate(*pair, ids, max_new_tokens=9, **settings, **OPTIONS)
    assert torch.equal(actual.particles, expected.particles)
    torch.testing.assert_close(actual.log_evidence, expected.log_evidence)
    assert actual.particles.max() < VOCAB
    assert f"rows from {VOCAB} on are taken for padding" in caplog.text
    assert any("taken for padding" in warning for warning in actual.stats.warnings)


def test_a_prompt_with_a_padding_row_is_refused():
    target = TableLM(VOCAB).double()
    with pytest.raises(InputError, match=f"id {VOCAB + 1}, vocabulary {VOCAB}"):
        generate(Padded(target, 3), perturbed(target, 0.3), torch.tensor([[1, VOCAB + 1]]), max_new_tokens=3, **OPTIONS)


def test_another_vocabulary_is_refused():
    target = TableLM(VOCAB).double()
    with pytest.raises(InputError, match="different vocabularies"):
        generate(target, Padded(target, 5), torch.tensor([[1, 2]]), max_new_tokens=3, **OPTIONS)
