"""Loops with a cache in them: the same tokens as without, or a refusal; never another distribution."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator

import pytest
import torch
from helpers.cached_models import HandedLM, SlotLM
from helpers.enumeration import chi_square_p_value, sequence_distribution
from helpers.model_parts import build, perturbed
from helpers.toys import TableLM
from torch import Tensor, nn
from torch._dynamo.utils import counters

pytest.importorskip("transformers", minversion="5")
from transformers import DynamicCache, StaticCache

from smc_compile import decode, explain
from smc_compile.errors import InputError, LoopError
from smc_compile.pairs.tiny_transformers import build as build_family

Sample = Callable[[Tensor], Tensor]
P, N = 5, 7
untraced = pytest.mark.usefixtures("untraced_regions")
OPTIONS = {"compiler": "eager", "n_particles": 4, "lookahead": 2, "seed": 0}


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    with warnings.catch_warnings():  # the library renames `past_key_values` from version to version
        warnings.simplefilter("ignore")
        yield


def prompt(batch: int = 2, length: int = P, vocab: int = 17) -> Tensor:
    return torch.randint(3, vocab, (batch, length), generator=torch.Generator().manual_seed(length))


def llama(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return build_family("llama", dtype=torch.float64, num_hidden_layers=1)


def slots(layers: int = 1, **sizes: int | float) -> nn.Module:
    return build(SlotLM, layers=layers, **sizes).double()


def handed(layers: int = 1, **sizes: int) -> nn.Module:
    return build(HandedLM, layers=layers, **sizes).double()


class Whole(nn.Module):
    """A model with a cache of its own as ``ids -> logits``, by its first call."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        result = self.model(ids)
        return result[0] if isinstance(self.model, HandedLM) else result.logits


# ---- how a token is taken from logits [B, T, V] --------------------------------------------------------------------


def greedy(logits: Tensor) -> Tensor:
    return logits[:, -1].argmax(-1, keepdim=True)


def drawn(logits: Tensor) -> Tensor:
    return torch.multinomial(torch.softmax(logits[:, -1] / 0.8, -1), 1)


# ---- loops ---------------------------------------------------------------------------------------------------------


def plain(model: nn.Module, ids: Tensor, n: int, sample: Sample = greedy) -> Tensor:
    for _ in range(n):
        out = model(ids)
        ids = torch.cat([ids, sample(getattr(out, "logits", out))], 1)
    return ids


def past_is_none(model: nn.Module, ids: Tensor, n: int, sample: Sample = greedy) -> Tensor:
    x, past = ids, None
    for _ in range(n):
        out = model(x, past_key_values=past, use_cache=True)
        past = out.past_key_values
        x = sample(out.logits)
        ids = torch.cat([ids, x], 1)
    return ids


def dynamic_cache(model: nn.Module, ids: Tensor, n: int, sample: Sample = greedy) -> Tensor:
    """Positions, a mask of ones; the first call stands before the loop, and so does its draw."""
    past, mask = DynamicCache(config=model.config), torch.ones_like(ids)
    places = torch.arange(ids.shape[1])
    x = sample(model(ids, past_key_values=past, attention_mask=mask, position_ids=places[None]).logits)
    ids = torch.cat([ids, x], 1)
    for _ in range(n - 1):
        mask = torch.cat([mask, torch.ones_like(x)], 1)
        places = torch.arange(past.get_seq_length(), past.get_seq_length() + 1)
        out = model(x, past_key_values=past, attention_mask=mask, position_ids=places[None])
        x = sample(out.logits)
        ids = torch.cat([ids, x], 1)
    return ids


def static_cache(model: nn.Module, ids: Tensor, n: int, sample: Sample = greedy) -> Tensor:
    past = StaticCache(config=model.config, max_cache_len=32)
    x, places = ids, torch.arange(ids.shape[1])
    for _ in range(n):
        out = model(x, past_key_values=past, use_cache=True, cache_position=places)
        x = sample(out.logits)
        ids = torch.cat([ids, x], 1)
        places = places[-1:] + 1
    return ids


def prefill(model: nn.Module, x: Tensor, input_pos: Tensor, sample: Sample) -> Tensor:
    return sample(model(x, input_pos))


def decode_one_token(model: nn.Module, x: Tensor, input_pos: Tensor, sample: Sample) -> Tensor:
    return sample(model(x, input_pos))


def registered_buffers(model: nn.Module, ids: Tensor, n: int, sample: Sample = greedy) -> Tensor:
    length = ids.shape[1]
    x = prefill(model, ids, torch.arange(length), sample)
    tokens, input_pos = [x], torch.tensor([length])
    for _ in range(n - 1):
        x = decode_one_token(model, x, input_pos, sample)
        input_pos += 1
        tokens.append(x.clone())
    return torch.cat([ids, *tokens], 1)


def handed_around(model: nn.Module, ids: Tensor, n: int, sample: Sample = greedy) -> Tensor:
    """The last call of the model is not needed: nothing is drawn from it."""
    logits, cache = model(ids, None)
    for _ in range(n):
        x = sample(logits)
        ids = torch.cat([ids, x], 1)
        logits, cache = model(x, cache)
    return ids


FORMS: dict[Callable, Callable[[], nn.Module]] = {
    past_is_none: llama,
    dynamic_cache: llama,
    static_cache: llama,
    registered_buffers: slots,
    handed_around: handed,
}
OWN = {registered_buffers: slots, handed_around: handed}


# ---- the same tokens -----------------------------------------------------------------------------------------------


@untraced
@pytest.mark.parametrize("loop", FORMS)
def test_greedy_is_the_loop_as_it_was_written(loop):
    """Models of two layers, so that each has a cache of its own to keep; elsewhere one layer is enough."""
    model, compiled = OWN[loop](layers=2) if loop in OWN else FORMS[loop](), decode(loop, compiler="eager")
    for ids, n in [(prompt(), N), (prompt(), 2)] if loop in OWN else [(prompt(), N)]:
        with torch.no_grad():
            assert torch.equal(compiled(model, ids, n), loop(model, ids, n))
    assert compiled.loop.cached is not None


@untraced
@pytest.mark.parametrize("loop", FORMS)
def test_so_it_is_by_the_backend(loop):
    """Dynamo traces the first call for one prompt length only; the second is told that lengths differ."""
    model, ids = FORMS[loop](), prompt()
    expected = loop(model, ids, 4)
    for dynamic in (None, True) if loop is registered_buffers else (loop is static_cache or None,):
        torch._dynamo.reset()
        compiled = torch.compile(loop, backend="smc", options={"compiler": "eager"}, dynamic=dynamic)
        assert torch.equal(compiled(model, ids, 4), expected)


@untraced
@pytest.mark.parametrize(
    ("loop", "method"),
    [(past_is_none, "smc"), (registered_buffers, "smc"), (handed_around, "autoregressive")],
)
def test_draws_are_those_of_the_loop_without_a_cache(loop, method):
    model = FORMS[loop]()

    def with_cache(model, ids, n):
        return loop(model, ids, n, drawn)

    def without(model, ids, n):
        return plain(model, ids, n, drawn)

    draft = TableLM(97 if loop not in OWN else 17).double()
    options = {**OPTIONS, "draft": draft, "method": method}
    compiled, reference = decode(with_cache, **options), decode(without, **options)
    whole = Unbuffered(model) if loop is registered_buffers else Whole(model)
    result = compiled(model, prompt(), N)
    assert torch.equal(result, reference(whole, prompt(), N))
    assert torch.allclose(compiled.last.log_weights, reference.last.log_weights, atol=1e-9)
    assert not torch.equal(result, compiled(model, prompt().flip(1), N))


class Unbuffered(nn.Module):
    """`SlotLM` on whole texts."""

    def __init__(self, model: SlotLM) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        model = self.model
        x = model.embed(ids) + model.place(torch.arange(ids.shape[1]))
        for norm, block in zip(model.norms, model.blocks, strict=True):
            q, k, v = (y.unflatten(-1, (block.heads, -1)).transpose(1, 2) for y in block.qkv(norm(x)).chunk(3, -1))
            y = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + block.out(y.transpose(1, 2).flatten(2))
        return model.head(x)


@untraced
@pytest.mark.parametrize("loop", OWN)
def test_the_distribution_is_the_models_own(loop):
    """Chi-square at level 1e-3, against full enumeration over four tokens."""
    batch, ids = 2**12, torch.tensor([[1, 3, 2]])
    model = slots(vocab=4, batch=batch, length=8) if loop is registered_buffers else handed(vocab=4)
    whole = Unbuffered(model) if loop is registered_buffers else Whole(model)

    def sampled(model, ids, n):
        return loop(model, ids, n, drawn)

    result = decode(sampled, compiler="eager", method="autoregressive", seed=3)(model, ids.expand(batch, -1), 3)
    distribution = sequence_distribution(whole, ids[0], 3, 4, temperature=0.8)
    assert chi_square_p_value(result[:, 3:], distribution) > 1e-3
    assert chi_square_p_value(result[:, 3:], sequence_distribution(whole, ids[0], 3, 4)) < 1e-4


@untraced
@pytest.mark.parametrize("loop", OWN)
def test_the_draft_may_be_called_in_the_same_way(loop):
    """A draft that is the target: all weights are one, so its cache is right too."""
    model = FORMS[loop]()

    def sampled(model, ids, n):
        return loop(model, ids, n, drawn)

    compiled = decode(sampled, **OPTIONS, draft=model if loop is registered_buffers else Required(model))
    compiled(model, prompt(), N)
    assert compiled.last.log_evidence.abs().max() < 1e-9
    if loop is registered_buffers:
        other = decode(sampled, **OPTIONS, draft=perturbed(model))
        other(model, prompt(), N)
        assert other.last.log_evidence.abs().max() > 1e-3


class Required(nn.Module):
    """The cache is an argument without a default."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor, cache: list | None) -> tuple[Tensor, list]:
        return self.model(ids, cache)


# ---- calls ---------------------------------------------------------------------------------------------------------


@torch.no_grad()  # in its own loop the model keeps its keys, and their gradients with them
@pytest.mark.parametrize("loop", OWN)
def test_other_lengths_and_prompts_are_not_traced_again(loop):
    model, compiled = FORMS[loop](), decode(loop, compiler="eager")
    compiled(model, prompt(), N)
    before = counters["stats"]["unique_graphs"]
    for ids, n in [(prompt(), 2), (prompt(), 11), (prompt(length=8), 4), (prompt(length=3), 6)]:
        assert torch.equal(compiled(model, ids, n), loop(model, ids, n))
    assert counters["stats"]["unique_graphs"] == before


@untraced
@pytest.mark.parametrize("loop", OWN)
def test_a_prompt_of_one_token(loop):
    model = FORMS[loop]()
    assert torch.equal(decode(loop, compiler="eager")(model, prompt(length=1), N), loop(model, prompt(length=1), N))


@untraced
def test_one_row():
    model, ids = slots(batch=1), prompt(1)
    assert torch.equal(decode(registered_buffers, compiler="eager")(model, ids, N), registered_buffers(model, ids, N))


@untraced
def test_a_token_drawn_before_the_loop_counts():
    def one_more(model, ids, n):
        return registered_buffers(model, ids, n + 1)

    model = slots()
    compiled = decode(one_more, compiler="eager")
    for n in (N, 1):
        assert torch.equal(compiled(model, prompt(), n), one_more(model, prompt(), n))


@untraced
@pytest.mark.parametrize("cache", [DynamicCache, StaticCache])
def test_a_cache_that_is_handed_in_is_left_as_it_was(cache):
    model = llama()

    def made_outside(model, ids, n, past):
        x = ids
        for _ in range(n):
            x = greedy(model(x, past_key_values=past).logits)
            ids = torch.cat([ids, x], 1)
        return ids

    def empty():
        return cache(config=model.config, **({"max_cache_len": 24} if cache is StaticCache else {}))

    compiled, past = decode(made_outside, compiler="eager"), empty()
    expected = made_outside(model, prompt(), N, empty())
    for _ in range(2):
        assert torch.equal(compiled(model, prompt(), N, past), expected)
        assert past.get_seq_length() == 0
    with torch.no_grad():
        made_outside(model, prompt(), N, past)
    with pytest.raises(LoopError, match="empty cache"):
        compiled(model, prompt(), N, past)


@untraced
def test_registered_buffers_are_left_as_they_were():
    model = slots()
    decode(registered_buffers, compiler="eager")(model, prompt(), N)
    assert not any(block.keys.any() or block.values.any() for block in model.blocks)


@untraced
@pytest.mark.parametrize(
    ("loop", "reported"),
    [
        (handed_around, "tensors handed from iteration to iteration"),
        (registered_buffers, "2 preallocated tensors of 24 positions"),
    ],
)
def test_the_report_tells_of_the_cache(loop, reported):
    lines = explain(loop, FORMS[loop](), prompt(), N, compiler="eager").sections["loop"]
    assert f"cache in the loop: {reported}, replaced by the compiler's own" in lines


# ---- refusals ------------------------------------------------------------------------------------------------------


def thrown_away(model, ids, n):
    x, cache = ids, None
    for i in range(n):
        logits, cache = model(x, None if i == n // 2 + 1 else cache)
        x = greedy(logits)
        ids = torch.cat([ids, x], 1)
    return ids


def cropped(model, ids, n):
    x, cache = ids, None
    for _ in range(n):
        logits, cache = model(x, cache)
        cache = [(k[:, :, -20:], v[:, :, -20:]) for k, v in cache]
        x = greedy(logits)
        ids = torch.cat([ids, x], 1)
    return ids


def another_temperature(model, ids, n):
    logits, cache = model(ids, None)
    x = torch.multinomial(torch.softmax(logits[:, -1], -1), 1)
    ids = torch.cat([ids, x], 1)
    for _ in range(n - 1):
        logits, cache = model(x, cache)
        x = drawn(logits)
        ids = torch.cat([ids, x], 1)
    return ids


def greedy_at_first(model, ids, n):
    logits, cache = model(ids, None)
    x = greedy(logits)
    ids = torch.cat([ids, x], 1)
    for _ in range(n - 1):
        logits, cache = model(x, cache)
        x = drawn(logits)
        ids = torch.cat([ids, x], 1)
    return ids


def in_parts(model, ids, n):
    _, cache = model(ids[:, :-1], None)
    x = ids[:, -1:]
    for _ in range(n):
        logits, cache = model(x, cache)
        x = greedy(logits)
        ids = torch.cat([ids, x], 1)
    return ids


def returned(model, ids, n):
    x, cache = ids, None
    for _ in range(n):
        logits, cache = model(x, cache)
        x = greedy(logits)
        ids = torch.cat([ids, x], 1)
    return ids, cache[0][0]


def stays_at_one_position(model, ids, n):
    length = ids.shape[1]
    x = greedy(model(ids, torch.arange(length)))
    for _ in range(n - 1):
        ids = torch.cat([ids, x], 1)
        x = greedy(model(x, torch.tensor([length])))
    return torch.cat([ids, x], 1)


REFUSED = {
    thrown_away: (handed, "does not compute what the model computes on all tokens so far"),
    another_temperature: (handed, "does not compute what the model computes on all tokens so far"),
    greedy_at_first: (handed, "do not draw their tokens alike"),
    in_parts: (handed, "reads tokens other than as the whole sequence"),
    returned: (handed, "Only tokens can be returned"),
    stays_at_one_position: (slots, "does not compute what the model computes on all tokens so far"),
}


@untraced
@pytest.mark.parametrize("loop", REFUSED)
def test_what_is_refused(loop):
    make, reason = REFUSED[loop]
    with pytest.raises(LoopError, match=reason):
        decode(loop, **OPTIONS, draft=TableLM(17).double())(make(), prompt(), N)


@untraced
def test_a_loop_with_a_cache_may_end_its_texts():
    """Rows that have ended are filled up, and the loop ends with the last of them; a cache goes on meanwhile."""

    def filled(model, ids, n, eos):
        x, cache, ended = ids, None, torch.zeros(ids.shape[0], 1, dtype=torch.bool)
        for _ in range(n):
            logits, cache = model(x, cache)
            x = torch.where(ended, 2, greedy(logits))
            ended = ended | (x == eos)
            ids = torch.cat([ids, x], 1)
            if ended.all():
                break
        return ids

    def stops(model, ids, n, eos):
        x, past = ids, None
        for _ in range(n):
            out = model(x, past_key_values=past, use_cache=True)
            past, x = out.past_key_values, greedy(out.logits)
            if x.item() == eos:
                break
            ids = torch.cat([ids, x], dim=-1)
        return ids

    for loop, model, ids in ((filled, handed(), prompt()), (stops, llama(), prompt(1))):
        compiled = decode(loop, compiler="eager")
        with torch.no_grad():
            text = plain(model if loop is stops else Whole(model), ids, N)
            for eos in (int(text[0, P + 2]), 99):
                assert torch.equal(compiled(model, ids, N, eos), loop(model, ids, N, eos))
        assert compiled.loop.cached is not None


@untraced
def test_a_loop_is_compared_though_its_step_is_known():
    """`thrown_away` has the step of `handed_around`, whose program is kept."""
    model = handed()
    decode(handed_around, compiler="eager")(model, prompt(), N)
    with pytest.raises(LoopError, match="does not compute what the model computes"):
        decode(thrown_away, compiler="eager")(model, prompt(), N)


def test_a_model_that_depends_on_how_the_text_is_cut():
    with pytest.raises(LoopError, match="does not compute what the model computes"):
        decode(registered_buffers, compiler="eager")(Cut(slots(leak=0.1)), prompt(), N)


class Cut(nn.Module):
    """Its logits favour other tokens in a call of one token."""

    def __init__(self, model: SlotLM) -> None:
        super().__init__()
        self.model = model
        self.bias = nn.Parameter(torch.linspace(-1, 1, model.vocab).double())

    def forward(self, ids: Tensor, positions: Tensor) -> Tensor:
        return self.model(ids, positions) + self.bias * (ids.shape[1] == 1)


def test_the_cache_of_another_model():
    mine, other = handed(), build(HandedLM, 1, layers=1).double()

    def crossed(model, ids, n):
        logits, _ = model(ids, None)
        _, cache = other(ids, None)
        for _ in range(n):
            x = greedy(logits)
            ids = torch.cat([ids, x], 1)
            logits, cache = model(x, cache)
        return ids

    with pytest.raises(LoopError, match="does not compute what the model computes"):
        decode(crossed, compiler="eager")(mine, prompt(), N)


def test_a_keyword_that_the_model_does_not_take():
    def unknown(model, ids, n):
        x, cache = ids, None
        for _ in range(n):
            logits, cache = model(x, cache, input_pos=None)
            x = greedy(logits)
            ids = torch.cat([ids, x], 1)
        return ids

    with pytest.raises(LoopError, match="input_pos"):
        decode(unknown, compiler="eager")(handed(), prompt(), N)


def test_a_mask_from_outside():
    def masked(model, ids, n, mask):
        x, past = ids, None
        for _ in range(n):
            out = model(x, past_key_values=past, attention_mask=mask, use_cache=True)
            past, x = out.past_key_values, greedy(out.logits)
            ids, mask = torch.cat([ids, x], 1), torch.cat([mask, torch.ones_like(x)], 1)
        return ids

    with pytest.raises(LoopError, match="ones_like"):
        decode(masked, compiler="eager")(llama(), prompt(), N, torch.ones_like(prompt()))


@untraced
@torch.no_grad()
def test_more_tokens_than_the_cache_has_room_for():
    model, compiled = slots(), decode(registered_buffers, compiler="eager")
    assert torch.equal(compiled(model, prompt(), 20), registered_buffers(model, prompt(), 20))
    with pytest.raises(InputError, match="maximum positions"):
        compiled(model, prompt(), 21)


def cropped_by_a_branch(model: nn.Module, ids: Tensor, n: int) -> Tensor:
    x, cache = ids, None
    for _ in range(n):
        logits, cache = model(x, cache)
        if cache[0][0].shape[2] > 20:
            cache = [(k[:, :, -4:], v[:, :, -4:]) for k, v in cache]
        x = greedy(logits)
        ids = torch.cat([ids, x], 1)
    return ids


@untraced
@torch.no_grad()
@pytest.mark.parametrize("loop", [cropped, cropped_by_a_branch])
def test_a_loop_that_takes_another_path_when_the_text_is_long(loop):
    """Three iterations after five tokens do not show it, but Dynamo had to look at the length."""
    model, compiled = handed(), decode(loop, compiler="eager")
    assert torch.equal(compiled(model, prompt(), N), loop(model, prompt(), N))
    with pytest.raises(InputError, match="takes another path"):
        compiled(model, prompt(), 20)
    with pytest.raises(LoopError, match="does not compute what the model computes"):
        compiled(model, prompt(length=22), N)


def test_the_backend_refuses_a_cache_made_outside():
    def made_outside(model, ids, n, past):
        x = ids
        for _ in range(n):
            x = greedy(model(x, past_key_values=past).logits)
            ids = torch.cat([ids, x], 1)
        return ids

    model = llama()
    compiled = torch.compile(made_outside, backend="smc", options={"compiler": "eager"}, dynamic=True)
    with pytest.raises(LoopError, match=r"@smc_compile\.decode"):
        compiled(model, prompt(), 3, DynamicCache(config=model.config))
