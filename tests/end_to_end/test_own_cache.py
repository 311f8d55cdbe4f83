"""Models whose own cache object is the state: what is found in it, and that particles may permute it."""

from __future__ import annotations

import inspect
from functools import lru_cache
from typing import Any

import pytest
import torch
from helpers.replicates import recorded_cycles
from torch import Tensor, nn

from smc_compile import CacheError, OwnCache, generate
from smc_compile.passes.closeness import TOLERANCE, relative_error

VOCAB, WIDTH = 11, 6


# ---- caches of every shape -------------------------------------------------------------------------------------------


class Recurrent(nn.Module):
    """A recurrence whose cache is ``None`` or what ``pack`` makes of its state [B, W] and the number of tokens seen."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed, self.mix = nn.Embedding(VOCAB, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, VOCAB)
        self.double().eval()

    def pack(self, state: Tensor, seen: int) -> Any:
        return [state, seen]

    def unpack(self, cache: Any) -> tuple[Tensor, int]:
        return cache[0], cache[1]

    def forward(self, ids: Tensor, cache: Any = None) -> tuple[Tensor, Any]:
        state, seen = (self.embed.weight.new_zeros(len(ids), WIDTH), 0) if cache is None else self.unpack(cache)
        rows = []
        for token in ids.unbind(1):
            state = torch.tanh(self.mix(state) + self.embed(token))
            seen += 1
            rows.append(self.head(state) * (1 + seen % 3))  # what is no tensor counts, too
        return torch.stack(rows, 1), self.pack(state, seen)


class Box:
    """A cache object: a tensor in a nested place, twice, a table that rows share, and a function."""

    def __init__(self, state: Tensor, seen: int) -> None:
        self.layers = [{"state": state, "again": state, "seen": seen}]
        self.table = torch.arange(3)
        self.activation = torch.tanh
        self.note = lambda: "not to be copied"


class Boxed(Recurrent):
    def pack(self, state: Tensor, seen: int) -> Any:
        return Box(state, seen)

    def unpack(self, cache: Any) -> tuple[Tensor, int]:
        layer = cache.layers[0]
        assert layer["state"] is layer["again"]
        assert cache.note() == "not to be copied"
        assert cache.table.shape == (3,)
        return layer["state"], layer["seen"]


class RowsLast(Recurrent):
    def pack(self, state: Tensor, seen: int) -> Any:
        return [state.t(), seen]

    def unpack(self, cache: Any) -> tuple[Tensor, int]:
        return cache[0].t(), cache[1]


class InPlace(Recurrent):
    """Writes into the cache it is given, as libraries do."""

    def forward(self, ids: Tensor, cache: Any = None) -> tuple[Tensor, Any]:
        logits, new = super().forward(ids, cache)
        if cache is not None:
            cache[0].copy_(new[0])
            cache[1] = new[1]
            return logits, cache
        return logits, new


class OneAtATime(Recurrent):
    """Forgets its cache when it is given several tokens."""

    def forward(self, ids: Tensor, cache: Any = None) -> tuple[Tensor, Any]:
        return super().forward(ids, cache if ids.shape[1] == 1 else None)


class Filled(Recurrent):
    """Fills the object it is given and returns logits alone."""

    def forward(self, ids: Tensor, cache: Any = None) -> Any:
        state, seen = (cache["state"], cache["seen"]) if cache and "state" in cache else (None, 0)
        logits, (state, seen) = super().forward(ids, None if state is None else [state, seen])
        if cache is not None:
            cache |= {"state": state, "seen": seen}
        return logits


def test_a_cache_that_is_filled_and_not_returned() -> None:
    plain, ids = Filled(), torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])
    with pytest.raises(CacheError, match="no cache of its own"):
        OwnCache(plain)
    model = OwnCache(plain, make_cache=lambda: {"window": torch.tensor(6)})
    assert model.error < 1e-12
    first, state = model.step(ids[:, :3], 0, model.initial_state(2))
    last, _ = model.step(ids[:, 3:], 3, state)
    assert relative_error(torch.cat([first, last], 1), plain(ids)) < 1e-12


OWN = [Recurrent, Boxed, RowsLast, InPlace, OneAtATime]


@pytest.mark.parametrize("kind", OWN)
def test_blocks_of_any_length_give_the_logits_of_the_whole(kind) -> None:
    model = OwnCache(kind())
    assert model.error < 1e-12
    assert model.blocks is (kind is not OneAtATime)
    ids = torch.randint(VOCAB, (3, 9), generator=torch.Generator().manual_seed(1))
    state, rows = model.initial_state(3), []
    for block in ids.split([2, 1, 4, 2], 1):
        logits, state = model.step(block, sum(row.shape[1] for row in rows), state)
        rows.append(logits)
    assert relative_error(torch.cat(rows, 1), model(ids)) < 1e-12


class HalfForgetful(Recurrent):
    """Given several tokens it remembers how many it has seen, but not what."""

    def forward(self, ids: Tensor, cache: Any = None) -> tuple[Tensor, Any]:
        forgets = cache is not None and ids.shape[1] > 1
        return super().forward(ids, [torch.zeros_like(cache[0]), cache[1]] if forgets else cache)


@pytest.mark.parametrize("kind", [Recurrent, HalfForgetful])
def test_narrow_types_do_not_hide_a_state_that_is_read_in_part(kind) -> None:
    """What a block forgets here lies within the tolerance of bfloat16."""
    plain = kind().bfloat16()
    with torch.no_grad():
        plain.mix.weight.mul_(0.1)
        ids = torch.randint(VOCAB, (2, 9), generator=torch.Generator().manual_seed(0))
        block = plain(ids[:, 5:], plain(ids[:, :5])[1])[0]
        assert relative_error(block, plain(ids)[0][:, 5:]) < TOLERANCE[torch.bfloat16]
    assert OwnCache(plain).blocks is (kind is Recurrent)


@pytest.mark.parametrize("kind", OWN)
def test_a_step_leaves_the_state_it_was_given(kind) -> None:
    model, ids = OwnCache(kind()), torch.tensor([[1, 2, 3], [4, 5, 6]])
    _, (rest, leaves) = model.step(ids, 0, model.initial_state(2))
    before = [rest.clone(), *(leaf.clone() for leaf in leaves)]
    first, _ = model.step(ids[:, :2], 3, (rest, leaves))
    second, _ = model.step(ids[:, :2], 3, (rest, leaves))
    assert torch.equal(first, second)
    assert all(torch.equal(a, b) for a, b in zip(before, [rest, *leaves], strict=True))
    assert all(leaf.shape[0] == 2 for leaf in leaves)


class NoCache(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, VOCAB)

    def forward(self, ids: Tensor) -> Tensor:
        return self.embed(ids)


class Forgetful(Recurrent):
    """Its cache is one token old."""

    def forward(self, ids: Tensor, cache: Any = None) -> tuple[Tensor, Any]:
        logits, new = super().forward(ids, cache)
        return logits, (super().forward(ids[:, :-1], cache)[1] if ids.shape[1] > 1 else new)


class Hidden(Recurrent):
    """Keeps its state in the module."""

    def forward(self, ids: Tensor, cache: Any = None) -> tuple[Tensor, Any]:
        logits, new = super().forward(ids, None if cache is None else [self.kept, cache[1]])
        self.kept = new[0]
        return logits, [torch.zeros(len(ids), 1), new[1]]


class Growing(Recurrent):
    """Keeps another tensor for each call: particles could not exchange them one by one."""

    def pack(self, state: Tensor, seen: int) -> Any:
        return [state, seen, *[state.clone() for _ in range(seen)]]


class BatchInCache(Recurrent):
    """No axis counts rows: the state of all rows stands in one."""

    def pack(self, state: Tensor, seen: int) -> Any:
        return [state.flatten(), seen]

    def unpack(self, cache: Any) -> tuple[Tensor, int]:
        return cache[0].view(-1, WIDTH), cache[1]


@pytest.mark.parametrize(
    ("kind", "what"),
    [
        (NoCache, "no cache of its own that could be found.*\n.*NoCache.forward takes no value that it also returns"),
        (Forgetful, "does not reproduce the model.*\n.*relative difference"),
        (Hidden, "a part of its state outside its cache"),
        (Growing, "changes its layout as text grows"),
        (BatchInCache, "no axis of rows"),
    ],
)
def test_what_cannot_serve_is_refused(kind, what) -> None:
    with pytest.raises(CacheError, match=what):
        OwnCache(kind())


def test_greedy_and_smc_through_generate() -> None:
    plain, ids = Recurrent(), torch.tensor([[1, 2], [3, 4]])
    target, draft = OwnCache(plain), OwnCache(Boxed(seed=1))
    greedy = generate(target, None, ids, max_new_tokens=6, temperature=0, compiler="eager")
    expected = ids
    for _ in range(6):
        expected = torch.cat([expected, plain(expected)[0][:, -1].argmax(-1, keepdim=True)], 1)
    assert torch.equal(greedy.sequences, expected)
    answer = generate(target, draft, ids, max_new_tokens=7, n_particles=3, lookahead=2, seed=0, compiler="eager")
    assert answer.sequences.shape == (2, 9)
    assert answer.log_weights.isfinite().all()


# ---- models of the transformers library ------------------------------------------------------------------------------

LIBRARY = ["mamba", "mamba2", "falcon_h1", "bamba"]  # two state-space models, two hybrids with attention
PROMPT = torch.tensor([[5, 9, 13, 40, 2]])


@lru_cache
def wide(family: str, seed: int = 0) -> OwnCache:
    """A tiny random model in float64 throughout."""
    pytest.importorskip("transformers", minversion="5")
    from smc_compile.pairs.tiny_transformers import Float64Throughout, build

    model = build(family)
    if seed:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    forward = model.forward

    def in_float64(*args: Any, **kwargs: Any) -> Any:
        with Float64Throughout():
            return forward(*args, **kwargs)

    in_float64.__signature__ = inspect.signature(forward)  # type: ignore[attr-defined]
    model.forward = in_float64
    return OwnCache(model)


@pytest.mark.parametrize("family", LIBRARY)
def test_with_and_without_the_cache(family) -> None:
    model = wide(family)
    ids = torch.randint(3, 97, (2, 14), generator=torch.Generator().manual_seed(2))
    state, rows = model.initial_state(2), []
    for block in ids.split([5, 4, 1, 2, 2], 1):
        logits, state = model.step(block, sum(row.shape[1] for row in rows), state)
        rows.append(logits)
    error = relative_error(torch.cat(rows, 1), model(ids))
    print(f"{family}: blocks {model.blocks}, relative difference {error:.1e}")
    assert max(error, model.error) < 1e-9


@pytest.mark.parametrize("family", LIBRARY)
def test_greedy_is_the_library_own(family, interpreted) -> None:
    model, ids = wide(family), PROMPT.repeat(2, 1) + torch.tensor([[0], [1]])
    mine = generate(model, None, ids, max_new_tokens=10, temperature=0, compiler="eager")
    theirs = model.model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=10, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    assert torch.equal(mine.sequences, theirs)


@pytest.mark.parametrize("family", LIBRARY)
def test_a_draft_equal_to_the_target_gives_weights_one(family, interpreted) -> None:
    model = wide(family)
    options = {"n_particles": 3, "lookahead": 2, "ess_threshold": 1.0, "seed": 0, "compiler": "eager"}
    g = generate(model, model, PROMPT, max_new_tokens=7, **options)
    assert g.log_weights.abs().max() < 1e-9
    assert g.stats.resamplings == 0


@pytest.mark.parametrize("family", LIBRARY)
def test_after_resampling_the_state_is_that_of_the_surviving_tokens(family, interpreted) -> None:
    """What follows from the state, against a prefill of prompt and tokens. The target has seen all tokens but the
    pending one; the draft has not seen the last drafted one either."""
    target, draft = wide(family), wide(family, seed=1)
    options = {"n_particles": 4, "lookahead": 2, "ess_threshold": 1.0, "seed": 3, "compiler": "eager"}
    with recorded_cycles() as cycles:
        generate(target, draft, PROMPT, max_new_tokens=10, **options)
    assert sum(cycle.resampled for cycle in cycles[:-1]) >= 1
    for cycle in cycles[:-1]:  # nothing is copied after the last
        rows = len(cycle.tokens)
        for model, state, unseen in ((target, cycle.target, 1), (draft, cycle.draft, 2)):
            tokens = torch.cat([PROMPT.expand(rows, -1), cycle.tokens[:, :-unseen]], 1)
            _, fresh = model.step(tokens, 0, model.initial_state(rows))
            for leaf, expected in zip(state[1:], fresh[1], strict=True):
                torch.testing.assert_close(leaf, expected, atol=1e-9, rtol=1e-9)
            following = cycle.tokens[:, -unseen:]
            actual, _ = model.step(following, tokens.shape[1], (state[0], state[1:]))
            expected, _ = model.step(following, tokens.shape[1], fresh)
            assert relative_error(actual, expected) < 1e-9


def test_the_refusal_of_a_recurrent_model_names_the_way_out() -> None:
    with pytest.raises(CacheError, match="OwnCache"):
        generate(wide("mamba").model, None, PROMPT, max_new_tokens=2, temperature=0, compiler="eager")


def test_with_a_compiler_the_step_stays_in_python() -> None:
    model = wide("mamba2")
    options = {"n_particles": 2, "lookahead": 2, "max_new_tokens": 4, "seed": 0}
    plain = generate(model, model, PROMPT, compiler="eager", **options)
    compiled = generate(model, model, PROMPT, compiler="aot_eager", **options)
    assert torch.equal(plain.particles, compiled.particles)
