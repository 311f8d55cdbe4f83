"""``smc-compile sweep``: axes, figures, the table and the files."""

from __future__ import annotations

import json
import shlex

import pytest

from smc_compile.__main__ import build_parser, main
from smc_compile.bench import sweep_axes, sweep_points
from smc_compile.bench.ceilings import Ceilings
from smc_compile.bench.sweep_figures import best_lookaheads
from smc_compile.bench.sweep_points import PARTS, Point, Timing
from smc_compile.commands import sweep

TINY = shlex.split(
    "sweep --layers 2 --dim 32 --heads 4 --kv-heads 2 --hidden 48 --vocab 64 "
    "--draft-layers 1 --draft-dim 16 --draft-heads 2 --draft-kv-heads 2 --draft-hidden 24 "
    "--acceptance none --dtype float32 --prompt-length 6 --new-tokens 20 --lookahead 3 --n-particles 2 --cycles 1"
)


@pytest.fixture
def uncompiled(monkeypatch, interpreted):
    """Regions run as they are, and the machine's rates are given: neither Inductor nor the machine is tested."""
    monkeypatch.setattr(sweep_points, "COMPILER", "eager")
    monkeypatch.setattr(sweep, "measure_ceilings", lambda *_: Ceilings(1e10, 1e11))


# ---- figures --------------------------------------------------------------------------------------------------------


def timing(seconds: float) -> Timing:
    parts = dict(zip(PARTS, (0.4 * seconds, 0.3 * seconds, 0.2 * seconds, 0.1 * seconds), strict=True))
    return Timing(seconds, parts, 2, 1, 5.0, 1000, 2000, 1.1 * seconds)


def test_predictions_stand_beside_what_was_measured():
    def row(n: int, k: int, measured: float, predicted: float) -> dict:
        point = {"n_particles": n, "lookahead": k, "prompt_length": 5, "new_tokens": 9, "requests": 1}
        return {**point, "ms_per_cycle": measured, "predicted_ms_per_cycle": predicted}

    rows = [row(2, 1, 10, 10), row(2, 4, 20, 30), row(8, 1, 10, 9), row(8, 4, 30, 30)]
    assert best_lookaheads(rows) == ["N=2 1 and 4", "N=8 1 and 1"]
    assert best_lookaheads(rows[:2]) == ["1 and 4"]
    assert best_lookaheads(rows[::2]) == []
    line = sweep.prediction_line(rows)
    assert "off by 5% in the middle, 50% at most" in line
    assert line.endswith("predicted and measured: N=2 1 and 4, N=8 1 and 1")


# ---- the whole command ----------------------------------------------------------------------------------------------


def test_a_sweep_shows_writes_and_draws_its_points(tmp_path, capsys, uncompiled, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(sweep_axes, "free_bytes", lambda device: 3_000_000)
    stored, picture = tmp_path / "rows.json", tmp_path / "sweep.svg"
    options = f"--values 1 3 4096 --repeats 2 --json {stored} --plot {picture}"
    assert main([*TINY, *options.split()]) == 0
    report = json.loads(stored.read_text())
    assert (report["command"], report["interrupted"]) == ("sweep", False)
    assert report["axes"] == {"n_particles": [1, 3, 4096]}
    rows = report["rows"]
    assert [row["n_particles"] for row in rows] == [1, 3]
    assert [row["suffix_cache_bytes"] for row in rows] == [n * rows[0]["suffix_cache_bytes"] for n in (1, 3)]
    assert {row["prompt_cache_bytes"] for row in rows} == {rows[0]["prompt_cache_bytes"]}
    assert all(row["repeats"] == 2 and row["loop_tokens_per_second"] > 0 for row in rows)
    assert list(report["not_measured"]) == ["N=4096"]
    assert "one-token loop" in picture.read_text()
    output = capsys.readouterr().out
    assert "N=4096: not measured: caches, tokens and logits take at least" in output
    assert max(map(len, output.splitlines())) <= 100


def test_what_was_measured_before_ctrl_c_is_shown_and_written(tmp_path, capsys, uncompiled, monkeypatch):
    calls = []

    def time_point(point: Point, seed: int) -> Timing:
        calls.append(point)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return timing(0.1)

    monkeypatch.setattr(sweep, "point_timer", lambda *_: time_point)
    stored = tmp_path / "rows.json"
    assert (
        main([*TINY, "--over", "prompt_length", "--values", "5", "6", "7", "--skip-loop", "--json", str(stored)]) == 130
    )
    report = json.loads(stored.read_text())
    assert report["interrupted"] is True
    assert [row["prompt_length"] for row in report["rows"]] == [5, 6]
    assert "interrupted: 2 of 3 points measured" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--over", "new_tokens", "--values", "4", "5"], "No point of the sweep could be measured"),
        (["--plot", "sweep.pdf"], "only SVG and PNG are written"),
        (["--json", "/no/such/folder/rows.json"], "/no/such/folder is not a folder"),
        (["--cycles", "0"], "--cycles must be at least 1"),
        (["--n-particles", "0", "--over", "lookahead"], "--n-particles must be at least 1"),
        (["--heads", "3"], "--dim must be a multiple"),
        (["--values", "1000000000000"], "No point of the sweep fits in memory"),
    ],
)
def test_errors_exit_2_without_a_traceback(options, message, capsys, uncompiled):
    assert main([*TINY, *options]) == 2
    output = capsys.readouterr()
    assert message in " ".join(output.err.split())
    assert "Traceback" not in output.err + output.out


def test_defaults():
    arguments = build_parser().parse_args(["sweep"])
    assert (arguments.over, arguments.values, arguments.cycles) == (["n_particles"], None, 4)
    assert Point(*(getattr(arguments, name) for name in Point._fields)) == Point(8, 4, 128, 64, 1)
