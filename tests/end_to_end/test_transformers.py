"""Decoders of the transformers library compile through the same passes as any model: tiny ones, random weights."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from functools import lru_cache

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers", minversion="5")

import smc_compile
from smc_compile.bench.family_trials import families, windows
from smc_compile.commands.models import COMMON
from smc_compile.pairs.tiny_transformers import Float64Throughout, LastLogits64, build
from smc_compile.passes.closeness import TOLERANCE, relative_error
from smc_compile.passes.pipeline import Traced, trace_model
from smc_compile.passes.validate import replay
from smc_compile.program.model import LastLogits
from smc_compile.program.model_calls import logits_of, traceable

FAMILIES = COMMON.split()
EAGER = FAMILIES[::3]
VOCAB = 97
SIZES = {"xmod": {"languages": ["en_XX", "de_DE"]}}
CHOICES = {"doge": "keep_window_size"}  # what says how many keys a query chooses, elsewhere index_topk


@lru_cache
def traced(family: str, attention: str | None = None) -> tuple[nn.Module, Traced]:
    """A model in float64 and what was found in it: the dearest step of these tests, taken once for each family."""
    model = build(family, attention, **SIZES.get(family, {}))
    ids = torch.zeros(2, 2, dtype=torch.int64)
    return model, trace_model(LastLogits64(model), ids, (), check=True, sampled=False)


def tokens(*sizes: int) -> Tensor:
    return torch.randint(3, VOCAB, sizes, generator=torch.Generator().manual_seed(len(sizes) + sizes[-1]))


# ---- the cached form -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_the_cached_form_is_the_model(family: str) -> None:
    _, found = traced(family)
    assert found.error is not None
    assert found.error < 1e-9
    assert len(found.cached.sites) >= 2


@pytest.mark.parametrize("family", EAGER)
def test_so_is_it_with_attention_written_out(family: str) -> None:
    model = build(family, "eager")
    assert model.config._attn_implementation == "eager"
    _, found = traced(family, "eager")
    assert found.error is not None
    assert found.error < 1e-9
    assert set(found.cached.attention) == {"score", "mix"}


@pytest.mark.parametrize("family", ["deepseek_v32", "axk2", "glm_moe_dsa", "hy_v4", "doge"])
def test_queries_that_choose_few_of_their_keys(family: str) -> None:
    """Four keys of up to fourteen, against the model's own forward; with all of them the logits are others.

    No token comes twice: where keys tie, topk takes any of them, and a layer without positions scores tokens alone.
    """
    model, found = traced(family)
    assert found.error is not None
    assert found.error < 1e-9
    ids = torch.randperm(VOCAB - 3, generator=torch.Generator().manual_seed(0))[:28].view(2, 14) + 3
    dense = build(family, **{CHOICES.get(family, "index_topk"): 64})
    with torch.no_grad(), Float64Throughout(), traceable(model), traceable(dense):
        actual, at = replay(found.cached, ids, found.owned(), 6, [4, 1, 3])
        expected, of_all = logits_of(model, ids), logits_of(dense, ids)
    assert relative_error(actual, expected.gather(1, at[..., None].expand(-1, -1, VOCAB))) < 1e-9
    assert relative_error(of_all[:, :4], expected[:, :4]) < 1e-9
    assert relative_error(of_all[:, -1], expected[:, -1]) > 0.01


# xmod: an adapter for each language, on the rows in that language; mpt: a bias counted from the last key
@pytest.mark.parametrize("family", ["xmod", "mpt"])
def test_families_written_in_ways_of_their_own(family: str) -> None:
    (model, found), ids = traced(family), tokens(2, 14)
    with torch.no_grad(), Float64Throughout(), traceable(model):
        actual, at = replay(found.cached, ids, found.owned(), 6, [4, 1, 3])
        expected = logits_of(model, ids).gather(1, at[..., None].expand(-1, -1, VOCAB))
    assert relative_error(actual, expected) < 1e-9


@pytest.mark.parametrize("family", FAMILIES)
def test_particles_share_a_prompt(family: str) -> None:
    """Three rows on one prompt, fifteen positions beyond every window, against the model's own forward."""
    model, found = traced(family)
    cached, weights = found.cached, found.owned()
    prompt, ours = tokens(1, 4), tokens(3, 15)
    with torch.no_grad():
        _, *shared = cached.prefill(prompt, *weights)
        own = [x.new_zeros(3, x.shape[1], 15, x.shape[3]) for x in shared]
        tables, rows = cached.tables(4 + 15 + 1, *weights), []
        keys = torch.arange(4 + 15)[None]
        for slots in torch.arange(15).split([4, 1, 10]):
            args = (slots[None] + 4, slots[None], keys, *shared, *own, *tables, *weights)
            rows.append(cached.score(ours[:, slots], *args))
        whole = torch.cat([prompt.expand(3, -1), ours], 1)
        with Float64Throughout(), traceable(model):
            expected = logits_of(model, whole)[:, 4:]
    actual = torch.cat([row.view(3, -1, VOCAB) for row in rows], 1)
    assert relative_error(actual, expected) < 1e-9


WINDOWS = {
    "deepseek_v32": [],
    "mistral": [6],
    "gemma2": [6],
    "gemma3_text": [6],
    "gpt_oss": [6],
    "gpt_neo": [6],
    "llama": [],
    "opt": [],
}


@pytest.mark.parametrize(("family", "sizes"), WINDOWS.items(), ids=WINDOWS)
def test_windows_are_found_in_the_masks(family: str, sizes: list[int]) -> None:
    assert windows(traced(family)[1]) == sizes


ALIKE = ("llama", "qwen3_moe", "bloom")  # all layers are, so that one is enough


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "qwen3_moe", "bloom", "gpt_oss"])
def test_parameters_in_half_precision(family: str, dtype: torch.dtype) -> None:
    """The cached form is as near to the model in float64 as the model in half precision is: within twice its error
    (the sums run in another order), and 0.02 of the spread of the logits; and within the tolerance of compilation."""
    layers = {"num_hidden_layers": 1} if family in ALIKE else {}
    model = build(family, dtype=dtype, **layers)
    found = trace_model(LastLogits(model), torch.zeros(2, 2, dtype=torch.int64), (), check=True, sampled=False)
    assert found.error is not None
    assert found.error <= TOLERANCE[dtype]
    ids = tokens(2, 12)
    exact = copy.deepcopy(model).double()
    with torch.no_grad(), traceable(model), traceable(exact):
        with Float64Throughout():
            expected = logits_of(exact, ids)
        plain = logits_of(model, ids)
        actual, at = replay(found.cached, ids, found.owned(), 4, (3, 1, 4))
        expected, plain = (standing(rows, at) for rows in (expected, plain))
    mine, theirs = relative_error(actual, expected), relative_error(plain, expected)
    print(f"{family} {dtype}: cached {mine:.1e}, model {theirs:.1e}, between them {relative_error(actual, plain):.1e}")
    assert actual.dtype == plain.dtype
    assert mine <= 2 * theirs + 0.02


def test_positions_that_count_what_is_no_padding() -> None:
    """The padding token in the middle of a text takes no position; the library's own cache would give it one."""
    model, found = traced("roberta")
    ids = tokens(2, 14)
    ids[0, [2, 6, 7, 12]] = ids[1, [0, 9]] = model.config.pad_token_id
    with torch.no_grad(), Float64Throughout(), traceable(model):
        expected = logits_of(model, ids)
        actual, at = replay(found.cached, ids, found.owned(), 5, (3, 1, 5))
    assert relative_error(actual, standing(expected, at)) < 1e-9


def standing(rows: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
    """Rows [B, S, V] at positions [B, n] -> [B, n, V]."""
    return rows.gather(1, at[..., None].expand(-1, -1, rows.shape[-1]))


# ---- generation ------------------------------------------------------------------------------------------------------


IN_FLOAT32 = ("gpt_oss", "mixtral", "qwen3_moe", "mpt")


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("family", [*FAMILIES, "mpt"])
def test_greedy_tokens_are_those_of_the_library(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch of two prompts, the first two tokens shorter: padding stands in front.

    The trace is that of the tests above, in float64 throughout, but for families that are traced in float32 here.
    """
    ids, widened = tokens(2, 5), family not in IN_FLOAT32
    if widened:
        model, found = traced(family)
        monkeypatch.setattr("smc_compile.program.model.trace_model", lambda *_, **__: found)
    else:
        model = build(family, dtype=torch.float32)
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    mine = smc_compile.generate(
        model, None, ids, attention_mask=mask, max_new_tokens=12, temperature=0, validate=False, compiler="eager"
    )
    with Float64Throughout() if widened else nullcontext():
        theirs = model.generate(
            ids, attention_mask=mask, max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0
        )
    assert torch.equal(mine.sequences, theirs)


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("family", ["llama", "gemma2", "bloom"])
def test_so_are_greedy_tokens_with_a_draft(family: str) -> None:
    """Blocks of drafted tokens behind padded prompts. The model drafts for itself, so both are traced at once."""
    model, ids = build(family, dtype=torch.float32), tokens(2, 5)
    given = {"attention_mask": torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]]), "max_new_tokens": 12}
    options = {"temperature": 0, "lookahead": 3, "validate": False, "compiler": "eager"}
    mine = smc_compile.generate(model, model, ids, **given, **options)
    assert mine.stats.method == "speculative"
    assert mine.stats.cycles < 11
    theirs = model.generate(ids, do_sample=False, eos_token_id=None, pad_token_id=0, **given)
    assert torch.equal(mine.sequences, theirs)


@pytest.mark.usefixtures("interpreted")
def test_target_and_draft_may_be_of_different_families() -> None:
    target, draft = (build(name, dtype=torch.float32, num_hidden_layers=1) for name in ("llama", "gpt2"))
    answer = smc_compile.generate(
        target, draft, tokens(1, 5), max_new_tokens=5, n_particles=2, lookahead=2, seed=0, compiler="eager"
    )
    assert answer.sequences.shape == (1, 10)
    assert answer.ess.isfinite().all()


@pytest.mark.usefixtures("untraced_regions")
def test_a_loop_that_unwraps_the_logits_itself() -> None:
    """The library makes a cache by default; what the loop computes does not depend on it."""
    model = build("llama", dtype=torch.float32, num_hidden_layers=1)

    @smc_compile.decode(compiler="eager")
    def decode(model, ids, n):
        for _ in range(n):
            ids = torch.cat([ids, model(ids).logits[:, -1].argmax(-1, keepdim=True)], 1)
        return ids

    ids = tokens(1, 5)
    expected = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    assert torch.equal(decode(model, ids, 6), expected)
    assert model.config.use_cache is True


# ---- what is not compiled --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "op"), [("mamba", "conv1d"), ("rwkv", "pad"), ("bert", "scaled_dot_product_attention")]
)
def test_models_that_mix_positions_otherwise_are_refused_by_name(family: str, op: str) -> None:
    model = build(family, **({"is_decoder": False} if family == "bert" else {}))
    with pytest.raises(smc_compile.errors.CacheError, match=op):
        trace_model(LastLogits(model), torch.zeros(2, 2, dtype=torch.int64), (), check=True, sampled=False)


def test_the_families_are_the_library_own() -> None:
    assert set(FAMILIES) < set(families())


def test_tracing_leaves_the_model_as_it_was() -> None:
    model = build("qwen3_moe", dtype=torch.float32)
    before = (model.config.use_cache, model.get_experts_implementation())
    ids = tokens(1, 7)
    expected = logits_of(model, ids)
    found = trace_model(LastLogits(model), torch.zeros(2, 2, dtype=torch.int64), (), check=False, sampled=False)
    assert (model.config.use_cache, model.get_experts_implementation()) == before
    with torch.no_grad():
        actual, at = replay(found.cached, ids, found.owned(), 4, (2, 1))
    assert at.tolist() == [[3, 4, 5, 6]]
    assert relative_error(actual, expected[:, 3:]) < 1e-4
