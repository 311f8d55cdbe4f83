"""The incremental form computes what the original model does, however the sequence is cut into prompt and blocks."""

from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F
from helpers.model_parts import build
from helpers.models import CACHEABLE
from helpers.toys import TableLM
from helpers.traces import Last, export, export_then, model, op_names, rows_of, tokens, traced
from torch import Tensor, nn

from smc_compile.errors import CacheError
from smc_compile.passes.cache.synthesize import synthesize_cache
from smc_compile.passes.closeness import TOLERANCE, relative_error
from smc_compile.passes.pipeline import capture
from smc_compile.passes.validate import check_prefix_tables, replay

VOCAB = 17
every_model = pytest.mark.parametrize("name", CACHEABLE)


def error(name: str, ids: Tensor, prompt: int, blocks: list[int], dtype=torch.float64, batch: int = 2) -> float:
    """Of the cached form, traced at ``batch``, against the model itself on the whole sequence."""
    _, cached, owned = traced(name, dtype, batch)
    with torch.no_grad():
        actual, at = replay(cached, ids, owned(), prompt, blocks)
        assert at[0].tolist() == list(range(prompt - 1, ids.shape[1]))
        return relative_error(actual, standing(model(name, dtype)(ids), at))


def standing(rows: Tensor, at: Tensor) -> Tensor:
    """Rows [B, S, V] at positions [B, n] -> [B, n, V]."""
    return rows.gather(1, at[..., None].expand(-1, -1, rows.shape[-1]))


# ---- cached against uncached -----------------------------------------------------------------------------------------

CUTS = {
    "a prompt of one token": (1, [1, 2, 3]),
    "one long block": (3, [20]),
    "one token at a time, beyond every window": (2, [1] * 12),
    "a long prompt": (21, [2, 1]),
}


@pytest.mark.parametrize(("prompt", "blocks"), CUTS.values(), ids=CUTS)
@every_model
def test_cached_equals_uncached(name: str, prompt: int, blocks: list[int]) -> None:
    assert error(name, tokens(2, prompt + sum(blocks), VOCAB), prompt, blocks) < 1e-9


@pytest.mark.parametrize("batch", [1, 3])
@every_model
def test_a_trace_at_batch_two_serves_every_other(name: str, batch: int) -> None:
    assert error(name, tokens(batch, 9, VOCAB), 5, [3, 1]) < 1e-9


NARROW = [*((name, torch.bfloat16) for name in CACHEABLE), *((name, torch.float32) for name in list(CACHEABLE)[::4])]


@pytest.mark.parametrize(("name", "dtype"), NARROW)
def test_other_dtypes_traced_at_batch_one(name: str, dtype: torch.dtype) -> None:
    """All in the narrowest; float32 lies between it and the float64 of the tests above."""
    for batch in (1, 2):
        assert error(name, tokens(batch, 14, VOCAB), 5, [4, 1, 4], dtype, batch=1) < TOLERANCE[dtype]


@every_model
def test_particles_share_a_prompt(name: str) -> None:
    """R = B*N rows: B prompts stored once, N different suffixes each, in two blocks; spare slots hold anything."""
    b, n, p, blocks, spare = 2, 3, 4, (3, 2), 4
    _, cached, owned = traced(name)
    weights, prompts, suffixes = owned(), tokens(b, p, VOCAB), tokens(b * n, sum(blocks), VOCAB, seed=1)
    with torch.no_grad():
        _, *shared = cached.prefill(prompts, *weights)
        own = [s.new_full((b * n, s.shape[1], sum(blocks) + spare, s.shape[3]), 7.0) for s in shared]
        tables = cached.tables(p + sum(blocks) + 1, *weights)
        rows, keys = [], torch.arange(p + sum(blocks) + spare).expand(b, -1)
        for slots in torch.arange(sum(blocks)).split(blocks):
            args = (slots.expand(b, -1) + p, slots.expand(b, -1), keys, *shared, *own, *tables, *weights)
            rows.append(cached.score(suffixes[:, slots], *args).view(b * n, len(slots), -1))
        full = model(name)(torch.cat([prompts.repeat_interleave(n, 0), suffixes], 1))
    assert relative_error(torch.cat(rows, 1), full[:, p:]) < 1e-9


# ---- what is stored --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "heads", "bytes_per_token"),
    [
        ("gpt", 2, 4 * 16 * 8),
        ("llama", 2, 4 * 8 * 8),  # 4 query heads, 2 key heads
        ("llama_interleaved_rope", 2, 4 * 8 * 8),
        ("llama_buffered", 2, 4 * 8 * 8),
        ("parallel_block", 1, 4 * 4 * 8),  # all heads read one key head
        ("one_layer_one_head", 1, 2 * 16 * 8),
    ],
)
def test_caches_hold_distinct_heads_only(name: str, heads: int, bytes_per_token: int) -> None:
    sites = traced(name)[1].sites
    assert {site.heads for site in sites} == {heads}
    assert sum(site.bytes_per_token for site in sites) == bytes_per_token


def split_heads(x: Tensor) -> Tensor:
    return x.view(*x.shape[:2], 2, 4).transpose(1, 2)


def test_attentions_that_read_the_same_keys_share_a_cache() -> None:
    """Cross-layer sharing: two layers, one K and one V."""

    def step(x):
        k, v = split_heads(torch.tanh(x)), split_heads(torch.sin(x))
        for _ in range(2):
            x = x + F.scaled_dot_product_attention(split_heads(x), k, v, is_causal=True).transpose(1, 2).flatten(2)
        return x[:, -1]

    lm = export_then(step)
    cached = synthesize_cache(lm)
    assert len(cached.sites) == 2
    assert op_names(cached.score.graph).count("write_cache") == 2
    weights = [torch.randn(11, 8, dtype=torch.float64)]
    ids = tokens(2, 9)
    expected = torch.stack([rows_of(lm, ids[:, :end], weights) for end in range(1, 10)], 1)
    actual, at = replay(cached, ids, weights, 3, [4, 2])
    assert at.tolist() == [[2, 3, 4, 5, 6, 7, 8], [2, 2, 3, 4, 5, 6, 7]]  # the second prompt is one token shorter
    assert relative_error(actual, standing(expected, at)) < 1e-9


def test_a_model_without_attention_has_no_cache() -> None:
    """A bigram needs its last token only: no site, no table, and the ops that it had."""
    lm = export(Last(TableLM(5)))
    cached = synthesize_cache(lm)
    assert (cached.sites, cached.table_axes) == ((), ())
    assert [n for n in op_names(cached.advance.graph) if "sym_size" not in n] == op_names(lm.graph)
    assert "caches: 0 tensors, 0 bytes per token" in cached.report


@every_model
def test_tables_at_a_shorter_length_are_prefixes(name: str) -> None:
    _, cached, owned = traced(name)
    check_prefix_tables(cached, owned(), 20)
    for axes, table in zip(cached.table_axes, cached.tables(9, *owned()), strict=True):
        assert axes
        assert {table.shape[d] for d in axes} == {9}


# ---- shapes that depend on the batch ---------------------------------------------------------------------------------


class ExpandedMask(nn.Module):
    """Positions and mask expanded to [B, ...] inside the model, as `transformers` does."""

    max_positions = 64

    def __init__(self, vocab=17, dim=16):
        super().__init__()
        self.vocab, self.embed, self.embed_positions = vocab, nn.Embedding(vocab, dim), nn.Embedding(64, dim)
        self.head = nn.Linear(dim, vocab)

    def forward(self, ids):
        batch, length = ids.shape
        t = torch.arange(length)[None].expand(batch, -1)
        x = self.embed(ids) + self.embed_positions(t)
        mask = (t[:, None, :] <= t[:, :, None])[:, None].expand(batch, 1, length, length)
        q = x.view(batch, length, 2, 8).transpose(1, 2)
        y = F.scaled_dot_product_attention(q, q, torch.sin(q), attn_mask=mask)
        return self.head(x + y.transpose(1, 2).reshape(batch, length, 16))


@pytest.mark.parametrize("traced_batch", [1, 2])
@pytest.mark.parametrize("batch", [1, 2, 3])
def test_a_batch_expanded_inside_the_model_follows_the_rows(traced_batch: int, batch: int) -> None:
    net = build(ExpandedMask).double()
    lm, owned = capture(Last(net), torch.zeros(traced_batch, 2, dtype=torch.long))
    ids = tokens(batch, 9, net.vocab)
    with torch.no_grad():
        actual, at = replay(synthesize_cache(lm), ids, owned(), 4, [3, 2])
        assert relative_error(actual, standing(net(ids), at)) < 1e-9


# ---- refused ---------------------------------------------------------------------------------------------------------

REFUSED = {
    "no last position": (lambda x: torch.tanh(x), "does not sample from the last position"),
    "more than rows": (lambda x: x.unflatten(-1, (2, 4))[:, -1], r"has axes .* not \[batch, vocabulary\]"),
    "the length as a number": (lambda x: (x / x.shape[1])[:, -1], "the total length"),
    "the length in a tensor": (lambda x: (x + torch.full((1,), x.shape[1]))[:, -1], "the total length"),
}


@pytest.mark.parametrize(("then", "message"), REFUSED.values(), ids=REFUSED)
def test_a_step_without_an_incremental_form_is_refused(then, message: str) -> None:
    with pytest.raises(CacheError, match=message):
        synthesize_cache(export_then(then))


# ---- the golden graph ------------------------------------------------------------------------------------------------

ADVANCE = """\
def forward(self, tokens, positions, slots, keys, prompt_0, prompt_1, suffix_0, suffix_1, p_step_embed):
    sym_size_int = sym_size.int(tokens, 0)
    sym_size_int_1 = sym_size.int(tokens, 1)
    embedding_default = embedding.default(p_step_embed, tokens)
    sin_default = sin.default(embedding_default)
    cos_default = cos.default(embedding_default)
    mul_tensor = mul.Tensor(embedding_default, 0.35355339059327373)
    transpose_int = transpose.int(sin_default, -2, -1)
    reshape_default = reshape.default(transpose_int, [sym_size_int, 8, sym_size_int_1])
    permute_default = permute.default(reshape_default, [0, 2, 1])
    reshape_default_1 = reshape.default(permute_default, [sym_size_int, 1, sym_size_int_1, 8])
    write_cache = write_cache(suffix_0, slots, reshape_default_1)
    reshape_default_2 = reshape.default(cos_default, [sym_size_int, sym_size_int_1, 8])
    permute_default_1 = permute.default(reshape_default_2, [0, 1, 2])
    reshape_default_3 = reshape.default(permute_default_1, [sym_size_int, 1, sym_size_int_1, 8])
    write_cache_1 = write_cache(suffix_1, slots, reshape_default_3)
    reshape_default_4 = reshape.default(mul_tensor, [sym_size_int, sym_size_int_1, 8])
    permute_default_2 = permute.default(reshape_default_4, [0, 1, 2])
    reshape_default_5 = reshape.default(permute_default_2, [sym_size_int, 1, 1, sym_size_int_1, 8])
    hidden_later = hidden_later(positions, keys)
    attention_over_cache = attention_over_cache(reshape_default_5, prompt_0, prompt_1, write_cache, write_cache_1, \
hidden_later)
    reshape_default_6 = reshape.default(attention_over_cache, [sym_size_int, sym_size_int_1, 8])
    permute_default_3 = permute.default(reshape_default_6, [0, 1, 2])
    reshape_default_7 = reshape.default(permute_default_3, [sym_size_int, sym_size_int_1, 8])
    select_int = select.int(reshape_default_7, 1, -1)
    return select_int
"""


def test_golden_advance_graph() -> None:
    """One head: keys and values are written once each, then read with the prompt's; nothing else meets the caches."""
    attend = F.scaled_dot_product_attention
    lm = export_then(lambda x: attend(x, torch.sin(x), torch.cos(x), is_causal=True)[:, -1])
    code = synthesize_cache(lm).advance.code
    code = re.sub(r";  .*", "", code)  # the names that die on each line
    code = re.sub(r"torch\.ops\.aten\.|smc_compile_passes_cache_(attention_ops|synthesize)_", "", code)
    assert code.strip() == ADVANCE.strip()
