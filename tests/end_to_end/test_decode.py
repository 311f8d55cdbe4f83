"""``@smc_compile.decode``: the loop that a user wrote, with the calls and the results that it has without it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from helpers.toys import TableLM
from torch import Tensor, nn
from torch._dynamo.utils import counters

import smc_compile
from smc_compile import Generation, decode, generate
from smc_compile.errors import InputError, LoopError, OptionError, SMCError

pytestmark = pytest.mark.usefixtures("fresh_dynamo")
V, N = 5, 6
MODEL, DRAFT = TableLM(V), TableLM(V, seed=1)
IDS = torch.tensor([[0, 1, 2], [3, 4, 0]])
OPTIONS = {"draft": DRAFT, "compiler": "eager", "n_particles": 4, "lookahead": 2, "seed": 0, "validate": False}


def draw(model: nn.Module, ids: Tensor) -> Tensor:
    return torch.multinomial(torch.softmax(model(ids)[:, -1] / 0.8, -1), 1)


def growing(model: nn.Module, ids: Tensor, n: int) -> Tensor:
    for _ in range(n):
        ids = torch.cat([ids, draw(model, ids)], 1)
    return ids


def total_length(model: nn.Module, ids: Tensor, max_len: int) -> Tensor:
    for _ in range(max_len - ids.shape[1]):
        ids = torch.cat([ids, draw(model, ids)], 1)
    return ids


def new_tokens_in_a_list(model: nn.Module, ids: Tensor, n: int) -> Tensor:
    tokens = []
    for _ in range(n):
        token = draw(model, ids)
        tokens.append(token[:, 0])
        ids = torch.cat([ids, token], 1)
    return torch.stack(tokens, 1)


def preallocated(model: nn.Module, ids: Tensor, n: int) -> Tensor:
    start = ids.shape[1]
    buffer = torch.zeros(ids.shape[0], start + n, dtype=torch.long)
    buffer[:, :start] = ids
    for i in range(start, start + n):
        buffer[:, i] = draw(model, buffer[:, :i])[:, 0]
    return buffer


def greedy(model: nn.Module, ids: Tensor, n: int) -> Tensor:
    for _ in range(n):
        ids = torch.cat([ids, model(ids)[:, -1].argmax(-1, keepdim=True)], 1)
    return ids


def top_k_of(model: nn.Module, ids: Tensor, top_k: int, n: int) -> Tensor:
    for _ in range(n):
        logits = model(ids)[:, -1]
        least = torch.topk(logits, top_k).values[:, -1:]
        probs = torch.softmax(logits.masked_fill(logits < least, float("-inf")), -1)
        ids = torch.cat([ids, torch.multinomial(probs, 1)], 1)
    return ids


def cooling(model: nn.Module, ids: Tensor, n: int) -> Tensor:
    for _ in range(n):
        ids = torch.cat([ids, torch.multinomial(torch.softmax(model(ids)[:, -1] / n, -1), 1)], 1)
    return ids


class Speaker(nn.Module):
    """Its forward holds the loop."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    @decode(**OPTIONS)
    def forward(self, ids: Tensor, n: int) -> Tensor:
        return growing(self.model, ids, n)


def generated(n: int = N, **options: Any) -> Generation:
    return generate(MODEL, input_ids=IDS, max_new_tokens=n, temperature=0.8, **{**OPTIONS, **options})


@pytest.fixture(scope="module")
def expected() -> Tensor:
    return generated().sequences


# --- how it is written and called ----------------------------------------------------------------------------------


def test_with_and_without_arguments(expected):
    @decode(**OPTIONS)
    def with_arguments(model, ids, n):
        """What it does."""
        return growing(model, ids, n)

    assert with_arguments.__name__ == "with_arguments"
    assert with_arguments.__doc__ == "What it does."
    assert torch.equal(with_arguments(MODEL, IDS, N), expected)

    @decode
    def without(model, ids, n):
        return greedy(model, ids, n)

    assert torch.equal(decode(greedy, compiler="eager")(MODEL, IDS, N), greedy(MODEL, IDS, N))
    assert isinstance(without, type(with_arguments))


def test_arguments_by_name_and_by_default(expected):
    compiled = decode(growing, **OPTIONS)
    assert torch.equal(compiled(MODEL, IDS, n=N), expected)
    assert torch.equal(compiled(n=N, ids=IDS, model=MODEL), expected)

    @decode(**OPTIONS)
    def with_default(model, ids, n=N):
        return growing(model, ids, n)

    assert torch.equal(with_default(MODEL, IDS), expected)
    with pytest.raises(TypeError, match="missing a required argument"):
        compiled(MODEL, n=N)


def test_on_a_method(expected):
    speaker = Speaker(MODEL)
    assert torch.equal(speaker(IDS, N), expected)
    assert torch.equal(Speaker.forward(speaker, IDS, n=N), expected)


@pytest.mark.parametrize("loop", [growing, preallocated, new_tokens_in_a_list, total_length])
def test_every_form_of_loop_draws_what_generate_draws(loop, expected):
    compiled = decode(loop, **OPTIONS)
    more = IDS.shape[1] if loop is total_length else 0
    prompt = 3 if loop is new_tokens_in_a_list else 0
    for n in (N, 2, 9, 1):
        result = compiled(MODEL, IDS, n + more)
        assert result.dtype == torch.int64
        assert torch.equal(result, generated(n).sequences[:, prompt:])
    assert torch.equal(compiled(MODEL, IDS, N + more), expected[:, prompt:])


def test_autoregressive_draws_what_generate_draws():
    compiled = decode(growing, **{**OPTIONS, "method": "autoregressive"})
    assert torch.equal(compiled(MODEL, IDS, N), generated(method="autoregressive").sequences)


@pytest.mark.parametrize("n", [1, 2, 11])
def test_greedy_is_the_plain_loop(n):
    assert torch.equal(decode(greedy, **OPTIONS)(MODEL, IDS, n), greedy(MODEL, IDS, n))


def test_last_is_the_generation():
    compiled = decode(growing, **OPTIONS)
    assert compiled.last is None
    result, reference = compiled(MODEL, IDS, N), generated()
    assert torch.equal(compiled.last.sequences, result)
    assert torch.equal(compiled.last.particles, reference.particles)
    assert torch.equal(compiled.last.log_evidence, reference.log_evidence)
    assert compiled.last.stats.new_tokens == N


# --- what counts the iterations ------------------------------------------------------------------------------------


def test_a_wrong_name_is_refused():
    with pytest.raises(OptionError, match=r"trip_count='steps'[\s\S]*its arguments are model, ids, n"):
        decode(growing, trip_count="steps")
    with pytest.raises(LoopError):
        decode(top_k_of, trip_count="top_k", **OPTIONS)(MODEL, IDS, 2, N)


def test_an_integer_that_takes_part_in_the_distribution_is_refused():
    with pytest.raises(LoopError, match=r"'n' does not only count iterations[\s\S]*what an iteration computes differs"):
        decode(cooling, **OPTIONS)(MODEL, IDS, N)


@pytest.mark.parametrize("vocab", [V, 2])
def test_the_argument_that_counts_is_found_among_others(vocab):
    """With two tokens, a top_k of 3 makes the loop itself fail: that argument is not the one, and no error."""
    model, ids = TableLM(vocab), IDS % vocab
    compiled = decode(top_k_of, **{**OPTIONS, "draft": TableLM(vocab, seed=1)})
    for top_k in (1, 2):
        result = compiled(model, ids, top_k, N)
        assert result.shape == (2, 3 + N)
        support = model.table.topk(top_k).indices[result[:, 2:-1]]  # [B, n, k]
        assert (support == result[:, 3:, None]).any(-1).all()


def test_a_loop_without_a_count_is_refused():
    with pytest.raises(LoopError, match=r"no argument counts the iterations[\s\S]*integer arguments: none"):
        decode(partial_of_three, **OPTIONS)(MODEL, IDS)


def partial_of_three(model: nn.Module, ids: Tensor) -> Tensor:
    return growing(model, ids, 3)


def test_more_tokens_than_the_buffer_holds():
    @decode(**OPTIONS)
    def into_a_fixed_buffer(model, ids, n):
        buffer = torch.zeros(ids.shape[0], 10, dtype=torch.long)
        buffer[:, : ids.shape[1]] = ids
        for i in range(ids.shape[1], ids.shape[1] + n):
            buffer[:, i] = draw(model, buffer[:, :i])[:, 0]
        return buffer

    result = into_a_fixed_buffer(MODEL, IDS, 4)
    assert torch.equal(result[:, :7], generated(4).sequences)
    assert (result[:, 7:] == 0).all()
    with pytest.raises(InputError, match="do not fit the buffer"):
        into_a_fixed_buffer(MODEL, IDS, 8)


def test_something_that_is_no_function_is_refused():
    for thing in (3, len):
        with pytest.raises(OptionError, match="compiles a Python function"):
            decode(thing, **OPTIONS)


# --- calls after the first -----------------------------------------------------------------------------------------


def test_another_n_is_not_traced_again():
    compiled = decode(growing, **OPTIONS)
    compiled(MODEL, IDS, N)
    before = counters["stats"]["unique_graphs"]
    for n in (1, 2, 3, 20, 41):
        assert compiled(MODEL, IDS, n).shape == (2, 3 + n)
    assert counters["stats"]["unique_graphs"] == before


def test_an_update_of_the_weights_is_seen():
    model, compiled = copy.deepcopy(MODEL), decode(greedy, **OPTIONS)
    before = compiled(model, IDS, N)
    with torch.no_grad():
        model.table.neg_()
    after = compiled(model, IDS, N)
    assert torch.equal(after, greedy(model, IDS, N))
    assert not torch.equal(after, before)


def test_another_model_is_another_result():
    compiled, other = decode(greedy, **OPTIONS), TableLM(V, seed=7)
    assert torch.equal(compiled(MODEL, IDS, N), greedy(MODEL, IDS, N))
    assert torch.equal(compiled(other, IDS, N), greedy(other, IDS, N))
    assert torch.equal(compiled(MODEL, IDS, N), greedy(MODEL, IDS, N))


def test_a_global_that_has_changed_is_seen(monkeypatch):
    compiled = decode(of_the_global_model, **OPTIONS)
    for model in (MODEL, TableLM(V, seed=7), TableLM(V, seed=8)):
        monkeypatch.setitem(globals(), "GLOBAL_MODEL", model)
        assert torch.equal(compiled(IDS, N), greedy(model, IDS, N))


GLOBAL_MODEL = MODEL


def of_the_global_model(ids: Tensor, n: int) -> Tensor:
    return greedy(GLOBAL_MODEL, ids, n)


def test_an_attribute_that_the_loop_reads_may_change():
    model, compiled = copy.deepcopy(MODEL), decode(with_a_sign, **OPTIONS)
    for model.sign in (1, -1, 1):
        assert torch.equal(compiled(model, IDS, N), with_a_sign(model, IDS, N))


def with_a_sign(model: nn.Module, ids: Tensor, n: int) -> Tensor:
    for _ in range(n):
        ids = torch.cat([ids, (model.sign * model(ids)[:, -1]).argmax(-1, keepdim=True)], 1)
    return ids


def test_what_a_loop_writes_elsewhere_is_written_once_a_call():
    calls: list[str] = []

    def counted(model, ids, n):
        calls.append("called")
        return greedy(model, ids, n)

    compiled = decode(counted, **OPTIONS)
    compiled(MODEL, IDS, N)
    compiled(MODEL, IDS, 2)
    assert calls == ["called"] * 2


def test_a_result_may_have_any_structure():
    def in_a_dictionary(model, ids, n):
        longer = greedy(model, ids, n)
        return {"ids": longer, "shapes": (n, [longer[:, ids.shape[1] :]])}

    result = decode(in_a_dictionary, **OPTIONS)(MODEL, IDS, N)
    assert torch.equal(result["ids"], greedy(MODEL, IDS, N))
    assert torch.equal(result["shapes"][1][0], greedy(MODEL, IDS, N)[:, 3:])


def test_other_prompts_of_other_lengths_and_batches():
    compiled = decode(greedy, **OPTIONS)
    for ids in (IDS, IDS.repeat(1, 3), IDS[:1], IDS[:, :1], IDS.repeat(3, 2)):
        assert torch.equal(compiled(MODEL, ids, N), greedy(MODEL, ids, N))


def test_every_refusal_is_an_error_of_the_package():
    assert issubclass(LoopError, SMCError)
    assert smc_compile.LoopError is LoopError
