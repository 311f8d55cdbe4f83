"""A branch on the length of the text: refused where short texts would be computed otherwise than long ones."""

from __future__ import annotations

import pytest
import torch
from helpers.traces import Step, export_then, rows_of, tokens

from smc_compile.errors import CacheError
from smc_compile.passes.pipeline import capture


def test_a_branch_that_computes_the_same_for_short_sequences_is_fine() -> None:
    """As for a window that is cut only where it is shorter than the text."""
    step = Step(lambda x: (x.clamp(max=1e6) if x.shape[1] > 4 else x)[:, -1])
    lm, owned = capture(step, tokens(2, 2))
    torch.testing.assert_close(rows_of(lm, tokens(2, 3), owned()), step(tokens(2, 3)).detach())


@pytest.mark.parametrize(
    ("short", "why"),
    [
        (lambda x: 2 * x, "at 2 positions the branch of longer ones computes something else"),
        (lambda x: x + (x.shape[1] == 4), "at 4 positions"),
    ],
)
def test_a_branch_that_computes_something_else_is_refused(short, why: str) -> None:
    with pytest.raises(CacheError, match="another branch for short sequences") as caught:
        export_then(lambda x: (x if x.shape[1] > 4 else short(x))[:, -1])
    assert why in caught.value.why
    assert "without a Python branch" in caught.value.fix


def test_a_branch_that_fails_for_short_sequences_is_refused() -> None:
    with pytest.raises(CacheError, match="another branch") as caught:
        export_then(lambda x: (x[:, :, :8] + x[:, 3:4] if x.shape[1] > 4 else x)[:, -1])
    assert "at 2 positions the branch of longer ones fails" in caught.value.why
