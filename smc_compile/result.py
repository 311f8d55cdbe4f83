"""What a generation returns."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor


@dataclass
class Stats:
    """Where the time of one generation went; seconds are wall-clock, without compilation unless named."""

    method: str
    new_tokens: int  # the longest request's
    n_particles: int = 1  # N as given or chosen; 1 in a one-token loop
    lookahead: int = 0  # K as given or chosen; 0 in a one-token loop
    cycles: int = 0
    replayed: int = 0  # cycles that ran as one recorded graph; the seconds of their parts are not known
    resamplings: int = 0  # (request, cycle) pairs whose population was resampled
    cuts: int = 0  # (request, cycle) pairs whose block was cut where target and draft part
    dropped: int = 0  # (request, cycle) pairs whose block was dropped: every particle would have had weight zero
    settled_early: int = 0  # (request, cycle) pairs in which ``max_lag`` drew an ancestor
    switches: int = 0  # "auto": changes between SMC and exact speculation
    exact_cycles: int = 0  # "auto": cycles of exact speculation
    accepted: float = 0.0  # speculative: drafted tokens that became text, per (request, cycle) pair; K at most
    seconds: float = 0.0
    compile_seconds: float = 0.0
    prefill_seconds: float = 0.0
    draft_seconds: float = 0.0
    score_seconds: float = 0.0
    resample_seconds: float = 0.0
    rules_seconds: float = 0.0  # text processors and stopping criteria
    warnings: list[str] = field(default_factory=list)
    potentials: list[str] = field(default_factory=list)  # names of what the texts are conditioned on, one a request
    tables: list[str] = field(default_factory=list)  # of these, and how large they are
    rules: list[str] = field(default_factory=list)  # text processors, and where each runs

    @property
    def host_seconds(self) -> float:
        """What is left of ``seconds`` outside the compiled regions."""
        spent = self.prefill_seconds + self.draft_seconds + self.score_seconds + self.resample_seconds
        return max(0.0, self.seconds - spent - self.rules_seconds)


@dataclass(frozen=True)
class Generation:
    """The answer of one generation. B requests, N particles, P prompt tokens, n new tokens, C cycles.

    Reads like the output of a transformers model too: ``out["sequences"]``, ``out[0]``, ``out.keys()``,
    ``out.to_tuple()``.

    Attributes:
        sequences: [B, P+n] int64, one particle per request drawn in proportion to its weight.
        particles: [B, N, P+n] int64.
        log_weights: [B, N], unnormalised, since the last resampling.
        log_evidence: [B], log of an estimate of the evidence: unbiased but where a block was ``dropped``, which
            overestimates. The evidence is 1, or with a potential the mass that the target gives to texts that fit;
            -inf where every particle has died.
        dropped: [B] int64, blocks of which every particle would have died; nothing of them was kept.
        ess: [B, C], effective sample size at the end of each cycle, before resampling; NaN in the cycles after a
            request finished.
        widths: [B, C] int64, tokens that each cycle added to every particle of a request: K+1, or fewer where a block
            was cut; 0 in the cycles after a request finished.
        ancestors: [B, C, N] int64, the particle each particle descends from at each cycle (identity: no resampling).
        log_probs: [B, n] float64, log-probability in nats of each new token of ``sequences`` under the target's
            distribution (after temperature, truncation and text processors); 0 after the end.
        new_lengths: [B] int64, new tokens of ``sequences`` up to and with the one that ends it.
        particle_log_probs: [B, N, n], as ``log_probs``.
        particle_lengths: [B, N], as ``new_lengths``.
        logits, scores: [B, V] for each new token of ``sequences``, before and after processors; only where asked for.
        lag: [B, C] int64, tokens at the end of each cycle on which the particles did not agree yet; only when the
            generation was streamed, else [B, 0].
    """

    sequences: Tensor
    particles: Tensor
    log_weights: Tensor
    log_evidence: Tensor
    dropped: Tensor
    ess: Tensor
    widths: Tensor
    ancestors: Tensor
    log_probs: Tensor
    new_lengths: Tensor
    particle_log_probs: Tensor
    particle_lengths: Tensor
    lag: Tensor
    stats: Stats
    logits: tuple[Tensor, ...] | None = None
    scores: tuple[Tensor, ...] | None = None
    _program: Callable[[], Any] | None = field(default=None, repr=False, compare=False)  # a weak reference

    @property
    def program(self) -> Any:
        """The program that answered; None once it is no longer kept. Copies and pickles do not know it."""
        return self._program() if self._program is not None else None

    @property
    def kl_bound(self) -> Tensor:
        """[B], nats: an estimate that bounds how far the law of ``sequences`` is from the target's.

        Its mean over runs is at least the Kullback-Leibler divergence of the one from the other. SMC draws from a law Q
        on all its random numbers; with the target in the place of one particle's text it is P, and dP / dQ is the
        estimated evidence Z. So KL(Q || P) = -E[log Z], and the text alone cannot be further off (Andrieu, Doucet and
        Holenstein, "Particle Markov chain Monte Carlo methods", 2010, has P). One run's value scatters, and may be
        negative. The exact methods have 0. It is NaN where a block was ``dropped``, and with
        a potential, whose evidence nobody knows: nothing bounds the divergence then.
        """
        unknown = (self.dropped > 0) | bool(self.stats.potentials)
        return torch.where(unknown, torch.nan, -self.log_evidence)

    @property
    def kl_bound_per_token(self) -> Tensor:
        """[B], ``kl_bound`` over the mean number of new tokens of the particles."""
        return self.kl_bound / self.particle_lengths.double().mean(1).clamp_min(1)

    @property
    def log_ml(self) -> Tensor:
        """[B], ``log_evidence`` under genlm-control's name."""
        return self.log_evidence

    def posterior(self, request: int = 0) -> dict[tuple[int, ...], float]:
        """What the particles of a request say of its law: new tokens, with the end, to probability, largest first.

        Empty where every particle has died.
        """
        width = self.particles.shape[2] - self.particle_log_probs.shape[2]
        found: dict[tuple[int, ...], float] = {}
        if self.log_evidence[request] == -torch.inf:
            return found
        weights, lengths = self.log_weights[request].softmax(-1).tolist(), self.particle_lengths[request].tolist()
        for particle, length, weight in zip(self.particles[request], lengths, weights, strict=True):
            text = tuple(particle[width : width + length].tolist())
            found[text] = found.get(text, 0.0) + weight
        return dict(sorted(found.items(), key=lambda item: -item[1]))

    def decoded_posterior(self, tokenizer: Any, request: int = 0) -> dict[str, float]:
        """``posterior`` by text, as ``tokenizer.decode`` has it: spellings of one text count together."""
        found: dict[str, float] = {}
        for tokens, weight in self.posterior(request).items():
            text = tokenizer.decode(list(tokens))
            found[text] = found.get(text, 0.0) + weight
        return dict(sorted(found.items(), key=lambda item: -item[1]))

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_program"}

    def keys(self) -> list[str]:
        return [f.name for f in fields(self) if f.name != "_program" and getattr(self, f.name) is not None]

    def values(self) -> list[Any]:
        return [getattr(self, name) for name in self.keys()]

    def items(self) -> list[tuple[str, Any]]:
        return list(zip(self.keys(), self.values(), strict=True))

    def to_tuple(self) -> tuple[Any, ...]:
        return tuple(self.values())

    def __getitem__(self, key: str | int | slice) -> Any:
        if isinstance(key, str):
            if key not in self.keys():
                raise KeyError(key)
            return getattr(self, key)
        return self.to_tuple()[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys())

    def __len__(self) -> int:
        return len(self.keys())

    def __contains__(self, key: object) -> bool:
        return key in self.keys()
