"""Keys chosen by topk: among the slots of a cache a query chooses what it chose among positions, or it is refused."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from helpers.traces import Step, export, export_then, op_names, rows_of, tokens
from torch import Tensor

from smc_compile.errors import CacheError
from smc_compile.passes.axes.axis_types import CHOSEN, Atom, B, K, Q
from smc_compile.passes.axes.infer import type_axes
from smc_compile.passes.axes.key_selection import choose_keys
from smc_compile.passes.cache.synthesize import synthesize_cache
from smc_compile.passes.closeness import relative_error
from smc_compile.passes.pipeline import capture
from smc_compile.passes.validate import replay, validate

INF = math.inf
MIX = torch.randn(8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def causal(x: Tensor) -> Tensor:
    """[S, S]: whether a query sees a key."""
    t = torch.arange(x.shape[1])
    return t[None, :] <= t[:, None]


def index_scores(x: Tensor) -> Tensor:
    """[B, S, S]: two heads [B, S, 2, 4] against one key [B, S, 4], weighed by the query."""
    q, k = (x @ MIX).view(*x.shape[:2], 2, 4), x[..., 2:6].sin()
    scores = torch.matmul(q, k.transpose(-1, -2).unsqueeze(1))  # [B, S, 2, S]
    return torch.matmul(x[..., None, :2], scores.tanh()).squeeze(-2)


def chosen(x: Tensor, k: int, scores: Tensor | None = None) -> Tensor:
    """[B, S, k]: the numbers of the best keys."""
    scores = (index_scores(x) if scores is None else scores).masked_fill(~causal(x), -INF)
    return scores.topk(min(k, x.shape[1]), -1).indices


def marked(x: Tensor, indices: Tensor) -> Tensor:
    """[B, S, S]: True for each chosen key."""
    return torch.zeros(*x.shape[:2], x.shape[1], dtype=torch.bool).scatter(-1, indices, True)


def attend(x: Tensor, mask: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(x @ MIX, x, torch.sin(x), attn_mask=mask)


def boolean(x: Tensor, k: int) -> Tensor:
    return attend(x, causal(x) & marked(x, chosen(x, k)))


def additive(x: Tensor, k: int) -> Tensor:
    """Written out; the scores themselves are chosen from, numbers pass through int32, marks are zeros among -inf."""
    scores = (x @ MIX) @ x.mT * 0.3 + torch.where(causal(x), 0.0, -1e30)
    indices = scores.topk(min(k, x.shape[1]), -1, sorted=False).indices.int()
    mark = torch.full_like(scores, -INF).scatter(-1, indices.long(), 0.0)
    mark = mark.masked_fill(~causal(x), -INF)
    return (scores + mark).softmax(-1) @ torch.sin(x)


def best_scores(x: Tensor, k: int) -> Tensor:
    """The best scores stand where they stood, among -inf."""
    scores = index_scores(x).masked_fill(~causal(x), -INF)
    best = scores.topk(min(k, x.shape[1]), -1)
    return torch.full_like(scores, -INF).scatter(-1, best.indices, best.values).softmax(-1) @ x


def with_heads(x: Tensor, k: int) -> Tensor:
    """Each of two heads chooses for itself, from scores of its own that every query has for a key."""
    B, S, _ = x.shape
    value = x[..., :2].mT[:, :, None, :].expand(B, 2, S, S)  # spread over the queries
    value = value.masked_fill(~causal(x), torch.finfo(x.dtype).min)
    if k < S:
        kept = torch.zeros_like(value).scatter(-1, value.topk(k, -1).indices, 1.0)
        value = value.masked_fill(kept == 0.0, torch.finfo(x.dtype).min)
    q = x.view(B, S, 2, 4).transpose(1, 2)
    return F.scaled_dot_product_attention(q, q.cos(), q.sin(), attn_mask=value).transpose(1, 2).flatten(2)


WAYS = {f.__name__: f for f in (boolean, additive, best_scores, with_heads)}
every_way = pytest.mark.parametrize("way", WAYS)


def step(way: str, k: int) -> Step:
    return Step(lambda x: WAYS[way](x, k)[:, -1])


def differs(module: Step, ids: Tensor, prompt: int, blocks: list[int], batch: int = 2) -> float:
    """How far the cached form, traced at ``batch``, is from the step itself at every prefix."""
    lm, owned = capture(module, torch.zeros(batch, 2, dtype=torch.long))
    with torch.no_grad():
        actual, at = replay(synthesize_cache(lm), ids, owned(), prompt, blocks)
        expected = torch.stack([module(ids[:, :end]) for end in range(1, ids.shape[1] + 1)], 1)
        return relative_error(actual, expected.gather(1, at[..., None].expand(-1, -1, expected.shape[-1])))


# ---- cached against uncached -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("prompt", "blocks"), [(1, [1] * 11), (3, [9]), (9, [2, 1])])
@pytest.mark.parametrize("k", [1, 4])
@every_way
def test_cached_equals_uncached(way: str, k: int, prompt: int, blocks: list[int]) -> None:
    assert differs(step(way, k), tokens(2, 12), prompt, blocks) < 1e-9


@every_way
def test_the_choice_matters(way: str) -> None:
    """Else the tests above would pass without any."""
    ids = tokens(2, 12)
    assert relative_error(step(way, 4)(ids), step(way, 12)(ids)) > 0.05


@pytest.mark.parametrize("batch", [1, 3])
@every_way
def test_a_trace_at_batch_one_serves_every_other(way: str, batch: int) -> None:
    assert differs(step(way, 3), tokens(batch, 9), 5, [3, 1], batch=1) < 1e-9


@every_way
def test_slots_that_are_hidden_take_no_place(way: str) -> None:
    """Two prompts, the second padded, three particles each, a cache with spare slots that hold large numbers."""
    b, n, p, t, spare = 2, 3, 5, 4, 6
    module = step(way, 3)
    lm, owned = capture(module, torch.zeros(2, 2, dtype=torch.long))
    cached, weights = synthesize_cache(lm), owned()
    prompts, suffixes = tokens(b, p), tokens(b * n, t, seed=1)
    lengths, far = torch.tensor([p, p - 2]), p + t
    slots = torch.arange(t)
    columns = torch.arange(p)
    written = torch.where(columns < lengths[:, None], columns, far)
    keys = torch.cat([written, lengths[:, None] + torch.arange(t), torch.full((b, spare), far)], 1)
    with torch.no_grad():
        _, *shared = cached.prefill(prompts, *weights)
        own = [s.new_full((b * n, s.shape[1], t + spare, s.shape[3]), 7.0) for s in shared]
        args = (
            lengths[:, None] + slots,
            slots.expand(len(lengths), -1),
            keys,
            *shared,
            *own,
            *cached.tables(far + 1, *weights),
            *weights,
        )
        actual = cached.score(suffixes, *args).view(b, n, t, -1)
        for i in range(b):
            prompt = prompts[i : i + 1, : lengths[i]].expand(n, -1)
            ours = torch.cat([prompt, suffixes[i * n : (i + 1) * n]], 1)
            for j in range(t):
                assert relative_error(actual[i, :, j], module(ours[:, : lengths[i] + j + 1])) < 1e-9


def test_layers_that_share_a_choice_share_the_cache_behind_it() -> None:
    def then(x):
        x = x + torch.arange(x.shape[1], dtype=x.dtype)[:, None].sin()  # the same token twice would be a tie
        mask = causal(x) & marked(x, chosen(x, 3))
        return attend(attend(x, mask), mask)[:, -1]

    module = Step(then)
    cached = synthesize_cache(export(module))
    assert len(cached.sites) == 5  # keys to choose by, and keys and values of two layers
    assert op_names(cached.score.graph).count("choose_keys") == 1
    assert differs(module, tokens(2, 10), 4, [3, 3]) < 1e-9


def test_all_keys_are_chosen_where_the_trace_chose_all() -> None:
    """A bound on the length, from a table of positions, says that k is enough for all."""
    table = torch.randn(9, 8, dtype=torch.float64)

    def then(x):
        x = x + table[: x.shape[1]]
        return attend(x, causal(x) & marked(x, chosen(x, 12)))[:, -1]

    assert differs(Step(then), tokens(2, 8), 2, [2, 4]) < 1e-9


@pytest.mark.parametrize(("count", "found"), [(2, [3, 1]), (4, [3, 1, 0, 2]), (9, [3, 1, 0, 2]), (0, [3, 1, 0, 2])])
def test_at_most_all_are_chosen(count: int, found: list[int]) -> None:
    values, slots = choose_keys(torch.tensor([0.0, 1.0, -INF, 2.0]), count, 0, True)
    assert slots.tolist() == found
    assert values[0] == 2.0


def test_validation_passes_with_rounding_errors_only() -> None:
    for way in WAYS:
        lm, owned = capture(step(way, 4), torch.zeros(2, 2, dtype=torch.long))
        assert validate(lm, synthesize_cache(lm), owned()) < 1e-12


# ---- the axes and the graph ------------------------------------------------------------------------------------------


def test_axes_of_what_is_chosen() -> None:
    typing = type_axes(export_then(lambda x: marked(x, chosen(x, 3))))
    by_name = {node.name: axes for node, axes in typing.axes.items()}
    assert by_name["topk"] == [((B,), (Q,), (Atom(CHOSEN, 3),))] * 2
    assert by_name["scatter"] == ((B,), (Q,), (K,))


CHOICE = [
    "squeeze.dim",
    "at_positions",
    "masked_fill.Scalar",
    "choose_keys",
    "getitem",
    "full.default",
    "scatter.value",
    "at_positions",
    "__and__.Tensor",
]


def test_golden_choice() -> None:
    """Keys to choose by are written to the cache; the choice runs over all slots, its marks meet the causal table."""
    cached = synthesize_cache(export(step("boolean", 3)))
    names = op_names(cached.advance.graph)
    names = [name for name in names if "sym_size" not in name]
    start = names.index("choose_keys")
    assert names[start - 3 : start + 6] == CHOICE
    assert [site.name.rpartition(".")[2] for site in cached.sites] == ["key", "key", "value"]


# ---- refused ---------------------------------------------------------------------------------------------------------

EMBEDDING = torch.randn(64, 8, dtype=torch.float64)
REFUSED = {
    "open scores": ("no mask over positions hides", lambda x: attend(x, marked(x, index_scores(x).topk(2).indices))),
    "the least": (
        "hidden keys have the least",
        lambda x: marked(x, index_scores(x).masked_fill(~causal(x), -INF).topk(2, largest=False).indices),
    ),
    "half of the keys": (
        "depends on the length",
        lambda x: marked(x, index_scores(x).masked_fill(~causal(x), -INF).topk(x.shape[1] // 2).indices),
    ),
    "a number as a number": ("used as numbers", lambda x: chosen(x, 2) + 1),
    "a number as a position": ("used as numbers", lambda x: F.embedding(chosen(x, 2), EMBEDDING)),
    "a reshape": ("used as numbers", lambda x: chosen(x, 2).flatten(1)),
    "another axis": (
        "along an axis that is not that of the keys",
        lambda x: torch.zeros_like(x).scatter(-1, chosen(x, 2), 1.0),
    ),
    "one head": (
        "in some rows only",
        lambda x: torch.zeros(x.shape[0], 2, x.shape[1], x.shape[1]).scatter(-1, chosen(x, 2).unsqueeze(1), 1.0),
    ),
    "the values": ("mixes the chosen keys", lambda x: additive_scores(x).topk(2).values.mean(-1)),
    "the best": ("argmax gives the number of a key", lambda x: additive_scores(x).argmax(-1)),
    "the best and its place": ("max gives the number of a key", lambda x: sum(additive_scores(x).max(-1))),
    "a mask over tokens": ("not through scores of each query", lambda x: attend(x, x[..., :1].mT > 0)),
}  # fmt: skip


def additive_scores(x: Tensor) -> Tensor:
    return index_scores(x) + torch.where(causal(x), 0.0, -INF)


@pytest.mark.parametrize(("message", "then"), REFUSED.values(), ids=REFUSED)
def test_what_has_no_meaning_among_slots_is_refused(message: str, then) -> None:
    with pytest.raises(CacheError, match=message) as caught:
        type_axes(export_then(then))
    assert "traces.py:" in caught.value.why
    assert caught.value.fix


def test_the_value_of_the_best_key_alone_is_fine() -> None:
    axes = {n.name: a for n, a in type_axes(export_then(lambda x: additive_scores(x).max(-1).values)).axes.items()}
    assert axes["max_1"][0] == ((B,), (Q,))


def peeking(x: Tensor) -> Tensor:
    """The choice sees one position ahead, and attention does not."""
    t = torch.arange(x.shape[1])
    scores = index_scores(x).masked_fill(t[None, :] > t[:, None] + 1, -INF)
    return attend(x, causal(x) & marked(x, scores.topk(2).indices))


def slightly_hidden(x: Tensor) -> Tensor:
    scores = index_scores(x) + torch.where(causal(x), 0.0, -9.0)
    return attend(x, causal(x) & marked(x, scores.topk(2).indices))


def chosen_alone(x: Tensor) -> Tensor:
    """Where fewer than k keys are seen, the choice holds later ones."""
    return attend(x, marked(x, chosen(x, 3)))


def similar(x: Tensor) -> Tensor:
    return attend(x, x @ x.mT)


@pytest.mark.parametrize("then", [peeking, slightly_hidden, chosen_alone, similar])
def test_a_choice_or_mask_that_is_open_to_later_keys_is_not_causal(then) -> None:
    lm, owned = capture(Step(lambda x: then(x)[:, -1]), torch.zeros(2, 2, dtype=torch.long))
    with pytest.raises(CacheError, match=r"not causal.*later positions is open") as caught:
        validate(lm, synthesize_cache(lm), owned())
    assert "later keys are not hidden in" in caught.value.why


def test_the_rows_of_the_traced_graph_are_those_of_the_step() -> None:
    """Lengths below k too, where a branch of the step chooses nothing."""
    for way in WAYS:
        module = step(way, 4)
        lm, owned = capture(module, torch.zeros(2, 2, dtype=torch.long))
        for length in (1, 3, 4, 5, 11):
            ids = tokens(2, length)
            torch.testing.assert_close(rows_of(lm, ids, owned()), module(ids).detach(), rtol=1e-12, atol=1e-12)
