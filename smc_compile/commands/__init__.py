"""The sub-commands of ``smc-compile``: one file each, with its arguments, its order of work and what it prints.

To add one: write ``commands/NAME.py`` with ``HELP`` (its first line is the summary), ``add_arguments(parser)`` and
``run(arguments, console)``, and name it in ``COMMANDS`` of ``smc_compile/__main__.py``. Commands do not import each
other: options that several have are in ``arguments.py``, what several measure or show is in ``smc_compile.bench``.
"""
