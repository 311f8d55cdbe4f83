"""What a generation carries from cycle to cycle: requests, tokens and weights of particles, slots of the caches.

Plain data and functions on it, on ``algorithms`` alone: nothing here runs a model or compiles anything.
"""
