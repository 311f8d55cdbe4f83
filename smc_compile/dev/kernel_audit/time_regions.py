"""How long a region takes on a device that is there: in eager PyTorch, by plain Inductor, and as sessions run it.

Plain Inductor and eager PyTorch get the graph with our kernels' ops in tensor code. All three take turns, and before
each call the processor's caches are overwritten, as the weights of other regions do in a cycle. On a GPU
each is recorded as a CUDA graph first, so that none waits for the host, as cycles of SMC do not.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

import torch
from torch import fx
from torch.profiler import ProfilerActivity, profile

from smc_compile.bench.measure import reason
from smc_compile.dev.kernel_audit.graph_recorder import RecordedGraph, copy_of
from smc_compile.dev.kernel_audit.lower_graph import IN_TENSOR_CODE
from smc_compile.dev.kernel_audit.verdict import RegionVerdict, compare
from smc_compile.errors import SMCError
from smc_compile.runtime.execution.region import lowered_by
from smc_compile.runtime.sessions.replay import cuda_graphs

ROUNDS = 9  # in turn, after one that is not timed
FLUSHED = 2**28  # bytes: more than the caches of a processor or a GPU hold
FLUSHING = re.compile("Memset|FillFunctor")  # what the profiler sees of it on a GPU
BETWEEN = "between kernels"  # on a CPU: allocations, views, calls
Call = Callable[[], Any]


@dataclass
class Timed:
    """One region on a device.

    Attributes:
        calls: a cycle.
        eager, inductor, ours: microseconds of a call, medians.
        kernels: microseconds a call of each kernel, generated or a library's, in ours.
    """

    name: str
    calls: int
    verdict: RegionVerdict
    agrees: bool
    eager: float = 0.0
    inductor: float = 0.0
    ours: float = 0.0
    kernels: dict[str, float] = field(default_factory=dict)

    @property
    def passes(self) -> bool:
        return self.agrees

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        plain = asdict(self)
        plain["verdict"]["unused"] = sorted(self.verdict.unused)
        return plain | {"passes": self.passes}


def time_region(recorded: RecordedGraph, device: torch.device, dtype: torch.dtype, compiler: str = "inductor") -> Timed:
    """Compile the region, compare it with eager on the arguments that it met, and time it on the last of them.

    ``compiler`` is the option of that name, "inductor" or "max-autotune", and concerns ours alone. An error of a
    compiler or a device becomes the problem of the verdict, so that other regions go on.
    """
    timed = Timed(recorded.name, recorded.a_cycle, RegionVerdict(), False)
    with attempt(timed, device):
        _time(timed, recorded, device, dtype, compiler)
    return timed


@contextmanager
def attempt(timed: Timed, device: torch.device) -> Iterator[None]:
    """An error raised inside becomes the problem of the verdict."""
    try:
        with torch.no_grad(), torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            yield
    except Exception as error:
        timed.agrees, timed.verdict.problem = False, reason(error)


def _time(timed: Timed, recorded: RecordedGraph, device: torch.device, dtype: torch.dtype, compiler: str) -> None:
    in_tensor_code = plain(recorded.graph)
    ours, inductor = compiled(recorded.graph, recorded, compiler), compiled(in_tensor_code, recorded, "inductor")
    timed.verdict = compare(recorded, ours, dtype, reference=in_tensor_code)
    timed.agrees = timed.verdict.agrees(dtype)
    if not compare(recorded, inductor, dtype, reference=in_tensor_code).agrees(dtype):
        raise SMCError("plain Inductor differs from eager")
    time_ways(timed, [prepared(f, recorded.calls[-1], device) for f in (in_tensor_code, inductor, ours)], device)


def time_ways(timed: Timed, calls: list[Call], device: torch.device) -> None:
    """Fill in the times of eager, plain Inductor and ours."""
    timed.eager, timed.inductor, timed.ours = in_turn(calls, device)
    timed.kernels = kernel_times(calls[-1], device)


def plain(graph: fx.GraphModule) -> fx.GraphModule:
    """A copy that has the tensor code of our kernels in their place."""
    copy = deepcopy(graph)
    for node in copy.graph.nodes:
        op = node.target.default if isinstance(node.target, torch._ops.OpOverloadPacket) else node.target
        if node.op == "call_function" and op in IN_TENSOR_CODE:
            node.target = IN_TENSOR_CODE[op]
    copy.recompile()
    return copy


def compiled(graph: fx.GraphModule, recorded: RecordedGraph, compiler: str) -> Callable[..., Any]:
    """By Inductor, as the session's region would be, with its kernels' names for the profiler."""
    from torch._inductor.compile_fx import compile_fx

    patches = {**lowered_by(compiler).get("options", {}), "cpp.enable_kernel_profile": True}
    generated: Any = compile_fx(deepcopy(graph), recorded.inputs, config_patches=patches)
    return generated  # type: ignore[no-any-return]


def prepared(function: Callable[..., Any], arguments: list[Any], device: torch.device) -> Call:
    """A call of ``function`` on copies of the arguments; on a GPU the replay of a recorded call."""
    own = [copy_of(a) for a in arguments]

    def call() -> None:
        function(*own)

    call()  # whatever is compiled is compiled now
    if device.type != "cuda":
        return call
    torch.cuda.synchronize(device)
    return cuda_graphs(device)(call)


def in_turn(calls: list[Call], device: torch.device) -> list[float]:
    """Median microseconds of each, with nothing of it in any cache, after a call that is not timed."""
    flush, times = flusher(device), [[] for _ in calls]  # type: tuple[Call, list[list[float]]]
    for round_ in range(ROUNDS + 1):
        for call, seconds in zip(calls, times, strict=True):
            flush()
            took = seconds_of(call, device)
            if round_:
                seconds.append(took)
    return [1e6 * median(seconds) for seconds in times]


def flusher(device: torch.device) -> Call:
    """A function that writes to more memory than the caches hold."""
    if device.type == "cuda":
        return torch.empty(FLUSHED, dtype=torch.int8, device=device).zero_
    buffer = torch.empty(FLUSHED, dtype=torch.int8).numpy()  # numpy, so that the profiler does not see it
    return lambda: buffer.fill(0)


def seconds_of(call: Call, device: torch.device) -> float:
    """Seconds of one call; on a GPU between two events around it."""
    if device.type != "cuda":
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    call()
    end.record()
    torch.cuda.synchronize(device)
    return 1e-3 * begin.elapsed_time(end)


def kernel_times(call: Call, device: torch.device) -> dict[str, float]:
    """Microseconds a call of each kernel and of each op that it calls, the longest first."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # otherwise it prints its own beginning and end
    on_gpu, flush = device.type == "cuda", flusher(device)
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as found:
        for _ in range(ROUNDS):
            flush()
            call()
        if on_gpu:
            torch.cuda.synchronize(device)
    times: dict[str, float] = {}
    for event in found.key_averages():
        if not FLUSHING.search(event.key):
            name = kernel_name(event.key)
            spent = event.self_device_time_total if on_gpu else event.self_cpu_time_total
            times[name] = times.get(name, 0.0) + spent / ROUNDS
    return dict(sorted(times.items(), key=lambda item: -item[1]))


def kernel_name(event: str) -> str:
    """An event of the profiler as the listing names it; what Python does between kernels has one name."""
    if event.startswith(("##", "AOTDispatcher", "Torch-Compiled AuditedRegion")):
        return BETWEEN
    return re.sub(r"^graph_\d+_", "", event)
