"""The kernels that are written in C++: checked against float64 on random shapes, and timed beside what is generated."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from smc_compile.dev.kernel_audit.time_regions import in_turn
from smc_compile.kernels import attend, skinny_linear, thresholds

CPU = torch.device("cpu")
Operands = tuple[Tensor, ...]
Function = Callable[..., Tensor]


@dataclass(frozen=True)
class WrittenKernel:
    """One kernel.

    Attributes:
        name: the name of its op.
        op: the kernel.
        twin: the same in tensor code, for which Inductor generates kernels.
        exact: the reference, called on operands in float64.
        operands: random operands of random sizes, in the kernel's own type.
        typical: operands on which it is timed.
        where: the sizes of ``typical`` in words.
        allowed: the largest error relative to the largest entry; 0 where the kernel must be exact.
    """

    name: str
    op: Function
    twin: Function
    exact: Function
    operands: Callable[[torch.Generator], Operands]
    typical: Callable[[torch.Generator], Operands]
    where: str
    allowed: float


@dataclass(frozen=True)
class KernelCheck:
    """The check of one kernel: its largest error in ``runs`` runs, and microseconds beside the compiled twin's."""

    name: str
    runs: int
    error: float
    allowed: float
    where: str
    kernel_us: float
    compiled_us: float

    @property
    def passes(self) -> bool:
        return self.error <= self.allowed


def check_by_hand(entry: WrittenKernel, runs: int, seed: int, compiler: str = "inductor") -> KernelCheck:
    """Random shapes and numbers ``runs`` times, then times in turn at typical ones."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        error = max(error_of(entry, entry.operands(generator)) for _ in range(runs))
        given = entry.typical(generator)
        compiled = torch.compile(entry.twin, backend=compiler, fullgraph=True, dynamic=False)
        ours, theirs = in_turn([lambda: entry.op(*given), lambda: compiled(*given)], CPU)
    return KernelCheck(entry.name, runs, error, entry.allowed, entry.where, ours, theirs)


def error_of(entry: WrittenKernel, given: Operands) -> float:
    """The largest error, relative to the largest entry of the exact result."""
    wide = [x.double() if x.is_floating_point() else x for x in given]
    result, wanted = entry.op(*given).double(), entry.exact(*wide)
    return float((result - wanted).abs().max() / wanted.abs().max())


# ---- operands -------------------------------------------------------------------------------------------------------


def drawn(generator: torch.Generator, low: int, high: int) -> int:
    return int(torch.randint(low, high + 1, (), generator=generator))


def normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator)


def product(generator: torch.Generator, rows: int, inputs: int, outputs: int) -> Operands:
    """x [R, I], weight [O, I], bias [O]."""
    shapes = ((rows, inputs), (outputs, inputs), (outputs,))
    return tuple(normal(generator, *shape) for shape in shapes)


def attention(generator: torch.Generator, b: int, n: int, h: int, g: int, t: int, p: int, s: int, d: int) -> Operands:
    """As ``smc_compile.kernels.attend`` has them; every query sees the first key."""
    hidden = torch.rand(b, t, p + s, generator=generator) < 0.3
    hidden[:, :, 0] = False
    query = normal(generator, b * n, h, g, t, d) * d**-0.5
    prompts = [normal(generator, b, h, p, d) for _ in range(2)]
    suffixes = [normal(generator, b * n, h, s, d) for _ in range(2)]
    return (query, *prompts, *suffixes, hidden)


def scores(generator: torch.Generator, rows: int, vocabulary: int) -> Operands:
    """Scores [R, V] and a k [R, 1] for each row."""
    return normal(generator, rows, vocabulary), torch.randint(1, vocabulary, (rows, 1), generator=generator)


def masses(generator: torch.Generator, rows: int, vocabulary: int) -> Operands:
    """Probabilities [R, V] and a p [R, 1] for each row, in float64: the cut depends on the rounding of a sum."""
    probabilities = torch.softmax(3 * normal(generator, rows, vocabulary).double(), -1)
    return probabilities, torch.rand(rows, 1, generator=generator, dtype=torch.float64)


def random_attention(g: torch.Generator) -> Operands:
    b, n, h, group, t = (drawn(g, 1, most) for most in (3, 9, 4, 3, 9))
    return attention(g, b, n, h, group, t, drawn(g, 1, 200), drawn(g, 2, 99), 16 * drawn(g, 1, 8))


ops = torch.ops.smc_compile
WRITTEN_BY_HAND = (
    WrittenKernel(
        "skinny_linear", ops.skinny_linear, skinny_linear.IN_TENSOR_CODE[ops.skinny_linear.default],
        torch.nn.functional.linear,
        lambda g: product(g, drawn(g, 1, 99), drawn(g, 1, 1500), drawn(g, 1, 700)),
        lambda g: product(g, 18, 1024, 2752), "18 rows, 1024 to 2752", 2e-6,
    ),
    WrittenKernel(
        "attend", ops.attend, attend.attend_in_tensor_code, attend.attend_in_tensor_code, random_attention,
        lambda g: attention(g, 1, 2, 16, 1, 9, 128, 128, 64), "N=2, 9 tokens, 16 heads, 128 + 128 keys", 5e-6,
    ),
    WrittenKernel(
        "kth_largest", ops.kth_largest, thresholds.kth_by_bisection, thresholds.kth_by_sorting,
        lambda g: scores(g, drawn(g, 1, 40), drawn(g, 2, 40000)),
        lambda g: scores(g, 18, 32000), "18 rows of 32000", 0.0,
    ),
    WrittenKernel(
        "least_of_mass", ops.least_of_mass, thresholds.mass_by_bisection, thresholds.mass_by_sorting,
        lambda g: masses(g, drawn(g, 1, 40), drawn(g, 2, 40000)),
        lambda g: tuple(x.float() for x in masses(g, 18, 32000)), "18 rows of 32000", 0.0,
    ),
)  # fmt: skip
