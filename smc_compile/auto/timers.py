"""Timing small pieces of work: the least and the typical seconds of a call."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median

import torch

from smc_compile.runtime.sessions.replay import cuda_graphs

ROUNDS = 5


def best_seconds(function: Callable[[], object], device: torch.device, rounds: int = ROUNDS) -> float:
    """Least wall-clock of a few calls after one that warms up."""
    return min(timed(function, device, rounds))


def timed(function: Callable[[], object], device: torch.device, rounds: int) -> list[float]:
    """Wall-clock of ``rounds`` calls after one that warms up, in seconds."""
    seconds = []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return seconds[1:]


def typical_seconds(function: Callable[[], None], device: torch.device, rounds: int) -> float:
    """Median wall-clock of a few calls after one that warms up: a cycle meets what disturbs the machine too.

    On a GPU of the call recorded as a graph, as cycles are: launching from the host would be most of it.
    """
    if device.type == "cuda":
        function()
        function = cuda_graphs(device)(function)
    return median(timed(function, device, rounds))


def never_less(seconds: list[float]) -> tuple[float, ...]:
    """More rows take no less time: what says otherwise was disturbed."""
    return tuple(min(seconds[i:]) for i in range(len(seconds)))
