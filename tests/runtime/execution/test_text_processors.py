"""Text processors that a request brings are that request's alone."""

from __future__ import annotations

import pytest
import torch
from helpers.model_parts import perturbed
from helpers.toys import TinyTransformerLM

from smc_compile import generate
from smc_compile.inputs.requests import build_request, settings_of

VOCAB = 5
PROMPT = torch.tensor([[1, 0, 2]])


class Only:
    """Leaves two tokens, and prefers the one that was not said last. It counts its calls, so it runs on the host."""

    def __init__(self, *tokens: int) -> None:
        self.tokens, self.calls = tokens, 0

    def __call__(self, text: torch.Tensor, scores: torch.Tensor, rows: object = None) -> torch.Tensor:
        self.calls += 1
        kept = torch.full_like(scores, -torch.inf)
        for row, last in enumerate(text[:, -1].tolist()):
            for token in self.tokens:
                kept[row, token] = scores[row, token] - float(token == last)
        return kept


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("method", ["smc", "autoregressive"])
def test_calls_under_way_together_keep_to_their_own(method):
    target = TinyTransformerLM(VOCAB, max_positions=64).double()
    options = {"compiler": "eager", "validate": False, "method": method}
    options |= {"n_particles": 3, "lookahead": 2} if method == "smc" else {}
    models = (target, perturbed(target, 0.5)) if method == "smc" else (target,)
    out = generate(*models, input_ids=PROMPT, max_new_tokens=2, seed=0, logits_processor=[Only(0, 1)], **options)
    assert out.stats.rules == ["Only: on the host, once a position, on target and draft"]
    session = out.program.session
    seeds, settings = torch.tensor([3]), settings_of(1, temperature=1.0)
    requests = [
        build_request(PROMPT, 13, seeds, settings=settings, text_processors=(Only(*tokens),))
        for tokens in ((0, 1), (2, 4))
    ]
    for first, second in zip(*map(session.cycles, requests), strict=True):
        runs = first, second
    for run, tokens in zip(runs, ({0, 1}, {2, 4}), strict=True):
        assert set(run.result(True).particles[:, :, 3:].flatten().tolist()) <= tokens
        assert run.text_processors.seconds > 0
