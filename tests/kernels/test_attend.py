"""Attention over a shared prompt and own suffixes at once: exact to rounding, on a CPU and in tensor code."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from smc_compile.kernels import attend as op_file
from smc_compile.kernels.attend import attend_in_tensor_code, suits
from smc_compile.passes.cache.attention_ops import attention_over_cache, hidden_by, hidden_later

# b, n, h, g, t, p, s, d, v: requests, particles, key heads, queries of each, new tokens, prompt, suffix, widths
SIZES = [
    (1, 1, 1, 1, 1, 1, 2, 16, 16),
    (1, 2, 4, 1, 9, 130, 67, 64, 64),
    (3, 4, 2, 3, 5, 17, 33, 32, 48),
    (2, 1, 1, 8, 1, 5, 7, 16, 128),
    (1, 40, 3, 1, 2, 9, 11, 64, 32),
]
sizes = pytest.mark.parametrize("size", SIZES, ids=str)


def operands(size, dtype=torch.float32, hidden_rows: int | None = None) -> list[Tensor]:
    """Every query sees the prompt's first key; nobody sees the last quarter of the slots."""
    b, n, h, g, t, p, s, d, v = size
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    query = normal(b * n, t, h, g, d).permute(0, 2, 3, 1, 4) * d**-0.5
    hidden = torch.rand(hidden_rows or b, t, p + s, generator=generator) < 0.3
    hidden[:, :, 0], hidden[:, :, p + s - s // 4 :] = False, True
    return [query, normal(b, h, p, d), normal(b, h, p, v), normal(b * n, h, s, d), normal(b * n, h, s, v), hidden]


def exact(query, prompt_keys, prompt_values, suffix_keys, suffix_values, hidden) -> Tensor:
    """By PyTorch's own attention in float64 over caches joined for every particle."""
    r, g = len(query), query.shape[2]
    n = r // len(prompt_keys)
    keys, values = (
        torch.cat([prompt.repeat_interleave(n, 0), own], 2).double()[:, :, None].expand(-1, -1, g, -1, -1)
        for prompt, own in ((prompt_keys, suffix_keys), (prompt_values, suffix_values))
    )
    seen = ~hidden.repeat_interleave(r // len(hidden), 0)[:, None, None]
    return torch.nn.functional.scaled_dot_product_attention(query.double(), keys, values, seen, scale=1.0)


@sizes
@pytest.mark.parametrize("masks", ["one", "of each request", "of each row"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 2**-7)])
def test_the_kernel_is_exact_to_rounding(size, masks, dtype, tolerance) -> None:
    b, n = size[:2]
    given = operands(size, dtype, {"one": 1, "of each request": b, "of each row": b * n}[masks])
    assert suits(given[0], given[4])
    result, wanted = torch.ops.smc_compile.attend(*given), exact(*given)
    assert result.dtype == dtype
    assert result.shape == wanted.shape
    assert (result - wanted).abs().max() <= tolerance * wanted.abs().max()


@sizes
@pytest.mark.parametrize("rows", [1, 0])
def test_the_tensor_code_is_exact_in_float64(size, rows) -> None:
    given = [x.double() if x.is_floating_point() else x for x in operands(size, hidden_rows=rows)]
    assert not suits(given[0], given[4])
    torch.testing.assert_close(attention_over_cache(*given), exact(*given), rtol=1e-12, atol=1e-12)


def test_the_tensor_code_weighs_in_the_type_of_the_cache() -> None:
    given = operands(SIZES[2], torch.bfloat16)
    result, wanted = attend_in_tensor_code(*given), exact(*given)
    assert result.dtype == torch.bfloat16
    assert (result - wanted).abs().max() <= 2**-6 * wanted.abs().max()


def test_a_row_does_not_depend_on_the_others() -> None:
    query, prompt_keys, prompt_values, suffix_keys, suffix_values, hidden = operands((1, 12, 2, 1, 5, 70, 9, 32, 32))
    among = torch.ops.smc_compile.attend(query, prompt_keys, prompt_values, suffix_keys, suffix_values, hidden)
    alone = torch.ops.smc_compile.attend(
        query[7:8], prompt_keys, prompt_values, suffix_keys[7:8], suffix_values[7:8], hidden
    )
    assert torch.equal(among[7:8], alone)


def test_what_nobody_sees_is_not_read() -> None:
    """Slots that were never written may hold anything."""
    given = operands(SIZES[1])
    before = torch.ops.smc_compile.attend(*given)
    given[3][:, :, -10:], given[4][:, :, -10:] = float("nan"), float("nan")
    assert torch.equal(torch.ops.smc_compile.attend(*given), before)


def test_operands_need_not_be_contiguous() -> None:
    given = operands(SIZES[2])
    stretched = [torch.stack([x, x], -1)[..., 0] for x in given]
    assert torch.equal(torch.ops.smc_compile.attend(*stretched), torch.ops.smc_compile.attend(*given))


def test_without_a_compiler_it_is_the_tensor_code(monkeypatch) -> None:
    monkeypatch.setattr(op_file, "cpp_kernel", lambda *_: None)
    given = operands(SIZES[2])
    assert torch.equal(attention_over_cache(*given), attend_in_tensor_code(*given))


def test_widths_and_types_without_a_kernel_take_the_tensor_code() -> None:
    query, values = torch.zeros(1, 1, 1, 1, 16), torch.zeros(1, 1, 2, 16)
    assert suits(query, values)
    assert not suits(query[..., :8], values)
    assert not suits(query, values[..., :8])
    assert not suits(query.double(), values.double())


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compiled_equals_eager(compiler) -> None:
    """Its result is laid out as the layer after it reads: joining the heads copies nothing."""
    given = operands(SIZES[2])

    def joined(*arguments: Tensor) -> Tensor:
        return attention_over_cache(*arguments).permute(0, 3, 1, 2, 4).flatten(2)

    compiled = torch.compile(joined, backend=compiler, fullgraph=True)
    assert torch.equal(compiled(*given), joined(*given))


def test_masks_are_told_by_positions_or_by_what_they_keep() -> None:
    positions, keys = torch.tensor([[2, 3]]), torch.tensor([[0, 1, 3, 9]])
    later = hidden_later(positions, keys)
    assert later.int().tolist() == [[[0, 0, 1, 1], [0, 0, 0, 1]]]
    assert torch.equal(hidden_by(~later[:, None], 2), later)
    assert hidden_by(torch.tensor([[True, False]]), 3).int().tolist() == [[[0, 1]] * 3]
