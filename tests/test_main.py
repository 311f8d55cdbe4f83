"""The command line as a whole: which commands there are, errors without tracebacks, exit codes."""

from __future__ import annotations

import io
import sys
from argparse import Namespace

import pytest
from rich.console import Console

from smc_compile import __main__ as command_line
from smc_compile.__main__ import COMMANDS, build_parser, main, show_error
from smc_compile.commands import bench
from smc_compile.errors import OptionError


def help_text() -> str:
    return build_parser().format_help()


def test_every_command_is_listed_and_has_help_that_fits(capsys):
    text = help_text()
    for name, summary, _ in COMMANDS:
        assert f"smc-compile {name}" in text
        assert summary in text
        with pytest.raises(SystemExit) as stopped:
            main([name, "--help"])
        assert stopped.value.code == 0
        assert max(map(len, capsys.readouterr().out.splitlines())) <= 120


def test_an_installed_package_has_no_command_for_its_developers(monkeypatch, capsys):
    """The wheel leaves smc_compile.dev out: nothing may try to import it there."""
    there = command_line.find_spec
    monkeypatch.setattr(command_line, "find_spec", lambda name: None if name == "smc_compile.dev" else there(name))
    monkeypatch.setitem(sys.modules, "smc_compile.dev", None)
    monkeypatch.delitem(sys.modules, "smc_compile.commands.kernels", raising=False)
    text = help_text()
    assert "{demo,bench,sweep,quality,models}" in text
    assert "kernels" not in text
    with pytest.raises(SystemExit) as stopped:
        main(["kernels"])
    assert stopped.value.code == 2
    assert "invalid choice: 'kernels'" in capsys.readouterr().err


def test_errors_show_what_why_and_fix():
    console = Console(file=io.StringIO(), width=100)
    show_error(OptionError("What [x] happened.", "because", "do this"), console)
    expected = "error: What [x] happened.\n  why: because\n  fix: do this\n"
    assert console.file.getvalue() == expected  # type: ignore[attr-defined]


def test_interrupt_exits_130(monkeypatch, capsys):
    def interrupt(arguments: Namespace, console: Console) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(bench, "run", interrupt)
    assert main(["bench"]) == 130
    assert "Traceback" not in capsys.readouterr().err
