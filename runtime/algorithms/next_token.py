"""From a model's logits to the distribution of the next token: tensor code that is compiled into the regions.

To add a sampler setting: write its warper here and name it in ``SETTINGS``, with its default; say what values it takes
in ``BOUNDS`` of ``smc_compile/inputs/requests.py``; add it to ``Sampling`` in
``smc_compile/inputs/sampler_settings.py`` and to the arguments and ``IN_CONFIG`` of ``smc_compile/generate.py``.
"""

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
    """How the rows [R, V] that a model gives become the distribution of the next token.

    Attributes:
        kind: what the rows are: "logits", "probs" (unnormalised probabilities), or "greedy" (logits of which the
            largest is taken).
        temperature: divides the logits of every request.
        warpers: applied to the scores in order; they may read the settings of each request.
        vocab: size of the vocabulary. Columns past it are padding, which no tokenizer produces: they are cut off. None
            keeps all.
    """

    kind: str
    temperature: float = 1.0
    warpers: tuple[Warper, ...] = ()
    vocab: int | None = None

    def scores(self, rows: Tensor) -> Tensor:
        """Rows [..., V] without the padding of the vocabulary, float32 at least."""
        rows = rows if self.vocab is None else rows[..., : self.vocab]
        return rows.to(torch.promote_types(rows.dtype, torch.float32))

    def log_probs(self, rows: Tensor, settings: Mapping[str, Tensor]) -> Tensor:
        """Normalised log-probabilities [R, V] of rows [R, V], float32 at least. settings: [R, 1] each."""
        if self.kind == "probs":
            rows = self.scores(rows)
            return rows.log() - rows.sum(-1, keepdim=True).log()
        return torch.log_softmax(self.warped(rows, settings), -1)

    def warped(self, rows: Tensor, settings: Mapping[str, Tensor]) -> Tensor:
        """Scores after temperature and warpers [R, V]: the distribution is their softmax, or greedy takes the largest.

        Arguments as for ``log_probs``.
        """
        rows = self.scores(rows)
        if self.temperature != 1.0:
            rows = rows / self.temperature
        for warper in self.warpers:
            rows = warper(rows, settings)
        return rows

    def cut(self, vocab: int | None) -> NextTokenDistribution:
        """The same for a vocabulary of ``vocab`` tokens."""
        return replace(self, vocab=vocab)


@dataclass(frozen=True)
class Mixture:
    """A proposal (1 - share) * distribution + share * wide: a defensive mixture (Hesterberg, 1995).

    ``distribution`` truncates as the target does: without that, a draft proposes tokens of weight zero. But its own
    truncation may drop tokens that the target keeps; ``wide`` still proposes those. Weights are at most 1/share times
    those under ``wide``. In rows where ``distribution`` is undefined, ``wide`` stands alone.
    """

    distribution: NextTokenDistribution
    wide: NextTokenDistribution
    share: float  # of ``wide``; with 0 it serves only rows in which ``distribution`` is undefined

    @property
    def kind(self) -> str:
        return self.wide.kind

    def scores(self, rows: Tensor) -> Tensor:
        """As of ``NextTokenDistribution``."""
        return self.wide.scores(rows)

    def log_probs(self, rows: Tensor, settings: Mapping[str, Tensor]) -> Tensor:
        """As of ``NextTokenDistribution``."""
        narrow, wide = self.distribution.log_probs(rows, settings), self.wide.log_probs(rows, settings)
        share = wide.new_tensor(self.share)
        mixed = torch.logaddexp(narrow + torch.log1p(-share), wide + share.log())
        return torch.where(broken(narrow)[..., None], wide, mixed)

    def cut(self, vocab: int | None) -> Mixture:
        """As of ``NextTokenDistribution``."""
        return replace(self, distribution=self.distribution.cut(vocab), wide=self.wide.cut(vocab))


def broken(log_probs: Tensor) -> Tensor:
    """Which rows of log-probabilities [..., V] hold a NaN, as after an infinite or NaN logit: [...] bool."""
    return log_probs.isnan().any(-1)


def pick(log_probs: Tensor, token: Tensor) -> Tensor:
    """Log-probability of the chosen token: [..., V], [...] -> [...]."""
    return log_probs.gather(-1, token[..., None])[..., 0]


# ---- warpers that read settings: defined as those of transformers with the same names --------------------------------


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
