"""A mask of ones goes; all other masks stay."""

from __future__ import annotations

import pytest
import torch
from torch import fx

from smc_compile.passes.loop.ones_masks import drop_ones_masks


def count(function) -> tuple[int, fx.GraphModule]:
    gm = fx.symbolic_trace(function)
    return drop_ones_masks(gm), gm


def test_a_mask_of_ones_is_dropped():
    def masked(ids, mask):
        padding = torch.cat([torch.ones_like(ids), torch.ones_like(ids)], 1).bool()
        return mask & padding[:, None, None, : ids.shape[1]]

    dropped, gm = count(masked)
    assert dropped == 1
    ids, mask = torch.zeros(2, 3, dtype=torch.int64), torch.ones(1, 1, 3, 3, dtype=torch.bool).tril()
    assert torch.equal(gm(ids, mask).expand(2, 1, 3, 3), masked(ids, mask))


@pytest.mark.parametrize(
    "function",
    [
        lambda ids, mask: mask & (ids > 0)[:, None, None],
        lambda ids, mask: mask | torch.ones_like(ids).bool()[:, None, None],
        lambda ids, mask: mask & torch.ones_like(ids).bool().index_fill_(1, torch.tensor([0]), False)[:, None, None],
    ],
)
def test_other_masks_are_left_alone(function):
    assert count(function)[0] == 0
