"""What sessions hand to the regions: the cases in which the kernels' results differ are among them."""

from __future__ import annotations

import torch

from smc_compile.dev.kernel_audit.recorded_sessions import (
    TIED,
    AuditedPair,
    cutting_near_ties,
    random_model,
    with_near_ties,
)
from smc_compile.kernels.thresholds import kth_largest
from smc_compile.pairs.llama import LlamaConfig

VOCAB = 500


def rows_of(model: torch.nn.Module) -> torch.Tensor:
    ids = torch.randint(VOCAB, (1, 64), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model(ids)[0]  # [64, V]


def kept_otherwise(rows: torch.Tensor, k: int) -> torch.Tensor:
    """Rows of which top-k keeps other tokens when the last two bits of its threshold are not found. [64] bool

    Logits at these cuts are negative: a threshold with its last bits set is a lower one.
    """
    threshold = kth_largest(rows, torch.full((len(rows), 1), k))
    assert (threshold < 0).all()
    coarse = (threshold.view(torch.int32) | 3).view(torch.float32)
    return ((rows >= threshold) != (rows >= coarse)).any(1)


def test_near_ties_make_the_last_bits_of_a_cut_matter():
    """A threshold is already rounded in one row of four; else another token is kept. So nearly any block has a row."""
    config = LlamaConfig(VOCAB, 32, 1, 2, 1, 32, 64)
    pair = AuditedPair(config, config, "speculative", 4, 3, 16, 0.8, 490, 0.99, torch.float32)
    torch.manual_seed(0)
    model = random_model(config, torch.float32)
    cut = cutting_near_ties(pair)
    assert not kept_otherwise(rows_of(model), pair.top_k).any()
    assert kept_otherwise(rows_of(with_near_ties(model)), cut.top_k).float().mean() > 0.5


def test_near_ties_keep_the_distribution_that_was_asked_for():
    config = LlamaConfig(VOCAB, 32, 1, 2, 1, 32, 64)
    pair = AuditedPair(config, config, "speculative", 4, 3, 16, 0.8, 490, 0.99, torch.float32)
    assert abs(cutting_near_ties(pair).top_k - pair.top_k) <= TIED // 2
    assert 0.99 < cutting_near_ties(pair).top_p < 1, "below 1: its kernels stay in the regions"
    model = random_model(config, torch.float32)
    near = with_near_ties(model).embedding.weight
    assert torch.equal(model.embedding.weight[: VOCAB // TIED], near[: VOCAB // TIED])
    assert len(near.unique(dim=0)) > VOCAB // 2, "nearly equal, not equal"
