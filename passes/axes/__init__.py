"""The axis analysis: for every value, which axis is the batch, which the positions of queries or keys, which another.

From outside import ``infer.type_axes`` and the types of ``axis_types``. Inside, each op has one rule, registered by
name with ``helpers.rule``: it gives the axes of the op's result, or refuses the op.
"""
