"""From a causal model to its incremental form: the same ops on new positions, with keys and values in a cache.

From outside import ``synthesize.synthesize_cache``. What the emitted graphs call at run time stands in
``attention_ops`` and ``position_tables``: plain functions of tensors.
"""
