"""``smc-compile demo``: the texts, the picture, and how the text of SMC scores."""

from __future__ import annotations

import json
from xml.etree import ElementTree

import pytest
import torch
from helpers.even_costs import EvenCosts

from smc_compile.__main__ import main
from smc_compile.auto import choice
from smc_compile.bench import contestants, text_quality
from smc_compile.commands import demo
from smc_compile.generate import generate


@pytest.fixture
def uncompiled(monkeypatch):
    """Regions run as they are, and costs are given: neither Inductor nor the machine is tested."""
    monkeypatch.setattr(choice, "cycle_model", lambda *_: EvenCosts())
    monkeypatch.setattr(contestants, "generate", lambda *a, **options: generate(*a, **{**options, "compiler": "eager"}))


def test_quality_lines_and_scores_in_rows():
    scores = {"autoregressive": text_quality.Score(-2.0, 0.03, 9), "smc": text_quality.Score(-2.1, 0.04, 9, 0.01)}
    assert text_quality.summarise(torch.tensor([1.0, 2.0, 3.0])) == text_quality.Score(2.0, pytest.approx(3**-0.5), 3)
    assert "-5.0% ± 2.50%" in " ".join(demo.quality_lines(scores))
    rows = text_quality.add_scores([{"method": m} for m in ("eager", "speculative", "smc")], scores)
    assert rows[:2] == [{"method": "eager"}, {"method": "speculative", "kl_per_token": 0.0}]
    assert rows[2] == {"method": "smc", "mean_log_prob": -2.1, "mean_log_prob_stderr": 0.04, "kl_per_token": 0.01}


def test_demo_prints_texts_and_draws(tmp_path, capsys, uncompiled):
    path, picture = tmp_path / "rows.json", tmp_path / "tree.svg"
    options = f"--max-new-tokens 12 --n-particles 4 --lookahead 3 --repeats 1 --samples 3 --json {path}"
    assert main(["demo", *options.split(), "--picture", str(picture), "--prompt", "def f(x):\n"]) == 0
    output = capsys.readouterr().out
    assert output.count("def f(x):") == 4
    assert "Fastest here within 0.02 nats a token" in output
    assert 'method="auto" takes' in output
    assert "true target samples" in output
    rows = json.loads(path.read_text())["rows"]
    assert [row["method"] for row in rows] == ["eager", "autoregressive", "speculative", "smc"]
    assert rows[0]["mean_log_prob"] is rows[2]["mean_log_prob"] is None
    assert all(row["mean_log_prob"] < 0 for row in (rows[1], rows[3]))
    assert [row["kl_per_token"] for row in rows[:3]] == [None, 0.0, 0.0]
    assert ElementTree.parse(picture) is not None
