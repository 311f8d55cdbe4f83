"""Loops with Python in them that needs a token: ends of a text, numbers, prints, bars, tokenizers, generators.

What a loop returns is what it returns without the decorator, in structure and content: greedy loops are compared with
themselves in eager mode, draws with the enumerated distribution.
"""

from __future__ import annotations

import logging
import re
import sys
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.enumeration import chi_square_p_value, sequence_distribution
from helpers.toys import TableLM
from torch import Tensor, nn
from torch._dynamo.utils import counters

from smc_compile import decode
from smc_compile.errors import LoopError, OptionError

pytestmark = pytest.mark.usefixtures("fresh_dynamo", "untraced_regions")
V, N = 5, 7
ORDER = [2, 3, 4, 0, 1]  # the likeliest token after each: 0 2 4 1 3 0 ...
MODEL = TableLM(V).double()
with torch.no_grad():
    MODEL.table.add_(4 * torch.eye(V)[ORDER])
ONE, THREE = torch.tensor([[0, 1, 0]]), torch.tensor([[0, 1, 2], [3, 3, 1], [4, 2, 0]])
log = logging.getLogger(__name__)


class Tokenizer:
    eos_token_id = 3

    def decode(self, ids: Any) -> str:
        return "".join(chr(97 + i) for i in (ids.tolist() if isinstance(ids, Tensor) else ids))


TOKENIZER = Tokenizer()
QUICK: dict[str, Any] = {"compiler": "eager", "validate": False}


def pick(model: nn.Module, ids: Tensor) -> Tensor:
    return model(ids)[:, -1].argmax(-1, keepdim=True)


def draw(model: nn.Module, ids: Tensor) -> Tensor:
    return torch.multinomial(torch.softmax(model(ids)[:, -1], -1), 1)


def plain(result: Any) -> Any:
    return torch.utils._pytree.tree_map(lambda leaf: leaf.tolist() if isinstance(leaf, Tensor) else leaf, result)


def assert_as_written(loop: Callable[..., Any], ids: Tensor, *args: Any, n: int = N, **options: Any) -> Any:
    """Compiled and eager return the same; the compiled loop is returned."""
    compiled = decode(loop, **QUICK, **options)
    assert plain(compiled(MODEL, ids, n, *args)) == plain(loop(MODEL, ids, n, *args))
    return compiled


# ---- one text that ends ---------------------------------------------------------------------------------------------


def before_it_is_appended(model, ids, n, eos):
    for _ in range(n):
        token = pick(model, ids)
        if token == eos:
            break
        ids = torch.cat([ids, token], 1)
    return ids


def after_it_is_appended(model, ids, n, eos):
    for _ in range(n):
        token = pick(model, ids)
        ids = torch.cat([ids, token], dim=1)
        if (token == eos).all():
            break
    return ids


def returned_at_once(model, ids, n, eos):
    """What it returns tells how it ended."""
    for i in range(n):
        token = pick(model, ids)
        ids = torch.cat([ids, token], 1)
        if token.item() == eos:
            return ids, "ended", i
    return ids, "complete", n


def one_of_several(model, ids, n, eos):
    stop = {eos, 99}
    for _ in range(n):
        token = pick(model, ids)
        if token.item() in stop:
            break
        ids = torch.cat([ids, token], 1)
    return ids


def unless_none(model, ids, n, eos):
    for _ in range(n):
        token = pick(model, ids)
        if eos is not None and int(token) == eos:
            break
        ids = torch.cat([ids, token], 1)
    return ids


def otherwise_break(model, ids, n, eos):
    for _ in range(n):
        token = pick(model, ids)
        if token != eos:
            ids = torch.cat([ids, token], 1)
        else:
            break
    return ids


def while_it_goes_on(model, ids, n, eos):
    token, count = None, 0
    while token != eos and count < n:
        ids = torch.cat([ids, pick(model, ids)], 1)
        token, count = ids[0, -1].item(), count + 1
    return ids


def until_done(model, ids, n, eos):
    done, count = False, 0
    while not done:
        token = pick(model, ids)
        ids = torch.cat([ids, token], 1)
        count += 1
        done = token.item() == eos or count >= n
    return ids


def forever(model, ids, n, eos):
    length = ids.shape[1] + n
    while True:
        ids = torch.cat([ids, pick(model, ids)], 1)
        if ids[:, -1] == eos or ids.shape[1] >= length:
            break
    return ids


def numbers_in_a_list(model, ids, n, eos):
    tokens = []
    for _ in range(n):
        token = pick(model, ids).item()
        if token == eos:
            break
        tokens.append(token)
        ids = torch.cat([ids, torch.tensor([[token]])], dim=-1)
    return tokens


def one_step_later(model, ids, n, eos):
    """The token behind the end is drawn and kept."""
    for _ in range(n):
        ids = torch.cat([ids, pick(model, ids)], 1)
        if ids[0, -2] == eos:
            break
    return ids


def into_a_buffer(model, ids, n, eos):
    start = ids.shape[1]
    buffer = torch.full((1, start + n), 0)
    buffer[:, :start] = ids
    for i in range(start, start + n):
        buffer[:, i] = pick(model, buffer[:, :i])[:, 0]
        if buffer[0, i] == eos:
            return buffer[:, : i + 1]
    return buffer


def twice_the_same(model, ids, n, eos):
    """No token ends it by itself."""
    for _ in range(n):
        ids = torch.cat([ids, pick(model, ids)], 1)
        if ids[0, -1] == ids[0, -2]:
            break
    return ids


SINGLE = [
    before_it_is_appended, after_it_is_appended, returned_at_once, one_of_several, unless_none, otherwise_break,
    while_it_goes_on, forever, numbers_in_a_list, one_step_later, into_a_buffer, twice_the_same, until_done,
]  # fmt: skip


@pytest.mark.parametrize("loop", SINGLE)
def test_one_text_ends_where_the_loop_ends_it(loop):
    for eos in (3, 99):
        compiled = assert_as_written(loop, ONE, eos)
        early = eos == 3 and loop not in (one_step_later, twice_the_same)
        assert (int(compiled.last.new_lengths) < N) == early, "a generation that can end early does"


@pytest.mark.parametrize("eos", [torch.tensor(3), torch.tensor([3])])
def test_the_end_may_be_a_tensor_that_changes(eos):
    compiled = decode(before_it_is_appended, **QUICK)
    for other in (eos, eos * 0, eos * 0 + 1, eos):
        assert torch.equal(compiled(MODEL, ONE, N, other), before_it_is_appended(MODEL, ONE, N, other))


def test_the_end_may_be_an_attribute_that_changes(monkeypatch):
    def of_the_tokenizer(model, ids, n):
        for _ in range(n):
            token = pick(model, ids)
            if token == TOKENIZER.eos_token_id:
                break
            ids = torch.cat([ids, token], 1)
        return ids

    compiled = decode(of_the_tokenizer, **QUICK)
    for eos in (3, 0, 1, 3):
        monkeypatch.setattr(TOKENIZER, "eos_token_id", eos)
        assert torch.equal(compiled(MODEL, ONE, N), of_the_tokenizer(MODEL, ONE, N))


def test_other_lengths_and_prompts_are_not_traced_again():
    compiled = decode(after_it_is_appended, **QUICK)
    compiled(MODEL, ONE, N, 3)
    compiled(MODEL, ONE.repeat(1, 2), N, 3)
    before = counters["stats"]["unique_graphs"]
    for ids, n in ((ONE, 1), (ONE.flip(1), 12), (ONE.repeat(1, 3), 4)):
        assert torch.equal(compiled(MODEL, ids, n, 3), after_it_is_appended(MODEL, ids, n, 3))
    assert counters["stats"]["unique_graphs"] == before


# ---- several texts that end -----------------------------------------------------------------------------------------


def all_at_one_step(model, ids, n, eos):
    """Rows go on after their own ends."""
    for _ in range(n):
        token = pick(model, ids)
        ids = torch.cat([ids, token], 1)
        if (token == eos).all():
            break
    return ids


def any_of_them(model, ids, n, eos):
    for _ in range(n):
        token = pick(model, ids)
        ids = torch.cat([ids, token], 1)
        if (token == eos).any():
            break
    return ids


def all_have_ended(model, ids, n, eos):
    """Rows are not filled up: they go on until the last one has ended."""
    done = torch.zeros(ids.shape[0], dtype=torch.bool)
    for _ in range(n):
        token = pick(model, ids)
        ids = torch.cat([ids, token], 1)
        done |= token.eq(eos).squeeze(1)
        if done.all():
            break
    return ids


def filled_by_where(model, ids, n, eos):
    done = torch.zeros(ids.shape[0], 1, dtype=torch.bool)
    for _ in range(n):
        token = torch.where(done, 0, pick(model, ids))
        ids = torch.cat([ids, token], 1)
        done = done | (token == eos)
        if done.all():
            break
    return ids


def filled_in_place(model, ids, n, eos):
    done = torch.zeros(ids.shape[0], dtype=torch.bool)
    for _ in range(n):
        token = pick(model, ids)[:, 0]
        token[done] = 1
        done |= token == eos
        ids = torch.cat([ids, token[:, None]], 1)
        if bool(done.all()):
            break
    return ids


def filled_with_the_end(model, ids, n, eos):
    finished = torch.zeros_like(ids[:, :1], dtype=torch.bool)
    for _ in range(n):
        token = pick(model, ids).masked_fill(finished, eos)
        finished = torch.logical_or(finished, token == eos)
        ids = torch.cat([ids, token], 1)
        if finished.all():
            break
    return ids


def filled_by_products(model, ids, n, eos):
    """As the library of transformers did."""
    unfinished = torch.ones(ids.shape[0], dtype=torch.long)
    for _ in range(n):
        token = pick(model, ids).squeeze(1)
        token = token * unfinished + 2 * (1 - unfinished)
        ids = torch.cat([ids, token[:, None]], dim=-1)
        unfinished = unfinished.mul((token != eos).long())
        if unfinished.max() == 0:
            break
    return ids


def end_filled_too(model, ids, n, eos):
    """The token that ends a row is replaced itself."""
    done = torch.zeros(ids.shape[0], 1, dtype=torch.bool)
    for _ in range(n):
        token = pick(model, ids)
        done = done | (token == eos)
        token = torch.where(done, 4, token)
        ids = torch.cat([ids, token], 1)
        if done.all():
            break
    return ids


def filled_without_a_break(model, ids, n, eos):
    done = torch.zeros(ids.shape[0], 1, dtype=torch.bool)
    for _ in range(n):
        token = torch.where(done, 0, pick(model, ids))
        ids = torch.cat([ids, token], 1)
        done = done | (token == eos)
    return ids


SEVERAL = [
    all_at_one_step, any_of_them, all_have_ended, filled_by_where, filled_in_place, filled_with_the_end,
    filled_by_products, end_filled_too, filled_without_a_break,
]  # fmt: skip
FILLED = SEVERAL[3:]


@pytest.mark.parametrize("loop", SEVERAL)
def test_several_texts_end_as_the_loop_ends_them(loop):
    for eos in (3, 99):
        compiled = assert_as_written(loop, THREE, eos)
        assert bool((compiled.last.new_lengths < N).all()) == (loop in FILLED and eos == 3)


@pytest.mark.parametrize("loop", FILLED)
def test_filled_texts_of_one_row(loop):
    assert_as_written(loop, ONE, 3)


def test_the_distribution_of_rows_that_are_filled():
    """Chi-square at level 1e-3 over three tokens, in which half of the texts end."""
    model, eos, batch = TableLM(3, seed=3), 2, 2**12

    def drawn(model, ids, n):
        done = torch.zeros(ids.shape[0], 1, dtype=torch.bool)
        for _ in range(n):
            token = torch.where(done, 2, draw(model, ids))
            ids = torch.cat([ids, token], 1)
            done = done | (token == 2)
            if done.all():
                break
        return ids

    ids = torch.tensor([[0, 1]])
    compiled = decode(drawn, method="autoregressive", **QUICK, seed=1)
    result = compiled(model, ids.expand(batch, -1), 3)
    expected = sequence_distribution(model, ids[0], 3, 3, eos=eos)
    assert chi_square_p_value(result[:, 2:], expected) > 1e-3
    assert chi_square_p_value(result[:, 2:], sequence_distribution(model, ids[0], 3, 3)) < 1e-9


@pytest.mark.parametrize("method", ["autoregressive", "smc"])
def test_the_distribution_of_a_text_that_ends_with_its_length(method):
    """Texts of all lengths, against full enumeration; SMC with the target as its draft, where all weights are one."""
    model, eos = TableLM(3, seed=3), 2

    def drawn(model, ids, n):
        for _ in range(n):
            token = draw(model, ids)
            if token == 2:
                break
            ids = torch.cat([ids, token], 1)
        return ids[0].tolist()

    expected = sequence_distribution(model, torch.tensor([1]), 3, 3, eos=eos)
    found: Counter[tuple[int, ...]] = Counter()
    options = {"draft": model, "n_particles": 2, "lookahead": 2} if method == "smc" else {}
    torch.manual_seed(0)
    compiled = decode(drawn, method=method, **QUICK, **options)
    count = 250
    for _ in range(count):
        found[tuple(compiled(model, torch.tensor([[1]]), 3)[1:])] += 1
    law: Counter[tuple[int, ...]] = Counter()
    for tokens in torch.cartesian_prod(*[torch.arange(3)] * 3).tolist():
        text = tuple(tokens[: tokens.index(eos)] if eos in tokens else tokens)
        law[text] += float(expected[tuple(tokens)])
    assert set(found) <= {text for text in law if law[text] > 0}
    statistic = sum((found[text] - count * p) ** 2 / (count * p) for text, p in law.items() if p > 0)
    assert statistic < 45, "14 degrees of freedom: 1 in 25000"


# ---- what is refused ------------------------------------------------------------------------------------------------


def test_a_branch_that_goes_on_is_refused_when_it_is_taken():
    def cools_after(model, ids, n, seen):
        scale = 1.0
        for _ in range(n):
            token = torch.multinomial(torch.softmax(model(ids)[:, -1] * scale, -1), 1)
            if token == seen:
                scale = 2.0
            ids = torch.cat([ids, token], 1)
        return ids

    compiled = decode(cools_after, method="autoregressive", **QUICK, seed=0)
    assert compiled(MODEL, ONE, N, 99).shape == (1, 3 + N)
    with pytest.raises(LoopError, match=r"does something else than to end the loop[\s\S]*token == seen"):
        [compiled(MODEL, ONE, 12, eos) for eos in range(V)]


def test_a_token_that_is_replaced_otherwise_is_refused():
    def never_zero(model, ids, n):
        for _ in range(n):
            token = pick(model, ids)
            token = torch.where(token == 0, 1, token)
            ids = torch.cat([ids, token], 1)
        return ids

    ids = next(ids for ids in THREE[:, None] if 0 in before_it_is_appended(MODEL, ids, N, 99)[:, 3:])
    with pytest.raises(LoopError):
        decode(never_zero, **QUICK)(MODEL, ids, N)


def test_penalties_by_python_numbers_are_refused():
    def penalised(model, ids, n):
        for _ in range(n):
            logits = model(ids)[:, -1]
            for token in set(ids[0].tolist()):
                logits[0, token] /= 1.3
            ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], 1)
        return ids

    with pytest.raises(LoopError):
        decode(penalised, **QUICK)(MODEL, ONE, N)


def test_another_end_than_the_loops_own_is_refused():
    assert_as_written(before_it_is_appended, ONE, 3, eos_token_id=3)
    with pytest.raises(OptionError, match="not the token by which the loop ends"):
        decode(before_it_is_appended, **QUICK, eos_token_id=1)(MODEL, ONE, N, 3)


def test_without_source_the_refusal_says_so():
    names: dict[str, Any] = {"torch": torch}
    exec(
        "def loop(model, ids, n):\n"
        "    for _ in range(n):\n"
        "        token = model(ids)[:, -1].argmax(-1, keepdim=True)\n"
        "        if token == 3: break\n"
        "        ids = torch.cat([ids, token], 1)\n"
        "    return ids\n",
        names,
    )
    with pytest.raises(LoopError, match=r"its source is not known[\s\S]*eos_token_id"):
        decode(names["loop"], **QUICK)(MODEL, ONE, N)


# ---- code behind the loop and in it ---------------------------------------------------------------------------------


def greedy(model, ids, n):
    for _ in range(n):
        ids = torch.cat([ids, pick(model, ids)], 1)
    return ids


def listed(model, ids, n):
    return greedy(model, ids, n).tolist()


def decoded(model, ids, n):
    start = ids.shape[1]
    with torch.no_grad():
        for _ in range(n):
            ids = torch.cat([ids, pick(model, ids)], 1)
        texts = [TOKENIZER.decode(row[start:]) for row in ids]
    return {"texts": texts, "count": n, "ids": ids}


def numbers(model, ids, n):
    tokens = []
    for _ in range(n):
        token = pick(model, ids)
        tokens.append(token[0].item())
        ids = torch.cat([ids, token], 1)
    return tokens, len(tokens), ids.shape[1], sum(tokens) / n


def a_number_beside(model, ids, n):
    for i in range(n):  # noqa: B007  (it is read behind the loop)
        ids = torch.cat([ids, pick(model, ids)], 1)
    return ids, i + 1, n, f"{n} tokens"


@pytest.mark.parametrize("loop", [listed, decoded, numbers, a_number_beside])
def test_code_behind_the_loop_gets_the_tokens_and_counts_all_of_them(loop):
    for n in (N, 2):
        assert_as_written(loop, THREE if loop is not numbers else ONE, n=n)


def test_prints_bars_and_logs_run_once_with_the_values(capsys, caplog):
    tqdm = pytest.importorskip("tqdm")

    def talks(model, ids, n):
        start = time.perf_counter()
        for _ in (bar := tqdm.trange(n, file=sys.stdout)):
            token = pick(model, ids)
            ids = torch.cat([ids, token], 1)
            bar.set_postfix(token=token.item())
            log.warning("token %s", token.tolist())
            print("token", token.item(), flush=True)
            sys.stdout.write(".")
        print(f"{n / (time.perf_counter() - start):.1f} tokens/s")
        return ids

    compiled = decode(talks, **QUICK)
    with caplog.at_level(logging.WARNING, log.name):
        result = compiled(MODEL, ONE, N)
    assert torch.equal(result, greedy(MODEL, ONE, N))
    tokens = result[0, 3:].tolist()
    out = capsys.readouterr().out
    assert re.findall(r"token (\d)\n", out) == [str(token) for token in tokens]
    assert out.count("tokens/s") == 1
    assert [r.getMessage() for r in caplog.records if r.name == log.name] == [f"token [[{t}]]" for t in tokens]
    (warning,) = compiled.last.stats.warnings
    assert "ran after its tokens were drawn" in warning
    assert "print('token'" in warning


def test_a_loop_that_ends_by_the_clock_is_refused():
    def hurried(model, ids, n):
        start = time.time()
        for _ in range(n):
            ids = torch.cat([ids, pick(model, ids)], 1)
            if time.time() - start > 5:
                break
        return ids

    with pytest.raises(LoopError, match=r"looks at the clock[\s\S]*stopping_criteria"):
        decode(hurried, **QUICK)(MODEL, ONE, N)


# ---- a generator ----------------------------------------------------------------------------------------------------


def with_generator(model, ids, n, generator):
    for _ in range(n):
        probs = torch.softmax(model(ids)[:, -1], -1)
        ids = torch.cat([ids, torch.multinomial(probs, num_samples=1, generator=generator)], 1)
    return ids


def test_a_generator_decides_what_is_drawn_and_moves_on():
    compiled = decode(with_generator, method="autoregressive", **QUICK)
    generator = torch.Generator().manual_seed(5)
    first, second = (compiled(MODEL, ONE, 20, generator) for _ in range(2))
    assert not torch.equal(first, second)
    generator.manual_seed(5)
    assert torch.equal(compiled(MODEL, ONE, 20, generator), first)
    reference = torch.Generator().manual_seed(5)
    with_generator(MODEL, ONE, 20, reference)
    assert torch.equal(generator.get_state(), reference.get_state()), "it moves on as far as it would in eager mode"
    torch.manual_seed(0)
    one, other = (compiled(MODEL, ONE, 20, None) for _ in range(2))
    assert not torch.equal(one, other)


def test_the_distribution_of_draws_with_a_generator():
    model, ids, batch = TableLM(3, seed=3), torch.tensor([[0, 1]]), 2**12
    compiled = decode(with_generator, method="autoregressive", **QUICK)
    result = compiled(model, ids.expand(batch, -1), 2, torch.Generator().manual_seed(0))
    assert chi_square_p_value(result[:, 2:], sequence_distribution(model, ids[0], 2, 3)) > 1e-3


def test_several_generators_are_refused():
    def with_two(model, ids, n, first, second):
        for _ in range(n):
            probs = torch.softmax(model(ids)[:, -1], -1)
            ids = torch.cat([ids, torch.multinomial(probs, 1, generator=first)], 1)
        return ids

    two = torch.Generator(), torch.Generator()
    with pytest.raises(LoopError, match="several generators"):
        decode(with_two, method="autoregressive", **QUICK)(MODEL, ONE, N, *two)


def test_a_draw_that_cannot_be_made_for_it_is_refused():
    """The mean of the logits that leave one token is no number: the last token shows in no call of the model."""

    def centred(model, ids, n):
        for _ in range(n):
            logits = model(ids)[:, -1]
            token = (logits - logits.mean(-1, keepdim=True)).argmax(-1, keepdim=True)
            ids = torch.cat([ids, token], 1)
        return ids.tolist()

    for n in (1, 2, N):
        with pytest.raises(LoopError, match=r"draws other tokens|gives its model other tokens"):
            decode(centred, **QUICK)(MODEL, ONE, n)
