"""``smc-compile quality``: speed against error in a table, a picture and a file."""

from __future__ import annotations

import json
import math
import re
import shutil
from importlib.resources import files

import pytest
import torch
from helpers.even_costs import EvenCosts

from smc_compile.__main__ import main
from smc_compile.auto import choice
from smc_compile.bench import speed_and_error
from smc_compile.bench.error_plot import draw_quality
from smc_compile.bench.speed_and_error import best_within
from smc_compile.generate import generate
from smc_compile.pairs.shipped import load_pair


@pytest.fixture
def uncompiled(monkeypatch):
    """Regions run as they are, and costs are given: neither Inductor nor the machine is tested."""
    eager = {"compiler": "eager", "validate": False}
    monkeypatch.setattr(choice, "cycle_model", lambda *_: EvenCosts())
    monkeypatch.setattr(speed_and_error, "generate", lambda *a, **options: generate(*a, **{**options, **eager}))


def row(method: str, speed: float, kl: float, n: int | None = None, cut: float | None = None) -> dict:
    return {
        "method": method, "n_particles": n, "lookahead": 4, "max_divergence": cut, "tokens_per_second": speed,
        "kl_per_token": kl, "kl_per_token_stderr": 0.001,
    }  # fmt: skip


ROWS = [
    row("autoregressive", 100, 0.0), row("speculative", 160, 0.0), row("smc", 250, 0.06, 2, 0.35),
    row("smc", 220, 0.017, 8, 0.35), row("smc", 270, 0.07, 2, 1.0), row("smc", 230, math.nan, 8, 1.0),
    row("auto", 210, 0.015),
]  # fmt: skip


def test_a_table_a_picture_and_rows(tmp_path, capsys, uncompiled):
    pytest.importorskip("matplotlib")
    path, picture = tmp_path / "rows.json", tmp_path / "plot.svg"
    options = "--max-new-tokens 9 --n-particles 2 --lookahead 2 --max-divergence 0.2 --repeats 1 --texts 3"
    files_given = ["--json", str(path), "--plot", str(picture), "--prompt", "def f(x):\n"]
    assert main(["quality", *options.split(), *files_given]) == 0
    output = capsys.readouterr().out
    assert "the fastest within 0.02 nats a token" in output
    rows = json.loads(path.read_text())["rows"]
    assert [r["method"] for r in rows] == ["autoregressive", "speculative", "smc", "auto"]
    assert [r["kl_per_token"] for r in rows[:2]] == [0.0, 0.0]
    assert math.isfinite(rows[2]["kl_per_token"])
    assert rows[2]["texts"] == 3
    assert all(r["mean_log_prob"] < 0 for r in rows)
    assert max(map(len, output.splitlines())) <= 100
    assert "<svg" in picture.read_text()


def test_the_fastest_within_a_floor():
    names = [str(i) for i in range(len(ROWS))]
    assert best_within(ROWS, names, 0.02) == "3"
    assert best_within(ROWS, names, 0.0) == "1"
    assert best_within(ROWS[2:3], names[2:3], 0.0) == "nothing"


def test_the_picture_names_every_way_and_leaves_out_what_has_no_bound(tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "plot.svg"
    draw_quality(ROWS, path, "A pair", "a machine")
    words = re.findall(r"<text[^>]*>([^<]+)</text>", path.read_text(encoding="utf-8"))
    expected = ["A pair", "a machine", "exact", "one-token loop", "exact speculation", "auto", "SMC, cut at 0.35"]
    assert [word for word in [*expected, "SMC, whole blocks", "N=2", "N=8"] if word not in words] == []
    assert words.count("N=8") == 1


def test_another_pair_from_a_folder(tmp_path, capsys):
    home = files("smc_compile.pairs") / "data"
    for name in ("draft.safetensors", "tokenizer.json", "pair.json"):
        shutil.copy(str(home / name), tmp_path)
    options = "--max-new-tokens 5 --n-particles 1 --lookahead 2 --max-divergence 1 --repeats 1 --texts 2 --skip-auto"
    given = ["quality", *options.split(), "--pair", str(tmp_path)]
    assert main(given) == 2
    assert "has no target.safetensors" in " ".join(capsys.readouterr().err.split())
    shutil.copy(str(home / "target.safetensors"), tmp_path)
    again, shipped = load_pair(folder=tmp_path), load_pair()
    ids = torch.tensor([[1, 2, 3]])
    assert torch.equal(again.target(ids), shipped.target(ids))
    assert torch.equal(again.draft(ids), shipped.draft(ids))
    assert again.info == shipped.info
