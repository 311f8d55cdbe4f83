"""Loops whose sampler reads the text: their law by enumeration, greedy parity with eager mode, and what is refused.

Seeds are fixed; the rate stated with a statistical test is that of a false alarm when the seed was chosen.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.enumeration import chi_square_p_value, sequence_distribution
from helpers.model_parts import perturbed
from helpers.replicates import evidence_measure, z_scores
from helpers.toys import TableLM, TinyTransformerLM
from torch import Tensor, nn

from smc_compile import decode, explain
from smc_compile.errors import InputError, LoopError

pytestmark = pytest.mark.usefixtures("fresh_dynamo", "untraced_regions")
V = 5
QUICK: dict[str, Any] = {"compiler": "eager"}
MODEL = TinyTransformerLM(V).double()
TABLE = TableLM(V).double()
IDS = torch.tensor([[0, 1, 2], [3, 4, 1]])
PROMPT = torch.tensor([1, 0, 2])

Sampler = Callable[[Tensor, Tensor], Tensor]


def repeated_less(ids: Tensor, logits: Tensor) -> Tensor:
    score = logits.gather(1, ids)
    return logits.scatter(1, ids, torch.where(score < 0, score * 1.8, score / 1.8))


def counted(ids: Tensor, logits: Tensor) -> Tensor:
    counts = torch.zeros_like(logits).scatter_add(1, ids, torch.ones_like(ids, dtype=logits.dtype))
    return logits - 0.4 * counts


def never_twice(ids: Tensor, logits: Tensor) -> Tensor:
    return logits.scatter(1, ids[:, -1:], -math.inf)


def cut(logits: Tensor, k: int = 3) -> Tensor:
    return logits.masked_fill(logits < torch.topk(logits, k).values[:, -1:], -math.inf)


def loop_of(process: Sampler, pick: Callable[[Tensor], Tensor]) -> Callable[[nn.Module, Tensor, int], Tensor]:
    """A loop that draws from the logits [B, V] which ``process`` makes of the ids and the logits."""

    def loop(model, ids, n):
        for _ in range(n):
            ids = torch.cat([ids, pick(process(ids, model(ids)[:, -1]))], 1)
        return ids

    return loop


def draw(logits: Tensor) -> Tensor:
    return torch.multinomial(torch.softmax(logits, -1), 1)


def largest(logits: Tensor) -> Tensor:
    return logits.argmax(-1, keepdim=True)


def law(process: Sampler, n: int, model: nn.Module = TABLE) -> Tensor:
    """The distribution of n tokens after ``PROMPT``, each drawn in eager mode's way."""

    def processed(ids: Tensor) -> Tensor:
        logits = model(ids)
        return torch.cat([logits[:, :-1], process(ids, logits[:, -1])[:, None]], 1)

    return sequence_distribution(processed, PROMPT, n, V)


def assert_same_as_eager(loop: Callable[..., Any], *args: Any, **options: Any) -> Any:
    compiled = decode(loop, **QUICK, **options)
    with torch.no_grad():
        expected = loop(*args)
    assert torch.equal(compiled(*args), expected)
    return compiled


# ---- the law --------------------------------------------------------------------------------------------------------

LAWS = {
    "penalty, then temperature and top-k": lambda ids, logits: cut(repeated_less(ids, logits) / 0.8),
    "a ban of the last token": never_twice,
}


@pytest.mark.parametrize("name", LAWS)
def test_evidence_times_weight_is_unbiased(name):
    """E[Z] = 1 (4 standard errors, 6e-5) and E[Z w(x)] = p(x) (5.5 for each sequence, 3e-6), for 4096 requests.

    The draft is banned what the target is banned. What top-k alone removes is never returned.
    """
    distribution = law(LAWS[name], 3)
    options = {"draft": perturbed(TABLE, 0.5), "n_particles": 8, "lookahead": 2, "ess_threshold": 0.8, "seed": 0}
    compiled = decode(loop_of(LAWS[name], draw), **QUICK, **options)
    compiled(TABLE, PROMPT.expand(4096, -1), 3)
    g = compiled.last
    frequent = distribution.flatten() > 0.003
    sequences = z_scores(evidence_measure(g, distribution)[:, frequent], distribution.flatten()[frequent])
    print(f"{name}: z(evidence) {z_scores(g.log_evidence.exp(), 1.0):+.2f}, largest {sequences.abs().max():.2f}")
    assert g.stats.dropped == 0
    assert abs(z_scores(g.log_evidence.exp(), 1.0)) < 4
    assert sequences.abs().max() < 5.5
    assert (evidence_measure(g, distribution)[:, distribution.flatten() == 0] == 0).all()
    assert g.stats.rules == ["the sampler of the loop: compiled, on target and draft"]


def in_probabilities(ids: Tensor, logits: Tensor) -> Tensor:
    probs = torch.softmax(logits / 0.9, -1).scatter(1, ids[:, -1:], 0.0)
    return torch.multinomial(probs / probs.sum(-1, keepdim=True), 1)


@pytest.mark.parametrize("method", ["autoregressive", "speculative"])
def test_exact_methods_follow_a_sampler_of_probabilities(method):
    """Chi-square at level 1e-3."""
    distribution = law(lambda ids, logits: never_twice(ids, logits / 0.9), 3)
    loop = loop_of(lambda ids, logits: (ids, logits), lambda pair: in_probabilities(*pair))
    compiled = decode(loop, method=method, draft=perturbed(TABLE, 1.0), lookahead=2, n_particles=2, seed=0, **QUICK)
    texts = compiled(TABLE, PROMPT.expand(4096, -1), 3)
    assert chi_square_p_value(texts[:, len(PROMPT) :], distribution) > 1e-3


# ---- greedy loops ---------------------------------------------------------------------------------------------------


def test_one_prompt_in_one_axis():
    def loop(model, ids, n):  # ids: [P]
        for _ in range(n):
            logits = model(ids[None])[0, -1]
            score = logits[ids]
            logits = logits.index_put((ids,), torch.where(score < 0, score * 1.8, score / 1.8))
            ids = torch.cat([ids, logits.argmax(-1, keepdim=True)])
        return ids

    assert_same_as_eager(loop, MODEL, IDS[0], 9, draft=perturbed(MODEL, 0.5), lookahead=3)


def test_a_list_of_tokens_that_ends():
    def loop(model, ids, n, eos):  # ids: [1, P]
        for _ in range(n):
            token = largest(counted(ids, model(ids)[:, -1]))
            if token.item() == eos:
                break
            ids = torch.cat([ids, token], 1)
        return ids[0].tolist()

    compiled = decode(loop, **QUICK)
    for eos in (2, 4):
        assert compiled(TABLE, IDS[:1], 9, eos) == loop(TABLE, IDS[:1], 9, eos)


def test_prompts_of_any_length_and_the_last_tokens_alone():
    def last_three(ids: Tensor, logits: Tensor) -> Tensor:
        return repeated_less(ids[:, -3:], logits)

    compiled = decode(loop_of(last_three, largest), **QUICK)
    for length in (3, 8):
        ids = torch.arange(2 * length).view(2, length) * 3 % V
        assert torch.equal(compiled(TABLE, ids, 6), loop_of(last_three, largest)(TABLE, ids, 6))
    assert_same_as_eager(loop_of(never_twice, largest), TABLE, IDS[:, :1], 6)


def test_the_answer_alone():
    """Its beginning is a number of the trace: each length of the prompt has a step of its own."""

    def loop(model, ids, n):
        start = ids.shape[1]
        for _ in range(n):
            logits = never_twice(ids, model(ids)[:, -1])
            ids = torch.cat([ids, largest(repeated_less(ids[:, start:], logits))], 1)
        return ids

    compiled = decode(loop, **QUICK)
    for length in (3, 12):
        ids = torch.arange(2 * length).view(2, length) * 3 % V
        assert torch.equal(compiled(TABLE, ids, 6), loop(TABLE, ids, 6)), length
    assert_refused(loop, TABLE, IDS[:, :1], 6, match="too short to be told")  # it was traced with a longer one


def test_weights_of_the_sampler_may_change():
    def loop(model, ids, n, bias):
        for _ in range(n):
            ids = torch.cat([ids, largest(counted(ids, model(ids)[:, -1]) + bias)], 1)
        return ids

    compiled = decode(loop, **QUICK)
    for bias in torch.eye(V, dtype=torch.float64)[:3] * 4:
        assert torch.equal(compiled(TABLE, IDS, 6, bias), loop(TABLE, IDS, 6, bias))


def test_a_rule_on_the_window_that_the_model_reads():
    def loop(model, ids, n):
        for _ in range(n):
            shown = ids if ids.shape[1] <= 6 else ids[:, -6:]
            ids = torch.cat([ids, largest(counted(shown, model(shown)[:, -1]))], 1)
        return ids

    assert_same_as_eager(loop, MODEL, IDS, 8)


def test_a_preallocated_buffer_of_which_the_sampler_reads_the_text():
    def loop(model, ids, n):
        start = ids.shape[1]
        text = torch.cat([ids, ids.new_zeros(ids.shape[0], n)], 1)
        for i in range(n):
            filled = text[:, : start + i]
            text[:, start + i] = counted(filled, model(filled)[:, -1]).argmax(-1)
        return text

    assert_same_as_eager(loop, TABLE, IDS, 7)


def test_an_integer_argument_may_hold_no_part_of_the_prompt():
    """A prompt of one token is traced with one more, and other integers must stay as they are."""

    def loop(model, ids, n, banned):
        for _ in range(n):
            logits = model(ids)[:, -1] - 50.0 * nn.functional.one_hot(banned, V).sum(0)
            ids = torch.cat([ids, largest(never_twice(ids, logits))], 1)
        return ids

    assert_refused(loop, TABLE, IDS[:, :1], 5, torch.tensor([2]), match="too short to be told")
    assert_same_as_eager(loop, TABLE, IDS, 5, torch.tensor([2]))


def test_the_report_tells_of_it():
    found = explain(loop_of(repeated_less, largest), TABLE, IDS, 5, **QUICK)
    assert "the sampler of the loop: compiled" in str(found)


# ---- what is refused ------------------------------------------------------------------------------------------------


def assert_refused(
    loop: Callable[..., Any], *args: Any, match: str, error: type[Exception] = LoopError, **options: Any
):
    with pytest.raises(error, match=match):
        decode(loop, **QUICK, **options)(*args)


def test_rows_that_read_each_other_are_refused_in_a_batch_and_run_alone():
    def by_all(ids: Tensor, logits: Tensor) -> Tensor:
        counts = torch.zeros_like(logits).scatter_add(1, ids, torch.ones_like(ids, dtype=logits.dtype))
        return logits - 0.5 * counts.sum(0, keepdim=True)

    assert_refused(loop_of(by_all, largest), TABLE, IDS, 5, match="not for each request by itself")
    assert_same_as_eager(loop_of(by_all, largest), TABLE, IDS[:1], 5)


def test_a_penalty_of_its_own_for_each_request_is_refused():
    def loop(model, ids, n, strength):
        for _ in range(n):
            counts = torch.zeros_like(model(ids)[:, -1]).scatter_add(1, ids, torch.ones(ids.shape).double())
            ids = torch.cat([ids, largest(model(ids)[:, -1] - strength * counts)], 1)
        return ids

    strength = torch.tensor([[0.5], [0.9]], dtype=torch.float64)
    assert_refused(loop, TABLE, IDS, 5, strength, match="a value of its own for each request")


def test_top_k_before_the_penalty_is_refused_for_particles_and_runs_exactly():
    def before(ids: Tensor, logits: Tensor) -> Tensor:
        return repeated_less(ids, cut(logits))

    loop = loop_of(before, draw)
    nearly = loop_of(lambda ids, x: repeated_less(ids, x.where(x.softmax(-1) > 0.1, -1e9)), draw)
    for sampler in (loop, nearly):
        assert_refused(sampler, TABLE, IDS, 5, draft=perturbed(TABLE, 1.0), match="removes tokens by their logits")
    compiled = decode(loop, method="autoregressive", seed=0, **QUICK)
    texts = compiled(TABLE, PROMPT.expand(4096, -1), 2)[:, len(PROMPT) :]
    assert chi_square_p_value(texts, law(before, 2)) > 1e-3


def test_a_sampler_that_reads_several_positions_of_the_model_is_refused():
    def loop(model, ids, n):
        for _ in range(n):
            logits = model(ids)
            score = logits.mean(1).gather(1, ids)
            ids = torch.cat([ids, largest(logits[:, -1].scatter(1, ids, score))], 1)
        return ids

    assert_refused(loop, TABLE, IDS, 5, match="sampler reads the tokens")


def test_padding_is_not_penalised():
    """A sampler that would see the padding of a buffer is refused."""

    def loop(model, ids, n):
        start = ids.shape[1]
        text = torch.cat([ids, ids.new_zeros(ids.shape[0], n)], 1)
        for i in range(n):
            logits = counted(text, model(text)[:, start + i - 1])
            text[:, start + i] = logits.argmax(-1)
        return text

    assert_refused(loop, TABLE, IDS, 7, match="depend on the padding")


def test_a_part_of_the_text_that_is_not_its_end_is_refused():
    def of_prompt(model, ids, n):
        prompt = ids
        for _ in range(n):
            ids = torch.cat([ids, largest(repeated_less(prompt, model(ids)[:, -1]))], 1)
        return ids

    assert_refused(of_prompt, TABLE, IDS, 5, match="reads tokens other than|does not read the whole")


def test_a_draft_with_fewer_rows_is_refused():
    wide = TableLM(300).double()
    draft = TableLM(299).double()
    assert_refused(
        loop_of(repeated_less, draw), wide, IDS, 5, draft=draft, error=InputError, match="fewer rows of logits",
    )  # fmt: skip
