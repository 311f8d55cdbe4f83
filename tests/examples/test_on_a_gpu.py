"""The script for a GPU: its commands are ones that the command line knows, and a step that fails stops no other."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import pytest
import torch
from helpers.scripts import load_script

from smc_compile.__main__ import build_parser
from smc_compile.commands.bench import pair_shapes


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load_script("benchmarks/on_a_gpu.py")


def test_every_step_is_a_command_with_options_that_exist(script):
    for options in script.STEPS.values():
        arguments = build_parser().parse_args([*options.split(), "--json", "rows.json"])
        assert arguments.device == "cuda"
        if options.startswith("bench"):
            pair_shapes(arguments.n_particles, arguments.lookahead)


def test_a_step_keeps_what_it_printed_and_one_that_takes_too_long_is_ended(script, tmp_path):
    wrong = script.run_step("wrong", "kernels --target sm_1", tmp_path, 60)
    assert wrong["status"] == 2
    assert "sm_1" in (tmp_path / "wrong.txt").read_text()
    assert script.run_step("slow", "kernels --target sm_90", tmp_path, 0.01)["status"] is None


def test_all_steps_are_reported_and_a_failure_gives_status_1(script, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    statuses = iter([0, 1, 0])

    def run_step(name: str, options: str, folder: Path, seconds: float) -> dict[str, object]:
        (folder / f"{name}.txt").write_text("what it printed")
        return {"command": options, "status": next(statuses), "seconds": 1.0}

    monkeypatch.setattr(script, "run_step", run_step)
    names = list(script.STEPS)[:3]
    assert script.main([str(tmp_path), "--only", *names]) == 1
    report = json.loads((tmp_path / "steps.json").read_text())
    assert report["device"] == "a GPU"
    assert [step["status"] for step in report["steps"].values()] == [0, 1, 0]
    assert script.main([str(tmp_path), "--only", names[0], "--minutes", "0"]) == 1, "not begun is not done"


def test_without_a_gpu_it_says_so(script, tmp_path, capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(SystemExit):
        script.main([str(tmp_path)])
    assert "no GPU" in capsys.readouterr().err
