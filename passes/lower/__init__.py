"""Passes over a CachedLM that make its graphs cheaper to run or to compile, and leave what they compute alone.

``pipeline`` runs them last. Graphs here carry no values, so shapes are known only when a region is compiled.
"""
