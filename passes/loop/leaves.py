"""The leaves of a call: its arguments without their nesting, each with a number."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import Any

from torch import fx

Leaf = tuple[fx.Node, int]  # a call and the number of one of its leaves


def flatten(node: fx.Node) -> list[Any]:
    """The leaves of a call's arguments, in order.

    Words among them describe the nesting: ``x[1:]`` is ``"sequence of 2", x, "slice", "sequence of 3", 1, None, None``.
    """
    leaves: list[Any] = []
    _flatten(node.args, leaves)
    _flatten(dict(node.kwargs), leaves)
    return leaves


def _flatten(arg: Any, leaves: list[Any]) -> None:
    if isinstance(arg, slice):
        leaves.append("slice")
        arg = (arg.start, arg.stop, arg.step)
    if isinstance(arg, dict):
        leaves.append(f"dict {sorted(arg)}")
        arg = [arg[key] for key in sorted(arg)]
    if isinstance(arg, tuple | list):
        leaves.append(f"sequence of {len(arg)}")
        for item in arg:
            _flatten(item, leaves)
        return
    leaves.append(arg)


def replace_leaves(node: fx.Node, leaves: Mapping[int, Any], inputs: Mapping[fx.Node, Any]) -> tuple[Any, Any]:
    """(args, kwargs) of a call with other values.

    Args:
        leaves: number of a leaf, as `flatten` counts -> its value.
        inputs: node -> its value, for every node among the arguments.
    """
    numbers = itertools.count()
    return _replace(node.args, numbers, leaves, inputs), _replace(dict(node.kwargs), numbers, leaves, inputs)


def _replace(arg: Any, numbers: Iterator[int], leaves: Mapping[int, Any], inputs: Mapping[fx.Node, Any]) -> Any:
    at = next(numbers)
    if isinstance(arg, slice):
        next(numbers)  # `flatten` lists a slice as "slice", then as a sequence of three
        return slice(*(_replace(item, numbers, leaves, inputs) for item in (arg.start, arg.stop, arg.step)))
    if isinstance(arg, dict):
        next(numbers)
        done = {key: _replace(arg[key], numbers, leaves, inputs) for key in sorted(arg)}
        return {key: done[key] for key in arg}
    if isinstance(arg, tuple | list):
        items = [_replace(item, numbers, leaves, inputs) for item in arg]
        return items if isinstance(arg, list) else tuple(items)
    return inputs[arg] if isinstance(arg, fx.Node) else leaves.get(at, arg)
