"""What runs when a compiled program generates; installed as ``smc_compile.runtime``.

sessions/ (one file a method) -> execution/ (compiled regions) -> state/ (what a generation carries) -> algorithms/
(pure mathematics). Each imports only from those to its right, and none from ``passes``.

- A region is a plain function of tensors: no host decision, no Python state. Its shapes are static but for marked ones.
- Rows: particle n of request b is row b*N + n, R = B*N in all. Nothing of one request depends on another.
- Uniforms are functions of (seed, particle, step, purpose) alone. Weights stay in log space; their sums are float64.
"""
