"""``method="auto"``: SMC and exact speculation take turns within a text, the weights stay proper, the floor is kept.

Laws are compared with full enumeration of toy models. Seeds are fixed; the rate stated with a statistical test is that
of a false alarm when the seed was chosen.
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers import request_settings
from helpers.enumeration import chi_square_p_value, sequence_distribution
from helpers.even_costs import EvenCosts
from helpers.model_parts import perturbed
from helpers.recorder import Records, set_recorder
from helpers.replicates import drawn, evidence_measure, replicate, z_scores
from helpers.request_settings import IDS, MASK, SETTINGS, of_rows
from helpers.toys import GRUStep, TableLM, TinyTransformerLM
from torch import nn

from smc_compile import Generation, explain, generate
from smc_compile.auto import choice as choosing
from smc_compile.auto.choice import Candidate, Choice, choice_of
from smc_compile.errors import InputError, OptionError
from smc_compile.program import from_model
from smc_compile.program.lru import LRU
from smc_compile.runtime.execution import memory
from smc_compile.runtime.sessions import begin as session_begin
from smc_compile.runtime.sessions import switching
from smc_compile.runtime.sessions.run import Run
from smc_compile.runtime.sessions.speculative import SpeculativeRun
from smc_compile.runtime.sessions.switching import SwitchingSession, Tradeoff

pytestmark = pytest.mark.usefixtures("interpreted")
VOCAB, LENGTH = 3, 6
PROMPT = torch.tensor([1, 0, 2])
CHEAP_SMC = Tradeoff(0.05, 1.0, 1.0, exact_lookahead=2, acceptance=0.7, begin_exact=False)


def decided(patch: pytest.MonkeyPatch, n: int, k: int, tradeoff: Tradeoff) -> None:
    """What the pilot would choose."""
    smc = Candidate(n, k, tradeoff.smc_seconds, k + 1, tradeoff.smc_seconds / (k + 1))
    patch.setattr(from_model, "programs", LRU(from_model.KEPT))
    patch.setattr(choosing, "choose", lambda *_: Choice((smc,), smc, "", tradeoff=tradeoff, population=smc))


def by_turns(patch: pytest.MonkeyPatch, methods: str) -> None:
    """Cycle c follows letter c of ``methods``, from the first again after the last: s for SMC, e for exact."""

    def chosen(self: SwitchingSession, run: Run, ledger: Any) -> Run:
        exact = methods[len(run.p.ess) % len(methods)] == "e"
        if exact == isinstance(run, SpeculativeRun):
            return run
        return self._to_exact(run, ledger) if exact else self._to_smc(run)

    patch.setattr(SwitchingSession, "_chosen", chosen)


def table_pair(scale: float = 1.0) -> tuple[nn.Module, nn.Module]:
    target = TableLM(VOCAB).double()
    return target, perturbed(target, scale)


def transformer_pair(vocab: int = VOCAB, scale: float = 0.5) -> tuple[nn.Module, nn.Module]:
    target = TinyTransformerLM(vocab, max_positions=64).double()
    return target, perturbed(target, scale)


# ---- the weights are proper ------------------------------------------------------------------------------------------

CASES: dict[str, dict[str, Any]] = {
    "s e": {"turns": "se"},
    "e s": {"turns": "es", "begin_exact": True},
    "s s e e": {"turns": "ssee", "n": 16},
    "one particle": {"turns": "se", "n": 1},
    "eos": {"turns": "sse", "eos_token_id": 1},
    "eos, exact first": {"turns": "eess", "begin_exact": True, "eos_token_id": 0},
    "never resampled": {"turns": "sse", "ess_threshold": 0.0},
    "cut": {"turns": "sse", "max_divergence": 0.1},
    "a sampler that cuts": {"turns": "se", "temperature": 0.8, "top_k": 2},
    "transformer": {"turns": "se", "pair": transformer_pair},
}


@pytest.mark.parametrize("case", CASES)
def test_evidence_times_weight_is_unbiased_for_every_sequence(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """E[Z] = 1 (4 standard errors, 6e-5) and E[Z w(x)] = p(x) (5.5 for each of ~100 sequences, 4e-6)."""
    options = {"max_divergence": 1.0, **CASES[case]}
    turns, n = options.pop("turns"), options.pop("n", 4)
    target, draft = options.pop("pair", table_pair)()
    decided(monkeypatch, n, 1, replace(CHEAP_SMC, begin_exact=options.pop("begin_exact", False)))
    by_turns(monkeypatch, turns)
    keep = (lambda x: x.masked_fill(x < x.topk(2).values[..., -1:], -torch.inf)) if "top_k" in options else None
    law = sequence_distribution(
        target, PROMPT, LENGTH, VOCAB, options.get("temperature", 1.0), options.get("eos_token_id"), keep
    )
    g = replicate(target, draft, PROMPT, LENGTH, 2**12, method="auto", **options)
    assert g.stats.method == "auto"
    assert g.stats.switches >= 1
    assert 0 < g.stats.exact_cycles < g.stats.cycles
    assert g.stats.dropped == 0 or "top_k" in options
    assert g.particles.shape[1] == n
    assert abs(z_scores(g.log_evidence.exp(), 1.0)) < 4
    # Of a draft that is mostly cut as the target is, what it cuts alone comes seldom, and with a large weight.
    frequent = law.flatten() > (0.02 if "top_k" in options else 0.003)
    sequences = z_scores(evidence_measure(g, law)[:, frequent], law.flatten()[frequent])
    assert sequences.abs().max() < 5.5
    assert (evidence_measure(g, law)[:, law.flatten() == 0] == 0).all()


def test_exact_turns_alone_are_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chi-square at level 1e-3; SMC of one particle fails the same test."""
    target, draft = table_pair()
    law = sequence_distribution(target, PROMPT, LENGTH, VOCAB)
    found = {}
    for turns in ("e", "s"):
        decided(monkeypatch, 1, 2, replace(CHEAP_SMC, begin_exact=turns == "e"))
        by_turns(monkeypatch, turns)
        g = replicate(target, draft, PROMPT, LENGTH, 2**13, method="auto", max_divergence=1.0)
        found[turns] = chi_square_p_value(drawn(g, law), law)
    assert found["e"] > 1e-3
    assert found["s"] < 1e-9


# ---- what a user sees ------------------------------------------------------------------------------------------------

EACH = {**SETTINGS, "cuts": {"max_divergence": 0.2}}
SEVEN = transformer_pair(request_settings.VOCAB, 0.4)
USUAL: dict[str, Any] = {
    "max_new_tokens": 30, "seed": 3, "method": "auto", "compiler": "eager", "validate": False,
}  # fmt: skip


def of_seven(**options: Any) -> Generation:
    given = {**USUAL, "max_divergence": 1.0, **options}
    ids = given.pop("ids", PROMPT[None])
    return generate(*SEVEN, ids, **given)


@pytest.mark.parametrize(
    ("setting", "turns"),
    [*((setting, "se" if setting == "eos" else "sse") for setting in EACH), ("plain", "es"), ("a criterion", "es")],
)
def test_a_request_does_not_depend_on_the_others(setting: str, turns: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Given who takes which turn. Prompts of several lengths, caps of several sizes; one ends with its first token."""
    decided(monkeypatch, 3, 3, replace(CHEAP_SMC, begin_exact=turns[0] == "e"))
    by_turns(monkeypatch, turns)
    caps = [17, 9, 1, 17]

    def of(rows: slice) -> Generation:
        return of_seven(ids=IDS[rows], **of_rows(rows, caps), **EACH[setting])

    together = of(slice(0, 4))
    assert together.stats.switches > 0
    for b in range(4):
        alone = of(slice(b, b + 1))
        width = alone.sequences.shape[1]
        assert torch.equal(alone.sequences[0], together.sequences[b, :width])
        assert torch.equal(alone.new_lengths[0], together.new_lengths[b])
        assert alone.log_evidence[0] == pytest.approx(together.log_evidence[b].item(), abs=1e-9)
        own = (SEVEN[0](alone.sequences) / EACH[setting].get("temperature", 1.0)).log_softmax(-1)
        if setting in ("plain", "eos") and MASK[b].all():
            made = own[0, 4:-1].gather(1, alone.sequences[0, 5:, None])[: int(alone.new_lengths[0]), 0]
            torch.testing.assert_close(alone.log_probs[0, : len(made)], made, atol=1e-9, rtol=0)


def test_particles_descend_from_the_one_that_was_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Following the ancestors back, particles that come from one have its text up to there."""
    decided(monkeypatch, 4, 3, CHEAP_SMC)
    by_turns(monkeypatch, "sse")
    g = of_seven(max_divergence=1.0)
    ends = g.widths[0].cumsum(0) + 1
    line = torch.arange(4)
    for c in reversed(range(g.stats.cycles)):
        same = line[:, None] == line
        line = g.ancestors[0, c][line]
        made = g.particles[0, :, 3 : 3 + int(ends[c])]
        if c + 1 < g.stats.cycles:
            assert bool(((made[:, None] == made).all(-1) | ~same).all())
        if "sse"[c % 3] == "e":
            assert len(made.unique(dim=0)) == 1
            assert g.ess[0, c] == 4


def test_what_was_streamed_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    decided(monkeypatch, 4, 3, CHEAP_SMC)
    by_turns(monkeypatch, "ssee")
    settled: list[list[int]] = []
    g = of_seven(streamer=lambda p: settled.append(p.tokens[: p.settled].tolist()))
    for shorter, longer in itertools.pairwise(settled):
        assert longer[: len(shorter)] == shorter
    assert settled[-1] == g.sequences[0, 3:].tolist()


@pytest.mark.parametrize("turns", ["sssee", "essss"])
def test_recorded_cycles_give_the_same(turns: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cycles of SMC are replayed, those of exact speculation are not; twice, so that a recording is used again."""
    decided(monkeypatch, 3, 2, replace(CHEAP_SMC, begin_exact=turns[0] == "e"))
    by_turns(monkeypatch, turns)
    plain = of_seven(max_new_tokens=40, max_divergence=0.35)
    records = Records()
    set_recorder(monkeypatch, records)
    pair = perturbed(SEVEN[0], 0.0), perturbed(SEVEN[1], 0.0)
    for _ in range(2):
        replayed = generate(
            *pair, PROMPT[None], max_new_tokens=40, seed=3, method="auto", compiler="eager", validate=False
        )
        assert torch.equal(replayed.particles, plain.particles)
        assert replayed.log_evidence.item() == pytest.approx(plain.log_evidence.item(), abs=1e-9)
        assert replayed.stats.replayed > 4


# ---- deciding --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [0.1, 0.6, 3.0])
def test_the_floor_is_kept_whatever_the_draft(scale: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pairs from near to far, by what a pilot shows. 16 texts of 60 tokens: at most 3 standard errors above the
    floor."""
    target = TinyTransformerLM(11, max_positions=80).double()
    draft = perturbed(target, scale)
    monkeypatch.setattr(choosing, "cycle_model", lambda *_: EvenCosts())
    options = {"compiler": "eager", "validate": False, "max_new_tokens": 60, "max_kl_per_token": 0.05}
    texts = [generate(target, draft, PROMPT[None], method="auto", seed=s, **options) for s in range(16)]
    found = torch.cat([g.kl_bound_per_token for g in texts])
    exact = sum(g.stats.exact_cycles for g in texts) / sum(g.stats.cycles for g in texts)
    print(f"scale {scale}: {found.mean():.4f} nats a token, {exact:.0%} of the cycles exact")
    assert found.mean() < 0.05 + 3 * found.std() / 16**0.5
    if scale == 0.1:
        assert exact < 0.25
    if scale == 3.0:
        assert exact > 0.5, "what is cut to a token a cycle is slower than exact speculation"


def test_what_is_near_is_left_to_smc_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A call begins exact; the draft is the target, so all it drafts is accepted."""
    decided(monkeypatch, 4, 4, replace(CHEAP_SMC, begin_exact=True))
    monkeypatch.setattr(switching, "PRIOR", 0)
    target = SEVEN[0]
    g = generate(target, perturbed(target, 0.0), PROMPT[None], max_new_tokens=40, method="auto", compiler="eager")
    assert (g.stats.switches, g.stats.exact_cycles) == (1, switching.SHOWN)
    assert g.log_evidence.abs().max() < 1e-9


@pytest.mark.parametrize("scale", [0.05, 0.6, 4.0])
def test_auto_chooses_by_what_a_pilot_shows(scale: float) -> None:
    target = TinyTransformerLM(11, max_positions=80).double()
    options = {"compiler": "eager", "max_new_tokens": 30, "seed": 0, "method": "auto"}
    g = generate(target, perturbed(target, scale), PROMPT[None], **options)
    choice = choice_of(g.program)
    assert choice is not None
    assert {c.method for c in choice.candidates} >= {"autoregressive", "speculative"}
    assert choice.chosen.seconds_per_token == min(c.seconds_per_token for c in choice.candidates)
    smc = [c for c in choice.candidates if c.method == "smc"]
    assert all(c.kl is not None and c.kl <= 0.02 for c in smc)
    assert bool(smc) or scale > 0.1
    expected = choice.chosen.method if choice.tradeoff is None else "auto"
    assert g.stats.method == expected
    report = explain(generate, target, perturbed(target, scale), PROMPT[None], **options)
    assert report.compiled
    assert report.sections["choice"][0] == choice.report()[0]
    assert report.sections["method"][0].startswith(expected)


def test_particles_must_fit_before_a_call_begins_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    decided(monkeypatch, 64, 4, replace(CHEAP_SMC, begin_exact=True))
    monkeypatch.setattr(memory, "free_bytes", lambda _: 50_000)
    with pytest.raises(InputError, match="64 particles a request do not fit"):
        of_seven()


@pytest.mark.parametrize("begin_exact", [True, False])
def test_a_draft_that_cannot_write_everything_is_warned_of(begin_exact: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where exact speculation comes first, which needs no such draft."""
    target, draft = TableLM(VOCAB).double(), TableLM(VOCAB).double()
    with torch.no_grad():
        draft.table[:, 1] = -torch.inf
    decided(monkeypatch, 4, 2, replace(CHEAP_SMC, begin_exact=begin_exact))
    g = generate(target, draft, PROMPT[None], max_new_tokens=9, method="auto", compiler="eager", validate=False)
    assert any("never drafted" in warning for warning in g.stats.warnings)


def test_one_particle_spends_what_its_weight_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """No spread of weights tells what one particle costs. A draft that is far off is left at once."""
    decided(monkeypatch, 1, 4, CHEAP_SMC)
    target, far = (TinyTransformerLM(11, max_positions=80, seed=seed).double() for seed in (0, 1))
    options = {"max_new_tokens": 40, "method": "auto", "max_divergence": 1.0, "compiler": "eager", "validate": False}
    texts = [generate(target, far, PROMPT[None], seed=seed, **options).stats for seed in range(8)]
    assert sum(stats.exact_cycles for stats in texts) > 0.8 * sum(stats.cycles for stats in texts)


def test_a_floor_of_nothing_is_exact() -> None:
    g = of_seven(max_kl_per_token=0.0)
    assert g.stats.method in ("speculative", "autoregressive")
    assert g.kl_bound.tolist() == [0.0]


def test_a_greedy_request_under_auto_is_exact_speculation() -> None:
    auto, loop = of_seven(temperature=0), of_seven(temperature=0, method="autoregressive")
    assert auto.stats.method == "speculative"
    assert torch.equal(auto.sequences, loop.sequences)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "auto", "ess_floor": 2.0}, 'ess_floor is not for method="auto"'),
        ({"method": "auto", "time_budget": 2.0}, 'time_budget is not for method="auto"'),
        ({"method": "auto", "max_kl_per_token": -1}, "max_kl_per_token must lie between"),
        ({"method": "smc", "max_kl_per_token": 0.1}, "max_kl_per_token has no effect"),
        (
            {"method": "speculative", "lookahead": "auto", "max_kl_per_token": 0.1},
            'max_kl_per_token is for method="smc"',
        ),
    ],
)
def test_floors_that_mean_nothing_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        of_seven(**options)


def test_where_nothing_can_be_compared_exact_speculation_runs_and_says_so() -> None:
    """A pilot would change the state of this processor."""

    class Counting:
        calls = 0

        def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            return scores - float(self.calls > 3)

    g = of_seven(logits_processor=[Counting()])
    assert (g.stats.method, g.stats.lookahead) == ("speculative", 6)
    assert any("takes exact speculation with K=6 and compares nothing: no pilot" in w for w in g.stats.warnings)
    assert torch.equal(
        g.sequences, of_seven(method="speculative", lookahead=6, logits_processor=[Counting()]).sequences
    )
    assert "compares nothing" in str(explain(generate, *SEVEN, PROMPT[None], **USUAL, logits_processor=[Counting()]))


def test_the_pilot_draws_other_numbers_than_the_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    seeds: list[int] = []
    begin = session_begin.begin

    def noted(method: Any, request: Any, *args: Any, **more: Any) -> Any:
        seeds.extend(request.seeds.tolist())
        return begin(method, request, *args, **more)

    for module in ("smc", "speculative", "autoregressive"):
        monkeypatch.setattr(f"smc_compile.runtime.sessions.{module}.begin", noted)
    monkeypatch.setattr(from_model, "programs", LRU(from_model.KEPT))
    of_seven(seed=11)
    assert len(seeds) == 3
    assert [seed == 11 for seed in seeds] == [False, False, True]


def test_a_model_with_a_state_of_its_own_is_refused() -> None:
    with pytest.raises(OptionError, match='method "auto" cannot use this draft'):
        generate(TableLM(VOCAB), GRUStep(VOCAB), PROMPT[None], max_new_tokens=4, method="auto", compiler="eager")


def test_a_floor_chooses_particles_for_smc() -> None:
    g = of_seven(method="smc", n_particles="auto", lookahead="auto", max_kl_per_token=0.05)
    chosen = choice_of(g.program)
    assert chosen is not None
    assert chosen.chosen.kl is not None
    assert chosen.chosen.kl <= 0.05
    assert g.stats.method == "smc"
