"""Regions on a device that is there: compared with eager, timed beside it and beside plain Inductor."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from smc_compile.dev.kernel_audit import time_copy_rows as time_copy_rows_file
from smc_compile.dev.kernel_audit import time_regions
from smc_compile.dev.kernel_audit.graph_recorder import BACKEND, RecordedGraph, recording
from smc_compile.dev.kernel_audit.recorded_sessions import AuditedPair
from smc_compile.dev.kernel_audit.time_copy_rows import time_copy_rows
from smc_compile.dev.kernel_audit.time_regions import in_turn, plain, time_region
from smc_compile.pairs.llama import LlamaConfig
from smc_compile.passes.lower.skinny_products import linear

CPU = torch.device("cpu")


@pytest.fixture(scope="module", autouse=True)
def small_flush() -> Iterator[None]:
    """What is timed here does not matter: caches need not be emptied."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(time_regions, "FLUSHED", 2**20)
        yield


@pytest.fixture(scope="module")
def recorded() -> RecordedGraph:
    """A product that has a kernel of ours, then work that Inductor fuses; it writes to its first argument."""

    def normalised(state: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        y = torch.softmax(linear(x, weight), -1)
        state.add_(y)
        return y * 2

    x, weight = torch.randn(8, 512), torch.nn.Parameter(torch.randn(512, 512), requires_grad=False)
    with recording() as record, torch.no_grad():
        torch.compile(normalised, backend=BACKEND, fullgraph=True)(torch.zeros(8, 512), x, weight)
    (found,) = record.found
    found.a_cycle = 3
    return found


@pytest.fixture(scope="module")
def timed(recorded: RecordedGraph) -> time_regions.Timed:
    return time_region(recorded, CPU, torch.float32)


def test_a_region_is_as_eager_and_has_three_times(timed) -> None:
    assert timed.passes
    assert (timed.calls, timed.verdict.runs) == (3, 1)
    assert min(timed.eager, timed.inductor, timed.ours) > 0


def test_kernels_of_inductor_and_ours_are_timed_by_name(timed) -> None:
    assert any("skinny_linear" in name for name in timed.kernels)
    assert any("fused" in name and "softmax" in name for name in timed.kernels)
    assert sum(timed.kernels.values()) <= 3 * timed.ours, "of one call, not of all rounds"


def test_events_of_the_profiler_have_the_names_of_the_listing() -> None:
    assert time_regions.kernel_name("graph_12_cpp_fused_add_3") == "cpp_fused_add_3"
    assert time_regions.kernel_name("triton_poi_fused_add_3") == "triton_poi_fused_add_3"
    assert time_regions.kernel_name("## Call CompiledFxGraph f3 ##") == time_regions.BETWEEN


def test_plain_is_without_kernels_of_ours(recorded) -> None:
    assert "smc_compile.skinny_linear" in recorded.graph.code
    assert "smc_compile" not in plain(recorded.graph).code
    assert "aten.linear" in plain(recorded.graph).code


def test_wrong_code_is_seen(recorded, monkeypatch) -> None:
    right = time_regions.compiled

    def wrong(graph, recorded, compiler):
        function = right(graph, recorded, compiler)
        return (lambda *args: [x + 1e-2 for x in function(*args)]) if graph is recorded.graph else function

    monkeypatch.setattr(time_regions, "compiled", wrong)
    found = time_region(recorded, CPU, torch.float32)
    assert not found.passes
    assert found.verdict.beyond > 0


def test_what_a_compiler_or_a_device_raises_is_told_and_no_more(recorded, monkeypatch) -> None:
    monkeypatch.setattr(time_regions, "prepared", lambda *_: 1 / 0)
    found = time_region(recorded, CPU, torch.float32)
    assert not found.passes
    assert found.verdict.problem == "ZeroDivisionError: division by zero"


def test_calls_take_turns_after_a_flush_each(monkeypatch) -> None:
    order: list[str] = []
    monkeypatch.setattr(time_regions, "flusher", lambda _: lambda: order.append("flush"))
    monkeypatch.setattr(time_regions, "ROUNDS", 2)
    times = in_turn([lambda: order.append("a"), lambda: order.append("b")], CPU)
    assert order == ["flush", "a", "flush", "b"] * 3
    assert len(times) == 2


def test_rows_that_are_copied_are_compared_and_timed(monkeypatch) -> None:
    config = LlamaConfig(500, 64, 1, 4, 2, 128, 64)
    pair = AuditedPair(config, config, "smc", 4, 3, 16, 0.8, 0, 1.0, torch.float32)
    found = time_copy_rows(pair, CPU)
    assert found.passes
    assert min(found.eager, found.inductor, found.ours) > 0
    monkeypatch.setattr(time_copy_rows_file, "RowCopy", lambda caches: lambda *_: None)
    assert not time_copy_rows(pair, CPU).passes
    monkeypatch.setattr(time_copy_rows_file, "RowCopy", lambda _: 1 / 0)
    assert time_copy_rows(pair, CPU).verdict.problem == "ZeroDivisionError: division by zero"
