"""Regions: what they compile with, when Dynamo's guards are checked, and that threads and runs do not meet."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from smc_compile.options import COMPILERS
from smc_compile.runtime.execution.region import Region, begin_run, compile_function, with_own_run


def scaled(x: Tensor, factor: float) -> Tensor:
    """Dynamo compiles for one factor: unless guards are checked, code for another one answers."""
    return x * factor


ONES = torch.ones(3)


def factor_of(region: Callable[..., Tensor], factor: float) -> float:
    """The factor that a region multiplies by when it is asked for this one."""
    return float(region(ONES, factor)[0])


@pytest.fixture
def region() -> Region:
    return Region("scaled", scaled, "eager")


def in_fresh_thread(function: Callable[[], Any]) -> Any:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function).result()


def test_a_thread_that_began_no_run_checks_guards_at_every_call(region):
    assert in_fresh_thread(lambda: [factor_of(region, f) for f in (2.0, 3.0, 2.0)]) == [2.0, 3.0, 2.0]
    assert region.compilations == 2


def test_guards_are_checked_once_a_run(region):
    def calls() -> list[float]:
        begin_run()
        first = [factor_of(region, f) for f in (2.0, 3.0)]
        begin_run()
        return [*first, factor_of(region, 3.0)]

    assert in_fresh_thread(calls) == [2.0, 2.0, 3.0]


def steps(region: Region, factor: float) -> Iterator[float]:
    begin_run()
    while True:
        yield factor_of(region, factor)


own_steps = with_own_run(steps)


def test_runs_of_two_generators_do_not_meet(region):
    def calls() -> list[float]:
        a, b = own_steps(region, 2.0), own_steps(region, 3.0)
        found = [next(g) for g in (a, b, a, a, b)]
        return [*found, factor_of(region, 5.0)]

    assert in_fresh_thread(calls) == [2.0, 3.0, 2.0, 2.0, 3.0, 5.0]


def test_a_run_inside_a_run_leaves_it_as_it_was(region):
    @with_own_run
    def outer() -> Iterator[float]:
        begin_run()
        yield factor_of(region, 2.0)
        assert next(own_steps(region, 3.0)) == 3.0
        yield factor_of(region, 2.0)
        yield factor_of(region, 7.0)

    assert in_fresh_thread(lambda: list(outer())) == [2.0, 2.0, 2.0], "the last one shows that its run went on"


def test_an_error_ends_a_run(region):
    @with_own_run
    def broken() -> Iterator[float]:
        begin_run()
        yield factor_of(region, 2.0)
        raise ValueError("broken")

    def calls() -> float:
        with pytest.raises(ValueError, match="broken"):
            list(broken())
        return factor_of(region, 3.0)

    assert in_fresh_thread(calls) == 3.0


def test_threads_that_call_one_region_at_once_keep_their_own_code():
    """One thread is held up in its graph until another one has asked for its own, or has been kept waiting."""
    inside, asked = threading.Event(), threading.Event()
    ran: list[torch.dtype] = []

    def backend(graph: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        dtype = next(x.dtype for x in inputs if isinstance(x, Tensor))

        def run(*arguments: Any) -> Any:
            ran.append(dtype)
            if dtype == torch.float32 and not inside.is_set():
                inside.set()
                asked.wait(2)
            return graph.forward(*arguments)

        return run

    function = compile_function(lambda xs: xs[0] * 2, "listed", backend)  # layouts do not see what is in a list

    def call_twice(dtype: torch.dtype) -> list[torch.dtype]:
        begin_run()
        xs = [torch.ones(3, dtype=dtype)]
        return [function(xs).dtype, function(xs).dtype]

    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(call_twice, torch.float32)
        inside.wait(60)
        second = pool.submit(call_twice, torch.float64)
        second.add_done_callback(lambda _: asked.set())
        assert first.result() == [torch.float32] * 2
        assert second.result() == [torch.float64] * 2
    assert sorted(map(str, ran)) == ["torch.float32"] * 2 + ["torch.float64"] * 2, "each ran its own code"


def test_max_autotune_is_inductor_that_times_products(monkeypatch):
    seen: list[tuple[str, Any]] = []
    monkeypatch.setattr(torch, "compile", lambda f, *, backend, options=None, **_: seen.append((backend, options)) or f)
    for compiler in COMPILERS:
        compile_function(lambda x: x @ x, "product", compiler)(torch.eye(2))
    tuned = {"max_autotune": True, "coordinate_descent_tuning": True}
    assert seen == [("inductor", None), ("inductor", tuned), ("aot_eager", None), ("eager", None)]


def test_arguments_of_equal_shapes_and_other_strides_are_told_apart():
    """Within a run guards are skipped for what was seen before; compiled code reads by strides."""
    begin_run()
    double = compile_function(lambda x: x * 2, "double", "inductor")
    wide, narrow = torch.randn(3, 2, 8), torch.randn(3, 8)
    for x in (wide[:, 1], narrow, wide[:, 0], narrow.flip(0)):
        assert torch.equal(double(x), 2 * x)


def test_arguments_of_equal_shapes_and_other_dtypes_are_told_apart():
    begin_run()
    double = compile_function(lambda x: x * 2, "double", "inductor")
    for dtype in (torch.float32, torch.float64, torch.float32):
        x = torch.randn(3, 8, dtype=dtype)
        assert torch.equal(double(x), 2 * x)
