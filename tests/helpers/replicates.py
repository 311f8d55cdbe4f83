"""Many independent runs in one call, and the estimates that can be taken from them.

Request b of a batch uses seed + b and nothing else of the batch, so B equal prompts are B independent SMC runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from smc_compile import Generation, generate
from smc_compile.runtime.sessions.run import Run
from smc_compile.runtime.sessions.smc import SMCSession


def replicate(target: Any, draft: Any, prompt: Tensor, n: int, runs: int, **options: Any) -> Generation:
    """``runs`` independent generations of n tokens after ``prompt`` [P]."""
    ids = prompt.expand(runs, -1)
    return generate(target, draft, ids, max_new_tokens=n, **{"compiler": "eager", "seed": 0, **options})


def drawn(generation: Generation, distribution: Tensor) -> Tensor:
    """New tokens [B, n] of the returned sequences."""
    return generation.sequences[:, -distribution.ndim :]


def weighted_distribution(generation: Generation, distribution: Tensor) -> Tensor:
    """The distribution of the returned sequence given the particles, averaged over runs: less noisy than draws."""
    return contributions(generation, distribution, generation.log_weights.softmax(-1)).mean(0).view(distribution.shape)


def evidence_measure(generation: Generation, distribution: Tensor) -> Tensor:
    """Evidence times normalised weight, per run and sequence [B, V^n]: unbiased for `distribution` at every N."""
    return contributions(
        generation, distribution, generation.log_evidence[:, None].exp() * generation.log_weights.softmax(-1)
    )


def contributions(generation: Generation, distribution: Tensor, weights: Tensor) -> Tensor:
    """Particle weights [B, N] summed by sequence: [B, V^n]."""
    tokens = generation.particles[..., -distribution.ndim :]  # [B, N, n]
    sequence = (tokens * torch.tensor(distribution.stride())).sum(-1)  # [B, N], the index in distribution.flatten()
    return torch.zeros(len(tokens), distribution.numel(), dtype=torch.float64).scatter_add_(1, sequence, weights)


def distance(estimate: Tensor, distribution: Tensor) -> float:
    """Total variation."""
    return float((estimate - distribution).abs().sum() / 2)


def z_scores(samples: Tensor, expected: Tensor | float) -> Tensor:
    """Independent samples [B, ...] against their expectation, in standard errors."""
    return (samples.mean(0) - expected) / (samples.std(0) / len(samples) ** 0.5)


def draft_chain(target: Callable, draft: Callable, prompt: Tensor, lookahead: int) -> Callable:
    """The model that one particle follows: K tokens of the draft after each of the target."""

    def logits(ids: Tensor) -> Tensor:
        from_target = (ids.shape[1] - len(prompt)) % (lookahead + 1) == 0
        return target(ids) if from_target else draft(ids)

    return logits


@dataclass
class Cycle:
    """What a session holds after a cycle. R = B*N rows."""

    tokens: Tensor  # [R, made], the pending one last
    ended: Tensor  # [R]
    resampled: bool
    target: list[Tensor]
    draft: list[Tensor]


@contextmanager
def recorded_cycles() -> Iterator[list[Cycle]]:
    """Copies of the tokens and states of every SMC session after each of its cycles."""
    cycles: list[Cycle] = []
    next_cycle = SMCSession.advance

    def recording(self: SMCSession, run: Run) -> Run:
        p = next_cycle(self, run).p
        moved = bool((p.ancestors[-1] != torch.arange(self._n)).any())
        states = [[leaf.clone() for leaf in state] for state in (p.state.target, p.state.draft)]
        cycles.append(Cycle(p.tokens.clone(), p.state.particles.ended.clone(), moved, *states))
        return run

    SMCSession.advance = recording
    try:
        yield cycles
    finally:
        SMCSession.advance = next_cycle
