"""Whatever does not fit is refused before any work, with a message that says what, why, and what to do."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from helpers.models import CACHEABLE
from helpers.refused_models import REFUSED
from helpers.toys import TableLM, TinyTransformerLM
from torch import Tensor, nn

import smc_compile
from smc_compile import generate
from smc_compile.errors import CacheError, GenerationError, InputError, LoopError, OptionError, SMCError

V = 5
MODEL, DRAFT = TableLM(V), TableLM(V, seed=1)
IDS = torch.tensor([[0, 1, 2], [3, 4, 0]])
OPTIONS = {"compiler": "eager", "n_particles": 2, "lookahead": 2, "seed": 0, "validate": False}


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    yield
    torch._dynamo.reset()


def run(model: Any = MODEL, draft: Any = DRAFT, ids: Any = IDS, n: Any = 3, **options: Any) -> Any:
    with torch.compiler.set_stance("force_eager"):
        return generate(model, draft, ids, max_new_tokens=n, **{**OPTIONS, **options})


def loop(model: nn.Module, ids: Tensor, n: int) -> Tensor:
    for _ in range(n):
        probs = torch.softmax(model(ids)[:, -1], -1)
        ids = torch.cat([ids, torch.multinomial(probs, 1)], 1)
    return ids


def stops_early(model: nn.Module, ids: Tensor, n: int) -> Tensor:
    for _ in range(n):
        token = torch.multinomial(torch.softmax(model(ids)[:, -1], -1), 1)
        ids = torch.cat([ids, token], 1)
        if (token == 0).all():
            break
    return ids


def doubled(ids: Tensor, n: int) -> Tensor:
    return ids * 2 + n


class Dropout(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.model, self.drop = TableLM(V), nn.Dropout(0.25)

    def forward(self, ids: Tensor) -> Tensor:
        return self.drop(self.model(ids))


class Fixed(nn.Module):
    """The same logits everywhere."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.full((V, V), value))

    def forward(self, ids: Tensor) -> Tensor:
        return nn.functional.embedding(ids, self.table)


class Wrapped(nn.Module):
    def forward(self, ids: Tensor) -> str:
        return f"{MODEL(ids).dim()} axes"


# --- prompts and lengths -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (IDS[:, :0], "the prompt is empty"),
        (IDS[:0], "the prompt is empty"),
        (IDS[0], r"ids \[B, P\][\s\S]*shape \(3,\)[\s\S]*tokens\[None\]"),
        (IDS.float(), r"int64[\s\S]*torch.float32[\s\S]*long\(\)"),
        (IDS.int(), r"int64[\s\S]*torch.int32"),
        (IDS + 1, r"out of range[\s\S]*id 5, vocabulary 5"),
        (IDS - 1, r"out of range[\s\S]*id -1"),
        ([[0, 1]], r"prompts must be ids[\s\S]*got list"),
        (None, "prompts must be ids"),
    ],
)
def test_a_bad_prompt(ids, message):
    with pytest.raises(InputError, match=message):
        run(ids=ids)


@pytest.mark.parametrize("ids", [IDS.int(), IDS + 1, IDS - 1])
def test_a_bad_prompt_of_a_loop(ids):
    compiled = smc_compile.decode(loop, draft=DRAFT, **OPTIONS)
    with pytest.raises(InputError, match=r"int64|out of range"):
        compiled(MODEL, ids, 3)


@pytest.mark.parametrize("ids", [IDS.float(), IDS[:, :0]])
def test_a_prompt_that_the_loop_itself_fails_on(ids):
    compiled = smc_compile.decode(loop, draft=DRAFT, **OPTIONS)
    with pytest.raises(LoopError, match=r"the loop fails with these arguments|no argument holds token ids"):
        compiled(MODEL, ids, 3)


@pytest.mark.parametrize("n", [0, -1, 2.0, True, "3", None])
def test_a_bad_number_of_tokens(n):
    with pytest.raises(InputError, match=r"new tokens must be a positive integer[\s\S]*got"):
        run(n=n)


@pytest.mark.parametrize("n", [0, -1, 2.5])
def test_a_bad_number_of_iterations(n):
    compiled = smc_compile.decode(loop, draft=DRAFT, trip_count="n", **OPTIONS)
    with pytest.raises(InputError, match=rf"n asks for no tokens[\s\S]*n={n}"):
        compiled(MODEL, IDS, n)


@pytest.mark.parametrize("kind", ["gpt", "gpt_sliced_positions"])
def test_past_the_last_position(kind):
    """An embedding and a slice of a parameter; the limit is 9, the prompt 3: the last of 7 new tokens is not read."""
    model = CACHEABLE[kind](vocab=V, layers=1, max_positions=9)
    assert run(model, model, n=7).sequences.shape == (2, 10)
    with pytest.raises(InputError, match=r"maximum positions[\s\S]*3 \+ 8 - 1 > 9[\s\S]*at most 7 new tokens"):
        run(model, model, n=8)
    with pytest.raises(InputError, match="the draft's maximum positions"):
        run(draft=model, n=8)


@pytest.mark.parametrize(("name", "value"), [("n_particles", 0), ("lookahead", 0), ("n_particles", -3)])
def test_no_particles_or_no_lookahead(name, value):
    with pytest.raises(OptionError, match=f"{name} must be at least 1[\\s\\S]*got {value}"):
        run(**{name: value})


# --- models --------------------------------------------------------------------------------------------------------


def test_no_draft():
    for call in (lambda: run(draft=None), lambda: smc_compile.decode(loop, **OPTIONS)(MODEL, IDS, 3)):
        with pytest.raises(OptionError, match=r'no draft model was given[\s\S]*method="autoregressive"'):
            call()


def test_a_draft_of_another_vocabulary():
    with pytest.raises(InputError, match=r"different vocabularies[\s\S]*target has 5 tokens, the draft 6"):
        run(draft=TableLM(V + 1))


def test_active_dropout():
    active = Dropout()
    assert run(Dropout().eval()).sequences.shape == (2, 6)
    with pytest.raises(InputError, match=r"the model is in training mode with dropout[\s\S]*module drop drops 25%"):
        run(active)
    with pytest.raises(InputError, match=r"the draft is in training mode with dropout[\s\S]*model.eval\(\)"):
        run(draft=active)
    with pytest.raises(SMCError, match="dropout"):
        smc_compile.decode(loop, draft=DRAFT, **OPTIONS)(active, IDS, 3)
    with pytest.raises(InputError, match="the draft is in training mode"):
        smc_compile.decode(loop, draft=active, **OPTIONS)(MODEL, IDS, 3)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("method", ["smc", "autoregressive"])
def test_logits_that_are_no_distribution_at_the_prompt(value, method):
    with pytest.raises(GenerationError) as caught:
        run(Fixed(value), method=method)
    assert caught.value.partial is None


def test_a_model_that_returns_no_logits():
    for call in (lambda: run(Wrapped()), lambda: run(draft=Wrapped())):
        with pytest.raises(InputError, match=r"must return logits \[B, S, V\][\s\S]*returned str"):
            call()


def test_something_that_is_no_model():
    with pytest.raises(InputError, match=r"model must be an nn.Module[\s\S]*got str"):
        run("gpt2")


@pytest.mark.parametrize("kind", ["bidirectional", "bidirectional_eager"])
def test_a_bidirectional_model(kind):
    make, word = REFUSED[kind]
    for models in ({"model": make(vocab=V)}, {"draft": make(vocab=V)}):
        with pytest.raises(CacheError, match=rf"not causal[\s\S]*{word}"):
            run(**models, validate=True)


# --- loops ---------------------------------------------------------------------------------------------------------


def test_a_branch_on_a_token_that_does_not_leave_the_loop():
    def goes_on(model, ids, n):
        for _ in range(n):
            token = torch.multinomial(torch.softmax(model(ids)[:, -1], -1), 1)
            if (token >= 0).all():
                token = token * 0
            ids = torch.cat([ids, token], 1)
        return ids

    with pytest.raises(LoopError, match="does something else than to end the loop"):
        smc_compile.decode(goes_on, draft=DRAFT, **OPTIONS)(MODEL, IDS, 3)


def test_a_branch_on_a_token_through_torch_compile_with_fullgraph():
    options = {"draft": DRAFT, **OPTIONS}
    with pytest.raises(torch._dynamo.exc.Unsupported, match="branching"):
        torch.compile(stops_early, backend="smc", options=options, fullgraph=True)(MODEL, IDS, 3)


def test_a_branch_on_a_token_through_torch_compile_leaves_the_loop_to_eager(caplog):
    compiled = torch.compile(stops_early, backend="smc", options={"draft": DRAFT, **OPTIONS})
    with caplog.at_level(logging.WARNING, "smc_compile.backend"):
        torch.manual_seed(0)
        result = compiled(MODEL, IDS, 4)
    torch.manual_seed(0)
    assert torch.equal(result, stops_early(MODEL, IDS, 4))
    assert [r.name for r in caplog.records if r.name.startswith("smc_compile")] == ["smc_compile.backend"]


def test_a_function_without_a_draw_goes_to_inductor_with_one_logged_line(caplog):
    with caplog.at_level(logging.WARNING, "smc_compile.backend"):
        assert torch.equal(torch.compile(doubled, backend="smc")(IDS, 1), IDS * 2 + 1)
    (record,) = [r for r in caplog.records if r.name == "smc_compile.backend"]
    assert "no decode loop in this graph" in record.message
    with pytest.raises(SMCError):
        smc_compile.decode(doubled, **OPTIONS)(IDS, 1)


def test_a_model_with_learned_attention_is_still_fine():
    """The counterpart of the refusals above: the same call with a good model works."""
    model = TinyTransformerLM(V)
    assert run(model, model).sequences.shape == (2, 6)
