"""What differs between the versions of torch that are supported, as far as the compiler meets it.

The suite runs with the oldest and the newest of them: `examples/version_matrix.py`.
"""

from __future__ import annotations

from contextlib import AbstractContextManager

from torch._dispatch.python import enable_python_dispatcher

OLDEST, NEWEST = "2.11", "2.14"  # as in pyproject.toml

# Dynamo of torch 2.11 writes ``a == b`` with tensors as a method, later ones as the operator.
METHODS_OF_OPERATORS = {f"__{name}__": name for name in ("eq", "ne", "lt", "le", "gt", "ge")}


def with_symbolic_sizes() -> AbstractContextManager[None]:
    """Inside, composite ops take symbolic sizes: in torch 2.11 their C++ code asks for numbers."""
    return enable_python_dispatcher()
