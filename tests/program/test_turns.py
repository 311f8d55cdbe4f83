"""Calls of several threads take turns, and one inside of another leaves the other as it is."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.toys import TinyTransformerLM
from torch import Tensor, nn

from smc_compile import decode, generate

pytestmark = pytest.mark.usefixtures("fresh_dynamo")
V = 11
TARGET, DRAFT = (TinyTransformerLM(vocab=V, dim=16, max_positions=64, seed=seed) for seed in (0, 1))
OPTIONS: dict[str, Any] = {"n_particles": 4, "lookahead": 3, "seed": 5, "compiler": "eager"}


def drawing(model: nn.Module, ids: Tensor, n: int) -> Tensor:
    for _ in range(n):
        ids = torch.cat([ids, torch.multinomial(model(ids)[:, -1].softmax(-1), 1)], 1)
    return ids


def generated(model: nn.Module, ids: Tensor, n: int) -> Tensor:
    return generate(model, DRAFT, ids, max_new_tokens=n, **OPTIONS).sequences


def prompt(number: int) -> Tensor:
    return (torch.arange(3 + number % 3)[None] * (number + 1) + number) % V


def in_threads(calls: list[Callable[[], Tensor]]) -> list[Any]:
    """What the calls give, begun at the same time."""
    found: list[Any] = [None] * len(calls)

    def run(number: int) -> None:
        try:
            found[number] = calls[number]()
        except BaseException as error:
            found[number] = error

    threads = [threading.Thread(target=run, args=(number,)) for number in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def test_first_calls_and_later_ones_give_what_they_give_alone() -> None:
    ways = [decode(drawing, draft=DRAFT, **OPTIONS), generated]
    calls = [lambda way=way, i=i: way(TARGET, prompt(i), 9 + i) for i in range(2) for way in ways]
    first = in_threads(calls)
    assert [type(found) for found in first] == [Tensor] * len(calls)
    alone = [call() for call in calls]
    assert all(map(torch.equal, first, alone))
    assert all(map(torch.equal, in_threads(calls), alone))


class Nested:
    """A streamer that asks for a text of its own at every token."""

    def __init__(self) -> None:
        self.texts: list[Tensor] = []

    def put(self, value: Tensor) -> None:
        self.texts.append(generated(TARGET, prompt(4), 7))

    def end(self) -> None:
        pass


def test_a_call_within_a_call_of_the_same_program() -> None:
    nested, ids = Nested(), prompt(1)
    found = generate(TARGET, DRAFT, ids, max_new_tokens=12, streamer=nested, **OPTIONS).sequences
    assert torch.equal(found, generated(TARGET, ids, 12))
    assert len(nested.texts) > 1
    assert all(torch.equal(text, generated(TARGET, prompt(4), 7)) for text in nested.texts)
