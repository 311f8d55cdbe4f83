"""What is installed: an entry point, a command, and one importable name."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest

import smc_compile


def python(*args: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *args], cwd=cwd, capture_output=True, text=True)


def test_the_backend_is_registered_without_an_import():
    (entry,) = entry_points(group="torch_dynamo_backends", name="smc")
    assert entry.value == "smc_compile.backend:smc"


def test_everything_named_is_there():
    assert all(getattr(smc_compile, name) is not None for name in smc_compile.__all__)


@pytest.mark.parametrize("command", [["-m", "smc_compile"], [str(Path(sys.executable).with_name("smc-compile"))]])
def test_the_command_runs_from_elsewhere(tmp_path, command):
    run = [sys.executable, *command] if command[0] == "-m" else command
    done = subprocess.run([*run, "--help"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "usage: smc-compile" in done.stdout


def test_subpackages_import_from_elsewhere_and_nothing_generic_does(tmp_path):
    code = (
        "import importlib.util as u, smc_compile.passes.pipeline, smc_compile.runtime.sessions.smc\n"
        "print([n for n in ('passes', 'runtime', 'data', 'tests', 'examples') if u.find_spec(n)])"
    )
    done = python("-c", code, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"
