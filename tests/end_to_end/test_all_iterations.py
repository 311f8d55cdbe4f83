"""``@smc_compile.decode`` looks at three iterations: what others do is right, or refused before any token."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator

import pytest
import torch
from helpers.cached_models import HandedLM
from helpers.model_parts import build
from helpers.models import CACHEABLE
from helpers.toys import TableLM
from torch import Tensor, nn
from torch._dynamo.utils import counters

from smc_compile import decode
from smc_compile.errors import LoopError, SMCError

pytestmark = pytest.mark.usefixtures("fresh_dynamo", "untraced_regions")
V = 7
MODEL = TableLM(V).double()
IDS = torch.tensor([[0, 1, 2], [3, 4, 5]])
OPTIONS = {"compiler": "eager"}


def take(logits: Tensor) -> Tensor:
    return logits.argmax(-1, keepdim=True)


def add(ids: Tensor, logits: Tensor) -> Tensor:
    return torch.cat([ids, take(logits)], 1)


# ---- loops that change what they do after a while ------------------------------------------------------------------


def first_three(model, ids, n):
    for i in range(n):
        logits = model(ids)[:, -1]
        if i < 3:
            logits = -logits
        ids = add(ids, logits)
    return ids


def fewest_new_tokens(model, ids, n):
    start = ids.shape[1]
    for _ in range(n):
        logits = model(ids)[:, -1]
        if ids.shape[1] - start < 4:
            logits = -logits
        ids = add(ids, logits)
    return ids


def every_fifth(model, ids, n):
    for i in range(n):
        logits = model(ids)[:, -1]
        ids = add(ids, -logits if i % 5 == 4 else logits)
    return ids


def the_last_one(model, ids, n):
    for i in range(n):
        logits = model(ids)[:, -1]
        ids = add(ids, -logits if i == max(n - 1, 5) else logits)
    return ids


def long_texts(model, ids, n):
    for _ in range(n):
        logits = model(ids)[:, -1]
        if ids.shape[1] >= 10:
            logits = -logits
        ids = add(ids, logits)
    return ids


def one_length(model, ids, n):
    for _ in range(n):
        logits = model(ids)[:, -1]
        if ids.shape[1] == 9:
            logits = -logits
        ids = add(ids, logits)
    return ids


def one_of_several_lengths(model, ids, n):
    for _ in range(n):
        logits = model(ids)[:, -1]
        ids = add(ids, -logits if ids.shape[1] in (8, 11) else logits)
    return ids


def a_truth_value_as_a_number(model, ids, n):
    for _ in range(n):
        ids = add(ids, model(ids)[:, -1] * (1 - 2 * (ids.shape[1] > 9)))
    return ids


def eighths_of_the_length(model, ids, n):
    for _ in range(n):
        logits = model(ids)[:, -1]
        ids = add(ids, logits if ids.shape[1] // 9 == 0 else -logits)
    return ids


def until_a_total(model, ids, n):
    total = ids.shape[1] + n
    while ids.shape[1] < total:
        logits = model(ids)[:, -1]
        ids = add(ids, -logits if ids.shape[1] == 9 else logits)
    return ids


STEPS = 0


def a_global_counter(model, ids, n):
    global STEPS
    for _ in range(n):
        STEPS += 1
        logits = model(ids)[:, -1]
        ids = add(ids, -logits if STEPS > 6 else logits)
    return ids


class Temperature:
    """An object that counts."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, logits: Tensor) -> Tensor:
        self.calls += 1
        return -logits if self.calls > 6 else logits


TEMPERATURE = Temperature()


def an_object_that_counts(model, ids, n):
    for _ in range(n):
        ids = add(ids, TEMPERATURE(model(ids)[:, -1]))
    return ids


class Counting(nn.Module):
    """A model that counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.model, self.calls = MODEL, 0

    def forward(self, ids: Tensor) -> Tensor:
        self.calls += 1
        return -self.model(ids) if self.calls > 6 else self.model(ids)


COUNTING = Counting()


def a_model_that_counts(model, ids, n):
    for _ in range(n):
        ids = add(ids, COUNTING(ids)[:, -1])
    return ids


class Branching(nn.Module):
    """A model that does something else on long texts."""

    def forward(self, ids: Tensor) -> Tensor:
        return -MODEL(ids) if ids.shape[1] > 9 else MODEL(ids)


BRANCHING = Branching()


def a_model_that_branches(model, ids, n):
    for _ in range(n):
        ids = add(ids, BRANCHING(ids)[:, -1])
    return ids


def a_list_that_grows(model, ids, n):
    tokens = []
    for _ in range(n):
        logits = model(ids)[:, -1]
        tokens.append(take(-logits if len(tokens) > 5 else logits))
        ids = torch.cat([ids, tokens[-1]], 1)
    return ids


def a_tensor_that_grows(model, ids, n):
    new = ids.new_zeros(ids.shape[0], 0)
    for _ in range(n):
        logits = model(ids)[:, -1]
        token = take(-logits if new.nelement() > 10 else logits)
        new, ids = torch.cat([new, token], 1), torch.cat([ids, token], 1)
    return ids


SIGNS = [1.0] * 6 + [-1.0] * 20


def a_schedule_in_a_list(model, ids, n):
    for i in range(n):
        ids = add(ids, model(ids)[:, -1] * SIGNS[i])
    return ids


def a_schedule_in_a_dictionary(model, ids, n):
    schedule = {6: -1.0}
    for i in range(n):
        ids = add(ids, model(ids)[:, -1] * schedule.get(i, 1.0))
    return ids


def a_schedule_that_is_iterated(model, ids, n):
    for _, sign in zip(range(n), itertools.chain([1] * 6, itertools.repeat(-1)), strict=False):
        ids = add(ids, model(ids)[:, -1] * sign)
    return ids


def cooling(model, ids, n):
    for i in range(n):
        ids = add(ids, model(ids)[:, -1] * (1.0 / (1 + i)))
    return ids


def only_in_long_runs(model, ids, n):
    sign = -1.0 if n > 5 else 1.0
    for _ in range(n):
        ids = add(ids, model(ids)[:, -1] * sign)
    return ids


def the_first_ten_columns(model, ids, n):
    for _ in range(n):
        ids = add(ids, model(ids)[:, -1])
    return ids[:, :10]


def the_last_eight_columns(model, ids, n):
    for _ in range(n):
        ids = add(ids, model(ids)[:, -1])
    return ids[:, -8:]


def in_a_while_loop(model, ids, n):
    def goes_on(i, buffer):
        return i < start + n

    def body(i, buffer):
        logits = model(buffer).index_select(1, (i - 1).view(1)).squeeze(1)
        token = torch.where(i < start + 5, logits, -logits).argmax(-1, keepdim=True)
        return i + 1, torch.where(torch.arange(start + n) == i, token, buffer)

    start = ids.shape[1]
    buffer = torch.cat([ids, ids.new_zeros(ids.shape[0], n)], 1)
    return torch.while_loop(goes_on, body, (torch.tensor(start), buffer))[1]


def one_token_is_another_matter(model, ids, n):
    sign = -1.0 if n < 2 else 1.0
    for _ in range(n):
        ids = add(ids, model(ids)[:, -1] * sign)
    return ids


CHANGING: list[Callable[..., Tensor]] = [
    first_three, fewest_new_tokens, every_fifth, the_last_one, long_texts, one_length, one_of_several_lengths,
    a_truth_value_as_a_number, eighths_of_the_length, until_a_total, a_global_counter, an_object_that_counts,
    a_model_that_counts, a_model_that_branches, a_list_that_grows, a_tensor_that_grows, a_schedule_in_a_list,
    a_schedule_in_a_dictionary, a_schedule_that_is_iterated, cooling, only_in_long_runs, the_first_ten_columns,
    the_last_eight_columns, in_a_while_loop, one_token_is_another_matter,
]  # fmt: skip
# The loop or its model counts in an object of Python, the text is cut, there are as many parts as tokens.
REFUSED = [
    a_global_counter, an_object_that_counts, a_model_that_counts, a_model_that_branches, cooling,
    the_first_ten_columns, the_last_eight_columns, in_a_while_loop,
]  # fmt: skip


@pytest.fixture(autouse=True)
def counters_at_zero() -> Iterator[None]:
    reset()
    yield
    reset()


def reset() -> None:
    global STEPS
    STEPS = TEMPERATURE.calls = COUNTING.calls = 0


@pytest.mark.parametrize("loop", CHANGING)
def test_a_change_after_three_iterations_is_never_dropped(loop):
    """No call gives another text than the loop's own. Those whose parts cannot be compiled are refused, with a line."""
    compiled = decode(loop, **OPTIONS)
    for ids in (IDS, IDS[:, :1]):
        for n in (4, 14, 1):
            expected = own_text(loop, ids, n)
            reset()
            if n == 14 and loop in REFUSED:
                with pytest.raises(LoopError, match=r"test_all_iterations.py|only count iterations"):
                    compiled(MODEL, ids, n)
                continue
            with contextlib.suppress(LoopError) if loop in REFUSED else contextlib.nullcontext():
                assert torch.equal(compiled(MODEL, ids, n), expected)


def own_text(loop: Callable[..., Tensor], ids: Tensor, n: int) -> Tensor:
    reset()
    with torch.no_grad():
        return loop(MODEL, ids, n)


def test_the_refusal_says_which_iteration_at_which_line_and_what_to_do():
    with pytest.raises(LoopError) as caught:
        decode(a_model_that_counts, **OPTIONS)(MODEL, IDS, 14)
    message = str(caught.value)
    assert "in iteration 6" in message
    assert "self.calls > 6" in message
    assert "split the run: one call for each of its parts" in message


# ---- loops that look as if they might -------------------------------------------------------------------------------


def counted_for_the_user(model, ids, n):
    global STEPS
    for _ in range(n):
        STEPS += 1
        ids = add(ids, model(ids)[:, -1])
    return ids


def with_while(model, ids, n):
    i = 0
    while i < n:
        ids = add(ids, model(ids)[:, -1])
        i += 1
    return ids


def up_to_a_total(model, ids, n):
    total = ids.shape[1] + n
    while ids.shape[1] < total:
        ids = add(ids, model(ids)[:, -1])
    return ids


def with_a_branch_never_taken(model, ids, n):
    for i in range(n):
        logits = model(ids)[:, -1]
        if i > 1000:
            logits = -logits
        ids = add(ids, logits)
    return ids


def cropped_before_the_loop(model, ids, n):
    if ids.shape[1] > 10:
        ids = ids[:, -10:]
    for _ in range(n):
        ids = add(ids, model(ids)[:, -1])
    return ids


@pytest.mark.parametrize(
    "loop", [counted_for_the_user, with_while, up_to_a_total, with_a_branch_never_taken, cropped_before_the_loop]
)
def test_a_loop_that_only_might_change_runs(loop):
    compiled = decode(loop, **OPTIONS)
    for ids in (IDS, IDS[:, :1]):
        for n in (2, 14):
            assert torch.equal(compiled(MODEL, ids, n), own_text(loop, ids, n))


def test_what_it_writes_is_written_once_a_call():
    decode(counted_for_the_user, **OPTIONS)(MODEL, IDS, 3)
    assert STEPS == 3


def test_a_verdict_is_kept():
    compiled = decode(with_a_branch_never_taken, **OPTIONS)
    compiled(MODEL, IDS, 14)
    before = counters["stats"]["unique_graphs"]
    compiled(MODEL, IDS.flip(1), 14)
    assert counters["stats"]["unique_graphs"] == before


def test_models_are_themselves_again_after_a_trace_and_while_it_runs_elsewhere():
    model = CACHEABLE["gpt"](vocab=V).double()
    with torch.no_grad():
        expected = model(IDS)
        decode(with_a_branch_never_taken, **OPTIONS)(model, IDS, 5)
        assert torch.equal(model(IDS), expected)
    assert "forward" not in vars(model)


# ---- loops with a cache ---------------------------------------------------------------------------------------------


def reset_cache(model, ids, n):
    logits, cache = model(ids, None)
    for i in range(n):
        token = take(logits[:, -1])
        ids = torch.cat([ids, token], 1)
        logits, cache = model(token, None if i == 5 else cache)
    return ids


def cropped_cache(model, ids, n):
    logits, cache = model(ids, None)
    for _ in range(n):
        token = take(logits[:, -1])
        ids = torch.cat([ids, token], 1)
        cache = [(k[:, :, -8:], v[:, :, -8:]) for k, v in cache]
        logits, cache = model(token, cache)
    return ids


def one_token_without_its_cache(model, ids, n):
    sign = -1.0 if n < 2 else 1.0
    logits, cache = model(ids, None)
    for _ in range(n):
        token = take(logits[:, -1] * sign)
        ids = torch.cat([ids, token], 1)
        logits, cache = model(token, cache)
    return ids


def test_one_token_of_a_loop_with_a_cache_is_looked_at_by_itself():
    model = build(HandedLM, vocab=V, layers=1).double()
    compiled = decode(one_token_without_its_cache, **OPTIONS)
    with torch.no_grad():
        assert torch.equal(compiled(model, IDS, 4), one_token_without_its_cache(model, IDS, 4))
        with pytest.raises(LoopError, match="not alike"):
            compiled(model, IDS, 1)


@pytest.mark.parametrize("loop", [reset_cache, cropped_cache])
def test_a_cache_that_is_cropped_or_reset_later_is_refused(loop):
    model = build(HandedLM, vocab=V, layers=1).double()
    with torch.no_grad():
        assert torch.equal(decode(loop, **OPTIONS)(model, IDS, 3), loop(model, IDS, 3))
        with pytest.raises(SMCError):
            decode(loop, **OPTIONS)(model, IDS, 12)


# ---- how many tokens are drawn --------------------------------------------------------------------------------------


def no_more_than(model, ids, n, cap=4):
    for _ in range(min(n, cap)):
        ids = add(ids, model(ids)[:, -1])
    return ids


def no_longer_than(model, ids, n):
    asked = min(n, 9 - ids.shape[1])
    for _ in range(asked):
        ids = add(ids, model(ids)[:, -1])
    return ids


def one_less(model, ids, n):
    for _ in range(n - 1):
        ids = add(ids, model(ids)[:, -1])
    return ids


def some_more(model, ids, n, more=0):
    for _ in range(n + more):
        ids = add(ids, model(ids)[:, -1])
    return ids


def one_more_by_a_flag(model, ids, n, more=0):
    for _ in range(n):
        ids = add(ids, model(ids)[:, -1])
    if more:
        ids = add(ids, model(ids)[:, -1])
    return ids


def until_a_number(model, ids, n, stop=100):
    for i in range(n):
        if i == stop:
            break
        ids = add(ids, model(ids)[:, -1])
    return ids


@pytest.mark.parametrize(
    ("loop", "others"),
    [
        (no_more_than, (4, 6)), (no_longer_than, ()), (one_less, ()), (some_more, (0, 2)), (one_more_by_a_flag, (0, 1)),
        (until_a_number, (100, 2)),
    ],
)  # fmt: skip
def test_a_call_draws_as_many_tokens_as_the_loop_or_is_refused(loop, others):
    compiled = decode(loop, **OPTIONS)
    for ids in (IDS[:, :1], IDS, IDS[:, :2]):
        for n in (3, 8, 2):
            for other in others or (None,):
                given = (MODEL, ids, n) if other is None else (MODEL, ids, n, other)
                with contextlib.suppress(SMCError):
                    assert torch.equal(compiled(*given), loop(*given)), given[1:]
