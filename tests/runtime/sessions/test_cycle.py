"""The cycle as a function: the same arguments give the same results, and a cycle that broke leaves no trace."""

from __future__ import annotations

import math

import pytest
import torch
from helpers.model_parts import perturbed
from helpers.toys import TinyTransformerLM
from torch import Tensor
from torch.utils import _pytree as pytree

from smc_compile import generate
from smc_compile.inputs.requests import build_request, settings_of
from smc_compile.runtime.execution.region import Region
from smc_compile.runtime.execution.region_bodies import Judged
from smc_compile.runtime.sessions import smc
from smc_compile.runtime.sessions.cycle import EndOfCycle, Status, Uniforms, end_of_cycle
from smc_compile.runtime.state.particles import ENDLESS, Particles, Weights
from smc_compile.runtime.state.region_types import EosIds

B, N, K = 2, 3, 2
R = B * N
EOS = 9


def end(
    increments: Tensor, tokens: Tensor, undefined: Tensor | None = None, state: Tensor | None = None
) -> tuple[EndOfCycle, Particles, Weights]:
    """A cycle of which every particle got these increments [R] and tokens [R, K+1], and what it began with."""
    never = torch.zeros(R, dtype=torch.bool)
    particles = Particles.unconditioned(never, torch.full((R,), ENDLESS))
    shared = torch.zeros(B, N, N, dtype=torch.int64)
    none = torch.zeros(B, dtype=torch.int64)
    weights = Weights(torch.zeros(B, N).double(), torch.zeros(B).double(), shared, none)
    over = torch.zeros(R, K + 1, dtype=torch.bool)
    undefined = never if undefined is None else undefined
    whole, dropped = torch.full((B,), K + 1), torch.zeros(B, dtype=torch.bool)
    judged = Judged(increments, tokens, torch.zeros(R, K + 1), over, undefined, whole, dropped, state)
    eos_ids = EosIds(torch.full((R, 1), EOS), torch.full((R,), EOS))
    log_w, caps = weights.log_w + increments.view(B, N), torch.tensor([40, 40])
    u, generated = torch.full((B, N), 0.5).double(), torch.tensor([4, 4])
    ended = end_of_cycle(0.5, "systematic")(log_w, judged, never, particles, weights, eos_ids, caps, generated, u)
    return ended, particles, weights


def test_a_degenerate_population_goes_on_with_its_one_particle():
    increments = torch.tensor([-math.inf, 0.0, -math.inf, 0.0, 0.0, 0.0]).double()
    tokens = torch.tensor([[1, 1, 1], [2, 2, EOS], [3, 3, 3], [4, 4, EOS], [5, 5, EOS], [6, 6, 6]])
    ended, *_ = end(increments, tokens)
    assert ended.source.tolist() == [1, 1, 1, 3, 4, 5]
    assert ended.since.tolist() == [0] * R, "nothing was known to be in common"
    assert ended.weights.shared[0].tolist() == [[4 + K] * N] * N, "all slots that hold anything"
    assert ended.weights.log_w.tolist() == [[0.0] * N] * B
    torch.testing.assert_close(ended.weights.log_evidence, torch.tensor([-math.log(N), 0.0]).double())
    status = Status(*ended.status)
    assert status.sound
    assert status.resampled.tolist() == [1, 0]
    assert status.generated.tolist() == [4 + K + 1] * B
    assert status.finished.tolist() == [1, 0], "all three go on with a text that ends with its pending token"


def test_a_population_that_no_text_fits_ends_where_it_stood():
    """With an automaton: the other request goes on, in the states of its particles' ancestors."""
    increments = torch.tensor([-math.inf] * N + [0.0, -math.inf, 0.0]).double()
    ended, *_ = end(increments, torch.full((R, K + 1), 1), state=torch.arange(R))
    status = Status(*ended.status)
    assert status.sound
    assert status.dead.tolist() == [0, 0]
    assert status.finished.tolist() == [1, 0]
    assert ended.particles.length[:N].tolist() == [4] * N
    assert ended.particles.ended.tolist() == [True] * N + [False] * N
    assert ended.weights.log_w[0].tolist() == [-math.inf] * N
    assert ended.particles.automaton.tolist() == ended.source.tolist()


@pytest.mark.parametrize("broken", ["dead", "undefined", "undefined_draft"])
def test_a_cycle_that_does_not_count_changes_nothing(broken):
    increments = torch.zeros(R).double()
    increments[1] = -math.inf  # alone it would be resampled away
    undefined = torch.zeros(R, dtype=torch.bool)
    if broken == "dead":
        increments[N:] = -math.inf
    elif broken == "undefined":
        undefined[N] = True
    else:
        increments[N] = math.nan
    ended, particles, weights = end(increments, torch.full((R, K + 1), EOS), undefined)
    status = Status(*ended.status)
    assert not status.sound
    assert getattr(status, broken).tolist() == [0, 1]
    assert status.generated.tolist() == [4, 4]
    assert not status.resampled.any()
    assert not status.finished.any()
    assert ended.source.tolist() == list(range(R))
    for after, before in ((ended.particles, particles), (ended.weights, weights)):
        assert all(map(torch.equal, after, before))


@pytest.mark.usefixtures("interpreted")
def test_a_cycle_may_be_run_again_from_the_same_state():
    """It writes only where nothing is read before it counts."""
    target = TinyTransformerLM(5, max_positions=64).double()
    options = {"n_particles": N, "lookahead": K, "compiler": "eager", "validate": False}
    prompts = torch.tensor([[1, 0, 2], [3, 3, 4]])
    generation = generate(target, perturbed(target, 0.5), prompts, max_new_tokens=2, seed=1, **options)
    session = generation.program.session
    request = build_request(prompts, 13, torch.tensor([1, 2]), settings=settings_of(2, temperature=1.0))
    running = session.cycles(request)
    next(running)
    run = next(running)
    state = run.p.state
    before = pytree.tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, state)
    cycle = session._cycle(run)
    uniforms = [
        Uniforms(*run.streams.cycle(state.generated, K, torch.full((B,), dropped)), run.streams.resample(1))
        for dropped in (0, 1)
    ]
    with torch.no_grad():
        first, other, again = (
            pytree.tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, cycle(state, u))
            for u in (uniforms[0], uniforms[1], uniforms[0])
        )
    generated = run.p.generated
    written = slice(generated, generated + K + 1)
    assert not torch.equal(first[0].texts.tokens[:, written], other[0].texts.tokens[:, written])
    for one, two in zip(pytree.tree_leaves(first), pytree.tree_leaves(again), strict=True):
        assert torch.equal(one, two) if isinstance(one, Tensor) else one == two
    for now, then in ((state.particles, before.particles), (state.weights, before.weights)):
        assert all(map(torch.equal, now, then))
    for now, then in zip(state.texts, before.texts, strict=True):
        assert torch.equal(now[:, :generated], then[:, :generated])


# ---- how far a block is drafted --------------------------------------------------------------------------------------


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("method", ["smc", "speculative"])
@pytest.mark.parametrize("texts", [{"max_new_tokens": 10}, {"max_new_tokens": 60, "eos_token_id": [1, 4]}], ids=str)
def test_a_block_is_drafted_no_further_than_its_texts_go(method, texts, monkeypatch):
    """The last wanted token, or an end of all texts, saves calls of the draft and changes nothing."""
    target = TinyTransformerLM(5, max_positions=80).double()
    draft, prompts = perturbed(target), torch.tensor([[1, 0, 2], [3, 3, 1]])
    options = {"lookahead": 6, "n_particles": 3, "seed": 6, "compiler": "eager", "validate": False, **texts}
    calls = []
    call = Region.__call__

    def counted(self: Region, *args):
        calls.append(self.name)
        return call(self, *args)

    monkeypatch.setattr(Region, "__call__", counted)
    short = generate(target, draft, prompts, method=method, **options)
    drafted = sum(name.startswith("draft_") for name in calls)
    assert 0 < drafted < 6 * short.stats.cycles
    if method == "smc":
        calls.clear()
        monkeypatch.setattr(smc, "enough_for", lambda run: lambda at, k: False)
        whole = generate(target, draft, prompts, method=method, **options)
        assert sum(name.startswith("draft_") for name in calls) == 6 * whole.stats.cycles
        assert torch.equal(short.particles, whole.particles)
        assert torch.equal(short.log_weights, whole.log_weights)
        assert torch.equal(short.log_evidence, whole.log_evidence)
