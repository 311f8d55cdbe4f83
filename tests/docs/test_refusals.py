"""docs/refusals.md names every refusal that the sources hold, with a way out, and no other."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from helpers.refusals import GAP, ROOT, refusals

PAGE = ROOT / "docs" / "refusals.md"


def entries(page: Path = PAGE) -> dict[str, str]:
    """What each entry is called, and the rest of it: ``- **what** why *Way out:* fix``, over several lines."""
    text = re.sub(r"\n {2}", " ", page.read_text())
    return dict(re.findall(r"^- \*\*(.+?)\*\* ?(.*)$", text, re.M))


def shown(what: str) -> str:
    """As the page spells it."""
    return re.sub(r"\s+", " ", what.replace(GAP, "…")).strip()


def test_every_refusal_is_named_and_no_other():
    in_code = {shown(refusal.what) for refusal in refusals()}
    assert len(in_code) > 130
    assert set(entries()) == in_code


def test_every_entry_says_what_to_do():
    for what, rest in entries().items():
        assert "*Way out:*" in rest, what
        assert len(rest.partition("*Way out:*")[2].strip()) > 5, what


@pytest.mark.parametrize("word", ["end of the text", "logits_processor", "seed="])
def test_advice_stands_where_it_is_looked_for(word):
    assert word in re.sub(r"\s+", " ", PAGE.read_text())
