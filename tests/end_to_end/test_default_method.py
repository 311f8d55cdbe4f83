"""What runs where no method is asked for: "auto", or SMC for who gives N, K or a floor of its own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.even_costs import EvenCosts
from helpers.model_parts import perturbed
from helpers.toys import GRUStep, TableLM, TinyTransformerLM
from torch import Tensor, nn

from smc_compile import decode, generate
from smc_compile.auto import choice as choosing
from smc_compile.errors import OptionError

MODEL = TinyTransformerLM()
NEAR = perturbed(MODEL, 0.05)
IDS = torch.tensor([[0, 1, 2]])
QUICK: dict[str, Any] = {"compiler": "eager", "seed": 0, "validate": False}

pytestmark = pytest.mark.usefixtures("fresh_dynamo")
interpreted = pytest.mark.usefixtures("interpreted")


@pytest.fixture(autouse=True)
def even_costs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choosing, "cycle_model", lambda *_: EvenCosts())


def loop(model: nn.Module, ids: Tensor, n: int) -> Tensor:
    for _ in range(n):
        ids = torch.cat([ids, torch.multinomial(torch.softmax(model(ids)[:, -1], -1), 1)], 1)
    return ids


@interpreted
def test_it_is_auto_with_its_floor() -> None:
    asked = generate(MODEL, NEAR, IDS, max_new_tokens=20, method="auto", **QUICK)
    out = generate(MODEL, NEAR, IDS, max_new_tokens=20, **QUICK)
    assert torch.equal(out.sequences, asked.sequences)
    assert out.stats.method == asked.stats.method == "auto"
    assert out.program.options == asked.program.options
    far = generate(MODEL, NEAR, IDS, max_new_tokens=20, max_kl_per_token=0.0, **QUICK)
    assert far.stats.method == "speculative"


@pytest.mark.usefixtures("untraced_regions")
def test_it_is_the_same_by_every_way_in() -> None:
    fast = decode(loop, draft=NEAR, **QUICK)
    compiled = torch.compile(loop, backend="smc", options={"draft": NEAR, **QUICK})
    text = fast(MODEL, IDS, 20)
    assert fast.last.stats.method == "auto"
    assert torch.equal(text, compiled(MODEL, IDS, 20))
    assert torch.equal(text, generate(MODEL, NEAR, IDS, max_new_tokens=20, **QUICK).sequences)


@pytest.mark.parametrize(
    ("given", "numbers"),
    [
        ({"n_particles": 4}, (4, 6)),
        ({"lookahead": 3}, (8, 3)),
        ({"lookahead": "auto", "ess_floor": 1.1}, None),
        ({"n_particles": "auto", "time_budget": 1e6}, None),
    ],
    ids=str,
)
@interpreted
def test_who_gives_n_or_k_gets_smc(given: dict[str, Any], numbers: tuple[int, int] | None) -> None:
    out = generate(MODEL, NEAR, IDS, max_new_tokens=12, **given, **QUICK)
    assert out.stats.method == "smc"
    assert out.program.options.max_divergence == 1
    assert numbers is None or (out.stats.n_particles, out.stats.lookahead) == numbers


@interpreted
def test_models_that_cannot_forget_a_token_run_by_smc() -> None:
    table, own = TableLM(7), GRUStep(7)
    out = generate(table, own, IDS, max_new_tokens=6, **QUICK)
    assert (out.stats.method, out.stats.n_particles, out.stats.lookahead) == ("smc", 8, 6)
    assert generate(own, own, IDS, max_new_tokens=6, **QUICK).stats.method == "smc"
    with pytest.raises(OptionError, match='method "auto" cannot use this draft'):
        generate(table, own, IDS, max_new_tokens=6, max_kl_per_token=0.1, **QUICK)
    with pytest.raises(OptionError, match="max_divergence cannot be kept"):
        generate(table, own, IDS, max_new_tokens=6, max_divergence=0.3, n_particles=4, **QUICK)
    with pytest.raises(OptionError, match="max_divergence cannot be kept"):
        generate(table, own, IDS, max_new_tokens=6, max_divergence=0.3, **QUICK)


@interpreted
def test_greedy_texts_are_those_of_the_target() -> None:
    out = generate(MODEL, NEAR, IDS, max_new_tokens=12, temperature=0, **QUICK)
    alone = generate(MODEL, None, IDS, max_new_tokens=12, temperature=0, **QUICK)
    assert (out.stats.method, alone.stats.method) == ("speculative", "autoregressive")
    assert torch.equal(out.sequences, alone.sequences)
    own = GRUStep(7)
    assert generate(own, own, IDS, max_new_tokens=6, temperature=0, **QUICK).stats.method == "autoregressive"


@interpreted
def test_a_draft_is_asked_for() -> None:
    with pytest.raises(OptionError, match="no draft model was given"):
        generate(MODEL, None, IDS, max_new_tokens=4, **QUICK)
