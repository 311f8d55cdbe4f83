"""What speculation is worth, predicted from a pair of models: tokens a cycle, effective particles, divergence.

SMC: log weights of K drafted tokens, drawn with equal weights, have variance K * s, where s is that of one token's
increment log p - log q. They are taken as normal, with mean weight 1.
"""

from __future__ import annotations

import math
from statistics import NormalDist

_NORMAL = NormalDist()


def effective_particles(n: int, lookahead: int, spread: float) -> float:
    """N * exp(-K * s), and one at least; none where no weight is left.

    N particles are worth N / (1 + cv^2) (Kong, Liu and Wong, 1994), with the coefficient of variation of a log-normal
    variable.
    """
    return max(1.0, n * math.exp(-lookahead * spread)) if math.isfinite(spread) else 0.0


def cycle_divergence(n: int, lookahead: int, spread: float) -> float:
    """Nats that a cycle adds to ``kl_bound`` on average: -E[log of the mean of N weights].

    It is log(1 + cv^2 / N) / 2, the second order of that for many particles, and exact for one.
    """
    if lookahead * spread > 700:  # where exp overflows
        return max(0.0, lookahead * spread - math.log(n)) / 2
    return math.log1p(math.expm1(lookahead * spread) / n) / 2


def expected_tokens(rate: float, lookahead: int) -> float:
    """Tokens that a cycle of rejection commits: (1 - a^(K+1)) / (1 - a) where each drafted token is accepted with
    probability a (Leviathan, Kalman and Matias, 2023)."""
    return sum(rate**i for i in range(lookahead + 1))


def acceptance_rate(accepted: float, lookahead: int) -> float:
    """The probability a for which a cycle accepts so many of K drafted tokens: sum of a^k over k = 1 .. K."""
    low, high = 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if expected_tokens(middle, lookahead) - 1 < accepted else (low, middle)
    return low


def spread_of(rate: float) -> float:
    """The variance s of one token's log weight where a drafted token is accepted with probability a.

    The overlap of p and q is a; with log-normal p / q of mean 1 it is 2 * Phi(-sqrt(s) / 2).
    """
    if rate <= 0:
        return math.inf
    return 4 * _NORMAL.inv_cdf(min(rate, 1.0) / 2) ** 2
