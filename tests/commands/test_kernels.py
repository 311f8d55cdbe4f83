"""``smc-compile kernels``: what runs is what is listed, and what is wrong gives another exit status."""

from __future__ import annotations

import json
from typing import Any

import pytest

from smc_compile.__main__ import main
from smc_compile.commands import kernels as list_kernels
from smc_compile.dev.kernel_audit import time_regions
from smc_compile.dev.kernel_audit.audited_regions import AuditedKernel, AuditedRegion
from smc_compile.dev.kernel_audit.graph_recorder import RecordedGraph
from smc_compile.dev.kernel_audit.machine_code import MachineCode
from smc_compile.dev.kernel_audit.recorded_sessions import record_sessions
from smc_compile.dev.kernel_audit.verdict import RegionVerdict
from smc_compile.pairs.presets import Preset, Shape


def region(**changes: object) -> AuditedRegion:
    code = MachineCode(registers=40, spills=0, shared=16, loads=3, stores=1, configurations=2, size=5000)
    kernel = AuditedKernel("triton_poi_fused_add_mul_0", launches=3, used=True, code=code)
    verdict = RegionVerdict(runs=2, error=3e-7, launches={kernel.name: 1})
    fields = {"calls": 1, "kernels": [kernel], "library": {"mm": 4}, "verdict": verdict, "agrees": True, **changes}
    return AuditedRegion("score", sources={kernel.name: "source"}, **fields)  # type: ignore[arg-type]


@pytest.fixture
def listed(monkeypatch):
    """Run the command on regions that are given, not generated; the last stands for the kernel that copies rows."""

    def command(*regions: AuditedRegion, options: tuple[str, ...] = ()) -> int:
        answers = iter(regions)
        monkeypatch.setattr(list_kernels, "record_sessions", lambda *_, **__: list(regions[:-1]))
        monkeypatch.setattr(list_kernels, "examine", lambda *_: next(answers))
        monkeypatch.setattr(list_kernels, "examine_copy_rows", lambda *_: next(answers))
        return main(["kernels", "--target", "sm_90", *options])

    return command


def test_a_table_for_each_region_within_a_hundred_columns(listed, capsys):
    assert listed(region(), region()) == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 100
    assert out.count("as eager in 2 runs, largest error 3e-07") == 2
    row = next(line for line in out.splitlines() if line.startswith("poi 0"))
    assert row.split() == ["poi", "0", "add", "mul", "3", "40", "0", "16", "3", "1", "yes"]
    assert "2 regions, 2 kernels (1 different), 6 launches and 8 library calls a cycle" in " ".join(out.split())
    assert "all checks pass" in out


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"agrees": False}, "differs from eager"),
        ({"verdict": RegionVerdict(problem="no such op"), "agrees": False}, "not run: no such op"),
        ({"kernels": [AuditedKernel("triton_poi_fused_add_0", 2, used=False)]}, "output unused"),
        ({"kernels": [AuditedKernel("triton_poi_fused_add_0", 0, used=False)]}, "never launched"),
        ({"kernels": [AuditedKernel("triton_poi_fused_add_0", 2, used=True, problem="ptxas: no")]}, "ptxas: no"),
    ],
)
def test_whatever_fails_is_told_and_gives_status_1(listed, capsys, bad, message):
    assert listed(region(), region(**bad)) == 1
    out = capsys.readouterr().out
    assert message in out
    assert "failed: score" in out


def test_a_kernel_of_the_first_cycle_alone_is_no_failure(listed, capsys):
    assert listed(region(calls=0, kernels=[AuditedKernel("triton_poi_fused_add_0", 0, used=True)])) == 0
    assert "first cycle" in capsys.readouterr().out


def test_rows_are_kept(listed, tmp_path, capsys):
    path = tmp_path / "rows.json"
    assert listed(region(), options=("--json", str(path))) == 0
    stored = json.loads(path.read_text())
    assert stored["options"]["target"] == "sm_90"
    assert stored["regions"][0]["passes"] is True
    assert stored["regions"][0]["kernels"][0]["code"]["registers"] == 40


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--target", "sm_12"), "known are"),
        (("--lookahead", "0"), "--lookahead must be at least 1"),
        (("--top-p", "0"), "top-p 0.0"),
        (("--device", "gpu"), "Cannot use --device gpu"),
        (("--compiler", "max-autotune"), "--compiler max-autotune needs --device"),
        (("--compiler", "max-autotune", "--target", "sm_90"), "--compiler max-autotune needs --device"),
    ],
)
def test_bad_options_are_told(options, message, capsys):
    assert main(["kernels", *options]) == 2
    assert message in capsys.readouterr().err


# Kernels run in an interpreter: a quarter of the words.
NARROW = Preset(130, target=Shape(2, 64, 4, 2, 64), draft=Shape(1, 32, 2, 1, 32))


def ops(recorded: RecordedGraph) -> set[str]:
    """What the region's graph calls."""
    return {str(node.target) for node in recorded.graph.graph.nodes if node.op in ("call_function", "call_method")}


@pytest.mark.slow
def test_a_session_for_a_gpu_that_is_not_there(monkeypatch, capsys, tmp_path):
    """The whole command, on the shortest cycle without truncation. The draft's regions are recorded only: what they
    call, a pass of a model and a draw, the target's region calls too. A GPU replays all cycles but the first."""
    recorded: dict[str, RecordedGraph] = {}

    def target_and_end(*arguments: Any, **how: Any) -> list[RecordedGraph]:
        recorded.update({region.name: region for region in record_sessions(*arguments, **how)})
        return [recorded["score"], recorded["weigh"]]

    monkeypatch.setattr(list_kernels, "record_sessions", target_and_end)
    monkeypatch.setitem(list_kernels.PRESETS, "small", NARROW)
    path = tmp_path / "rows.json"
    options = "--target sm_90 --lookahead 1 --layers 1 --sessions 1 --top-k 0 --top-p 1 --n-particles 2"
    status = main(["kernels", *options.split(), "--json", str(path)])
    out = capsys.readouterr().out
    calls = {name: region.a_cycle for name, region in recorded.items()}
    assert calls == {"draft_step": 0, "weigh": 1, "uniforms": 1, "draft_head": 1, "score": 1}
    for name in ("draft_step", "draft_head"):
        assert ops(recorded[name]) - ops(recorded["score"]) == {"aten.select.int"}, "the last position is cut out"
    regions = {r["name"]: r for r in json.loads(path.read_text())["regions"]}
    assert set(regions) == {"score", "weigh", "copy_rows, written by hand"}
    for name, found in regions.items():
        assert found["calls"] == 1
        assert found["agrees"], f"{name}\n{out}"
        assert found["kernels"], name
        assert all(kernel["code"]["registers"] > 0 for kernel in found["kernels"])
    assert regions["score"]["library"]["mm"] >= 8
    assert status == (0 if all(r["passes"] for r in regions.values()) else 1)
    assert max(map(len, out.splitlines())) <= 100


def test_a_session_on_a_device_that_is_there(monkeypatch, capsys, tmp_path):
    """One region of the shortest cycle, on this processor: all go the same way."""

    def weigh_alone(*arguments: Any) -> list[RecordedGraph]:
        return [region for region in record_sessions(*arguments) if region.name == "weigh"]

    monkeypatch.setattr(list_kernels, "record_sessions", weigh_alone)
    monkeypatch.setitem(list_kernels.PRESETS, "small", NARROW)
    monkeypatch.setattr(list_kernels, "WRITTEN_BY_HAND", ())
    monkeypatch.setattr(time_regions, "ROUNDS", 1)
    path = tmp_path / "rows.json"
    options = (
        "--device cpu --lookahead 1 --layers 1 --sessions 1 --top-k 0 --top-p 1 --n-particles 2 --compiler max-autotune"
    )
    assert main(["kernels", *options.split(), "--json", str(path)]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "all results as eager" in out
    stored = json.loads(path.read_text())
    regions = {r["name"]: r for r in stored["regions"]}
    assert list(regions) == ["weigh"]
    for name, found in regions.items():
        assert found["passes"], name
        assert f"{name}, {found['calls']} call" in out
        assert f"ours {found['ours']:.0f} us" in out
    total = sum(r["calls"] * r["ours"] for r in regions.values()) / 1e3
    assert f"ours {total:.2f}; " in out


def test_a_result_that_is_wrong_on_the_device_gives_status_1(monkeypatch, capsys):
    wrong = time_regions.Timed("score", 1, RegionVerdict(runs=2, beyond=0.5), agrees=False)
    monkeypatch.setattr(list_kernels, "record_sessions", lambda *_, **__: [None])
    monkeypatch.setattr(list_kernels, "time_region", lambda *_: wrong)
    monkeypatch.setattr(list_kernels, "WRITTEN_BY_HAND", ())
    assert main(["kernels", "--device", "cpu"]) == 1
    out = capsys.readouterr().out
    assert "score, 1 call a cycle: differs from eager" in out
    assert "failed: score" in out
