"""A recorded region examined: its kernels generated, run, compared with eager and compiled to machine code."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from smc_compile.dev.kernel_audit.absent_device import Target
from smc_compile.dev.kernel_audit.generated_code import kernel_sources, library_calls
from smc_compile.dev.kernel_audit.graph_recorder import RecordedGraph
from smc_compile.dev.kernel_audit.interpreter import Interpreter
from smc_compile.dev.kernel_audit.lower_graph import lower
from smc_compile.dev.kernel_audit.machine_code import MachineCode, compile_kernel
from smc_compile.dev.kernel_audit.verdict import Observed, RegionVerdict, compare
from smc_compile.errors import SMCError


@dataclass
class AuditedKernel:
    """One kernel of one region; ``code`` is None where nothing compiles for a GPU, or ``problem`` says why."""

    name: str
    launches: int  # a cycle
    used: bool
    code: MachineCode | None = None
    problem: str = ""


@dataclass
class AuditedRegion:
    """One region: its kernels, its calls of libraries, and whether its results are those of eager."""

    name: str
    calls: int  # a cycle
    kernels: list[AuditedKernel]
    library: dict[str, int]
    verdict: RegionVerdict
    agrees: bool
    sources: dict[str, str] = field(default_factory=dict, repr=False)

    @property
    def passes(self) -> bool:
        return self.agrees and all(kernel.used and not kernel.problem for kernel in self.kernels)

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        plain = asdict(self)
        plain["verdict"]["unused"] = sorted(self.verdict.unused)
        return plain | {"passes": self.passes}


def examine(
    recorded: RecordedGraph, target: Target | None, interpreter: Interpreter, dtype: torch.dtype
) -> AuditedRegion:
    """Generate the region's code, compare it with eager, and compile each kernel to machine code for the target."""
    observed = Observed(interpreter)
    code, compiled = lower(recorded, target, observed)
    verdict = compare(recorded, compiled, dtype, observed.verdict)
    sources = kernel_sources(code)
    kernels = [_kernel(recorded, name, source, target, verdict) for name, source in sources.items()]
    library = {name: count * recorded.a_cycle for name, count in library_calls(code).items()}
    return AuditedRegion(recorded.name, recorded.a_cycle, kernels, library, verdict, verdict.agrees(dtype), sources)


def _kernel(
    recorded: RecordedGraph, name: str, source: str, target: Target | None, verdict: RegionVerdict
) -> AuditedKernel:
    kernel = AuditedKernel(name, verdict.launches.get(name, 0) * recorded.a_cycle, verdict.used(name))
    if target is not None:
        try:
            kernel.code = compile_kernel(name, source, target)
        except SMCError as error:
            kernel.problem = str(error)
    return kernel


def compared(name: str, calls: int, verdict: RegionVerdict, agrees: bool) -> str:
    """A region, its calls a cycle, and what came of comparing it with eager, for the terminal."""
    if verdict.problem:
        outcome = f"[red]not run: {verdict.problem}[/red]"
    elif agrees:
        outcome = f"[green]as eager in {verdict.runs} runs[/green], largest error {verdict.error:.0e}"
        outcome += f", {verdict.beyond:.1%} of entries differ" if verdict.beyond else ""
    else:
        outcome = f"[red]differs from eager[/red]: error {verdict.error:.0e}, {verdict.beyond:.1%} of entries"
    return f"[bold]{name}[/bold], {calls} call{'s' * (calls != 1)} a cycle: {outcome}"


def short_name(name: str, width: int) -> str:
    """triton_per_fused_add_mean_3 as "per 3  add mean": its kind, its number in the region, ops as far as they fit."""
    found = re.fullmatch(r"(?:triton_)?([a-z]+?)_fused_(.*?)_?(\d+)", name)
    if found is None:
        return name[:width]
    kind, ops, number = found.groups()
    text = f"{kind} {number:<3} {ops.strip('_').replace('__', '_').replace('_', ' ')}"
    return text if len(text) <= width else text[: width - 1] + "…"
