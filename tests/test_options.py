"""Options are checked before anything is compiled, alike on every way in, and the message names the valid ones."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import fields
from typing import Any

import pytest
import torch
from helpers.toys import TableLM
from torch import Tensor

import smc_compile
from smc_compile.errors import OptionError
from smc_compile.options import RESAMPLING_METHODS, Options
from smc_compile.runtime.algorithms.resampling import RESAMPLERS

MODEL, DRAFT = TableLM(), TableLM(seed=1)
IDS = torch.tensor([[0, 1, 2]])


def loop(ids: Tensor, n: int) -> Tensor:
    for _ in range(n):
        ids = torch.cat([ids, torch.multinomial(torch.softmax(MODEL(ids)[:, -1], -1), 1)], 1)
    return ids


def by_torch_compile(**options: Any) -> Any:
    return torch.compile(loop, backend="smc", options=options)(IDS, 2)


def by_decode(**options: Any) -> Any:
    return smc_compile.decode(**options)  # before there is a function to decorate


def by_generate(**options: Any) -> Any:
    return smc_compile.generate(MODEL, input_ids=IDS, max_new_tokens=2, **options)


def by_explain(**options: Any) -> Any:
    return smc_compile.explain(loop, IDS, 2, **options)


WAYS_IN = [by_torch_compile, by_decode, by_generate, by_explain]

# option, value, what the message holds
BAD = [
    ("n_particles", "8", "n_particles must be an integer"),
    ("n_particles", True, "n_particles must be an integer"),
    ("n_particles", 8.0, "n_particles must be an integer"),
    ("n_particles", 0, "n_particles must be at least 1"),
    ("lookahead", 0, "lookahead must be at least 1"),
    ("ess_threshold", 2, "ess_threshold must lie between 0 and 1"),
    ("ess_threshold", -0.1, "ess_threshold must lie between 0 and 1"),
    ("ess_threshold", float("nan"), "ess_threshold must lie between 0 and 1"),
    ("ess_threshold", None, "ess_threshold must be a number"),
    ("method", "smcc", "did you mean 'smc'"),
    ("method", 1, "valid values are smc, autoregressive"),
    ("resampling_method", "sistematic", "did you mean 'systematic'"),
    ("resampling_method", 1, "valid values are systematic, stratified, multinomial, residual"),
    ("compiler", "indctor", "did you mean 'inductor'"),
    ("eos_token_id", -1, "eos_token_id must be at least 0"),
    ("eos_token_id", 2.0, "eos_token_id must be an integer"),
    ("seed", 2**63, "seed"),
    ("seed", -(2**63) - 1, "seed must be at least"),
    ("seed", 0.5, "seed must be an integer"),
    ("validate", 1, "validate must be True or False"),
    ("draft", 3, "draft must be a model"),
    ("draft", TableLM, "draft must be a model"),
]


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize(("name", "value", "message"), BAD)
def test_ill_typed_and_out_of_range_values_are_refused(name, value, message):
    with pytest.raises(OptionError) as caught:
        Options.parse({name: value})
    assert message in str(caught.value)
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize("way_in", WAYS_IN)
@pytest.mark.parametrize(("name", "value", "message"), [BAD[0], BAD[9], BAD[-2]])
def test_every_way_in_refuses_them(way_in: Callable, name, value, message):
    with pytest.raises(OptionError) as caught:
        way_in(**{name: value})
    assert message in str(caught.value)


@pytest.mark.parametrize("way_in", WAYS_IN)
def test_an_unknown_option_lists_the_valid_ones_and_the_nearest(way_in: Callable):
    with pytest.raises(OptionError) as caught:
        way_in(n_particle=4)
    message = str(caught.value)
    assert "unknown option 'n_particle'; did you mean 'n_particles'?" in message
    assert all(field.name in message for field in fields(Options))


def test_an_unknown_option_that_is_like_no_other_has_no_nearest():
    with pytest.raises(OptionError) as caught:
        Options.parse({"xyzzy": 1})
    assert "did you mean" not in str(caught.value)
    assert "leave it out" in str(caught.value)


def test_a_mode_is_refused_by_the_backend():
    with pytest.raises(OptionError, match="has no mode 'max-autotune'"):
        torch.compile(loop, backend="smc", mode="max-autotune")(IDS, 2)


def test_an_argument_that_is_no_option_is_refused_by_name():
    with pytest.raises(OptionError, match="trip_count='steps' is not an argument of loop"):
        smc_compile.decode(loop, trip_count="steps")
    for temperature in (-1, float("inf"), float("nan"), "1", True):
        with pytest.raises(OptionError, match="temperature must be a number"):
            by_generate(temperature=temperature)


def test_good_options_are_taken_as_they_are():
    given = {"draft": DRAFT, "n_particles": 1, "lookahead": 1, "ess_threshold": 1, "seed": -(2**63), "eos_token_id": 0}
    parsed = Options.parse(given)
    assert {name: getattr(parsed, name) for name in given} == given
    assert Options.parse(None) == Options.parse({}) == Options()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"n_particles": "auto"}, "how good the answer must be"),
        ({"n_particles": "Auto"}, "n_particles must be an integer"),
        ({"ess_floor": 4}, "ess_floor has no effect"),
        ({"lookahead": "auto", "ess_floor": 0}, "ess_floor must lie between"),
        ({"lookahead": "auto", "time_budget": "10"}, "time_budget must be a number"),
        ({"method": "speculative", "n_particles": "auto", "time_budget": 9}, 'n_particles="auto" is for method="smc"'),
        ({"method": "speculative", "lookahead": "auto", "ess_floor": 4}, 'ess_floor is for method="smc"'),
    ],
)
def test_a_choice_is_asked_for_with_what_bounds_it(given, message):
    with pytest.raises(OptionError, match=message):
        Options.parse(given)


def test_what_is_to_be_chosen_is_told_from_what_is_given():
    assert Options.parse({"lookahead": "auto"}).is_auto
    assert Options.parse({"n_particles": "auto", "ess_floor": 4}).is_auto
    assert not Options.parse({"lookahead": 3}).is_auto


def test_a_transformers_model_takes_every_option():
    """Under the library's names for the draft and for the end of a sequence."""
    from smc_compile.transformers import generate

    shown = inspect.signature(generate).parameters
    names = {**{field.name: field.name for field in fields(Options)}, "draft": "draft_model"}
    del names["eos_token_id"]
    assert {name: shown[name].default for name in names.values()} == {
        names[field.name]: field.default for field in fields(Options) if field.name in names
    }
    assert all(shown[name].kind is inspect.Parameter.KEYWORD_ONLY for name in names.values())
    own = ["model", "input_ids", "logits_processor", "stopping_criteria", "generation_config"]
    later = ["token_streamer", "stream", "max_lag", "return_particles"]
    later += ["potential", "text_tokenizer", "at_limit", "model_kwargs"]
    assert list(shown) == [*own, *names.values(), *later]


def test_each_resampling_scheme_is_an_option():
    assert list(RESAMPLING_METHODS) == list(RESAMPLERS)
