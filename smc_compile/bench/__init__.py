"""Measuring: ways to generate timed side by side, points of a sweep, figures, tables, plots and the JSON file.

Imported by commands only. ``measure.py`` and ``sweep_points.py`` time, ``figures.py`` and ``sweep_figures.py`` make
rows of that, ``tables.py`` and ``plots.py`` show the rows.
"""
