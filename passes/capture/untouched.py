"""A model is left as it was by what traces it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

_OF_MODULES = ("_parameters", "_buffers", "_modules")


@contextmanager
def untouched(module: nn.Module) -> Iterator[list[str]]:
    """Afterwards each attribute of ``module`` and the modules in it is the object that it was, and holds what it held.

    Gives a list that then names what had changed. The exporter leaves copies of lists and dictionaries in their place,
    which whoever shares them with the model would not know of. A forward may write into them while it is traced.
    """
    attributes = [(path, inner.__dict__, dict(inner.__dict__)) for path, inner in module.named_modules()]
    held: dict[int, tuple[Any, Any]] = {}
    for *_, before in attributes:
        for name, value in before.items():
            if name not in _OF_MODULES:
                _keep(value, held)
    changes: list[str] = []
    try:
        yield changes
    finally:
        for path, now, before in attributes:
            changed = [name for name in {**before, **now} if now.get(name, changes) is not before.get(name, changes)]
            changes.extend(f"{path}.{name}".lstrip(".") for name in changed)
            for name in [name for name in now if name not in before]:
                del now[name]
            now.update(before)
        refilled = [_refill(container, items) for container, items in held.values()]
        changes.extend(["a list or dictionary"] if any(refilled) else [])


def _keep(value: Any, held: dict[int, tuple[Any, Any]]) -> None:
    """Keep the items of a list or dictionary, and of those in it."""
    if not isinstance(value, (list, dict)) or id(value) in held:
        return
    held[id(value)] = value, value.copy()
    for item in value.values() if isinstance(value, dict) else value:
        _keep(item, held)


def _refill(container: Any, items: Any) -> bool:
    """Whether a container had changed; now it holds the items."""
    if list(map(id, _parts(container))) == list(map(id, _parts(items))):
        return False
    container.clear()
    container.update(items) if isinstance(items, dict) else container.extend(items)
    return True


def _parts(container: Any) -> list[Any]:
    return [*container, *container.values()] if isinstance(container, dict) else container
