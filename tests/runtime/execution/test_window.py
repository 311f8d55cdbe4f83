"""A window model against the model itself on the last tokens of every text, in blocks of any length."""

from __future__ import annotations

import pytest
import torch
from helpers.toys import TinyTransformerLM

from smc_compile.inputs.requests import build_request, request_seeds
from smc_compile.runtime.execution.window import WindowModel
from smc_compile.runtime.state.region_types import Places

V, W = 5, 4
MODEL = TinyTransformerLM(V).double()


@pytest.mark.parametrize("length", [1, 3, 4, 7])
@pytest.mark.parametrize("blocks", [(1, 1, 1), (3, 2), (5,)])
@torch.no_grad()
def test_every_token_is_read_behind_the_last_ones(length, blocks):
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(V, (2, length), generator=generator)
    request = build_request(prompts, 8, request_seeds(0, prompts))
    model = WindowModel(lambda ids: (MODEL(ids)[:, -1],), list, W, V)
    rows, _, state = model.begin(request, 3, 8)
    assert torch.allclose(rows, MODEL(prompts[:, -W:])[:, -1])
    text = prompts.repeat_interleave(3, 0)
    for size in blocks:
        tokens = torch.randint(V, (6, size), generator=generator)
        positions = (torch.arange(size) + text.shape[1]).expand(2, -1)
        places = Places(positions, torch.arange(size), positions)
        scored, after = model.score(tokens, places, state, ())
        last, state = model.advance(tokens, places, state, ())
        text = torch.cat([text, tokens], 1)
        ends = [text[:, : text.shape[1] - size + t + 1][:, -W:] for t in range(size)]
        expected = torch.stack([MODEL(end)[:, -1] for end in ends], 1)
        assert torch.allclose(scored.view(6, size, V), expected)
        assert torch.allclose(last, expected[:, -1])
        assert torch.equal(after[0], state[0])
