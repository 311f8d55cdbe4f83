"""Suffixes grow with the text: what is drawn does not depend on it, nothing compiles again, and no slot is missing."""

from __future__ import annotations

import pytest
import torch
from helpers.model_parts import perturbed
from helpers.toys import TinyTransformerLM

from smc_compile import generate
from smc_compile.runtime.state import suffix_sizes
from smc_compile.runtime.state.suffix_sizes import capacity_of, first_size, mean_slots, next_size

IDS = torch.tensor([[1, 0, 2, 3]])


@pytest.mark.parametrize("capacity", [2, 127, 128, 129, 1000])
@pytest.mark.parametrize("prompt", [1, 127, 128, 192])
def test_sizes_grow_up_to_the_capacity_and_hold_what_is_needed(capacity, prompt):
    size = first_size(capacity, prompt)
    assert 0 < size <= capacity
    for needed in range(1, capacity + 1):
        if needed > size:
            grown = next_size(size, needed, capacity, prompt)
            assert max(needed, size + 1) <= grown <= capacity
            assert grown <= max(size + size // 2, needed) + 1
            size = grown
    assert size <= capacity


def test_behind_every_token_of_an_answer_a_cycle_has_room():
    assert capacity_of(20, 5) == 25


def test_a_size_is_not_that_of_the_prompt_unless_nothing_else_is_left():
    assert first_size(1000, suffix_sizes.FIRST) == suffix_sizes.FIRST + 1
    assert first_size(suffix_sizes.FIRST, suffix_sizes.FIRST) == suffix_sizes.FIRST
    assert next_size(128, 129, 1000, 192) == 193


def test_mean_slots_of_an_answer_of_six_cycles():
    """After cycles of 50 tokens, 51, 101, .. 301 slots hold something; 128, 192 and 288 are allocated on the way."""
    allocated, held = mean_slots(301, 50, 7)
    assert allocated == (128 + 128 + 192 + 288 + 288 + 301) / 6
    assert held == (51 + 301) / 2


@pytest.mark.parametrize("method", ["smc", "autoregressive"])
def test_growing_changes_nothing_and_compiles_nothing(method, monkeypatch):
    """AOT autograd sees all that Dynamo alone does."""
    target = TinyTransformerLM(5, max_positions=64).double().eval()
    draft = perturbed(target, 0.5)
    options = {
        "max_new_tokens": 40,
        "n_particles": 3,
        "lookahead": 3,
        "seed": 4,
        "method": method,
        "compiler": "aot_eager",
    }
    whole = generate(target, draft, IDS, **options)
    monkeypatch.setattr(suffix_sizes, "FIRST", 5)  # grows six times
    small = generate(target, draft, IDS, **options)
    assert torch.equal(small.particles, whole.particles)
    torch.testing.assert_close(small.log_weights, whole.log_weights)
    assert small.stats.compile_seconds == 0
