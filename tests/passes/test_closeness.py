"""How near two tensors are, and which dtype says how near they must be."""

from __future__ import annotations

import math

import pytest
import torch

from smc_compile.passes.closeness import allowed_error, coarsest_dtype, relative_error


@pytest.mark.parametrize(
    ("dtypes", "coarsest"),
    [
        ([torch.float32, torch.bfloat16, torch.float16], torch.bfloat16),
        ([torch.float64, torch.float16], torch.float16),
        ([torch.float64, torch.float32, torch.int64], torch.float32),
        ([torch.int64], torch.float64),
        ([], torch.float64),
    ],
)
def test_the_coarsest_floating_dtype_counts(dtypes, coarsest):
    assert coarsest_dtype([None, 3, *(torch.zeros(1, dtype=dtype) for dtype in dtypes)]) == coarsest


def test_a_dtype_without_an_entry_is_held_to_that_of_float32():
    assert allowed_error(torch.int64) == allowed_error(torch.float32)


def test_the_error_is_relative_to_the_spread_and_infinities_must_agree():
    expected = torch.tensor([[0.0, 2.0, -math.inf]])
    assert relative_error(expected + 0.1, expected) == pytest.approx(0.1 / expected[:, :2].std().item())
    assert relative_error(torch.tensor([[0.0, -math.inf, -math.inf]]), expected) == math.inf


def test_at_a_cut_a_token_counts_by_its_height_above_the_least_that_both_keep():
    expected, actual = torch.tensor([[0.0, 1.0, 5.0]]), torch.tensor([[-math.inf, 1.0, 5.0]])
    assert relative_error(actual, expected, cut_may_move=True) == 0.0
    assert relative_error(torch.tensor([[0.0, 1.0, -math.inf]]), expected, cut_may_move=True) > 1
