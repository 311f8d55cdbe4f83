"""Rows of a sweep: medians, bounds, predictions, and the table that shows them."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from smc_compile.bench.ceilings import Ceilings, ModelSize
from smc_compile.bench.sweep_figures import sweep_row
from smc_compile.bench.sweep_points import PARTS, Point, Timing
from smc_compile.bench.tables import sweep_table

BASE = Point(n_particles=2, lookahead=3, prompt_length=100, new_tokens=20, requests=1)


def timing(seconds: float) -> Timing:
    parts = dict(zip(PARTS, (0.4 * seconds, 0.3 * seconds, 0.2 * seconds, 0.1 * seconds), strict=True))
    return Timing(seconds, parts, 2, 1, 5.0, 1000, 2000, 1.1 * seconds)


def test_a_row_is_the_median_round_beside_what_a_cycle_must_read_and_multiply():
    point = BASE._replace(requests=3)
    target, draft = ModelSize(10**6, 4, 100), ModelSize(10**5, 4, 10)
    rounds = [timing(s) for s in (0.3, 0.1, 0.2)]
    row = sweep_row(point, {point: rounds, point.loop: [timing(0.06)]}, (target, draft), Ceilings(1e9, 1e15))
    cached = 3 * (100 + 2 * 10)  # each prompt once, half of a suffix for each particle
    read = 4 * 10**6 + 100 * cached + 3 * (4 * 10**5 + 10 * cached)
    assert row["bytes_per_cycle"] == read
    assert row["bound_ms_per_cycle"] == pytest.approx(1e3 * read / 1e9)
    assert row["share_of_bound"] == pytest.approx(read / 1e9 / 0.2)
    assert row["tokens_per_second"] == pytest.approx(3 * 4 / 0.2)
    assert (row["tokens_per_second_min"], row["tokens_per_second_max"]) == pytest.approx((40, 120))
    assert row["bound_tokens_per_second"] == pytest.approx(3 * 4 / (read / 1e9))
    assert row["loop_tokens_per_second"] == pytest.approx(3 / 0.06)
    assert sum(row[f"{part}_ms"] for part in PARTS) == pytest.approx(row["ms_per_cycle"]) == pytest.approx(200)
    assert (row["repeats"], row["cycles"], row["resamplings_per_cycle"]) == (3, 2, 0.5)


def test_the_table_fits_where_every_figure_is_wide():
    row = sweep_row(
        BASE, {BASE: [timing(12.3)]}, (ModelSize(10**12, 4, 10**8), ModelSize(10**9, 4, 10)), Ceilings(1e9, 1e12)
    )
    wide = row | {"loop_tokens_per_second": 0.001, "suffix_cache_bytes": 123_456e6, "prompt_cache_bytes": 123_456e6}
    console = Console(file=io.StringIO(), width=100)
    console.print(sweep_table([wide], {"prompt_length": "prompt", "new_tokens": "new"}))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "…" not in text
    assert len(text.splitlines()) == 3
    assert max(map(len, text.splitlines())) <= 100
