"""Drawing a token with one uniform, and the log-probability of one token."""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 128  # tokens of a block of the two-level search


def _first_above(mass: Tensor, cdf: Tensor, target: Tensor) -> Tensor:
    """The first index with positive mass whose cdf exceeds the target; if rounding left none, the last with mass.

    mass, cdf: [..., n]; target: [...] -> [...] int64. A scan done in parallel need not be monotone and may rise by an
    ulp where the mass is zero, so the mass is looked at, not only its cumulative sum. No mass at all gives 0.
    """
    n = mass.shape[-1]
    index = torch.arange(n, device=mass.device)
    first = torch.where((mass > 0) & (cdf > target[..., None]), index, n).amin(-1)
    last = torch.where(mass > 0, index, 0).amax(-1)
    return torch.minimum(first, last)


def _mass(probs: Tensor) -> Tensor:
    """The probabilities, with whatever is not positive and finite as 0."""
    return torch.where((probs > 0) & (probs < float("inf")), probs, 0.0)


def sample_inverse_cdf(probs: Tensor, u: Tensor) -> Tensor:
    """One token per row by inverse CDF: the first whose cumulative probability exceeds u times the total.

    probs: [..., V] float, not necessarily normalised.  u: [...] in [0, 1).  Returns [...] int64.

    Inversion (Devroye, 1986, ch. III) at two levels: a block of 128 tokens by the cdf over blocks, then a token by the
    cdf within that block, both in float64; so the scans are short and a long tail is not lost to rounding. A token of
    probability 0 is never drawn, whatever u. Entries that are negative, infinite or NaN count as 0; a row with nothing
    left gives token 0.
    """
    u = u.to(torch.float64)
    vocabulary = probs.shape[-1]
    whole = vocabulary // BLOCK * BLOCK
    blocks = _mass(probs[..., :whole]).unflatten(-1, (whole // BLOCK, BLOCK))  # [..., V // 128, 128]
    block_mass = torch.cat(
        [blocks.sum(-1, dtype=torch.float64), _mass(probs[..., whole:]).sum(-1, keepdim=True, dtype=torch.float64)], -1
    )  # [..., V // 128 + 1], the last block is what is left over, perhaps empty
    block_cdf = block_mass.cumsum(-1)
    target = u * block_cdf[..., -1]  # [...]
    block = _first_above(block_mass, block_cdf, target)  # [...]

    before = block_cdf.gather(-1, (block - 1).clamp_min(0)[..., None])[..., 0]
    before = torch.where(block > 0, before, 0.0)  # mass of the blocks to the left
    width = min(BLOCK, vocabulary)
    token = block[..., None] * BLOCK + torch.arange(width, device=probs.device)  # [..., 128], or [..., V] if smaller
    mass = _mass(probs.gather(-1, token.clamp_max(vocabulary - 1))).to(torch.float64)
    mass = torch.where(token < vocabulary, mass, 0.0)
    return block * BLOCK + _first_above(mass, mass.cumsum(-1), target - before)
