"""What rejection commits follows the target's distribution, whatever the draft and however many chains are tried.

The exact distribution of the output is enumerated: every tuple of drafted tokens, and for each of them the probability
of every path of acceptances, which plain Python follows beside the code under test.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from helpers.enumeration import chi_square_p_value
from torch import Tensor

from smc_compile.runtime.execution.acceptance import Walk, accept, arrive, set_out

LAWS = {
    "near": ([0.5, 0.3, 0.2], [0.4, 0.4, 0.2]),
    "far": ([0.7, 0.2, 0.1], [0.05, 0.15, 0.8]),
    "equal": ([0.25, 0.25, 0.5], [0.25, 0.25, 0.5]),
    "disjoint": ([0.4, 0.6, 0.0, 0.0], [0.0, 0.0, 0.5, 0.5]),
    "the draft cannot reach all": ([0.2, 0.3, 0.5], [0.0, 0.9, 0.1]),
    "the target truncates": ([0.0, 1.0, 0.0], [0.6, 0.1, 0.3]),
}


def residuals(p: Tensor, q: Tensor, count: int) -> list[Tensor]:
    """The target's distribution before the first, second, ... candidate, and after ``count`` rejections."""
    distributions = [p]
    for _ in range(count):
        left = (distributions[-1] - q).clamp_min(0)
        distributions.append(left / left.sum() if left.sum() > 1e-12 else p)
    return distributions


def one_position(p: Tensor, q: Tensor, drafted: Tensor, u: Tensor) -> Walk:
    """M equal requests with ``drafted`` [M, N] at one position."""
    m, n = drafted.shape
    walk = set_out(m, n, len(p), p.device)
    return accept(walk, p.expand(m, -1), q.expand(m, -1), drafted, u)


@pytest.mark.parametrize("chains", [1, 2, 3])
@pytest.mark.parametrize("name", LAWS)
def test_the_distribution_of_one_position_is_exactly_the_target(name, chains):
    """Uniforms on either side of each threshold find the probability of an acceptance; sums over all drafts give p."""
    p, q = (torch.tensor(distribution, dtype=torch.float64) for distribution in LAWS[name])
    distributions, found = residuals(p, q, chains), torch.zeros_like(p)
    for drafted in itertools.product(range(len(p)), repeat=chains):
        weight = math.prod(q[x].item() for x in drafted)
        if weight == 0:
            continue
        for n, x in enumerate(drafted):  # rejected before n, decided at n
            threshold = min(1.0, float(distributions[n][x] / q[x]))
            u = torch.ones(2, chains, dtype=torch.float64) * (1 - 1e-15)
            u[0, n], u[1, n] = max(threshold - 1e-9, 0), min(threshold + 1e-9, 1 - 1e-15)
            before = [min(1.0, float(distributions[i][drafted[i]] / q[drafted[i]])) for i in range(n)]
            if max(before, default=0.0) >= 1 - 1e-12:
                break
            walk = one_position(p, q, torch.tensor([drafted] * 2), u)
            if threshold > 1e-9:
                assert walk.going[0], "below the threshold the token is accepted"
                found[x] += weight * threshold
            if n == chains - 1 and threshold < 1 - 1e-9:
                assert not walk.going[1], "above it, it is rejected"
                rest = walk.rest[1] / walk.rest[1].sum()
                torch.testing.assert_close(rest, distributions[-1], atol=1e-12, rtol=0)
                found += weight * (1 - threshold) * rest
            weight *= 1 - threshold
    torch.testing.assert_close(found, p, atol=1e-12, rtol=0)


def markov(generator: torch.Generator, vocab: int, sharp: float) -> Tensor:
    return (sharp * torch.randn(vocab, vocab, generator=generator, dtype=torch.float64)).softmax(-1)


def plain(p: Tensor, q: Tensor, drafted: Tensor, u: Tensor) -> tuple[int, int, Tensor]:
    """One request by plain loops. p: [N, K+1, V], q: [N, K, V], drafted and u: [N, K]."""
    alive = list(range(len(drafted)))
    for k in range(drafted.shape[1]):
        rest = p[alive[0], k]
        for n in alive:
            x = drafted[n, k]
            if u[n, k] < rest[x] / q[n, k, x]:
                alive = [m for m in alive if drafted[m, k] == x]
                break
            left = (rest - q[n, k]).clamp_min(0)
            rest = left / left.sum()
        else:
            return k, alive[0], rest
    return drafted.shape[1], alive[0], p[alive[0], -1]


def walked(p: Tensor, q: Tensor, drafted: Tensor, u: Tensor) -> Walk:
    """All positions. p: [B, N, K+1, V], q: [B, N, K, V], drafted and u: [B, N, K]."""
    walk = set_out(len(p), p.shape[1], p.shape[-1], p.device)
    rows = torch.arange(len(p))
    for k in range(drafted.shape[2]):
        walk = accept(walk, p[rows, walk.chain, walk.length], q[rows, walk.chain, k], drafted[:, :, k], u[:, :, k])
    return walk


def drafts(count: int, chains: int, length: int, vocab: int, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Chains of two Markov distributions from state 0, and uniforms."""
    generator = torch.Generator().manual_seed(seed)
    target, draft = markov(generator, vocab, 1.0), markov(generator, vocab, 1.0)
    state = torch.zeros(count, chains, dtype=torch.int64)
    p, q, tokens = [target[state]], [], []
    for _ in range(length):
        q.append(draft[state])
        state = torch.multinomial(draft[state].flatten(0, 1), 1, generator=generator).view(count, chains)
        tokens.append(state)
        p.append(target[state])
    u = torch.rand(count, chains, length, generator=generator, dtype=torch.float64)
    return torch.stack(p, 2), torch.stack(q, 2), torch.stack(tokens, 2), u


@pytest.mark.parametrize("chains", [1, 2, 4, 8])
def test_it_follows_a_plain_loop(chains):
    p, q, drafted, u = drafts(500, chains, 4, 5, seed=chains)
    walk = walked(p, q, drafted, u)
    _, distribution = arrive(walk, p[torch.arange(500), walk.chain, -1], torch.zeros(500, dtype=torch.float64))
    for b in range(500):
        length, chain, rest = plain(p[b], q[b], drafted[b], u[b])
        assert (int(walk.length[b]), int(walk.chain[b])) == (length, chain)
        torch.testing.assert_close(distribution[b] / distribution[b].sum(), rest, atol=1e-9, rtol=0)
    assert set(walk.length.tolist()) == set(range(5)), "every length occurs, or this test sees little"


@pytest.mark.parametrize("chains", [1, 4, 8])
def test_a_whole_block_follows_the_target(chains):
    """The two tokens that begin a block of three, filled up from the target where less was accepted: 1e-3."""
    count, vocab = 2**15, 3
    p, q, drafted, u = drafts(count, chains, 2, vocab, seed=20 + chains)
    generator = torch.Generator().manual_seed(chains)
    walk, rows = walked(p, q, drafted, u), torch.arange(count)
    last, _ = arrive(walk, p[rows, walk.chain, -1], torch.rand(count, generator=generator, dtype=torch.float64))
    target = markov(torch.Generator().manual_seed(20 + chains), vocab, 1.0)
    own = drafted[rows, walk.chain]
    first = torch.where(walk.length > 0, own[:, 0], last)
    drawn = torch.multinomial(target[first], 1, generator=generator)[:, 0]
    second = torch.where(walk.length > 1, own[:, 1], torch.where(walk.length == 1, last, drawn))
    third = torch.where(walk.length > 1, last, torch.multinomial(target[second], 1, generator=generator)[:, 0])
    distribution = torch.einsum("a,ab,bc->abc", target[0], target, target)
    assert chi_square_p_value(torch.stack([first, second, third], 1), distribution) > 1e-3


def test_more_chains_accept_more():
    accepted = [walked(*drafts(4000, chains, 3, 6, seed=3)).length.double().mean() for chains in (1, 2, 4, 8)]
    assert all(b > a + 0.05 for a, b in itertools.pairwise(accepted))


def test_a_residual_that_rounding_leaves_empty_gives_way_to_the_distribution():
    """A token with p < q by one rounding, and nothing with p > q."""
    p = torch.tensor([0.5, 0.5, 0.0], dtype=torch.float64)
    walk = one_position(p, p, torch.tensor([[2]]), torch.zeros(1, 1, dtype=torch.float64))
    assert not walk.going
    assert torch.equal(walk.rest[0], p)


def test_a_nan_is_not_accepted_and_shows():
    p = torch.tensor([0.5, 0.5], dtype=torch.float64)
    nan = torch.full_like(p, torch.nan)
    for distributions in ((nan, p), (p, nan)):
        walk = one_position(*distributions, torch.tensor([[0, 1]]), torch.zeros(1, 2, dtype=torch.float64))
        assert not walk.going
        assert walk.rest.isnan().any()
