"""What this machine takes for the pieces of a pass, measured once: in about a second and a half."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from functools import cache
from statistics import median

import numpy as np
import torch
from torch import Tensor, nn

from smc_compile.auto.kept_rates import Numbers, kept
from smc_compile.auto.timers import never_less, timed, typical_seconds
from smc_compile.inputs.requests import build_request, request_seeds
from smc_compile.kernels.cpp_kernel import cpp_kernel
from smc_compile.kernels.skinny_linear import SIGNATURE
from smc_compile.passes.cache.attention_ops import attention_over_cache
from smc_compile.passes.lower.skinny_products import linear
from smc_compile.runtime.algorithms.next_token import NextTokenDistribution
from smc_compile.runtime.execution.incremental import StatefulModel
from smc_compile.runtime.execution.text_processors import TextProcessors
from smc_compile.runtime.sessions.smc import SMCSession

ROWS = (1, 2, 3, 4, 8, 16, 32, 48, 49, 96, 192, 384)  # with both sides of where products change kernels


SMALL, RESIDENT = 2**16, 2**18  # numbers in one weight, which stays in a core's cache


STREAMED, SIDE = 2**26, 1024  # bytes of weights of SIDE x SIDE that pass by, on a GPU four times as many


ENOUGH = 2**31  # operations that measure a product of many rows well


WIDTH = 64  # of a head


TOKENS = 61  # of a generation that costs nothing but the host's part


@dataclass(frozen=True)
class Rates:
    """Seconds of the pieces of a pass on one device, in one dtype, with one number of threads.

    Attributes:
        small, resident, streamed: seconds for each number of a weight, at ``ROWS`` rows: of weights of at most
            ``SMALL`` numbers, of larger ones in a core's cache, and of those that come from memory.
        attention: of an attention over almost nothing; attention_byte, attention_operation: of a long one.
        batched_byte, batched_operation: of attention written as many small products.
        element_byte: of element-wise operations and reductions, for each byte read or written.
        launch: of a kernel that does nothing, with its result's allocation.
        call, argument: of a compiled function that does nothing, and for each tensor it is given.
        cycle, step: what the host does in a cycle beside its regions, and for each draft step.
    """

    small: tuple[float, ...]
    resident: tuple[float, ...]
    streamed: tuple[float, ...]
    attention: float
    attention_byte: float
    attention_operation: float
    batched_byte: float
    batched_operation: float
    element_byte: float
    launch: float
    call: float
    argument: float
    cycle: float
    step: float

    def product(self, numbers: int, rows: float, working_set: float, itemsize: int) -> float:
        """Seconds of ``rows`` rows times a weight of so many numbers, one of ``working_set`` bytes of weights."""
        if numbers <= SMALL:
            return numbers * float(np.interp(rows, ROWS, self.small)) * beyond(rows)
        near, far = (float(np.interp(rows, ROWS, of)) * beyond(rows) for of in (self.resident, self.streamed))
        bounds = np.log2([RESIDENT * itemsize, STREAMED])
        return numbers * float(np.interp(np.log2(working_set), bounds, [near, far]))


def beyond(rows: float) -> float:
    """Products of more rows than were measured grow with them."""
    return max(1.0, rows / ROWS[-1])


def rates(dtype: torch.dtype, device: torch.device) -> Rates:
    """Those of this machine: measured when first asked for, and kept."""
    return _rates(dtype, device, torch.get_num_threads())


@cache
def _rates(dtype: torch.dtype, device: torch.device, threads: int) -> Rates:
    shape = [f"{f.name}: {f.type}" for f in fields(Rates)]  # of another version's file
    name = f"{dtype} {device.type} {threads} threads, at {ROWS} rows: {shape}"
    numbers = kept(name, device, lambda: _as_numbers(measured_rates(dtype, device)))
    return Rates(**{k: tuple(v) if isinstance(v, list) else v for k, v in numbers.items()})  # type: ignore[arg-type]


def _as_numbers(found: Rates) -> Numbers:
    return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(found).items()}


def measured_rates(dtype: torch.dtype, device: torch.device) -> Rates:
    """Those that are measured now."""
    streamed = STREAMED // (SIDE**2 * dtype.itemsize) * (4 if device.type == "cuda" else 1)
    with torch.no_grad():
        return Rates(
            product_seconds(dtype, device, SMALL, 1),
            product_seconds(dtype, device, RESIDENT, 1),
            product_seconds(dtype, device, SIDE * SIDE, streamed),
            *attention_seconds(dtype, device),
            *batched_seconds(dtype, device),
            element_seconds(device),
            launch_seconds(dtype, device),
            *(call_seconds(dtype, device) if device.type == "cpu" else (0.0, 0.0)),
            *(host_seconds(device) if device.type == "cpu" else replayed_host_seconds(device)),
        )


def product_seconds(dtype: torch.dtype, device: torch.device, numbers: int, copies: int) -> tuple[float, ...]:
    """Seconds a number of square weights, ``copies`` of them in turn, at ``ROWS`` rows: by the op that regions use."""
    side = int(numbers**0.5)
    weights = [torch.ones(side, side, dtype=dtype, device=device) for _ in range(copies)]
    found = []
    for rows in ROWS:
        x = torch.ones(rows, side, dtype=dtype, device=device)
        some = weights[: max(1, ENOUGH // (2 * rows * numbers))]
        repeats = max(1, 2**19 // (numbers * len(some)))

        def run(x: Tensor = x, some: list[Tensor] = some, repeats: int = repeats) -> None:
            for _ in range(repeats):
                for weight in some:
                    linear(x, weight)

        found.append(typical_seconds(run, device, 3) / (numbers * len(some) * repeats))
    return never_less(found)


def batched_seconds(dtype: torch.dtype, device: torch.device) -> tuple[float, float]:
    """Seconds a byte where few queries meet many keys, and an operation where many do."""

    def seconds(queries: int, keys: int) -> float:
        left = torch.ones(32, queries, 64, dtype=dtype, device=device)
        right = torch.ones(32, keys, 64, dtype=dtype, device=device).transpose(1, 2)

        def run() -> None:
            left @ right

        return typical_seconds(run, device, 3)

    return seconds(1, 1024) / (32 * 1024 * 64 * dtype.itemsize), seconds(32, 256) / (2 * 32 * 32 * 256 * 64)


def element_seconds(device: torch.device) -> float:
    """Seconds a byte of a softmax over a vocabulary."""
    logits = torch.ones(64, 8192, device=device)

    def run() -> None:
        torch.softmax(logits, -1)

    return typical_seconds(run, device, 3) / (2 * logits.nbytes)


def attention_seconds(dtype: torch.dtype, device: torch.device) -> tuple[float, float, float]:
    """Seconds of an attention over almost nothing; for each byte where one query meets many keys, and for each
    operation where many do."""

    def seconds(particles: int, heads: int, queries: int, prompt: int, suffix: int, repeats: int) -> float:
        def ones(*shape: int) -> Tensor:
            return torch.ones(*shape, WIDTH, dtype=dtype, device=device)

        hidden = torch.zeros(1, queries, prompt + suffix, dtype=torch.bool, device=device)
        prompts, suffixes = ones(1, heads, prompt), ones(particles, heads, suffix)
        query = ones(particles, heads, 1, queries)

        def run() -> None:
            for _ in range(repeats):
                attention_over_cache(query, prompts, prompts, suffixes, suffixes, hidden)

        return typical_seconds(run, device, 3) / repeats

    least = seconds(1, 1, 1, 2, 2, 50)
    reading = seconds(1, 16, 1, 1024, 2, 3) - least
    multiplying = seconds(4, 16, 8, 128, 128, 3) - least
    moved, operations = 2 * 16 * 1026 * WIDTH * dtype.itemsize, 4 * 4 * 16 * 8 * 256 * WIDTH
    return least, max(0.0, reading) / moved, max(0.0, multiplying) / operations


def launch_seconds(dtype: torch.dtype, device: torch.device) -> float:
    """Of the smallest kernel, called as compiled code calls one: a result is allocated and views are taken."""
    x = torch.ones(8, 8, dtype=dtype, device=device)
    launched = smallest_kernel(dtype) if device.type == "cpu" else lambda x, out: torch.mm(x, x, out=out)

    def run() -> None:
        for _ in range(100):
            out = torch.empty_strided((8, 8), (8, 1), dtype=dtype, device=device)
            launched(x.as_strided((8, 8), (8, 1)), out)

    return typical_seconds(run, device, 5) / 100


def smallest_kernel(dtype: torch.dtype) -> Callable[[Tensor, Tensor], object]:
    """A C++ kernel of all threads; a product where none can be built."""
    kernel = cpp_kernel("skinny_linear", SIGNATURE, dtype)
    if kernel is None:
        return lambda x, out: torch.mm(x, x, out=out)
    return lambda x, out: kernel(x, x, x, out, 8, 8, 8, False, torch.get_num_threads())


def call_seconds(dtype: torch.dtype, device: torch.device) -> tuple[float, float]:
    """Of calling what torch.compile gives, and for each tensor that it is given."""

    def seconds(count: int) -> float:
        def joined(tensors: list[Tensor]) -> Tensor:
            return torch.cat(tensors)

        tensors = [torch.ones(1, dtype=dtype, device=device) for _ in range(count)]
        compiled = torch.compile(joined, backend="aot_eager", dynamic=False)

        def run() -> None:
            for _ in range(20):
                compiled(tensors)

        return typical_seconds(run, device, 3) / 20

    few, many = seconds(2), seconds(66)
    return few, max(0.0, (many - few) / 64)


class Nothing(nn.Module):
    """A model that costs nothing: tokens [R, T] and a state to logits of two tokens."""

    def initial_state(self, batch: int) -> Tensor:
        return torch.zeros(batch, 1)

    def step(self, tokens: Tensor, pos: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        return torch.zeros(*tokens.shape, 2, device=tokens.device), state


def replayed_host_seconds(device: torch.device) -> tuple[float, float]:
    """What the host does around a replayed cycle: it says where the cycle stands and reads what came of it. A draft
    step has no part of it."""
    numbers, status = torch.zeros(2, dtype=torch.int64, device=device), torch.zeros(5, 1, device=device)

    def run() -> None:
        for number in numbers:
            number.fill_(1)
        status.cpu()

    return median(timed(run, device, 5)), 0.0


def host_seconds(device: torch.device) -> tuple[float, float]:
    """What a session does outside its regions: in a cycle, and in a draft step. The regions are not compiled here."""
    ids = torch.zeros(1, 1, dtype=torch.int64, device=device)

    def seconds(lookahead: int) -> float:
        model, distribution, text_processors = (
            StatefulModel(Nothing()),
            NextTokenDistribution("logits"),
            TextProcessors(compiler="eager"),
        )
        session = SMCSession(
            model, model, distribution, distribution, 2, lookahead, 0.5, "systematic", "eager", text_processors
        )
        request = build_request(ids, TOKENS, request_seeds(0, ids))
        with torch.compiler.set_stance("force_eager"):
            runs = [session.run(request).stats for _ in range(3)]
        return min(stats.host_seconds / stats.cycles for stats in runs)

    few, many = seconds(1), seconds(9)
    step = max(0.0, (many - few) / 8)
    return max(0.0, few - step), step
