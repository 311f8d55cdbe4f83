"""Forms of models, samplers and masks in loops: what compiles is what the loop computes, all else is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from helpers.enumeration import chi_square_p_value, sequence_distribution
from helpers.toys import TableLM, TinyTransformerLM
from torch import Tensor, nn

from smc_compile import decode, generate
from smc_compile.errors import InputError, LoopError, SMCError

pytestmark = pytest.mark.usefixtures("fresh_dynamo", "untraced_regions")
V, N = 7, 6
MODEL = TinyTransformerLM(V).double()
IDS = torch.tensor([[0, 1, 2], [3, 4, 1]])
QUICK: dict[str, Any] = {"compiler": "eager"}


def assert_compiled_as_written(loop: Callable[..., Tensor], *args: Any, **options: Any) -> None:
    with torch.no_grad():
        expected = loop(*args)
    assert torch.equal(decode(loop, **QUICK, **options)(*args), expected)


# ---- a head on the last position, and what holds the logits ----------------------------------------------------------

LAST = {
    "nanoGPT": lambda x: x[:, [-1], :],
    "slice": lambda x: x[:, -1:, :],
    "tensor": lambda x: x[:, torch.tensor([-1])],
    "index_select": lambda x: x.index_select(1, torch.tensor([x.shape[1] - 1])),
    "narrow": lambda x: x.narrow(1, x.shape[1] - 1, 1),
    "unsqueeze": lambda x: x[:, -1].unsqueeze(1),
    "all": lambda x: x,
}
HOLDERS = {
    "(logits, loss)": lambda logits: (logits, None),
    "[logits, ...]": lambda logits: [logits, [logits.new_zeros(2, 1, 3, 4)]],
    "dictionary": lambda logits: {"loss": None, "logits": logits},
    "logits": lambda logits: logits,
}


class NanoGPT(nn.Module):
    """In our own code: the targets are optional, and without them the head runs for the last position."""

    def __init__(self, last: str = "nanoGPT", holder: str = "(logits, loss)", vocab: int = V) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.embed, self.place = nn.Embedding(vocab, 8), nn.Embedding(32, 8)
        self.qkv, self.head = nn.Linear(8, 24), nn.Linear(8, vocab, bias=False)
        self.last, self.holder = LAST[last], HOLDERS[holder]
        self.double()

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> Any:
        x = self.embed(idx) + self.place(torch.arange(idx.shape[1], device=idx.device))
        q, k, v = self.qkv(x)[:, None].chunk(3, -1)
        x = x + F.scaled_dot_product_attention(q, k, v, is_causal=True)[:, 0]
        if targets is not None:
            logits = self.head(x)
            return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        return self.holder(self.head(self.last(x)))


def by_first(model: nn.Module, ids: Tensor, n: int) -> Tensor:
    for _ in range(n):
        result = model(ids)
        logits = result["logits"] if isinstance(result, dict) else result if isinstance(result, Tensor) else result[0]
        ids = torch.cat((ids, logits[:, -1, :].argmax(-1, keepdim=True)), dim=1)
    return ids


@pytest.mark.parametrize("last", LAST)
def test_a_head_on_the_last_position(last):
    assert_compiled_as_written(by_first, NanoGPT(last), IDS, N)


@pytest.mark.parametrize("holder", HOLDERS)
def test_as_target_of_generate_and_as_draft(holder):
    model = NanoGPT(holder=holder)
    expected = by_first(model, IDS, N)
    assert torch.equal(generate(model, input_ids=IDS, max_new_tokens=N, temperature=0, **QUICK).sequences, expected)
    compiled = decode(by_first, draft=model, n_particles=1, lookahead=3, **QUICK)
    assert torch.equal(compiled(model, IDS, N), expected)
    assert compiled.last.stats.accepted == 2, (
        "3 and 1 of 2 cycles: the draft is the target: it is accepted as far as it goes"
    )
    drawn = generate(NanoGPT("all"), model, IDS, max_new_tokens=N, n_particles=4, lookahead=2, seed=0, **QUICK)
    assert torch.equal(drawn.log_weights, torch.zeros_like(drawn.log_weights)) or drawn.log_weights.abs().max() < 1e-9


def test_several_tensors_that_could_be_logits_are_refused():
    class Both(nn.Module):
        def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
            hidden = MODEL(ids)
            return hidden * 2, hidden

    with pytest.raises(InputError, match="several tensors"):
        generate(Both(), input_ids=IDS, max_new_tokens=2, temperature=0, **QUICK)


# ---- one text [S] without an axis of requests ------------------------------------------------------------------------


def squeezed(model, ids, n):
    for _ in range(n):
        ids = torch.cat((ids, model(ids[None])[0, -1].argmax(-1, keepdim=True)))
    return ids


def argmax_of_all(model, ids, n):
    for _ in range(n):
        ids = torch.cat((ids, model(ids.unsqueeze(0))[0, -1].argmax().view(1)), dim=0)
    return ids


def viewed(model, ids, n):
    for _ in range(n):
        logits = model(ids.view(1, -1))
        ids = torch.cat((ids, torch.softmax(logits[0][-1] / 0.7, 0).topk(1).indices))
    return ids


def litgpt(model, idx, n):
    """In our own code: a buffer, and a token that ends it."""
    length = idx.size(0)
    buffer = torch.empty(length + n, dtype=idx.dtype)
    buffer[:length] = idx
    for i in range(length, length + n):
        logits = model(buffer[:i].view(1, -1))[0, -1]
        buffer[i] = torch.argmax(logits, dim=-1)
        if buffer[i] == 5:
            return buffer[: i + 1]
    return buffer


@pytest.mark.parametrize("loop", [squeezed, argmax_of_all, viewed, litgpt])
def test_a_text_without_an_axis_of_requests(loop):
    assert_compiled_as_written(loop, MODEL, IDS[0], N)
    assert_compiled_as_written(
        loop, MODEL, IDS[0], N, draft=TinyTransformerLM(V, seed=1).double(), lookahead=2, n_particles=2
    )


def top_two(logits: Tensor) -> Tensor:
    """Of one row [V], as litgpt draws."""
    values, _ = torch.topk(logits, 2)
    probs = torch.softmax(torch.where(logits < values[-1], -float("inf"), logits) / 0.8, dim=0)
    return torch.multinomial(probs, num_samples=1)


def race(logits: Tensor) -> Tensor:
    probs = torch.softmax(logits, -1)
    return torch.argmax(probs / torch.empty_like(probs).exponential_(1), dim=-1, keepdim=True).to(torch.int64)


@pytest.mark.parametrize("sample", [top_two, race])
@pytest.mark.parametrize("method", ["smc", "autoregressive"])
def test_the_distribution_of_a_sampler_of_one_row(sample, method):
    """Chi-square at level 1e-4 over two tokens of three; particles of runs whose weights are all one."""
    model = TableLM(3, seed=5)

    def loop(model, ids, n):
        for _ in range(n):
            ids = torch.cat((ids, sample(model(ids[None])[0, -1])))
        return ids

    def kept(logits: Tensor) -> Tensor:
        least = logits.topk(2).values[..., -1:]
        return logits.masked_fill(logits < least, -float("inf")) / 0.8 if sample is top_two else logits

    options = {"draft": model, "n_particles": 1, "lookahead": 1} if method == "smc" else {}
    compiled = decode(loop, method=method, **QUICK, **options)
    torch.manual_seed(1)
    texts = torch.stack([compiled(model, torch.tensor([0, 1]), 2)[2:] for _ in range(300)])
    if method == "autoregressive" or sample is race:
        distribution = sequence_distribution(model, torch.tensor([1]), 2, 3, process=kept)
        assert chi_square_p_value(texts, distribution) > 1e-4
    assert torch.isfinite(kept(model(texts[:, :1]))[:, -1].gather(-1, texts[:, 1:])).all()


# ---- samplers -------------------------------------------------------------------------------------------------------


def loop_of(sample: Callable[[Tensor, Tensor], Tensor]) -> Callable[[nn.Module, Tensor, int], Tensor]:
    def loop(model, ids, n):
        for _ in range(n):
            ids = torch.cat([ids, sample(ids, model(ids)[:, -1])], 1)
        return ids

    return loop


def by_accident(ids: Tensor, logits: Tensor) -> Tensor:
    values, _ = torch.topk(logits, 2)
    logits[logits < values[:, -1]] = -float("inf")
    return logits.argmax(-1, keepdim=True)


def by_accident_in_a_copy(ids: Tensor, logits: Tensor) -> Tensor:
    logits = torch.where(logits < torch.topk(logits, 2).values[..., -1], -1e9, logits)
    return torch.multinomial(torch.softmax(logits, -1), 1)


@pytest.mark.parametrize("sample", [by_accident, by_accident_in_a_copy])
def test_a_threshold_without_its_axis_is_refused_with_the_right_advice(sample):
    """With one row it broadcasts by accident."""
    with pytest.raises(LoopError, match=r"loses the axis of the requests[\s\S]*values\[:, -1:\]"):
        decode(loop_of(sample), method="autoregressive", **QUICK)(MODEL, IDS[:1], N)


def repetition_penalty(ids: Tensor, logits: Tensor) -> Tensor:
    score = torch.gather(logits, 1, ids)
    logits.scatter_(1, ids, torch.where(score < 0, score * 1.5, score / 1.5))
    return logits.argmax(-1, keepdim=True)


def frequency_penalty(ids: Tensor, logits: Tensor) -> Tensor:
    counts = F.one_hot(ids, V).sum(1)
    return (logits - 0.5 * counts - 0.2 * (counts > 0)).argmax(-1, keepdim=True)


def counted_by_scatter(ids: Tensor, logits: Tensor) -> Tensor:
    counts = torch.zeros_like(logits).scatter_add_(1, ids, torch.ones_like(ids, dtype=logits.dtype))
    return (logits - 0.5 * counts).argmax(-1, keepdim=True)


def counted_by_bins(ids: Tensor, logits: Tensor) -> Tensor:
    return (logits - 0.5 * torch.bincount(ids[0], minlength=V)).argmax(-1, keepdim=True)


def banned_by_index(ids: Tensor, logits: Tensor) -> Tensor:
    logits[0, ids[0]] -= 0.7
    return logits.argmax(-1, keepdim=True)


@pytest.mark.parametrize(
    "sample", [repetition_penalty, frequency_penalty, counted_by_scatter, counted_by_bins, banned_by_index]
)
def test_a_sampler_that_reads_the_text_compiles(sample):
    ids = IDS if sample not in (counted_by_bins, banned_by_index) else IDS[:1]
    assert_compiled_as_written(loop_of(sample), MODEL, ids, N)


def test_a_penalty_over_numbers_is_refused_by_name():
    def penalised(ids: Tensor, logits: Tensor) -> Tensor:
        for token in set(ids[0].tolist()):
            logits[0, token] /= 1.5
        return logits.argmax(-1, keepdim=True)

    with pytest.raises(LoopError, match="logits_processor"):
        decode(loop_of(penalised), **QUICK)(MODEL, IDS[:1], N)


def test_processors_of_transformers_that_are_tensor_code_compile_and_others_are_refused():
    library = pytest.importorskip("transformers", minversion="5")
    warpers = library.LogitsProcessorList([library.TemperatureLogitsWarper(0.7), library.TopKLogitsWarper(3)])
    repeated = library.RepetitionPenaltyLogitsProcessor(1.5)

    def processed(processor):
        return loop_of(lambda ids, logits: processor(ids, logits).argmax(-1, keepdim=True))

    assert_compiled_as_written(processed(warpers), MODEL, IDS, N)
    assert_compiled_as_written(processed(library.LogitsProcessorList([repeated, *warpers])), MODEL, IDS, N)
    with pytest.raises(SMCError, match="logits_processor"):
        decode(processed(library.NoRepeatNGramLogitsProcessor(2)), **QUICK)(MODEL, IDS, N)


# ---- masks and positions --------------------------------------------------------------------------------------------


class Rows(NamedTuple):
    logits: Tensor


class Masked(nn.Module):
    """Called as decoders of transformers are: with a mask [B, S] of the tokens, and with their positions or without."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = TinyTransformerLM(V).double()
        self.place = nn.Parameter(torch.randn(32, V, generator=torch.Generator().manual_seed(0)).double())

    def forward(self, ids: Tensor, attention_mask: Tensor, position_ids: Tensor | None = None) -> Rows:
        seen = attention_mask.to(torch.float64).cumsum(-1)[..., None]  # [B, S, 1]
        logits = self.inner(ids) / seen
        return Rows(logits if position_ids is None else logits + self.place[position_ids])


MASKED = Masked()


def mask_grown(model, ids, n):
    mask = torch.ones_like(ids)
    for _ in range(n):
        token = model(ids, attention_mask=mask).logits[:, -1].argmax(-1, keepdim=True)
        ids = torch.cat([ids, token], 1)
        mask = torch.cat([mask, mask.new_ones((mask.shape[0], 1))], dim=-1)
    return ids


def mask_given(model, ids, n, mask):
    for _ in range(n):
        places = mask.cumsum(-1) - 1
        places.masked_fill_(mask == 0, 1)
        token = model(ids, attention_mask=mask, position_ids=places).logits[:, -1].argmax(-1, keepdim=True)
        ids, mask = torch.cat([ids, token], 1), torch.cat([mask, torch.ones_like(token)], 1)
    return ids


def test_a_mask_that_grows():
    assert_compiled_as_written(mask_grown, MASKED, IDS, N)


def test_a_mask_that_is_given_must_show_all_tokens():
    ids, ones = IDS, torch.ones_like(IDS)
    compiled = decode(mask_given, **QUICK)
    with torch.no_grad():
        assert torch.equal(compiled(MASKED, ids, N, ones), mask_given(MASKED, ids, N, ones))
    padded = ones.clone()
    padded[1, 0] = 0
    for function in (compiled, decode(mask_given, **QUICK)):
        with pytest.raises(LoopError, match=r"mask of the decode loop hides tokens[\s\S]*attention_mask=mask"):
            function(MASKED, ids, N, padded)


def test_a_prompt_of_ones_is_no_mask():
    ids = torch.ones_like(IDS)
    assert_compiled_as_written(by_first, TableLM(V).double(), ids, N)


def test_autocast_that_is_off_changes_nothing_and_one_that_is_on_is_refused():
    def cast(model, ids, n, enabled):
        for _ in range(n):
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
                logits = model(ids)
            ids = torch.cat([ids, logits[:, -1].argmax(-1, keepdim=True)], 1)
        return ids

    assert_compiled_as_written(cast, MODEL, IDS, N, False)
    with pytest.raises(LoopError, match="switches autocast on"):
        decode(cast, **QUICK)(TinyTransformerLM(V), IDS, N, True)


def test_a_loop_that_is_refused_leaves_autocast_as_it_was():
    def narrow(model, ids, n):
        for _ in range(n):
            with torch.autocast("cpu", torch.bfloat16):
                logits = model(ids)[:, -1]
            ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], 1)
        return ids

    with pytest.raises(LoopError, match="autocast"):
        decode(narrow, compiler="eager", method="autoregressive")(TableLM(5), torch.tensor([[1, 2, 3]]), 3)
    assert not torch.is_autocast_enabled("cpu")
