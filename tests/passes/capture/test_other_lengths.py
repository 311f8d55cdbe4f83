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
        (lambda x: 2 * x, "at 2 positions the traced branch computes something else"),
        (lambda x: x + (x.shape[1] == 4), "at 4 positions"),
    ],
)
def test_a_branch_that_computes_something_else_is_refused(short, why: str) -> None:
    with pytest.raises(CacheError, match="another branch for some lengths of the text") as caught:
        export_then(lambda x: (x if x.shape[1] > 4 else short(x))[:, -1])
    assert why in caught.value.why
    assert "without a Python branch" in caught.value.fix


def test_a_branch_that_fails_for_short_sequences_is_refused() -> None:
    with pytest.raises(CacheError, match="another branch") as caught:
        export_then(lambda x: (x[:, :, :8] + x[:, 3:4] if x.shape[1] > 4 else x)[:, -1])
    assert "at 2 positions the traced branch fails" in caught.value.why


@pytest.mark.parametrize(
    ("branch", "at"),
    [
        (lambda length: length == 10, 10),
        (lambda length: length in (3, 9), 3),
        (lambda length: length % 9 == 0, 9),
        (lambda length: (length // 5) % 2 == 0, 2),
        (lambda length: length % 17 >= 14, 14),
        (lambda length: (length - 12) ** 2 <= 4, 10),
        (lambda length: (length - 9) * (length - 14) < 0, 10),
        (lambda length: length * 0.1 > 1.05, 11),
        (lambda length: 3 * length > 31, 11),
    ],
)
def test_a_branch_that_some_lengths_take_is_refused_at_the_first(branch, at: int) -> None:
    """The tracer sees one text, whose branch leaves a guard that bounds no length."""
    with pytest.raises(CacheError, match="another branch for some lengths") as caught:
        export_then(lambda x: (-x if branch(x.shape[1]) else x)[:, -1])
    assert f"at {at} positions" in caught.value.why


def test_where_the_model_itself_fails_its_positions_end() -> None:
    def then(x: torch.Tensor) -> torch.Tensor:
        if x.shape[1] % 9 == 0:
            raise ValueError("nine tokens")
        return x[:, -1]

    assert export_then(then).max_positions == 8


def test_a_branch_that_is_too_far_to_be_compared_bounds_the_text() -> None:
    lm = export_then(lambda x: (-x if x.shape[1] == 900 else x)[:, -1])
    assert lm.max_positions == 899
