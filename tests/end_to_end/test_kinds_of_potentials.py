"""Every kind of potential gives its law, by enumeration of all sequences of a toy vocabulary.

Seeds are fixed; the rate stated with a statistical test is that of a false alarm when the seed was chosen.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from helpers.enumeration import sequence_distribution
from helpers.model_parts import perturbed
from helpers.replicates import evidence_measure, replicate, z_scores
from helpers.toys import TableLM, TinyTransformerLM
from torch import Tensor, nn

from smc_compile import generate
from smc_compile.control import (
    Canonical,
    Critic,
    JsonSchema,
    Lark,
    Potential,
    Power,
    Regex,
    Reward,
    Twist,
    conditions,
)
from smc_compile.errors import GenerationError, InputError, OptionError

pytestmark = pytest.mark.usefixtures("interpreted")
TOKENS = [b"a", b"b", b"ab", None]  # "ab" can be spelled in two ways
EOS, VOCAB, LENGTH = 3, 4, 5
PROMPT = torch.tensor([1, 0, 2])
GIVEN: dict[str, Any] = {"tokenizer": TOKENS, "eos_token_id": EOS, "lookahead": 3, "validate": False}


def pair(name: str = "table") -> tuple[Any, Any]:
    target = TableLM(VOCAB).double() if name == "table" else TinyTransformerLM(VOCAB).double()
    return target, perturbed(target, 0.6)


def fits(pattern: str) -> Callable[[str], float]:
    return lambda text: 0.0 if re.fullmatch(pattern, text) else -math.inf


def few_b(text: str) -> float:
    """A reward that is low where b is frequent."""
    return 0.4 * text.count("a") - 0.7 * text.count("b")


class Balanced(Potential):
    """As many a as b, and never more b: by its own class, asked once a cycle."""

    def prefix(self, text: bytes) -> float:
        depth = list(itertools.accumulate({97: 1, 98: -1}[byte] for byte in text))
        return 0.0 if min(depth, default=0) >= 0 else -math.inf

    def complete(self, text: bytes) -> float:
        return self.prefix(text) if text.count(b"a") == text.count(b"b") else -math.inf


class Steering(Balanced):
    """The same, which also says what may follow; and it likes a, and its empty text weighs 2."""

    def prefix(self, text: bytes) -> float:
        return super().prefix(text) + 0.3 * text.count(b"a") + math.log(2.0)

    def complete(self, text: bytes) -> float:
        return Balanced().complete(text)

    def logw_next(self, text: bytes, tokens: Any) -> list[float]:
        return [-math.inf if t is None else self.prefix(text + t) - self.prefix(text) for t in tokens]


class Ones(nn.Module):
    """A reward of token ids [n, L] with their prompt: how many of them are 1."""

    def forward(self, ids: Tensor) -> Tensor:
        return (ids == 1).sum(1, keepdim=True).double() * -0.5


class Pairs:
    """Of the toy vocabulary: b may not follow a, since the tokenizer would write ab."""

    def after(self, token: int | None) -> Any:
        return np.array([True, token != 0, True, True])


def balanced(text: str) -> float:
    return Balanced().complete(text.encode())


def by_text(weigh: Callable[[str], float]) -> Callable[[list[int]], float]:
    return lambda tokens: weigh(b"".join(TOKENS[t] or b"" for t in tokens).decode())


def canonical(tokens: list[int]) -> float:
    return -math.inf if any(pair == (0, 1) for pair in itertools.pairwise(tokens)) else 0.0


# What is given, and the log weight of the tokens of a whole text, without its end.
KINDS: dict[str, tuple[Callable[[], Potential], Callable[[list[int]], float]]] = {
    "grammar": (lambda: Lark("start: /a/ rest*\nrest: /bb/ | /a/"), by_text(fits("a(bb|a)*"))),
    "nested grammar": (lambda: Lark('start: ("a" start "b")?'), by_text(fits("|ab|aabb|aaabbb|a{4}b{4}"))),
    "grammar and pattern": (lambda: Lark('start: ("a" start "b")?') * Regex("a*b{1,2}"), by_text(fits("ab|aabb"))),
    "pattern and its power": (lambda: Regex("a(bb|a)*") ** 3, by_text(fits("a(bb|a)*"))),
    "critic of a pattern": (lambda: Critic(Regex("a(bb|a)*")), by_text(fits("a(bb|a)*"))),
    "reward at the end": (lambda: Reward(few_b), by_text(few_b)),
    "reward of each cycle": (lambda: Reward(few_b, beta=-0.5, at="cycle"), by_text(lambda t: -0.5 * few_b(t))),
    "reward of each step": (lambda: Reward(few_b, at="step", step="b"), by_text(few_b)),
    "reward to a power": (lambda: Reward(few_b) ** 0.5, by_text(lambda t: 0.5 * few_b(t))),
    "rewards and a pattern": (
        lambda: Reward(few_b) * Regex("a(bb|a)*") * Reward(few_b, at="cycle"),
        by_text(lambda t: 2 * few_b(t) + fits("a(bb|a)*")(t)),
    ),
    "reward of a module": (lambda: Reward(Ones(), at="cycle"), lambda tokens: -0.5 * (1 + tokens.count(1))),
    "twist": (lambda: Twist(few_b) * Regex("a(bb|a)*"), by_text(fits("a(bb|a)*"))),
    "potential of a user": (Balanced, by_text(balanced)),
    "steering potential of a user": (Steering, by_text(balanced)),
    "steering potential and a grammar": (lambda: Steering() * Lark("start: /[ab]*/"), by_text(balanced)),
    "canonical": (Canonical, canonical),
    "canonical and a pattern": (
        lambda: Canonical() * Regex("a(b|a)*"),
        lambda tokens: canonical(tokens) + by_text(fits("a(b|a)*"))(tokens),
    ),
}


@pytest.fixture(autouse=True)
def toy_spellings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conditions, "followers_of", lambda tokenizer: Pairs())


def weights_of(weigh: Callable[[list[int]], float]) -> Tensor:
    """exp of the log weight of all sequences [V] * LENGTH; what follows an end does not count."""
    found = torch.zeros([VOCAB] * LENGTH, dtype=torch.float64)
    for tokens in itertools.product(range(VOCAB), repeat=LENGTH):
        text = list(tokens[: tokens.index(EOS)]) if EOS in tokens else list(tokens)
        found[tokens] = math.exp(weigh(text))
    return found


def assert_law(potential: Potential, wanted: Tensor, **options: Any) -> None:
    """E[Z] is the sum of ``wanted`` (4 standard errors, 6e-5), and E[Z w(x)] is its value at x (5.5, 1e-6 each)."""
    models = pair(options.pop("pair", "table"))
    g = replicate(*models, PROMPT, LENGTH, 2**12, **{**GIVEN, "potential": potential, "n_particles": 4, **options})
    evidence = g.log_evidence.exp()
    assert abs(z_scores(evidence, wanted.sum())) < 4
    measure = torch.where(evidence[:, None] > 0, evidence_measure(g, wanted), 0.0)  # a dead population has no weights
    assert (measure[:, wanted.flatten() == 0] == 0).all()
    frequent = wanted.flatten() > 0.01 * wanted.sum()
    assert frequent.sum() > 1
    assert z_scores(measure[:, frequent], wanted.flatten()[frequent]).abs().max() < 5.5


@pytest.mark.parametrize("kind", KINDS)
def test_evidence_times_weight_is_unbiased_for_every_text(kind: str) -> None:
    make, weigh = KINDS[kind]
    law = sequence_distribution(pair()[0], PROMPT, LENGTH, VOCAB, 1.0, EOS)
    assert_law(make(), law * weights_of(weigh))


@pytest.mark.parametrize(
    "options",
    [{"n_particles": 1}, {"ess_threshold": 1.0}, {"max_divergence": 0.1}, {"lookahead": 7}, {"pair": "transformer"}],
    ids=str,
)
@pytest.mark.parametrize("kind", ["nested grammar", "rewards and a pattern", "steering potential of a user"])
def test_the_law_holds_with_every_way_to_run(kind: str, options: dict[str, Any]) -> None:
    make, weigh = KINDS[kind]
    law = sequence_distribution(pair(options.get("pair", "table"))[0], PROMPT, LENGTH, VOCAB, 1.0, EOS)
    assert_law(make(), law * weights_of(weigh), **options)


def test_a_spelling_that_nothing_can_follow_is_not_begun() -> None:
    """Behind "a" the pattern wants b, which is not canonical there: one particle never dies of it."""
    g = replicate(*pair(), PROMPT, LENGTH, 256, potential=Canonical() * Regex("abab"), **{**GIVEN, "n_particles": 1})
    assert (g.log_evidence > -math.inf).all()
    assert (g.sequences[:, 3:5] == 2).all()
    law = sequence_distribution(pair()[0], PROMPT, LENGTH, VOCAB, 1.0, EOS)
    torch.testing.assert_close(g.log_evidence.exp(), law[2, 2, EOS].sum().expand(256))  # there is one text


@pytest.mark.parametrize("alpha", [0.6, 2.0])
@pytest.mark.parametrize("pattern", [None, "a(bb|a)*"])
def test_a_power_is_that_of_whole_texts(alpha: float, pattern: str | None) -> None:
    """And no temperature, whose law is another one."""
    law = sequence_distribution(pair()[0], PROMPT, LENGTH, VOCAB, 0.8, EOS)
    wanted = law**alpha * (weights_of(by_text(fits(pattern))) if pattern else 1.0)
    power = Power(alpha) if pattern is None else Power(alpha) * Regex(pattern)
    assert_law(power, wanted, temperature=0.8)
    tempered = sequence_distribution(pair()[0], PROMPT, LENGTH, VOCAB, 0.8 / alpha, EOS)
    assert (law**alpha / (law**alpha).sum() - tempered).abs().sum() / 2 > 0.02


def test_powers_multiply() -> None:
    law = sequence_distribution(pair()[0], PROMPT, LENGTH, VOCAB, 1.0, EOS)
    assert_law(Power(2.0) ** 0.5 * Power(1.2), law**1.7)
    with pytest.raises(OptionError, match="exponents of Power leave none"):
        generate(*pair(), PROMPT[None], max_new_tokens=4, potential=Power(0.3) * Power(0.2), compiler="eager", **GIVEN)


@pytest.mark.parametrize("pattern", ["a(bb)*(aa)?", "(ab)*"])
def test_a_grammar_cut_off_at_the_limit_is_the_beginning_of_a_whole_text(pattern: str) -> None:
    """The same evidence, weights and texts as the automaton of the same language gives, seed by seed."""
    options = {**GIVEN, "n_particles": 4, "at_limit": "cut", "compiler": "eager", "seed": 3, "max_new_tokens": LENGTH}
    ids = PROMPT.expand(64, -1)
    tables = generate(*pair(), ids, potential=Regex(pattern), **options)
    host = generate(*pair(), ids, potential=Lark(f"start: /{pattern}/"), **options)
    torch.testing.assert_close(tables.log_evidence, host.log_evidence)
    assert torch.equal(tables.sequences, host.sequences)


def test_a_schema_has_one_law_as_an_automaton_and_as_a_grammar(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seed by seed, where the budget does not bind; only the automaton looks ahead to the limit."""
    tokens = [b'"', b"a", b"b", b"ab", b'"a', b'b"', b"1", None]
    schema = {"enum": ["a", "abab", "bb", 1, 11]}
    target = TableLM(len(tokens)).double()
    options = {**GIVEN, "tokenizer": tokens, "eos_token_id": 7, "n_particles": 4, "compiler": "eager"}
    ids = torch.tensor([[1, 0]]).expand(64, -1)

    def run() -> Any:
        return generate(
            target, perturbed(target, 0.6), ids, potential=JsonSchema(schema), max_new_tokens=12, seed=5, **options
        )

    tables = run()
    monkeypatch.setattr(JsonSchema, "regular", None)
    host = run()
    assert "automaton" in tables.stats.tables[0]
    assert "on the host" in host.stats.tables[0]
    torch.testing.assert_close(tables.log_evidence, host.log_evidence)
    assert torch.equal(tables.sequences, host.sequences)


def test_requests_of_a_batch_may_have_kinds_of_their_own() -> None:
    each = [Regex("a(bb|a)*"), Reward(few_b, at="cycle"), Lark('start: ("a" start "b")?'), Power(2.0), Steering()]
    options = {**GIVEN, "n_particles": 4, "compiler": "eager", "max_new_tokens": 6}
    ids = torch.tensor([[0, 0, 1, 2]]).expand(5, -1)
    together = generate(*pair("transformer"), ids, potential=each, seed=list(range(5)), **options)
    for b, potential in enumerate(each):
        alone = generate(*pair("transformer"), ids[:1], potential=potential, seed=b, **options)
        assert torch.equal(alone.sequences[0], together.sequences[b])
        assert alone.log_evidence[0] == pytest.approx(together.log_evidence[b].item(), abs=1e-9)


def test_regions_that_are_compiled_give_the_same() -> None:
    """Bits, log weights and powers are read by other code each."""
    options = {**GIVEN, "n_particles": 4, "max_new_tokens": 6, "seed": 5}
    for potential in (Lark('start: ("a" start "b")?'), Steering(), Power(1.5) * Regex("a(bb|a)*")):
        plain = generate(*pair(), PROMPT.expand(3, -1), compiler="eager", potential=potential, **options)
        with torch.compiler.set_stance("default"):
            compiled = generate(*pair(), PROMPT.expand(3, -1), compiler="aot_eager", potential=potential, **options)
        torch.testing.assert_close(plain.log_evidence, compiled.log_evidence)
        assert torch.equal(plain.sequences, compiled.sequences)


def test_one_compilation_serves_patterns_of_all_sizes() -> None:
    """More of them than Dynamo would compile variants."""
    models, options = pair(), {**GIVEN, "max_new_tokens": 5, "compiler": "aot_eager", "seed": 0}
    with torch.compiler.set_stance("default"):
        for size in range(1, 11):
            given = {**options, "potential": Regex(f"a(ab|b{{{size}}})*")}
            out = generate(*models, PROMPT[None], **given)
    assert out.stats.compile_seconds == 0.0


def test_a_population_that_dies_of_a_critic_ends_alone() -> None:
    each = [Critic(Regex("c")), Critic(Regex("a(bb|a)*"))]
    out = generate(
        *pair(), PROMPT.expand(2, -1), potential=each, max_new_tokens=5, compiler="eager", n_particles=64, **GIVEN
    )
    assert out.log_evidence[0] == -math.inf
    assert out.log_evidence[1] > -math.inf
    assert any("request 0" in warning for warning in out.stats.warnings)


# ---- what does not fit -----------------------------------------------------------------------------------------------


class Nan(Balanced):
    def complete(self, text: bytes) -> float:
        return math.nan

    prefix = complete


class TooFew(Balanced):
    def batch_prefix(self, texts: Any) -> list[float]:
        return [0.0] * (len(texts) - 1)


class Narrow(Steering):
    def logw_next(self, text: bytes, tokens: Any) -> list[float]:
        return [0.0, 0.0]


@pytest.mark.parametrize(
    ("potential", "message"),
    [
        (Nan(), "Nan gave a weight that is NaN or infinite"),
        (Reward(lambda text: math.inf), "gave a weight that is NaN or infinite"),
        (TooFew(), "TooFew must give a weight for each text"),
        (Narrow(), "logw_next of Narrow must give a weight for each token"),
        (Reward(nn.Embedding(VOCAB, 2), at="cycle"), "must give one number for each text"),
    ],
    ids=["nan", "inf", "too few", "narrow", "module"],
)
def test_weights_that_are_none_are_told_with_what_was_written(potential: Potential, message: str) -> None:
    with pytest.raises((GenerationError, OptionError), match=message):
        generate(*pair(), PROMPT[None], max_new_tokens=5, compiler="eager", potential=potential, **GIVEN)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Power(0), "exponent of Power must be a number above 0"),
        (lambda: Regex("a") ** 0, "exponent must be a number above 0"),
        (lambda: Reward(3), "a reward must be a function"),
        (lambda: Reward(few_b, at="token"), "at='token' is unknown"),
        (lambda: Reward(few_b, beta=math.inf), "beta must be a number"),
        (lambda: Reward(few_b, at="step", step=""), "step must be a string"),
        (lambda: Twist("a"), "a twist must be a function"),
        (lambda: Critic("a"), "a critic must be of a potential"),
        (lambda: Power(2).prefix(b"a"), "Power has no weight of a text"),
        (lambda: Canonical().complete(b"a"), "Canonical has no weight of a text"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_no_potential_is_refused(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        make()


def test_a_grammar_needs_an_end_token_and_a_power_needs_no_tokenizer() -> None:
    given = {**GIVEN, "eos_token_id": None, "compiler": "eager", "max_new_tokens": 3}
    with pytest.raises(OptionError, match="needs an end token"):
        generate(*pair(), PROMPT[None], potential=Lark('start: "a"'), **given)
    with pytest.raises((InputError, OptionError), match="needs the tokenizer"):
        generate(*pair(), PROMPT[None], potential=Reward(few_b), **{**given, "tokenizer": None})
    out = generate(*pair(), PROMPT[None], potential=Power(2.0), **{**given, "tokenizer": None})
    assert out.stats.tables == ["Power(2): in the compiled cycle"]
