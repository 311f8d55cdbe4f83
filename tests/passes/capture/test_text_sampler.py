"""Where a sampler that reads the text is cut off its model, and that rows are proved to be apart."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from helpers.toys import TinyTransformerLM
from torch import Tensor, nn

from smc_compile.errors import LoopError
from smc_compile.passes.capture.row_code import check_rows
from smc_compile.passes.capture.sampler import match_sampler
from smc_compile.passes.capture.text_sampler import TextSampler, check_groups, split_sampler
from smc_compile.passes.ir import CausalLM
from smc_compile.passes.pipeline import capture

V = 7  # as many as TRACE_LENGTH: a length that was compared with it would become a number
MODEL = TinyTransformerLM(V).double()


class Step(nn.Module):
    """One iteration: ``sample(ids, logits [B, S, V]) -> token [B, 1]``."""

    def __init__(self, sample: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.model, self.sample = MODEL, sample

    def forward(self, ids: Tensor) -> Tensor:
        return self.sample(ids, self.model(ids))


def split(sample: Callable[[Tensor, Tensor], Tensor], batch: int = 2) -> tuple[CausalLM, TextSampler, list[Tensor]]:
    lm, owned = capture(Step(sample), torch.zeros(batch, 2, dtype=torch.int64))
    found = split_sampler(*match_sampler(lm))
    assert found is not None
    return *found, owned()


def penalised(ids: Tensor, logits: Tensor) -> Tensor:
    score = logits.gather(1, ids)
    return logits.scatter(1, ids, torch.where(score < 0, score * 1.5, score / 1.5))


def drawn(logits: Tensor) -> Tensor:
    return torch.multinomial(torch.softmax(logits, -1), 1)


def test_the_parts_are_the_whole():
    """The model, what reads the text and what is behind it, one after the other on other numbers of rows."""

    def rows(ids: Tensor, logits: Tensor) -> Tensor:
        kept = penalised(ids, logits[:, -1] * 0.5) / 0.7
        return kept.masked_fill(kept < kept.topk(3).values[:, -1:], -torch.inf)

    lm, text, weights = split(lambda ids, logits: drawn(rows(ids, logits)))
    assert (text.probs, text.temperature) == (False, 0.7)
    assert "scatter" in text.where or "gather" in text.where
    ids = torch.randint(V, (5, 9), generator=torch.Generator().manual_seed(0))
    logits = lm.graph_module(*lm.arguments(ids[:2], weights))[0]
    torch.testing.assert_close(logits, MODEL(ids[:2])[:, -1])
    scores = text.reading((ids, MODEL(ids)[:, -1]), text.reading.of(weights))
    torch.testing.assert_close(text.behind((scores,), text.behind.of(weights)), rows(ids, MODEL(ids)))
    check_groups(text.reading, weights, texts=True)


def test_probabilities_are_known_as_such():
    _, text, _ = split(lambda ids, x: torch.multinomial(torch.softmax(x[:, -1] / 0.7, -1).scatter(1, ids, 0.1), 1))
    assert text.probs
    assert text.behind is None
    assert text.temperature == 1.0


def test_a_sampler_that_reads_no_text_is_not_split():
    lm, _ = capture(Step(lambda ids, logits: drawn(logits[:, -1])), torch.zeros(2, 2, dtype=torch.int64))
    assert split_sampler(*match_sampler(lm)) is None


def test_counts_by_bins_and_one_row_have_rows():
    def sample(ids: Tensor, logits: Tensor) -> Tensor:
        return (logits[0, -1] - 0.5 * torch.bincount(ids[0], minlength=V)).argmax(-1)[None, None]

    _, text, weights = split(sample, batch=1)
    ids = torch.randint(V, (3, 8), generator=torch.Generator().manual_seed(0))
    expected = torch.stack([torch.bincount(row, minlength=V) for row in ids]) * -0.5
    actual = text.reading((ids, torch.zeros(3, V, dtype=torch.float64)), text.reading.of(weights))
    torch.testing.assert_close(actual, expected.double())


@pytest.mark.parametrize(
    "process",
    [
        lambda ids, logits: penalised(ids, logits) - penalised(ids, logits).mean(),
        lambda ids, logits: penalised(ids.flip(0), logits),
        lambda ids, logits: torch.where((ids == 3).any(), penalised(ids, logits), logits),
    ],
)
def test_rows_that_mix_are_refused(process):
    with pytest.raises(LoopError, match="not for each request by itself"):
        split(lambda ids, logits: drawn(process(ids, logits[:, -1])))
    _, text, _ = split(lambda ids, logits: drawn(process(ids, logits[:, -1])), batch=1)
    check_rows(text.reading)  # alone it is right


def test_rows_that_are_treated_apart_are_refused():
    def process(ids: Tensor, logits: Tensor) -> Tensor:
        return penalised(ids, logits) * torch.arange(1, 3)[:, None]

    _, text, weights = split(lambda ids, logits: drawn(process(ids, logits[:, -1])))
    part = text.reading if text.behind is None else text.behind
    with pytest.raises(LoopError, match="in another order"):
        check_groups(part, weights, texts=part is text.reading)


@pytest.mark.parametrize(
    "sample",
    [
        lambda ids, logits: penalised(ids, logits[:, -1]) + logits[:, 0],
        lambda ids, logits: penalised(ids, logits[:, -1]) + logits.amax(1).gather(1, ids[:, -1:]),
        lambda ids, logits: penalised(ids, logits[:, -1]) @ torch.eye(V).double(),
    ],
)
def test_more_than_a_rule_is_refused(sample):
    with pytest.raises(LoopError, match="sampler reads the tokens"):
        split(lambda ids, logits: drawn(sample(ids, logits)))
