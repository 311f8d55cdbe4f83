"""``torch.compile(decode, backend="smc", options={...})`` on loops as they are written."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from helpers.enumeration import chi_square_p_value, sequence_distribution
from helpers.toys import TableLM
from torch import Tensor, nn

from smc_compile.program.from_loop import programs

V = 4
MODEL, DRAFT = TableLM(V), TableLM(V, seed=1)
IDS = torch.tensor([[0, 1, 2], [3, 2, 0]])
OPTIONS = {"draft": DRAFT, "compiler": "eager", "n_particles": 4, "lookahead": 2, "seed": 0, "validate": False}
untraced = pytest.mark.usefixtures("untraced_regions")
BIAS = torch.tensor([0.0, 1.0, -math.inf, 0.5])


@pytest.fixture(autouse=True)
def fresh_dynamo() -> None:
    torch._dynamo.reset()


# --- samplers: logits [B, V] -> token [B, 1], and the logits [..., V] of their distribution -----------------------


def keep_two(logits: Tensor) -> Tensor:
    return logits.masked_fill(logits < torch.topk(logits, 2).values[..., -1:], -math.inf)


def keep_nucleus(logits: Tensor) -> Tensor:
    ordered, index = torch.sort(logits, descending=True)
    probs = ordered.softmax(-1)
    over = probs.cumsum(-1) - probs > 0.6
    return logits.masked_fill(torch.zeros_like(over).scatter(-1, index, over), -math.inf)


def top_k(logits: Tensor) -> Tensor:
    return torch.multinomial(torch.softmax(keep_two(logits), -1), 1)


def top_p(logits: Tensor) -> Tensor:
    return torch.multinomial(torch.softmax(keep_nucleus(logits), -1), 1)


def top_p_sorted(logits: Tensor) -> Tensor:
    probs, index = torch.sort(torch.softmax(logits, -1), dim=-1, descending=True)
    probs = probs.masked_fill(probs.cumsum(-1) - probs > 0.6, 0.0)
    return torch.gather(index, -1, torch.multinomial(probs / probs.sum(-1, keepdim=True), 1))


def biased(logits: Tensor) -> Tensor:
    return torch.multinomial(torch.softmax(logits / 0.7 + BIAS, -1), 1)


def categorical(logits: Tensor) -> Tensor:
    return torch.distributions.Categorical(logits=logits / 0.7, validate_args=False).sample()[:, None]


def race(logits: Tensor) -> Tensor:
    probs = torch.softmax(logits / 0.7, -1)
    return torch.argmax(probs / torch.empty_like(probs).exponential_(1), dim=-1, keepdim=True)


def gumbel(logits: Tensor) -> Tensor:
    return (logits / 0.7 - torch.log(-torch.log(torch.rand_like(logits)))).argmax(-1, keepdim=True)


DISTRIBUTIONS: dict[Callable, Callable[[Tensor], Tensor]] = {
    top_k: keep_two,
    top_p: keep_nucleus,
    top_p_sorted: keep_nucleus,
    biased: lambda logits: logits / 0.7 + BIAS,
    categorical: lambda logits: logits / 0.7,
    race: lambda logits: logits / 0.7,
    gumbel: lambda logits: logits / 0.7,
}


def loop_with(sample: Callable[[Tensor], Tensor]) -> Callable[[nn.Module, Tensor, int], Tensor]:
    def decode(model, ids, n):
        for _ in range(n):
            ids = torch.cat([ids, sample(model(ids)[:, -1])], 1)
        return ids

    return decode


def assert_in_support(result: Tensor, prompt: Tensor, n: int, distribution: Callable[[Tensor], Tensor]) -> None:
    assert result.dtype == torch.int64
    assert result.shape == (prompt.shape[0], prompt.shape[1] + n)
    assert torch.equal(result[:, : prompt.shape[1]], prompt)
    logits = distribution(MODEL(result[:, :-1])[:, -n:])  # [B, n, V]
    assert torch.isfinite(logits.gather(-1, result[:, -n:, None])).all()


@pytest.mark.parametrize("sample", DISTRIBUTIONS)
@pytest.mark.parametrize("method", ["smc", "autoregressive"])
def test_tokens_lie_in_the_support_and_the_prompt_is_kept(sample, method, request):
    """The regions of the one-token loop compile each sampler; those of SMC run as they are written."""
    if method == "smc":
        request.getfixturevalue("untraced_regions")
    compiled = torch.compile(loop_with(sample), backend="smc", options={**OPTIONS, "method": method})
    ids = IDS.repeat(8, 1)
    assert_in_support(compiled(MODEL, ids, 5), ids, 5, DISTRIBUTIONS[sample])


@untraced
@pytest.mark.parametrize("sample", [top_p_sorted, biased])
def test_the_distribution_is_that_of_the_loop(sample):
    """Chi-square at level 1e-3."""
    options = {**OPTIONS, "method": "autoregressive"}
    ids = IDS[:1].expand(2**13, -1)
    result = torch.compile(loop_with(sample), backend="smc", options=options)(MODEL, ids, 3)
    distribution = sequence_distribution(MODEL, IDS[0], 3, V, process=DISTRIBUTIONS[sample])
    assert chi_square_p_value(result[:, 3:], distribution) > 1e-3
    assert chi_square_p_value(result[:, 3:], sequence_distribution(MODEL, IDS[0], 3, V)) < 1e-9


def test_lengths_and_prompts_share_one_program():
    """The iteration is the same for every n and prompt; only other weights and options make another program."""
    compiled = torch.compile(loop_with(race), backend="smc", options={**OPTIONS, "seed": 123})
    before = set(programs)
    for ids, n in [(IDS, 4), (IDS, 2), (IDS, 7), (IDS.repeat(1, 2), 4), (IDS[:, :2], 3), (IDS.flip(0), 4)]:
        assert_in_support(compiled(MODEL, ids, n), ids, n, DISTRIBUTIONS[race])
    assert len(set(programs) - before) == 1


def test_a_seed_reproduces_the_tokens():
    first, second, other = (
        torch.compile(loop_with(biased), backend="smc", options={**OPTIONS, "seed": seed})(MODEL, IDS, 12)
        for seed in (5, 5, 6)
    )
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


def test_one_iteration_is_no_loop_and_one_line_says_so(caplog):
    compiled = torch.compile(loop_with(top_k), backend="smc", options=OPTIONS)
    with caplog.at_level(logging.WARNING, "smc_compile.backend"):
        result = compiled(MODEL, IDS, 1)
    assert_in_support(result, IDS, 1, keep_two)
    (record,) = [r for r in caplog.records if r.name == "smc_compile.backend"]
    assert "no decode loop in this graph" in record.message


def test_a_model_as_closure_and_as_attribute():
    def closure(ids: Tensor, n: int) -> Tensor:
        return loop_with(biased)(MODEL, ids, n)

    class Speaker(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = MODEL

        def forward(self, ids: Tensor, n: int) -> Tensor:
            return loop_with(biased)(self.model, ids, n)

    by_closure = torch.compile(closure, backend="smc", options=OPTIONS)(IDS, 5)
    by_attribute = torch.compile(Speaker(), backend="smc", options=OPTIONS)(IDS, 5)
    assert_in_support(by_closure, IDS, 5, DISTRIBUTIONS[biased])
    assert torch.equal(by_closure, by_attribute)


@untraced
def test_a_bias_table_that_is_an_argument_is_read_at_every_call():
    def decode(model, ids, n, bias):
        for _ in range(n):
            probs = F.softmax(model(ids)[:, -1] + bias, -1)
            ids = torch.cat([ids, torch.multinomial(probs, 1)], 1)
        return ids

    compiled = torch.compile(decode, backend="smc", options=OPTIONS)
    for banned in range(3):
        bias = torch.zeros(V).index_fill(0, torch.tensor([banned]), -math.inf)
        assert (compiled(MODEL, IDS, 6, bias)[:, 3:] != banned).all()
