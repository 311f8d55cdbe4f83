"""Which lines of a loop are doubted: those that a later iteration might take otherwise, and no others."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from helpers.toys import TableLM
from torch import Tensor, nn
from tqdm import tqdm

from smc_compile.program.even_loops import find_doubt
from smc_compile.program.function_source import source_of

MODEL = TableLM(5)
MODEL.block_size = 8
IDS = torch.tensor([[0, 1, 2]])
TEMPERATURES = [0.8] * 100


def doubt_of(loop: Callable[..., Tensor], **others: object) -> str:
    return str(find_doubt(loop, {"model": MODEL, "ids": IDS, "n": 5, **others}, "ids", "n") or "")


def draw(model: nn.Module, ids: Tensor, top_k: int | None = None) -> Tensor:
    logits = model(ids)[:, -1, :] / 0.8
    if top_k is not None:
        least, _ = torch.topk(logits, min(top_k, logits.size(-1)))
        logits[logits < least[:, [-1]]] = -float("inf")
    return torch.multinomial(F.softmax(logits, dim=-1), num_samples=1)


# ---- nothing to fear -----------------------------------------------------------------------------------------------


def growing(model, ids, n):
    for _ in range(n):
        ids = torch.cat([ids, draw(model, ids, 3)], 1)
    return ids


@torch.no_grad()
def cropping(model, ids, n):
    for _ in range(n):
        shown = ids if ids.size(1) <= model.block_size else ids[:, -model.block_size :]
        ids = torch.cat((ids, draw(model, shown)), dim=1)
    return ids


def into_a_list(model, ids, n):
    start, tokens = ids.shape[1], []
    for _ in range(n):
        tokens.append(draw(model, ids))
        ids = torch.cat([ids, tokens[-1]], -1)
    return ids[:, start:], torch.cat(tokens, 1)


def into_new_tokens(model, ids, n):
    start = ids.shape[1]
    with torch.no_grad():
        for _ in range(n):
            ids = torch.cat([ids, draw(model, ids)], 1)
    return ids[:, start:]


def into_a_buffer(model, ids, n):
    start = ids.shape[1]
    buffer = torch.zeros(ids.shape[0], start + n, dtype=torch.long)
    buffer[:, :start] = ids
    for i in range(start, start + n):
        buffer[:, i] = draw(model, buffer[:, :i])[:, 0]
    return buffer


def with_a_cache(model, ids, n):
    x, past = ids, None
    for _ in range(n):
        out = model(x, past_key_values=past, use_cache=True)
        past = out.past_key_values
        x = out.logits[:, -1].argmax(-1, keepdim=True)
        ids = torch.cat([ids, x], 1)
    return ids


def with_a_branch_on_the_length(model, ids, n):
    for _ in range(n):
        logits = model(ids)[:, -1]
        if ids.shape[1] >= 10:  # leaves a guard
            logits = -logits
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], 1)
    return ids


@pytest.mark.parametrize(
    "loop",
    [growing, cropping, into_a_list, into_new_tokens, into_a_buffer, with_a_cache, with_a_branch_on_the_length],
)
def test_a_plain_loop_is_not_doubted(loop):
    assert doubt_of(loop) == ""


# ---- lines that may do something else later ------------------------------------------------------------------------


def counter(model, ids, n):
    for i in range(n):
        ids = torch.cat([ids, draw(model, ids) + (i > 3)], 1)
    return ids


def remainder(model, ids, n):
    for i in range(n):
        ids = torch.cat([ids, draw(model, ids) * (i % 5)], 1)
    return ids


def own_count(model, ids, n):
    done = 0
    for _ in range(n):
        done = done + 1
        if done > 3:
            ids = ids + 0
        ids = torch.cat([ids, draw(model, ids)], 1)
    return ids


def since_the_prompt(model, ids, n):
    start = ids.shape[1]
    for _ in range(n):
        if ids.shape[1] - start < 3:
            ids = ids + 0
        ids = torch.cat([ids, draw(model, ids)], 1)
    return ids


def largest(model, ids, n):
    for _ in range(n):
        ids = torch.cat([ids, draw(model, ids[:, max(0, ids.shape[1] - 8) :])], 1)
    return ids


def list_window(model, ids, n):
    tokens = [ids]
    for _ in range(n):
        tokens.append(draw(model, torch.cat(tokens[-6:], 1)))
    return torch.cat(tokens, 1)


def length_of_a_list(model, ids, n):
    tokens = []
    for _ in range(n):
        tokens.append(draw(model, ids))
        if len(tokens) > 4:
            break
    return torch.cat(tokens, 1)


def recent_tokens(model, ids, n):
    new = ids[:, :0]
    for _ in range(n):
        logits = model(ids)[:, -1].scatter(1, new[:, -4:], -9.0)
        token = logits.argmax(-1, keepdim=True)
        ids, new = torch.cat([ids, token], 1), torch.cat([new, token], 1)
    return ids


def schedule(model, ids, n):
    for i in range(n):
        ids = torch.cat([ids, (model(ids)[:, -1] / TEMPERATURES[i]).argmax(-1, keepdim=True)], 1)
    return ids


def handed_on(model, ids, n):
    first = second = third = ids[:, :1]
    for _ in range(n):
        third = second
        second = first
        first = draw(model, ids)
        ids = torch.cat([ids, first + 0 * third], 1)
    return ids


def length_as_a_number(model, ids, n):
    for _ in range(n):
        ids = torch.cat([ids, draw(model, ids) * (ids.shape[1] > 9)], 1)
    return ids


def number_of_iterations(model, ids, n):
    if n > 10:
        ids = ids + 0
    for _ in range(n):
        ids = torch.cat([ids, draw(model, ids)], 1)
    return ids


def first_columns(model, ids, n):
    for _ in range(n):
        ids = torch.cat([ids, draw(model, ids)], 1)
    return ids[:, :10]


def moved_start(model, ids, n):
    start = ids.shape[1]
    start = start + 5
    for _ in range(n):
        ids = torch.cat([ids, draw(model, ids)], 1)
    return ids[:, start:]


class Noise:
    def __call__(self, x: Tensor) -> Tensor:
        return x


NOISE = Noise()


def unknown_object(model, ids, n):
    for _ in range(n):
        ids = torch.cat([ids, NOISE(draw(model, ids))], 1)
    return ids


@pytest.mark.parametrize(
    ("loop", "line"),
    [
        (counter, "i > 3"), (remainder, "i % 5"), (own_count, "if done > 3"), (since_the_prompt, "- start < 3"),
        (largest, "max(0"), (list_window, "tokens[-6:]"), (length_of_a_list, "len(tokens) > 4"),
        (recent_tokens, "new[:, -4:]"), (schedule, "TEMPERATURES[i]"), (handed_on, "third = second"),
        (length_as_a_number, "> 9"), (number_of_iterations, "if n > 10"), (first_columns, "return ids[:, :10]"),
        (moved_start, "return ids[:, start:]"), (unknown_object, "NOISE("),
    ],
)  # fmt: skip
def test_a_doubt_names_its_line(loop, line):
    found = doubt_of(loop)
    assert "test_even_loops.py:" in found
    assert line in found


def test_code_without_its_source_is_doubted():
    space: dict[str, object] = {"torch": torch, "draw": draw}
    exec("def loop(model, ids, n):\n    return ids\n", space)
    assert "source of loop cannot be read" in doubt_of(space["loop"])  # type: ignore[arg-type]
    assert source_of(growing) is not None
    moved = growing.__code__.replace(co_firstlineno=growing.__code__.co_firstlineno + 1)
    assert source_of(type(growing)(moved, growing.__globals__)) is None


# ---- loops whose own code runs beside the compiled one ---------------------------------------------------------------


def ends_by_value(model, ids, n):
    for _ in tqdm(range(n)):
        token = model(ids)[:, -1].argmax(-1, keepdim=True)
        print(token)
        if token.item() == 3 or int(token) in (4, 5):
            break
        ids = torch.cat([ids, token], 1)
    return ids


def counts_values(model, ids, n):
    for i in range(n):
        token = model(ids)[:, -1].argmax(-1, keepdim=True)
        ids = torch.cat([ids, token], 1)
        if i > 4 and token.item() == 3:
            break
    return ids


@pytest.mark.parametrize(("loop", "values", "doubtful"), [
    (ends_by_value, True, False), (ends_by_value, False, True), (counts_values, True, True),
])  # fmt: skip
def test_values_of_tokens_decide_where_a_text_ends_and_nothing_else(loop, values, doubtful):
    arguments = {"model": torch.nn.Linear(1, 1), "ids": torch.zeros(1, 2, dtype=torch.int64), "n": 3}
    assert (find_doubt(loop, arguments, "ids", "n", values) is not None) == doubtful
