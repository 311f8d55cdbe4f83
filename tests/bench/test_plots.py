"""Pictures of a sweep."""

from __future__ import annotations

import itertools
import re
import sys
from importlib import util
from itertools import pairwise

import pytest

from smc_compile.bench import plots
from smc_compile.bench.plots import PARTS, check_plot_path, spread_out
from smc_compile.errors import OptionError


def fake_row(n: int, k: int, loop: float | None = 14.0) -> dict[str, float | None]:
    """The cost of a cycle that grows with N and K."""
    parts = {"draft": 4.0 * k + 0.2 * n, "score": 50.0 + 1.5 * n * (k + 1), "resample": 0.3 * n, "host": 2.0}
    total = sum(parts.values())
    speed = 1e3 * (k + 1) / total
    return {
        "n_particles": n, "lookahead": k, "tokens_per_second": speed, "tokens_per_second_min": 0.95 * speed,
        "tokens_per_second_max": 1.04 * speed, "bound_tokens_per_second": 1.7 * speed, "ms_per_cycle": total,
        "loop_tokens_per_second": loop, "bound_ms_per_cycle": total / 1.7, **{f"{p}_ms": parts[p] for p in PARTS},
    }  # fmt: skip


def words(path) -> list[str]:
    return re.findall(r"<text[^>]*>([^<]+)</text>", path.read_text(encoding="utf-8"))


def test_one_axis_shows_speed_and_parts_labelled_where_they_are(tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "sweep.svg"
    plots.draw([fake_row(n, 4) for n in (1, 2, 4, 8)], ["n_particles"], path, "A pair", "float32, a machine")
    found = words(path)
    labels = ["A pair", "float32, a machine", "SMC", "one-token loop", "tokens/s", *PARTS]
    assert [label for label in labels if label not in found] == []
    assert found.count("bound") == 2
    assert found.count("8") == 2  # a tick in each panel


def test_a_cycle_that_was_replayed_is_one_bar(tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "sweep.svg"
    rows = [fake_row(n, 4) | {f"{part}_ms": None for part in PARTS} for n in (1, 2)]
    plots.draw(rows, ["n_particles"], path, "A pair", "")
    assert "cycle" in words(path)
    assert not set(PARTS) & set(words(path))


def test_a_loop_that_was_not_timed_is_not_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "sweep.svg"
    plots.draw([fake_row(4, 2, None)], ["lookahead"], path, "A pair", "")
    assert "one-token loop" not in words(path)


def test_a_grid_has_a_line_for_each_value_of_the_first_axis(tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "grid.png"
    rows = [fake_row(n, k) for n, k in itertools.product((1, 4, 16), (2, 4, 8))]
    plots.draw(rows, ["n_particles", "lookahead"], path, "A pair", "")
    assert path.read_bytes().startswith(b"\x89PNG")
    plots.draw(rows, ["n_particles", "lookahead"], path.with_suffix(".svg"), "A pair", "")
    assert {"N=1", "N=4", "N=16"} <= set(words(path.with_suffix(".svg")))


def test_labels_stand_apart_and_move_no_more_than_they_must():
    heights = [0.5, 0.1, 0.51, 0.52, 0.9]
    placed = spread_out(heights, 0.06)
    assert placed[1] == 0.1
    assert placed[4] == 0.9
    assert sum(placed) == pytest.approx(sum(heights))
    assert all(b - a >= 0.06 - 1e-9 for a, b in pairwise(sorted(placed)))
    assert sorted(range(5), key=lambda i: placed[i]) == sorted(range(5), key=lambda i: heights[i])


@pytest.mark.parametrize(
    ("path", "why"),
    [("sweep.pdf", "only SVG and PNG"), ("sweep", "only SVG and PNG"), ("/no/such/folder/a.png", "is not a folder")],
)
def test_what_cannot_be_drawn_is_refused_at_once(path, why):
    with pytest.raises(OptionError, match=why):
        check_plot_path(path)


def test_without_matplotlib_the_error_names_the_extra(monkeypatch):
    monkeypatch.setattr(plots, "find_spec", lambda name: None)
    with pytest.raises(OptionError, match=r"smc_compile\[plots\]"):
        check_plot_path("sweep.png")
    check_plot_path(None)


def test_matplotlib_is_not_imported_before_something_is_drawn():
    source = util.find_spec("smc_compile.bench.plots").loader.get_source("smc_compile.bench.plots")  # type: ignore[union-attr]
    top = [line for line in source.splitlines() if line.startswith(("import ", "from "))]
    assert not any("matplotlib" in line for line in top)
    assert "smc_compile.bench.plots" in sys.modules
