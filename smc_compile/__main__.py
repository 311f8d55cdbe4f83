"""The command line: ``smc-compile demo``, ``bench``, ``sweep``, ``models`` and ``kernels``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from rich.console import Console

from smc_compile.commands import bench, demo, models, sweep
from smc_compile.commands import kernels as list_kernels
from smc_compile.errors import SMCError

DESCRIPTION = """\
Turn a plain decode loop into Sequential Monte Carlo speculative decoding.

  smc-compile demo     see it write Python on the shipped pair of models, and how fast
  smc-compile bench    measure its cost on random weights of any shape
  smc-compile sweep    see how the cost of a cycle moves with N, K and lengths
  smc-compile models   try which decoders of the transformers library compile
  smc-compile kernels  list the kernels that a session runs, and check them
"""


def build_parser() -> argparse.ArgumentParser:
    """The parser of all subcommands; each sets ``run``."""
    parser = argparse.ArgumentParser(
        prog="smc-compile", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(title="commands", metavar="{demo,bench,sweep,models,kernels}", required=True)
    listed = (demo, "demo"), (bench, "bench"), (sweep, "sweep"), (models, "models"), (list_kernels, "kernels")
    for module, name in listed:
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


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand and return the exit code: 0 done, 1 a check failed, 2 a user's error, 130 interrupted."""
    arguments = build_parser().parse_args(argv)
    output, errors = Console(), Console(stderr=True)
    if not output.is_terminal:
        output.width = 100
    try:
        status = arguments.run(arguments, output)
    except SMCError as error:
        show_error(error, errors)
        return 2
    except KeyboardInterrupt:
        errors.print("interrupted")
        return 130
    return status or 0


if __name__ == "__main__":
    sys.exit(main())
