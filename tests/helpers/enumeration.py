"""The oracle: the distribution of a decode loop by full enumeration, and how to compare samples with it.

Nothing here shares code with the compiler, assumes that the model is causal, or keeps a cache.
"""

from collections.abc import Callable

import numpy as np
import torch
from scipy import stats
from torch import Tensor


def next_distribution(logits: Tensor, temperature: float = 1.0, process: Callable | None = None) -> Tensor:
    """Probabilities in float64 of the next token; `process` maps logits to logits, after the temperature."""
    logits = logits.double()
    if temperature == 0:
        return torch.nn.functional.one_hot(logits.argmax(-1), logits.shape[-1]).double()
    logits = logits / temperature
    return torch.softmax(logits if process is None else process(logits), dim=-1)


@torch.no_grad()
def sequence_distribution(
    logits_fn: Callable[[Tensor], Tensor],
    prompt: Tensor,
    n: int,
    vocab: int,
    temperature: float = 1.0,
    eos: int | None = None,
    process: Callable | None = None,
    rows: int = 4096,
) -> Tensor:
    """The probability of every continuation of `prompt` [P] by n tokens, as a tensor of n axes.

    Each step runs the model over every whole prefix, as the loop would. After `eos` only `eos` follows.
    """
    prompt = prompt.reshape(1, -1)
    distribution = torch.ones(1, dtype=torch.float64)
    tokens = prompt.new_empty(1, 0)
    for _ in range(n):
        ids = torch.cat([prompt.expand(len(tokens), -1), tokens], dim=1)
        p = torch.cat([next_distribution(logits_fn(part)[:, -1], temperature, process) for part in ids.split(rows)])
        if eos is not None:
            ended = (tokens == eos).any(dim=1)
            p[ended] = torch.nn.functional.one_hot(torch.tensor(eos), vocab).double()
        distribution = (distribution[:, None] * p).flatten()
        following = torch.arange(vocab).repeat(len(tokens))[:, None]
        tokens = torch.cat([tokens.repeat_interleave(vocab, dim=0), following], dim=1)
    return distribution.reshape([vocab] * n)


@torch.no_grad()
def sample_loop(
    model: Callable[[Tensor], Tensor],
    ids: Tensor,
    n: int,
    temperature: float = 1.0,
    generator: torch.Generator | None = None,
    eos: int | None = None,
    process: Callable | None = None,
) -> Tensor:
    """The plain eager loop; the n new tokens of each row of `ids` [B, P], padded with `eos` after `eos`."""
    start = ids.shape[1]
    for _ in range(n):
        p = next_distribution(model(ids)[:, -1], temperature, process)
        token = torch.multinomial(p, 1, generator=generator)
        if eos is not None:
            token[(ids[:, start:] == eos).any(dim=1)] = eos
        ids = torch.cat([ids, token], dim=1)
    return ids[:, start:]


def draw(distribution: Tensor, count: int, generator: torch.Generator | None = None) -> Tensor:
    """`count` independent exact sequences [count, n], straight from the distribution."""
    flat = torch.multinomial(distribution.flatten(), count, replacement=True, generator=generator)
    return torch.stack(torch.unravel_index(flat, distribution.shape), dim=1)


def counts(samples: Tensor, distribution: Tensor) -> np.ndarray:
    """How often each sequence occurs in `samples` [M, n], in the order of `distribution.flatten()`."""
    samples = samples.cpu().numpy()
    assert samples.ndim == 2, "samples must be [M, n]"
    assert samples.shape[1] == distribution.ndim, "samples and distribution differ in length"
    return np.bincount(np.ravel_multi_index(samples.T, distribution.shape), minlength=distribution.numel())


def total_variation(samples: Tensor, distribution: Tensor) -> float:
    """Half the L1 distance between the empirical distribution of independent samples [M, n] and `distribution`."""
    return float(0.5 * np.abs(counts(samples, distribution) / len(samples) - distribution.flatten().numpy()).sum())


def tv_noise_floor(distribution: Tensor, count: int) -> float:
    """The expected total variation of an exact sampler with `count` independent draws.

    Exact (De Moivre's mean deviation of a binomial), so also right for cells that are seldom hit. By McDiarmid an exact
    sampler exceeds it by 2.7 / sqrt(count) less than once in a million.
    """
    p = distribution.flatten().numpy().clip(0, 1)
    k = np.floor(count * p) + 1
    return float(np.sum(k * (1 - p) * stats.binom.pmf(k, count, p)) / count)


def chi_square_p_value(samples: Tensor, distribution: Tensor) -> float:
    """Pearson's test that independent samples [M, n] follow `distribution`; cells expected under five times are pooled.

    A sequence that the distribution excludes gives 0. The samples must be independent: particles of one run are not.
    """
    observed, p = counts(samples, distribution), distribution.flatten().numpy()
    if observed[p == 0].any():
        return 0.0
    order = np.argsort(p[p > 0])
    observed, expected = observed[p > 0][order], (p[p > 0] / p.sum() * len(samples))[order]
    pool = max(1, np.sum(expected < 5))  # the smallest cells become one
    while pool < len(expected) and expected[:pool].sum() < 5:
        pool += 1
    observed = np.append(observed[:pool].sum(), observed[pool:])
    expected = np.append(expected[:pool].sum(), expected[pool:])
    return float(stats.chisquare(observed, expected).pvalue) if len(expected) > 1 else 1.0
