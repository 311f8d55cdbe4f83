"""Which kernels a session's regions are made of, and whether each does what eager PyTorch does."""
