"""torch.while_loop and padded buffers: the same step as the plain loop, the same tokens, and refusals by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.model_parts import build, perturbed
from helpers.models import CACHEABLE
from helpers.refused_models import Bidirectional
from torch import nn

import smc_compile
from smc_compile.errors import LoopError
from smc_compile.passes.loop.recover import DecodeLoop
from smc_compile.passes.pipeline import recover_loop
from smc_compile.program.loop_finder import LoopFinder, step_text

V, P = 17, 4
OPTIONS: dict[str, Any] = {"n_particles": 2, "lookahead": 2, "seed": 0, "compiler": "eager"}
TABLE = torch.randn(V, V, generator=torch.Generator().manual_seed(0))


def bigram(ids):
    return TABLE[ids]


def draw(logits):
    return torch.multinomial(torch.softmax(logits / 0.8, -1), 1)


def prompt(batch: int = 2, length: int = P) -> torch.Tensor:
    return torch.randint(0, V, (batch, length), generator=torch.Generator().manual_seed(3))


# ---- loops ---------------------------------------------------------------------------------------------------------


def plain(model, ids, n):
    for _ in range(n):
        ids = torch.cat([ids, draw(model(ids)[:, -1])], 1)
    return ids


def padded_for(model, ids, n):
    T = ids.shape[1]
    buf = F.pad(ids, (0, n))
    for i in range(T, T + n):
        buf[:, i] = draw(model(buf)[:, i - 1])[:, 0]
    return buf


def padded_slice(model, ids, n):
    T = ids.shape[1]
    buf = torch.cat([ids, ids.new_full((ids.shape[0], n), 5)], 1)
    for t in range(n):
        logits = model(buf)[:, T + t - 1 : T + t].squeeze(1)
        buf = torch.where(torch.arange(T + n) == T + t, draw(logits), buf)
    return buf


def padded_select(model, ids, n):
    T = ids.shape[1]
    buf = F.pad(ids, (0, n))
    for i in range(T, T + n):
        buf = torch.slice_scatter(buf, draw(model(buf).select(1, i - 1)), 1, i, i + 1)
    return buf


def padded_tensor_index(model, ids, n):
    T, rows = ids.shape[1], torch.arange(ids.shape[0])
    buf, i = F.pad(ids, (0, n)), torch.tensor([T])
    for _ in range(n):
        buf = buf.index_put((rows, i), draw(model(buf)[rows, i - 1])[:, 0])
        i = i + 1
    return buf


def while_loop(body, start, limit, buf):
    return torch._higher_order_ops.while_loop(lambda i, buf: (i < limit).all(), body, (start, buf))[1]


def while_where(model, ids, n):
    T = ids.shape[1]

    def body(i, buf):
        logits = model(buf).index_select(1, (i - 1).view(1)).squeeze(1)
        return i + 1, torch.where(torch.arange(T + n) == i, draw(logits), buf)

    return while_loop(body, torch.tensor(T), T + n, F.pad(ids, (0, n)))


def while_scatter(model, ids, n):
    B, T = ids.shape

    def body(i, buf):
        at = (i - 1).reshape(1, 1, 1).expand(B, 1, V)
        token = draw(torch.gather(model(buf), 1, at)[:, 0])
        return i + 1, buf.scatter(1, i.view(1, 1).expand(B, 1), token)

    return while_loop(body, torch.full((1,), T), T + n, F.pad(ids, (0, n)))


def while_copy(model, ids, n):
    T = ids.shape[1]

    def body(i, buf):
        token = draw(model(buf)[:, i - 1].squeeze(1))
        new = buf.clone()
        new[:, i] = token
        return i + 1, new

    return while_loop(body, torch.tensor([T]), T + n, F.pad(ids, (0, n)))


def while_index_copy(model, ids, n):
    T = ids.shape[1]

    def body(t, buf):
        token = draw(torch.take_along_dim(model(buf), (T + t - 1).view(1, 1, 1), 1)[:, 0])
        return t + 1, buf.index_copy(1, (T + t).reshape(1), token)

    return while_loop(body, torch.tensor(0), n, F.pad(ids, (0, n + 2), value=3))[:, : T + n + 1]


def while_integer(model, ids, n):
    T = ids.shape[1]

    def body(i, buf):
        return i + 1, torch.slice_scatter(buf, draw(model(buf).select(1, i - 1)), 1, i, i + 1)

    state = (T, F.pad(ids, (0, n)))
    return torch._higher_order_ops.while_loop(lambda i, buf: i < T + n, body, state)[1]


FOR = [padded_for, padded_slice, padded_select, padded_tensor_index]
WHILE = [while_where, while_scatter, while_copy, while_index_copy, while_integer]


def capture(fn: Any, *args: Any) -> tuple[DecodeLoop, list[Any]]:
    found: list[Any] = []

    def backend(gm, example_inputs):
        found.append((recover_loop(gm, example_inputs), list(example_inputs)))
        return lambda *inputs: (torch.zeros(args[1].shape[0], 1, dtype=torch.long),)

    torch._dynamo.reset()
    try:
        torch.compile(fn, backend=backend, fullgraph=True)(*args)
    except torch._dynamo.exc.BackendCompilerFailed as error:
        raise (error.__cause__ or error.inner_exception) from None
    return found[0]


def refusal(fn: Any, *args: Any) -> LoopError:
    def recover_and_check():
        loop, inputs = capture(fn, *args)
        loop.check(inputs)

    with pytest.raises(LoopError) as caught:
        recover_and_check()
    assert caught.value.why
    assert caught.value.fix
    return caught.value


def same_step(loop: DecodeLoop, inputs: list[Any], model: Any) -> None:
    invariants = [inputs[i] for i in loop.invariant_indices]
    for length in (1, P, 13):
        ids = prompt(loop.batch, length)
        with torch.no_grad():
            torch.manual_seed(length)
            expected = draw(model(ids)[:, -1])
            torch.manual_seed(length)
            assert torch.equal(loop.step(ids, *invariants).reshape(-1, 1), expected)


# ---- the step ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FOR + WHILE)
@pytest.mark.parametrize("n", [2, 6])
def test_forms(form, n):
    loop, inputs = capture(form, bigram, prompt(), n)
    assert loop.iterations == n
    assert loop.outputs[0].segments == ("prompt", "tokens")
    assert loop.outputs[0].padding == ((3,) if form is while_index_copy else ())
    loop.check(inputs)
    same_step(loop, inputs, bigram)
    assert "size" not in loop.step.code


@pytest.mark.parametrize("name", ["gpt", "alibi", "eager", "additive_mask_cumsum"])
def test_sizes_of_the_buffer_become_sizes_of_the_sequence(name):
    model = CACHEABLE[name](layers=1)
    texts = []
    for n in (2, 3):
        loop, inputs = capture(padded_for, model, prompt(), n)
        loop.check(inputs)
        same_step(loop, inputs, model)
        texts.append(step_text(loop.step.graph))
    assert texts[0] == texts[1]


def test_a_buffer_as_long_as_the_width_of_the_model():
    model = CACHEABLE["llama"](layers=1)
    assert model.embed.embedding_dim == 16
    loop, inputs = capture(padded_for, model, prompt(), 16 - P)
    loop.check(inputs)
    same_step(loop, inputs, model)


def test_a_buffer_as_long_as_the_model_reaches():
    model = CACHEABLE["gpt"](max_positions=P + 3)
    loop, inputs = capture(padded_for, model, prompt(), 3)
    loop.check(inputs)


def test_while_loop_of_one_iteration_is_no_loop():
    assert capture(while_where, bigram, prompt(), 1)[0] is None


# ---- end to end ----------------------------------------------------------------------------------------------------


class Bigram(nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(V, V, generator=torch.Generator().manual_seed(seed)))

    def forward(self, ids):
        return F.embedding(ids, self.table)


def pair(name: str) -> tuple[nn.Module, nn.Module]:
    if name == "bigram":
        return Bigram(0), Bigram(1)
    model = CACHEABLE[name](layers=1)
    return model, perturbed(model)


@pytest.mark.usefixtures("untraced_regions")
@pytest.mark.parametrize(
    ("name", "form", "n", "compiled_by"),
    [
        ("llama", while_where, 6, "backend"),
        ("gpt", padded_for, 5, "decode"),
        ("bigram", while_integer, 5, "backend"),
        ("bigram", padded_slice, 5, "backend"),
        ("bigram", while_index_copy, 7, "decode"),
        ("bigram", while_copy, 4, "decode"),
    ],
)
def test_the_tokens_are_those_of_generate(name, form, n, compiled_by):
    model, draft = pair(name)
    ids, options = prompt(), {"draft": draft, **OPTIONS}
    expected = smc_compile.generate(model, draft, ids, max_new_tokens=n, temperature=0.8, **OPTIONS).sequences
    if form is while_index_copy:
        expected = F.pad(expected, (0, 1), value=3)
    torch._dynamo.reset()
    compiled = (
        torch.compile(form, backend="smc", fullgraph=True, options=options)
        if compiled_by == "backend"
        else smc_compile.decode(form, **options)
    )
    with torch.no_grad():
        assert torch.equal(compiled(model, ids, n), expected)


@pytest.mark.usefixtures("untraced_regions")
def test_decode_keeps_the_length_of_a_fixed_buffer():
    model, draft = pair("bigram")

    def fixed(model, ids, n):
        T = ids.shape[1]
        buf = F.pad(ids, (0, 20 - T), value=9)
        for i in range(T, T + n):
            buf[:, i] = draw(model(buf)[:, i - 1])[:, 0]
        return buf

    compiled = smc_compile.decode(fixed, draft=draft, **OPTIONS)
    for length, n in ((P, 6), (P, 2), (6, 14)):
        ids = prompt(2, length)
        whole = smc_compile.generate(model, draft, ids, max_new_tokens=n, temperature=0.8, **OPTIONS).sequences
        with torch.no_grad():
            assert torch.equal(compiled(model, ids, n), F.pad(whole, (0, 20 - length - n), value=9))
    with pytest.raises(smc_compile.InputError, match="do not fit the buffer"):
        compiled(model, prompt(), 17)


@pytest.mark.usefixtures("untraced_regions")
def test_a_prompt_of_one_axis():
    model, draft = pair("bigram")

    def one(model, ids, n):
        for _ in range(n):
            ids = torch.cat([ids, draw(model(ids[None])[:, -1])[0]])
        return ids

    ids = prompt(1)
    expected = smc_compile.generate(model, draft, ids, max_new_tokens=4, temperature=0.8, **OPTIONS).sequences[0]
    options = {"draft": draft, **OPTIONS}
    torch._dynamo.reset()
    with torch.no_grad():
        assert torch.equal(torch.compile(one, backend="smc", options=options)(model, ids[0], 4), expected)
        assert torch.equal(smc_compile.decode(one, **options)(model, ids[0], 4), expected)


# ---- prompts of other lengths --------------------------------------------------------------------------------------


def finder_of(fn: Any, *args: Any) -> tuple[LoopFinder, list[Any], list[Any]]:
    """The finder of a graph with symbolic sizes, and the arguments of every call."""
    found: list[LoopFinder] = []
    calls: list[list[Any]] = []

    def backend(gm, example_inputs):
        found.append(LoopFinder(gm))

        def run(*inputs):
            calls.append(list(inputs))
            return (torch.zeros(1),)

        return run

    torch._dynamo.reset()
    compiled = torch.compile(fn, backend=backend, fullgraph=True, dynamic=True)
    for length in (P, 6, 9, 7):
        compiled(*args[:1], prompt(2, length), *args[1:])
    assert len(found) == 1
    return found[0], calls, found


def test_two_lengths_that_agree_settle_all_lengths():
    finder, calls, _ = finder_of(plain, bigram, 3)
    loops = [finder.loop_for(arguments) for arguments in calls]
    assert {loop.iterations for loop in loops} == {3}
    assert finder.recoveries <= 3


def test_an_output_that_depends_on_the_length_is_recovered_for_each():
    def fixed(model, ids, n):
        buf = F.pad(plain(model, ids, n), (0, 20 - ids.shape[1] - n), value=9)
        return buf

    finder, calls, _ = finder_of(fixed, bigram, 3)
    for arguments, length in zip(calls, (P, 6, 9, 7), strict=True):
        loop = finder.loop_for(arguments)
        assert loop.prompt_length == length
        assert loop.outputs[0].padding == (9,) * (17 - length)
    before = finder.recoveries
    finder.loop_for(calls[1])
    assert finder.recoveries == before


# ---- refusals ------------------------------------------------------------------------------------------------------


def test_refuses_a_model_that_reads_the_padding():
    model = build(Bidirectional)
    assert "not read causally" in refusal(padded_for, model, prompt(), 4).what
    error = refusal(padded_for, lambda ids: bigram(ids) + bigram(ids).mean(1, keepdim=True), prompt(), 4)
    assert "depend on the padding" in error.why
    assert "is_causal=True" in error.fix


def test_refuses_a_length_that_may_be_another_size():
    def model(ids):
        return bigram(ids) / torch.ones(9).sum()

    error = refusal(padded_for, model, prompt(), 9 - P)
    assert "also another size" in error.what
    assert "another length than 9" in error.fix
    loop, inputs = capture(padded_for, model, prompt(), 3)
    loop.check(inputs)


def test_refuses_a_condition_on_tokens():
    def fn(model, ids, n):
        def body(i, buf):
            logits = model(buf).index_select(1, (i - 1).view(1)).squeeze(1)
            return i + 1, torch.where(torch.arange(P + n) == i, draw(logits), buf)

        state = (torch.tensor(P), F.pad(ids, (0, n)))
        return torch._higher_order_ops.while_loop(lambda i, buf: (i < P + n) & (buf != 5).all(), body, state)[1]

    error = refusal(fn, bigram, prompt(), 5)
    assert "only count iterations" in error.what
    assert "i < limit" in error.fix


def test_refuses_a_limit_that_is_data():
    def fn(model, ids, limit):
        def body(i, buf):
            logits = model(buf).index_select(1, (i - 1).view(1)).squeeze(1)
            return i + 1, torch.where(torch.arange(P + 5) == i, draw(logits), buf)

        return while_loop(body, torch.tensor(P), limit, F.pad(ids, (0, 5)))

    assert "more than a counter and a number" in refusal(fn, bigram, prompt(), torch.tensor(P + 5)).why


@pytest.mark.parametrize("step", [lambda i: i * 2, lambda i: i + 1 + i % 2])
def test_refuses_a_counter_that_does_not_count_evenly(step):
    def fn(model, ids, n):
        def body(i, buf):
            logits = model(buf).index_select(1, (i - 1).view(1)).squeeze(1)
            return step(i), torch.where(torch.arange(80) == i, draw(logits), buf)

        return while_loop(body, torch.tensor(P), 70, F.pad(ids, (0, 76)))

    error = refusal(fn, bigram, prompt(), 5)
    assert "evenly" in error.what


def test_refuses_what_is_written_in_the_wrong_place_later():
    def fn(model, ids, n):
        def body(i, buf):
            logits = model(buf).index_select(1, (i - 1).view(1)).squeeze(1)
            return i + 1, torch.where(torch.arange(20) == i.clamp(max=10), draw(logits), buf)

        return while_loop(body, torch.tensor(P), 15, F.pad(ids, (0, 16)))

    assert "clamp" in refusal(fn, bigram, prompt(), 5).why


def test_refuses_another_position_than_the_last():
    def fn(model, ids, n):
        buf = F.pad(ids, (0, n))
        for i in range(P, P + n):
            buf[:, i] = draw(model(buf)[:, i])[:, 0]
        return buf

    assert "logits of the last token" in refusal(fn, bigram, prompt(), 4).what


def test_refuses_an_uninitialised_buffer():
    def fn(model, ids, n):
        buf = torch.empty(2, P + n, dtype=torch.long)
        buf[:, :P] = ids
        for i in range(P, P + n):
            buf[:, i] = draw(model(buf)[:, i - 1])[:, 0]
        return buf

    assert "torch.zeros instead of torch.empty" in refusal(fn, bigram, prompt(), 4).fix
