"""300 samplers: any temperature, any truncation, drafts from near to far. Every call returns a text, no token is one
that the target would hardly write, and its log-probability is that of the library's own warpers on the plain model."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from helpers.model_parts import perturbed
from helpers.toys import TinyTransformerLM
from torch import Tensor

from smc_compile import Generation, generate

pytestmark = pytest.mark.usefixtures("interpreted")
transformers = pytest.importorskip("transformers")
VOCAB, SAMPLERS = 53, 30
TARGET = TinyTransformerLM(VOCAB, max_positions=64).double()
SCALES = [0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0, 1.5, 2.5, None]  # of the noise on the draft's weights; None: a stranger


def samplers(seed: int) -> list[dict[str, float]]:
    """Temperature 0.01 to 2, the rest in one of two; top-k 1 to 50, top-p 0.1 to 1, min-p up to 0.5."""
    draw = random.Random(seed)
    usual = {"top_k": 0, "top_p": 1.0, "min_p": 0.0}
    return [
        {
            "temperature": 10 ** draw.uniform(-2, 0.3),
            "top_k": draw.choice([draw.randint(1, 50), usual["top_k"]]),
            "top_p": draw.choice([draw.uniform(0.1, 1.0), usual["top_p"]]),
            "min_p": draw.choice([draw.uniform(0.0, 0.5), usual["min_p"]]),
        }
        for _ in range(SAMPLERS)
    ]


def warped(logits: Tensor, sampler: dict[str, float]) -> Tensor:
    """log-probabilities by the library's warpers, in its order."""
    steps = [transformers.TemperatureLogitsWarper(sampler["temperature"])]
    if sampler["top_k"]:
        steps.append(transformers.TopKLogitsWarper(int(sampler["top_k"])))
    if sampler["top_p"] < 1:
        steps.append(transformers.TopPLogitsWarper(sampler["top_p"]))
    if sampler["min_p"] > 0:
        steps.append(transformers.MinPLogitsWarper(sampler["min_p"]))
    for step in steps:
        logits = step(None, logits)
    return logits.log_softmax(-1)


@pytest.mark.parametrize("case", range(len(SCALES)))
@pytest.mark.parametrize("method", ["smc", "speculative"])
def test_every_call_returns_a_text_that_the_target_can_write(case: int, method: str) -> None:
    given, scale = samplers(case), SCALES[case]
    far = TinyTransformerLM(VOCAB, max_positions=64, seed=1).double()
    draft = far if scale is None else perturbed(TARGET, scale)
    options: dict[str, Any] = {name: [sampler[name] for sampler in given] for name in given[0]}
    cut = {"max_divergence": 0.35, "n_particles": 4} if method == "smc" else {"n_particles": 1}
    ids = torch.randint(VOCAB, (SAMPLERS, 4), generator=torch.Generator().manual_seed(case))
    g: Generation = generate(
        TARGET, draft, ids, max_new_tokens=20, method=method, lookahead=5, seed=case, compiler="eager",
        validate=False, **cut, **options,
    )  # fmt: skip
    assert g.log_probs.isfinite().all()
    assert g.log_probs.min() > -15
    assert method == "speculative" or g.log_evidence.isfinite().all()
    logits = TARGET(g.sequences)[:, 3:-1].detach()
    for b, sampler in enumerate(given):
        own = warped(logits[b], sampler).gather(1, g.sequences[b, 4:, None])[:, 0]
        torch.testing.assert_close(g.log_probs[b], own, atol=1e-6, rtol=0, msg=lambda m, s=sampler: f"{s}: {m}")
