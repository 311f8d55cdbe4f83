"""Predictions of speculation against the log-normal weights that they assume, by simulation with a fixed seed."""

from __future__ import annotations

import math

import pytest
import torch

from smc_compile.runtime.algorithms.predictions import cycle_divergence, effective_particles, spread_of
from smc_compile.runtime.algorithms.weights import divergence_of, effective_sample_size, log_mean_exp


def weights(n: int, variance: float, runs: int = 20000) -> torch.Tensor:
    """log weights [runs, n], normal, of mean weight 1."""
    noise = torch.randn(runs, n, dtype=torch.float64, generator=torch.Generator().manual_seed(n))
    return noise * variance**0.5 - variance / 2


@pytest.mark.parametrize("n", [1, 4, 16])
@pytest.mark.parametrize("variance", [0.1, 0.5, 1.5])
def test_the_divergence_of_a_cycle(n, variance):
    """Within a fifth: of one particle it is exact."""
    measured = -log_mean_exp(weights(n, variance)).mean().item()
    assert cycle_divergence(n, 5, variance / 5) == pytest.approx(measured, rel=0.05 if n == 1 else 0.2)


def test_the_divergence_of_hopeless_weights_is_finite():
    assert cycle_divergence(8, 100, 50.0) == pytest.approx((5000 - math.log(8)) / 2)


@pytest.mark.parametrize(("n", "variance"), [(8, 0.1), (8, 0.5), (16, 1.0)])
def test_a_population_shows_its_divergence(n, variance):
    """The mean estimate is within a third of what such populations cost; where weights are far apart it says more than
    the effective sample size could."""
    log_w = weights(n, variance)
    assert divergence_of(log_w).mean().item() == pytest.approx(-log_mean_exp(log_w).mean().item(), rel=0.35)
    far = torch.tensor([[0.0, -30.0, -60.0, -90.0]])
    assert divergence_of(far).item() > 300 > math.log(4) / 2
    assert effective_sample_size(far).item() == pytest.approx(1)


def test_dead_particles_count_and_none_is_infinite():
    even, half = torch.zeros(1, 4), torch.tensor([[0.0, 0.0, -math.inf, -math.inf]])
    assert divergence_of(even).item() == 0
    assert divergence_of(half).item() == pytest.approx(math.log1p(1 / 4) / 2)
    assert divergence_of(torch.full((1, 4), -math.inf)).item() == math.inf


@pytest.mark.parametrize("rate", [0.3, 0.7, 0.95])
def test_the_spread_follows_from_the_overlap(rate):
    """The overlap of two laws is E[min(1, w)] under the draft's."""
    overlap = weights(1, spread_of(rate), 200000).exp().clamp_max(1).mean().item()
    assert overlap == pytest.approx(rate, abs=0.005)
    assert spread_of(1.0) == 0
    assert spread_of(0.0) == math.inf


def test_effective_particles_of_equal_weights():
    assert effective_particles(8, 4, 0.0) == 8
