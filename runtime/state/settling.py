"""What can no longer change: the tokens on which all particles agree, whichever of them becomes the answer."""

from __future__ import annotations

import math
from collections.abc import Callable, Container
from dataclasses import dataclass

import torch
from torch import Tensor

from smc_compile.runtime.algorithms.sampling import sample_inverse_cdf
from smc_compile.runtime.algorithms.weights import normalise
from smc_compile.runtime.state.population import Outcome, Population
from smc_compile.runtime.state.region_types import EosIds
from smc_compile.runtime.state.request import Request


@dataclass(frozen=True)
class Progress:
    """One request at the end of a cycle.

    Attributes:
        request: its place in the caller's batch.
        tokens: [G] int64, generated tokens of its leader: the particle of the largest weight.
        settled: how many of them are the same in every particle that can still be chosen.
        finished: whether ``tokens`` is the answer.
    """

    request: int
    tokens: Tensor
    settled: int
    finished: bool


def settled_tokens(tokens: Tensor, log_w: Tensor) -> int:
    """How many leading tokens all particles with any weight share. tokens: [N, G]; log_w: [N]."""
    alive = tokens[log_w > -math.inf]
    if len(alive) == 0:
        return 0
    return int((alive == alive[0]).all(0).int().cumprod(0).sum())


def settle_old(tokens: Tensor, log_w: Tensor, max_lag: int, u: Tensor, generated: Tensor) -> tuple[Tensor, Tensor]:
    """Draw one ancestor for what is older than ``max_lag`` tokens, where particles still differ there.

    A group of particles with the same old tokens is drawn in proportion to its weight W; the others get weight zero and
    the group's weights are divided by its share of the total. Every expectation under the weighted population, the
    evidence included, keeps its mean. What it costs is variance: the other groups' particles are lost.

    tokens: [R, capacity], of which ``generated`` [B] are; log_w: [B, N]; u: [B] uniforms.
    Returns log_w [B, N] and for which requests an ancestor was drawn [B] bool.
    """
    n = log_w.shape[1]
    settled = log_w.clone()
    drawn = torch.zeros(log_w.shape[0], dtype=torch.bool, device=log_w.device)
    for b, count in enumerate(generated.tolist()):
        old = max(count - max_lag, 0)
        past = tokens[b * n : (b + 1) * n, :old]
        if settled_tokens(past, log_w[b]) == old:
            continue
        w = normalise(log_w[b])
        leader = sample_inverse_cdf(w[None], u[b : b + 1])[0]
        group = (past == past[leader]).all(1)  # [N]
        share = torch.where(group, w, 0.0).sum()
        settled[b] = torch.where(group, log_w[b] - share.log(), -math.inf)
        drawn[b] = True
    return settled, drawn


class Watcher:
    """Calls ``report`` after every cycle with the progress of each request, and keeps the lag."""

    def __init__(self, report: Callable[[Progress], None]) -> None:
        self._report = report

    def cycle(self, p: Population, request: Request, eos_ids: EosIds, gone: Container[int]) -> None:
        """Report a cycle, before the finished requests leave; those in ``gone`` have been reported as finished."""
        lag, log_w = [], p.state.weights.log_w
        most = request.new_tokens.minimum(p.state.generated)[:, None]
        lengths = p.lengths(eos_ids).view(request.batch, p.n).minimum(most)
        for b, number in enumerate(request.number):
            leader = int(log_w[b].argmax())
            tokens = p.tokens[b * p.n : (b + 1) * p.n, : int(lengths[b].max())]
            settled = min(settled_tokens(tokens, log_w[b]), int(lengths[b, leader]))
            lag.append(int(lengths[b].max()) - settled)
            if number not in gone:
                self._report(Progress(number, tokens[leader, : int(lengths[b, leader])], settled, False))
        p.lag.append(torch.tensor(lag, device=p.tokens.device))

    def finish(self, done: Outcome) -> None:
        """Report the answers of requests that have finished."""
        for i, number in enumerate(done.number):
            tokens = done.tokens[i, done.chosen[i], : int(done.lengths[i, done.chosen[i]])]
            self._report(Progress(number, tokens, len(tokens), True))
