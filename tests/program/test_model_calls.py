"""Models are called for logits whatever they wrap them in, and are left as they were."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from helpers.models import CACHEABLE
from torch import nn

from smc_compile import generate
from smc_compile.errors import InputError
from smc_compile.program.model_calls import logits_of, traceable

IDS = torch.tensor([[3, 1, 4, 1, 5]])


class Wrapped(nn.Module):
    """A model library's habits: an object around the logits, a cache by default, a choice of experts."""

    def __init__(self) -> None:
        super().__init__()
        self.model = CACHEABLE["gpt"]()
        self.config = SimpleNamespace(use_cache=True)
        self.experts = "grouped"
        self.seen: list[tuple[object, bool, str]] = []

    def get_experts_implementation(self) -> str:
        return self.experts

    def set_experts_implementation(self, name: str) -> None:
        self.experts = name

    def forward(self, ids: torch.Tensor, use_cache: bool | None = None) -> SimpleNamespace:
        self.seen.append((use_cache, self.config.use_cache, self.experts))
        return SimpleNamespace(logits=self.model(ids), past_key_values=[ids])


class Returns(nn.Module):
    def __init__(self, result: object) -> None:
        super().__init__()
        self.result = result

    def forward(self, ids: torch.Tensor, **_: object) -> object:
        return self.result


def test_a_tensor_is_taken_as_it_is() -> None:
    model = CACHEABLE["gpt"]()
    assert torch.equal(logits_of(model, IDS), model(IDS))


def test_logits_are_unwrapped_and_no_cache_is_asked_for() -> None:
    model = Wrapped()
    assert torch.equal(logits_of(model, IDS), model.model(IDS))
    assert model.seen == [(False, True, "grouped")]


@pytest.mark.parametrize(
    ("result", "found"),
    [
        (torch.zeros(1, 5), r"shape \(1, 5\)"),
        ((None, torch.zeros(1, 5, 7)), "tuple"),
        (SimpleNamespace(logits=torch.zeros(5)), r"shape \(5,\)"),
        (SimpleNamespace(hidden=torch.zeros(1, 5, 7)), "SimpleNamespace"),
        (None, "NoneType"),
    ],
)
def test_other_results_are_refused_by_what_they_are(result: object, found: str) -> None:
    with pytest.raises(InputError, match=found):
        logits_of(Returns(result), IDS)


def test_settings_are_switched_while_tracing_and_then_back() -> None:
    model = nn.Sequential(Wrapped())
    with traceable(model):
        logits_of(model, IDS)
    assert model[0].seen == [(None, False, "batched_mm")]
    assert (model[0].config.use_cache, model[0].experts) == (True, "grouped")


def test_settings_are_switched_back_after_an_error() -> None:
    model = Wrapped()
    with pytest.raises(RuntimeError, match="inside"), traceable(model):
        raise RuntimeError("inside")
    assert (model.config.use_cache, model.experts) == (True, "grouped")


@pytest.mark.usefixtures("interpreted")
def test_generate_takes_a_wrapped_model_and_a_wrapped_draft() -> None:
    model = Wrapped()
    plain = generate(model.model, None, IDS, max_new_tokens=4, temperature=0, method="autoregressive", compiler="eager")
    wrapped = generate(model, None, IDS, max_new_tokens=4, temperature=0, method="autoregressive", compiler="eager")
    assert torch.equal(plain.sequences, wrapped.sequences)
    drafted = generate(model.model, model, IDS, max_new_tokens=4, n_particles=2, lookahead=2, seed=0, compiler="eager")
    assert drafted.log_weights.abs().max() < 1e-3  # the draft is the target
    assert drafted.ess.min() > 1.99
