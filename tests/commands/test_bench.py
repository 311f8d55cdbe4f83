"""``smc-compile bench``: arguments, peers, the JSON file, and errors without tracebacks."""

from __future__ import annotations

import json
import shlex

import pytest
import torch
from helpers.fake_results import COLUMNS

from smc_compile.__main__ import build_parser, main
from smc_compile.bench import contestants, peer_transformers
from smc_compile.bench.figures import PARTS
from smc_compile.bench.measure import Contestant
from smc_compile.commands import bench
from smc_compile.errors import OptionError
from smc_compile.generate import generate
from smc_compile.pairs.presets import configs, fill_in, weight_count

TINY = shlex.split(
    "bench --layers 2 --dim 64 --heads 4 --kv-heads 2 --hidden 96 --vocab 128 "
    "--draft-layers 1 --draft-dim 32 --draft-heads 2 --draft-kv-heads 2 --draft-hidden 64 "
    "--dtype float32 --prompt-length 6 --new-tokens 8 --lookahead 3 --repeats 2"
)


@pytest.fixture
def uncompiled(monkeypatch, interpreted):
    """Regions run as they are: what the command does with the figures is tested, not Inductor."""
    monkeypatch.setattr(contestants, "generate", lambda *a, **options: generate(*a, **{**options, "compiler": "eager"}))


# ---- arguments and errors -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [["--help"], ["demo", "--help"], ["bench", "--help"], ["sweep", "--help"]])
def test_help_fits_and_names_the_options(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 120
    assert all(
        word in text for word in (["demo", "bench", "sweep"] if len(arguments) == 1 else ["--n-particles", "--json"])
    )


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["nonsense"],
        ["bench", "--layers", "two"],
        ["bench", "--no-such-option"],
        ["bench", "--acceptance", "1.5"],
        ["bench", "--acceptance", "some"],
    ],
)
def test_argparse_errors_exit_2(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([*TINY, "--heads", "3"], "--dim must be a multiple"),
        ([*TINY, "--kv-heads", "3"], "--heads must be a multiple"),
        ([*TINY, "--draft-dim", "30"], "--draft-dim must be a multiple"),
        ([*TINY, "--layers", "0"], "--layers must be at least 1"),
        ([*TINY, "--threads", "0"], "--threads must be at least 1"),
        ([*TINY, "--n-particles", "1", "2", "--lookahead", "1", "2", "3"], "do not pair up"),
        ([*TINY, "--json", "/no/such/folder/rows.json"], "/no/such/folder is not a folder"),
        ([*TINY, "--json", "/"], "it is a folder"),
        ([*TINY, "--device", "no-such-device"], "Cannot use --device"),
        ([*TINY, "--device", "meta"], "neither cpu nor cuda"),
        ([*TINY, "--temperature", "0"], "--temperature must be above 0"),
        ([*TINY, "--chains", "2", "0"], "--chains must be at least 1"),
        ([*TINY, "--preset", "336M-31"], "did you mean 336m-31m? why: the presets are 336m-31m, 0.5b-60m, llama-8b-1b"),
        ([*TINY, "--draft-dim", "64"], "The draft does not fit inside the target"),
        (["demo", "--picture", "tree.png"], "only SVG is written"),
        (["demo", "--samples", "1"], "--samples must be at least 2"),
        (["demo", "--repeats", "0"], "--repeats must be at least 1"),
    ],
)
def test_our_own_errors_exit_2(arguments, message, capsys):
    assert main(arguments) == 2
    output = capsys.readouterr()
    assert message in " ".join(output.err.split())
    assert "Traceback" not in output.err + output.out


@pytest.mark.parametrize("option", ["--n-particles", "--lookahead"])
@pytest.mark.parametrize("value", ["0", "-1"])
def test_errors_of_the_library_exit_2(option, value, capsys):
    assert main([*TINY, option, value]) == 2
    output = capsys.readouterr()
    assert output.err.startswith("error: ")
    assert "Traceback" not in output.err + output.out


def test_defaults():
    arguments = build_parser().parse_args(["bench"])
    assert bench.pair_shapes(arguments.n_particles, arguments.lookahead) == [(4, 8), (2, 8)]
    assert arguments.acceptance == 0.7
    fill_in(arguments)
    assert [round(weight_count(config) / 1e6) for config in configs(arguments, 8)] == [336, 31]


@pytest.mark.parametrize(("text", "value"), [("0.5", 0.5), ("none", None), ("None", None)])
def test_acceptance_is_a_share_or_none(text, value):
    assert build_parser().parse_args(["bench", "--acceptance", text]).acceptance == value


def test_pair_shapes():
    assert bench.pair_shapes([4], [2, 3]) == [(4, 2), (4, 3)]
    assert bench.pair_shapes([4, 5], [2, 3]) == [(4, 2), (5, 3)]
    with pytest.raises(OptionError):
        bench.pair_shapes([1, 2], [1, 2, 3])


# ---- whole commands -------------------------------------------------------------------------------------------------


def test_bench_writes_its_rows(tmp_path, capsys, uncompiled):
    path = tmp_path / "rows.json"
    assert main([*TINY, "--n-particles", "4", "2", "--assistant-tokens", "2", "3", "--json", str(path)]) == 0
    report = json.loads(path.read_text())
    assert min(report["ceilings"].values()) > 0
    assert report["command"] == "bench"
    assert report["tuned"]["acceptance"] == pytest.approx(0.7, abs=0.01)
    assert report["interrupted"] is False
    assert report["not_measured"] == {}
    assert {"cpu", "cores", "torch"} <= set(report["machine"])
    rows = report["rows"]
    assert [(row["method"], row["n_particles"], row["lookahead"]) for row in rows] == [
        ("eager", None, None),
        ("transformers", None, None),
        ("assisted", None, rows[2]["lookahead"]),
        ("autoregressive", None, None),
        ("speculative", 1, 3),
        ("smc", 4, 3),
        ("smc", 2, 3),
        ("auto", None, None),
    ]
    assert rows[2]["lookahead"] in (2, 3)
    for row in rows:
        assert set(row) == COLUMNS
        assert row["tokens_per_second"] > 0
        assert row["tokens_per_second_min"] <= row["tokens_per_second"] <= row["tokens_per_second_max"]
        for share in ("share_of_bound", "share_of_bandwidth", "share_of_arithmetic"):
            assert (row[share] is not None) == (row["method"] not in ("eager", "assisted", "auto"))
        assert (row["mean_accepted"] is not None) == (row["method"] in ("assisted", "speculative"))
    assert 0 < rows[4]["mean_accepted"] <= 3
    assert [row["kl_per_token"] for row in rows[:5]] == [None, None, None, 0.0, 0.0]
    for row in rows[5:7]:
        assert row["kl_per_token"] != 0.0
        assert 1 <= row["mean_ess"] <= row["n_particles"]
        assert sum(row[f"{part}_share"] for part in PARTS) == pytest.approx(1, abs=0.2)
    output = capsys.readouterr().out
    assert "smc  N=4 K=3" in output
    assert "speculative  K=3" in output
    assert max(map(len, output.splitlines())) <= 100


def test_bench_can_skip_the_loops_of_others(tmp_path, uncompiled):
    path = tmp_path / "rows.json"
    skipped = ["--skip-eager", "--skip-transformers", "--skip-speculative", "--skip-auto", "--acceptance", "none"]
    assert main([*TINY, "--n-particles", "2", *skipped, "--json", str(path)]) == 0
    report = json.loads(path.read_text())
    assert [row["method"] for row in report["rows"]] == ["autoregressive", "smc"]
    assert all(row["speedup_over_eager"] is None for row in report["rows"])
    assert report["tuned"] is None


def test_peers_that_are_not_there_are_named_and_the_rest_runs(monkeypatch, tmp_path, capsys, uncompiled):
    monkeypatch.setattr(peer_transformers, "has_library", lambda: False)
    path = tmp_path / "rows.json"
    options = ["--n-particles", "2", "--skip-eager", "--skip-speculative", "--skip-auto"]
    assert main([*TINY, *options, "--json", str(path)]) == 0
    report = json.loads(path.read_text())
    assert [row["method"] for row in report["rows"]] == ["autoregressive", "smc"]
    assert list(report["not_measured"]) == ["transformers", "assisted"]
    output = " ".join(capsys.readouterr().out.split())
    assert "transformers: not measured: transformers is not installed" in output


def test_bench_interrupted_shows_and_writes_whole_rounds(monkeypatch, tmp_path, capsys):
    calls: list[str] = []

    def contestant(name: str, stops_at: int) -> Contestant:
        def run(seed: int) -> torch.Tensor:
            calls.append(name)
            if calls.count(name) == stops_at:
                raise KeyboardInterrupt
            return torch.zeros(1, 14, dtype=torch.int64)

        return Contestant(name, run, 8)

    monkeypatch.setattr(bench, "all_contestants", lambda *_: ([contestant("eager", 9), contestant("gpt-fast", 3)], {}))
    path = tmp_path / "rows.json"
    assert main([*TINY, "--json", str(path)]) == 130
    report = json.loads(path.read_text())
    assert report["interrupted"] is True
    assert [(row["method"], row["repeats"]) for row in report["rows"]] == [("eager", 1), ("gpt-fast", 1)]
    output = capsys.readouterr()
    assert "interrupted: 1 of 2 rounds measured" in output.out
    assert "eager loop" in output.out
    assert "Traceback" not in output.err
