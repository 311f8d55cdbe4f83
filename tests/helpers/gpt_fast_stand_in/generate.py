"""A loop with the interface of gpt-fast's."""

from __future__ import annotations

from typing import Any

import torch
from model import Transformer
from tokenizer import get_tokenizer
from torch import Tensor
from torch._inductor import config

config.coordinate_descent_tuning = True
ASKED = [get_tokenizer]


def decode_one_token(model: Transformer, x: Tensor, input_pos: Tensor, temperature: float) -> Tensor:
    return torch.multinomial(torch.softmax(model(x, input_pos)[:, -1] / temperature, -1), 1)


@torch.no_grad()
def generate(
    model: Transformer, prompt: Tensor, max_new_tokens: int, *, draft_model: Any, temperature: float, top_k: Any
) -> tuple[Tensor, dict[str, Any]]:
    assert draft_model is top_k is None
    text, first = prompt[None], len(prompt)
    x, position = text, torch.arange(first)
    for place in range(first, first + max_new_tokens):
        x = decode_one_token(model, x, position, temperature)
        text, position = torch.cat([text, x], 1), torch.tensor([place])
    return text[0], {}
