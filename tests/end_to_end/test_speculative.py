"""Speculative decoding by rejection is exact, whatever the draft: distributions against full enumeration, greedy loops
token for token; requests advance by different counts and do not depend on each other.

Seeds are fixed; the rate stated with a statistical test is that of a false alarm when the seed was chosen.
"""

from __future__ import annotations

import copy
import itertools
import math

import pytest
import torch
from helpers.enumeration import chi_square_p_value, sequence_distribution
from helpers.logits_processors import Applied, no_third, penalty
from helpers.model_parts import perturbed
from helpers.models import CACHEABLE
from helpers.replicates import drawn, replicate
from helpers.toys import GRUStep, TableLM, TinyTransformerLM
from torch import Tensor, nn

import smc_compile
from smc_compile import Generation, GenerationError, generate
from smc_compile.errors import OptionError
from smc_compile.runtime.state.suffix_sizes import FIRST

interpreted = pytest.mark.usefixtures("interpreted")

VOCAB = 3
PROMPT = torch.tensor([1, 0, 2])
PROMPTS = torch.tensor([[6, 6, 1, 0, 2], [3, 3, 4, 1, 5], [6, 6, 6, 6, 2], [6, 2, 1, 0, 4]])
LENGTHS = [3, 5, 1, 4]
MASK = torch.arange(5) >= 5 - torch.tensor(LENGTHS)[:, None]
OPTIONS = {"method": "speculative", "n_particles": 3, "lookahead": 2, "compiler": "eager", "validate": False, "seed": 7}


def table_pair(scale: float = 1.0) -> tuple[nn.Module, nn.Module]:
    target = TableLM(VOCAB).double()
    return target, perturbed(target, scale)


def transformer_pair(scale: float = 0.5) -> tuple[nn.Module, nn.Module]:
    target = TinyTransformerLM(VOCAB).double()
    return target, perturbed(target, scale)


def pair_of(kind: str, scale: float = 0.5, layers: int = 1) -> tuple[nn.Module, nn.Module]:
    target = CACHEABLE[kind](vocab=7, layers=layers).double()
    return target, perturbed(target, scale)


def run(pair, ids: Tensor = PROMPTS, n=12, **options) -> Generation:
    return generate(*pair, ids, max_new_tokens=n, **{**OPTIONS, **options})


# ---- the distribution ------------------------------------------------------------------------------------------------


def top_2(logits: Tensor) -> Tensor:
    return logits.masked_fill(logits < logits.topk(2).values[..., -1:], -math.inf)


CASES = {
    "K=1": {"lookahead": 1},
    "K=3, the cap in the middle of a block": {"lookahead": 3},
    "temperature": {"temperature": 0.7, "lookahead": 2},
    "end": {"eos_token_id": 1, "lookahead": 3},
    "end, K=1": {"eos_token_id": 2, "lookahead": 1},
    "top-k": {"top_k": 2, "lookahead": 2},
    "a very bad draft": {"scale": 4.0, "lookahead": 2},
    "transformer": {"pair": transformer_pair, "lookahead": 2},
    "transformer, end": {"pair": transformer_pair, "lookahead": 3, "eos_token_id": 0, "temperature": 0.8},
    "a rule, compiled": {"logits_processor": [penalty], "lookahead": 2},
    "a rule on the host, and an end": {"logits_processor": [no_third], "lookahead": 3, "eos_token_id": 1},
}


# Chains are many or one; eight where a bad draft makes them count.
CHAINS = [*((case, chains) for case in CASES for chains in (1, 4)), ("a very bad draft", 8), ("transformer, end", 8)]


@interpreted
@pytest.mark.parametrize(("case", "chains"), CHAINS)
def test_the_distribution_is_the_targets(case, chains):
    """Chi-square at level 1e-3 for each."""
    options = {**CASES[case]}
    target, draft = options.pop("pair", table_pair)(options.pop("scale", 1.0))
    text_processors = options.get("logits_processor", [])
    distribution = sequence_distribution(
        Applied(target, *text_processors) if text_processors else target,
        PROMPT,
        4,
        VOCAB,
        options.get("temperature", 1.0),
        options.get("eos_token_id"),
        top_2 if "top_k" in options else None,
    )
    g = replicate(target, draft, PROMPT, 4, 2**13, **{**OPTIONS, "n_particles": chains, "seed": 50000, **options})
    assert chi_square_p_value(drawn(g, distribution), distribution) > 1e-3
    assert g.particles.shape == (2**13, 1, 7)
    assert (g.log_weights == 0).all()
    assert (g.log_evidence == 0).all()
    assert 0 < g.stats.accepted < options["lookahead"]


@interpreted
def test_the_distribution_after_many_rejections():
    """What stands behind eight tokens of many cycles, where each wrote over what the one before lost. Chi-square at
    level 1e-3."""
    target, draft = transformer_pair(2.0)
    distribution = sequence_distribution(target, PROMPT, 8, VOCAB)
    g = replicate(target, draft, PROMPT, 8, 2**12, **{**OPTIONS, "n_particles": 2})
    assert g.stats.accepted < 1
    assert chi_square_p_value(drawn(g, distribution)[:, -3:], distribution.sum((0, 1, 2, 3, 4))) > 1e-3


@interpreted
def test_log_probs_are_the_targets_own():
    pair = pair_of("gpt")
    g = run(pair, temperature=0.7, n=10)
    own = (pair[0](g.sequences) / 0.7).log_softmax(-1)[:, 4:-1].gather(2, g.sequences[:, 5:, None])[..., 0]
    torch.testing.assert_close(g.log_probs, own, atol=1e-9, rtol=0)


# ---- greedy ----------------------------------------------------------------------------------------------------------


@interpreted
@pytest.mark.parametrize("scale", [0.0, 0.1, 0.5, 3.0])
@pytest.mark.parametrize("kind", ["gpt", "llama", "sliding_window"])
def test_greedy_is_the_greedy_loop(kind, scale):
    pair = pair_of(kind, scale)
    options = {"attention_mask": MASK, "n": [40, 7, 1, 23], "temperature": 0}
    for eos_ids in ([], [3]):
        loop = run(pair, method="autoregressive", eos_token_id=eos_ids, **options)
        g = run(pair, eos_token_id=eos_ids, **options)
        assert torch.equal(g.sequences, loop.sequences)
        assert torch.equal(g.new_lengths, loop.new_lengths)
        torch.testing.assert_close(g.log_probs, loop.log_probs, atol=1e-9, rtol=0)
        assert scale > 0.0 or g.stats.cycles < loop.stats.cycles


@interpreted
@pytest.mark.parametrize("scale", [0.1, 3.0])
def test_greedy_is_the_greedy_loop_beyond_the_first_slots(scale):
    """The suffixes grow while the requests stand at different places."""
    pair, options = pair_of("llama", scale), {"attention_mask": MASK, "n": [170, 135, 60, 7], "temperature": 0}
    assert min(options["n"][:2]) > FIRST
    loop, g = run(pair, method="autoregressive", **options), run(pair, lookahead=5, **options)
    assert torch.equal(g.sequences, loop.sequences)


def greedy_loop(model, ids: Tensor, n: int) -> Tensor:
    for _ in range(n):
        ids = torch.cat([ids, model(ids)[:, -1].argmax(-1, keepdim=True)], 1)
    return ids


@pytest.mark.usefixtures("untraced_regions")
def test_a_greedy_loop_uses_its_draft():
    target, draft = pair_of("llama", 0.1)
    options = {**OPTIONS, "draft": draft, "method": "smc"}
    compiled = smc_compile.decode(greedy_loop, **options)
    expected = greedy_loop(target, PROMPTS, 9)
    assert torch.equal(compiled(target, PROMPTS, 9), expected)
    assert compiled.last.stats.method == "speculative"
    assert compiled.last.stats.cycles < 8
    backend = torch.compile(lambda ids: greedy_loop(target, ids, 9), backend="smc", options=options)
    assert torch.equal(backend(PROMPTS), expected)
    report = smc_compile.explain(greedy_loop, target, PROMPTS, 9, **options)
    assert report.sections["method"][0].startswith("speculative (exact, the greedy text; ")
    assert torch.equal(run((target, draft), n=9, method="smc", temperature=0).sequences, expected)


@interpreted
def test_a_greedy_request_takes_its_draft_along_where_both_can_be_rolled_back():
    model, states = TinyTransformerLM(VOCAB), GRUStep(VOCAB)
    ids, options = PROMPT[None], {"method": "smc", "temperature": 0}
    for pair, method, why in [
        ((model, perturbed(model)), "speculative", "exact, the greedy text"),
        ((model, None), "autoregressive", "a greedy loop with a draft runs as exact speculation"),
        ((model, states), "autoregressive", "here of draft, cannot be rolled back"),
        ((states, model), "autoregressive", "here of target, cannot be rolled back"),
        ((states, states), "autoregressive", "here of target and draft, cannot be rolled back"),
    ]:
        loop = run((pair[0], None), ids, 9, **{**options, "method": "autoregressive"})
        g = run(pair, ids, 9, **options)
        assert torch.equal(g.sequences, loop.sequences)
        assert (g.stats.method, g.particles.shape[1]) == (method, 1)
        report = smc_compile.explain(generate, *pair, ids, max_new_tokens=9, **{**OPTIONS, **options})
        assert report.sections["method"][0].startswith(f"{method} (")
        assert why in report.sections["method"][0]
    with pytest.raises(OptionError, match='"speculative" cannot use this draft'):
        run((model, states), ids, 9, **{**options, "method": "speculative"})


# ---- the other ways in -----------------------------------------------------------------------------------------------


def sampled_loop(model, ids: Tensor, n: int) -> Tensor:
    for _ in range(n):
        ids = torch.cat([ids, torch.multinomial(torch.softmax(model(ids)[:, -1] / 0.8, -1), 1)], 1)
    return ids


@pytest.mark.usefixtures("untraced_regions")
def test_a_loop_draws_what_generate_draws():
    target, draft = pair_of("gpt")
    expected = run((target, draft), n=9, temperature=0.8).sequences
    options = {**OPTIONS, "draft": draft}
    assert torch.equal(smc_compile.decode(sampled_loop, **options)(target, PROMPTS, 9), expected)
    backend = torch.compile(lambda ids: sampled_loop(target, ids, 9), backend="smc", options=options)
    assert torch.equal(backend(PROMPTS), expected)


# ---- requests --------------------------------------------------------------------------------------------------------

EACH = {
    "temperature": [0.5, 1.0, 1.7, 0.9],
    "top_k": [0, 3, 0, 2],
    "top_p": [1.0, 0.8, 0.9, 1.0],
    "eos_token_id": [[1, 2], [], [0], [3, 6]],
    "pad_token_id": [0, 1, 2, 3],
}


def stop_after_two_equal(text: Tensor, scores: object = None) -> Tensor:
    return text[:, -1] == text[:, -2]


@interpreted
@pytest.mark.parametrize(
    "options",
    [
        {},
        EACH,
        {"logits_processor": [no_third]},
        {"logits_processor": [penalty]},
        {"stopping_criteria": [stop_after_two_equal]},
    ],
    ids=["plain", "settings", "rule on the host", "rule compiled", "stop"],
)
def test_a_request_in_a_padded_batch_is_the_request_alone(options):
    pair, caps = pair_of("llama"), [14, 5, 9, 1]
    together = run(pair, n=caps, attention_mask=MASK, **options)
    assert torch.equal(together.sequences[:, :5], PROMPTS)
    for b, length in enumerate(LENGTHS):
        own = {
            name: [value[b]] if isinstance(value[0], (int, float, list)) else value for name, value in options.items()
        }
        # A rule may look at two tokens: they stand in front of the shortest prompt too.
        padded = MASK[b : b + 1] if "logits_processor" in options else None
        ids = PROMPTS[b : b + 1] if padded is not None else PROMPTS[b : b + 1, 5 - length :]
        alone = run(pair, ids, caps[b], seed=7 + b, attention_mask=padded, **own)
        assert torch.equal(together.sequences[b, 5 : 5 + caps[b]], alone.sequences[0, ids.shape[1] :])
        assert torch.equal(together.new_lengths[b], alone.new_lengths[0])
        torch.testing.assert_close(together.log_probs[b, : caps[b]], alone.log_probs[0], atol=1e-9, rtol=0)
        assert (together.ess[b, : alone.stats.cycles] == 1).all()
        assert together.ess[b, alone.stats.cycles :].isnan().all()


@interpreted
def test_a_stop_ends_the_text_where_it_says():
    g = run(pair_of("gpt"), n=30, pad_token_id=0, stopping_criteria=[stop_after_two_equal])
    for sequence, length in zip(g.sequences, g.new_lengths.tolist(), strict=True):
        same = [int(t) for t in range(5, 5 + length) if sequence[t] == sequence[t - 1]]
        assert same == ([5 + length - 1] if length < 30 else same[:1])
        assert (sequence[5 + length :] == 0).all()
    assert (g.new_lengths < 30).any()


@interpreted
def test_a_seed_reproduces_the_result_and_others_do_not_matter():
    pair = pair_of("gpt")
    first = run(pair)
    assert torch.equal(first.sequences, run(pair).sequences)
    assert not torch.equal(first.sequences, run(pair, seed=8).sequences)
    run(pair, PROMPTS[:1], 3)  # batches may now shrink to one
    alone = run(pair, PROMPTS[:1], 20)
    assert torch.equal(run(pair, n=[20, 2, 3, 2]).sequences[0], alone.sequences[0])


# ---- the draft -------------------------------------------------------------------------------------------------------


@interpreted
@pytest.mark.parametrize(("chains", "lookahead"), [(1, 3), (4, 2), (2, 1)])
@pytest.mark.parametrize("settings", [{}, {"temperature": 0.6, "top_p": 0.8}, {"temperature": 0}], ids=str)
def test_a_draft_equal_to_the_target_is_always_accepted(chains, lookahead, settings):
    target, _ = pair_of("gpt")
    options = {"n_particles": chains, "lookahead": lookahead, **settings}
    g = run((target, copy.deepcopy(target)), n=1 + 3 * (lookahead + 1), **options)
    assert g.stats.accepted == lookahead
    assert g.stats.cycles == 3


@interpreted
def test_more_chains_accept_more():
    accepted = [run(pair_of("gpt", 1.0), n=40, n_particles=n, lookahead=4).stats.accepted for n in (1, 8)]
    assert accepted[1] > accepted[0] + 0.2


@interpreted
def test_a_model_with_a_state_of_its_own_is_refused():
    model, states = TinyTransformerLM(VOCAB), GRUStep()
    with pytest.raises(OptionError, match='"speculative" cannot use this draft'):
        run((model, states), PROMPT[None])
    with pytest.raises(OptionError, match='"speculative" cannot use this target'):
        run((states, model), PROMPT[None])
    with pytest.raises(OptionError, match='method "speculative" needs a draft'):
        run((model, None), PROMPT[None])


@interpreted
@pytest.mark.parametrize("who", ["target", "draft"])
def test_nan_breaks_off_with_the_partial_result(who):
    """Token 2 leads to NaN: what was made before is kept. The draft is not asked what follows its last token."""
    pair = [TableLM(VOCAB).double() for _ in range(2)]
    with torch.no_grad():
        pair[who == "draft"].table[2] = math.nan
    with pytest.raises(GenerationError, match=f"the {who}'s logits are NaN") as caught:
        run(pair, torch.tensor([[1]]), 40)
    partial = caught.value.partial
    generated = int(partial.new_lengths[0])
    assert 0 < generated < 40
    assert partial.log_probs[0, :generated].isfinite().all()
    assert who == "draft" or not (partial.sequences[0, 1:generated] == 2).any()


# ---- streaming, compilation ------------------------------------------------------------------------------------------


@interpreted
def test_what_is_accepted_is_settled_at_once():
    came: list[list[int]] = []
    g = run(pair_of("gpt"), PROMPTS[:1], 20, streamer=lambda p: came.append(p.tokens.tolist()))
    for shorter, longer in itertools.pairwise(came):
        assert longer[: len(shorter)] == shorter
    assert came[-1] == g.sequences[0, 5:].tolist()
    assert (g.lag == 0).all()
    assert len(came) == g.stats.cycles + 1


def test_nothing_recompiles_when_the_call_changes():
    pair = pair_of("gpt")
    program = run(pair, n=6, temperature=0.8, top_p=0.9, eos_token_id=2).program
    before = {region.name: region.compilations for region in program.regions}
    assert before == {"draft_head": 1, "draft_step": 1, "score": 1, "accept": 1, "conclude": 1}
    run(pair, n=[9, 13, 4, 8], temperature=[0.4, 1.0, 2.0, 3.0], top_p=[0.5, 1.0, 0.7, 0.2], seed=[1, 2, 3, 4])
    longer = torch.cat([PROMPTS, PROMPTS], 1)
    run(pair, longer, n=17, top_p=0.3, eos_token_id=[[1], [1, 2, 3], [], [0]], seed=9)
    assert run(pair, n=7, top_p=0.3, attention_mask=MASK).program is program
    assert {region.name: region.compilations for region in program.regions} == before
