"""Iterations that are not alike: those that are become parts, with the text before them as their prompt."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.recovered_loops import MODEL, P, capture, check_step, greedy, prompt, refusal

from smc_compile.passes.loop.needs_value import UnlikeIterations
from smc_compile.program.loop_finder import step_text


def changing(*others: int) -> Any:
    """Six iterations; those of ``others`` take the smallest logit."""

    def fn(ids):
        for i in range(6):
            logits = MODEL(ids)[:, -1]
            token = greedy(-logits if i in others else logits)
            ids = torch.cat([ids, token[:, None]], 1)
        return ids

    return fn


def test_iterations_that_are_alike_become_a_part_whose_prompt_is_the_text_before_it():
    loop, inputs = capture(changing(2, 3), prompt(), parts=True)
    assert loop.iterations == 6
    assert [(part.prompt_length, part.iterations) for part in loop.parts] == [(P, 2), (P + 2, 2), (P + 4, 2)]
    one, other, again = (step_text(part.step.graph) for part in loop.parts)
    assert one == again != other
    for part, sign in zip(loop.parts, (1, -1, 1), strict=True):
        check_step(part, inputs, lambda ids, sign=sign: greedy(sign * MODEL(ids)[:, -1]))
    assert [layout.segments for layout in loop.outputs] == [("prompt", "tokens")]


def test_parts_are_asked_for_and_counted():
    assert "iteration 5" in refusal(changing(5), prompt()).why
    with pytest.raises(UnlikeIterations, match="there are 9 parts, and may be 8"):
        capture(alternating, prompt(), parts=True)


def alternating(ids):
    for i in range(9):
        logits = MODEL(ids)[:, -1]
        ids = torch.cat([ids, greedy(-logits if i % 2 else logits)[:, None]], 1)
    return ids


def test_alike_iterations_have_no_parts_and_one_alone_is_a_loop():
    assert capture(changing(), prompt(), parts=True)[0].parts == ()

    def once(ids):
        return torch.cat([ids, greedy(MODEL(ids)[:, -1])[:, None]], 1)

    loop, inputs = capture(once, prompt(), parts=True)
    assert loop.iterations == 1
    check_step(loop, inputs, lambda ids: greedy(MODEL(ids)[:, -1]), lengths=(P,))  # sizes are those of the one text
    assert capture(once, prompt())[0] is None


def test_a_part_ends_where_an_integer_leaves_its_line():
    def fn(ids):
        for i in range(6):
            logits = MODEL(ids)[:, -1] * (2 if i < 4 else 3)
            ids = torch.cat([ids, greedy(logits)[:, None]], 1)
        return ids

    assert [part.iterations for part in capture(fn, prompt(), parts=True)[0].parts] == [4, 2]
