"""Importance weights of a population: evidence, degeneracy, resampling, choice of the answer.

Weights stay in log space; sums are taken in float64. The last axis is the particles. Rows whose weights are all zero
have defined results and are left alone by `resample_step`; NaN propagates into the evidence and the effective sample
size, so that the caller sees it, and never resamples.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from smc_compile.runtime.algorithms.resampling import RESAMPLERS
from smc_compile.runtime.algorithms.sampling import sample_inverse_cdf

# Equal weights computed in different orders differ in the last bits: such a population is even, not degenerate.
_EVEN = 1 - 1e-9


def log_mean_exp(log_w: Tensor) -> Tensor:
    """log of the mean weight, float64: [..., N] -> [...]; all -inf gives -inf."""
    return torch.logsumexp(log_w.to(torch.float64), -1) - math.log(log_w.shape[-1])


def _relative_weights(log_w: Tensor) -> Tensor:
    """exp(log_w - max), float64, the largest being 1; all zero in a row of -inf. [..., N]"""
    log_w = log_w.to(torch.float64)
    largest = log_w.amax(-1, keepdim=True)
    return (log_w - torch.where(largest == -math.inf, 0.0, largest)).exp()


def normalise(log_w: Tensor) -> Tensor:
    """Weights that sum to 1, float64: [..., N] -> [..., N]; all -inf gives the uniform distribution."""
    w = _relative_weights(log_w)
    total = w.sum(-1, keepdim=True)
    return torch.where(total == 0, 1.0 / log_w.shape[-1], w / torch.where(total == 0, 1.0, total))


def effective_sample_size(log_w: Tensor) -> Tensor:
    """(sum w)^2 / sum w^2, between 1 and N (Kong, Liu and Wong, 1994), float64: [..., N] -> [...]; all -inf gives 0."""
    w = _relative_weights(log_w)
    squares = w.square().sum(-1)
    return w.sum(-1).square() / torch.where(squares == 0, 1.0, squares)


def divergence_of(log_w: Tensor) -> Tensor:
    """An estimate of -E[log of the mean weight] in nats, float64: [..., N] -> [...]; infinite where none is left.

    As ``cycle_divergence``, with the variance s of the log weights of the share f that is left: their law is taken as
    log-normal, and 1 + cv^2 = exp(s) / f. The effective sample size would say less: no weight of N can be seen to hold
    more than all of the mass. One particle has no spread, and its own -log w is all that is known.
    """
    log_w, n = log_w.to(torch.float64), log_w.shape[-1]
    if n == 1:
        return -log_w[..., 0]
    left = log_w > -math.inf
    count = left.sum(-1)
    mean = torch.where(left, log_w, 0.0).sum(-1) / count
    variance = torch.where(left, log_w - mean[..., None], 0.0).square().sum(-1) / (count - 1).clamp_min(1)
    cost = torch.log1p((variance.clamp_max(700.0).exp() * n / count.clamp_min(1) - 1) / n) / 2
    return torch.where(count == 0, math.inf, cost)


def resample_step(
    log_w: Tensor, log_evidence: Tensor, u: Tensor, threshold: float, method: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Resamples the rows whose effective sample size is below threshold * N (Liu and Chen, 1995).

    log_w: [B, N]; log_evidence: [B]; u: [B, N] uniforms.
    Returns ancestors [B, N] int64, log_w [B, N], log_evidence [B], ess [B] float64 (before), resampled [B] bool.

    A resampled row adds the log of its mean weight to the evidence and restarts at log weight 0. Every other row keeps
    its weights and gets the identity. threshold 0 never resamples; 1 does unless the weights are even. A row that is
    all -inf has no particle to resample: it is left as it is, with ess 0, for the caller to deal with.
    """
    n = log_w.shape[-1]
    ess = effective_sample_size(log_w)  # [B]
    resampled = (ess > 0) & (ess < threshold * n * _EVEN)  # [B]; NaN compares false
    rows = resampled[:, None]  # [B, 1]
    identity = torch.arange(n, device=log_w.device)
    ancestors = torch.where(rows, RESAMPLERS[method](normalise(log_w), u), identity)
    gained = (log_evidence.to(torch.float64) + log_mean_exp(log_w)).to(log_evidence.dtype)
    log_evidence = torch.where(resampled, gained, log_evidence)
    return ancestors, torch.where(rows, 0.0, log_w), log_evidence, ess, resampled


def select(log_w: Tensor, u: Tensor) -> Tensor:
    """One particle per row in proportion to its weight: [B, N], [B] -> [B] int64.

    NaN counts as weight zero; in a row without any weight every particle is equally likely.
    """
    return sample_inverse_cdf(normalise(torch.where(log_w.isnan(), -math.inf, log_w)), u)
