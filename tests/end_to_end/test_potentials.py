"""Texts that are conditioned on a potential follow the model's own law given that they fit, by enumeration.

Seeds are fixed; the rate stated with a statistical test is that of a false alarm when the seed was chosen.
"""

from __future__ import annotations

import itertools
import math
import re
from typing import Any

import pytest
import torch
from helpers.enumeration import sequence_distribution
from helpers.model_parts import perturbed
from helpers.replicates import distance, evidence_measure, replicate, weighted_distribution, z_scores
from helpers.toys import GRUStep, TableLM, TinyTransformerLM
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

from smc_compile import Generation, explain, generate
from smc_compile.control import Choices, Potential, Regex, conditions
from smc_compile.errors import InputError, OptionError
from smc_compile.pairs.shipped import load_pair

pytestmark = pytest.mark.usefixtures("interpreted")
TOKENS = [b"a", b"b", b"ab", None]  # "ab" can be spelled in two ways
EOS, VOCAB, LENGTH = 3, 4, 5
PROMPT = torch.tensor([1, 0, 2])
GIVEN: dict[str, Any] = {"tokenizer": TOKENS, "eos_token_id": EOS, "lookahead": 3, "validate": False}


def pair(name: str) -> tuple[Any, Any]:
    target = TableLM(VOCAB).double() if name == "table" else TinyTransformerLM(VOCAB).double()
    return target, perturbed(target, 0.6)


def spelled(tokens: tuple[int, ...]) -> tuple[str, bool]:
    """The text, and whether it has ended."""
    until = tokens[: tokens.index(EOS)] if EOS in tokens else tokens
    return b"".join(TOKENS[t] or b"" for t in until).decode(), EOS in tokens


def fitting(pattern: str, n: int, at_limit: str = "complete") -> Tensor:
    """Which of all sequences [V] * n fit: 1 or 0. "cut": those without an end that some whole text begins with."""
    found = torch.zeros([VOCAB] * n, dtype=torch.float64)
    longest = 2 * n
    whole = ["".join(t) for size in range(longest + 1) for t in itertools.product("ab", repeat=size)]
    whole = [text for text in whole if re.fullmatch(pattern, text)]
    for tokens in itertools.product(range(VOCAB), repeat=n):
        text, ended = spelled(tokens)
        fits = text in whole if ended or at_limit == "complete" else any(w.startswith(text) for w in whole)
        found[tokens] = float(fits)
    return found


CASES: dict[str, dict[str, Any]] = {
    **{f"N={n}": {"n_particles": n} for n in (1, 4, 16)},
    "a finite language": {"pattern": "ab|ba|abab"},
    "nothing but an end": {"pattern": "a?"},
    "even in length": {"pattern": "((a|b)(a|b))*"},
    "cut off at the limit": {"pattern": "a(bb)*(aa)?", "at_limit": "cut"},
    "always resampled": {"ess_threshold": 1.0},
    "never resampled": {"ess_threshold": 0.0},
    "blocks that are cut": {"max_divergence": 0.1},
    "a cut at every token": {"max_divergence": 0.0},
    "temperature": {"temperature": 0.6},
    "long blocks": {"lookahead": 7},
    "one token a block": {"lookahead": 1},
    "transformer": {"pair": "transformer"},
    "transformer, cut": {"pair": "transformer", "max_divergence": 0.1, "at_limit": "cut"},
}


@pytest.mark.parametrize("case", CASES)
def test_evidence_times_weight_is_unbiased_for_every_text(case: str) -> None:
    """E[Z] is the mass of the texts that fit (4 standard errors, 6e-5), and E[Z w(x)] = p(x) where x fits, else 0
    (5.5 for each of the frequent ones, 1e-6)."""
    options = {**GIVEN, "n_particles": 4, "pattern": "a(bb|a)*", **CASES[case]}
    pattern, at_limit = options.pop("pattern"), options.get("at_limit", "complete")
    models = pair(options.pop("pair", "table"))
    fits = fitting(pattern, LENGTH, at_limit)
    law = sequence_distribution(models[0], PROMPT, LENGTH, VOCAB, options.get("temperature", 1.0), EOS)
    part = law * fits
    runs = 2**13 // max(options["n_particles"] // 4, 1)
    g = replicate(*models, PROMPT, LENGTH, runs, potential=Regex(pattern), **options)

    assert 0.001 < part.sum() < 0.9
    assert g.stats.dropped == 0
    assert g.kl_bound.isnan().all()
    evidence = g.log_evidence.exp()
    if evidence.std() > 1e-12:
        assert abs(z_scores(evidence, part.sum())) < 4
    assert (evidence_measure(g, law)[:, part.flatten() == 0] == 0).all()
    frequent = part.flatten() > 0.003 * part.sum()
    assert z_scores(evidence_measure(g, law)[:, frequent], part.flatten()[frequent]).abs().max() < 5.5


def test_more_particles_come_nearer_and_beat_masks() -> None:
    """Total variation to the law of texts that fit; masking each token and drawing on (N=1, every block cut before
    its first token) stays as far as it is."""
    models, pattern = pair("table"), "a(bb|a)*"
    law = sequence_distribution(models[0], PROMPT, LENGTH, VOCAB, 1.0, EOS) * fitting(pattern, LENGTH)
    law = law / law.sum()

    def far(n: int, **options: Any) -> float:
        runs = 2**15 // n
        g = replicate(*models, PROMPT, LENGTH, runs, potential=Regex(pattern), n_particles=n, **{**GIVEN, **options})
        return distance(weighted_distribution(g, law), law)

    masked = far(1, max_divergence=0.0)
    found = [far(n) for n in (1, 8, 64, 512)]
    print(f"masked {masked:.3f}, N = 1, 8, 64, 512: {', '.join(f'{d:.3f}' for d in found)}")
    assert masked > 0.1
    assert found[1] < masked
    assert found[0] > found[1] > found[2] > 2 * found[3] - 0.02
    assert found[3] < 0.03


def test_requests_of_a_batch_may_have_potentials_budgets_and_ends_of_their_own() -> None:
    models = pair("transformer")
    each = [Regex("a(bb|a)*"), Choices(["ab", "bab"]), Regex("b*"), Regex("a(bb|a)*")]
    budgets, ends = [5, 3, 7, 9], [[3], [3], [3, 0], [3]]
    ids = torch.tensor([[0, 0, 1, 2], [1, 2, 0, 1], [2, 2, 2, 2], [0, 1, 1, 0]])
    mask = torch.tensor([[0, 0, 1, 1], [1] * 4, [1] * 4, [0, 1, 1, 1]])

    def of(rows: slice) -> Generation:
        options = {**GIVEN, "eos_token_id": ends[rows], "seed": list(range(4))[rows], "compiler": "eager"}
        return generate(
            *models, ids[rows], attention_mask=mask[rows], max_new_tokens=budgets[rows], potential=each[rows],
            n_particles=4, **options,
        )  # fmt: skip

    together = of(slice(0, 4))
    for b, potential in enumerate(each):
        alone = of(slice(b, b + 1))
        width = alone.sequences.shape[1]
        assert torch.equal(alone.sequences[0], together.sequences[b, :width])
        assert alone.log_evidence[0] == pytest.approx(together.log_evidence[b].item(), abs=1e-9)
        new = together.sequences[b, 4 : 4 + int(together.new_lengths[b])].tolist()
        text = b"".join(TOKENS[t] or b"" for t in new if t not in ends[b])
        assert potential.complete(text) == 0.0


def test_regions_that_are_compiled_give_the_same() -> None:
    target, draft = pair("transformer")
    options = {**GIVEN, "n_particles": 4, "max_new_tokens": 6, "seed": 5, "potential": Regex("a(bb|a)*")}
    plain = generate(target, draft, PROMPT.expand(3, -1), compiler="eager", **options)
    with torch.compiler.set_stance("default"):
        compiled = generate(target, draft, PROMPT.expand(3, -1), compiler="aot_eager", **options)
        cut = generate(target, draft, PROMPT.expand(3, -1), compiler="aot_eager", **{**options, "max_divergence": 0.1})
    torch.testing.assert_close(plain.log_evidence, compiled.log_evidence)
    assert torch.equal(plain.sequences, compiled.sequences)
    plain = generate(target, draft, PROMPT.expand(3, -1), compiler="eager", max_divergence=0.1, **options)
    assert torch.equal(plain.sequences, cut.sequences)


def test_rules_and_streams_go_together_with_a_potential() -> None:
    """A processor changes the model; the potential conditions what it made."""
    target, draft = pair("table")

    def no_b(ids: Tensor, scores: Tensor) -> Tensor:
        return scores.masked_fill(torch.arange(VOCAB) == 1, -math.inf)

    law = sequence_distribution(
        target, PROMPT, LENGTH, VOCAB, 1.0, EOS, lambda s: s.masked_fill(torch.arange(VOCAB) == 1, -math.inf)
    )
    mass = (law * fitting("a(ba|a)*b?", LENGTH)).sum()
    options = {**GIVEN, "n_particles": 4, "potential": Regex("a(ba|a)*b?"), "logits_processor": [no_b]}
    g = replicate(target, draft, PROMPT, LENGTH, 2**12, **options)
    assert abs(z_scores(g.log_evidence.exp(), mass)) < 4
    settled: list[int] = []
    one = generate(
        target, draft, PROMPT[None], max_new_tokens=9, seed=1, compiler="eager",
        streamer=lambda p: settled.append(p.settled), **options,
    )  # fmt: skip
    assert settled[-1] == int(one.new_lengths[0])


def test_a_population_that_dies_ends_alone_and_says_so() -> None:
    """The target never says b, and one request must."""

    class Without(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = TinyTransformerLM(VOCAB).double()
            self.register_buffer("never", torch.tensor([0, -math.inf, -math.inf, 0], dtype=torch.float64))

        def forward(self, ids: Tensor) -> Tensor:
            return self.model(ids) + self.never

    target, draft = Without(), TinyTransformerLM(VOCAB, seed=1).double()
    each = [Regex("a*"), Regex("aaaaa*b"), Regex("b")]
    g = generate(
        target, draft, PROMPT.expand(3, -1), max_new_tokens=9, potential=each, n_particles=4, seed=0, compiler="eager",
        **GIVEN,
    )  # fmt: skip
    assert g.log_evidence.isfinite().tolist() == [True, False, False]
    assert g.log_evidence[1] == -math.inf
    lost = [warning for warning in g.stats.warnings if warning.startswith("all particles")]
    assert len(lost) == 2
    assert "request 1" in lost[0]
    assert "Regex('aaaaa*b')" in lost[0]
    assert "request 2 have died at new token 0" in lost[1]
    assert int(g.new_lengths[2]) == 0
    alone = generate(
        target, draft, PROMPT[None], max_new_tokens=9, potential=each[0], n_particles=4, seed=0, compiler="eager",
        **GIVEN,
    )  # fmt: skip
    assert torch.equal(alone.sequences[0], g.sequences[0, : alone.sequences.shape[1]])


def test_a_posterior_is_what_the_particles_say() -> None:
    models, law = pair("table"), Choices(["ab", "b", "bab"])

    class Joined:
        def decode(self, ids: list[int]) -> str:
            return b"".join(TOKENS[i] or b"" for i in ids).decode()

    options = {**GIVEN, "max_new_tokens": 6, "potential": law, "seed": 0, "compiler": "eager"}
    g = generate(*models, PROMPT[None], n_particles=4096, **options)
    by_tokens = sequence_distribution(models[0], PROMPT, 5, VOCAB, 1.0, EOS)
    spellings = {"ab": [(2,), (0, 1)], "b": [(1,)], "bab": [(1, 0, 1), (1, 2)]}
    mass = {
        text: sum(float(by_tokens[(*ids, *[EOS] * (5 - len(ids)))]) for ids in ways) for text, ways in spellings.items()
    }
    found = g.decoded_posterior(Joined())
    assert set(found) == set(mass)
    assert list(found.values()) == sorted(found.values(), reverse=True)
    for text, value in mass.items():
        assert found[text] == pytest.approx(value / sum(mass.values()), abs=0.05)
    assert g.posterior()[1, EOS] == pytest.approx(found["b"])
    assert float(g.log_ml[0]) == pytest.approx(math.log(sum(mass.values())), abs=0.1)


def test_a_report_names_the_potential_and_its_tables() -> None:
    report = str(
        explain(
            generate, *pair("table"), PROMPT[None], max_new_tokens=5, potential=Regex("a(bb|a)*"), compiler="eager",
            **GIVEN,
        )
    )  # fmt: skip
    assert "Regex('a(bb|a)*'): an automaton in the compiled cycle" in report
    assert "evidence" in report


# ---- what does not fit -----------------------------------------------------------------------------------------------


class Half(Potential):
    language = None
    name = "half"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"potential": "a*"}, "potential must be a Potential"),
        ({"potential": [Regex("a*"), Regex("b*")]}, "potential has 2 values for 1 requests"),
        ({"tokenizer": None}, "a potential needs the tokenizer"),
        ({"tokenizer": object()}, "does not tell the bytes of its tokens"),
        ({"tokenizer": ["a", "b"]}, "a list of tokens must hold bytes"),
        ({"tokenizer": [*TOKENS, b"c"]}, "it has 5 tokens, and the models know 4"),
        ({"eos_token_id": None}, "a potential needs an end token"),
        ({"at_limit": "end"}, "at_limit 'end' is unknown"),
        ({"at_limit": "cut", "potential": None}, "at_limit needs a potential"),
        ({"method": "speculative"}, 'method="speculative" cannot condition'),
        ({"method": "auto", "lookahead": "auto"}, 'method="auto" cannot condition'),
        ({"method": "autoregressive"}, 'method="autoregressive" cannot condition'),
        ({"temperature": 0}, "temperature 0 cannot condition"),
        ({"n_particles": "auto", "ess_floor": 2.0}, '"auto" with a potential'),
        ({"stopping_criteria": [lambda ids, scores: ids[:, -1] == 0]}, "a potential says where a text ends"),
        ({"max_new_tokens": 2, "potential": Regex("a{5}")}, "the shortest text of Regex.* has 5 tokens"),
        ({"potential": Regex("c")}, "spell no text of Regex"),
    ],
    ids=lambda value: value if isinstance(value, str) else "given",  # no address, which differs between workers
)
def test_what_does_not_fit_is_refused_before_any_work(given: dict[str, Any], message: str) -> None:
    usual = {**GIVEN, "potential": Regex("a*"), "max_new_tokens": 4, "compiler": "eager"}
    with pytest.raises((OptionError, InputError), match=message):
        generate(*pair("table"), PROMPT[None], **{**usual, **given})


def test_models_with_a_state_of_their_own_are_refused() -> None:
    own = GRUStep(VOCAB)
    with pytest.raises(OptionError, match="needs models that can forget"):
        generate(own, own, PROMPT[None], max_new_tokens=4, potential=Regex("a*"), compiler="eager", **GIVEN)


def test_tokens_that_are_added_to_a_tokenizer_are_seen() -> None:
    tokenizer = Tokenizer(models.BPE({"a": 0, "b": 1}, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(False), decoders.ByteLevel()
    assert conditions._tokens_of([b"a"]) == (b"a",)
    with pytest.raises(OptionError, match="changes the text"):
        conditions._tokens_of(tokenizer)  # it has no bytes but two
    shipped = Tokenizer.from_str(load_pair()[2].to_str())
    before = conditions._tokens_of(shipped)
    assert conditions._tokens_of(shipped) is before
    shipped.add_tokens(["hello world"])
    assert conditions._tokens_of(shipped)[-1] == b"hello world"
