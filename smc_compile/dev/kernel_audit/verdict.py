"""A region's generated code against eager PyTorch: the same arguments, the same uniforms, the same results.

Draws use inverse CDF with uniforms that are arguments: equal uniforms must give equal tokens and equal ancestors, which
is stronger than any test of distributions. In 16 bits they must give the same within a hundredth of the distribution.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from smc_compile.dev.kernel_audit.generated_code import kernel_sources
from smc_compile.dev.kernel_audit.graph_recorder import RecordedGraph, copy_of
from smc_compile.dev.kernel_audit.interpreter import Interpreter
from smc_compile.errors import SMCError

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
SMALLEST = 0.1  # a tensor with smaller entries only, such as log-probabilities near 0, is compared with this
NARROW_SHARE = 0.05  # of the entries; in 16 bits eager rounds between ops that a kernel fuses
# There draws turn, too, to a token nearby in the order of tokens: it must be one that eager draws with a uniform within
# this distance. (Inverse CDF draws and ancestors are monotone in the uniform.)
NEARBY = 0.01
UNIFORMS = "l_u_"  # as Dynamo calls the argument u


@dataclass
class RegionVerdict:
    """What came of comparing a region with eager PyTorch.

    Attributes:
        runs: how many recorded calls were compared.
        error: largest difference of floating entries, relative to the largest entry of their tensor.
        beyond: largest share of a tensor's entries that differ beyond its tolerance; integers must be equal.
        launches: of each kernel in one call.
        unused: kernels whose absence changed nothing in any run.
        problem: why the region could not be run; empty if it could.
    """

    runs: int = 0
    error: float = 0.0
    beyond: float = 0.0
    launches: dict[str, int] = field(default_factory=dict)
    unused: set[str] = field(default_factory=set)
    problem: str = ""

    def agrees(self, dtype: torch.dtype) -> bool:
        """Whether all results are the same up to rounding; ``dtype`` is the type of the weights."""
        return self.runs > 0 and not self.problem and self.beyond <= (NARROW_SHARE if dtype.itemsize < 4 else 0)

    def used(self, kernel: str) -> bool:
        """Whether the kernel was launched and its output mattered."""
        return self.launches.get(kernel, 0) > 0 and kernel not in self.unused


class Observed:
    """Executes generated code in ``interpreter``; ``verdict`` counts launches and names the kernels without effect."""

    def __init__(self, interpreter: Interpreter) -> None:
        self.verdict = RegionVerdict()
        self._interpreter = interpreter
        self._first = True

    def __call__(self, code: str, arguments: list[Any]) -> Sequence[Any]:
        if self._first:
            self.verdict.unused, self._first = set(kernel_sources(code)), False
        ran = self._interpreter.run(code, arguments, sorted(self.verdict.unused))
        self.verdict.launches, self.verdict.unused = ran.launches, set(ran.unused)
        for place, value in ran.changed.items():
            arguments[place].copy_(value)
        return ran.outputs


def compare(
    recorded: RecordedGraph,
    compiled: Callable[..., Any],
    dtype: torch.dtype,
    verdict: RegionVerdict | None = None,
    reference: Callable[..., Any] | None = None,
) -> RegionVerdict:
    """Run ``compiled`` and ``reference``, which is the graph unless it is given, on the arguments of each recorded
    call, and add the differences to ``verdict``."""
    verdict, reference = verdict or RegionVerdict(), reference or recorded.graph
    narrow = dtype.itemsize < 4 and uniforms_place(recorded) is not None
    for call in recorded.calls:
        try:
            got = results(compiled, call)
        except SMCError as error:
            verdict.problem = error.why or error.what
            return verdict
        want = results(reference, call)
        nearby = [results(reference, moved(recorded, call, by)) for by in (-NEARBY, NEARBY)] if narrow else [want, want]
        turned = turns(got, want) if narrow else {}
        for a, b, *bounds in zip(got, want, *nearby, strict=True):
            if isinstance(a, Tensor) and a.numel():
                if a.shape in turned and a.is_floating_point():
                    a = torch.where(turned[a.shape], b, a)
                largest, share = difference(a, b, dtype, *bounds)
                verdict.error, verdict.beyond = max(verdict.error, largest), max(verdict.beyond, share)
        verdict.runs += 1
    return verdict


def results(function: Callable[..., Any], arguments: Sequence[Any]) -> list[Any]:
    """What a call returns, and after that its arguments, which it may have changed."""
    own = [copy_of(a) for a in arguments]
    return [*pytree.tree_leaves(function(*own)), *own]


def turns(got: Sequence[Any], want: Sequence[Any]) -> dict[torch.Size, Tensor]:
    """Where integers differ, by the shape of their tensor.

    Floating entries at the same places of tensors of that shape belong to the tokens that differ, and differ with them.
    """
    found: dict[torch.Size, Tensor] = {}
    for a, b in zip(got, want, strict=True):
        if isinstance(a, Tensor) and a.dtype == torch.int64 and a.shape == b.shape:
            found[a.shape] = found.get(a.shape, False) | (a != b)
    return found


def uniforms_place(recorded: RecordedGraph) -> int | None:
    """Where the uniforms stand among the arguments: all regions that draw call them u."""
    names = [node.name for node in recorded.graph.graph.find_nodes(op="placeholder")]
    return names.index(UNIFORMS) if UNIFORMS in names else None


def moved(recorded: RecordedGraph, call: Sequence[Any], by: float) -> list[Any]:
    """The arguments of ``call`` with ``by`` added to all uniforms, kept in [0, 1)."""
    place = uniforms_place(recorded)
    return [(a + by).clamp(0, 1 - 1e-6) if i == place else a for i, a in enumerate(call)]


def difference(
    a: Tensor, b: Tensor, dtype: torch.dtype, low: Tensor | None = None, high: Tensor | None = None
) -> tuple[float, float]:
    """The largest difference relative to the largest entry of ``b``, and the share of entries beyond the tolerance.

    Integers that differ must lie between ``low`` and ``high``, where these are given.
    Infinities and NaN must stand in the same places. Weights of ``dtype`` set the tolerance of wider tensors too.
    """
    if a.shape != b.shape or a.dtype != b.dtype:
        return float("inf"), 1.0
    if not a.is_floating_point():
        wrong = a != b
        if low is not None and high is not None and a.dtype != torch.bool:
            wrong &= (a < torch.minimum(low, high)) | (a > torch.maximum(low, high))
        return 0.0, float(wrong.double().mean())
    tolerance = max(TOLERANCE[dtype], TOLERANCE[a.dtype])
    finite = a.isfinite() & b.isfinite()
    alike = torch.where(finite, True, (a == b) | (a.isnan() & b.isnan()))
    scale = b[finite].abs().max().double().clamp_min(SMALLEST) if finite.any() else SMALLEST
    errors = torch.where(finite, (a.double() - b.double()).abs() / scale, 0.0)
    return float(errors.max()), float(((errors > tolerance) | ~alike).double().mean())
