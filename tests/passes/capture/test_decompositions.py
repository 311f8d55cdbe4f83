"""Ops taken apart before the analysis compute what the op computes, and decline what they do not cover."""

from __future__ import annotations

import pytest
import torch
from helpers.traces import Step, export_then, op_names, rows_of, tokens

from smc_compile.passes.capture.decompositions import baddbmm_as_bmm, gather_as_index, index_put_as_where
from smc_compile.passes.pipeline import capture


def values(*sizes: int) -> torch.Tensor:
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("beta", [0, 1, 0.5])
@pytest.mark.parametrize("alpha", [1, 3.0])
def test_a_product_with_an_addend(alpha: float, beta: float) -> None:
    x, a, b = values(1, 1, 5), values(3, 4, 2), values(3, 2, 5)
    expected = torch.baddbmm(x, a, b, alpha=alpha, beta=beta)
    torch.testing.assert_close(baddbmm_as_bmm(x, a, b, alpha=alpha, beta=beta), expected)


def test_an_ignored_addend_may_hold_nothing_numeric() -> None:
    x = torch.full((3, 4, 5), float("nan"), dtype=torch.float64)
    assert baddbmm_as_bmm(x, values(3, 4, 2), values(3, 2, 5), beta=0).isfinite().all()


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_one_value_put_where_a_mask_says(rank: int) -> None:
    x = values(3, 4, 5)
    mask = values(3, 4, 5)[(slice(None),) * rank + (0,) * (3 - rank)] > 0
    value = torch.tensor(7.0, dtype=torch.float64)
    assert torch.equal(index_put_as_where(x, [mask], value), x.index_put([mask], value))


@pytest.mark.parametrize(
    ("indices", "value", "accumulate"),
    [
        ([torch.tensor([0, 1])], torch.tensor(1.0), False),  # places by number
        ([torch.ones(3, dtype=torch.bool)], torch.ones(3, 1, 1), False),  # a value for each place
        ([torch.ones(3, dtype=torch.bool)], torch.tensor(1.0), True),
        ([None, torch.ones(4, dtype=torch.bool)], torch.tensor(1.0), False),
    ],
)
def test_other_writes_are_declined(indices, value, accumulate) -> None:
    assert index_put_as_where(values(3, 4, 5), indices, value, accumulate) is NotImplemented


def test_a_write_by_mask_is_traced_as_where() -> None:
    def then(x):
        y = x.clone()
        y[y > 0] = 0.5
        return y[:, -1]

    step = Step(then)
    lm, owned = capture(step, tokens(2, 2))
    assert "index_put.default" not in op_names(lm.graph)
    assert torch.equal(rows_of(lm, tokens(2, 6), owned()), step(tokens(2, 6)))


def test_a_running_count_of_tokens_becomes_attention() -> None:
    table = values(40, 6)

    def then(ids):
        return table[(ids != 3).int().cumsum(1) + ids.eq(3)][:, -1]

    class Counting(torch.nn.Module):
        def forward(self, ids):
            return then(ids)

    lm, owned = capture(Counting(), tokens(2, 2))
    assert "cumsum.default" not in op_names(lm.graph)
    assert "matmul.default" in op_names(lm.graph)
    ids = tokens(2, 30, vocab=5)
    assert torch.equal(rows_of(lm, ids, owned()), then(ids))


def test_running_sums_of_other_numbers_stay() -> None:
    lm, _ = capture(Step(lambda x: x.cumsum(1)[:, -1]), tokens(2, 2))
    assert "cumsum.default" in op_names(lm.graph)


def test_a_gather_from_one_repeated_row() -> None:
    row, index = values(1, 9), tokens(3, 4, vocab=9)
    assert torch.equal(gather_as_index(row.expand(3, 9), 1, index), row.expand(3, 9).gather(1, index))
    assert gather_as_index(values(3, 9), 1, index) is NotImplemented


def test_a_count_of_positions_alone_stays_as_it_is() -> None:
    """It reads no token, as in the masks of transformers: the whole step need not be traced again for it."""
    lm = export_then(lambda x: (x * torch.ones(x.shape[1], dtype=torch.int64).cumsum(0)[:, None])[:, -1])
    assert "cumsum.default" in op_names(lm.graph)
    weights = [torch.randn(11, 8, dtype=torch.float64)]
    ids = tokens(2, 5)
    torch.testing.assert_close(rows_of(lm, ids, weights), 5 * weights[0][ids[:, -1]])


@pytest.mark.parametrize("dropout", ["dropout", "dropout1d", "alpha_dropout"])
def test_a_dropout_that_drops_nothing_is_its_input(dropout: str) -> None:
    """What is written into its result is written into its input."""

    def then(x: torch.Tensor) -> torch.Tensor:
        y = x * 2
        getattr(torch.nn.functional, dropout)(y, 0.1, training=False).add_(x)
        return y[:, -1]

    lm, owned = capture(Step(then), tokens(2, 2))
    ids = tokens(2, 9)
    torch.testing.assert_close(rows_of(lm, ids, owned()), Step(then)(ids))
