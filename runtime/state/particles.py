"""What the particles of a batch carry from cycle to cycle, listed once, and pure functions of it.

B requests with N particles each are R = B*N rows: particle n of request b is row b*N + n.

A later method adds what its particles carry as a field of ``Particles`` (or of ``Weights``, where it is one thing a
request): resampling, batches that shrink and recorded cycles then treat it as they treat the others.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from smc_compile.runtime.state.region_types import EosIds, State, is_eos
from smc_compile.runtime.state.request import Request

ENDLESS = 2**40  # the length of a sequence that has not ended


class Texts(NamedTuple):
    """Generated tokens, row by row. Cycles write them in place; nothing past the generated ones is ever read."""

    tokens: Tensor  # [R, capacity]
    log_p: Tensor  # [R, capacity] float64, log-probabilities of the tokens under the target


class Particles(NamedTuple):
    """What each particle carries besides its text and its caches."""

    ended: Tensor  # [R] bool: an end of sequence lies before the pending token
    stopped: Tensor  # [R] bool: the text ends with the pending token for another reason than its token
    length: Tensor  # [R], tokens up to and with the end; ENDLESS before it
    automaton: Tensor  # [R] int64, the state of an automaton or a guide behind the pending token; 0 without one
    critic: Tensor  # [R] float64, the log weight that a critic has given the text; 0 without one

    @classmethod
    def unconditioned(cls, ended: Tensor, length: Tensor) -> Particles:
        """Texts [R] that nothing but a token or their budget ends."""
        none = torch.zeros_like(length)
        return cls(ended, torch.zeros_like(ended), length, none, none.double())


class Weights(NamedTuple):
    """What each request carries about its N particles."""

    log_w: Tensor  # [B, N] float64, log weights since the last resampling
    log_evidence: Tensor  # [B] float64, what resamplings have added to the log evidence
    shared: Tensor  # [B, N, N], leading slots of their caches that two particles have in common
    dropped: Tensor  # [B], blocks that were dropped because every particle would have died of them


class CycleState(NamedTuple):
    """Everything that a cycle reads and the next one needs.

    The last of the ``generated`` tokens of a row is pending: no cache holds it yet. It is token number
    ``generated - 1``, counted from 0. Rows of one request have as many tokens; requests advance by themselves.
    """

    texts: Texts
    particles: Particles
    weights: Weights
    target: State  # the target's caches, R rows
    draft: State  # the draft's caches, R rows
    generated: Tensor  # [B] int64, tokens of each row of a request

    @classmethod
    def start(cls, request: Request, n: int, capacity: int, target: State, draft: State) -> CycleState:
        """Particles with room for ``capacity`` tokens, the first of which the caller fills in."""
        rows, batch, device = request.batch * n, request.batch, request.ids.device
        never = torch.zeros(rows, dtype=torch.bool, device=device)
        return cls(
            Texts(
                tokens=request.pad.repeat_interleave(n)[:, None].repeat(1, capacity),
                log_p=torch.zeros(rows, capacity, dtype=torch.float64, device=device),
            ),
            Particles(
                ended=never,
                stopped=never.clone(),
                length=torch.full((rows,), ENDLESS, device=device),
                automaton=torch.zeros(rows, dtype=torch.int64, device=device),
                critic=torch.zeros(rows, dtype=torch.float64, device=device),
            ),
            Weights(
                log_w=torch.zeros(batch, n, dtype=torch.float64, device=device),
                log_evidence=torch.zeros(batch, dtype=torch.float64, device=device),
                shared=torch.zeros(batch, n, n, dtype=torch.int64, device=device),
                dropped=torch.zeros(batch, dtype=torch.int64, device=device),
            ),
            target,
            draft,
            generated=torch.ones(batch, dtype=torch.int64, device=device),
        )

    @property
    def tensors(self) -> list[Tensor]:
        """All of them, in the same order for every state."""
        return [*self.texts, *self.particles, *self.weights, *self.target, *self.draft, self.generated]

    def write(self, other: CycleState) -> None:
        """Overwrite particles, weights and counts by those of ``other``, in place."""
        kept, after = (*self.particles, *self.weights), (*other.particles, *other.weights)
        for mine, theirs in zip((*kept, self.generated), (*after, other.generated), strict=True):
            mine.copy_(theirs)

    def take(self, requests: Tensor, rows: Tensor) -> CycleState:
        """The same of these requests and rows alone; their caches are the models' to take (``RuntimeModel.take``)."""
        return self._replace(
            texts=Texts(*(value[rows] for value in self.texts)),
            particles=Particles(*(value[rows] for value in self.particles)),
            weights=Weights(*(value[requests] for value in self.weights)),
            generated=self.generated[requests],
        )


# ---- texts: [R, capacity], in place ----------------------------------------------------------------------------------


def columns(first: Tensor, count: int, rows: int) -> Tensor:
    """``count`` columns from ``first`` [B] of its request on, for each of ``rows`` rows: [R, count]."""
    own = first[:, None] + torch.arange(count, device=first.device)
    return own.repeat_interleave(rows // len(first), 0)


def write_block(texts: Texts, tokens: Tensor, log_p: Tensor, generated: Tensor) -> None:
    """Write a block [R, T] behind the ``generated`` [B] tokens."""
    places = columns(generated, tokens.shape[1], len(tokens))
    for text, block in zip(texts, (tokens, log_p), strict=True):
        text.scatter_(1, places, block)


def pending(tokens: Tensor, generated: Tensor) -> Tensor:
    """The last of the ``generated`` [B] tokens of each row: [R, capacity] -> [R, 1]."""
    return tokens.gather(1, columns(generated - 1, 1, len(tokens)))


def move_texts(texts: Texts, source: Tensor) -> None:
    """Give every row the text of row ``source`` [R]. All are copied, so that no size depends on a value."""
    for text in texts:
        text.copy_(text.index_select(0, source))


def copy_texts(texts: Texts, rows: Tensor, source: Tensor) -> None:
    """Give ``rows`` [D] the texts of rows ``source`` [D]."""
    for text in texts:
        text[rows] = text[source]


# ---- what two particles have in common -------------------------------------------------------------------------------


def own_and_source(shared: Tensor, ancestors: Tensor) -> Tensor:
    """Slots [B, N] that each particle has in common with its ancestor [B, N]."""
    return shared.gather(2, ancestors[:, :, None])[:, :, 0]


def shared_after(shared: Tensor, ancestors: Tensor, used: Tensor) -> Tensor:
    """What particles have in common [B, N, N] once each goes on with its ancestor's caches, ``used`` [B] slots of
    them."""
    n = ancestors.shape[1]
    rows = shared.gather(1, ancestors[:, :, None].expand(-1, -1, n))
    pairs = rows.gather(2, ancestors[:, None, :].expand(-1, n, -1))
    return torch.where(ancestors[:, :, None] == ancestors[:, None, :], used[:, None, None], pairs)


# ---- where texts end -------------------------------------------------------------------------------------------------


def ends_within(length: Tensor, ended: Tensor, over: Tensor, generated: Tensor, width: Tensor) -> tuple[Tensor, Tensor]:
    """Lengths and ended [R] after the first ``width`` [R] of x_0 .. x_K.

    over: [R, K+1] bool, the text ends with x_k or before; generated: [R], the number of x_0, counted from 1.
    """
    kept = torch.arange(over.shape[1], device=over.device) < width[:, None]
    now = (over & kept).any(1)
    return torch.where(now & ~ended, generated + (~over & kept).sum(1), length), now | ended


def ends_at_pending(particles: Particles, pending: Tensor, eos_ids: EosIds, generated: Tensor) -> Tensor:
    """Lengths [R] that count an end at the pending token [R, 1], which is number ``generated`` [R] counted from 1."""
    at_end = is_eos(pending, eos_ids)[:, 0] | particles.stopped
    return torch.where(at_end & ~particles.ended, generated, particles.length)


def all_finished(lengths: Tensor, n: int, generated: Tensor, new_tokens: Tensor) -> Tensor:
    """[B] bool: all n rows of a request have ended, or its cap is reached. generated, new_tokens: [B]"""
    return (lengths < ENDLESS).view(-1, n).all(1) | (generated >= new_tokens)
