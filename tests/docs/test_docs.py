"""README and docs: short lines, links that lead somewhere, names that exist, code that runs."""

from __future__ import annotations

import argparse
import ast
import functools
import importlib
import re
import runpy
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.model_parts import build
from helpers.plain_models import GPT

import smc_compile
from smc_compile.__main__ import build_parser

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
DOCS = sorted((ROOT / "docs").glob("*.md"))
HISTORY = ROOT / "docs" / "benchmark_history.md"  # what earlier versions printed: its names need not exist any more
NOT_RUN = "not a program -->"  # ends the line above a block that only shows lines
FILE = re.compile(r"\b(?:smc_compile|passes|runtime|docs|examples|tests)/(?:[\w/]*\w\.\w+|[\w/]+/|[\w/]+)")

each_page = pytest.mark.parametrize("page", [README, *DOCS], ids=lambda page: page.name)
each_present_page = pytest.mark.parametrize(
    "page", [README, *(page for page in DOCS if page != HISTORY)], ids=lambda page: page.name
)


def prose(page: Path) -> str:
    """The text without blocks of code."""
    return re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S)


def spans(page: Path) -> list[str]:
    """What stands in backticks, in one line each."""
    return [span.replace("\n", " ") for span in re.findall(r"`([^`]+)`", prose(page))]


def python_blocks(page: Path, all_of_them: bool = False) -> Iterator[tuple[int, str]]:
    """The number of the line before each block of Python, and its code."""
    lines = page.read_text().splitlines()
    for number, line in enumerate(lines):
        if line != "```python" or (lines[number - 1].endswith(NOT_RUN) and not all_of_them):
            continue
        end = lines.index("```", number)
        yield number + 1, "\n".join(lines[number + 1 : end]) + "\n"


# ---- the shape of the text ------------------------------------------------------------------------------------------


def test_readme_is_short():
    assert len(README.read_text().splitlines()) <= 150


@each_page
def test_no_line_is_over_120_characters(page: Path):
    long = [line for line in page.read_text().splitlines() if len(line) > 120]
    assert long == []


def test_the_test_command_stands_below_its_mark():
    lines = README.read_text().splitlines()
    at = lines.index("<!-- test command -->")
    assert lines[at + 1] == "```"
    command = lines[at + 2 : lines.index("```", at + 2)]
    assert command[0].startswith("python3 -m venv .venv && ")
    assert command[-1].endswith("-m pytest")
    assert all(line.endswith("&&") for line in command[:-1]), "one command"


# ---- links and files ------------------------------------------------------------------------------------------------


def anchors(page: Path) -> set[str]:
    """What the headings of a page are called in links."""
    headings = re.findall(r"^#+ (.*)$", prose(page), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@each_page
def test_links_lead_somewhere(page: Path):
    links = re.findall(r"\]\(([^)\s]+)\)", prose(page)) + re.findall(r'(?:src|srcset|href)="([^"]+)"', prose(page))
    for link in links:
        path, _, anchor = link.partition("#")
        assert "://" not in link, f"{link}: pages link to this repository only"
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_readme_leads_to_every_page():
    links = set(re.findall(r"\]\((docs/[^)#]+\.md)", README.read_text()))
    assert links == {f"docs/{page.name}" for page in DOCS}


@each_page
def test_files_that_are_named_exist(page: Path):
    named = {name for span in spans(page) for name in FILE.findall(span)}
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []


# ---- names of the package and of its commands ------------------------------------------------------------------------


@each_present_page
def test_names_of_the_package_exist(page: Path):
    for name in set(re.findall(r"\bsmc_compile((?:\.\w+)+)", page.read_text())):
        parts = name.strip(".").split(".")
        if parts[-1] in ("py", "md"):
            continue
        assert resolves(parts), f"smc_compile{name}"


def resolves(parts: list[str]) -> bool:
    """Whether ``smc_compile.<parts>`` is a module or an attribute of one."""
    value: Any = smc_compile
    for i, part in enumerate(parts):
        if not hasattr(value, part):
            try:
                value = importlib.import_module(".".join(["smc_compile", *parts[: i + 1]]))
            except ModuleNotFoundError:
                return False
            continue
        value = getattr(value, part)
    return True


@each_present_page
def test_fields_of_results_exist(page: Path):
    results = {*smc_compile.Generation.__dataclass_fields__, *vars(smc_compile.Generation)}
    known = {
        "stats": {*smc_compile.Stats.__dataclass_fields__, "host_seconds"},
        "out": results,
        "near": results,
        "last": results,
    }
    for owner, name in re.findall(r"\b(stats|out|near|last)\.(\w+)", page.read_text()):
        if name not in ("py", "md", "logits"):
            assert name in known[owner], f"{owner}.{name}"


def commands() -> dict[str, argparse.ArgumentParser]:
    (listed,) = (a for a in build_parser()._actions if isinstance(a, argparse._SubParsersAction))
    return dict(listed.choices)


@each_present_page
def test_commands_and_their_flags_exist(page: Path):
    parsers = commands()
    for span in spans(page):
        words = re.match(r"smc-compile (\w+)|(\w+) --", span)
        flags = re.findall(r"(?<!\S)(--[a-z][\w-]*)", span)
        name = words and (words[1] or words[2])
        if span.startswith("smc-compile "):
            assert name in parsers, span
        elif name not in parsers:
            name = None
        if span.startswith("python") or span.startswith("examples/"):
            continue
        known = [parsers[name]] if name else list(parsers.values())
        for flag in flags:
            assert any(flag in parser._option_string_actions for parser in known), span


# ---- options --------------------------------------------------------------------------------------------------------


def option_rows() -> dict[str, str]:
    """Option -> default, as the table of the README has them."""
    return dict(re.findall(r"^\| `(\w+)` \| (.*?) \| ", README.read_text(), re.M))


def test_readme_has_one_row_for_each_option():
    assert set(option_rows()) == {field.name for field in fields(smc_compile.Options)}


def test_defaults_of_the_table_are_those_of_the_options():
    for field in fields(smc_compile.Options):
        shown = option_rows()[field.name].strip("`")
        shown = "None" if shown == "the loop's" else shown
        assert ast.literal_eval(shown) == field.default, field.name


@pytest.mark.parametrize("name", [field.name for field in fields(smc_compile.Options)])
def test_options_are_named_in_docs(name: str):
    assert any(re.search(rf"\b{name}\b", page.read_text()) for page in DOCS)


# ---- code -----------------------------------------------------------------------------------------------------------


@each_page
def test_python_parses(page: Path):
    for _, code in python_blocks(page, all_of_them=True):
        ast.parse(code)


@functools.cache
def tiny_models() -> dict[str, Any]:
    """What the pages call by these names: models, a padded batch of prompts, a tokenizer."""
    pytest.importorskip("transformers", minversion="5")
    from smc_compile.pairs.shipped import load_pair
    from smc_compile.pairs.tiny_transformers import build as build_family

    torch.manual_seed(0)
    families = [build_family("llama", num_hidden_layers=1).eval() for _ in range(2)]
    ids = torch.tensor([[3, 4, 5, 6], [0, 0, 7, 8]])
    return {
        "smc_compile": smc_compile,
        "target": build(GPT, layers=1),
        "draft": build(GPT, layers=1),
        "hf_target": families[0],
        "hf_draft": families[1],
        "ids": ids,
        "mask": (ids > 0).long(),
        "tokenizer": load_pair().tokenizer,
    }


@each_present_page
@pytest.mark.usefixtures("untraced_regions")
def test_python_runs(page: Path):
    """The blocks of a page, one after the other, without Inductor: compiled regions are the subject of other tests."""
    blocks = list(python_blocks(page))
    if not blocks:
        pytest.skip("no code")
    torch._dynamo.reset()
    names: dict[str, Any] = {"__name__": "page", **(tiny_models() if page != README else {})}
    for line, code in blocks:
        exec(compile("\n" * line + code, str(page), "exec"), names)


# ---- pictures -------------------------------------------------------------------------------------------------------


def test_pictures_are_those_that_the_script_draws():
    picture: Callable[[str], str] = runpy.run_path(str(ROOT / "docs" / "pictures" / "cycle.py"))["picture"]
    for theme in ("light", "dark"):
        assert (ROOT / "docs" / "pictures" / f"cycle_{theme}.svg").read_text() == picture(theme)
