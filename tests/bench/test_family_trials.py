"""One family tried: what compiles, what its own cache serves, and what is refused and why."""

from __future__ import annotations

import pytest

from smc_compile.bench import family_trials
from smc_compile.bench.family_trials import try_family
from smc_compile.pairs import tiny_transformers as tiny


@pytest.fixture
def transformers():
    return pytest.importorskip("transformers", minversion="5")


def test_rows_of_one_family(transformers) -> None:
    fused, written = try_family("mistral", (None, "eager"))
    assert [row.attention for row in (fused, written)] == ["sdpa", "eager"]
    assert [row.attention_ops for row in (fused, written)] == ["2 sdpa", "2 matmul"]
    for row in (fused, written):
        assert (row.status, row.windows, row.bytes_per_token) == ("compiled", [6], 2 * 2 * 2 * 8 * 8)
        assert row.error is not None
        assert row.error < 1e-9


def test_a_family_without_fused_attention_gives_one_row(transformers) -> None:
    assert [row.attention for row in try_family("bloom", (None, "eager"))] == ["eager"]


def test_what_does_not_compile_gives_its_reason(transformers) -> None:
    (row,) = try_family("rwkv", (None,))
    assert (row.status, row.error) == ("refused", None)
    assert row.reason is not None
    assert row.reason.startswith("pad mixes positions (`pad` (pad)")
    assert "its own cache: the model's own cache does not reproduce the model" in row.reason


def test_a_recurrent_model_is_tried_with_its_own_cache(transformers) -> None:
    (row,) = try_family("mamba", (None,))
    assert row.status == "own cache"
    assert row.reason is not None
    assert row.reason.startswith("conv1d has no position-by-position form")
    assert row.error is not None
    assert row.error < 1e-9


def test_a_model_whose_positions_read_later_ones_is_no_decoder(transformers) -> None:
    assert [row.status for row in try_family("xlnet", (None,))] == ["no decoder"]


def test_a_configuration_that_does_not_build_is_told_apart(transformers, monkeypatch) -> None:
    monkeypatch.setitem(tiny.SIZES, "hidden_size", 33)
    (row,) = try_family("gpt2", (None,))
    assert row.status == "not built"
    assert row.reason


def test_an_error_of_ours_is_not_called_a_refusal(transformers, monkeypatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise KeyError("node")

    monkeypatch.setattr(family_trials, "trace_model", broken)
    (row,) = try_family("gpt2", (None,))
    assert (row.status, row.reason) == ("failed", "KeyError: 'node'")
