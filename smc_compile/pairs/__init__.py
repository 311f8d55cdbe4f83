"""Pairs of a target and a draft to try things on: shipped, of random weights, nested, or tiny ones of transformers.

Import ``shipped.load_pair`` for trained models, ``random_weights.build_models`` for shapes of ``presets.PRESETS``. The
compiler knows none of these models.
"""
