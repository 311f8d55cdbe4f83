"""Where top-k and top-p cut: without sorting, the same numbers as by sorting."""

from __future__ import annotations

import pytest
import torch

from smc_compile.kernels import thresholds
from smc_compile.kernels.thresholds import (
    kth_by_bisection,
    kth_by_sorting,
    kth_largest,
    least_of_mass,
    mass_by_bisection,
    mass_by_sorting,
)


def scores(rows: int, vocab: int, dtype: torch.dtype) -> torch.Tensor:
    """[R, V], both signs, with ties and, in every second row, tokens that cannot be drawn."""
    generator = torch.Generator().manual_seed(vocab)
    result = torch.randn(rows, vocab, generator=generator, dtype=dtype).mul(3).mul(8).round().div(8)
    result[::2, 1::3] = -torch.inf
    return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("vocab", [1, 2, 17, 1000])
@pytest.mark.parametrize("kth_largest", [kth_largest, kth_by_bisection])
def test_the_kth_largest_is_the_one_found_by_sorting(kth_largest, vocab, dtype):
    rows = scores(9, vocab, dtype)
    for k in (0, 1, 2, 5, vocab // 2, vocab, vocab + 3):
        at = torch.full((9, 1), k)
        assert torch.equal(kth_largest(rows, at), kth_by_sorting(rows, at))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("vocab", [1, 2, 17, 1000])
@pytest.mark.parametrize("least_of_mass", [least_of_mass, mass_by_bisection])
def test_the_least_probability_kept_leaves_too_little_below_it(least_of_mass, vocab, dtype):
    """What stands below holds at most 1 - p, and with the tokens at the threshold more: to the rounding of a sum."""
    probs = scores(9, vocab, dtype).softmax(-1)
    slack = 1e-6 if dtype == torch.float32 else 1e-14
    for p in (0.0, 0.3, 0.9, 0.95, 0.999, 1.0):
        at = torch.full((9, 1), p, dtype=dtype)
        least = least_of_mass(probs, at)
        likeliest = probs.amax(-1, keepdim=True)
        below = torch.where(probs < least, probs, 0).sum(-1, keepdim=True)
        through = torch.where(probs <= least, probs, 0).sum(-1, keepdim=True)
        assert (below <= 1 - at + slack).all()
        assert ((through > 1 - at - slack) | (least == likeliest)).all()
        by_sorting = mass_by_sorting(probs, at)
        assert ((least == by_sorting) | ((through - (1 - at)).abs() < slack) | ((below - (1 - at)).abs() < slack)).all()


def test_only_a_cpu_has_the_ops():
    """Elsewhere the regions hold tensor code: the compiler has to find something to generate kernels from."""
    for op, where in ((kth_largest, thresholds.kth_by_bisection), (least_of_mass, thresholds.mass_by_bisection)):
        rows, at = torch.empty(2, 8, device="meta"), torch.empty(2, 1, device="meta")
        assert op(rows, at).shape == where(rows, at).shape == (2, 1)
        graph = torch.fx.experimental.proxy_tensor.make_fx(op)(rows, at)
        assert not any("smc_compile" in str(node.target) for node in graph.graph.nodes)


def test_rows_have_thresholds_of_their_own():
    rows = scores(3, 50, torch.float32)
    together = kth_largest(rows, torch.tensor([[1], [4], [50]]))
    for i, k in enumerate((1, 4, 50)):
        assert together[i] == kth_largest(rows[i : i + 1], torch.tensor([[k]]))


@pytest.mark.parametrize(
    ("kth_largest", "least_of_mass"), [(kth_largest, least_of_mass), (kth_by_bisection, mass_by_bisection)]
)
def test_rows_that_are_not_numbers_end(kth_largest, least_of_mass):
    rows = torch.full((2, 8), torch.nan)
    assert kth_largest(rows, torch.tensor([[1], [8]])).isnan().all()
    assert least_of_mass(-rows, torch.tensor([[0.5], [1.0]])).shape == (2, 1)


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compiled_equals_eager(compiler):
    rows, k = scores(4, 300, torch.float32), torch.tensor([[1], [7], [30], [300]])
    compiled = torch.compile(lambda *args: kth_largest(*args) + 1, backend=compiler, fullgraph=True)
    assert torch.equal(compiled(rows, k), kth_largest(rows, k) + 1)


def test_without_a_compiler_rows_are_sorted(monkeypatch):
    monkeypatch.setattr(thresholds, "cpp_kernel", lambda *_: None)
    rows, k = scores(4, 300, torch.float32), torch.tensor([[1], [7], [30], [300]])
    assert torch.equal(kth_largest(rows, k), kth_by_sorting(rows, k))
