"""Writes to parts of a tensor, in one form: ``target[index] = value``."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import fx

from smc_compile.passes.fx_tools import op_name


class Write(NamedTuple):
    """``target[index] = value``."""

    target: fx.Node
    index: Any
    value: Any


def as_write(node: fx.Node) -> Write | None:
    """The write that a call is: an assignment to an index, index_put_, index_copy_, or copy_ into a part; else None."""
    name, args = op_name(node), node.args
    if name in ("setitem", "index_put_") and len(args) == 3:
        return Write(args[0], args[1], args[2])  # type: ignore[arg-type]
    if name == "index_copy_":
        given = {**dict(zip(("dim", "index", "source"), args[1:], strict=False)), **node.kwargs}
        return Write(args[0], _on_axis(given["dim"], given["index"]), given["source"])  # type: ignore[arg-type]
    if name == "copy_" and isinstance(args[0], fx.Node):
        view = args[0]
        if op_name(view) == "getitem":
            return Write(view.args[0], view.args[1], args[1])  # type: ignore[arg-type]
        if op_name(view) == "narrow" and len(view.args) == 4:
            dim, start, length = view.args[1:]
            if start == 0:
                return Write(view.args[0], _on_axis(dim, slice(0, length)), args[1])  # type: ignore[arg-type]
    return None


def _on_axis(dim: Any, item: Any) -> Any:
    """The index that is ``item`` on one axis and everything on the others."""
    return (*(slice(None),) * dim, item) if dim >= 0 else (Ellipsis, item, *(slice(None),) * (-dim - 1))


def index_per_axis(index: Any, dim: int) -> list[Any] | None:
    """The index with one item for each of ``dim`` axes; None if it has other items than numbers, slices and tensors."""
    items = list(index) if isinstance(index, tuple | list) else [index]
    if any(item is None or isinstance(item, bool) for item in items):
        return None
    dots = [at for at, item in enumerate(items) if item is Ellipsis]
    missing = [slice(None)] * (dim - len(items) + len(dots))
    at = dots[0] if dots else len(items)
    full = items[:at] + missing + items[at + 1 :]
    plain = all(isinstance(item, int | slice | torch.Tensor) for item in full)
    mixed = any(isinstance(item, int) for item in full) and any(isinstance(item, torch.Tensor) for item in full)
    return full if plain and not mixed and len(full) == dim and len(dots) < 2 else None
