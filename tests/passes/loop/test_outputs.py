"""Outputs are put together from prompt and tokens."""

from __future__ import annotations

import pytest
import torch

from smc_compile.passes.loop.outputs import OutputLayout


@pytest.mark.parametrize(
    ("layout", "shape", "first"),
    [
        (OutputLayout(("prompt", "tokens")), (2, 5), [0, 1, 2, 10, 11]),
        (OutputLayout(("tokens",), ("time", "batch")), (2, 2), [10, 20]),
        (OutputLayout(("tokens",), ("batch", "time", "one"), dtype=torch.int32), (2, 2, 1), [10, 11]),
        (OutputLayout(("tokens",), padding=(7, 8)), (2, 4), [10, 11, 7, 8]),
    ],
)
def test_build(layout, shape, first):
    prompt, tokens = torch.tensor([[0, 1, 2], [3, 4, 5]]), torch.tensor([[10, 11], [20, 21]])
    built = layout.build(prompt, tokens)
    assert built.shape == shape
    assert built.dtype == layout.dtype
    assert built[0].flatten().tolist() == first
