"""What a session promises besides the distribution: it is reproducible, independent of the batch, its state follows its
tokens, and whatever breaks in the middle is reported with what was generated before."""

from __future__ import annotations

import copy
import itertools
import math

import pytest
import torch
from helpers.model_parts import perturbed
from helpers.models import CACHEABLE
from helpers.replicates import recorded_cycles, replicate
from helpers.toys import TableLM, TinyTransformerLM
from torch import Tensor, nn

from smc_compile import Generation, generate
from smc_compile.errors import GenerationError

pytestmark = pytest.mark.usefixtures("interpreted")

VOCAB = 5
PROMPTS = torch.tensor([[1, 0, 2], [3, 3, 4], [0, 4, 1], [2, 1, 0]])
OPTIONS = {"n_particles": 6, "lookahead": 2, "ess_threshold": 0.9, "compiler": "eager", "validate": False}
METHODS = ("smc", "autoregressive")


class TopK(nn.Module):
    """A target that truncates: only the k most likely tokens can be drawn."""

    def __init__(self, model: nn.Module, k: int):
        super().__init__()
        self.model, self.k = model, k

    def forward(self, ids: Tensor) -> Tensor:
        logits = self.model(ids)
        return logits.masked_fill(logits < logits.topk(self.k).values[..., -1:], -math.inf)


@pytest.fixture(scope="module")
def pair() -> tuple[nn.Module, nn.Module]:
    target = TinyTransformerLM(VOCAB, max_positions=64).double()
    return target, perturbed(target, 0.5)


@pytest.fixture(scope="module")
def truncated(pair) -> tuple[nn.Module, nn.Module]:
    return TopK(TableLM(VOCAB).double(), 2), perturbed(TableLM(VOCAB).double(), 0.5)


def run(pair, ids: Tensor = PROMPTS, n: int = 12, **options) -> Generation:
    return generate(*pair, ids, max_new_tokens=n, **{"seed": 7, **OPTIONS, **options})


def assert_same(a: Generation, b: Generation) -> None:
    for name in ("sequences", "particles", "log_weights", "log_evidence", "ess", "ancestors"):
        torch.testing.assert_close(getattr(a, name), getattr(b, name), rtol=0, atol=0, equal_nan=True, msg=name)


# --- seeds and batches ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_a_seed_reproduces_the_result_and_another_seed_does_not(pair, method):
    first = run(pair, method=method)
    torch.manual_seed(1)  # the global generator plays no part
    assert_same(first, run(pair, method=method))
    assert not torch.equal(first.sequences, run(pair, method=method, seed=8).sequences)


def test_without_a_seed_the_global_generator_decides(pair):
    torch.manual_seed(0)
    first, second = run(pair, seed=None), run(pair, seed=None)
    torch.manual_seed(0)
    assert_same(first, run(pair, seed=None))
    assert not torch.equal(first.sequences, second.sequences)


@pytest.mark.parametrize("seed", [-(2**63), -1, 2**62, 2**63 - 1])
def test_every_signed_seed_is_good(pair, seed):
    g = run(pair, seed=seed)
    assert g.sequences.max() < VOCAB
    assert not torch.equal(g.sequences, run(pair, seed=7).sequences)


@pytest.mark.parametrize("options", [{}, {"eos_token_id": 2}, {"method": "autoregressive", "eos_token_id": 2}])
def test_a_request_does_not_depend_on_the_rest_of_the_batch(pair, options):
    together = run(pair, n=14, **options)
    for b in range(len(PROMPTS)):
        alone = run(pair, PROMPTS[b : b + 1], n=14, **{**options, "seed": 7 + b})
        assert torch.equal(alone.particles[0], together.particles[b])
        assert torch.equal(alone.sequences[0], together.sequences[b])
        torch.testing.assert_close(alone.log_weights[0], together.log_weights[b], atol=1e-9, rtol=0)
        torch.testing.assert_close(alone.log_evidence[0], together.log_evidence[b], atol=1e-9, rtol=0)


def test_a_request_does_not_depend_on_the_dropped_blocks_of_others(truncated):
    options = {"n_particles": 2, "lookahead": 3}
    together = run(truncated, **options)
    dropped = []
    for b in range(len(PROMPTS)):
        alone = run(truncated, PROMPTS[b : b + 1], **{**options, "seed": 7 + b})
        assert torch.equal(alone.particles[0], together.particles[b])
        torch.testing.assert_close(alone.log_evidence[0], together.log_evidence[b], atol=1e-9, rtol=0)
        dropped.append(alone.stats.dropped)
    assert sum(dropped) == together.stats.dropped
    assert len(set(dropped)) > 1, "requests must differ in them, or this test sees nothing"


# --- state ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["one_layer_one_head", "llama", "sliding_window"])
def test_after_resampling_the_caches_are_those_of_the_surviving_tokens(kind):
    """Slot by slot, against a fresh prefill of prompt and tokens. The target has seen all tokens but the pending one;
    the draft has not seen the last drafted one either."""
    target = CACHEABLE[kind](vocab=VOCAB).double()
    pair = target, perturbed(target, 0.5)
    with recorded_cycles() as cycles:
        program = run(pair, n=13).program
    prompts = PROMPTS.repeat_interleave(OPTIONS["n_particles"], 0)  # [R, P]
    assert sum(cycle.resampled for cycle in cycles[:-1]) >= 2
    for cycle in cycles[:-1]:  # nothing is copied after the last
        for model, state, unseen in ((program.target, cycle.target, 1), (program.draft, cycle.draft, 2)):
            ids = torch.cat([prompts, cycle.tokens[:, :-unseen]], 1)
            _, *caches = model.runtime._graphs.prefill(ids, *model.runtime.weights())
            assert len(caches) == len(state) > 0
            for fresh, suffix in zip(caches, state, strict=True):
                fresh = fresh[:, :, prompts.shape[1] :]  # [R, H, S, d]
                torch.testing.assert_close(suffix[:, :, : fresh.shape[2]], fresh, atol=1e-9, rtol=0)


def test_after_resampling_the_end_of_a_sequence_is_that_of_the_surviving_tokens():
    """A live particle that takes the place of an ended one goes on."""
    target = TableLM(VOCAB).double()
    with recorded_cycles() as cycles:
        run((target, perturbed(target)), PROMPTS.repeat(8, 1), n=13, ess_threshold=1.0, eos_token_id=0)
    assert sum(cycle.resampled for cycle in cycles) >= 2
    assert 0 < sum(cycle.ended.double().mean() for cycle in cycles) < len(cycles)
    for cycle in cycles:
        assert torch.equal(cycle.ended, (cycle.tokens[:, :-1] == 0).any(1))


@pytest.mark.parametrize("method", METHODS)
def test_weights_are_read_at_every_call(pair, method):
    """In place, as an optimizer does it, and by a new nn.Parameter."""
    target, draft = copy.deepcopy(pair[0]), copy.deepcopy(pair[1])
    before = run((target, draft), method=method)
    with torch.no_grad():
        target.embed.weight.mul_(1.5)
    after = run((target, draft), method=method)
    fresh = copy.deepcopy(target), copy.deepcopy(draft)
    assert not torch.equal(before.particles, after.particles)
    assert_same(after, run(fresh, method=method))

    target.head.weight = nn.Parameter(target.head.weight.detach() * 1.5)
    replaced = run((target, draft), method=method)
    assert not torch.equal(replaced.particles, after.particles)
    assert_same(replaced, run((copy.deepcopy(target), copy.deepcopy(draft)), method=method))


def test_a_draft_update_is_seen_too(pair):
    target, draft = copy.deepcopy(pair[0]), copy.deepcopy(pair[1])
    before = run((target, draft), ess_threshold=0.0)
    draft.load_state_dict(target.state_dict())
    after = run((target, draft), ess_threshold=0.0)
    assert before.log_weights.abs().max() > 0.01
    assert after.log_weights.abs().max() < 1e-9


# --- what breaks ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("eos", [None, 0])
def test_nan_in_the_middle_raises_with_what_was_generated(pair, method, eos):
    """The embedding of one token is NaN: everything is fine until it is drawn. No resampling: particles keep places."""
    target, draft = copy.deepcopy(pair[0]), pair[1]
    options = {"method": method, "ess_threshold": 0.0, "eos_token_id": eos, "n": 40, "ids": PROMPTS[:1, :1]}
    good = run((target, draft), **options)
    with torch.no_grad():
        target.embed.weight[3] = math.nan
    with pytest.raises(GenerationError, match="target's logits are NaN") as error:
        run((target, draft), **options)
    partial = error.value.partial
    generated = partial.sequences.shape[1]
    assert 1 < generated < 41
    assert torch.equal(partial.particles, good.particles[:, :, :generated])
    assert partial.stats.new_tokens == generated - 1
    assert (partial.particles[:, :, :-1] != 3).all() or method == "smc"
    assert f"generated token {generated - 1}" in str(error.value)


def test_nan_logits_of_the_draft_in_the_middle_raise_too(pair):
    target, draft = pair[0], copy.deepcopy(pair[1])
    options = {"n": 40, "ids": PROMPTS[:1, :1], "ess_threshold": 0.0}
    good = run((target, draft), **options)
    with torch.no_grad():
        draft.embed.weight[3] = math.nan
    with pytest.raises(GenerationError, match="draft's logits are NaN") as error:
        run((target, draft), **options)
    partial = error.value.partial
    assert torch.equal(partial.particles, good.particles[:, :, : partial.particles.shape[2]])


@pytest.mark.parametrize("who", [0, 1])
def test_nan_at_the_prompt_raises_before_any_token(pair, who):
    models = [copy.deepcopy(model) for model in pair]
    run(models, n=2)
    with torch.no_grad():
        models[who].head.bias[0] = math.nan
    with pytest.raises(GenerationError, match=("target", "draft")[who]) as error:
        run(models, n=2)
    assert error.value.partial is None


def test_nan_after_the_end_of_sequence_does_not_matter():
    target = TableLM(VOCAB).double()
    pair, options = (target, perturbed(target)), {"n": 12, "eos_token_id": 3, "ids": torch.tensor([[1], [2]])}
    good = run(pair, **options)
    assert (good.particles == 3).any()
    with torch.no_grad():
        target.table[3] = math.nan
    assert_same(good, run(pair, **options))


def test_a_draft_that_proposes_only_forbidden_tokens_leaves_each_token_to_the_target():
    target, draft = TableLM(4).double(), TableLM(4, seed=1).double()
    with torch.no_grad():
        target.table[:, :2] = -math.inf
        draft.table[:, 2:] = -math.inf
    g = run((target, draft), torch.tensor([[2, 3], [3, 3]]), 7)
    assert (g.particles[:, :, 2:] >= 2).all()
    assert (g.stats.cycles, g.stats.dropped) == (6, 12)
    assert g.stats.warnings


def test_a_truncating_target_never_leaves_its_support(truncated):
    target, draft = truncated
    g = replicate(target, draft, PROMPTS[0], 9, 256, n_particles=2, lookahead=3)
    assert 0 < g.stats.dropped < 256 * g.stats.cycles
    with torch.no_grad():
        log_p = target(g.sequences).log_softmax(-1)[:, 2:-1]
    assert (log_p.gather(-1, g.sequences[:, 3:, None]) > -math.inf).all()
    assert (g.log_weights > -math.inf).any(1).all()


# --- shapes and bookkeeping ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "n", "lookahead"), [(3, 1, 2), (1, 1, 1), (1, 6, 2), (1, 2, 9), (3, 4, 9), (2, 8, 7), (2, 9, 7)]
)
def test_every_length_works(pair, prompt, n, lookahead):
    """n=1 needs no draft token; a prompt of one token; a lookahead beyond the end; lengths around a whole cycle."""
    g = run(pair, PROMPTS[:, :prompt], n, lookahead=lookahead)
    cycles = math.ceil((n - 1) / (lookahead + 1))
    assert g.sequences.shape == (4, prompt + n)
    assert g.particles.shape == (4, 6, prompt + n)
    assert g.ess.shape == (4, cycles)
    assert g.ancestors.shape == (4, cycles, 6)
    assert torch.equal(g.sequences[:, :prompt], PROMPTS[:, :prompt])
    assert (g.particles[:, :, :prompt] == PROMPTS[:, None, :prompt]).all()
    assert (g.stats.new_tokens, g.stats.cycles) == (n, cycles)
    assert (g.particles == g.sequences[:, None]).all(-1).any(-1).all(), "the answer is one of the particles"


@pytest.mark.parametrize("n", [1, 2, 7])
def test_every_length_works_autoregressively(pair, n):
    g = run(pair, PROMPTS[:, :1], n, method="autoregressive")
    assert g.sequences.shape == (4, 1 + n)
    assert torch.equal(g.particles[:, 0], g.sequences)
    assert (g.log_weights == 0).all()
    assert (g.log_evidence == 0).all()


def test_a_shorter_answer_is_a_prefix_of_a_longer_one(pair):
    """Without resampling, up to the weights: tokens beyond the length cap add none, and draw nothing else."""
    short, long = (run(pair, n=n, ess_threshold=0.0) for n in (5, 12))
    assert torch.equal(short.particles, long.particles[:, :, : 3 + 5])


@pytest.mark.parametrize("threshold", [0.0, 0.9, 1.0])
def test_stats_add_up(pair, threshold):
    g = run(pair, n=20, ess_threshold=threshold)
    s = g.stats
    assert (s.method, s.new_tokens, s.cycles, s.dropped) == ("smc", 20, 7, 0)
    assert s.resamplings == int((g.ess < threshold * 6 * (1 - 1e-9)).sum())
    assert ((g.ancestors != torch.arange(6)).any(-1) <= (g.ess < threshold * 6)).all()
    assert ((g.ess >= 1 - 1e-9) & (g.ess <= 6 + 1e-9)).all()
    parts = (s.prefill_seconds, s.draft_seconds, s.score_seconds, s.resample_seconds, s.host_seconds)
    assert min(parts) > 0
    assert sum(parts) == pytest.approx(s.seconds)
    assert s.compile_seconds == 0


def test_particles_that_share_an_ancestor_share_its_tokens(pair):
    g = run(pair, n=20, ess_threshold=1.0)
    prompt, width = PROMPTS.shape[1], OPTIONS["lookahead"] + 1
    shared = 0
    for b, ancestors in enumerate(g.ancestors):
        place = torch.arange(OPTIONS["n_particles"])
        for cycle in reversed(range(g.stats.cycles)):
            place = ancestors[cycle, place]  # where each final particle stood before this cycle's resampling
            generated = prompt + 1 + (cycle + 1) * width
            for i, j in itertools.combinations(range(len(place)), 2):
                if place[i] == place[j]:
                    shared += 1
                    assert torch.equal(g.particles[b, i, :generated], g.particles[b, j, :generated])
    assert shared > 0


def test_final_weights_are_those_of_the_tokens(pair):
    """Without resampling the weight of a particle is p/q over its drafted tokens, computed here without any cache."""
    target, draft = pair
    g = run(pair, n=9, lookahead=3, ess_threshold=0.0)  # drafted: tokens 1-3 and 5-7; 0, 4 and 8 are the target's
    ids = g.particles.flatten(0, 1)
    drafted = torch.tensor([4, 5, 6, 8, 9, 10])
    with torch.no_grad():
        p, q = (model(ids).log_softmax(-1)[:, drafted - 1] for model in (target, draft))
    chosen = ids[:, drafted, None]
    expected = (p.gather(-1, chosen) - q.gather(-1, chosen)).sum((1, 2)).view(4, -1)
    torch.testing.assert_close(g.log_weights, expected, atol=1e-9, rtol=0)
    torch.testing.assert_close(g.log_evidence, expected.logsumexp(-1) - math.log(6), atol=1e-9, rtol=0)
