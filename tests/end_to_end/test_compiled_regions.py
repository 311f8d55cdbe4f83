"""Regions compiled by Inductor, by AOT autograd and by Dynamo alone give what the plain functions give, and compile
once: another length, seed, prompt or prompt length finds them ready."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.model_parts import perturbed
from helpers.models import CACHEABLE
from helpers.toys import GRUStep
from torch import Tensor, nn
from torch._dynamo.utils import counters

from smc_compile import Generation, generate
from smc_compile.options import COMPILERS

VOCAB = 17
PROMPTS = torch.tensor([[5, 3, 11, 7], [1, 16, 0, 2]])
SMC_REGIONS = {"draft_head", "draft_step", "score", "weigh"}

Run = Callable[..., Generation]


@pytest.fixture(scope="module")
def pair() -> tuple[nn.Module, nn.Module]:
    target = CACHEABLE["llama"](vocab=VOCAB, layers=1).double()
    return target, perturbed(target, 0.3)


@pytest.fixture(scope="module")
def run(pair) -> Run:
    """Generations of the one pair, each program compiled at its first use."""

    def call(compiler: str, ids: Tensor = PROMPTS, n: Any = 12, seed: int = 3, **options: Any) -> Generation:
        given = {"max_new_tokens": n, "seed": seed, "compiler": compiler, "n_particles": 4, "lookahead": 2}
        cut = {"max_divergence": 0.3} if "method" not in options else {}
        return generate(*pair, ids, **{**given, **cut, **options})

    return call


def plain(run: Run, *args: Any, **options: Any) -> Generation:
    with torch.compiler.set_stance("force_eager"):
        return run("eager", *args, **options)


def compilations() -> tuple[int, ...]:
    """Graphs traced by Dynamo, and graphs that reached Inductor whether its cache knew them or not."""
    inductor = counters["inductor"]
    return counters["stats"]["unique_graphs"], sum(v for k, v in inductor.items() if k.startswith("fxgraph_cache_"))


def assert_same(a: Generation, b: Generation) -> None:
    """The same draws, and weights to rounding."""
    assert torch.equal(a.particles, b.particles)
    assert torch.equal(a.sequences, b.sequences)
    assert torch.equal(a.ancestors, b.ancestors)
    for name in ("log_weights", "log_evidence", "ess"):
        torch.testing.assert_close(getattr(a, name), getattr(b, name), atol=1e-5, rtol=0, equal_nan=True)


VARIATIONS = {
    "seed": {"seed": 4},
    "prompt": {"ids": PROMPTS.flip(0)},
    "longer prompt": {"ids": PROMPTS.repeat(1, 3)},
    "shorter prompt": {"ids": PROMPTS[:, :2]},
    "longer answer": {"n": 31},
    "shorter answer": {"n": 5},
    "no cycle": {"n": 1},
    "both": {"ids": PROMPTS.repeat(1, 2), "n": 20, "seed": 9},
}


SESSIONS = [name for name in COMPILERS if name != "max-autotune"]  # which is Inductor with one setting more


@pytest.mark.slow
@pytest.mark.parametrize("compiler", SESSIONS)
def test_compiled_equals_plain(run, compiler):
    result = run(compiler, n=31)
    assert result.stats.resamplings > 0, "or copies of states are not seen"
    assert result.stats.cuts > 0
    assert_same(result, plain(run, n=31))


@pytest.mark.slow
def test_compiled_speculation_draws_what_interpreted_speculation_draws(run):
    options = {"n": 9, "method": "speculative", "temperature": 0.8, "seed": 7}
    compiled, interpreted = run("inductor", **options), plain(run, **options)
    assert torch.equal(compiled.sequences, interpreted.sequences)
    torch.testing.assert_close(compiled.log_probs, interpreted.log_probs, atol=1e-9, rtol=0)


@pytest.mark.parametrize("compiler", SESSIONS)
def test_nothing_is_compiled_again(run, compiler):
    run(compiler)
    before = compilations()
    for name, variation in VARIATIONS.items():
        result = run(compiler, **variation)
        assert compilations() == before, name
        assert result.stats.compile_seconds == 0, name
        assert_same(result, plain(run, **variation))


METHODS: dict[str, dict[str, Any]] = {
    "speculative": {"method": "speculative"},
    "greedy with a draft": {"temperature": 0.0},
    "one token": {"method": "autoregressive"},
}


@pytest.mark.parametrize("method", METHODS)
def test_nothing_is_compiled_again_by_the_other_methods(run, method):
    """Two requests and one, before what varies; a batch of two then shrinks to one when its first has finished."""
    first = run("eager", **METHODS[method])
    run("eager", PROMPTS[:1], **METHODS[method])
    assert first.stats.method == ("autoregressive" if method == "one token" else "speculative")
    before = compilations()
    for name, variation in {**VARIATIONS, "requests that finish apart": {"n": [3, 20]}}.items():
        result = run("eager", **variation, **METHODS[method])
        assert compilations() == before, name
        assert result.stats.compile_seconds == 0, name
        assert_same(result, plain(run, **variation, **METHODS[method]))


@pytest.mark.parametrize("method", ["smc", "speculative", "one token"])
def test_one_row_compiles_once(run, method):
    """An axis of size one keeps the stride of what it was cut from, which another length changes: Dynamo sees it."""
    options = {"n_particles": 1, **METHODS.get(method, {})}
    run("eager", PROMPTS[:1], **options)
    before = compilations()
    for n in (31, 20):
        run("eager", PROMPTS[:1], n=n, **options)
        assert compilations() == before


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_a_prompt_of_one_token_is_right(run, compiler):
    """It may compile once more, since sizes 0 and 1 are special to Dynamo; with Inductor that would take a minute."""
    run(compiler)
    assert_same(run(compiler, PROMPTS[:, :1]), plain(run, PROMPTS[:, :1]))
    before = compilations()
    assert_same(run(compiler, PROMPTS[:, 2:3], n=9, seed=8), plain(run, PROMPTS[:, 2:3], n=9, seed=8))
    assert compilations() == before
    run(compiler)
    assert compilations() == before, "what was compiled for longer prompts is still there"


def test_weights_updated_in_place_need_no_compilation(run, pair):
    result, before = run("inductor"), compilations()
    weight = pair[0].head.weight
    saved = weight.detach().clone()
    with torch.no_grad():
        weight.mul_(1.5)
    try:
        updated = run("inductor")
        assert compilations() == before
        assert_same(updated, plain(run))
        assert not torch.equal(updated.particles, result.particles)
    finally:
        with torch.no_grad():
            weight.copy_(saved)


def test_regions_count_their_compilations_and_seconds(run, pair):
    program = run("inductor").program
    regions = {region.name: region for region in program.regions}
    assert set(regions) == SMC_REGIONS
    assert all(region.compilations >= 1 for region in regions.values())
    assert all(region.compile_seconds > 0 for region in regions.values())
    compiled = {name: (region.compilations, region.compile_seconds) for name, region in regions.items()}
    spent = {name: region.seconds for name, region in regions.items()}

    result = run("inductor")
    assert {name: (region.compilations, region.compile_seconds) for name, region in regions.items()} == compiled
    gained = {name: region.seconds - spent[name] for name, region in regions.items()}
    assert min(gained.values()) > 0
    assert result.stats.draft_seconds == pytest.approx(gained["draft_head"] + gained["draft_step"])
    assert result.stats.score_seconds == pytest.approx(gained["score"])
    assert sum(gained.values()) < result.stats.seconds


def test_a_first_call_reports_its_compilation():
    target = GRUStep(VOCAB)
    options = {"max_new_tokens": 8, "n_particles": 2, "lookahead": 2, "compiler": "eager", "seed": 0}
    first, second = (generate(target, perturbed(target), PROMPTS, **options) for _ in range(2))
    assert first.stats.compile_seconds > 0
    # another draft object is another program; the regions of the first do not serve it
    assert second.stats.compile_seconds > 0
    assert torch.equal(first.particles, second.particles)


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_a_stateful_pair_compiles_too(compiler):
    """Inductor sees the same graphs as aot_eager; one pair in this suite is enough."""
    target = GRUStep(VOCAB).double()
    draft = perturbed(target, 0.5)
    options = {"n_particles": 4, "lookahead": 2, "compiler": compiler, "ess_threshold": 0.9}
    result = generate(target, draft, PROMPTS, max_new_tokens=12, seed=3, **options)
    before = compilations()
    again = generate(target, draft, PROMPTS[:, :3], max_new_tokens=20, seed=4, **options)
    assert compilations() == before
    with torch.compiler.set_stance("force_eager"):
        assert_same(result, generate(target, draft, PROMPTS, max_new_tokens=12, seed=3, **options))
        assert_same(again, generate(target, draft, PROMPTS[:, :3], max_new_tokens=20, seed=4, **options))
    assert result.stats.resamplings > 0


@pytest.mark.parametrize("outer", ["long", "short"])
def test_a_streamer_may_generate(run, outer):
    """A prompt of one token has compiled code of its own, which must not serve the generation around it."""
    prompts = {"long": PROMPTS[:1], "short": PROMPTS[:1, :1]}
    expected = {name: run("eager", ids) for name, ids in prompts.items()}
    inner = "short" if outer == "long" else "long"
    found: list[Generation] = []

    def generate_once(_: object) -> None:
        if not found:
            found.append(run("eager", prompts[inner]))

    assert_same(run("eager", prompts[outer], streamer=generate_once), expected[outer])
    assert_same(found[0], expected[inner])
