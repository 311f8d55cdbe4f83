"""Kernels generated for a GPU that is not there, in Triton's interpreter, against eager."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from smc_compile.dev.kernel_audit.absent_device import TARGETS
from smc_compile.dev.kernel_audit.generated_code import kernel_sources, library_calls
from smc_compile.dev.kernel_audit.graph_recorder import BACKEND, RecordedGraph, recording
from smc_compile.dev.kernel_audit.interpreter import Interpreter
from smc_compile.dev.kernel_audit.lower_graph import lower
from smc_compile.dev.kernel_audit.machine_code import compile_kernel
from smc_compile.dev.kernel_audit.verdict import Observed, compare, difference
from smc_compile.kernels.thresholds import kth_largest, least_of_mass
from smc_compile.passes.lower.skinny_products import linear
from smc_compile.runtime.algorithms.sampling import sample_inverse_cdf

TARGET = TARGETS["sm_90"]


@pytest.fixture(scope="module")
def interpreter() -> Iterator[Interpreter]:
    generated = Interpreter(TARGET)
    yield generated
    generated.close()


def smc_draw(scores: Tensor, k: Tensor, p: Tensor, u: Tensor) -> Tensor:
    """Truncation and a draw, as in a region."""
    scores = scores.masked_fill(scores < kth_largest(scores, k), -torch.inf)
    probs = torch.softmax(scores, -1)
    return sample_inverse_cdf(probs.masked_fill(probs < least_of_mass(probs, p), 0.0), u)


@pytest.fixture(scope="module")
def recorded() -> RecordedGraph:
    """The function as Dynamo sees it, called in two sessions."""
    generator = torch.Generator().manual_seed(0)
    with recording() as record:
        compiled = torch.compile(smc_draw, backend=BACKEND, fullgraph=True, dynamic=False)
        for _ in range(2):
            record.new_session()
            scores = torch.randn(3, 150, generator=generator)
            k = torch.randint(1, 40, (3, 1), generator=generator)
            compiled(scores, k, torch.rand(3, 1, generator=generator), torch.rand(3, generator=generator).double())
            record.end_session()
    (found,) = record.found
    return found


def test_a_graph_knows_its_region_and_keeps_a_call_of_each_session(recorded):
    assert recorded.name == "draw"
    assert len(recorded.calls) == 2


def test_a_graph_met_again_by_another_program_is_one_and_others_are_not():
    programs = [
        lambda x: x.sin() + 1,
        lambda x: x.sin() + 1,
        lambda x: x.cos() + 1,
    ]
    with recording() as record:
        for function in programs:
            for width in (3, 4):
                record.new_session()
                torch.compile(function, backend=BACKEND, dynamic=False)(torch.zeros(2, width))
    assert [len(found.calls) for found in record.found] == [2, 2, 1, 1]


@pytest.mark.slow
def test_the_same_uniforms_give_the_same_tokens_and_a_wrong_kernel_does_not(recorded, interpreter):
    """Eager runs our C++ kernels, the target's code their twins in tensor code."""
    observed, wrong = Observed(interpreter), Observed(interpreter)
    spoiled = False

    def execute(code: str, arguments: list[Any]) -> Sequence[Any]:
        return wrong(code.replace(">=", "<"), arguments) if spoiled else observed(code, arguments)

    code, compiled = lower(recorded, TARGET, execute)
    verdict = compare(recorded, compiled, torch.float32, observed.verdict)
    assert verdict.problem == ""
    assert verdict.runs == 2
    assert verdict.agrees(torch.float32)
    sources = kernel_sources(code)
    assert sources
    assert set(verdict.launches) == set(sources)
    assert all(verdict.used(name) for name in sources)
    assert not library_calls(code), "no op of ours is left to call"

    name, source = next((n, s) for n, s in sources.items() if " > " in s or ">=" in s)
    used = compile_kernel(name, source, TARGET)
    assert 8 <= used.registers <= 255
    assert used.loads > 0
    assert used.stores > 0

    assert ">=" in "".join(sources.values())
    spoiled = True
    assert not compare(recorded, compiled, torch.float32, wrong.verdict).agrees(torch.float32)


def test_products_of_a_skinny_linear_are_the_librarys_on_a_gpu():
    """The graph was traced on a CPU, where they are an op of ours."""
    x, weight = torch.randn(8, 512), torch.nn.Parameter(torch.randn(512, 512), requires_grad=False)
    with recording() as record:
        torch.compile(lambda *args: linear(*args) + 1, backend=BACKEND, fullgraph=True)(x, weight)
    (found,) = record.found
    assert "skinny_linear" in found.graph.code
    code, _ = lower(found, TARGET, lambda *_: [])
    assert library_calls(code) == {"mm": 1}


def test_in_16_bits_a_draw_may_turn_to_a_token_nearby_and_no_further():
    """What is told of that token differs with it; that of others does not."""

    def token_and_score(p: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        token = sample_inverse_cdf(p, u)
        return token, p.gather(1, token[:, None])[:, 0]

    with recording() as record:
        compiled = torch.compile(token_and_score, backend=BACKEND, fullgraph=True)
        compiled(torch.full((200, 1000), 1e-3), torch.linspace(0, 0.999, 200).double())
    (found,) = record.found

    def agrees(tokens: int, scores: float, dtype: torch.dtype = torch.bfloat16) -> bool:
        def near(*arguments: Any) -> list[Tensor]:
            token, score = found.graph(*arguments)
            return [token + tokens, score + scores]

        return compare(found, near, dtype).agrees(dtype)

    assert agrees(0, 0)
    assert not agrees(1, 0, torch.float32)
    assert not agrees(0, 1)
    assert agrees(8, 1)
    assert not agrees(20, 0)


def test_differences_are_relative_and_infinities_have_their_places():
    a = torch.tensor([100.0, -torch.inf, torch.nan])
    assert difference(a, a.clone(), torch.float32) == (0.0, 0.0)
    error, beyond = difference(a, torch.tensor([101.0, -torch.inf, torch.nan]), torch.float32)
    assert error == pytest.approx(1 / 101)
    assert beyond == pytest.approx(1 / 3)
    assert difference(a, torch.tensor([100.0, torch.inf, torch.nan]), torch.float32)[1] == pytest.approx(1 / 3)
    assert difference(torch.tensor([1, 2]), torch.tensor([1, 3]), torch.float32) == (0.0, 0.5)
    assert difference(a, a.double(), torch.float32)[1] == 1.0
