"""Pure functions of tensors: uniforms, sampling, weights, resampling, the distribution of the next token.

They import only kernels and each other, keep no state, and run alike from the host, compiled, and in a recorded graph.
"""
