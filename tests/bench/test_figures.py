"""Figures of a measurement: medians, ratios within a round, shares."""

from __future__ import annotations

from dataclasses import replace

import pytest
from helpers.fake_results import COLUMNS, fake_generation, fake_results, rendered

from smc_compile.bench.ceilings import Ceilings, PassCost
from smc_compile.bench.figures import PARTS, make_rows, mean_ess
from smc_compile.bench.tables import rows_table


def test_rows_hold_medians_and_ratios_within_a_round():
    results = fake_results({"eager": [12, 6, 3], "autoregressive": [6, 3, 1.5], "smc": [1, 1.5, 0.75]})
    eager, loop, smc = make_rows(results)
    assert set(eager) == set(loop) == set(smc) == COLUMNS
    assert (eager["tokens_per_second"], loop["tokens_per_second"], smc["tokens_per_second"]) == (2, 4, 12)
    assert (smc["tokens_per_second_min"], smc["tokens_per_second_max"]) == (8, 16)
    assert smc["speedup_over_eager"] == 4  # of 12, 4 and 4; the ratio of medians would be 6
    assert smc["speedup_over_autoregressive"] == 2
    assert eager["ms_per_cycle"] == 500
    assert smc["ms_per_cycle"] == pytest.approx(250)  # a median second, less a quarter for the prompt, over 3 cycles
    assert [smc[f"{part}_share"] for part in PARTS] == pytest.approx([0.25, 0.5, 0, 0, 0.25])
    assert smc["mean_ess"] == 2
    assert eager["draft_share"] is eager["compile_seconds"] is loop["mean_ess"] is None


def test_speedup_without_eager_is_null():
    rows = make_rows(fake_results({"autoregressive": [2], "smc": [1]}))
    assert [row["speedup_over_eager"] for row in rows] == [None, None]
    assert "eager" not in rendered(rows_table(rows, ["a", "b"]))


def test_no_cycle_means_no_ess():
    generation = fake_generation("smc", 1.0)
    assert generation is not None
    assert mean_ess([replace(generation, ess=generation.ess[:, :0])]) is None


def test_shares_are_of_the_seconds_of_a_step():
    (result,) = fake_results({"smc": [1]})  # 3 cycles in 0.75 s without the prompt
    passes = [PassCost(bytes=1e9, operations=0), PassCost(bytes=0, operations=1e9)]
    ceilings = Ceilings(bytes_per_second=1e10, operations_per_second=2e10)
    (row,) = make_rows([replace(result, contestant=replace(result.contestant, passes=passes))], ceilings)
    assert row["bound_ms_per_cycle"] == pytest.approx(150)
    assert row["share_of_bound"] == pytest.approx(0.6)
    assert row["share_of_bandwidth"] == pytest.approx(0.4)
    assert row["share_of_arithmetic"] == pytest.approx(0.2)


def test_accepted_tokens_are_told_or_counted():
    rows = make_rows(fake_results({"autoregressive": [1], "assisted": [1], "speculative": [1], "smc": [1]}))
    # The library's loop took 12 steps for 12 tokens.
    assert [row["mean_accepted"] for row in rows] == [None, 0, 2.5, None]
    assert [row["resample_share"] is None for row in rows] == [True, True, True, False]


def test_a_replayed_cycle_tells_no_parts():
    (result,) = fake_results({"smc": [1]})
    result.runs[0].generation.stats.replayed = 2
    (row,) = make_rows([result])
    assert [row[f"{part}_share"] for part in PARTS] == [None] * len(PARTS)
    assert row["ms_per_cycle"] == pytest.approx(250)


def test_the_peak_is_the_highest_round():
    (result,) = fake_results({"eager": [1, 1]})
    runs = [replace(run, peak_bytes=peak) for run, peak in zip(result.runs, (5, 7), strict=True)]
    assert make_rows([replace(result, runs=runs)])[0]["peak_bytes"] == 7
    unknown = [replace(run, peak_bytes=None) for run in result.runs]
    assert make_rows([replace(result, runs=unknown)])[0]["peak_bytes"] is None
