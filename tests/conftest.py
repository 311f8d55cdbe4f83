"""Settings and fixtures of the whole suite."""

from __future__ import annotations

import gc
import logging
import os
from collections.abc import Iterator

# Read when torch is imported, by this process and those that tests start. Each core has a process of pytest already:
# Inductor compiles in it, and starts no workers, which would import torch themselves.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
# Which vector instructions there are is taken from the processor, not from a trial compilation of each.
os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "1")

import pytest
import torch
import torch._dynamo.guards
from helpers.shared_traces import trace_structure_once

from smc_compile.program import from_loop, from_model
from smc_compile.runtime.execution import incremental as models
from smc_compile.runtime.execution import region as compiled

# Models here are tiny: threads would only spin, and wait for cores that other processes use.
torch.set_num_threads(1)
# After each compilation Dynamo empties the processor's caches to time the guards, and only logs the result.
torch._dynamo.guards.profile_guard_manager = lambda *_: 0.0
# pytest listens to loggers that do not propagate. Of this one torch asks whether anyone listens, and if so renders
# every graph for it.
logging.getLogger("torch.__trace").propagate = True


def pytest_collection_finish() -> None:
    """What is imported stays: the garbage collector need not look at it again while graphs are traced."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 20, 20)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests of one file with the same ``family`` run one after another: they share its trace within a process."""
    first: dict[object, int] = {}

    def place(item: pytest.Item) -> int:
        family = getattr(item, "callspec", None) and item.callspec.params.get("family")  # type: ignore[attr-defined]
        return first.setdefault((item.path, family) if family else item, len(first))

    items.sort(key=place)


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Regions run as they are written, untraced: tests of distributions and states then start in a third of the time.

    That compiled regions give the same is the subject of test_compiled_regions.py. Models of one structure are traced
    once: what a trace must hold is the subject of tests/passes.
    """
    monkeypatch.setattr("smc_compile.program.model.trace_model", trace_structure_once)
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
