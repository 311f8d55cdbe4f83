"""The distribution of what is generated, against full enumeration of toy models.

Seeds are fixed; the rate stated with a statistical test is that of a false alarm when the seed was chosen.
"""

from __future__ import annotations

import copy
import math

import pytest
import torch
from helpers.enumeration import chi_square_p_value, sequence_distribution, total_variation, tv_noise_floor
from helpers.model_parts import perturbed
from helpers.replicates import (
    distance,
    draft_chain,
    drawn,
    evidence_measure,
    replicate,
    weighted_distribution,
    z_scores,
)
from helpers.toys import TableLM, TinyTransformerLM

pytestmark = pytest.mark.usefixtures("interpreted")

VOCAB = 3
PROMPT = torch.tensor([1, 0, 2])
RESAMPLING = ("systematic", "stratified", "multinomial", "residual")


def table_pair(scale: float = 1.0):
    target = TableLM(VOCAB).double()
    return target, perturbed(target, scale)


def transformer_pair(scale: float = 0.3):
    target = TinyTransformerLM(VOCAB).double()
    return target, perturbed(target, scale)


PAIRS = {"table": table_pair, "transformer": transformer_pair}


# --- toward the distribution as N grows ----------------------------------------------------------------------------

RUNS = {1: 2**14, 4: 2**13, 16: 2**12, 64: 2**10, 256: 2**8}


@pytest.mark.parametrize(("pair", "n", "temperature"), [("table", 6, 1.0), ("transformer", 5, 0.8)])
def test_the_distribution_approaches_the_target_as_particles_are_added(pair, n, temperature):
    """The bias starts where one particle must stand (0.21 and 0.28) and falls to sampling noise.

    Two estimates of the distribution of the returned sequence: the sequences themselves, whose exact sampler would
    exceed floor + 2.7 / sqrt(runs) less than once in a million (McDiarmid), and the weights, which have far less noise.
    """
    target, draft = PAIRS[pair]()
    distribution = sequence_distribution(target, PROMPT, n, VOCAB, temperature)
    bias, returned = {}, {}
    for particles, runs in RUNS.items():
        g = replicate(target, draft, PROMPT, n, runs, temperature=temperature, n_particles=particles, lookahead=1)
        bias[particles] = distance(weighted_distribution(g, distribution), distribution)
        returned[particles] = total_variation(drawn(g, distribution), distribution) - tv_noise_floor(distribution, runs)
        print(f"{pair} N={particles}: weights {bias[particles]:.4f}, draws {returned[particles]:+.4f} over their floor")

    chain = sequence_distribution(draft_chain(target, draft, PROMPT, 1), PROMPT, n, VOCAB, temperature)
    assert bias[1] == pytest.approx(distance(chain, distribution), abs=0.03)
    assert bias[4] < 0.6 * bias[1]
    assert bias[16] < 0.6 * bias[4]
    assert bias[64] < bias[16]
    assert bias[256] < 2 * tv_noise_floor(distribution, 256 * RUNS[256])
    for particles, runs in RUNS.items():
        assert returned[particles] < bias[particles] + 2.7 / runs**0.5
    assert returned[1] > 0.1, "one particle is far from the distribution: the statistic can fail"


# --- exact statements ----------------------------------------------------------------------------------------------

EXACT = {
    **{f"always {method}": {"resampling_method": method, "ess_threshold": 1.0} for method in RESAMPLING},
    "sometimes": {"ess_threshold": 0.5},
    "never": {"ess_threshold": 0.0},
    "eos": {"ess_threshold": 1.0, "eos_token_id": 1},
    "eos never": {"ess_threshold": 0.0, "eos_token_id": 2, "lookahead": 3},
    "one cycle": {"lookahead": 4},
    "lookahead beyond the end": {"lookahead": 7},
    "temperature": {"ess_threshold": 1.0, "temperature": 0.7},
    "transformer": {"pair": "transformer", "ess_threshold": 1.0, "lookahead": 2},
    "transformer eos": {"pair": "transformer", "ess_threshold": 0.5, "eos_token_id": 0, "lookahead": 3},
}


@pytest.mark.parametrize("case", EXACT)
def test_evidence_times_weight_is_unbiased_for_every_sequence(case):
    """At N=4 already: E[Z] = 1 (4 standard errors, 6e-5) and E[Z w(x)] = p(x) (5.5 for each of ~80 sequences, 3e-6).

    n=6 with K=1, 2, 3 or 7 ends in the middle of a cycle; with K=4 at the end of one.
    """
    options = {"lookahead": 1, **EXACT[case]}
    pair, n = options.pop("pair", "table"), 6
    target, draft = table_pair(1.5) if pair == "table" else transformer_pair(0.5)
    distribution = sequence_distribution(
        target, PROMPT, n, VOCAB, options.get("temperature", 1.0), options.get("eos_token_id")
    )
    g = replicate(target, draft, PROMPT, n, 2**13, n_particles=4, **options)

    evidence = z_scores(g.log_evidence.exp(), 1.0)
    frequent = distribution.flatten() > 0.003
    sequences = z_scores(evidence_measure(g, distribution)[:, frequent], distribution.flatten()[frequent])
    print(f"{case}: z(evidence) {evidence:+.2f}, largest |z| of {frequent.sum()} sequences {sequences.abs().max():.2f}")
    assert abs(evidence) < 4
    assert sequences.abs().max() < 5.5
    assert (evidence_measure(g, distribution)[:, distribution.flatten() == 0] == 0).all()
    assert (g.stats.resamplings > 0) == (options.get("ess_threshold", 0.75) > 0)


@pytest.mark.parametrize("narrow", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("side", ["target", "draft"])
def test_target_and_draft_may_differ_in_dtype(side, narrow):
    """Each runs in its own: the law is that of the target as it is. Bounds as above, for one pair of N=4."""
    target, draft = transformer_pair(0.5)
    target, draft = (target.to(narrow), draft) if side == "target" else (target, draft.to(narrow))
    distribution = sequence_distribution(target, PROMPT, 3, VOCAB).double()
    g = replicate(target, draft, PROMPT, 3, 2**12, n_particles=4, lookahead=2, ess_threshold=1.0, validate=False)
    frequent = distribution.flatten() > 0.003
    assert abs(z_scores(g.log_evidence.exp(), 1.0)) < 4
    contributions = evidence_measure(g, distribution)[:, frequent]
    assert z_scores(contributions, distribution.flatten()[frequent]).abs().max() < 5.5


@pytest.mark.parametrize("eos", [None, 2])
@pytest.mark.parametrize("lookahead", [1, 3])
def test_one_particle_follows_the_draft_with_target_tokens_between(lookahead, eos):
    """Chi-square at level 1e-3: K tokens of the draft after each token of the target."""
    target, draft = table_pair()
    model = draft_chain(target, draft, PROMPT, lookahead)
    distribution = sequence_distribution(model, PROMPT, 5, VOCAB, eos=eos)
    g = replicate(target, draft, PROMPT, 5, 2**13, n_particles=1, lookahead=lookahead, eos_token_id=eos)
    assert chi_square_p_value(drawn(g, distribution), distribution) > 1e-3
    assert chi_square_p_value(drawn(g, distribution), sequence_distribution(target, PROMPT, 5, VOCAB, eos=eos)) < 1e-9


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize(("temperature", "eos"), [(1.0, None), (0.7, 0)])
def test_autoregressive_is_exact(pair, temperature, eos):
    """Chi-square at level 1e-3."""
    target, draft = PAIRS[pair]()
    g = replicate(target, None, PROMPT, 5, 2**14, method="autoregressive", temperature=temperature, eos_token_id=eos)
    distribution = sequence_distribution(target, PROMPT, 5, VOCAB, temperature, eos)
    assert chi_square_p_value(drawn(g, distribution), distribution) > 1e-3
    assert (
        chi_square_p_value(drawn(g, distribution), sequence_distribution(draft, PROMPT, 5, VOCAB, temperature, eos))
        < 1e-9
    )


# --- a draft equal to the target -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("particles", "lookahead"), [(1, 3), (3, 1), (8, 2), (7, 12)])
def test_a_draft_equal_to_a_table_gives_weights_exactly_one(particles, lookahead):
    target = TableLM(6)
    options = {"n_particles": particles, "lookahead": lookahead, "ess_threshold": 1.0}
    g = replicate(target, copy.deepcopy(target), PROMPT, 8, 32, **options)
    assert (g.log_weights == 0).all()
    assert (g.ess == particles).all()
    assert g.log_evidence.abs().max() < 1e-15 * particles  # log N - log N
    assert g.stats.resamplings == 0
    assert (g.ancestors == torch.arange(particles)).all()
    assert g.ess.shape == (32, math.ceil(7 / (lookahead + 1)))


def test_a_draft_equal_to_a_transformer_gives_weights_one_to_rounding():
    target = TinyTransformerLM(6).double()
    g = replicate(target, copy.deepcopy(target), PROMPT, 8, 32, n_particles=8, lookahead=3, ess_threshold=1.0)
    assert g.log_weights.abs().max() < 1e-9
    assert g.log_evidence.abs().max() < 1e-9
    assert g.stats.resamplings == 0


# --- support, end of sequence --------------------------------------------------------------------------------------


def test_a_draft_without_full_support_is_reported_with_the_missing_mass():
    target, draft = table_pair()
    with torch.no_grad():
        draft.table[:, 1] = -math.inf
    missing = float(target(PROMPT[None])[0, -1].softmax(-1)[1])
    g = replicate(target, draft, PROMPT, 4, 16, n_particles=4, lookahead=3)
    support, *far = g.stats.warnings
    assert f"{missing:.2%}" in support
    assert all("kl_bound" in warning for warning in far)
    assert (g.particles[:, :, 4:] != 1).all(), "only the first token comes from the target"


def test_a_draft_with_full_support_gives_no_warning():
    target, draft = table_pair()
    assert replicate(target, draft, PROMPT, 2, 4, n_particles=2, lookahead=1).stats.warnings == []


@pytest.mark.parametrize("method", ["smc", "autoregressive"])
def test_after_the_end_of_sequence_there_is_nothing_else(method):
    target, draft = transformer_pair()
    g = replicate(target, draft, PROMPT, 8, 512, method=method, n_particles=8, lookahead=2, eos_token_id=2)
    tokens = g.particles[:, :, len(PROMPT) :]
    ended = (tokens == 2).cummax(-1).values
    assert (tokens[ended] == 2).all()
    assert ended[:, :, -1].float().mean() > 0.5, "most particles end, or this test sees nothing"
    assert not ended[:, :, -1].all()
    assert not ended[:, :, 0].all(), "an end of sequence in the prompt ends nothing"


def test_a_batch_that_ended_stops_early_and_is_padded():
    target = TableLM(VOCAB).double()
    with torch.no_grad():
        target.table[:, 2] += 3
    g = replicate(target, perturbed(target), PROMPT, 400, 4, n_particles=2, lookahead=3, eos_token_id=2)
    assert g.stats.cycles < 50
    assert g.sequences.shape == (4, 403)
    assert (g.sequences[:, -300:] == 2).all()
    assert g.ess.shape == (4, g.stats.cycles)
