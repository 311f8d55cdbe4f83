"""Log-probabilities of texts under the target, and their means in rows."""

from __future__ import annotations

import pytest
import torch

from smc_compile.bench import text_quality


def test_log_probs_count_new_tokens_only_at_the_temperature():
    table = torch.randn(7, 7, generator=torch.Generator().manual_seed(0))
    sequences = torch.randint(0, 7, (20, 9), generator=torch.Generator().manual_seed(1))
    got = text_quality.sequence_log_probs(lambda ids: table[ids], sequences, 4, 0.5)
    log_p = (table / 0.5).log_softmax(-1)
    expected = [sum(log_p[row[t - 1], row[t]].item() for t in range(4, 9)) / 5 for row in sequences.tolist()]
    assert got.tolist() == pytest.approx(expected, rel=1e-5)
