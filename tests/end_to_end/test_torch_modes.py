"""Torch's modes change what a model computes: a call inside of one gives what the model gives there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import pytest
import torch
from helpers.models import CACHEABLE
from torch import Tensor, nn

import smc_compile

PROMPT = torch.tensor([[3, 1, 4, 1, 5]])


def modes(name: str) -> AbstractContextManager[object]:
    return {
        "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
        "inference mode": torch.inference_mode,
        "another default dtype": lambda: default_dtype(torch.float64),
    }[name]()


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


class Making(nn.Module):
    """Makes a tensor in its forward: its dtype is the default one."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = CACHEABLE["gpt"](layers=1)

    def forward(self, ids: Tensor) -> Tensor:
        return self.inner(ids) + torch.linspace(0, 3e7, 17).sin()


@pytest.mark.parametrize("name", ["autocast", "inference mode", "another default dtype"])
def test_a_mode_of_torch_is_seen_and_left(name: str) -> None:
    model = Making().eval()
    outside = compiled(model)
    assert torch.equal(outside, eager(model, PROMPT))
    for _ in range(2):
        with modes(name):
            assert torch.equal(compiled(model), eager(model, PROMPT))
        assert torch.equal(compiled(model), outside)


def eager(model: nn.Module, ids: Tensor) -> Tensor:
    with torch.no_grad():
        for _ in range(6):
            ids = torch.cat([ids, model(ids)[:, -1].argmax(-1, keepdim=True)], 1)
    return ids


def compiled(model: nn.Module) -> Tensor:
    return smc_compile.generate(
        model, None, PROMPT, max_new_tokens=6, temperature=0, compiler="aot_eager", validate=False
    ).sequences
