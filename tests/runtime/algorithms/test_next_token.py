"""From rows to the distribution of the next token, and the mixture that a draft follows where the target truncates."""

from __future__ import annotations

import pytest
import torch

from smc_compile.runtime.algorithms.next_token import SETTINGS, Mixture, NextTokenDistribution, broken

ROWS = torch.randn(5, 40, generator=torch.Generator().manual_seed(0)) * 2
WARPERS = tuple(warper for warper, _ in SETTINGS.values())


def settings(**given: float) -> dict[str, torch.Tensor]:
    values = {name: neutral for name, (_, neutral) in SETTINGS.items()} | given
    return {name: torch.full((5, 1), float(value), dtype=torch.float64) for name, value in values.items()}


def mixture(share: float = 0.1) -> Mixture:
    return Mixture(
        NextTokenDistribution("logits", warpers=WARPERS), NextTokenDistribution("logits", warpers=WARPERS[:1]), share
    )


def test_settings_that_change_nothing_leave_the_softmax():
    torch.testing.assert_close(
        NextTokenDistribution("logits", warpers=WARPERS).log_probs(ROWS, settings()), ROWS.log_softmax(-1)
    )


@pytest.mark.parametrize("setting", [{"top_k": 3}, {"top_p": 0.6}, {"top_p": 0.0}, {"min_p": 0.3}])
def test_a_mixture_is_a_distribution_that_reaches_everything_and_prefers_what_truncation_keeps(setting):
    at = settings(temperature=0.8, **setting)
    mixed, narrow = mixture().log_probs(ROWS, at).exp(), mixture().distribution.log_probs(ROWS, at).exp()
    wide = mixture().wide.log_probs(ROWS, at).exp()
    torch.testing.assert_close(mixed, 0.9 * narrow + 0.1 * wide)
    torch.testing.assert_close(mixed.sum(-1), torch.ones(5))
    assert (narrow == 0).any()
    assert (mixed > 0).all()
    assert (mixed[narrow == 0] < wide[narrow == 0]).all()


def test_where_truncation_leaves_nothing_the_wide_distribution_stands_alone():
    def nothing(scores, _):
        return torch.full_like(scores, -torch.inf)

    distribution = Mixture(NextTokenDistribution("logits", warpers=(nothing,)), NextTokenDistribution("logits"), 0.1)
    torch.testing.assert_close(distribution.log_probs(ROWS, {}), ROWS.log_softmax(-1))


def test_rows_that_are_not_numbers_stay_so():
    rows = ROWS.clone()
    rows[2, 7] = torch.nan
    assert broken(mixture().log_probs(rows, settings(top_k=3))).tolist() == [False, False, True, False, False]


def test_a_cut_mixture_ends_where_its_distributions_end():
    at = settings(top_k=3)
    assert torch.equal(mixture().cut(30).log_probs(ROWS, at), mixture().log_probs(ROWS[:, :30], at))
