"""Samplers of loops that read the text, as a session runs them: a text processor, and a warper behind it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from smc_compile.errors import InputError, LoopError
from smc_compile.inputs.processor_trials import compiles
from smc_compile.passes.capture.row_code import RowCode
from smc_compile.passes.capture.text_sampler import TextSampler
from smc_compile.program.program import Program
from smc_compile.runtime.algorithms.next_token import NextTokenDistribution, Warper
from smc_compile.runtime.state.request import Rows, TextProcessor

BEYOND = 200  # deviations of random logits: their own differences are ten, or with a temperature of 0.05 this
SPREADS = {False: (1.0, 10.0, 100.0), True: (1.0, 5.0)}  # of random logits; a softmax of wider ones is 0 by rounding


@dataclass
class TextRule:
    """The reading half of a sampler, as a text processor.

    Attributes:
        probs: whether the code returns probabilities: their logarithms are the scores.
        window: how many tokens of a longer text it sees, the last ones; None for all.
        values: of the weights that it reads.
    """

    code: RowCode
    probs: bool
    window: int | None
    values: list[Tensor]
    name: str = "the sampler of the loop"

    def __call__(self, text: Tensor, scores: Tensor, rows: Rows) -> Tensor:
        text = text if self.window is None else text[:, -self.window :]
        result = self.code((text, scores), self.values).to(scores.dtype)
        return result.log() if self.probs else result


@dataclass
class BehindText:
    """The half of a sampler behind ``TextRule``, as a warper of the target's scores.

    Attributes:
        from_probs, to_probs: whether the code takes probabilities, and returns them.
        values: of the weights that it reads.
    """

    code: RowCode
    from_probs: bool
    to_probs: bool
    values: list[Tensor]
    __name__: str = "the sampler of the loop"

    def __call__(self, scores: Tensor, settings: Mapping[str, Tensor]) -> Tensor:
        result = self.code((scores.exp() if self.from_probs else scores,), self.values).to(scores.dtype)
        return result.log() if self.to_probs else result


@dataclass(frozen=True)
class RunSampler:
    """A sampler that reads the text, ready to run.

    Attributes:
        rule: what applies to target and draft.
        traced: whether it compiles; else it runs on the host.
        distribution, draft_distribution: of the next token, behind the rule.
        where: the op that reads the text, and its line.
    """

    rule: TextRule
    warper: BehindText | None
    traced: bool
    distribution: NextTokenDistribution
    draft_distribution: NextTokenDistribution
    where: str

    def take(self, weights: Sequence[Tensor]) -> None:
        """Read these weights from here on."""
        for part in (self.rule, self.warper):
            if part is not None:
                part.values[:] = part.code.of(weights)

    @property
    def on_host(self) -> tuple[TextProcessor, ...]:
        """What each request brings along."""
        return () if self.traced else (self.rule,)


def sampler_to_run(
    text: TextSampler,
    kind: str,
    weights: Sequence[Tensor],
    vocabulary: int,
    window: int | None,
) -> RunSampler:
    """The sampler of a loop whose rows are of a ``kind``, as ``Sampler`` has it; ``weights`` are all of its model."""
    greedy = kind == "greedy"
    rule = TextRule(text.reading, text.probs, window, text.reading.of(weights))
    warper = None
    if text.behind is not None:
        warper = BehindText(text.behind, text.probs, kind == "probs", text.behind.of(weights))
    warpers: tuple[Warper, ...] = () if warper is None else (warper,)
    distribution = NextTokenDistribution("greedy" if greedy else "logits", warpers=warpers)
    draft = distribution if greedy else NextTokenDistribution("logits", text.temperature)
    device = next((weight.device for weight in weights), torch.device("cpu"))
    return RunSampler(rule, warper, compiles((rule,), vocabulary, device), distribution, draft, text.where)


# ---- what does not fit -----------------------------------------------------------------------------------------------


def check_rule(sampler: RunSampler, program: Program) -> None:
    """Whether a program gives the law of its loop, whose sampler reads the text.

    Raises:
        InputError: the draft leaves tokens out that the rule was traced with.
        LoopError: particles would be drawn that the rule cut by the draft's logits.
    """
    target = program.target
    if target.distribution.vocab not in (None, target.vocab_size):
        raise InputError(
            "the draft has fewer rows of logits than the target, and the sampler reads the text",
            f"{target.distribution.vocab} and {target.vocab_size}: the sampler was traced with those of the target",
            'use a draft with as many rows, or method="autoregressive"',
        )
    if program.method in ("smc", "auto") and cuts_by_logits(sampler.rule, target.vocab_size or 0):
        raise LoopError(
            "The sampler removes tokens by their logits before it has read the text.",
            f"{sampler.where} comes behind it, and what reads the text applies to the draft too: a draft that "
            "truncates could not propose every token",
            'put top-k and top-p behind what reads the text; or pass method="speculative" or "autoregressive"',
        )


def cuts_by_logits(rule: TextRule, vocabulary: int) -> bool:
    """Whether a rule removes other tokens after the same texts where logits differ: tried on random ones."""
    generator = torch.Generator().manual_seed(0)
    device = next((value.device for value in rule.values), torch.device("cpu"))
    count = 4 * rule.code.batch
    for length in (9, 16):
        ids = torch.randint(vocabulary, (count, length), generator=generator).to(device)
        rows = Rows(*torch.zeros(2, count, dtype=torch.int64, device=device))
        for spread in SPREADS[rule.probs]:
            found = []
            for _ in range(2):
                logits = torch.randn(count, vocabulary, generator=generator, dtype=torch.float64) * spread
                scores = rule(ids, logits.to(device, rule.code.dtypes[1]), rows).double()
                found.append(scores < scores.amax(-1, keepdim=True) - BEYOND * spread)  # -inf, or what stands for it
            if not torch.equal(*found):
                return True
    return False
