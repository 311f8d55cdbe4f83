"""Linear layers of a few rows go to faster products on a CPU: the same numbers, and everything else is left alone."""

from __future__ import annotations

import pytest
import torch

from smc_compile.kernels import skinny_linear as op_file
from smc_compile.pairs.llama import Llama, LlamaConfig
from smc_compile.passes.cache.synthesize import synthesize_cache
from smc_compile.passes.lower import skinny_products as pass_file
from smc_compile.passes.lower.skinny_products import ROWS, linear
from smc_compile.passes.pipeline import capture
from smc_compile.passes.rewrites import rewrite_cached
from smc_compile.program.model import LastLogits


def operands(rows: tuple[int, ...], dtype: torch.dtype, outputs: int = 1102) -> tuple[torch.Tensor, ...]:
    """x [..., I], weight [O, I] of no whole number of panels, blocks or vectors, bias [O]."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((*rows, 1055), (outputs, 1055), (outputs,))
    x, weight, bias = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
    return x, weight, bias


def calls(function, *args) -> list[str]:
    """Names of the ops that the function dispatches."""
    with torch.profiler.profile() as profile, torch.no_grad():
        function(*args)
    return [event.name for event in profile.events()]


@pytest.mark.parametrize("rows", [(4,), (5,), (2, 9), (6,), (7, 1), (45,), (48,)])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 2**-8)])
def test_the_product_is_the_exact_one_to_rounding(rows, biased, dtype, tolerance, monkeypatch):
    monkeypatch.setattr(pass_file, "EMULATED", True)
    x, weight, bias = operands(rows, dtype)
    used = bias if biased else None
    exact = torch.nn.functional.linear(x.double(), weight.double(), used.double() if biased else None)
    with torch.no_grad():
        result = linear(x, weight, used)
    assert result.dtype == dtype
    assert result.shape == exact.shape
    assert (result - exact).abs().max() <= tolerance * exact.abs().max()


def test_which_products_are_rerouted(monkeypatch):
    monkeypatch.setattr(pass_file, "EMULATED", True)
    assert "smc_compile::skinny_linear" in calls(linear, *operands((8,), torch.float32))
    assert "smc_compile::skinny_linear" in calls(linear, *operands((1,), torch.bfloat16))
    for left_alone in (
        operands((ROWS[torch.float32].start - 1,), torch.float32),
        operands((ROWS[torch.float32].stop,), torch.float32),
        operands((8,), torch.float64),
        operands((8,), torch.float32, outputs=64),
        operands((ROWS[torch.bfloat16].stop,), torch.bfloat16),
    ):
        assert not any("skinny_linear" in name for name in calls(linear, *left_alone))
    monkeypatch.setattr(pass_file, "EMULATED", False)
    assert not any("skinny_linear" in name for name in calls(linear, *operands((8,), torch.bfloat16)))


def test_rows_and_weights_need_not_be_contiguous():
    x, weight, bias = operands((8,), torch.float32)
    stretched = torch.stack([x, x], -1)[..., 0]
    with torch.no_grad():
        assert torch.equal(linear(stretched, weight.t().contiguous().t(), bias), linear(x, weight, bias))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("inputs", "outputs"), [(1100, 64), (1000, 70), (45, 9), (17, 33)])
def test_one_row_alone_and_among_others_is_the_same_number(inputs, outputs, dtype):
    """Few rows and many take different ways through the kernel."""
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(n, inputs, generator=generator).to(dtype) for n in (40, outputs))
    exact = x.double() @ weight.double().t()
    among = torch.ops.smc_compile.skinny_linear(x, weight, None)
    torch.testing.assert_close(
        among.double(), exact, rtol=0, atol=float(exact.abs().max()) * 4 * torch.finfo(dtype).eps
    )
    for count in range(1, 9):
        assert torch.equal(torch.ops.smc_compile.skinny_linear(x[3 : 3 + count], weight, None), among[3 : 3 + count])


def test_without_a_compiler_the_product_is_atens(monkeypatch):
    monkeypatch.setattr(op_file, "cpp_kernel", lambda *_: None)
    given = operands((8,), torch.float32)
    with torch.no_grad():
        assert torch.equal(linear(*given), torch.nn.functional.linear(*given))


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compiled_equals_eager(compiler):
    x, weight, bias = operands((2, 9), torch.float32)
    compiled = torch.compile(lambda *args: torch.relu(linear(*args)), backend=compiler, fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x, weight, bias), torch.relu(linear(x, weight, bias)))


def test_every_linear_layer_of_a_model_is_rewritten_and_nothing_else():
    model = Llama(LlamaConfig(17, 16, 2, 2, 1, 24)).eval()
    lm, _ = capture(LastLogits(model), torch.zeros(2, 2, dtype=torch.int64))
    before = synthesize_cache(lm)
    targets = {kind: [node.target for node in getattr(before, kind).graph.nodes] for kind in ("score", "advance")}
    after = rewrite_cached(before)
    aten = torch.ops.aten.linear.default
    for kind, old in targets.items():
        new = [node.target for node in getattr(after, kind).graph.nodes]
        assert old.count(aten) == 2 * 7 + 1
        assert new == [linear if target is aten else target for target in old]
