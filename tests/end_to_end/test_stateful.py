"""Models that carry their own state through the explicit protocol, as target, as draft, and next to a cached one.

Seeds are fixed; the rate stated with a statistical test is that of a false alarm when the seed was chosen.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.enumeration import chi_square_p_value, sequence_distribution
from helpers.model_parts import perturbed
from helpers.replicates import (
    distance,
    drawn,
    evidence_measure,
    recorded_cycles,
    replicate,
    weighted_distribution,
    z_scores,
)
from helpers.toys import GRUStep, TinyTransformerLM
from torch import Tensor, nn

from smc_compile import generate
from smc_compile.errors import GenerationError, OptionError

pytestmark = pytest.mark.usefixtures("interpreted")

VOCAB = 3
PROMPT = torch.tensor([1, 0, 2])


class Counter:
    """Not a module, and a nested state with integers: the last two tokens and how many were seen choose the logits."""

    def __init__(self, seed: int = 0):
        generator = torch.Generator().manual_seed(seed)
        self.table = torch.randn(2, VOCAB, VOCAB, VOCAB, generator=generator, dtype=torch.float64)

    def initial_state(self, batch: int) -> tuple[Tensor, dict[str, Tensor]]:
        return torch.zeros(batch, dtype=torch.int64), {"last": torch.zeros(batch, dtype=torch.int64)}

    def step(self, tokens: Tensor, pos: Any, state: Any) -> tuple[Tensor, Any]:
        seen, last = state[0], state[1]["last"]
        logits = []
        for token in tokens.unbind(1):
            seen = seen + 1
            logits.append(self.table[seen % 2, last, token])
            last = token
        return torch.stack(logits, 1), (seen, {"last": last})

    def __call__(self, ids: Tensor) -> Tensor:
        return self.step(ids, 0, self.initial_state(ids.shape[0]))[0]


def gru(seed: int = 0) -> nn.Module:
    return GRUStep(VOCAB, seed=seed).double()


def transformer() -> nn.Module:
    return TinyTransformerLM(VOCAB, seed=3).double()


PAIRS = {
    "both": lambda: (gru(), perturbed(gru(), 0.3)),
    "target": lambda: (gru(), transformer()),
    "draft": lambda: (transformer(), gru()),
    "plain object": lambda: (Counter(), Counter(1)),
}


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("eos", [None, 0])
def test_evidence_times_weight_is_unbiased_for_every_sequence(pair, eos):
    """At N=4, resampled in every cycle: E[Z] = 1 (4 standard errors, 6e-5), E[Z w(x)] = p(x) (5.5 each, 3e-6)."""
    target, draft = PAIRS[pair]()
    distribution = sequence_distribution(target, PROMPT, 6, VOCAB, eos=eos)
    options = {"n_particles": 4, "lookahead": 1, "ess_threshold": 1.0, "eos_token_id": eos}
    g = replicate(target, draft, PROMPT, 6, 2**13, **options)
    evidence, frequent = z_scores(g.log_evidence.exp(), 1.0), distribution.flatten() > 0.003
    sequences = z_scores(evidence_measure(g, distribution)[:, frequent], distribution.flatten()[frequent])
    print(f"{pair}: z(evidence) {evidence:+.2f}, largest |z| of {frequent.sum()} sequences {sequences.abs().max():.2f}")
    assert abs(evidence) < 4
    assert sequences.abs().max() < 5.5
    assert g.stats.resamplings > 0


@pytest.mark.parametrize("pair", PAIRS)
def test_the_distribution_of_many_particles_is_the_target(pair):
    """Chi-square at level 1e-4; the bias left at N=64 is far below what 1024 runs can see. The draft would fail."""
    target, draft = PAIRS[pair]()
    distribution = sequence_distribution(target, PROMPT, 4, VOCAB)
    g = replicate(target, draft, PROMPT, 4, 2**10, n_particles=64, lookahead=2)
    print(
        f"{pair}: total variation of the weights {distance(weighted_distribution(g, distribution), distribution):.4f}"
    )
    assert chi_square_p_value(drawn(g, distribution), distribution) > 1e-4
    assert chi_square_p_value(drawn(g, distribution), sequence_distribution(draft, PROMPT, 4, VOCAB)) < 1e-9


@pytest.mark.parametrize("model", [gru(), Counter()])
def test_autoregressive_is_exact(model):
    """Chi-square at level 1e-3."""
    g = replicate(model, None, PROMPT, 5, 2**13, method="autoregressive", temperature=0.8, eos_token_id=2)
    distribution = sequence_distribution(model, PROMPT, 5, VOCAB, 0.8, eos=2)
    assert chi_square_p_value(drawn(g, distribution), distribution) > 1e-3


def test_greedy_takes_the_mode():
    g = generate(gru(), None, PROMPT[None], max_new_tokens=5, temperature=0, compiler="eager")
    distribution = sequence_distribution(gru(), PROMPT, 5, VOCAB, temperature=0)
    assert distribution[tuple(g.sequences[0, 3:])] == 1


def test_a_draft_equal_to_the_target_gives_weights_one():
    g = replicate(gru(), gru(), PROMPT, 8, 32, n_particles=5, lookahead=3, ess_threshold=1.0)
    assert g.log_weights.abs().max() < 1e-9
    assert g.stats.resamplings == 0


@pytest.mark.parametrize("pair", PAIRS)
def test_after_resampling_the_state_is_that_of_the_surviving_tokens(pair):
    """Against a replay of prompt and tokens. The target has seen all tokens but the pending one; the draft has not
    seen the last drafted one either."""
    target, draft = PAIRS[pair]()
    with recorded_cycles() as cycles:
        replicate(target, draft, PROMPT, 13, 4, n_particles=6, lookahead=2, ess_threshold=1.0)
    assert sum(cycle.resampled for cycle in cycles[:-1]) >= 2
    for cycle in cycles[:-1]:  # nothing is copied after the last
        for model, state, unseen in ((target, cycle.target, 1), (draft, cycle.draft, 2)):
            if not hasattr(model, "step"):
                continue
            tokens = torch.cat([PROMPT.expand(len(cycle.tokens), -1), cycle.tokens[:, :-unseen]], 1)
            _, replayed = model.step(tokens, 0, model.initial_state(len(tokens)))
            for leaf, expected in zip(state, torch.utils._pytree.tree_leaves(replayed), strict=True):
                torch.testing.assert_close(leaf, expected, atol=1e-9, rtol=0)


def test_positions_are_given_to_the_model():
    """The position of the first token of each block, as the sequence goes on."""
    seen = []

    class Recording(GRUStep):
        def step(self, tokens, pos, state):
            seen.append((int(pos), tokens.shape[1]))
            return super().step(tokens, pos, state)

    replicate(Recording(VOCAB), GRUStep(VOCAB), PROMPT, 7, 2, n_particles=2, lookahead=2)
    assert seen == [(0, 3), (3, 3), (6, 3)], "the prompt, then blocks of a pending and two drafted tokens"


def test_a_request_does_not_depend_on_the_rest_of_the_batch():
    target, draft = PAIRS["both"]()
    prompts = torch.tensor([[1, 0], [2, 2], [0, 1]])
    options = {"max_new_tokens": 10, "n_particles": 4, "lookahead": 2, "ess_threshold": 1.0, "compiler": "eager"}
    together = generate(target, draft, prompts, seed=5, **options)
    for b in range(3):
        alone = generate(target, draft, prompts[b : b + 1], seed=5 + b, **options)
        assert torch.equal(alone.particles[0], together.particles[b])


@pytest.mark.parametrize("who", [0, 1])
def test_nan_in_the_middle_raises_with_what_was_generated(who):
    models = [gru(), perturbed(gru(), 0.3)]
    with torch.no_grad():
        models[who].embed.weight[0] = float("nan")
    ids = torch.tensor([[1, 2]])
    with pytest.raises(GenerationError, match=f"{('target', 'draft')[who]}'s logits are NaN") as error:
        replicate(*models, ids[0], 60, 1, n_particles=2, lookahead=2)
    assert 3 <= error.value.partial.sequences.shape[1] < 62


def test_weights_are_read_at_every_call():
    target, draft = gru(), gru()
    before = replicate(target, draft, PROMPT, 8, 4, n_particles=4, lookahead=2, ess_threshold=0.0)
    with torch.no_grad():
        target.head.weight.mul_(2)
    after = replicate(target, draft, PROMPT, 8, 4, n_particles=4, lookahead=2, ess_threshold=0.0)
    assert before.log_weights.abs().max() < 1e-9
    assert after.log_weights.abs().max() > 0.1


# ---- a state cannot forget -------------------------------------------------------------------------------------------


class Only(Counter):
    """Only these tokens can follow."""

    def __init__(self, tokens: list[int], seed: int = 0):
        super().__init__(seed)
        others = [token for token in range(VOCAB) if token not in tokens]
        self.table[..., others] = -60.0 if len(tokens) == 1 else -torch.inf


@pytest.mark.parametrize("sides", ["both", "target", "draft"])
def test_a_population_that_would_die_goes_back_to_the_state_before_the_block(sides):
    """Chi-square at level 1e-3. Where no draft is possible, each token is the target's own."""
    target, draft = Only([0, 1]), Only([2], seed=1)
    law = sequence_distribution(target, PROMPT[:2], 5, VOCAB)
    if sides != "both":
        cached = TinyTransformerLM(VOCAB).double()
        with torch.no_grad():
            tokens = torch.tensor([0.0, 0.0, -torch.inf]) if sides == "draft" else torch.tensor([-60.0, -60.0, 0.0])
        cached = Masked(cached, tokens)
        target, draft = (cached, draft) if sides == "draft" else (target, cached)
        law = sequence_distribution(target, PROMPT[:2], 5, VOCAB)
    g = replicate(target, draft, PROMPT[:2], 5, 2**11, n_particles=2, lookahead=2, validate=False)
    assert g.stats.dropped == 4 * 2**11
    assert chi_square_p_value(drawn(g, law), law) > 1e-3


class Masked(nn.Module):
    def __init__(self, model: nn.Module, mask: Tensor):
        super().__init__()
        self.model, self.mask = model, nn.Buffer(mask.double())

    def forward(self, ids: Tensor) -> Tensor:
        return self.model(ids) + self.mask


def test_requests_that_would_not_die_lose_their_block_alone():
    """One request of the batch has a draft that is always possible. Bounds as above."""
    target = Only([0, 1])
    draft = Only([2], seed=1)
    draft.table[:, :, 0] = target.table[:, :, 0]  # after token 0 they agree
    law = sequence_distribution(target, PROMPT[:2], 4, VOCAB)
    g = replicate(target, draft, PROMPT[:2], 4, 2**12, n_particles=8, lookahead=2, validate=False, ess_threshold=1.0)
    assert 0 < g.stats.dropped < 3 * 2**12
    assert distance(weighted_distribution(g, law), law) < 0.1


def test_blocks_are_not_cut():
    with pytest.raises(OptionError, match="max_divergence cannot be kept with this target"):
        generate(gru(), gru(1), PROMPT[None], max_new_tokens=4, max_divergence=0.3, compiler="eager")
