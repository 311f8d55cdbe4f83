"""Reading the Python that Inductor writes: its kernels' sources, and the calls of libraries beside them."""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Iterator

_LIBRARY = re.compile(r"\b(?:extern_kernels\.|torch\.ops\.)([\w.]+)\(")


def kernel_sources(code: str) -> dict[str, str]:
    """The kernels of generated code by name: the arguments of ``async_compile``."""
    return {name: source for name, source in _kernels(ast.parse(code))}


def _kernels(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """``name = async_compile.triton('name', '''source''', ...)``, or ``cpp_pybinding([types], '''source''')``."""
    for statement in tree.body:
        if not (isinstance(statement, ast.Assign) and isinstance(statement.value, ast.Call)):
            continue
        call, (bound,) = statement.value, statement.targets
        if ast.unparse(call.func).startswith("async_compile.") and isinstance(bound, ast.Name):
            yield bound.id, ast.literal_eval(call.args[1])


def library_calls(code: str) -> Counter[str]:
    """How often a call of the code calls each op of a library: products, and what nothing is generated for."""
    return Counter(found[1] for line in _body(code) for found in _LIBRARY.finditer(line))


def _body(code: str) -> list[str]:
    """Lines of the function ``call``."""
    tree = ast.parse(code)
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name == "call"]
    return [line.partition("#")[0] for f in functions for line in code.splitlines()[f.lineno : f.end_lineno]]
