"""Kernels written by hand, as ops: each beats what the libraries do, and has a twin in ATen."""
