"""The axes of a sweep: which settings move over which values, and which points of that grid fit in memory."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch

from smc_compile.bench.sweep_points import Point, too_large
from smc_compile.errors import OptionError
from smc_compile.pairs.presets import DTYPES, configs, weight_count
from smc_compile.runtime.execution.memory import free_bytes

VALUES = {  # of each axis, where none are given
    "n_particles": [1, 2, 4, 8, 16, 32, 64],
    "lookahead": [1, 2, 4, 8, 12, 16],
    "prompt_length": [128, 512, 2048, 8192],
    "new_tokens": [64, 256, 1024, 2048],
    "requests": [1, 2, 4, 8],
}
LETTERS = {"n_particles": "N", "lookahead": "K", "prompt_length": "prompt", "new_tokens": "new", "requests": "requests"}


class SweepAxis(NamedTuple):
    """A field of ``Point`` that moves, and its values in rising order."""

    name: str
    values: list[int]


def chosen_axes(over: Sequence[str], values: Sequence[list[int]] | None) -> list[SweepAxis]:
    """The axes to move over, with the values given or the usual ones.

    Raises:
        OptionError: unless there are one or two axes, each once, with values of at least 1.
    """
    if len(over) > 2 or len(set(over)) < len(over):
        raise OptionError("--over takes one axis, or two different ones.", f"got {' '.join(over)}")
    if values is not None and len(values) != len(over):
        raise OptionError(
            "--over and --values do not go together.",
            f"{len(over)} axes, and --values was given {len(values)} times",
            "give --values once for each axis, in the order of --over, or leave it out",
        )
    axes = [
        SweepAxis(name, sorted(set(own))) for name, own in zip(over, values or [VALUES[n] for n in over], strict=True)
    ]
    for axis in axes:
        if axis.values[0] < 1:
            raise OptionError("--values must be at least 1.", f"got {axis.values[0]} for {axis.name}")
    return axes


def grid(axes: Sequence[SweepAxis], arguments: argparse.Namespace) -> list[Point]:
    """The base point with every combination of values on the axes, the last axis fastest."""
    base = Point(*(getattr(arguments, name) for name in Point._fields))
    names = [axis.name for axis in axes]
    return [
        base._replace(**dict(zip(names, values, strict=True)))
        for values in itertools.product(*(axis.values for axis in axes))
    ]


def fitting(points: Sequence[Point], arguments: argparse.Namespace) -> tuple[list[Point], dict[Point, str]]:
    """Points whose caches may fit beside the weights, and why the others cannot: before anything is allocated.

    Raises:
        OptionError: where none fits.
    """
    target, draft = configs(arguments, arguments.lookahead)
    free = free_bytes(torch.device(arguments.device))
    itemsize = DTYPES[arguments.dtype].itemsize
    room = None if free is None else free - itemsize * (weight_count(target) + weight_count(draft))
    reasons = {point: too_large(point, target, draft, itemsize, room) for point in points}
    refused = {point: why for point, why in reasons.items() if why is not None}
    if len(refused) == len(points):
        raise OptionError("No point of the sweep fits in memory.", next(iter(refused.values())), "ask for less")
    return [point for point in points if point not in refused], refused


def widest(points: Sequence[Point], arguments: argparse.Namespace) -> tuple[argparse.Namespace, int]:
    """Arguments that give the models positions enough for every point, and the largest K."""
    longest = {name: max(getattr(p, name) for p in points) for name in ("prompt_length", "new_tokens")}
    return argparse.Namespace(**(vars(arguments) | longest)), max(point.lookahead for point in points)


def point_name(point: Point, axes: Sequence[SweepAxis]) -> str:
    """The values of a point on the axes: "N=4 K=8", or "loop" for the one-token loop."""
    names = [axis.name for axis in axes if point.lookahead or axis.name not in ("n_particles", "lookahead")]
    words = [f"{LETTERS[name]}={getattr(point, name)}" for name in names]
    return " ".join(words if point.lookahead else ["loop", *words])
