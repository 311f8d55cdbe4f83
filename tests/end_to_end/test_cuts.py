"""Blocks that are cut where target and draft part: the weights stay proper, and the bound holds.

Laws are compared with full enumeration of toy models. Seeds are fixed; the rate stated with a statistical test is that
of a false alarm when the seed was chosen.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import request_settings
from helpers.enumeration import chi_square_p_value, sequence_distribution
from helpers.model_parts import perturbed
from helpers.replicates import drawn, evidence_measure, replicate, weighted_distribution, z_scores
from helpers.request_settings import IDS, SETTINGS, of_rows
from helpers.toys import TableLM, TinyTransformerLM
from torch import Tensor

from smc_compile import Generation, generate
from smc_compile.inputs.requests import build_request, settings_of
from smc_compile.runtime.sessions.run import Run

pytestmark = pytest.mark.usefixtures("interpreted")
VOCAB, LENGTH = 3, 5
PROMPT = torch.tensor([1, 0, 2])


def table_pair(scale: float = 1.0) -> tuple[Any, Any]:
    target = TableLM(VOCAB).double()
    return target, perturbed(target, scale)


def transformer_pair(scale: float = 0.5) -> tuple[Any, Any]:
    target = TinyTransformerLM(VOCAB).double()
    return target, perturbed(target, scale)


# ---- the weights are proper ------------------------------------------------------------------------------------------

CASES: dict[str, dict[str, Any]] = {
    **{f"N={n}, {theta}": {"n_particles": n, "max_divergence": theta} for n in (1, 4, 16) for theta in (0.0, 0.1, 0.2)},
    "N=64": {"n_particles": 64, "max_divergence": 0.1},
    "always resampled": {"ess_threshold": 1.0, "max_divergence": 0.15},
    "never resampled": {"ess_threshold": 0.0, "max_divergence": 0.15},
    "eos": {"eos_token_id": 1, "max_divergence": 0.15},
    "eos, long blocks": {"eos_token_id": 2, "max_divergence": 0.1, "lookahead": 7},
    "temperature": {"temperature": 0.7, "max_divergence": 0.15},
    "transformer": {"pair": "transformer", "max_divergence": 0.1, "lookahead": 3},
    "transformer, eos": {"pair": "transformer", "max_divergence": 0.1, "eos_token_id": 0},
}


@pytest.mark.parametrize("case", CASES)
def test_evidence_times_weight_is_unbiased_for_every_sequence(case: str) -> None:
    """E[Z] = 1 (4 standard errors, 6e-5) and E[Z w(x)] = p(x) (5.5 for each of ~80 sequences, 3e-6)."""
    options = {"n_particles": 4, "lookahead": 3, **CASES[case]}
    target, draft = transformer_pair() if options.pop("pair", None) else table_pair()
    law = sequence_distribution(
        target, PROMPT, LENGTH, VOCAB, options.get("temperature", 1.0), options.get("eos_token_id")
    )
    g = replicate(target, draft, PROMPT, LENGTH, 2**13 // max(options["n_particles"] // 4, 1), **options)

    exact = options["max_divergence"] == 0.0
    assert g.stats.cuts > 0
    assert g.stats.dropped == 0
    if exact:
        assert (g.log_evidence == 0).all()
    else:
        assert abs(z_scores(g.log_evidence.exp(), 1.0)) < 4
    frequent = law.flatten() > 0.003
    sequences = z_scores(evidence_measure(g, law)[:, frequent], law.flatten()[frequent])
    assert sequences.abs().max() < 5.5
    assert (evidence_measure(g, law)[:, law.flatten() == 0] == 0).all()


def test_one_particle_that_never_parts_is_the_one_token_loop() -> None:
    """Chi-square at level 1e-3; without the cut the same test sees the draft."""
    target, draft = table_pair()
    law = sequence_distribution(target, PROMPT, LENGTH, VOCAB)
    exact, free = (
        replicate(target, draft, PROMPT, LENGTH, 2**13, n_particles=1, lookahead=3, max_divergence=theta)
        for theta in (0.0, 1.0)
    )
    assert chi_square_p_value(drawn(exact, law), law) > 1e-3
    assert chi_square_p_value(drawn(free, law), law) < 1e-9


def test_a_draft_equal_to_the_target_is_never_cut() -> None:
    target = TableLM(VOCAB).double()
    g = replicate(target, perturbed(target, 0.0), PROMPT, 9, 32, n_particles=4, lookahead=3, max_divergence=0.01)
    assert (g.stats.cuts, g.stats.cycles) == (0, 2)
    assert g.log_evidence.abs().max() < 1e-9


# ---- requests go on by themselves --------------------------------------------------------------------------------


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_request_does_not_depend_on_the_cuts_of_others(setting: str) -> None:
    """Prompts of several lengths, caps of several sizes; each request alone gives what it gives in the batch."""
    target = TinyTransformerLM(request_settings.VOCAB, max_positions=64).double()
    draft, caps = perturbed(target, 0.4), [17, 9, 12, 17]
    options: dict[str, Any] = {
        "n_particles": 3, "lookahead": 3, "max_divergence": 0.25, "compiler": "eager", "validate": False,
        **SETTINGS[setting],
    }  # fmt: skip

    def of(rows: slice) -> Generation:
        return generate(target, draft, IDS[rows], **of_rows(rows, caps), **options)

    together = of(slice(0, 4))
    assert together.stats.cuts > 0
    for b in range(4):
        alone = of(slice(b, b + 1))
        width = alone.sequences.shape[1]
        assert torch.equal(alone.sequences[0], together.sequences[b, :width])
        assert alone.log_evidence[0] == pytest.approx(together.log_evidence[b].item(), abs=1e-9)
        assert torch.equal(alone.ess[0], together.ess[b, : alone.stats.cycles])
        assert torch.equal(alone.widths[0], together.widths[b, : alone.stats.cycles])
        assert int(alone.widths.sum()) >= caps[b] - 1 or "eos" in setting or "criterion" in setting


# ---- no call fails for its sampler ---------------------------------------------------------------------------------


@pytest.mark.parametrize("theta", [0.35, 1.0])
@pytest.mark.parametrize(
    "sampler", [{"top_k": 1}, {"top_k": 2}, {"top_p": 0.3}, {"min_p": 0.5}, {"temperature": 0.01}], ids=str
)
def test_any_truncation_gives_a_text_that_the_target_can_write(sampler: dict[str, float], theta: float) -> None:
    target = TinyTransformerLM(11, max_positions=64).double()
    draft = TinyTransformerLM(11, max_positions=64, seed=1).double()
    g = replicate(
        target, draft, PROMPT, 24, 8, n_particles=4, lookahead=4, max_divergence=theta, validate=False, **sampler
    )
    assert g.log_probs.isfinite().all()
    assert torch.equal(g.kl_bound.isnan(), g.dropped > 0), "nothing bounds the divergence of a text that was biased"
    assert (g.stats.dropped > 0) == any("would have died" in warning for warning in g.stats.warnings)
    assert int(g.dropped.sum()) == g.stats.dropped
    if theta < 1:
        assert g.log_probs.min() > -15
        assert g.stats.dropped == 0


def test_a_population_that_would_die_takes_a_token_of_the_target() -> None:
    """Chi-square at level 1e-3: where no draft is possible, each token is the target's own."""
    target, draft = TableLM(VOCAB).double(), TableLM(VOCAB).double()
    with torch.no_grad():
        target.table[:, 2] = -torch.inf
        draft.table[:, :2] = -60.0
    law = sequence_distribution(target, PROMPT[:2], LENGTH, VOCAB)
    g = replicate(target, draft, PROMPT[:2], LENGTH, 2**12, n_particles=2, lookahead=2, validate=False)
    assert g.stats.dropped == 4 * 2**12
    assert chi_square_p_value(drawn(g, law), law) > 1e-3


def test_caches_never_outgrow_the_texts() -> None:
    """One request has finished and stays in the batch, since two rows are the only size that has run."""
    target = TinyTransformerLM(7, max_positions=64).double()
    options: dict[str, Any] = {"n_particles": 3, "lookahead": 5, "max_divergence": 0.0, "compiler": "eager", "seed": 1}
    prompts = PROMPT.expand(2, -1)
    session = generate(target, perturbed(target, 0.4), prompts, max_new_tokens=[15, 17], **options).program.session
    request = build_request(prompts, [15, 17], torch.tensor([1, 2]), settings=settings_of(2, temperature=1.0))
    grown = []
    reserve = Run.reserve
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "reserve", lambda run, *given: (reserve(run, *given), grown.append(run.keys))[0])
        (*_, last) = session.cycles(request)
    assert last.p.generated > 17, "one has gone past its end"
    assert len({id(keys) for keys in grown}) == 1, "all slots were there from the beginning"


# ---- the bound -------------------------------------------------------------------------------------------------------


def divergence(g: Generation, law: Tensor) -> float:
    """KL of the law of the returned text from the target's, in nats."""
    returned = weighted_distribution(g, law).flatten()
    return float((returned * (returned / law.flatten()).log()).nan_to_num(0.0).sum())


@pytest.mark.parametrize("theta", [0.15, 1.0])
def test_the_bound_lies_above_the_divergence_and_not_far_above(theta: float) -> None:
    """The mean of ``kl_bound`` less 4 standard errors is at most 6 times the divergence, and never below it."""
    target, draft = table_pair(1.0)
    law = sequence_distribution(target, PROMPT, LENGTH, VOCAB)
    for n in (4, 16, 64):
        g = replicate(target, draft, PROMPT, LENGTH, 2**16 // n, n_particles=n, lookahead=2, max_divergence=theta)
        bound, error = float(g.kl_bound.mean()), float(g.kl_bound.std() / len(g.kl_bound) ** 0.5)
        true = divergence(g, law)
        print(f"theta={theta} N={n}: divergence {true:.4f}, bound {bound:.4f} +- {error:.4f}")
        assert bound + 4 * error > true
        assert bound - 4 * error < 6 * true


def test_a_pair_that_is_far_apart_is_warned_of() -> None:
    target, draft = TinyTransformerLM(VOCAB).double(), TinyTransformerLM(VOCAB, seed=1).double()
    options = {"n_particles": 4, "lookahead": 4, "compiler": "eager", "seed": 0}
    far = generate(target, draft, PROMPT[None], max_new_tokens=24, max_divergence=1.0, **options)
    assert any("nats a token from the target's" in warning for warning in far.stats.warnings)
    near = generate(target, draft, PROMPT[None], max_new_tokens=24, max_divergence=0.0, **options)
    assert near.stats.warnings == []
    assert near.kl_bound.tolist() == [0.0]
