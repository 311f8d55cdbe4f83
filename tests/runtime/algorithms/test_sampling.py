"""Inverse-CDF sampling: the distribution, the edges of [0, 1), and rows that are not distributions.

Seeds are fixed; the rate stated with a statistical test is that of a false alarm when the seed was chosen.
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

from smc_compile.runtime.algorithms.sampling import BLOCK, _first_above, sample_inverse_cdf

ALMOST_ONE = math.nextafter(1.0, 0.0)
SIZES = (1, 2, 127, 128, 129, 300, 1024, 50_257)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def uniform(*shape: int, seed: int) -> Tensor:
    return torch.rand(*shape, dtype=torch.float64, generator=generator(seed))


def one(probs: list[float] | Tensor, u: float) -> int:
    return int(sample_inverse_cdf(torch.as_tensor(probs), torch.tensor(u, dtype=torch.float64)))


@pytest.mark.parametrize("size", [2, 128, 300])
def test_draws_follow_the_probabilities(size: int) -> None:
    """Chi-square at 1e-5, 3 tests."""
    draws = 50_000
    weights = torch.rand(size, generator=generator(size)).square() + 0.05  # unnormalised
    tokens = sample_inverse_cdf(weights.expand(draws, size), uniform(draws, seed=1))
    expected = weights.double() / weights.double().sum() * draws
    assert stats.chisquare(torch.bincount(tokens, minlength=size).numpy(), expected.numpy()).pvalue > 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", SIZES)
def test_equals_one_long_float64_cdf(size: int, dtype: torch.dtype) -> None:
    rows = 32
    probs = torch.rand(rows, size, generator=generator(size), dtype=dtype) ** 8
    u = uniform(rows, seed=size)
    cdf = probs.double().cumsum(-1)
    naive = torch.searchsorted(cdf, (u * cdf[:, -1])[:, None], right=True)[:, 0]
    assert torch.equal(sample_inverse_cdf(probs, u), naive)  # a boundary within rounding of u: 1e-9 over all rows


def test_a_long_float32_tail_is_not_lost() -> None:
    """Beside one heavy token, 100k tokens of 1e-9 vanish from a float32 cumulative sum. They must be drawn."""
    probs = torch.full((100_001,), 1e-9)
    probs[0] = 1.0
    for k in (1, 17, 50_000, 99_999):
        u = (1.0 + 1e-9 * (k - 0.5)) / (1.0 + 1e-4)
        assert one(probs, u) == pytest.approx(k, abs=1)


def test_boundaries_belong_to_the_token_on_the_right() -> None:
    probs = [0.25, 0.25, 0.5]
    assert [one(probs, u) for u in (0.0, 0.25, 0.5, ALMOST_ONE)] == [0, 1, 2, 2]
    assert [one(probs, math.nextafter(u, 0)) for u in (0.25, 0.5)] == [0, 1]


def test_boundaries_between_blocks() -> None:
    probs = torch.ones(4 * BLOCK)  # powers of two: every boundary is exact
    for token in (0, BLOCK - 1, BLOCK, 2 * BLOCK - 1, 2 * BLOCK, 4 * BLOCK - 1):
        assert one(probs, token / (4 * BLOCK)) == token
        assert one(probs, math.nextafter((token + 1) / (4 * BLOCK), 0)) == token


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("u", [0.0, 0.3, ALMOST_ONE])
def test_the_only_possible_token_is_drawn(size: int, u: float) -> None:
    for token in {0, size // 2, size - 1}:
        for mass in (1.0, 1e-38, 1e38):
            probs = torch.zeros(size)
            probs[token] = mass
            assert one(probs, u) == token


@settings(max_examples=150, deadline=None)
@given(
    probs=st.lists(st.one_of(st.just(0.0), st.floats(0, 1, width=32), st.just(1e-38)), min_size=1, max_size=400),
    u=st.one_of(st.sampled_from([0.0, ALMOST_ONE]), st.floats(0, 1, exclude_max=True)),
)
def test_a_token_of_probability_zero_is_never_drawn(probs: list[float], u: float) -> None:
    token = one(probs, u)
    assert probs[token] > 0 or (token == 0 and not any(probs))


@pytest.mark.parametrize("size", [5, 128, 1000])
@pytest.mark.parametrize("u", [0.0, 0.5, ALMOST_ONE])
def test_rows_without_a_distribution_give_token_zero(size: int, u: float) -> None:
    for value in (0.0, math.nan, math.inf, -1.0):
        assert one(torch.full((size,), value), u) == 0


@pytest.mark.parametrize("u", [0.0, 0.5, ALMOST_ONE])
def test_an_invalid_entry_counts_as_zero(u: float) -> None:
    for value in (math.nan, math.inf, -math.inf, -5.0):
        probs = torch.full((300,), value)
        probs[201] = 0.5
        assert one(probs, u) == 201


def test_a_u_out_of_range_stays_within_the_vocabulary() -> None:
    assert [one([1.0, 2.0, 0.0], u) for u in (1.0, 2.0, math.nan, -1.0)] == [1, 1, 1, 0]
    assert [one([1.0, 2.0], u) for u in (1.0, 2.0, math.nan)] == [1, 1, 1]


def test_a_scan_with_rounding_cannot_make_a_zero_win() -> None:
    """What a parallel scan may return, on a GPU say: it rises where there is no mass, falls, or ends too low."""
    mass = torch.tensor([0.0, 1.0, 0.0, 1.0, 0.0])
    scan = torch.tensor([1e-7, 1.0, 1.00001, 2.0, 1.99999])
    targets = [0.0, 1.0, 1.000005, 1.9999999, 2.0, 3.0]
    assert [int(_first_above(mass, scan, torch.tensor(t))) for t in targets] == [1, 3, 3, 3, 3, 3]


def test_shapes_and_bfloat16() -> None:
    probs = torch.rand(2, 3, 4, 200, generator=generator(0)).bfloat16()
    u = uniform(2, 3, 4, seed=0)
    token = sample_inverse_cdf(probs, u)
    assert token.shape == (2, 3, 4)
    assert token.dtype == torch.int64
    assert torch.equal(token[1, 2, 3], sample_inverse_cdf(probs[1, 2, 3], u[1, 2, 3]))
    assert torch.equal(token, sample_inverse_cdf(probs.double(), u))


def test_compiled_equals_eager() -> None:
    def draw(logits: Tensor, u: Tensor) -> Tensor:
        return sample_inverse_cdf(logits.softmax(-1), u)

    logits = torch.randn(6, 1000, generator=generator(0)) * 3
    u = uniform(6, seed=2)
    assert torch.equal(torch.compile(draw, fullgraph=True, dynamic=False)(logits, u), draw(logits, u))


def test_compiled_never_draws_a_zero_at_the_edges() -> None:
    """The compiled block sums add in another order than the compiled scan within a block: the edges must survive it."""
    rows, size = 200, 1000
    probs = torch.rand(rows, size, generator=generator(3)) + 0.5
    probs[torch.rand(rows, size, generator=generator(4)) < 0.7] = 0.0
    probs[rows // 2 :, -300:] = 0.0
    u = torch.tensor([0.0, ALMOST_ONE], dtype=torch.float64).repeat(rows // 2)
    token = torch.compile(sample_inverse_cdf, fullgraph=True, dynamic=False)(probs, u)
    possible = probs > 0
    last = size - 1 - possible.flip(-1).int().argmax(-1)
    assert torch.equal(token, torch.where(u == 0, possible.int().argmax(-1), last))
