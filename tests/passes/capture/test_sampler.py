"""Whatever a loop samples with, the cut graph must carry exactly the distribution of the user's own probabilities."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import pytest
import torch
import torch.nn.functional as F
from helpers.traces import Step, export, export_then, rows_of, tokens
from torch import Tensor

from smc_compile.errors import LoopError
from smc_compile.passes.cache.synthesize import synthesize_cache
from smc_compile.passes.capture.sampler import Sampler, match_sampler
from smc_compile.passes.ir import CausalLM
from smc_compile.passes.pipeline import capture
from smc_compile.passes.validate import validate
from smc_compile.runtime.algorithms.next_token import NextTokenDistribution

V, BATCH = 11, 2
BIAS = torch.linspace(-2.0, 2.0, V, dtype=torch.float64)

# ---- samplers: logits [B, V] -> (token, the probabilities that it was drawn with) ------------------------------------
Drawn = tuple[Tensor, Tensor]


def plain(logits: Tensor) -> Drawn:
    probs = torch.softmax(logits, -1)
    return torch.multinomial(probs, 1), probs


def temperature_div(logits: Tensor) -> Drawn:
    return plain(logits / 0.7)


def temperature_mul(logits: Tensor) -> Drawn:
    return plain(logits * 1.25)


def log_softmax_exp(logits: Tensor) -> Drawn:
    probs = F.log_softmax(logits / 0.5, -1).exp()
    return torch.multinomial(probs, 1)[:, 0], probs


def fixed_bias(logits: Tensor) -> Drawn:
    return plain(logits / 0.7 + BIAS)


def banned_token(logits: Tensor) -> Drawn:
    return plain(logits.masked_fill(torch.arange(V) == 3, float("-inf")))


def top_k(logits: Tensor) -> Drawn:
    logits = logits / 0.8
    kth = torch.topk(logits, 4).values[:, -1:]
    return plain(torch.where(logits < kth, float("-inf"), logits))


def top_p_scatter(logits: Tensor) -> Drawn:
    logits = logits / 0.9
    ordered, index = torch.sort(logits, descending=True)
    over = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1) > 0.7
    return plain(logits.masked_fill(over.scatter(-1, index, over), float("-inf")))


def min_p(logits: Tensor) -> Drawn:
    probs = torch.softmax(logits, -1)
    probs = torch.where(probs < 0.3 * probs.amax(-1, keepdim=True), 0.0, probs)
    return torch.multinomial(probs, 1), probs / probs.sum(-1, keepdim=True)


def unnormalised(logits: Tensor) -> Drawn:
    weights = torch.sigmoid(logits) * 3.0
    return torch.multinomial(weights, 1), weights / weights.sum(-1, keepdim=True)


def categorical(logits: Tensor) -> Drawn:
    distribution = torch.distributions.Categorical(logits=logits / 0.7, validate_args=False)
    return distribution.sample(), distribution.probs


def categorical_probs(logits: Tensor) -> Drawn:
    distribution = torch.distributions.Categorical(probs=logits.square(), validate_args=False)
    return distribution.sample(), distribution.probs


def race(logits: Tensor) -> Drawn:
    probs = torch.softmax(logits / 0.7, -1)
    return torch.argmax(probs / torch.empty_like(probs).exponential_(1), dim=-1, keepdim=True), probs


def race_of_weights(logits: Tensor) -> Drawn:
    weights = logits.square()
    noise = -torch.log1p(-torch.rand(weights.shape, dtype=weights.dtype))
    return (weights / noise).argmax(-1), weights / weights.sum(-1, keepdim=True)


def gumbel_of_uniform(logits: Tensor) -> Drawn:
    noise = -torch.log(-torch.log(torch.rand_like(logits)))
    return (logits / 0.7 + noise).argmax(-1), (logits / 0.7).softmax(-1)


def gumbel_of_uniform_clamped(logits: Tensor) -> Drawn:
    u = torch.empty_like(logits).uniform_().clamp(1e-9, 1 - 1e-9)
    return (logits - (-u.log()).log()).max(-1, keepdim=True)[1], logits.softmax(-1)


def gumbel_of_exponential(logits: Tensor) -> Drawn:
    noise = -torch.empty_like(logits).exponential_().log()
    return (noise + logits).argmax(-1), logits.softmax(-1)


def gumbel_subtracted(logits: Tensor) -> Drawn:
    noise = torch.empty(logits.shape, dtype=logits.dtype).exponential_().log()
    return torch.topk(torch.log_softmax(logits, -1) - noise, 1).indices, logits.softmax(-1)


def sorted_top_p(logits: Tensor) -> Drawn:
    probs = torch.softmax(logits / 0.9, -1)
    ordered, index = torch.sort(probs, descending=True)
    kept = torch.where(ordered.cumsum(-1) - ordered > 0.7, 0.0, ordered)
    kept = kept / kept.sum(-1, keepdim=True)
    return index.gather(-1, torch.multinomial(kept, 1)), torch.zeros_like(probs).scatter(-1, index, kept)


def sorted_top_p_argsort(logits: Tensor) -> Drawn:
    probs = torch.softmax(logits / 0.9, -1)
    index = probs.argsort(-1, descending=True)
    ordered = probs.gather(-1, index)
    kept = ordered.masked_fill(ordered.cumsum(-1) - ordered > 0.5, 0.0)
    token = torch.gather(index, 1, torch.multinomial(kept, 1)).squeeze(-1)
    kept = kept / kept.sum(-1, keepdim=True)
    return token, torch.zeros_like(probs).scatter(-1, index, kept)


def sorted_top_k(logits: Tensor) -> Drawn:
    values, index = torch.topk(logits / 0.8, 4)
    probs = values.softmax(-1)
    return index.gather(-1, torch.multinomial(probs, 1)), torch.zeros_like(logits).scatter(-1, index, probs)


def sorted_top_k_sliced(logits: Tensor) -> Drawn:
    values, index = torch.sort(logits / 0.8, dim=-1, descending=True)
    probs = values[:, :4].softmax(-1)
    token = index[:, :4].gather(-1, torch.multinomial(probs, 1))
    return token, torch.zeros_like(logits).scatter(-1, index[:, :4], probs)


def sorted_top_k_gumbel(logits: Tensor) -> Drawn:
    values, index = torch.topk(logits / 0.8, 4)
    rank = (values - torch.empty_like(values).exponential_().log()).argmax(-1, keepdim=True)
    return index.gather(-1, rank), torch.zeros_like(logits).scatter(-1, index, values.softmax(-1))


def sorted_top_k_then_top_p(logits: Tensor) -> Drawn:
    values, index = torch.topk(logits / 0.8, 6)
    ordered, rank = torch.sort(values.softmax(-1), descending=True)
    kept = torch.where(ordered.cumsum(-1) - ordered > 0.6, 0.0, ordered)
    kept = kept / kept.sum(-1, keepdim=True)
    token = index.gather(-1, rank.gather(-1, torch.multinomial(kept, 1)))
    return token, torch.zeros_like(logits).scatter(-1, index, torch.zeros_like(values).scatter(-1, rank, kept))


SAMPLERS: dict[Callable[[Tensor], Drawn], tuple[str, str, float]] = {  # kind, form, temperature
    plain: ("logits", "multinomial of softmax", 1.0),
    temperature_div: ("logits", "multinomial of softmax", 0.7),
    temperature_mul: ("logits", "multinomial of softmax", 0.8),
    log_softmax_exp: ("probs", "multinomial of probabilities", 0.5),
    fixed_bias: ("logits", "multinomial of softmax", 0.7),
    banned_token: ("logits", "multinomial of softmax", 1.0),
    top_k: ("logits", "multinomial of softmax", 0.8),
    top_p_scatter: ("logits", "multinomial of softmax", 0.9),
    min_p: ("probs", "multinomial of probabilities", 1.0),
    unnormalised: ("probs", "multinomial of probabilities", 1.0),
    categorical: ("logits", "multinomial of softmax", 0.7),
    categorical_probs: ("probs", "multinomial of probabilities", 1.0),
    race: ("logits", "exponential race", 0.7),
    race_of_weights: ("probs", "exponential race", 1.0),
    gumbel_of_uniform: ("logits", "Gumbel-max", 0.7),
    gumbel_of_uniform_clamped: ("logits", "Gumbel-max", 1.0),
    gumbel_of_exponential: ("logits", "Gumbel-max", 1.0),
    gumbel_subtracted: ("logits", "Gumbel-max", 1.0),
    sorted_top_p: ("probs", "multinomial of probabilities in sorted space", 0.9),
    sorted_top_p_argsort: ("probs", "multinomial of probabilities in sorted space", 0.9),
    sorted_top_k: ("logits", "multinomial of softmax in sorted space", 0.8),
    sorted_top_k_sliced: ("logits", "multinomial of softmax in sorted space", 0.8),
    sorted_top_k_gumbel: ("logits", "Gumbel-max in sorted space", 0.8),
    sorted_top_k_then_top_p: ("probs", "multinomial of probabilities in sorted space", 0.8),
}
samplers = pytest.mark.parametrize("sample", SAMPLERS, ids=lambda f: f.__name__)


def step(sample: Callable[[Tensor], Drawn], last: Callable[[Tensor], Tensor] = lambda x: x[:, -1]) -> Step:
    """A chain whose logits are looked up by the last token, and a draw."""
    return Step(lambda x: sample(last(x))[0], width=V)


@lru_cache
def matched(sample: Callable[[Tensor], Drawn]) -> tuple[CausalLM, Sampler, list[Tensor]]:
    lm, owned = capture(step(sample), torch.zeros(BATCH, 2, dtype=torch.long))
    return *match_sampler(lm), [w.detach() for w in owned()]


@samplers
def test_the_cut_graph_carries_the_distribution_of_the_users_probabilities(sample) -> None:
    cut, sampler, weights = matched(sample)
    ids, table = tokens(BATCH, 5), weights[0]
    rows = rows_of(cut, ids, weights)
    torch.testing.assert_close(
        NextTokenDistribution(sampler.kind).log_probs(rows, {}).exp(),
        sample(table[ids[:, -1]])[1],
        rtol=0,
        atol=1e-6,
        check_dtype=False,
    )
    assert rows.shape == (BATCH, V)


@samplers
def test_sampler_form_and_temperature_are_named(sample) -> None:
    sampler = matched(sample)[1]
    kind, form, temperature = SAMPLERS[sample]
    assert (sampler.kind, sampler.form) == (kind, form)
    assert sampler.temperature == pytest.approx(temperature)


@pytest.mark.parametrize("sample", [top_k, sorted_top_p, sorted_top_k_then_top_p], ids=lambda f: f.__name__)
def test_the_distribution_has_a_cached_form(sample) -> None:
    cut, _, weights = matched(sample)
    assert validate(cut, synthesize_cache(cut), weights) < 1e-12


def test_the_traced_graph_is_left_as_it_was() -> None:
    lm = export(step(sorted_top_p), BATCH)
    before = str(lm.graph)
    match_sampler(lm)
    assert str(lm.graph) == before


@pytest.mark.parametrize(
    "last", [lambda x: x[:, -1], lambda x: x[:, -1, :], lambda x: x[:, -1:], lambda x: x[:, -1:, :]]
)
def test_greedy_is_argmax_of_the_last_logits(last) -> None:
    module = Step(lambda x: last(x).argmax(-1), width=V)
    cut, sampler = match_sampler(export(module, BATCH))
    ids = tokens(BATCH, 5)
    assert sampler == Sampler("greedy", 1.0, "argmax (greedy)")
    assert torch.equal(rows_of(cut, ids, [module.embed]), module.embed[ids[:, -1]])


@pytest.mark.parametrize("pick", [lambda x: x.max(-1).indices, lambda x: x.topk(1).indices, lambda x: x.max(-1)[1]])
def test_greedy_is_also_written_with_max_and_topk(pick) -> None:
    cut, sampler = match_sampler(export_then(lambda x: pick(x[:, -1])))
    assert sampler.kind == "greedy"
    assert "select" in str(cut.graph.output_node().args[0][0])


def test_probabilities_of_a_kept_last_axis() -> None:
    """`[:, -1:]` keeps an axis of one; the distribution's rows have none."""
    module = Step(lambda x: (torch.softmax(x[:, -1:] / 0.7, -1)).view(-1, V).multinomial(1), width=V)
    cut, sampler = match_sampler(export(module, BATCH))
    ids = tokens(BATCH, 4)
    torch.testing.assert_close(rows_of(cut, ids, [module.embed]), module.embed[ids[:, -1]] / 0.7)
    assert (sampler.kind, sampler.temperature) == ("logits", 0.7)


def test_a_factor_inside_the_model_is_not_a_temperature() -> None:
    """A cap on the logits is the model's; the loop's temperature stands behind the last position."""
    lm = export_then(lambda x: torch.multinomial((torch.tanh(x / 3.0) * 3.0)[:, -1].softmax(-1), 1))
    assert match_sampler(lm)[1].temperature == 1.0


# ---- refused ---------------------------------------------------------------------------------------------------------

WRONG_NOISE = {
    "uniform instead of exponential": lambda x: (x.softmax(-1) / torch.rand_like(x)).argmax(-1),
    "a power of the exponential": lambda x: (x.softmax(-1) / torch.empty_like(x).exponential_().square()).argmax(-1),
    "scaled Gumbel": lambda x: (x - 0.5 * torch.log(-torch.log(torch.rand_like(x)))).argmax(-1),
    "normal instead of Gumbel": lambda x: (x + torch.randn_like(x)).argmax(-1),
    "Gumbel with the wrong sign": lambda x: (x + torch.empty_like(x).exponential_().log()).argmax(-1),
}


@pytest.mark.parametrize("sample", WRONG_NOISE.values(), ids=WRONG_NOISE)
def test_wrong_noise_is_refused_with_its_distance(sample) -> None:
    with pytest.raises(LoopError, match=r"(?s)noise of the loop's sampler is not .*Kolmogorov-Smirnov distance 0\.\d"):
        match_sampler(export_then(lambda x: sample(x[:, -1])))


REFUSED = {
    "several draws": (lambda x: torch.multinomial(x.softmax(-1), 3), "draws several tokens at once"),
    "several best": (lambda x: x.topk(3).indices, "draws several tokens at once"),
    "one number for the whole row": (
        lambda x: (x - torch.empty_like(x[:, :1]).exponential_().log()).argmax(-1),
        "not recognised",
    ),
    "noise that depends on the logits": (
        lambda x: (x + x * torch.rand_like(x)).argmax(-1),
        "not recognised",
    ),
    "normal_ noise, twice": (
        lambda x: (x + torch.empty_like(x).normal_() + torch.empty_like(x).normal_()).argmax(-1),
        "not recognised",
    ),
    "random probabilities": (
        lambda x: torch.multinomial((x + torch.randn_like(x)).softmax(-1), 1),
        "random themselves",
    ),
    "a sum of tokens": (lambda x: x.argmax(-1) + 1, "not recognised"),
    "argmin": (lambda x: x.argmin(-1), "not recognised"),
    "another axis": (lambda x: x.argmax(0), "not the vocabulary"),
    "a token looked up by rank in a table of the user": (
        lambda x: torch.arange(8).expand(2, 8).gather(-1, torch.multinomial(x.softmax(-1), 1)),
        "not recognised",
    ),
}


@pytest.mark.parametrize(("sample", "message"), REFUSED.values(), ids=REFUSED)
def test_unknown_draws_are_refused(sample, message) -> None:
    with pytest.raises(LoopError, match=message) as caught:
        match_sampler(export_then(lambda x: sample(x[:, -1])))
    assert "traces.py" in str(caught.value)  # the module's frame: non-strict export keeps no others
