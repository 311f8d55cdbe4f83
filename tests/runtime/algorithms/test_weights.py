"""Weights of a population, against formulas written out, and at every edge: no weight at all, NaN, even weights.

Seeds are fixed; the rate stated with a statistical test is that of a false alarm when the seed was chosen.
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

from smc_compile.runtime.algorithms.resampling import RESAMPLERS
from smc_compile.runtime.algorithms.weights import effective_sample_size, log_mean_exp, normalise, resample_step, select

METHODS = sorted(RESAMPLERS)
NOTHING = -math.inf

log_weights = st.lists(st.one_of(st.just(NOTHING), st.floats(-2000, 2000)), min_size=1, max_size=40)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def uniform(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, dtype=torch.float64, generator=generator(seed))


def population(rows: int, n: int, spread: float = 2.0, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """log weights [B, N], log evidence [B], uniforms [B, N]."""
    log_w = torch.randn(rows, n, dtype=torch.float64, generator=generator(seed)) * spread
    return log_w, torch.randn(rows, dtype=torch.float64, generator=generator(seed + 1)), uniform(rows, n, seed=seed + 2)


@given(log_weights)
def test_against_the_formulas(values: list[float]) -> None:
    log_w = torch.tensor(values, dtype=torch.float64)
    largest = max(values)
    w = [math.exp(v - largest) if largest > NOTHING else 0.0 for v in values]
    n, total = len(w), math.fsum(w)
    mean, ess, probs = log_mean_exp(log_w), effective_sample_size(log_w), normalise(log_w)
    if total == 0:
        assert (float(mean), float(ess)) == (NOTHING, 0.0)
        assert probs.tolist() == [1 / n] * n
        return
    assert float(mean) == pytest.approx(largest + math.log(total / n), abs=1e-9)
    assert float(ess) == pytest.approx(total**2 / math.fsum(x * x for x in w), rel=1e-12)
    assert 1 - 1e-9 <= float(ess) <= n + 1e-9
    assert probs.tolist() == pytest.approx([x / total for x in w], rel=1e-12, abs=1e-300)
    assert all(p == 0 for p, v in zip(probs.tolist(), values, strict=True) if v == NOTHING)


def test_float32_weights_are_summed_in_float64() -> None:
    log_w = torch.full((1000,), 0.1)
    for result in (log_mean_exp(log_w), normalise(log_w), effective_sample_size(log_w)):
        assert result.dtype == torch.float64
    assert float(log_mean_exp(log_w)) == pytest.approx(float(log_w[0]), abs=1e-14)
    assert float(effective_sample_size(log_w)) == pytest.approx(1000, rel=1e-14)


@pytest.mark.parametrize("offset", [-1e5, 1e5])
def test_a_common_factor_only_moves_the_evidence(offset: float) -> None:
    log_w, _, _ = population(3, 8)
    torch.testing.assert_close(normalise(log_w + offset), normalise(log_w), rtol=1e-9, atol=0)
    torch.testing.assert_close(effective_sample_size(log_w + offset), effective_sample_size(log_w), rtol=1e-9, atol=0)
    torch.testing.assert_close(log_mean_exp(log_w + offset), log_mean_exp(log_w) + offset, rtol=0, atol=1e-9)


@pytest.mark.parametrize("method", METHODS)
def test_resamples_exactly_the_rows_below_the_threshold(method: str) -> None:
    rows, n, threshold = 40, 16, 0.5
    log_w, log_evidence, u = population(rows, n, spread=1.0)
    ancestors, new_log_w, new_evidence, ess, resampled = resample_step(log_w, log_evidence, u, threshold, method)
    assert torch.equal(ess, effective_sample_size(log_w))
    assert torch.equal(resampled, ess < threshold * n)
    assert 5 < int(resampled.sum()) < rows - 5  # both kinds of row are here

    assert torch.equal(ancestors[resampled], RESAMPLERS[method](normalise(log_w), u)[resampled])
    assert not bool(new_log_w[resampled].any())
    torch.testing.assert_close(new_evidence[resampled], (log_evidence + log_mean_exp(log_w))[resampled])

    kept = ~resampled
    assert torch.equal(ancestors[kept], torch.arange(n).expand(int(kept.sum()), n))
    assert torch.equal(new_log_w[kept], log_w[kept])
    assert torch.equal(new_evidence[kept], log_evidence[kept])


@pytest.mark.parametrize("threshold", [0.0, 0.5, 1.0])
def test_evidence_plus_remaining_weight_is_conserved(threshold: float) -> None:
    log_w, log_evidence, u = population(20, 8)
    _, new_log_w, new_evidence, _, _ = resample_step(log_w, log_evidence, u, threshold, "systematic")
    torch.testing.assert_close(new_evidence + log_mean_exp(new_log_w), log_evidence + log_mean_exp(log_w))


def test_threshold_zero_never_resamples() -> None:
    log_w = torch.full((1, 8), NOTHING, dtype=torch.float64)
    log_w[0, 3] = 0.0  # as degenerate as it gets
    assert not bool(resample_step(log_w, torch.zeros(1), uniform(1, 8), 0.0, "systematic")[4])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_threshold_one_resamples_unless_even(dtype: torch.dtype) -> None:
    for n in (1, 3, 7, 32, 49):
        log_w = torch.full((2, n), -123.456, dtype=dtype)
        log_w[0] *= 1 + torch.rand(n, dtype=dtype, generator=generator(n)) * 1e-8  # rounding is not degeneracy
        log_w[1, 0] -= 0.1
        resampled = resample_step(log_w, torch.zeros(2), uniform(2, n), 1.0, "stratified")[4]
        assert resampled.tolist() == [False, n > 1]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("threshold", [0.5, 1.0])
def test_a_row_without_weight_is_left_alone(method: str, threshold: float) -> None:
    log_w = torch.full((2, 8), NOTHING)
    log_w[1, 2] = 0.0
    log_evidence = torch.tensor([1.5, 2.5])
    ancestors, new_log_w, new_evidence, ess, resampled = resample_step(
        log_w, log_evidence, uniform(2, 8), threshold, method
    )
    assert resampled.tolist() == [False, True]
    assert ess.tolist() == [0.0, 1.0]
    assert ancestors.tolist() == [list(range(8)), [2] * 8]
    assert torch.equal(new_log_w[0], log_w[0])
    assert new_evidence.tolist() == pytest.approx([1.5, 2.5 - math.log(8)])


@pytest.mark.parametrize("method", METHODS)
def test_nan_does_not_resample_and_is_seen(method: str) -> None:
    log_w = torch.zeros(2, 8)
    log_w[0, 1] = math.nan
    log_w[1, :7] = NOTHING
    ancestors, new_log_w, new_evidence, ess, resampled = resample_step(
        log_w, torch.zeros(2), uniform(2, 8), 1.0, method
    )
    assert resampled.tolist() == [False, True]
    assert ess.isnan().tolist() == [True, False]
    assert ancestors.tolist() == [list(range(8)), [7] * 8]
    assert torch.equal(new_log_w[0], log_w[0]) is False  # NaN differs from itself ...
    assert torch.equal(new_log_w[0].isnan(), log_w[0].isnan())  # ... but is where it was
    assert not bool(new_evidence.isnan().any())


def test_types_of_the_state_are_kept() -> None:
    for dtype in (torch.float32, torch.float64):
        log_w, log_evidence, u = population(4, 8)
        out = resample_step(log_w.to(dtype), log_evidence.to(dtype), u, 0.9, "residual")
        assert [x.dtype for x in out] == [torch.int64, dtype, dtype, torch.float64, torch.bool]


def test_an_unknown_method_is_refused() -> None:
    with pytest.raises(KeyError, match="sorted"):
        resample_step(*population(1, 2), 0.5, "sorted")


def test_resampling_keeps_weighted_means() -> None:
    """mean over offspring of f = sum w f on average, for every method. |z| < 5: 6e-7, 4 tests."""
    rows, n = 20_000, 8
    log_w, log_evidence, u = population(rows, n, seed=3)
    f = torch.randn(rows, n, dtype=torch.float64, generator=generator(9))
    for method in METHODS:
        ancestors, _, _, _, resampled = resample_step(log_w, log_evidence, u, 0.9, method)
        error = (f.gather(-1, ancestors).mean(-1) - (normalise(log_w) * f).sum(-1))[resampled]
        assert len(error) > rows // 2
        assert abs(float(error.mean() / error.std() * len(error) ** 0.5)) < 5


def test_the_answer_is_drawn_in_proportion_to_its_weight() -> None:
    """Chi-square at 1e-5."""
    draws = 50_000
    log_w = torch.tensor([0.0, NOTHING, -1.0, 2.0, -3.0, NOTHING])
    index = select(log_w.expand(draws, 6), uniform(draws, seed=4))
    counts = torch.bincount(index, minlength=6)
    assert counts[1] == counts[5] == 0
    possible = log_w > NOTHING
    expected = normalise(log_w)[possible] * draws
    assert stats.chisquare(counts[possible].numpy(), expected.numpy()).pvalue > 1e-5


def test_the_answer_is_defined_without_any_weight() -> None:
    u = torch.tensor([0.0, 0.3, 0.6, 0.99])
    assert select(torch.full((4, 4), NOTHING), u).tolist() == [0, 1, 2, 3]
    assert select(torch.full((4, 4), math.nan), u).tolist() == [0, 1, 2, 3]
    assert select(torch.tensor([[math.nan, NOTHING, 0.0, math.nan]]).expand(4, 4), u).tolist() == [2, 2, 2, 2]


@pytest.mark.parametrize("method", METHODS)
def test_compiled_equals_eager(method: str) -> None:
    """Rows of every kind: degenerate, healthy, even, without weight, NaN."""

    def step(log_w: Tensor, log_evidence: Tensor, u: Tensor) -> tuple[Tensor, ...]:
        return (*resample_step(log_w, log_evidence, u, 0.5, method), select(log_w, u[:, 0]))

    log_w, log_evidence, u = population(12, 16)
    log_w[6:9] *= 0.1
    log_w[8] = 0.0
    log_w[9] = NOTHING
    log_w[10, :15] = NOTHING
    log_w[11, 4] = math.nan
    compiled = torch.compile(step, fullgraph=True, dynamic=False)(log_w, log_evidence, u)
    eager = step(log_w, log_evidence, u)
    assert eager[4].tolist() == [True] * 6 + [False] * 4 + [True, False]
    for a, b in zip(compiled, eager, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12, equal_nan=True)
