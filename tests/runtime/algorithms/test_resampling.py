"""What every resampling method owes: N w_i offspring on average, none from a zero weight, ancestors in order.

Seeds are fixed; the rate stated with a statistical test is that of a false alarm when the seed was chosen.
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from smc_compile.runtime.algorithms.resampling import RESAMPLERS, _flat_at_zeros, keep_survivors

ALMOST_ONE = math.nextafter(1.0, 0.0)
METHODS = sorted(RESAMPLERS)
every_method = pytest.mark.parametrize("method", METHODS)

WEIGHTS = {
    "skewed": [0.4, 0.3, 0.15, 0.1, 0.04, 0.009, 0.001, 0.0],
    "even": [0.125] * 8,
    "zeros between": [0.0, 0.3, 0.0, 0.0, 0.45, 0.0, 0.25, 0.0],
    "integers": [0.5, 0.25, 0.125, 0.125, 0.0, 0.0, 0.0, 0.0],
    "nearly integers": [0.25 + 1e-6, 0.25 - 1e-6, 0.125, 0.125, 0.125, 0.0625, 0.0625, 0.0],
    "point mass": [0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0],
    "three": [0.2, 0.7, 0.1],
    "one": [1.0],
}


def uniform(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def resample(method: str, weights: Tensor, u: Tensor) -> Tensor:
    """Checks what holds for every result: type, shape, range, order."""
    ancestors = RESAMPLERS[method](weights, u)
    n = weights.shape[-1]
    assert ancestors.dtype == torch.int64
    assert ancestors.shape == weights.shape
    assert 0 <= int(ancestors.min()) <= int(ancestors.max()) < n
    assert bool((ancestors.diff(dim=-1) >= 0).all())
    return ancestors


def offspring(ancestors: Tensor) -> Tensor:
    """Counts, [..., N]."""
    return torch.zeros_like(ancestors).scatter_add_(-1, ancestors, torch.ones_like(ancestors))


def replicates(method: str, weights: list[float], rows: int, seed: int) -> Tensor:
    """Offspring counts of independent resamplings, [rows, N] float64."""
    w = torch.tensor(weights, dtype=torch.float64)
    return offspring(resample(method, w.expand(rows, -1), uniform(rows, len(w), seed=seed))).double()


@every_method
@pytest.mark.parametrize("name", WEIGHTS)
def test_unbiased(method: str, name: str) -> None:
    """|z| < 5 for each particle: 6e-7, 196 of them. The bound sees a bias of 0.02 of a particle where it matters."""
    rows = 30_000
    counts = replicates(method, WEIGHTS[name], rows, seed=1)
    w = torch.tensor(WEIGHTS[name], dtype=torch.float64)
    error = counts.mean(0) - len(w) * w
    standard_error = counts.std(0) / rows**0.5
    # A rare particle may never have been drawn, and then shows no spread: fall back on the variance of a Bernoulli.
    share = len(w) * w - (len(w) * w).round()
    standard_error = torch.maximum(standard_error, (share.abs() / rows).sqrt())
    assert bool((error.abs() <= 5 * standard_error + 1e-12).all()), error


@every_method
def test_pairs_of_particles_of_random_weights_unbiased(method: str) -> None:
    """Each row with weights of its own: the mean of (counts - N w) . a for a random direction a. |z| < 5: 6e-7."""
    rows, n = 20_000, 16
    w = (uniform(rows, n, seed=2) * 6).exp()
    w = w / w.sum(-1, keepdim=True)
    counts = offspring(resample(method, w, uniform(rows, n, seed=3))).double()
    error = ((counts - n * w) * (uniform(rows, n, seed=4) - 0.5)).sum(-1)
    assert abs(float(error.mean() / error.std() * rows**0.5)) < 5


@pytest.mark.parametrize("name", ["skewed", "even", "zeros between", "integers", "nearly integers", "three"])
def test_none_varies_more_than_multinomial(name: str) -> None:
    """Variance of each count; 1.05 covers the error of a variance from 30k replicates (1%) five times over."""
    variance = {method: replicates(method, WEIGHTS[name], 30_000, seed=5).var(0) for method in METHODS}
    for method in ("systematic", "stratified", "residual"):
        assert bool((variance[method] <= 1.05 * variance["multinomial"] + 1e-3).all()), method
        assert float(variance[method].sum()) < 0.95 * float(variance["multinomial"].sum()), method


@pytest.mark.parametrize("name", WEIGHTS)
def test_systematic_counts_are_the_floor_or_one_more(name: str) -> None:
    expected = len(WEIGHTS[name]) * torch.tensor(WEIGHTS[name], dtype=torch.float64)
    counts = replicates("systematic", WEIGHTS[name], 2000, seed=6)
    assert bool(((counts - expected).abs() < 1 + 1e-9).all())


@pytest.mark.parametrize("name", WEIGHTS)
def test_residual_keeps_at_least_the_floor(name: str) -> None:
    expected = len(WEIGHTS[name]) * torch.tensor(WEIGHTS[name], dtype=torch.float64)
    assert bool((replicates("residual", WEIGHTS[name], 2000, seed=6) >= expected.floor()).all())


def test_multinomial_counts_have_the_multinomial_variance() -> None:
    """Within 5% with 50k replicates: six standard errors of a variance."""
    w = torch.tensor(WEIGHTS["skewed"], dtype=torch.float64)[:5]
    w = w / w.sum()
    variance = replicates("multinomial", w.tolist(), 50_000, seed=7).var(0)
    torch.testing.assert_close(variance, 5 * w * (1 - w), rtol=0.05, atol=0)


EDGES = [0.0, 1e-300, 2.0**-53, 0.5, 1 - 2.0**-24, ALMOST_ONE]


@pytest.mark.parametrize("method", ["systematic", "stratified"])
@pytest.mark.parametrize("u", EDGES)
def test_even_weights_copy_nothing(method: str, u: float) -> None:
    for n in [*range(1, 80), 1000, 1024]:
        for scale in (1.0, 1 - 1e-15, 3.0):
            w = torch.full((n,), scale / n, dtype=torch.float64)
            assert torch.equal(resample(method, w, torch.full_like(w, u)), torch.arange(n)), n


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("u", EDGES)
def test_residual_of_integer_offspring_draws_nothing(u: float, dtype: torch.dtype) -> None:
    """1/49 * 49 is below 1 in floating point, and still one copy. Float32 weights are off by more than that."""
    for n in (8, 49, 98, 100, 103, 107, 1000):
        copies = torch.zeros(n, dtype=torch.int64)
        copies[::7] = 7
        copies[-7:] = torch.tensor([1] * 7)
        copies[0] += n - copies.sum()
        w = copies.to(torch.float64) / n
        counts = offspring(resample("residual", w.to(dtype), torch.full_like(w, u)))
        if dtype == torch.float64:
            assert torch.equal(counts, copies), n
        else:
            assert bool((counts >= (copies - 1).clamp_min(0)).all())
            assert not bool(counts[copies == 0].any())


@every_method
@pytest.mark.parametrize("u", EDGES)
def test_zero_weights_leave_nothing_at_the_edges(method: str, u: float) -> None:
    for dtype in (torch.float32, torch.float64):
        for n in (1, 2, 3, 16, 63, 100):
            w = uniform(64, n, seed=n)
            w = torch.where(uniform(64, n, seed=n + 1) < 0.6, 0.0, w)
            w[:32, -(n // 2) :] = 0.0  # rows that end in zeros
            w[:, 0] = torch.where(w.sum(-1) == 0, 1.0, w[:, 0])
            w = (w / w.sum(-1, keepdim=True)).to(dtype)
            ancestors = resample(method, w, torch.full((64, n), u, dtype=torch.float64))
            assert bool((w.gather(-1, ancestors) > 0).all()), (dtype, n)


@settings(max_examples=150, deadline=None)
@given(
    data=st.lists(
        st.tuples(
            st.one_of(st.just(0.0), st.just(1e-38), st.floats(0, 1, width=32)),
            st.one_of(st.sampled_from(EDGES), st.floats(0, 1, exclude_max=True)),
        ),
        min_size=1,
        max_size=40,
    ),
    total=st.sampled_from([1.0, 1 - 1e-7, 1 + 1e-7, 0.5]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    method=st.sampled_from(METHODS),
)
def test_zero_weights_leave_nothing(
    data: list[tuple[float, float]], total: float, dtype: torch.dtype, method: str
) -> None:
    """Also where the cumulative sum ends below or above 1, and with float32 denormals."""
    raw, u = torch.tensor(data, dtype=torch.float64).unbind(-1)
    w = (raw / raw.sum() * total).to(dtype) if float(raw.sum()) > 0 else raw.to(dtype)
    ancestors = resample(method, w, u)
    if float(w.sum()) > 0:
        assert bool((w[ancestors] > 0).all())
    else:
        assert not bool(ancestors.any())


def test_a_scan_with_rounding_is_made_monotone_and_flat_at_zeros() -> None:
    """What a parallel scan may return, on a GPU say: it rises at a zero weight, and falls at another."""
    weights = torch.tensor([0.0, 0.25, 0.0, 0.5, 0.0, 0.25, 0.0])
    scan = torch.tensor([1e-7, 0.25, 0.25001, 0.75, 0.74999, 1.0, 1.00001])
    assert _flat_at_zeros(scan, weights).tolist() == [0, 0.25, 0.25, 0.75, 0.75, 1, 1]
    assert _flat_at_zeros(torch.tensor([0.5, 0.4999]), torch.tensor([0.5, 1e-9])).tolist() == [0.5, 0.5]


@every_method
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tiny_weights_do_not_disturb_the_others(method: str, dtype: torch.dtype) -> None:
    w = torch.full((200, 16), 1e-38, dtype=dtype)
    w[:, 5] = 1.0
    assert bool((resample(method, w, uniform(200, 16, seed=8)) == 5).all())


@every_method
@pytest.mark.parametrize("u", EDGES)
def test_point_mass(method: str, u: float) -> None:
    for i in range(7):
        w = torch.zeros(7, dtype=torch.float64)
        w[i] = 1.0
        assert resample(method, w, torch.full((7,), u, dtype=torch.float64)).tolist() == [i] * 7


@every_method
def test_rows_are_independent_and_batch_shape_is_free(method: str) -> None:
    w = uniform(2, 3, 8, seed=9)
    w = w / w.sum(-1, keepdim=True)
    u = uniform(2, 3, 8, seed=10)
    whole = resample(method, w, u)
    for i in range(2):
        for j in range(3):
            assert torch.equal(resample(method, w[i, j], u[i, j]), whole[i, j])


@every_method
def test_nan_weights_are_defined(method: str) -> None:
    u = uniform(4, seed=11)
    assert resample(method, torch.full((4,), math.nan), u).tolist() == [0, 0, 0, 0]
    assert resample(method, torch.tensor([math.nan, 0.0, 1.0, 0.0]), u).tolist() == [2, 2, 2, 2]


def test_systematic_uses_the_first_uniform_only() -> None:
    w = torch.tensor(WEIGHTS["skewed"], dtype=torch.float64)
    u = uniform(8, seed=12)
    other = torch.cat([u[:1], uniform(7, seed=13)])
    assert torch.equal(resample("systematic", w, u), resample("systematic", w, other))
    assert not torch.equal(resample("stratified", w, u), resample("stratified", w, other))


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 70), st.integers(1, 4), st.integers(0, 2**31))
def test_survivors_keep_their_places_and_all_their_offspring(n, batch, seed):
    drawn = torch.randint(n, (batch, n), generator=torch.Generator().manual_seed(seed)).sort(-1).values
    kept = keep_survivors(drawn)
    assert torch.equal(kept.sort(-1).values, drawn)
    assert torch.equal(kept.gather(1, kept), kept), "a row that others take from keeps its own"
