"""Rules that read the text, truncation, stops and lag: the distribution with them, against full enumeration.

Seeds are fixed; the rate stated with a statistical test is that of a false alarm when the seed was chosen.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.enumeration import chi_square_p_value, sequence_distribution
from helpers.logits_processors import Applied, no_third, penalty
from helpers.model_parts import perturbed
from helpers.replicates import drawn, evidence_measure, replicate, z_scores
from helpers.toys import TableLM, TinyTransformerLM
from torch import Tensor

from smc_compile import GenerationError, generate

VOCAB = 3


PROMPT = torch.tensor([1, 0, 2])


interpreted = pytest.mark.usefixtures("interpreted")


def tilt(input_ids: Tensor, scores: Tensor) -> Tensor:
    """Tensor code on the scores alone."""
    return scores + torch.arange(scores.shape[1]) * 0.15


def table_pair(scale: float = 1.0):
    target = TableLM(VOCAB).double()
    return target, perturbed(target, scale)


CASES = {
    "tensor code": {"logits_processor": [penalty]},
    "python": {"logits_processor": [no_third]},
    "python, end": {"logits_processor": [no_third], "eos_token_id": 1},
    "both and scores": {"logits_processor": [penalty, no_third, tilt], "temperature": 0.8},
    "scores alone": {"logits_processor": [tilt], "temperature": 0.8},
    "scores before text": {"logits_processor": [tilt, penalty], "eos_token_id": 0},
}


@interpreted
@pytest.mark.parametrize("case", CASES)
def test_evidence_times_weight_is_unbiased_with_rules(case):
    """As without rules: E[Z] = 1 (4 standard errors, 6e-5), E[Z w(x)] = p(x) (5.5 for each sequence, 3e-6)."""
    options = {"lookahead": 2, "ess_threshold": 0.8, **CASES[case]}
    target, draft = table_pair()
    model = Applied(target, *options["logits_processor"])
    distribution = sequence_distribution(
        model, PROMPT, 5, VOCAB, options.get("temperature", 1.0), options.get("eos_token_id")
    )
    g = replicate(target, draft, PROMPT, 5, 2**12, n_particles=4, **options)
    frequent = distribution.flatten() > 0.003
    sequences = z_scores(evidence_measure(g, distribution)[:, frequent], distribution.flatten()[frequent])
    print(f"{case}: z(evidence) {z_scores(g.log_evidence.exp(), 1.0):+.2f}, largest {sequences.abs().max():.2f}")
    assert abs(z_scores(g.log_evidence.exp(), 1.0)) < 4
    assert sequences.abs().max() < 5.5
    assert (evidence_measure(g, distribution)[:, distribution.flatten() == 0] == 0).all()


@interpreted
@pytest.mark.parametrize("case", CASES)
def test_the_one_token_loop_follows_rules(case):
    """Chi-square at level 1e-3."""
    options = CASES[case]
    target, _ = table_pair()
    distribution = sequence_distribution(
        Applied(target, *options["logits_processor"]), PROMPT, 5, VOCAB, options.get("temperature", 1.0),
        options.get("eos_token_id"),
    )  # fmt: skip
    g = replicate(target, None, PROMPT, 5, 2**13, method="autoregressive", **options)
    assert chi_square_p_value(drawn(g, distribution), distribution) > 1e-3


@interpreted
def test_rules_apply_to_the_draft_too():
    """One particle: K draft tokens, each under the rule, between target tokens. Chi-square at level 1e-3."""
    target, draft = table_pair()

    def chain(ids: Tensor) -> Tensor:
        return Applied(target if (ids.shape[1] - len(PROMPT)) % 3 == 0 else draft, no_third)(ids)

    distribution = sequence_distribution(chain, PROMPT, 5, VOCAB)
    g = replicate(target, draft, PROMPT, 5, 2**13, n_particles=1, lookahead=2, logits_processor=[no_third])
    assert chi_square_p_value(drawn(g, distribution), distribution) > 1e-3


@pytest.mark.parametrize(("text_processor", "traced"), [(penalty, True), (no_third, False)])
def test_tensor_code_compiles_and_python_does_not(text_processor, traced):
    target, draft = table_pair()
    options = {"max_new_tokens": 7, "n_particles": 3, "lookahead": 2, "seed": 0, "logits_processor": [text_processor]}
    compiled = generate(target, draft, PROMPT[None], compiler="aot_eager", **options)
    assert ("rules" in {r.name for r in compiled.program.regions}) == traced
    with torch.compiler.set_stance("force_eager"):
        interpreted = generate(target, draft, PROMPT[None], compiler="eager", **options)
    assert torch.equal(compiled.particles, interpreted.particles)
    torch.testing.assert_close(compiled.log_weights, interpreted.log_weights)


TRUNCATIONS = {
    "top_k": (2, lambda p, before, rank: rank < 2),
    "top_p": (0.75, lambda p, before, rank: before < 0.75),
    "min_p": (0.5, lambda p, before, rank: p >= 0.5 * p.amax(-1, keepdim=True)),
}


def truncated(setting: str) -> Callable[[Tensor], Tensor]:
    """Masks written here: the rank of each token and the mass of likelier ones decide."""

    def process(logits: Tensor) -> Tensor:
        p = logits.softmax(-1)
        order = p.argsort(-1, descending=True)
        rank = order.argsort(-1)
        before = (p.gather(-1, order).cumsum(-1) - p.gather(-1, order)).gather(-1, rank)
        return logits.masked_fill(~TRUNCATIONS[setting][1](p, before, rank), -math.inf)

    return process


@interpreted
@pytest.mark.parametrize("setting", TRUNCATIONS)
def test_the_distribution_with_truncation(setting):
    """Chi-square at level 1e-3 for the one-token loop against enumeration."""
    target, _ = table_pair()
    distribution = sequence_distribution(target, PROMPT, 4, VOCAB, 0.9, process=truncated(setting))
    assert (distribution == 0).any()
    given = {"temperature": 0.9, setting: TRUNCATIONS[setting][0]}
    g = replicate(target, None, PROMPT, 4, 2**13, method="autoregressive", **given)
    assert chi_square_p_value(drawn(g, distribution), distribution) > 1e-3


@interpreted
@pytest.mark.parametrize("setting", TRUNCATIONS)
def test_the_distribution_of_particles_with_truncation(setting):
    """E[Z] = 1 and E[Z w(x)] = p(x) (4 and 5.5 standard errors) as no cycle is drawn again: the draft truncates too."""
    target, draft = table_pair(0.5)
    distribution = sequence_distribution(target, PROMPT, 4, VOCAB, 0.9, process=truncated(setting))
    given = {"temperature": 0.9, setting: TRUNCATIONS[setting][0], "n_particles": 8, "lookahead": 2}
    g = replicate(target, draft, PROMPT, 4, 2**13, **given)
    evidence = z_scores(g.log_evidence.exp(), 1.0)
    kept = distribution.flatten() > 0.003
    sequences = z_scores(evidence_measure(g, distribution)[:, kept], distribution.flatten()[kept])
    print(f"{setting}: z(evidence) {evidence:+.2f}, largest |z| {sequences.abs().max():.2f}, dropped {g.stats.dropped}")
    assert g.stats.dropped == 0
    assert abs(evidence) < 4
    assert sequences.abs().max() < 5.5
    assert (evidence_measure(g, distribution)[:, distribution.flatten() == 0] == 0).all()


def rising(input_ids: Tensor, scores: object = None) -> Tensor:
    """Stops after 0 and then 1."""
    return (input_ids[:, -2] == 0) & (input_ids[:, -1] == 1)


@interpreted
@pytest.mark.parametrize("lookahead", [1, 2, 4])
def test_the_distribution_with_a_stop_in_the_middle_of_a_block(lookahead):
    """A stop is an end: E[Z] = 1 and E[Z w(x)] = p(x), where 2 fills up after the stop."""
    target, draft = table_pair()

    def stopped(ids: Tensor) -> Tensor:
        logits = target(ids)
        text = ids[:, len(PROMPT) - 1 :]
        over = ((text[:, :-1] == 0) & (text[:, 1:] == 1)).any(1)
        filled = torch.full_like(logits[:, -1], -math.inf).index_fill(1, torch.tensor([2]), 0.0)
        return torch.cat([logits[:, :-1], torch.where(over[:, None], filled, logits[:, -1])[:, None]], 1)

    distribution = sequence_distribution(stopped, PROMPT, 5, VOCAB)
    options = {"n_particles": 4, "lookahead": lookahead, "stopping_criteria": [rising], "pad_token_id": 2}
    g = replicate(target, draft, PROMPT, 5, 2**12, ess_threshold=0.8, **options)
    frequent = distribution.flatten() > 0.003
    assert abs(z_scores(g.log_evidence.exp(), 1.0)) < 4
    assert z_scores(evidence_measure(g, distribution)[:, frequent], distribution.flatten()[frequent]).abs().max() < 5.5
    assert (evidence_measure(g, distribution)[:, distribution.flatten() == 0] == 0).all()
    at = rising(g.particles[0, :, : len(PROMPT) + 2])
    assert torch.equal(g.particle_lengths[0] == 2, at & (g.particle_lengths[0] != 1))


@interpreted
@pytest.mark.parametrize(("max_lag", "threshold"), [(0, 0.5), (1, 0.0), (3, 0.5)])
def test_a_lag_keeps_every_expectation(max_lag, threshold):
    target, draft = table_pair()
    distribution = sequence_distribution(target, PROMPT, 5, VOCAB)
    g = replicate(target, draft, PROMPT, 5, 2**12, n_particles=4, lookahead=1, ess_threshold=threshold, max_lag=max_lag)
    assert g.stats.settled_early > 0
    frequent = distribution.flatten() > 0.003
    assert abs(z_scores(g.log_evidence.exp(), 1.0)) < 4
    assert z_scores(evidence_measure(g, distribution)[:, frequent], distribution.flatten()[frequent]).abs().max() < 5.5


def breaking(after: int, how: Callable[[Tensor], Tensor | None]) -> Callable[[Tensor, Tensor], Tensor | None]:
    def text_processor(input_ids: Tensor, scores: Tensor) -> Tensor | None:
        return how(scores) if input_ids.shape[1] > after else scores + 0 * input_ids[:, -1:]

    return text_processor


def raising(scores: Tensor) -> Tensor:
    raise RuntimeError("the rule's own trouble")


BROKEN = {
    "NaN": (lambda s: s * math.nan, "it returned NaN"),
    "every token removed": (lambda s: torch.full_like(s, -math.inf), "removed every token"),
    "another shape": (lambda s: s[:, :2], r"shape \(\d+, 2\) for scores of shape"),
    "nothing": (lambda s: None, "it returned NoneType"),
    "an error": (raising, "RuntimeError: the rule's own trouble"),
}


@interpreted
@pytest.mark.parametrize("method", ["smc", "autoregressive"])
@pytest.mark.parametrize("case", BROKEN)
def test_a_rule_that_breaks_is_named_and_nothing_is_lost(case, method):
    how, message = BROKEN[case]
    target = TinyTransformerLM(VOCAB).double()
    options = {"n_particles": 3, "lookahead": 2, "seed": 0, "compiler": "eager", "method": method}
    text_processor = breaking(len(PROMPT) + 5, how)
    with pytest.raises(GenerationError, match=f"logits processor \\w+ broke[\\s\\S]*{message}") as caught:
        generate(
            target, perturbed(target), PROMPT[None], max_new_tokens=12, logits_processor=[text_processor], **options
        )
    partial = caught.value.partial
    good = generate(target, perturbed(target), PROMPT[None], max_new_tokens=12, **options)
    assert partial.particles.shape[2] > len(PROMPT) + 2
    assert torch.equal(partial.particles, good.particles[..., : partial.particles.shape[2]]) or method == "smc"


def test_a_rule_is_not_asked_about_what_follows_an_end():
    """A rule of a grammar leaves nothing after the end: that is no error."""
    target, draft = table_pair()

    def grammar(input_ids: Tensor, scores: Tensor) -> Tensor:
        over = (input_ids[:, len(PROMPT) :] == 1).any(1)
        assert not over.any()
        return scores

    g = replicate(target, draft, PROMPT, 9, 64, eos_token_id=1, logits_processor=[grammar], n_particles=4, lookahead=3)
    assert (g.particle_lengths < 9).any()


@interpreted
def test_a_criterion_that_breaks_is_told():
    target, draft = table_pair()

    def criterion(input_ids: Tensor, scores: object) -> Tensor:
        return scores[0] > 1  # type: ignore[index]

    with pytest.raises(GenerationError, match="a stopping criterion broke off"):
        replicate(target, draft, PROMPT, 5, 4, stopping_criteria=[criterion])


FIRST_CALL = """
import json
import torch
from helpers.logits_processors import penalty
from helpers.toys import TableLM
from smc_compile import generate

out = generate(
    TableLM(3), None, torch.tensor([[1, 0, 2]]), max_new_tokens=3, method="autoregressive", compiler="eager",
    logits_processor=[penalty],
)
print(json.dumps(out.stats.rules))
"""


def test_the_first_processor_of_a_process_is_compiled():
    """Whether it is tensor code is tried before any generation of the process has begun."""
    paths = os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])
    environment = {**os.environ, "PYTHONPATH": paths}
    done = subprocess.run([sys.executable, "-c", FIRST_CALL], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == ["penalty: compiled, on target and draft"]
