"""The command line: arguments, tables, the JSON file, and errors without tracebacks."""

from __future__ import annotations

import io
import json
import shlex
from argparse import Namespace
from dataclasses import replace
from xml.etree import ElementTree

import pytest
import torch
from generations import generation
from rich.console import Console

from smc_compile import bench, demo, measure
from smc_compile.__main__ import build_parser, main
from smc_compile.errors import OptionError
from smc_compile.result import Generation, Stats

TINY = shlex.split(
    "bench --layers 2 --dim 64 --heads 4 --kv-heads 2 --hidden 96 --vocab 128 "
    "--draft-layers 1 --draft-dim 32 --draft-heads 2 --draft-kv-heads 2 --draft-hidden 64 "
    "--dtype float32 --prompt-length 6 --new-tokens 8 --lookahead 3 --repeats 2"
)
COLUMNS = {
    "method", "n_particles", "lookahead", "tokens", "repeats", "tokens_per_second", "tokens_per_second_min",
    "tokens_per_second_max", "speedup_over_eager", "speedup_over_autoregressive", "ms_per_cycle",
    "bound_ms_per_cycle", "share_of_bound", "prefill_share", "draft_share", "score_share", "resample_share",
    "host_share", "mean_ess", "mean_log_prob", "mean_log_prob_stderr", "compile_seconds", "first_call_seconds",
    "note",
}  # fmt: skip


def fake_results(seconds: dict[str, list[float]]) -> list[measure.Result]:
    """Results of the three methods with the given seconds a round."""
    results = []
    for method, times in seconds.items():
        n, k = (4, 3) if method == "smc" else (None, None)
        contestant = measure.Contestant(method, lambda seed: torch.zeros(1, 1), 12, n, k)
        runs = [measure.Run(t, 0.0, torch.zeros(1, 14, dtype=torch.int64), fake_generation(method, t)) for t in times]
        results.append(measure.Result(contestant, runs[0], runs))
    return results


def fake_generation(method: str, seconds: float) -> Generation | None:
    if method == "eager":
        return None
    stats = Stats(method, 12, cycles=3, seconds=seconds, prefill_seconds=seconds / 4, draft_seconds=seconds / 2)
    shape = torch.zeros(1, 4, 14, dtype=torch.int64)
    ess = torch.tensor([[1.0, 2.0, 3.0]])
    return generation(
        sequences=shape[:, 0],
        particles=shape,
        log_weights=torch.zeros(1, 4),
        log_evidence=torch.zeros(1),
        ess=ess,
        ancestors=shape[:, :3, :4],
        stats=stats,
    )


def rendered(renderable: object, width: int = 100) -> str:
    """What a terminal shows."""
    console = Console(file=io.StringIO(), width=width)
    console.print(renderable)
    return console.file.getvalue()  # type: ignore[attr-defined]


# ---- arguments and errors -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [["--help"], ["demo", "--help"], ["bench", "--help"]])
def test_help_fits_and_names_the_options(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 120
    assert all(word in text for word in (["demo", "bench"] if len(arguments) == 1 else ["--n-particles", "--json"]))


@pytest.mark.parametrize("arguments", [[], ["nonsense"], ["bench", "--layers", "two"], ["bench", "--no-such-option"]])
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
    with torch.device("meta"):
        counts = [bench.parameter_count(bench.Llama(config)) for config in bench.configs(arguments, 8)]
    assert [round(count / 1e6) for count in counts] == [336, 31]


@pytest.mark.parametrize(("seconds", "warned"), [({"float32": 1.0, "bfloat16": 3.0}, True), ({"bfloat16": 0.5}, False)])
def test_a_type_that_the_processor_emulates_is_named(seconds, warned, monkeypatch):
    monkeypatch.setattr(bench, "product_seconds", lambda dtype, device: seconds.get(str(dtype)[6:], 1.0))
    lines = bench.emulated_dtype(torch.bfloat16, torch.device("cpu"))
    assert lines == (
        ["this processor emulates bfloat16: a product takes 3.0 times what float32 takes (--dtype float32)"]
        if warned
        else []
    )
    assert bench.emulated_dtype(torch.float32, torch.device("cpu")) == []


@pytest.mark.parametrize(("device", "emulated", "expected"), [
    ("cpu", True, "float32"), ("cpu", False, "bfloat16"), ("cuda", True, "bfloat16"),
])  # fmt: skip
def test_bench_takes_the_type_that_the_device_has_instructions_for(device, emulated, expected, monkeypatch):
    monkeypatch.setattr(bench, "EMULATED_BF16", emulated)
    assert bench.own_dtype(torch.device(device)) == expected


def test_pair_shapes():
    assert bench.pair_shapes([4], [2, 3]) == [(4, 2), (4, 3)]
    assert bench.pair_shapes([4, 5], [2, 3]) == [(4, 2), (5, 3)]
    with pytest.raises(OptionError):
        bench.pair_shapes([1, 2], [1, 2, 3])


# ---- rows and tables ------------------------------------------------------------------------------------------------


def test_rows_hold_medians_and_ratios_within_a_round():
    results = fake_results({"eager": [12, 6, 3], "autoregressive": [6, 3, 1.5], "smc": [1, 1.5, 0.75]})
    eager, loop, smc = measure.make_rows(results)
    assert set(eager) == set(loop) == set(smc) == COLUMNS
    assert (eager["tokens_per_second"], loop["tokens_per_second"], smc["tokens_per_second"]) == (2, 4, 12)
    assert (smc["tokens_per_second_min"], smc["tokens_per_second_max"]) == (8, 16)
    assert smc["speedup_over_eager"] == 4  # of 12, 4 and 4; the ratio of medians would be 6
    assert smc["speedup_over_autoregressive"] == 2
    assert eager["ms_per_cycle"] == 500
    assert smc["ms_per_cycle"] == pytest.approx(250)  # a median second, less a quarter for the prompt, over 3 cycles
    assert [smc[f"{part}_share"] for part in measure.PARTS] == pytest.approx([0.25, 0.5, 0, 0, 0.25])
    assert smc["mean_ess"] == 2
    assert eager["draft_share"] is eager["compile_seconds"] is loop["mean_ess"] is None


def test_speedup_without_eager_is_null():
    rows = measure.make_rows(fake_results({"autoregressive": [2], "smc": [1]}))
    assert [row["speedup_over_eager"] for row in rows] == [None, None]
    assert "eager" not in rendered(measure.rows_table(rows, ["a", "b"]))


def test_no_cycle_means_no_ess():
    generation = fake_generation("smc", 1.0)
    assert generation is not None
    assert measure.mean_ess([replace(generation, ess=generation.ess[:, :0])]) is None


@pytest.mark.parametrize("width", [80, 100])
@pytest.mark.parametrize("scored", [False, True])
def test_the_table_fits_untruncated(scored, width):
    results = fake_results({"eager": [1e-3], "autoregressive": [1e-3], "smc": [1e-3]})
    rows = measure.make_rows(results)
    for row in rows:
        row["mean_log_prob"] = -10.123 if scored else None
    names = ["eager loop", "compiled loop", "smc  N=16 K=8" if width == 80 else "smc  N=128 K=16"]
    text = rendered(measure.rows_table(rows, names, width), width)
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= width


@pytest.mark.parametrize(("value", "text"), [(1234.5, "1234"), (99.96, "100"), (12.34, "12.3"), (0.0456, "0.05")])
def test_number(value, text):
    assert measure.number(value) == text


def test_plain_loop_appends_tokens():
    ids = measure.plain_loop(lambda ids: torch.eye(5)[(ids + 1) % 5] * 1e3, torch.tensor([[0, 1], [2, 3]]), 4, 0.8)
    assert ids.tolist() == [[0, 1, 2, 3, 4, 0], [2, 3, 4, 0, 1, 2]]


# ---- quality --------------------------------------------------------------------------------------------------------


def test_log_probs_count_new_tokens_only_at_the_temperature():
    table = torch.randn(7, 7, generator=torch.Generator().manual_seed(0))
    sequences = torch.randint(0, 7, (20, 9), generator=torch.Generator().manual_seed(1))
    got = demo.sequence_log_probs(lambda ids: table[ids], sequences, 4, 0.5)
    log_p = (table / 0.5).log_softmax(-1)
    expected = [sum(log_p[row[t - 1], row[t]].item() for t in range(4, 9)) / 5 for row in sequences.tolist()]
    assert got.tolist() == pytest.approx(expected, rel=1e-5)


def test_quality_lines_and_scores_in_rows():
    scores = {"autoregressive": demo.Score(-2.0, 0.03, 9), "smc": demo.Score(-2.1, 0.04, 9)}
    assert demo.summarise(torch.tensor([1.0, 2.0, 3.0])) == demo.Score(2.0, pytest.approx(3**-0.5), 3)
    assert "-5.0% ± 2.50%" in " ".join(demo.quality_lines(scores))
    rows = demo.add_scores([{"method": "eager", "mean_log_prob": None}, {"method": "smc"}], scores)
    assert rows[0]["mean_log_prob"] is None
    assert rows[1] == {"method": "smc", "mean_log_prob": -2.1, "mean_log_prob_stderr": 0.04}


# ---- whole commands -------------------------------------------------------------------------------------------------


def test_bench_writes_its_rows(tmp_path, capsys):
    path = tmp_path / "rows.json"
    assert main([*TINY, "--n-particles", "4", "2", "--json", str(path)]) == 0
    report = json.loads(path.read_text())
    assert min(report["ceilings"].values()) > 0
    assert [row["share_of_bound"] is not None for row in report["rows"]] == [
        row["method"] in ("autoregressive", "smc") for row in report["rows"]
    ]
    assert report["command"] == "bench"
    assert {"cpu", "cores", "torch"} <= set(report["machine"])
    assert [(row["method"], row["n_particles"], row["lookahead"]) for row in report["rows"]] == [
        ("eager", None, None),
        ("transformers", None, None),
        ("autoregressive", None, None),
        ("smc", 4, 3),
        ("smc", 2, 3),
    ]
    for row in report["rows"]:
        assert set(row) == COLUMNS
        assert row["tokens_per_second"] > 0
        assert row["tokens_per_second_min"] <= row["tokens_per_second"] <= row["tokens_per_second_max"]
    for row in report["rows"][3:]:
        assert 1 <= row["mean_ess"] <= row["n_particles"]
        assert sum(row[f"{part}_share"] for part in measure.PARTS) == pytest.approx(1, abs=0.2)
    assert "smc  N=4 K=3" in capsys.readouterr().out


def test_bench_can_skip_the_loops_of_others(tmp_path):
    path = tmp_path / "rows.json"
    assert main([*TINY, "--n-particles", "2", "--skip-eager", "--skip-transformers", "--json", str(path)]) == 0
    rows = json.loads(path.read_text())["rows"]
    assert [row["method"] for row in rows] == ["autoregressive", "smc"]
    assert all(row["speedup_over_eager"] is None for row in rows)


def test_bench_without_transformers_says_so(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(bench, "has_library", lambda: False)
    path = tmp_path / "rows.json"
    assert main([*TINY, "--n-particles", "2", "--skip-eager", "--json", str(path)]) == 0
    assert [row["method"] for row in json.loads(path.read_text())["rows"]] == ["autoregressive", "smc"]
    assert "transformers is not installed" in capsys.readouterr().out


def test_demo_prints_texts_and_draws(tmp_path, capsys):
    path, picture = tmp_path / "rows.json", tmp_path / "tree.svg"
    options = f"--max-new-tokens 12 --n-particles 4 --lookahead 3 --repeats 1 --samples 3 --json {path}"
    assert main(["demo", *options.split(), "--picture", str(picture), "--prompt", "def f(x):\n"]) == 0
    output = capsys.readouterr().out
    assert output.count("def f(x):") == 3
    assert "true target samples" in output
    rows = json.loads(path.read_text())["rows"]
    assert [row["method"] for row in rows] == ["eager", "autoregressive", "smc"]
    assert rows[0]["mean_log_prob"] is None
    assert all(row["mean_log_prob"] < 0 for row in rows[1:])
    assert ElementTree.parse(picture) is not None


def test_errors_show_what_why_and_fix():
    console = Console(file=io.StringIO(), width=100)
    from smc_compile.__main__ import show_error

    show_error(OptionError("What [x] happened.", "because", "do this"), console)
    expected = "error: What [x] happened.\n  why: because\n  fix: do this\n"
    assert console.file.getvalue() == expected  # type: ignore[attr-defined]


def test_interrupt_exits_130(monkeypatch, capsys):
    def interrupt(arguments: Namespace, console: Console) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(bench, "run", interrupt)
    assert main(["bench"]) == 130
    assert "Traceback" not in capsys.readouterr().err
