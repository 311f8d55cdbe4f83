"""Instruments for those who work on the compiler, run from a clone: they are no part of an installed package.

Nothing outside imports them but commands that are registered only where this package is found.
"""
