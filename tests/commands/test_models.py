"""``smc-compile models``: what its rows and tables say, and what is kept of a run that was interrupted."""

from __future__ import annotations

import io
import json
import sys

import pytest
from rich.console import Console

from smc_compile.__main__ import main
from smc_compile.bench.family_trials import FamilyTrial
from smc_compile.commands import models
from smc_compile.commands.models import show

ROWS = [
    FamilyTrial("alpha", "sdpa", "compiled", None, "2 sdpa", [6], 3, 2.5e-15, 512, 1.25),
    FamilyTrial("beta", "eager", "compiled", None, "1 sdpa + 1 matmul", [], 2, 1e-15, 1024, 10.0),
    FamilyTrial("gamma[1]", "sdpa", "refused", f"conv1d has no position-by-position form ({'x' * 90})"),
    FamilyTrial("delta", "-", "not built", "ValueError: no"),
    FamilyTrial("epsilon", "eager", "own cache", "conv1d has no position-by-position form", error=3e-15, seconds=1.0),
    FamilyTrial("zeta", "eager", "no decoder", "earlier logits change when the last token does"),
]


def shown(rows: list[FamilyTrial]) -> str:
    console = Console(file=io.StringIO(), width=100)
    show(rows, console)
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_the_tables_fit_and_say_everything() -> None:
    text = shown(ROWS)
    assert max(map(len, text.splitlines())) <= 100
    for word in (
        "alpha",
        "2 sdpa",
        " 6 ",
        "2e-15",
        "512",
        "1.25",
        "1 sdpa + 1 matmul",
        "gamma[1]",
        "conv1d has no",
        "…",
        "epsilon",
        "3e-15",
        "no decoder",
    ):
        assert word in text
    assert text.splitlines()[-1] == "2 compiled, 1 refused, 1 not built, 1 own cache, 1 no decoder"


def test_no_rows_no_tables() -> None:
    assert shown([]) == "nothing tried\n"


def test_without_transformers_the_error_says_what_to_install(monkeypatch, capsys) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert main(["models"]) == 2
    assert "smc_compile[transformers]" in capsys.readouterr().err


# ---- with the library ------------------------------------------------------------------------------------------------


@pytest.fixture
def transformers():
    return pytest.importorskip("transformers", minversion="5")


def test_the_command_writes_rows(transformers, tmp_path, capsys) -> None:
    path = tmp_path / "rows.json"
    assert main(["models", "--only", "gpt2", "--json", str(path)]) == 0
    assert "1 compiled" in capsys.readouterr().out
    report = json.loads(path.read_text())
    assert report["transformers"] == transformers.__version__
    assert [row["family"] for row in report["rows"]] == ["gpt2"]


def test_unknown_families_are_refused_before_any_work(transformers, capsys) -> None:
    assert main(["models", "--only", "gpt2", "no_such_family"]) == 2
    assert "no_such_family" in capsys.readouterr().err


def test_an_interrupt_keeps_the_rows_so_far(transformers, tmp_path, monkeypatch, capsys) -> None:
    path = tmp_path / "rows.json"

    def interrupted(family: str, implementations: object) -> list[FamilyTrial]:
        if family == "llama":
            raise KeyboardInterrupt
        return [FamilyTrial(family, "sdpa", "refused", "reason")]

    monkeypatch.setattr(models, "try_family", interrupted)
    assert main(["models", "--only", "gpt2", "llama", "opt", "--json", str(path)]) == 130
    assert "1 refused" in capsys.readouterr().out
    assert [row["family"] for row in json.loads(path.read_text())["rows"]] == ["gpt2"]
