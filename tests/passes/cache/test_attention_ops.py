"""Attention over a shared prompt and an own suffix equals attention over the two joined; caches are written once."""

from __future__ import annotations

import pytest
import torch
from helpers.models import CACHEABLE
from helpers.traces import traced
from torch import Tensor

from smc_compile.passes.cache.attention_ops import (
    attention_over_cache,
    causal_mask,
    entries_over_cache,
    masked,
    mix_over_cache,
    scores_over_cache,
    write_cache,
)

SIZES = [  # b, n, h, m, d, p, s
    (1, 1, 1, 1, 4, 1, 1),
    (2, 3, 2, 5, 4, 6, 3),
    (3, 1, 4, 2, 8, 1, 7),
    (1, 8, 1, 9, 4, 5, 2),
]
sizes = pytest.mark.parametrize(("b", "n", "h", "m", "d", "p", "s"), SIZES)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def joined(prompt: Tensor, suffix: Tensor, n: int) -> Tensor:
    """The prompt copied to every particle, then the particle's own suffix: row b*N + n."""
    return torch.cat([prompt.repeat_interleave(n, 0), suffix], 2)


@sizes
def test_scores_equal_those_over_joined_keys(b, n, h, m, d, p, s) -> None:
    query, prompt, suffix = normal(b * n, h, m, d), normal(b, h, p, d, seed=1), normal(b * n, h, s, d, seed=2)
    scores = scores_over_cache(query, prompt, suffix)
    torch.testing.assert_close(scores, query @ joined(prompt, suffix, n).mT)


@sizes
def test_mix_equals_that_over_joined_values(b, n, h, m, d, p, s) -> None:
    probs, prompt, suffix = normal(b * n, h, m, p + s), normal(b, h, p, d, seed=1), normal(b * n, h, s, d, seed=2)
    torch.testing.assert_close(mix_over_cache(probs, prompt, suffix), probs @ joined(prompt, suffix, n))


def test_write_cache_writes_the_slots_of_each_request_and_nothing_else() -> None:
    suffix, new = torch.zeros(4, 3, 6, 4), torch.ones(4, 3, 2, 4)
    new[:, :, 1] = 2
    written = write_cache(suffix, torch.tensor([[4, 1], [0, 2]]), new)
    assert written.data_ptr() == suffix.data_ptr()
    assert suffix[:, 2, :, 3].tolist() == 2 * [[0, 2, 0, 0, 1, 0]] + 2 * [[1, 0, 2, 0, 0, 0]], "two rows a request"


@pytest.mark.parametrize("inner", [1, 2], ids=["rows", "rows times heads"])
def test_causal_mask_hides_what_lies_after_a_querys_position_in_its_request(inner: int) -> None:
    positions, keys = torch.tensor([[0, 2, 4], [1, 2, 3]]), torch.tensor([[0, 1, 2, 3, 4], [0, 99, 1, 2, 3]])
    visible = causal_mask(torch.zeros(4 * inner, 3, 5), 0, inner, positions, keys).isfinite()  # two rows a request
    assert visible[2 * inner - 1].int().tolist() == [[1, 0, 0, 0, 0], [1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]
    assert visible[2 * inner].int().tolist() == [[1, 0, 1, 0, 0], [1, 0, 1, 1, 0], [1, 0, 1, 1, 1]]


def test_masks_keep_where_true_and_add_where_float() -> None:
    scores = torch.tensor([[1.0, 2.0]])
    assert masked(scores, torch.tensor([True, False])).tolist() == [[1.0, float("-inf")]]
    assert masked(scores, torch.tensor([0.5, -2.0])).tolist() == [[1.5, 0.0]]


@pytest.mark.parametrize("region", ["score", "advance"])
@pytest.mark.parametrize("name", [n for n in CACHEABLE if n in ("gpt", "llama", "sinks", "parallel_block")])
def test_no_region_writes_a_cache_and_gather_copies_it(name: str, region: str) -> None:
    """An in-place write and a gather copy of one buffer in one Inductor graph is silently wrong (pytorch #198270).

    So a suffix is taken by `write_cache`, once, and by nothing else but its size; that is only multiplied.
    """
    cached = traced(name)[1]
    graph = getattr(cached, region).graph
    suffixes = [n for n in graph.nodes if n.op == "placeholder" and n.name.startswith("suffix_")]
    assert len(suffixes) == len(cached.sites) > 0
    for suffix in suffixes:
        (write,) = [user for user in suffix.users if user.target is not torch.ops.aten.sym_size.int]
        assert write.target is write_cache
        assert write.args[0] is suffix
        assert {user.target for user in write.users} <= {attention_over_cache, scores_over_cache, mix_over_cache}
    mutating = [n for n in graph.nodes if getattr(getattr(n.target, "_schema", None), "is_mutable", False)]
    assert not mutating


@sizes
def test_entries_are_those_of_prompt_and_suffix_joined(b, n, h, m, d, p, s) -> None:
    prompt, suffix = normal(b, h, p, 1), normal(b * n, h, s, 1, seed=1)
    assert torch.equal(entries_over_cache(prompt, suffix), joined(prompt, suffix, n).squeeze(3))
