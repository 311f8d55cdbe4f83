"""The table fits, whatever is in it, and says what is left."""

from __future__ import annotations

import pytest
from helpers.fake_results import fake_results, rendered

from smc_compile.bench.figures import make_rows
from smc_compile.bench.tables import number, range_line, rows_table

METHODS = ["eager", "transformers", "assisted", "gpt-fast", "autoregressive", "speculative", "smc"]
FULL = {"share_of_bound": 1.0, "share_of_bandwidth": 1.0, "share_of_arithmetic": 1.0, "mean_accepted": 11.5}


@pytest.mark.parametrize("width", [80, 100, 200])
@pytest.mark.parametrize("scored", [False, True])
def test_the_table_fits_untruncated(scored, width):
    results = fake_results({method: [1e-3] for method in METHODS})
    rows = [row | FULL | {"mean_log_prob": -10.123 if scored else None} for row in make_rows(results)]
    names = [result.contestant.name for result in results]
    names[-1] = "smc  N=128 K=16"
    text = rendered(rows_table(rows, names, width, missing=["gpt-fast"]), width)
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= min(width, 100)


def test_at_full_width_the_bench_shows_every_part_of_the_time_and_both_ceilings():
    results = fake_results({method: [1.0, 1.0] for method in METHODS})
    rows = [row | FULL for row in make_rows(results)]
    text = rendered(rows_table(rows, [result.contestant.name for result in results]))
    head = " ".join(text.splitlines()[:2])
    words = "tokens/s loop step width metic draft score ple host ted ESS nats"
    assert [word for word in words.split() if word not in head] == []


def test_names():
    names = [result.contestant.name for result in fake_results({method: [1.0] for method in METHODS})]
    assert names == [
        "eager loop", "transformers", "assisted", "gpt-fast", "compiled loop", "speculative  K=3", "smc  N=4 K=3",
    ]  # fmt: skip


def test_what_is_missing_has_a_row_without_figures():
    rows = make_rows(fake_results({"eager": [1.0]}))
    last = rendered(rows_table(rows, ["eager loop"], missing=["gpt-fast"])).splitlines()[-1]
    assert last.split()[0] == "gpt-fast"
    assert set(last.split()[1:]) == {"-"}


def test_the_spread_is_told_below_the_table():
    rows = make_rows(fake_results({"eager": [1.0, 2.0, 3.0]}))
    assert range_line(rows, ["eager loop"]) == "tokens/s, slowest and fastest round: eager loop 4.00-12.0"


@pytest.mark.parametrize(("value", "text"), [(1234.5, "1234"), (99.96, "100"), (12.34, "12.3"), (0.0456, "0.05")])
def test_number(value, text):
    assert number(value) == text
