"""The particles of a batch with their history, and what becomes of the requests that have finished."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self

import torch
from torch import Tensor

from smc_compile.result import Generation, Stats
from smc_compile.runtime.algorithms.weights import log_mean_exp, select
from smc_compile.runtime.state.particles import CycleState, all_finished, ends_at_pending, pending
from smc_compile.runtime.state.region_types import EosIds
from smc_compile.runtime.state.request import Request


@dataclass
class Population:
    """The particles of the requests that go on, and the history that a result tells."""

    n: int  # rows of a request
    state: CycleState
    made: Tensor  # [B], the ``generated`` tokens of each as the host knows them
    ess: list[Tensor] = field(default_factory=list)  # [B] a cycle
    widths: list[Tensor] = field(default_factory=list)  # [B] a cycle
    ancestors: list[Tensor] = field(default_factory=list)  # [B, N] a cycle
    lag: list[Tensor] = field(default_factory=list)  # [B] a cycle
    cost: Tensor | None = None  # [B] of the last cycle, see ``CycleInfo``
    copies: int = 1  # equal particles that a row of texts stands for

    @property
    def generated(self) -> int:
        """Tokens of a row, the pending one included: the most of all requests."""
        return int(self.made.max())

    @property
    def tokens(self) -> Tensor:
        """[R, G], the generated ones; of requests that have fewer, anything behind them."""
        return self.state.texts.tokens[:, : self.generated]

    def lengths(self, eos_ids: EosIds) -> Tensor:
        """Tokens of each row up to and with its end [R]; ENDLESS before it."""
        state = self.state
        generated = state.generated.repeat_interleave(len(state.texts.tokens) // len(state.generated))
        return ends_at_pending(state.particles, pending(state.texts.tokens, state.generated), eos_ids, generated)

    def finished(self, request: Request, eos_ids: EosIds) -> Tensor:
        """[B] bool: every particle has ended, or the cap is reached."""
        return all_finished(self.lengths(eos_ids), self.n, self.state.generated, request.new_tokens)

    def take(self, keep: Tensor, rows: Tensor) -> Self:
        """The particles of requests ``keep``, in these rows; caches are not touched."""
        by_cycle: dict[str, Any] = {
            name: [value[keep] for value in getattr(self, name)] for name in ("ess", "widths", "ancestors", "lag")
        }
        return replace(
            self, state=self.state.take(keep, rows), made=self.made[keep.to(self.made.device)], cost=None, **by_cycle
        )


@dataclass(frozen=True)
class Outcome:
    """Requests that finished together, or where they broke off: b of them, G generated tokens, C cycles."""

    number: tuple[int, ...]
    tokens: Tensor  # [b, N, G]; padding after the end
    log_p: Tensor  # [b, N, G]
    lengths: Tensor  # [b, N]
    log_w: Tensor  # [b, N]
    log_evidence: Tensor  # [b]
    dropped: Tensor  # [b]
    chosen: Tensor  # [b]
    ess: Tensor  # [b, C]
    widths: Tensor  # [b, C]
    ancestors: Tensor  # [b, C, N]
    lag: Tensor  # [b, C], or [b, 0]


def outcome(p: Population, request: Request, eos_ids: EosIds, keep: list[int], u: Tensor) -> Outcome:
    """The requests at rows ``keep`` as they stand; ``u`` [B] draws the particles that become the answers."""
    index = torch.tensor(keep, device=request.ids.device)
    batch, generated = request.batch, p.generated
    lengths = p.lengths(eos_ids).view(batch, p.n)[index].repeat_interleave(p.copies, 1)
    caps = request.new_tokens[index]
    lengths = lengths.minimum(caps.minimum(p.state.generated[index])[:, None])
    counted = torch.arange(generated, device=index.device) < lengths[..., None]  # [b, N, G]
    texts = (value.view(batch, p.n, -1)[index, :, :generated] for value in p.state.texts)
    tokens, log_p = (value.repeat_interleave(p.copies, 1) for value in texts)
    weights = p.state.weights
    log_w = weights.log_w[index].repeat_interleave(p.copies, 1)
    none = log_w.new_zeros(len(keep), 0)
    return Outcome(
        number=tuple(request.number[b] for b in keep),
        tokens=torch.where(counted, tokens, request.pad[index][:, None, None]),
        log_p=torch.where(counted, log_p, 0.0),
        lengths=lengths,
        log_w=log_w,
        log_evidence=weights.log_evidence[index] + log_mean_exp(log_w),
        dropped=weights.dropped[index],
        chosen=select(log_w, u[index]),
        ess=torch.stack(p.ess, 1)[index] if p.ess else none,
        widths=torch.stack(p.widths, 1)[index] if p.widths else none.long(),
        ancestors=torch.stack(p.ancestors, 1)[index] if p.ancestors else log_w.new_zeros(*log_w.shape, 0).mT.long(),
        lag=torch.stack(p.lag, 1)[index] if p.lag else none.long(),
    )


def assemble(outcomes: Sequence[Outcome], asked: Request, width: int, stats: Stats) -> Generation:
    """All requests in the caller's order: prompts [B, P] as they were given, then ``width`` new tokens, padded."""
    number = [b for o in outcomes for b in o.number]
    order = torch.empty(len(number), dtype=torch.int64)
    order[number] = torch.arange(len(number))
    order = order.to(asked.ids.device)
    n = outcomes[0].tokens.shape[1]

    def together(name: str, size: int, dim: int, fill: float) -> Tensor:
        return torch.cat([_filled(getattr(o, name), size, dim, fill) for o in outcomes])[order]

    stats.new_tokens, stats.cycles = width, max(o.ess.shape[1] for o in outcomes)
    lengths = torch.cat([o.lengths for o in outcomes])[order]
    chosen = torch.cat([o.chosen for o in outcomes])[order]
    rows = torch.arange(len(number), device=order.device)
    generated = together("tokens", width, 2, 0)
    after = torch.arange(width, device=order.device) >= lengths[..., None]
    particles = torch.cat(
        [asked.ids[:, None].expand(-1, n, -1), torch.where(after, asked.pad[:, None, None], generated)], 2
    )
    ancestors = together("ancestors", stats.cycles, 1, -1)
    nobody = torch.arange(n, device=order.device)
    log_p = together("log_p", width, 2, 0.0)
    return Generation(
        sequences=particles[rows, chosen],
        particles=particles,
        log_weights=torch.cat([o.log_w for o in outcomes])[order],
        log_evidence=torch.cat([o.log_evidence for o in outcomes])[order],
        dropped=torch.cat([o.dropped for o in outcomes])[order],
        ess=together("ess", stats.cycles, 1, torch.nan),
        widths=together("widths", stats.cycles, 1, 0),
        ancestors=torch.where(ancestors < 0, nobody, ancestors),
        log_probs=log_p[rows, chosen],
        new_lengths=lengths[rows, chosen],
        particle_log_probs=log_p,
        particle_lengths=lengths,
        lag=together("lag", max(o.lag.shape[1] for o in outcomes), 1, 0),
        stats=stats,
    )


def _filled(value: Tensor, size: int, dim: int, fill: float) -> Tensor:
    """``value`` cut or filled up to ``size`` along ``dim``."""
    value = value.narrow(dim, 0, min(size, value.shape[dim]))
    missing = [size - value.shape[dim] if d == dim else s for d, s in enumerate(value.shape)]
    return torch.cat([value, value.new_full(missing, fill)], dim)
