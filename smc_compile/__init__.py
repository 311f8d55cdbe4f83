"""Compile a plain decode loop into Sequential Monte Carlo speculative decoding."""
