"""Four resampling schemes with one signature (Douc, Cappe and Moulines, 2005, compare them).

    method(weights [..., N], u [..., N]) -> ancestors [..., N] int64, ascending

The weights are normalised probabilities, u are uniforms in [0, 1). Every method is unbiased: particle i is expected to
leave N * weights[i] offspring. A weight that is zero (or negative, or NaN) leaves none, whatever u; a row without any
positive weight gives ancestor 0 throughout.

The cumulative weights are counted in offspring, so they run from 0 to N. A value within rounding of an integer *is*
that integer: even weights then map to the identity, and floor(N w) does not lose a copy to the last bit.

To add a scheme: write it here, name it in ``RESAMPLERS``, and in ``RESAMPLING_METHODS`` of ``smc_compile/options.py``.
When to resample is decided in ``weights.py``.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

_EPSILON = 2.0**-52


def _snap(offspring: Tensor, n: int) -> Tensor:
    """Rounds to the nearest integer what may differ from it only by rounding.

    A sum of n terms is off by at most n eps relative to it, and these sums go up to n; equal terms do drift that way.
    The mass this moves is 1e-12 of a particle for 64 of them.
    """
    nearest = offspring.round()
    return torch.where((offspring - nearest).abs() <= n * n * _EPSILON, nearest, offspring)


def _positive(weights: Tensor) -> Tensor:
    """In float64, with NaN and negative weights as 0."""
    weights = weights.to(torch.float64)
    return torch.where(weights > 0, weights, 0.0)


def _expected_offspring(weights: Tensor) -> Tensor:
    """N w, snapped; weights as from _positive, and renormalised."""
    n = weights.shape[-1]
    total = weights.sum(-1, keepdim=True)
    return _snap(weights / torch.where(total > 0, total, 1.0) * n, n)


def _flat_at_zeros(cumulative: Tensor, weights: Tensor) -> Tensor:
    """Makes cumulative weights monotone, and exactly flat at zero weights, which can then never be crossed.

    A scan done in parallel may rise by an ulp at a zero weight, or fall.
    """
    return torch.where(weights > 0, cumulative, 0.0).cummax(-1).values


def _ancestors_at(weights: Tensor, positions: Tensor) -> Tensor:
    """Inverse of the cumulative weights at positions in [0, N), both [..., N]; weights as from _positive."""
    n = weights.shape[-1]
    cdf = _flat_at_zeros(weights.cumsum(-1), weights)
    total = cdf[..., -1:]
    cdf = _snap(cdf / torch.where(total > 0, total, 1.0) * n, n)  # ends at N exactly
    ancestors = torch.searchsorted(cdf, positions.contiguous(), right=True)
    last = torch.where(weights > 0, torch.arange(n, device=weights.device), 0).amax(-1, keepdim=True)
    return torch.minimum(ancestors, last)


def _one_per_stratum(u: Tensor, n: int) -> Tensor:
    """i + u, kept below i + 1 where the sum would round up to it: [..., N] or [..., 1] -> [..., N]."""
    i = torch.arange(n, device=u.device, dtype=torch.float64)
    return torch.minimum(i + u.to(torch.float64), (i + 1) * (1 - 2.0**-53))


def systematic(weights: Tensor, u: Tensor) -> Tensor:
    """One uniform, u[..., 0], shifts a comb of N teeth (Carpenter, Clifford and Fearnhead, 1999).

    Particle i leaves floor(N w_i) or one more: the least variance of a single count that an unbiased method can have.
    """
    return _ancestors_at(_positive(weights), _one_per_stratum(u[..., :1], weights.shape[-1]))


def stratified(weights: Tensor, u: Tensor) -> Tensor:
    """One uniform in each of N equal strata (Kitagawa, 1996)."""
    return _ancestors_at(_positive(weights), _one_per_stratum(u, weights.shape[-1]))


def multinomial(weights: Tensor, u: Tensor) -> Tensor:
    """N independent draws (Gordon, Salmond and Smith, 1993), sorted: the distribution of the counts ignores order."""
    positions = u.to(torch.float64).sort(-1).values * weights.shape[-1]
    return _ancestors_at(_positive(weights), positions)


def residual(weights: Tensor, u: Tensor) -> Tensor:
    """floor(N w_i) copies of each, the remaining slots multinomial in what the floor cut off (Liu and Chen, 1998).

    The copies fill the first D slots, the draws the other N - D; D depends on the weights, the shapes do not.
    """
    weights = _positive(weights)
    n = weights.shape[-1]
    expected = _expected_offspring(weights)  # [..., N]
    copies = expected.floor()  # [..., N]
    filled = copies.cumsum(-1)  # integers, hence exact
    slot = torch.arange(n, device=weights.device, dtype=torch.float64).expand_as(filled)
    copied = torch.searchsorted(filled, slot.contiguous(), right=True)  # N beyond slot D
    drawn = _ancestors_at(expected - copies, u.to(torch.float64) * n)
    return torch.where(slot < filled[..., -1:], copied, drawn).sort(-1).values


RESAMPLERS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "systematic": systematic,
    "stratified": stratified,
    "multinomial": multinomial,
    "residual": residual,
}


def keep_survivors(ancestors: Tensor) -> Tensor:
    """Reorder ancestors [B, N] so that a particle with offspring keeps its place: ancestor[ancestor[i]] = ancestor[i].

    Only the places of dead particles change hands, so states move by copying dead rows alone, in place. Particles are
    exchangeable, so the distribution does not change.
    """
    n = ancestors.shape[-1]
    identity = torch.arange(n, device=ancestors.device).expand_as(ancestors)
    offspring = torch.zeros_like(ancestors).scatter_add(-1, ancestors, torch.ones_like(ancestors))
    dead = offspring == 0
    spare = (offspring - 1).clamp_min(0).cumsum(-1)  # [B, N], ends at the number of the dead
    place = (dead.long().cumsum(-1) - 1).clamp_min(0)  # of a dead particle among the dead
    heir = torch.searchsorted(spare, place, right=True).clamp_max(n - 1)
    return torch.where(dead, heir, identity)
