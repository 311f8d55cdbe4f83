"""What the tests of whole generations share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture
def interpreted() -> Iterator[None]:
    """Regions run as they are written, untraced: tests of laws and states then start in a third of the time.

    That compiled regions give the same is the subject of test_compiled_regions.py.
    """
    with torch.compiler.set_stance("force_eager"):
        yield
