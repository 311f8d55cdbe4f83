"""A region's generated code against eager PyTorch: the same arguments, the same uniforms, the same results.

Draws use inverse CDF with uniforms that are arguments: equal uniforms must give equal tokens and equal ancestors, which
is stronger than any test of distributions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from smc_compile.errors import SMCError

from .generated import kernel_sources
from .interpreter import Interpreter
from .record import Recorded, copy_of

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
SMALLEST = 0.1  # a tensor with smaller entries only, such as log-probabilities near 0, is compared with this
NARROW_SHARE = 0.05  # of the entries; in 16 bits eager rounds between ops that a kernel fuses, and draws can turn


@dataclass
class Verdict:
    """What came of comparing.

    Attributes:
        runs: of how many sessions arguments were tried.
        error: largest difference of floating entries, relative to the largest entry of their tensor.
        beyond: largest share of a tensor's entries that differ beyond its tolerance; integers must be equal.
        launches: of each kernel in one call.
        unused: kernels whose absence changed nothing in any run.
        problem: why the region could not be run.
    """

    runs: int = 0
    error: float = 0.0
    beyond: float = 0.0
    launches: dict[str, int] = field(default_factory=dict)
    unused: set[str] = field(default_factory=set)
    problem: str = ""

    def agrees(self, dtype: torch.dtype) -> bool:
        """Whether results do; ``dtype`` is the type of the weights."""
        return self.runs > 0 and not self.problem and self.beyond <= (NARROW_SHARE if dtype.itemsize < 4 else 0)

    def used(self, kernel: str) -> bool:
        return self.launches.get(kernel, 0) > 0 and kernel not in self.unused


class Observed:
    """Executes generated code in ``interpreter`` and keeps what is seen of its kernels."""

    def __init__(self, interpreter: Interpreter) -> None:
        self.verdict = Verdict()
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


def compare(recorded: Recorded, compiled: Callable[..., Any], observed: Observed, dtype: torch.dtype) -> Verdict:
    """Run ``compiled``, which executes by ``observed``, and the graph eagerly on the recorded arguments."""
    verdict = observed.verdict
    for call in recorded.calls:
        mine, eager = ([copy_of(a) for a in call] for _ in range(2))
        try:
            got = compiled(*mine)
        except SMCError as error:
            verdict.problem = error.why or error.what
            return verdict
        want = recorded.graph(*eager)
        for a, b in zip([*pytree.tree_leaves(got), *mine], [*pytree.tree_leaves(want), *eager], strict=True):
            if isinstance(a, Tensor) and a.numel():
                largest, share = difference(a, b, dtype)
                verdict.error, verdict.beyond = max(verdict.error, largest), max(verdict.beyond, share)
        verdict.runs += 1
    return verdict


def difference(a: Tensor, b: Tensor, dtype: torch.dtype) -> tuple[float, float]:
    """The largest difference relative to the largest entry of ``b``, and the share of entries beyond the tolerance.

    Infinities and NaN must stand in the same places. Weights of ``dtype`` set the tolerance of wider tensors too.
    """
    if a.shape != b.shape or a.dtype != b.dtype:
        return float("inf"), 1.0
    if not a.is_floating_point():
        return 0.0, float((a != b).double().mean())
    tolerance = max(TOLERANCE[dtype], TOLERANCE[a.dtype])
    finite = a.isfinite() & b.isfinite()
    alike = torch.where(finite, True, (a == b) | (a.isnan() & b.isnan()))
    scale = b[finite].abs().max().double().clamp_min(SMALLEST) if finite.any() else SMALLEST
    errors = torch.where(finite, (a.double() - b.double()).abs() / scale, 0.0)
    return float(errors.max()), float(((errors > tolerance) | ~alike).double().mean())
