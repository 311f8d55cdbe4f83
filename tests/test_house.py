"""Where everything lives: which room may import which, no circles, one name for one thing, every folder explained."""

from __future__ import annotations

import ast
import tomllib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = {
    "smc_compile": "smc_compile",
    "smc_compile.passes": "passes",
    "smc_compile.runtime": "runtime",
}  # installed as

# A room may import itself, the rooms that its row names, and all that those may import. A room is a folder; the files
# that stand beside folders are divided by name below.
MAY_IMPORT = {
    "__main__": ["commands"],
    "commands": ["bench", "pairs", "dev"],
    "dev": ["bench", "pairs"],
    "bench": ["pairs"],
    "pairs": ["public"],
    "public": ["auto", "control"],
    "control": ["runtime.state"],
    "auto": ["program"],
    "program": ["inputs", "passes", "runtime.sessions"],
    "inputs": ["runtime.execution"],
    "passes": ["passes.loop", "passes.capture", "passes.cache", "passes.lower"],
    "passes.loop": ["passes.axes"],
    "passes.capture": ["passes.axes"],
    "passes.lower": ["passes.cache"],  # regions are lowered from the cached form
    "passes.cache": ["passes.axes"],
    "passes.axes": ["passes.tools"],
    "passes.tools": ["kernels"],
    "runtime": ["runtime.sessions"],
    "runtime.sessions": ["runtime.execution"],
    "runtime.execution": ["runtime.state"],
    "runtime.state": ["runtime.algorithms"],
    "runtime.algorithms": ["kernels"],
    "kernels": ["base"],
    "base": [],
}
FILES = {  # rooms of single files: in smc_compile/ all others are public, in passes/ all others run the passes
    "base": ["errors", "fingerprint", "options", "result"],
    "__main__": ["__main__"],
    "passes.tools": [
        "passes.ir",
        "passes.fx_tools",
        "passes.closeness",
        "passes.rewrites",
        "passes.length_guards",
        "passes.torch_versions",
    ],
}
# Imports of ours that stand inside a function, and why they may.
INSIDE = {
    ("smc_compile.kernels.copy_rows", "smc_compile.kernels.copy_rows_kernel"): "Triton is optional",
    ("smc_compile.generate", "smc_compile.transformers"): "the transformers library is optional",
    ("smc_compile.dev.kernel_audit.copy_rows_region", "smc_compile.kernels.copy_rows_kernel"): "Triton is optional",
}


class Import(NamedTuple):
    """One imported name: ``name`` is absolute, and may be a module or something in one."""

    name: str
    inside: bool  # a function
    line: int


# ---- reading sources ------------------------------------------------------------------------------------------------


def imports(source: str, module: str = "", package: bool = False) -> list[Import]:
    """All imports of a source, those for type checkers left out.

    Args:
        module: the source's dotted name, which relative imports start from.
        package: whether the source is a package's ``__init__``.
    """
    parts = module.split(".") if module else []
    return list(_imports(ast.parse(source), parts if package else parts[:-1], inside=False))


def _imports(node: ast.AST, folder: list[str], inside: bool) -> Iterator[Import]:
    if isinstance(node, ast.Import):
        yield from (Import(alias.name, inside, node.lineno) for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        above = folder[: len(folder) - node.level + 1] if node.level else []
        start = ".".join([*above, *([node.module] if node.module else [])])
        yield from (Import(f"{start}.{alias.name}", inside, node.lineno) for alias in node.names)
    elif isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
        for child in node.orelse:
            yield from _imports(child, folder, inside)
    else:
        inside = inside or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            yield from _imports(child, folder, inside)


def classes(source: str) -> set[str]:
    """Public classes of a source, and aliases of types: names in capitals and small letters at the top level."""
    found = set()
    for node in ast.parse(source).body:
        if isinstance(node, ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Assign):
            found |= {target.id for target in node.targets if isinstance(target, ast.Name)}
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            found.add(node.target.id)
    return {name for name in found if name[0].isupper() and not name.isupper()}


def circles(graph: Mapping[str, Iterable[str]]) -> set[str]:
    """The nodes that stand in a circle or between two circles: what is left when nodes without an arrow in, or without
    one out, are taken away again and again."""
    left = {node: set(targets) for node, targets in graph.items()}
    while True:
        into = {target for targets in left.values() for target in targets}
        inner = {node: {t for t in targets if t in left} for node, targets in left.items() if node in into and targets}
        inner = {node: targets for node, targets in inner.items() if targets}
        if inner == left:
            return set(left)
        left = inner


def twice(owners: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
    """Names with more than one owner, of pairs (name, owner)."""
    found = defaultdict(list)
    for name, owner in owners:
        found[name].append(owner)
    return {name: sorted(several) for name, several in found.items() if len(several) > 1}


# ---- the house ------------------------------------------------------------------------------------------------------


def modules() -> dict[str, Path]:
    """All sources, by the dotted names under which they are imported."""
    found = {}
    for prefix, folder in FOLDERS.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            found[".".join([prefix, *(part for part in parts if part != "__init__")])] = path
    return found


MODULES = modules()
SOURCES = {name: path.read_text() for name, path in MODULES.items()}
IMPORTS = {name: imports(source, name, MODULES[name].name == "__init__.py") for name, source in SOURCES.items()}


def module_of(name: str) -> str | None:
    """The module of ours that an import of ``name`` reaches; None if it is not ours."""
    while name not in MODULES and name.startswith("smc_compile"):
        name = name.rpartition(".")[0]
    return name if name in MODULES else None


GRAPH = {
    name: {target for one in found if (target := module_of(one.name)) and target != name}
    for name, found in IMPORTS.items()
}


def room_of(module: str) -> str:
    """The room that a module is in."""
    short = module.removeprefix("smc_compile").removeprefix(".")
    for room, files in FILES.items():
        if short in files:
            return room
    parts = short.split(".")
    if parts[0] in ("passes", "runtime"):
        folder = ".".join(parts[:2])
        return folder if folder in MAY_IMPORT else parts[0]
    return parts[0] if len(parts) > 1 or (MODULES[module].name == "__init__.py" and short) else "public"


def allowed(room: str) -> set[str]:
    """The rooms that a room may import."""
    return {room}.union(*map(allowed, MAY_IMPORT[room]))


def test_the_scan_sees_everything() -> None:
    assert len(MODULES) > 80
    assert {"smc_compile", "smc_compile.passes.ir", "smc_compile.runtime.sessions.smc"} <= set(MODULES)
    assert len([target for targets in GRAPH.values() for target in targets]) > 300


def test_every_module_is_in_a_room_and_every_room_exists() -> None:
    rooms = {room_of(name) for name in MODULES}
    assert rooms == set(MAY_IMPORT)


def test_the_table_has_no_circle() -> None:
    assert circles(MAY_IMPORT) == set()


@pytest.mark.parametrize(("one", "other"), [("passes", "runtime"), ("runtime", "passes")])
def test_passes_and_runtime_do_not_know_each_other(one: str, other: str) -> None:
    for room in MAY_IMPORT:
        if room.partition(".")[0] == one:
            assert not [target for target in allowed(room) if target.partition(".")[0] == other]


def test_no_room_imports_upwards() -> None:
    wrong = [
        f"{MODULES[name].relative_to(ROOT)} is in {room_of(name)} and imports {target} in {room_of(target)}"
        for name, targets in GRAPH.items()
        for target in sorted(targets)
        if room_of(target) not in allowed(room_of(name))
    ]
    assert not wrong, "\n".join(wrong)


def test_instruments_of_developers_are_imported_by_the_command_for_them_only() -> None:
    wrong = {
        name
        for name, targets in GRAPH.items()
        if room_of(name) != "dev" and any(room_of(target) == "dev" for target in targets)
    }
    assert wrong == {"smc_compile.commands.kernels"}


def test_commands_do_not_import_each_other() -> None:
    wrong = [
        f"{name} imports {target}"
        for name, targets in GRAPH.items()
        for target in sorted(targets)
        if room_of(name) == room_of(target) == "commands" and target != "smc_compile.commands.arguments"
    ]
    assert not wrong, "\n".join(wrong)


def test_no_modules_import_each_other_in_a_circle() -> None:
    assert circles(GRAPH) == set()


def test_imports_of_ours_stand_at_the_top() -> None:
    found = {
        (name, target)
        for name, all_of_it in IMPORTS.items()
        for one in all_of_it
        if one.inside and (target := module_of(one.name))
    }
    assert found == set(INSIDE)


def test_nothing_of_tests_or_examples_is_imported() -> None:
    wrong = [
        f"{name}:{one.line}: {one.name}"
        for name, all_of_it in IMPORTS.items()
        for one in all_of_it
        if one.name.partition(".")[0] in ("tests", "helpers", "examples", "passes", "runtime")
    ]
    assert not wrong, "\n".join(wrong)


def test_no_two_files_share_a_name() -> None:
    files = [(path.name, str(path.relative_to(ROOT))) for path in MODULES.values() if path.name != "__init__.py"]
    assert twice(files) == {}


def test_no_two_classes_share_a_name() -> None:
    assert twice((found, name) for name, source in SOURCES.items() for found in classes(source)) == {}


def packages() -> dict[str, Path]:
    """Folders with sources, by the names under which they are imported."""
    found = {}
    for prefix, folder in FOLDERS.items():
        for path in {path.parent for path in (ROOT / folder).rglob("*.py")}:
            found[".".join([prefix, *path.relative_to(ROOT / folder).parts])] = path
    return found


@pytest.mark.parametrize("name", sorted(packages()))
def test_every_folder_says_what_lives_there(name: str) -> None:
    path = packages()[name] / "__init__.py"
    assert path.is_file(), f"{path.parent.relative_to(ROOT)} has no __init__.py"
    assert ast.get_docstring(ast.parse(path.read_text())), f"{path.relative_to(ROOT)} has no docstring"


def test_every_folder_is_installed_but_the_instruments_of_developers() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert settings["package-dir"] == FOLDERS
    ours = {name for name in packages() if not name.startswith("smc_compile.dev")}
    assert set(settings["packages"]) == ours


# ---- the scan on small sources --------------------------------------------------------------------------------------


def test_every_form_of_import_is_seen() -> None:
    at_the_top = "import a.b\nfrom c import d\ntry:\n    import i\nexcept X: pass\n"
    source = at_the_top + "def f():\n    from . import e\n    from ..g import h"
    found = imports(source, "one.two.three")
    assert [one.name for one in found] == ["a.b", "c.d", "i", "one.two.e", "one.g.h"]
    assert [one.inside for one in found] == [False, False, False, True, True]
    assert [one.name for one in imports("from . import e\nfrom ..g import h", "one.two", package=True)] == [
        "one.two.e",
        "one.g.h",
    ]


def test_imports_for_type_checkers_do_not_count() -> None:
    source = "if TYPE_CHECKING:\n    import a\nelse:\n    import b\nif typing.TYPE_CHECKING:\n    import c"
    assert [one.name for one in imports(source)] == ["b"]


def test_circles_are_found_however_long() -> None:
    line = {"a": ["b"], "b": ["c"], "c": [], "d": ["b"]}
    assert circles(line) == set()
    assert circles(line | {"c": ["a"]}) == {"a", "b", "c"}
    assert circles({"a": ["a"], "b": ["a"]}) == {"a"}


def test_classes_and_aliases_are_seen_and_constants_are_not() -> None:
    source = "class A1a: pass\nTable = dict[str, int]\nWord: TypeAlias = str\n"
    source += "LIMIT = 3\n_Own = int\nvalue = 1\nT = TypeVar('T')"
    assert classes(source) == {"A1a", "Table", "Word"}
    assert twice([("A", "x"), ("B", "x"), ("A", "y")]) == {"A": ["x", "y"]}
