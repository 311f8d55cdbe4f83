"""Loops whose iterations are not all alike: the law of the whole, its ends, and what is refused.

Seeds are fixed; the rate stated with a statistical test is that of a false alarm when the seed was chosen.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.enumeration import chi_square_p_value
from helpers.model_parts import perturbed
from helpers.replicates import evidence_measure, z_scores
from helpers.toys import TableLM, TinyTransformerLM
from torch import Tensor, nn

import smc_compile
from smc_compile import decode, explain
from smc_compile.errors import LoopError
from smc_compile.program import from_loop

pytestmark = pytest.mark.usefixtures("fresh_dynamo", "untraced_regions")
V, END = 4, 3
QUICK: dict[str, Any] = {"compiler": "eager"}
TABLE = TableLM(V).double()
MODEL = TinyTransformerLM(V).double()
PROMPT = torch.tensor([1, 0, 2])
IDS = torch.tensor([[0, 1, 2], [2, 1, 1]])

Loop = Callable[[nn.Module, Tensor, int], Tensor]
Sampler = Callable[[int, Tensor], Tensor]  # (iteration, logits [B, V]) -> logits


def at_least_two(i: int, logits: Tensor) -> Tensor:
    if i < 2:
        logits[:, END] = -math.inf
    return logits


def hotter_later(i: int, logits: Tensor) -> Tensor:
    return logits / (0.5 if i < 1 else 1.5)


def first_of_its_own(i: int, logits: Tensor) -> Tensor:
    return -logits if i == 0 else logits


def every_second(i: int, logits: Tensor) -> Tensor:
    return logits * (1.0 - 0.6 * (i % 2))


SAMPLERS = [at_least_two, hotter_later, first_of_its_own, every_second]


def drawing(sampler: Sampler) -> Loop:
    def loop(model, ids, n):
        for i in range(n):
            probs = torch.softmax(sampler(i, model(ids)[:, -1]), -1)
            ids = torch.cat([ids, torch.multinomial(probs, 1)], 1)
        return ids

    return loop


def greedy(sampler: Sampler) -> Loop:
    def loop(model, ids, n):
        for i in range(n):
            ids = torch.cat([ids, sampler(i, model(ids)[:, -1]).argmax(-1, keepdim=True)], 1)
        return ids

    return loop


@torch.no_grad()
def law(sampler: Sampler, n: int) -> Tensor:
    """The probability of every continuation of PROMPT by n tokens, n axes."""
    distribution, texts = torch.ones(1, dtype=torch.float64), PROMPT[None]
    for i in range(n):
        p = torch.softmax(sampler(i, TABLE(texts)[:, -1].clone()), -1)
        distribution = (distribution[:, None] * p).flatten()
        following = torch.arange(V).repeat(len(texts))[:, None]
        texts = torch.cat([texts.repeat_interleave(V, 0), following], 1)
    return distribution.reshape([V] * n)


# ---- the law ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_evidence_times_weight_is_unbiased_for_every_sequence(sampler):
    """E[Z] = 1 within 4 standard errors (6e-5), E[Z w] = p within 5.5 for each of 256 sequences (1e-5 for all)."""
    distribution = law(sampler, 4)
    compiled = decode(
        drawing(sampler), draft=perturbed(TABLE, 0.5), n_particles=4, lookahead=1, ess_threshold=0.8, seed=0, **QUICK
    )
    compiled(TABLE, PROMPT.expand(4096, -1), 4)
    g = compiled.last
    frequent = distribution.flatten() > 0.003
    found = z_scores(evidence_measure(g, distribution)[:, frequent], distribution.flatten()[frequent])
    evidence = g.log_evidence.exp()
    print(f"evidence {evidence.mean():.4f}, largest z {found.abs().max():.2f}")
    assert len(compiled.loop.parts) > 1
    if sampler is every_second:  # parts of one token, which the target draws
        assert torch.equal(evidence, torch.ones(4096, dtype=torch.float64))
    else:
        assert abs(z_scores(evidence, 1.0)) < 4
    assert found.abs().max() < 5.5
    assert (evidence_measure(g, distribution)[:, distribution.flatten() == 0] == 0).all()


@pytest.mark.parametrize("method", ["autoregressive", "speculative"])
def test_exact_methods_follow_the_law(method):
    """Chi-square at level 1e-3."""
    compiled = decode(drawing(at_least_two), method=method, draft=perturbed(TABLE, 0.5), lookahead=2, seed=0, **QUICK)
    texts = compiled(TABLE, PROMPT.expand(4096, -1), 4)
    assert chi_square_p_value(texts[:, len(PROMPT) :], law(at_least_two, 4)) > 1e-3


def test_parts_do_not_draw_with_the_same_random_numbers():
    """Of a model that gives all tokens the same chance, the parts would repeat each other."""
    flat = TableLM(V).double()
    nn.init.zeros_(flat.table)

    def loop(model, ids, n):
        for i in range(n):
            logits = model(ids)[:, -1]
            probs = torch.softmax(logits * 2 if i < 8 else logits, -1)
            ids = torch.cat([ids, torch.multinomial(probs, 1)], 1)
        return ids

    texts = decode(loop, method="autoregressive", seed=0, **QUICK)(flat, IDS[:1], 16)[0, 3:]
    assert texts[:8].tolist() != texts[8:].tolist()


def test_a_generation_in_parts_is_one_generation():
    options = {"draft": perturbed(TABLE, 0.5), "n_particles": 4, "lookahead": 2, "seed": 3, **QUICK}
    compiled = decode(drawing(at_least_two), **options)
    text = compiled(TABLE, IDS, 7)
    g = compiled.last
    assert torch.equal(text, g.sequences)
    assert torch.equal(decode(drawing(at_least_two), **options)(TABLE, IDS, 7), text)  # by its seed
    assert g.particles.shape == (2, 4, 10)
    assert g.log_probs.shape == (2, 7)
    assert g.particle_log_probs.shape == (2, 4, 7)
    assert g.ancestors.shape == (2, g.stats.cycles, 4)
    assert g.ess.shape == (2, g.stats.cycles)
    assert g.new_lengths.tolist() == [7, 7]
    assert (g.particle_lengths == 7).all()
    assert g.stats.new_tokens == 7
    for i in range(7):  # each token's probability is that of its own iteration
        row = at_least_two(i, TABLE(text[:, : 3 + i])[:, -1].detach().clone())
        expected = row.log_softmax(-1).gather(1, text[:, 3 + i : 4 + i])[:, 0]
        assert torch.allclose(g.log_probs[:, i], expected)
    same = (g.particles == g.sequences[:, None]).all(-1)
    assert same.any(1).all()
    assert torch.allclose(g.particle_log_probs[same], g.log_probs[:, None].expand(-1, 4, -1)[same])


# ---- ends ------------------------------------------------------------------------------------------------------------


def test_texts_that_end_in_different_parts():
    def loop(model, ids, n, end):
        done = torch.zeros(ids.shape[0], dtype=torch.bool)
        for i in range(n):
            logits = model(ids)[:, -1]
            if i == 2:
                logits[:, 1] = -math.inf
            token = torch.where(done, 0, logits.argmax(-1))
            done = done | (token == end)
            ids = torch.cat([ids, token[:, None]], 1)
        return ids

    compiled = decode(loop, method="autoregressive", **QUICK)
    ids = torch.arange(8 * 3).view(8, 3) * 7 % 11 % V
    found = set()
    for end in (1, 2, 3):
        for n in (5, 9):
            assert torch.equal(compiled(MODEL, ids, n, end), loop(MODEL, ids, n, end))
            assert len(compiled.loop.parts) == 3
        g = compiled.last
        behind = torch.arange(9) >= g.new_lengths[:, None]
        assert (g.sequences[:, 3:][behind] == 0).all()
        assert (g.log_probs[behind] == 0).all()
        found.add(frozenset(g.new_lengths.tolist()))
    print(found)
    assert max(map(len, found)) > 1


def test_a_loop_that_leaves_at_the_end_token():
    def loop(model, ids, n):
        for i in range(n):
            logits = model(ids)[:, -1]
            if i < 3:
                logits[:, END] = -math.inf
            token = logits.argmax(-1, keepdim=True)
            ids = torch.cat([ids, token], 1)
            if token.item() == END:
                break
        return ids

    compiled = decode(loop, method="autoregressive", **QUICK)
    ended = 0
    for first in range(V):
        for n in (2, 8):
            ids = torch.tensor([[first, 1, 2]])
            expected = loop(MODEL, ids, n)
            assert torch.equal(compiled(MODEL, ids, n), expected)
            ended += expected.shape[1] < 3 + n
    assert ended


def test_the_option_for_the_end_token():
    compiled = decode(drawing(at_least_two), method="autoregressive", eos_token_id=END, seed=0, **QUICK)
    texts = compiled(TABLE, PROMPT.expand(64, -1), 6)[:, 3:]
    lengths = compiled.last.new_lengths
    assert (texts[:, :2] != END).all()
    assert len(set(lengths.tolist())) > 2
    assert (texts[torch.arange(6) >= lengths[:, None]] == END).all()


# ---- greedy loops, programs and lengths ------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_any_number_of_tokens_after_any_prompt(sampler):
    plain = greedy(sampler)
    compiled = decode(plain, draft=perturbed(MODEL, 0.3), lookahead=2, **QUICK)
    for length, n in ((3, 6), (3, 1), (1, 5), (6, 7), (3, 2)):
        ids = torch.arange(2 * length).view(2, length) * 3 % V
        with torch.no_grad():
            assert torch.equal(compiled(MODEL, ids, n), plain(MODEL, ids, n)), (length, n)


def test_parts_that_are_alike_share_a_program():
    compiled = decode(greedy(every_second), method="autoregressive", **QUICK)
    compiled(MODEL, IDS, 6)
    assert len(compiled.loop.parts) == 6
    assert len(from_loop.programs) == 2


def test_weights_and_states_of_the_model_are_those_of_the_call():
    model = TinyTransformerLM(V).double()
    plain = greedy(first_of_its_own)
    compiled = decode(plain, method="autoregressive", **QUICK)
    with torch.no_grad():
        for _ in range(2):
            assert torch.equal(compiled(model, IDS, 6), plain(model, IDS, 6))
            next(model.parameters()).mul_(-1.5)
        model.register_forward_hook(lambda module, args, logits: -logits)
        assert torch.equal(compiled(model, IDS, 6), plain(model, IDS, 6))


def test_by_the_backend_too():
    plain = greedy(at_least_two)
    compiled = torch.compile(plain, backend="smc", options={"compiler": "eager", "method": "autoregressive"})
    with torch.no_grad():
        for n in (6, 4):
            assert torch.equal(compiled(MODEL, IDS, n), plain(MODEL, IDS, n))


def test_explain_names_the_parts():
    report = str(explain(greedy(at_least_two), MODEL, IDS, 6, method="autoregressive", **QUICK))
    assert "iterations 0 to 1 are alike" in report
    assert "iterations 2 to 5 are alike" in report


# ---- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [3, 5])
@pytest.mark.parametrize("sampler", [first_of_its_own, lambda i, logits: logits])
def test_a_window_is_never_lost(sampler, window):
    def loop(model, ids, n):
        for i in range(n):
            shown = ids if ids.shape[1] <= window else ids[:, -window:]
            ids = torch.cat([ids, sampler(i, model(shown)[:, -1]).argmax(-1, keepdim=True)], 1)
        return ids

    compiled = decode(loop, method="autoregressive", **QUICK)
    equal = 0
    for length in (2, 4, 7):
        ids = torch.arange(2 * length).view(2, length) * 3 % V
        for n in (1, 3, 9):
            with contextlib.suppress(LoopError):
                assert torch.equal(compiled(MODEL, ids, n), loop(MODEL, ids, n)), (length, n)
                equal += 1
    assert equal == 9 or window == 3 or sampler is first_of_its_own


def test_too_many_parts_are_counted():
    with pytest.raises(LoopError, match=r"not alike") as caught:
        decode(greedy(lambda i, logits: logits * (1.0 / (1 + i))), method="autoregressive", **QUICK)(MODEL, IDS, 12)
    assert isinstance(caught.value, smc_compile.SMCError)


def test_a_cache_goes_through_all_iterations():
    def loop(model, ids, n):
        cache = None
        for i in range(n):
            logits, cache = model(ids if cache is None else ids[:, -1:], cache)
            ids = torch.cat([ids, at_least_two(i, logits[:, -1]).argmax(-1, keepdim=True)], 1)
        return ids

    from helpers.cached_models import HandedLM
    from helpers.model_parts import build

    with pytest.raises(LoopError):
        decode(loop, method="autoregressive", **QUICK)(build(HandedLM, vocab=V, layers=1).double(), IDS, 9)
