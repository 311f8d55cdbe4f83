"""The law of weighed tokens, and the forms in which weights come."""

from __future__ import annotations

import math

import torch

from smc_compile.runtime.algorithms.automata import FAR, Automaton
from smc_compile.runtime.algorithms.steering import Steering, log_weights, normalised, state_after, tempered, unpacked

NEVER = -math.inf


def test_a_law_is_weighed_and_its_mass_told():
    """Where the model has no mass on what may follow, weights alone decide; where nothing may, the model does."""
    log_p = torch.tensor([[0.5, 0.25, 0.25], [1.0, 0.0, 0.0], [0.2, 0.3, 0.5], [0.5, 0.25, 0.25]]).log()
    log_w = torch.tensor([[0.0, NEVER, 0.0], [NEVER, 0.0, 0.0], [NEVER] * 3, [math.log(2.0), 0.0, NEVER]])
    law, mass = normalised(log_p, log_w)
    wanted = torch.tensor([[2 / 3, 0, 1 / 3], [0, 0.5, 0.5], [0.2, 0.3, 0.5], [0.8, 0.2, 0]])
    torch.testing.assert_close(law.exp(), wanted)
    torch.testing.assert_close(mass.exp(), torch.tensor([0.75, 0.0, 0.0, 1.25]))


def test_bits_are_those_of_words():
    may = torch.rand(2, 70, generator=torch.Generator().manual_seed(0)) < 0.5
    words = torch.zeros(2, 3, dtype=torch.int64)
    for token in range(70):
        words[:, token // 32] += may[:, token].long() << (token % 32)
    bits = torch.where(words >= 2**31, words - 2**32, words).int()
    assert torch.equal(unpacked(bits, 70) == 0, may)


def test_automaton_weights_and_power_come_together():
    automaton = Automaton(
        torch.tensor([1, 2, 0]), torch.tensor([[1, 0, 1], [1, 1, 1]]), torch.tensor([0, 2 * FAR])
    )  # class 1 stays, all others lead to the sink
    here, left, weights = torch.tensor([0]), torch.tensor([9]), torch.tensor([[0.5, 0.0, 0.0]])
    steering = Steering(automaton, here, left, weights, torch.tensor([2.0]))
    log_p = torch.tensor([[0.5, 0.25, 0.25]]).log()
    assert log_weights(steering, log_p).tolist() == [[0.5, NEVER, NEVER]]
    torch.testing.assert_close(tempered(log_p, steering), 2 * log_p)
    assert state_after(steering, torch.tensor([1])).tolist() == [1]
    free = Steering(None, torch.tensor([7]), torch.tensor([9]), None, None)
    assert log_weights(free, log_p).tolist() == [[0.0, 0.0, 0.0]]
    assert state_after(free, torch.tensor([1])).tolist() == [7]
