"""Loops as people write them must come back as one step; what cannot be compiled must be refused by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.recovered_loops import MODEL, P, TinyLM, V, capture, check_step, greedy, prompt, refusal
from torch import nn

from smc_compile.errors import LoopError
from smc_compile.passes.loop.recover import DecodeLoop
from smc_compile.passes.pipeline import recover_loop

TABLE = torch.randn(V, V)


# ---- samplers: logits [B, V] -> token [B] --------------------------------------------------------------------------


def temperature(logits):
    return torch.multinomial(torch.softmax(logits / 0.8, dim=-1), num_samples=1).squeeze(1)


def top_k(logits):
    values, _ = torch.topk(logits, 3)
    logits[logits < values[:, [-1]]] = -float("inf")
    return torch.multinomial(F.softmax(logits, dim=-1), 1)[:, 0]


def top_p(logits):
    probs, index = torch.sort(torch.softmax(logits, -1), dim=-1, descending=True)
    total = probs.cumsum(-1)
    probs[total - probs > 0.8] = 0.0
    probs.div_(probs.sum(-1, keepdim=True))
    return torch.gather(index, -1, torch.multinomial(probs, 1)).view(-1)


def categorical(logits):
    return torch.distributions.Categorical(logits=logits).sample()


def race(logits):
    p = torch.softmax(logits, -1)
    return torch.argmax(p / torch.empty_like(p).exponential_(1), dim=-1, keepdim=True).to(torch.int)[:, 0]


def gumbel(logits):
    return (logits - torch.log(-torch.log(torch.rand_like(logits)))).argmax(-1)


def greedy_max(logits):
    return torch.max(logits, dim=-1)[1]


def greedy_topk(logits):
    return logits.topk(1).indices.reshape(-1)


def greedy_sorted(logits):
    return torch.sort(logits, descending=True).indices[:, 0]


SAMPLERS = [temperature, top_k, top_p, categorical, race, gumbel, greedy, greedy_max, greedy_topk, greedy_sorted]


# ---- loops ---------------------------------------------------------------------------------------------------------


def growing_cat(model, sample, ids, n):
    for _ in range(n):
        ids = torch.cat((ids, sample(model(ids)[:, -1, :])[:, None]), dim=1)
    return ids


def keep_axis(model, sample, ids, n):
    for _ in range(n):
        ids = torch.cat([ids, sample(model(ids)[:, -1:].squeeze(1)).unsqueeze(-1)], dim=-1)
    return ids


def buffer_by_index(model, sample, ids, n):
    B, T = ids.shape
    buf = torch.empty(B, T + n, dtype=ids.dtype)
    buf[:, :T] = ids
    for i in range(n):
        buf[:, T + i] = sample(model(buf[:, : T + i])[:, -1])
    return buf


def buffer_functional(model, sample, ids, n):
    T = ids.shape[1]
    buf = F.pad(ids, (0, n))
    for i in range(T, T + n):
        buf = buf.index_copy(1, torch.tensor([i]), sample(model(buf.narrow(1, 0, i))[:, -1])[:, None].long())
    return buf


def buffer_where(model, sample, ids, n):
    T = ids.shape[1]
    buf = torch.cat([ids, torch.zeros(ids.shape[0], n, dtype=torch.long)], 1)
    for i in range(T, T + n):
        token = sample(model(buf[:, :i])[:, -1])
        buf = torch.where(torch.arange(T + n) == i, token.unsqueeze(1), buf)
    return buf


def list_of_tokens(model, sample, ids, n):
    tokens = []
    for _ in range(n):
        token = sample(model(ids)[:, -1])
        tokens.append(token)
        ids = torch.cat([ids, token.view(-1, 1)], 1)
    return torch.stack(tokens), torch.stack(tokens, dim=1), ids[:, P:]


def cat_of_list(model, sample, ids, n):
    tokens = []
    for _ in range(n):
        tokens.append(sample(model(torch.cat([ids, *tokens], 1))[:, -1])[:, None])
    return torch.cat(tokens, 1), torch.stack(tokens, 1)


def padded_output(model, sample, ids, n):
    buf = torch.full((ids.shape[0], P + n + 2), 9)
    buf[:, :P].copy_(ids)
    view = buf[:, P:]
    for i in range(n):
        view[:, i] = sample(model(buf[:, : P + i])[:, -1])
    return buf


LOOPS = [
    growing_cat, keep_axis, buffer_by_index, buffer_functional, buffer_where, list_of_tokens, cat_of_list, padded_output
]  # fmt: skip


def check_outputs(loop: DecodeLoop, fn: Any, ids: torch.Tensor) -> None:
    """`build` puts the outputs together as the eager loop does."""
    with torch.no_grad():
        returned = fn(ids)
    returned = returned if isinstance(returned, tuple) else (returned,)
    assert len(returned) == len(loop.outputs)
    with torch.no_grad():
        torch.manual_seed(1)
        returned = fn(ids)
        torch.manual_seed(1)
        whole = growing_cat(*fn.loop, ids, loop.iterations)
    returned = returned if isinstance(returned, tuple) else (returned,)
    for value, layout in zip(returned, loop.outputs, strict=True):
        built = layout.build(ids, whole[:, loop.prompt_length :])
        assert built.dtype == value.dtype
        assert torch.equal(built, value)


def bind(loop: Any, model: Any, sample: Any, n: int) -> Any:
    def fn(ids):
        return loop(model, sample, ids, n)

    fn.loop = (model, sample)
    return fn


@pytest.mark.parametrize(
    ("loop", "dynamic"),
    [*((loop, False) for loop in LOOPS), (growing_cat, True), (buffer_by_index, True), (list_of_tokens, True)],
)
def test_every_form_of_loop(loop, dynamic):
    fn = bind(loop, MODEL, temperature, 3)
    found, inputs = capture(fn, prompt(), dynamic=dynamic)
    assert (found.iterations, found.batch, found.prompt_length) == (3, 2, P)
    assert inputs[found.prompt_index].shape == (2, P)
    check_step(found, inputs, lambda ids: temperature(MODEL(ids)[:, -1]))
    check_outputs(found, fn, prompt())


@pytest.mark.parametrize(("sample", "dynamic"), [*((s, False) for s in SAMPLERS), (top_p, True), (categorical, True)])
def test_every_sampler(sample, dynamic):
    fn = bind(growing_cat, MODEL, sample, 2)
    found, inputs = capture(fn, prompt(), dynamic=dynamic)
    check_step(found, inputs, lambda ids: sample(MODEL(ids)[:, -1]))
    check_outputs(found, fn, prompt())
    assert any(word in found.report[2] for word in ("multinomial", "argmax", "getitem"))


@pytest.mark.parametrize("loop", [growing_cat, buffer_by_index, list_of_tokens])
@pytest.mark.parametrize(("batch", "n"), [(1, 2), (3, 7)])
def test_batches_and_iteration_counts(loop, batch, n):
    fn = bind(loop, MODEL, gumbel, n)
    found, inputs = capture(fn, prompt(batch))
    assert found.iterations == n
    assert found.batch == batch
    check_step(found, inputs, lambda ids: gumbel(MODEL(ids)[:, -1]))
    check_outputs(found, fn, prompt(batch))


def test_loop_inside_a_module_and_model_as_argument():
    class Generator(nn.Module):
        def __init__(self):
            super().__init__()
            self.lm = MODEL

        def forward(self, ids, temp):
            for _ in range(3):
                probs = torch.softmax(self.lm(ids)[:, -1] / temp, -1)
                ids = torch.cat([ids, torch.multinomial(probs, 1)], 1)
            return ids

    def by_argument(model, ids):
        return growing_cat(model, greedy, ids, 2)

    found, inputs = capture(Generator(), prompt(), 0.7, dynamic=True)
    check_step(found, inputs, lambda ids: torch.multinomial(torch.softmax(MODEL(ids)[:, -1] / 0.7, -1), 1))
    assert ".item()" not in found.step.code  # the temperature stays a tensor
    placeholder, value = found.fixed_floats[0]  # eps of the norm, which must be a number
    assert len(found.fixed_floats) == 1
    assert value == MODEL.norm.eps == inputs[placeholder].item()
    found, inputs = capture(by_argument, MODEL, prompt())
    check_step(found, inputs, lambda ids: greedy(MODEL(ids)[:, -1]))


def test_a_symbolic_graph_is_recovered_again_for_other_sizes():
    fn = bind(list_of_cats, MODEL, greedy, 3)
    kept: list[Any] = []

    def backend(gm, example_inputs):
        kept.extend([gm, example_inputs])
        return gm.forward

    torch._dynamo.reset()
    torch.compile(fn, backend=backend, fullgraph=True, dynamic=True)(prompt())
    gm, inputs = kept
    longer = torch.randint(0, V, (5, 9))
    sizes = {2: 5, P: 9}
    again = [
        sizes[x.node.hint] if isinstance(x, torch.SymInt) else longer if x.dtype == torch.long else x for x in inputs
    ]  # int(x) would fix the size for good
    found = recover_loop(gm, again)
    assert (found.iterations, found.batch, found.prompt_length) == (3, 5, 9)
    check_step(found, again, lambda ids: greedy(MODEL(ids)[:, -1]))
    check_outputs(found, fn, longer)


def list_of_cats(model, sample, ids, n):
    tokens = []
    for _ in range(n):
        tokens.append(sample(model(torch.cat([ids, *tokens], 1))[:, -1])[:, None])
    return torch.cat([ids, *tokens], 1)


def test_prompt_of_one_axis():
    def fn(ids):
        for _ in range(3):
            logits = MODEL(ids[None])[0, -1]
            ids = torch.cat([ids, torch.multinomial(torch.softmax(logits, -1), 1)])
        return ids

    found, inputs = capture(fn, prompt(1)[0])
    assert found.batch == 1
    assert found.outputs[0].axes == ("time",)
    check_step(found, inputs, lambda ids: temperature_free(MODEL(ids)[:, -1]))


def temperature_free(logits):
    return torch.multinomial(torch.softmax(logits, -1), 1)


def test_bigram_golden():
    def fn(ids, table):
        for _ in range(3):
            ids = torch.cat([ids, torch.multinomial(torch.softmax(table[ids][:, -1], dim=-1), 1)], dim=1)
        return ids

    found, _ = capture(fn, prompt(), TABLE)
    assert found.step.code.strip() == GOLDEN.strip()
    assert found.report[:2] == ["decode loop of 3 iterations", "prompt `l_ids_` [2, 4]"]


GOLDEN = """
def forward(self, ids, l_table_):
    getitem = l_table_[ids];  l_table_ = ids = None
    getitem_1 = getitem[(slice(None, None, None), -1)];  getitem = None
    softmax = torch.softmax(getitem_1, dim = -1);  getitem_1 = None
    multinomial = torch.multinomial(softmax, 1);  softmax = None
    return multinomial
"""


def test_growing_integers_become_sizes():
    def fn(ids):
        for i in range(3):
            S = P + i
            position = torch.arange(2 * S + 1)[S]
            logits = TABLE[ids].mean(1) + position
            ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], 1)
        return ids

    found, inputs = capture(fn, prompt())
    code = found.step.code
    assert "ids.size(1)" in code
    assert "size * 2" in code
    check_step(found, inputs, lambda ids: (TABLE[ids].mean(1) + ids.shape[1]).argmax(-1))


def test_source_lines_are_kept():
    found, _ = capture(bind(growing_cat, MODEL, greedy, 2), prompt())
    calls = [node for node in found.step.graph.nodes if node.op == "call_function"]
    assert all("test_recover" in node.meta["stack_trace"] for node in calls if "size" not in node.name)


@pytest.mark.parametrize("n", [0, 1])
def test_no_loop_is_left_alone(n):
    def fn(ids):
        logits = MODEL(ids)
        return torch.multinomial(torch.softmax(logits[:, -1], -1), 1) if n else logits.sum()

    assert capture(fn, prompt())[0] is None


def test_argmax_routing_is_left_alone():
    def fn(x):
        for _ in range(3):
            x = torch.where(x.argmax(-1, keepdim=True) == 1, x * 2, x)
        return x

    assert capture(fn, torch.randn(2, 3))[0] is None


# ---- refusals ------------------------------------------------------------------------------------------------------


def test_refuses_a_temperature_schedule():
    def fn(ids):
        for i in range(3):
            ids = torch.cat([ids, torch.multinomial(torch.softmax(MODEL(ids)[:, -1] / (1.5 - i / 2), -1), 1)], 1)
        return ids

    error = refusal(fn, prompt())
    assert "1.5 in iteration 0 but 1.0 in iteration 1" in error.why
    assert "test_recover.py" in error.why


def test_refuses_integers_that_grow_unevenly():
    def fn(ids):
        for i in range(3):
            logits = MODEL(ids)[:, -1] + torch.zeros(2 ** (i + 1)).sum()
            ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], 1)
        return ids

    assert "2 in iteration 0, 4 in iteration 1 and 8 in iteration 2" in refusal(fn, prompt()).why


@pytest.mark.parametrize("window", [P, P + 1])
def test_a_cropped_window_is_its_last_tokens(window):
    def fn(ids):
        for _ in range(3):
            ids = torch.cat([ids, greedy(MODEL(ids[:, -window:])[:, -1])[:, None]], 1)
        return ids

    found, _ = capture(fn, prompt())
    assert found is not None
    assert found.window == window
    assert found.iterations == 3
    assert found.lines_at(window)
    assert found.lines_at(window + 1) == ()


def test_refuses_a_window_beside_the_whole_text():
    def fn(ids):
        for _ in range(3):
            logits = MODEL(ids[:, -P:])[:, -1] + MODEL(ids)[:, -1]
            ids = torch.cat([ids, greedy(logits)[:, None]], 1)
        return ids

    error = refusal(fn, prompt())
    assert "holds prompt[1:4] + tokens[0:1]" in error.why
    assert "prompt[0:4] + tokens[0:1]" in error.why


def test_refuses_an_end_of_sequence_mask():
    def fn(ids):
        done = torch.zeros(ids.shape[0], dtype=torch.bool)
        for _ in range(3):
            token = greedy(MODEL(ids)[:, -1])
            token = torch.where(done, 0, token)
            done = done | (token == 5)
            ids = torch.cat([ids, token[:, None]], 1)
        return ids

    error = refusal(fn, prompt())
    assert "`eq`" in error.why
    assert "token == 5" in error.why
    assert "eos_token_id" in error.fix


def test_refuses_an_end_of_sequence_mask_in_place():
    def fn(ids):
        done = torch.zeros(ids.shape[0], dtype=torch.bool)
        for _ in range(3):
            token = greedy(MODEL(ids)[:, -1])
            token[done] = 0
            done = done | (token == 5)
            ids = torch.cat([ids, token[:, None]], 1)
        return ids

    assert "eos_token_id" in refusal(fn, prompt()).fix


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_sum_that_is_carried_on_is_the_sum_of_all_tokens(dynamic):
    """A loop that reads its newest token only: its first iteration is the step, and the others agree with it."""

    def fn(ids):
        state = TABLE[ids].sum(1)
        tokens = []
        for _ in range(3):
            token = torch.multinomial(torch.softmax(state, -1), 1)
            state = state + TABLE[token[:, 0]]
            tokens.append(token)
        return torch.cat(tokens, 1)

    found, inputs = capture(fn, prompt(), dynamic=dynamic)
    assert found.iterations == 3
    check_step(found, inputs, lambda ids: torch.multinomial(torch.softmax(TABLE[ids].sum(1), -1), 1))
    found.check(inputs)


def test_refuses_a_size_that_grows_with_every_second_token_of_the_prompt():
    def fn(ids):
        state = TABLE[ids].sum(1) + torch.zeros(ids.shape[1] // 2, V).sum(0)
        tokens = []
        for _ in range(3):
            token = torch.multinomial(torch.softmax(state, -1), 1)
            state = state + TABLE[token[:, 0]]
            tokens.append(token)
        return torch.cat(tokens, 1)

    for ids, sizes in ((prompt(), "2, 2 and 3"), (torch.cat([prompt(), prompt()[:, :1]], 1), "2, 3 and 3")):
        error = refusal(fn, ids, dynamic=True)
        assert "does not grow evenly with the prompt" in error.what
        assert f"uses {sizes} for prompts" in error.why


def test_a_state_that_forgets_is_not_the_step():
    def fn(ids):
        state = TABLE[ids].sum(1)
        tokens = []
        for _ in range(3):
            token = torch.multinomial(torch.softmax(state, -1), 1)
            state = 0.9 * state + TABLE[token[:, 0]]
            tokens.append(token)
        return torch.cat(tokens, 1)

    found, inputs = capture(fn, prompt())
    with pytest.raises(LoopError, match="what token 1 is drawn from"):
        found.check(inputs)


def test_refuses_to_return_anything_but_tokens():
    def logits_too(ids):
        for _ in range(3):
            logits = MODEL(ids)[:, -1]
            ids = torch.cat([ids, greedy(logits)[:, None]], 1)
        return ids, logits

    def last_token(ids):
        out = growing_cat(MODEL, greedy, ids, 3)
        return out[:, -1]

    assert "Only tokens" in refusal(logits_too, prompt()).what
    assert "tokens[2:3]" in refusal(last_token, prompt()).why


def test_refuses_dropout_in_training_mode():
    model = TinyLM(dropout=0.3)
    error = refusal(bind(growing_cat, model, greedy, 2), prompt())
    assert "model.eval()" in error.fix
    model.eval()
    assert capture(bind(growing_cat, model, greedy, 2), prompt())[0].iterations == 2


def test_refuses_other_noise():
    def fn(ids):
        for _ in range(2):
            logits = MODEL(ids)[:, -1]
            ids = torch.cat([ids, temperature_free(logits + torch.randn_like(logits))], 1)
        return ids

    assert "randn_like" in refusal(fn, prompt()).why


def test_refuses_writes_to_inputs():
    def fn(ids, buf):
        buf[:, :P] = ids
        for i in range(2):
            buf[:, P + i] = greedy(MODEL(buf[:, : P + i])[:, -1])
        return buf

    assert "writes into one of its inputs" in refusal(fn, prompt(), torch.zeros(2, P + 2, dtype=torch.long)).what


def test_refuses_autocast_inside():
    def fn(ids):
        for _ in range(2):
            with torch.autocast("cpu", torch.bfloat16):
                logits = MODEL(ids)[:, -1]
            ids = torch.cat([ids, greedy(logits)[:, None]], 1)
        return ids

    assert "autocast" in refusal(fn, prompt()).what
