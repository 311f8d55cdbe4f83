"""From models, loops and options to programs: what is compiled, by which key it is kept, and how it answers.

``from_model`` and ``from_loop`` are the ways in. Nothing here chooses N and K: programs get numbers (see ``auto``), and
nothing here imports from ``auto`` or from the public files.
"""
