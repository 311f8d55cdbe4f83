"""A target that contains the draft: the same distribution without noise, the acceptance asked for with it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from smc_compile.bench.contestants import plain_loop
from smc_compile.errors import OptionError
from smc_compile.pairs.llama import Llama, LlamaConfig
from smc_compile.pairs.nested import TEXT_ENTROPY, check_fits, set_head, tune_pair

TEMPERATURE = 0.8
DRAFT = LlamaConfig(500, 64, 2, 4, 2, 96, 128)
TARGETS = {
    "wider and deeper": LlamaConfig(500, 128, 4, 8, 4, 160, 128),
    "heads twice as wide": LlamaConfig(500, 128, 3, 4, 2, 160, 128),
    "smaller groups": LlamaConfig(500, 128, 2, 8, 8, 96, 128),
    "larger groups": LlamaConfig(500, 192, 3, 12, 2, 200, 128),
    "as deep as models are": LlamaConfig(500, 128, 32, 8, 4, 160, 128),
}


def pair(target: LlamaConfig, draft: LlamaConfig = DRAFT, dtype: torch.dtype = torch.float32) -> tuple[Llama, Llama]:
    torch.manual_seed(0)
    models = [Llama(config).to(dtype).eval().requires_grad_(False) for config in (target, draft)]
    return models[0], models[1]


def contexts(vocab: int, seed: int = 12345) -> Tensor:
    """Others than the ones that the rate was set on."""
    return torch.randint(0, vocab, (48, 40), generator=torch.Generator().manual_seed(seed))


def distributions(model: Llama, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.softmax(model(ids).double() / TEMPERATURE, -1)


@pytest.mark.parametrize("name", TARGETS)
def test_without_noise_the_target_is_the_draft(name):
    target, draft = pair(TARGETS[name])
    tune_pair(target, draft, 0.7, TEMPERATURE)
    set_head(target, draft, float(draft.norm.weight[0]), 0.0)
    ids = contexts(500)
    p, q = distributions(target, ids), distributions(draft, ids)
    assert float((p - q).abs().sum(-1).mean()) / 2 < 0.02  # total variation; a distribution has 2.5 nats


@pytest.mark.parametrize("acceptance", [0.5, 0.7, 0.9])
@pytest.mark.parametrize(("name", "dtype"), [("wider and deeper", torch.float32), ("larger groups", torch.bfloat16)])
def test_the_acceptance_is_what_was_asked_for(name, dtype, acceptance):
    target, draft = pair(TARGETS[name], dtype=dtype)
    tuned = tune_pair(target, draft, acceptance, TEMPERATURE)
    assert tuned.acceptance == pytest.approx(acceptance, abs=0.01)
    ids = contexts(500)
    accepted = torch.minimum(distributions(target, ids), distributions(draft, ids)).sum(-1).flatten()
    # Both sets of contexts are random, 512 and 1920 positions: four standard errors of the difference.
    tolerance = 0.01 + 4 * float(accepted.std()) * (1 / 512 + 1 / accepted.numel()) ** 0.5
    assert tolerance < 0.06
    assert float(accepted.mean()) == pytest.approx(acceptance, abs=tolerance)


def test_the_distribution_of_the_draft_has_the_entropy_of_text_and_depends_on_what_came_before():
    target, draft = pair(TARGETS["wider and deeper"])
    tuned = tune_pair(target, draft, 0.7, TEMPERATURE)
    q = distributions(draft, contexts(500))
    assert tuned.entropy == pytest.approx(TEXT_ENTROPY, abs=0.01)
    assert float(-(q * q.log()).sum(-1).mean()) == pytest.approx(TEXT_ENTROPY, abs=0.15)
    ids = contexts(500)[:, :8].clone()
    changed = ids.clone()
    changed[:, 2] = (ids[:, 2] + 1) % 500
    moved = (distributions(target, ids)[:, -1] - distributions(target, changed)[:, -1]).abs().sum(-1).mean()
    assert float(moved) > 0.02, "or the text is a chain of single tokens"


def test_a_draft_does_not_merely_repeat_the_last_token():
    target, draft = pair(TARGETS["wider and deeper"])
    tune_pair(target, draft, 0.7, TEMPERATURE)
    ids = contexts(500)
    for model in (target, draft):
        assert float(distributions(model, ids).gather(-1, ids[..., None]).mean()) < 0.1


def test_shapes_types_and_the_tied_head_stay():
    target, draft = pair(TARGETS["larger groups"], dtype=torch.bfloat16)
    before = [(p.shape, p.dtype, p.data_ptr()) for model in (target, draft) for p in model.parameters()]
    tune_pair(target, draft, 0.5, TEMPERATURE)
    assert [(p.shape, p.dtype, p.data_ptr()) for model in (target, draft) for p in model.parameters()] == before


def test_the_same_seed_gives_the_same_weights_and_another_does_not():
    tuned = []
    for seed in (1, 1, 2):
        target, draft = pair(TARGETS["wider and deeper"])
        tune_pair(target, draft, 0.7, TEMPERATURE, seed)
        tuned.append(target.layers[0].attention.wq.weight.clone())
    assert torch.equal(tuned[0], tuned[1])
    assert not torch.equal(tuned[0], tuned[2])


def test_the_acceptance_holds_along_the_models_own_text():
    target, draft = pair(TARGETS["wider and deeper"])
    tune_pair(target, draft, 0.7, TEMPERATURE)
    torch.manual_seed(0)
    with torch.no_grad():
        text = plain_loop(target, contexts(500)[:32, :8], 20, TEMPERATURE)
    accepted = torch.minimum(distributions(target, text), distributions(draft, text)).sum(-1)[:, 8:]
    assert float(accepted.mean()) == pytest.approx(0.7, abs=0.08)


@pytest.mark.parametrize(
    ("target", "named"),
    [
        (LlamaConfig(500, 64, 4, 4, 2, 160, 128), "width 64"),
        (LlamaConfig(500, 128, 1, 8, 4, 160, 128), "layers is 2"),
        (LlamaConfig(500, 128, 4, 8, 4, 64, 128), "hidden width is 96"),
        (LlamaConfig(500, 96, 4, 4, 2, 160, 128), "heads of 24"),
        (LlamaConfig(500, 128, 4, 8, 1, 160, 128), "4 heads (2 kv) do not fit into 8 (1 kv)"),
        (LlamaConfig(400, 128, 4, 8, 4, 160, 128), "500 tokens"),
    ],
)
def test_a_draft_that_does_not_fit_is_named(target, named):
    with pytest.raises(OptionError) as raised:
        check_fits(target, DRAFT)
    assert named in raised.value.why
    assert "--acceptance none" in raised.value.fix


def test_a_rate_that_rounding_hides_is_refused():
    target, draft = pair(TARGETS["wider and deeper"], dtype=torch.bfloat16)
    with pytest.raises(OptionError, match=r"0\.9999 cannot be reached"):
        tune_pair(target, draft, 0.9999, TEMPERATURE)
