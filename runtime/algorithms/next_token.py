"""From a model's rows to the distribution of the next token: what is compiled into a region, between logits and draw."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from smc_compile.kernels.thresholds import kth_largest, least_of_mass

# (scores [R, V], settings {name: [R, 1]}) -> scores [R, V]
Warper = Callable[[Tensor, Mapping[str, Tensor]], Tensor]


@dataclass(frozen=True)
class NextTokenDistribution:
    """The distribution of the next token: what the model's rows are, and what is still to be done to them.

    Attributes:
        kind: "logits", "probs" (unnormalised probabilities) or "greedy" (the largest logit).
        temperature: divides the logits of every request.
        stages: tensor code on the scores, in order; it may read the settings of each request.
        vocab: rows past so many are padding that no tokenizer makes: they are cut off. None keeps all.
    """

    kind: str
    temperature: float = 1.0
    warpers: tuple[Warper, ...] = ()
    vocab: int | None = None

    def scores(self, rows: Tensor) -> Tensor:
        """Rows without padding of the vocabulary, float32 at least."""
        rows = rows if self.vocab is None else rows[..., : self.vocab]
        return rows.to(torch.promote_types(rows.dtype, torch.float32))

    def log_probs(self, rows: Tensor, settings: Mapping[str, Tensor]) -> Tensor:
        """Normalised log-probabilities [R, V] of rows [R, V], float32 at least; settings are [R, 1]."""
        if self.kind == "probs":
            rows = self.scores(rows)
            return rows.log() - rows.sum(-1, keepdim=True).log()
        return torch.log_softmax(self.staged(rows, settings), -1)

    def staged(self, rows: Tensor, settings: Mapping[str, Tensor]) -> Tensor:
        """Scores of which the distribution is the softmax, or of which the largest is taken. As of ``log_probs``."""
        rows = self.scores(rows)
        if self.temperature != 1.0:
            rows = rows / self.temperature
        for warper in self.warpers:
            rows = warper(rows, settings)
        return rows

    def at_try(self, settings: Mapping[str, Tensor], tries: Tensor) -> Mapping[str, Tensor]:
        """Settings [R] for a cycle that is drawn for the ``tries``-th time [R]: the same each time."""
        return settings

    def cut(self, vocab: int | None) -> NextTokenDistribution:
        """The same distribution of a vocabulary of so many tokens."""
        return replace(self, vocab=vocab)


@dataclass(frozen=True)
class Mixture:
    """A proposal that follows ``distribution`` without losing what ``wide`` reaches (defensive mixture: Hesterberg, 1995).

    A draft that does not truncate where the target does proposes tokens of weight zero; one that only truncates cannot
    reach what the target's truncation keeps and its own does not. Weights are at most 1/share times those of ``wide``.
    Where ``distribution`` leaves nothing, ``wide`` stands alone. A setting ``wide`` in (0, 1] takes the place of the share.
    """

    distribution: NextTokenDistribution
    wide: NextTokenDistribution
    share: float  # of ``wide``; with 0 it only stands in where ``distribution`` leaves nothing

    @property
    def kind(self) -> str:
        return self.wide.kind

    def scores(self, rows: Tensor) -> Tensor:
        """As of a Distribution."""
        return self.wide.scores(rows)

    def log_probs(self, rows: Tensor, settings: Mapping[str, Tensor]) -> Tensor:
        """As of a Distribution."""
        narrow, wide = self.distribution.log_probs(rows, settings), self.wide.log_probs(rows, settings)
        share = settings["wide"].to(wide.dtype) if "wide" in settings else wide.new_tensor(self.share)
        mixed = torch.logaddexp(narrow + torch.log1p(-share), wide + share.log())
        return torch.where(broken(narrow)[..., None], wide, mixed)

    def at_try(self, settings: Mapping[str, Tensor], tries: Tensor) -> Mapping[str, Tensor]:
        """As of a Distribution; the share of ``wide`` grows with each try, and is soon all."""
        return {**settings, "wide": self.wider(tries)}

    def wider(self, tries: Tensor) -> Tensor:
        """The share of ``wide`` in the ``tries``-th try. [R] -> [R]"""
        return (self.share * 4.0 ** (tries - 1)).clamp(max=1.0)

    def cut(self, vocab: int | None) -> Mixture:
        """As of a Distribution."""
        return replace(self, distribution=self.distribution.cut(vocab), wide=self.wide.cut(vocab))


def broken(log_probs: Tensor) -> Tensor:
    """Rows [...] whose distribution is undefined: NaN anywhere (an infinite or NaN logit gives that)."""
    return log_probs.isnan().any(-1)


def pick(log_probs: Tensor, token: Tensor) -> Tensor:
    """log-probability of the chosen token: [..., V], [...] -> [...]"""
    return log_probs.gather(-1, token[..., None])[..., 0]


# ---- stages that read settings: the definitions are those of transformers' warpers of the same names -----------------


def temperature(scores: Tensor, at: Mapping[str, Tensor]) -> Tensor:
    """Divide by ``temperature`` > 0."""
    return scores / at["temperature"].to(scores.dtype)


def top_k(scores: Tensor, at: Mapping[str, Tensor]) -> Tensor:
    """Keep what is not below the ``top_k``-th largest score; 0 keeps all (Fan, Lewis and Dauphin, 2018)."""
    k = at["top_k"]
    return scores.masked_fill((scores < kth_largest(scores, k)) & (k > 0), -torch.inf)


def top_p(scores: Tensor, at: Mapping[str, Tensor]) -> Tensor:
    """Keep the fewest likeliest tokens that hold ``top_p`` of the mass, with all that are as likely as the last of
    them; 1 keeps all (Holtzman et al., 2020)."""
    p, probs = at["top_p"], torch.softmax(scores, -1)
    return scores.masked_fill((probs < least_of_mass(probs, p)) & (p < 1), -torch.inf)


def min_p(scores: Tensor, at: Mapping[str, Tensor]) -> Tensor:
    """Keep tokens at least ``min_p`` times as likely as the likeliest; 0 keeps all (Nguyen et al., 2024)."""
    probs = torch.softmax(scores, -1)
    return scores.masked_fill(probs < at["min_p"].to(scores.dtype) * probs.amax(-1, keepdim=True), -torch.inf)


SETTINGS: dict[str, tuple[Warper, float]] = {  # in the order in which they apply, with the value that changes nothing
    "temperature": (temperature, 1.0),
    "top_k": (top_k, 0),
    "top_p": (top_p, 1.0),
    "min_p": (min_p, 0.0),
}
