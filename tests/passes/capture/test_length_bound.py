"""Sizes like ``S - max(0, S - c)``: where longer texts do not fit, S is at most c; and biases counted from the end."""

from __future__ import annotations

import pytest
import torch
from helpers.traces import Step, export_then, rows_of, tokens
from torch import Tensor

from smc_compile.errors import CacheError
from smc_compile.passes.cache.synthesize import synthesize_cache
from smc_compile.passes.closeness import relative_error
from smc_compile.passes.pipeline import capture
from smc_compile.passes.validate import check_prefix_tables, replay, validate

LONGEST = 20
BIAS = torch.arange(1 - LONGEST, 1, dtype=torch.float64)[None] * 0.3  # the last entry is that of the last key
ROWS = torch.randn(LONGEST, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
LEAST = torch.finfo(torch.float64).min


def hidden(x: Tensor) -> Tensor:
    t = torch.arange(x.shape[1])
    return t[None, :] > t[:, None]


def from_the_end(x: Tensor, fill: float = LEAST) -> Tensor:
    """A bias for each key, as long as the text, cut off the front of the table."""
    scores = x @ x.mT + BIAS[:, max(0, BIAS.shape[1] - x.shape[1]) :]
    return scores.masked_fill(hidden(x), fill).softmax(-1) @ x.sin()


def test_the_table_bounds_the_length() -> None:
    lm = export_then(lambda x: from_the_end(x)[:, -1])
    assert lm.max_positions == LONGEST
    shapes = [node.meta["val"].shape for node in lm.graph.nodes if isinstance(node.meta.get("val"), Tensor)]
    assert "Max" not in str(shapes)


def test_a_table_that_fits_longer_texts_is_no_bound() -> None:
    """Beyond its end the table broadcasts no less."""
    lm = export_then(lambda x: (x + BIAS[:, max(0, BIAS.shape[1] - x.shape[1]) :].sum())[:, -1])
    assert lm.max_positions is None


def test_a_bias_counted_from_the_end_is_cached() -> None:
    """The table moves as text grows, all of it by the same number, which the softmax does not see."""
    step = Step(lambda x: from_the_end(x)[:, -1])
    lm, owned = capture(step, tokens(2, 2))
    cached = synthesize_cache(lm)
    assert True in cached.shifting
    assert cached.max_positions == LONGEST
    check_prefix_tables(cached, owned(), 12)
    assert validate(lm, cached, owned()) < 1e-12
    ids = tokens(2, LONGEST)
    with torch.no_grad():
        actual, at = replay(cached, ids, owned(), 4, [10, 1, 5])
        expected = torch.stack([rows_of(lm, ids[:, :end], owned()) for end in range(1, LONGEST + 1)], 1)
        assert relative_error(actual, expected.gather(1, at[..., None].expand(-1, -1, 8))) < 1e-9


def times(x: Tensor) -> Tensor:
    scores = (x @ x.mT) * BIAS[:, max(0, BIAS.shape[1] - x.shape[1]) :]
    return scores.masked_fill(hidden(x), LEAST).softmax(-1) @ x


def squared(x: Tensor) -> Tensor:
    scores = (x @ x.mT + BIAS[:, max(0, BIAS.shape[1] - x.shape[1]) :]) ** 2
    return scores.masked_fill(hidden(x), LEAST).softmax(-1) @ x


def beside_zeros(x: Tensor) -> Tensor:
    """What is masked takes part in the softmax with a number of its own."""
    return from_the_end(x, 0.0)


def in_other_rows(x: Tensor) -> Tensor:
    """No softmax at all."""
    return x + ROWS[max(0, LONGEST - x.shape[1]) :]


@pytest.mark.parametrize("then", [times, squared, beside_zeros, in_other_rows])
def test_a_shift_that_matters_is_refused(then) -> None:
    step = Step(lambda x: then(x)[:, -1])
    lm, owned = capture(step, tokens(2, 2))
    cached = synthesize_cache(lm)
    assert True not in cached.shifting
    with pytest.raises(CacheError, match=r"not causal|changes when the sequence grows"):
        validate(lm, cached, owned())


def test_a_mask_that_changes_with_the_length_does_not_pass_as_a_shift() -> None:
    """Added to scores, too, but by a number of its own for each key."""

    def then(x: Tensor) -> Tensor:
        scores = x @ x.mT + torch.arange(x.shape[1]) / x.shape[1]
        return (scores.masked_fill(hidden(x), LEAST).softmax(-1) @ x)[:, -1]

    lm, owned = capture(Step(then), tokens(2, 2))
    cached = synthesize_cache(lm)
    with pytest.raises(CacheError, match="changes when the sequence grows"):
        check_prefix_tables(cached, owned(), 12)
