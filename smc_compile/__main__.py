"""The command line: ``smc-compile demo``, ``bench``, ``sweep``, ``quality``, ``models``; in a clone, ``kernels``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import NamedTuple

from rich.console import Console

from smc_compile.errors import SMCError


class Command(NamedTuple):
    """A sub-command: the module of that name in ``smc_compile.commands``."""

    name: str
    summary: str
    needs: str = "smc_compile"  # the package without which the command does not exist


COMMANDS = (  # in the order of the help
    Command("demo", "see it write Python on the shipped pair of models, and how fast"),
    Command("bench", "measure its cost on random weights of any shape"),
    Command("sweep", "see how the cost of a cycle moves with N, K and lengths"),
    Command("quality", "see speed against error: SMC, exact speculation and the loop"),
    Command("models", "try which decoders of the transformers library compile"),
    Command("kernels", "list the kernels that a session runs, and check them", needs="smc_compile.dev"),
)
PURPOSE = "Turn a plain decode loop into Sequential Monte Carlo speculative decoding."


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands that are there; each sets ``run``."""
    listed = [command for command in COMMANDS if find_spec(command.needs)]
    overview = "".join(f"  smc-compile {command.name:<7} {command.summary}\n" for command in listed)
    parser = argparse.ArgumentParser(
        prog="smc-compile",
        description=f"{PURPOSE}\n\n{overview}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    names = ",".join(command.name for command in listed)
    commands = parser.add_subparsers(title="commands", metavar=f"{{{names}}}", required=True)
    for name, *_ in listed:
        module = import_module(f"smc_compile.commands.{name}")
        first_line = (module.HELP.strip().splitlines() or [""])[0]
        command = commands.add_parser(
            name,
            help=first_line[:1].lower() + first_line[1:].rstrip("."),
            description=module.HELP,
            formatter_class=HelpFormatter,
        )
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    return parser


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Descriptions as written, defaults shown after each option."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or action.default is False:
            return action.help
        if isinstance(action.default, list):
            return f"{action.help} (default: {' '.join(map(str, action.default))})"
        return super()._get_help_string(action)


def show_error(error: SMCError, console: Console) -> None:
    """What, why and fix, without a traceback."""
    console.print("[bold red]error:[/bold red]", end=" ")
    console.print(error.what, markup=False, highlight=False)
    for name, text in (("why", error.why), ("fix", error.fix)):
        if text:
            console.print(f"  [bold]{name}:[/bold]", end=" ")
            console.print(text, markup=False, highlight=False)


def exit_code(run: Callable[[Console], int | None]) -> int:
    """Run a command on a console: 0 done, 1 a check failed, 2 a user's error, 130 interrupted."""
    output, errors = Console(), Console(stderr=True)
    if not output.is_terminal:
        output.width = 100
    try:
        return run(output) or 0
    except SMCError as error:
        show_error(error, errors)
        return 2
    except KeyboardInterrupt:
        errors.print("interrupted")
        return 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    arguments = build_parser().parse_args(argv)
    return exit_code(lambda console: arguments.run(arguments, console))


if __name__ == "__main__":
    sys.exit(main())
