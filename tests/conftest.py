"""Settings and fixtures of the whole suite."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from smc_compile.program import from_loop, from_model
from smc_compile.runtime.execution import incremental as models
from smc_compile.runtime.execution import region as compiled

# Models here are tiny: threads would only spin, and wait for cores that other processes use.
torch.set_num_threads(1)


@pytest.fixture
def interpreted() -> Iterator[None]:
    """Regions run as they are written, untraced: tests of distributions and states then start in a third of the time.

    That compiled regions give the same is the subject of test_compiled_regions.py.
    """
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.fixture
def untraced_regions(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The same where a loop must be traced: Dynamo sees the loop alone. Programs made so serve no other test."""
    for module in (compiled, models):
        monkeypatch.setattr(module, "compile_function", lambda function, *_: function)
    with from_model.programs.emptied(), from_loop.programs.emptied():
        yield


@pytest.fixture(scope="module")
def fresh_dynamo() -> Iterator[None]:
    """What other files compiled is forgotten, and so is what this one compiles."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
