"""Every refusal of the sources: what its error says, read off the code without running it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
KINDS = frozenset({"LoopError", "CacheError", "InputError", "OptionError"})
GAP = "..."  # what the error fills in


class Refusal(NamedTuple):
    """One place that refuses: the texts have ``GAP`` where values are filled in, and are empty where they are made."""

    what: str
    why: str
    fix: str
    path: str


def refusals() -> list[Refusal]:
    """All of them, file by file."""
    paths = [path for folder in ("smc_compile", "passes", "runtime") for path in sorted((ROOT / folder).rglob("*.py"))]
    trees = {path: ast.parse(path.read_text()) for path in paths if "dev" not in path.parts}
    kinds = set(KINDS)
    for _ in range(3):  # classes of classes
        kinds |= {
            node.name
            for tree in trees.values()
            for node in ast.walk(tree)
            if isinstance(node, ast.ClassDef)
            and any(isinstance(base, ast.Name) and base.id in kinds for base in node.bases)
        }
    return [found for path, tree in trees.items() for found in _of_file(tree, kinds, str(path.relative_to(ROOT)))]


def _of_file(tree: ast.Module, kinds: set[str], path: str) -> Iterator[Refusal]:
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name) or not node.args:
            continue
        name = node.func.id
        if name in kinds or name == "kind":
            texts = [*(text(argument, tree) for argument in node.args[:3]), "", ""][:3]
        elif name == "refuse" and len(node.args) > 1:
            texts = [
                f"no cache can be synthesized: {text(node.args[1], tree)}",
                "",
                text(node.args[2], tree) if node.args[2:] else "",
            ]
        else:
            continue
        if texts[0].replace(GAP, "").strip(" :"):
            yield Refusal(*texts, path)


def text(node: ast.expr, tree: ast.Module) -> str:
    """A text with gaps; '' for what is no text."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else ""
    if isinstance(node, ast.JoinedStr):
        parts = (part.value if isinstance(part, ast.Constant) else GAP for part in node.values)
        return "".join(str(part) for part in parts)
    if isinstance(node, ast.BinOp):
        return (text(node.left, tree) or GAP) + (text(node.right, tree) or GAP)
    if isinstance(node, ast.IfExp):
        return GAP
    if isinstance(node, ast.Name):
        return next((found for value in _assigned(node.id, tree) if (found := text(value, ast.Module([], [])))), "")
    return ""


def _assigned(name: str, tree: ast.Module) -> Iterator[ast.expr]:
    """The values that a name is given."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign):
            for target in node.targets:
                if isinstance(target, ast.Name) and target.id == name:
                    yield node.value
                if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
                    pairs = zip(target.elts, node.value.elts, strict=False)
                    yield from (value for one, value in pairs if isinstance(one, ast.Name) and one.id == name)
