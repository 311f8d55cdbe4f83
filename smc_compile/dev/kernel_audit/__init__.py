"""Which kernels a session's regions consist of, and whether each does what eager PyTorch does.

Sessions are recorded (``recorded_sessions``, ``graph_recorder``), their graphs lowered for this CPU or for a GPU that
is not there (``lower_graph``, ``absent_device``), run and compared (``interpreter``, ``verdict``) or timed
(``time_regions``). Import it from ``smc_compile.commands.kernels`` only.
"""
