"""The particles of a batch while it runs, and what becomes of the requests that have finished."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self

import torch
from torch import Tensor

from smc_compile.result import Generation, Stats
from smc_compile.runtime.algorithms.weights import log_mean_exp, select
from smc_compile.runtime.state.region_types import EosIds, State, is_eos
from smc_compile.runtime.state.request import Request

ENDLESS = 2**40  # the length of a sequence that has not ended


@dataclass
class Population:
    """What a cycle carries. R = B*N rows; the last of the ``made`` tokens is pending: no model has seen it."""

    n: int
    tokens: Tensor  # [R, capacity]
    log_p: Tensor  # [R, capacity] float64, of the tokens under the target
    ended: Tensor  # [R] bool: an end of sequence lies before the pending token
    stopped: Tensor  # [R] bool: the text ends with the pending token for another reason than its token
    length: Tensor  # [R], tokens up to and with the end; ENDLESS before it
    log_w: Tensor  # [B, N] float64
    log_evidence: Tensor  # [B] float64
    shared: Tensor  # [B, N, N], leading slots of their caches that two particles have in common
    target: State
    draft: State
    generated: int = 1
    ess: list[Tensor] = field(default_factory=list)  # [B] a cycle
    ancestors: list[Tensor] = field(default_factory=list)  # [B, N] a cycle
    lag: list[Tensor] = field(default_factory=list)  # [B] a cycle

    @classmethod
    def start(cls, request: Request, n: int, capacity: int, target: State, draft: State) -> Population:
        rows, batch, device = request.batch * n, request.batch, request.ids.device
        return cls(
            n=n,
            tokens=request.pad.repeat_interleave(n)[:, None].repeat(1, capacity),
            log_p=torch.zeros(rows, capacity, dtype=torch.float64, device=device),
            ended=torch.zeros(rows, dtype=torch.bool, device=device),
            stopped=torch.zeros(rows, dtype=torch.bool, device=device),
            length=torch.full((rows,), ENDLESS, device=device),
            log_w=torch.zeros(batch, n, dtype=torch.float64, device=device),
            log_evidence=torch.zeros(batch, dtype=torch.float64, device=device),
            shared=torch.zeros(batch, n, n, dtype=torch.int64, device=device),
            target=target,
            draft=draft,
        )

    def text(self, request: Request, extra: Tensor) -> Tensor:
        """All tokens [R, P + made + E]: prompts as they were given, made tokens, and ``extra`` [R, E] behind them."""
        return torch.cat([request.ids.repeat_interleave(self.n, 0), self.tokens[:, : self.generated], extra], 1)

    def commit(self, tokens: Tensor, log_p: Tensor, over: Tensor) -> None:
        """Take the K+1 tokens [R, K+1] of a cycle; ``over`` [R, K+1] says that the text ends with x_k or before."""
        width = tokens.shape[1]
        self.length, self.ended = ends_within(self.length, self.ended, over, self.generated)
        self.tokens[:, self.generated : self.generated + width] = tokens
        self.log_p[:, self.generated : self.generated + width] = log_p
        self.generated += width

    def permute(self, ancestors: Tensor) -> tuple[Tensor, Tensor, int]:
        """Give every dead row its ancestor's tokens; survivors keep their place.

        Returns the dead rows, their sources, and from which slot on the caches of these may differ from theirs.
        """
        batch, n = ancestors.shape
        since = own_and_source(self.shared, ancestors).flatten()
        self.shared = shared_after(self.shared, ancestors, self.generated - 1)
        flat = (ancestors + n * torch.arange(batch, device=ancestors.device)[:, None]).flatten()
        dead = (flat != torch.arange(batch * n, device=flat.device)).nonzero()[:, 0]
        source = flat[dead]
        for values in (self.tokens, self.log_p, self.ended, self.stopped, self.length):
            values[dead] = values[source]
        return dead, source, int(since[dead].min()) if len(dead) else self.generated

    def lengths(self, eos_ids: EosIds) -> Tensor:
        """Tokens of each row up to and with its end [R]; ENDLESS before it."""
        pending = self.tokens[:, self.generated - 1 : self.generated]
        return ends_at_pending(self.length, self.ended, pending, self.stopped, eos_ids, self.generated)

    def finished(self, request: Request, eos_ids: EosIds) -> Tensor:
        """[B] bool: every particle has ended, or the cap is reached."""
        return all_finished(self.lengths(eos_ids), self.n, self.generated, request.new_tokens)

    def take(self, keep: Tensor, rows: Tensor) -> Self:
        """The particles of these requests; the states are not touched, nor is what is kept by cycle."""
        by_row: dict[str, Any] = {
            name: getattr(self, name)[rows] for name in ("tokens", "log_p", "ended", "stopped", "length")
        }
        by_request: dict[str, Any] = {name: getattr(self, name)[keep] for name in ("log_w", "log_evidence", "shared")}
        by_cycle: dict[str, Any] = {
            name: [v[keep] for v in getattr(self, name)] for name in ("ess", "ancestors", "lag")
        }
        return replace(self, **by_row, **by_request, **by_cycle)


def own_and_source(shared: Tensor, ancestors: Tensor) -> Tensor:
    """Slots [B, N] that each particle has in common with its ancestor [B, N]."""
    return shared.gather(2, ancestors[:, :, None])[:, :, 0]


def shared_after(shared: Tensor, ancestors: Tensor, used: int | Tensor) -> Tensor:
    """What particles have in common [B, N, N] once each goes on with its ancestor's caches, ``used`` slots of them."""
    n = ancestors.shape[1]
    rows = shared.gather(1, ancestors[:, :, None].expand(-1, -1, n))
    pairs = rows.gather(2, ancestors[:, None, :].expand(-1, n, -1))
    return torch.where(ancestors[:, :, None] == ancestors[:, None, :], used, pairs)


def ends_within(length: Tensor, ended: Tensor, over: Tensor, generated: int | Tensor) -> tuple[Tensor, Tensor]:
    """Lengths and ended [R] after a block that ``over`` [R, K+1] describes; x_0 is the token before ``made``."""
    ends_here = over.any(1) & ~ended
    return torch.where(ends_here, generated + (~over).sum(1), length), over[:, -1].contiguous()


def ends_at_pending(
    length: Tensor, ended: Tensor, pending: Tensor, stopped: Tensor, eos_ids: EosIds, generated: int | Tensor
) -> Tensor:
    """Lengths [R] that count an end at the pending token [R, 1], number ``made``."""
    at_end = is_eos(pending, eos_ids)[:, 0] | stopped
    return torch.where(at_end & ~ended, generated, length)


def all_finished(lengths: Tensor, n: int, generated: int | Tensor, new_tokens: Tensor) -> Tensor:
    """[B] bool: all n rows of a request have ended, or its cap is reached."""
    return (lengths < ENDLESS).view(-1, n).all(1) | (generated >= new_tokens)


@dataclass(frozen=True)
class Outcome:
    """Requests that finished together, or where they broke off: b of them, G tokens made, C cycles run."""

    number: tuple[int, ...]
    tokens: Tensor  # [b, N, G]; padding after the end
    log_p: Tensor  # [b, N, G]
    lengths: Tensor  # [b, N]
    log_w: Tensor  # [b, N]
    log_evidence: Tensor  # [b]
    chosen: Tensor  # [b]
    ess: Tensor  # [b, C]
    ancestors: Tensor  # [b, C, N]
    lag: Tensor  # [b, C], or [b, 0]


def outcome(p: Population, request: Request, eos_ids: EosIds, keep: list[int], u: Tensor) -> Outcome:
    """The requests at rows ``keep`` as they stand; ``u`` [B] draws the particles that become the answers."""
    index = torch.tensor(keep, device=p.tokens.device)
    batch, generated = request.batch, p.generated
    lengths = p.lengths(eos_ids).view(batch, p.n)[index]
    caps = request.new_tokens[index]
    lengths = lengths.minimum(caps.clamp(max=generated)[:, None])
    counted = torch.arange(generated, device=index.device) < lengths[..., None]  # [b, N, G]
    tokens, log_p = (value.view(batch, p.n, -1)[index, :, :generated] for value in (p.tokens, p.log_p))
    log_w = p.log_w[index]
    none = log_w.new_zeros(len(keep), 0)
    return Outcome(
        number=tuple(request.number[b] for b in keep),
        tokens=torch.where(counted, tokens, request.pad[index][:, None, None]),
        log_p=torch.where(counted, log_p, 0.0),
        lengths=lengths,
        log_w=log_w,
        log_evidence=p.log_evidence[index] + log_mean_exp(log_w),
        chosen=select(log_w, u[index]),
        ess=torch.stack(p.ess, 1)[index] if p.ess else none,
        ancestors=torch.stack(p.ancestors, 1)[index] if p.ancestors else none.new_zeros(len(keep), 0, p.n).long(),
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
        ess=together("ess", stats.cycles, 1, torch.nan),
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
