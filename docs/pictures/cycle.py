"""Draws the picture of one cycle, for a light and for a dark page.

    python docs/pictures/cycle.py

Writes cycle_light.svg and cycle_dark.svg beside this file. The numbers are those of a real step: the weights sum to 1,
the effective sample size is that of these weights, and systematic resampling makes these copies of them.
"""

from __future__ import annotations

from html import escape
from pathlib import Path

WIDTH, HEIGHT = 1000, 424
SANS = "system-ui, -apple-system, 'Segoe UI', Helvetica, Arial, 'DejaVu Sans', sans-serif"
MONO = "ui-monospace, SFMono-Regular, Menlo, Consolas, 'DejaVu Sans Mono', monospace"
THEMES = {  # colours by what they mean
    "light": {
        "page": "#ffffff",
        "ink": "#1f2937",
        "soft": "#5b6675",
        "line": "#b6bfca",
        "prompt": "#e8ecf1",
        "draft": "#dbe7fb",
        "draft_ink": "#1d4e9e",
        "target": "#fbe3cf",
        "target_ink": "#a04708",
        "band": "#fdf3ea",
        "bar": "#3d6fb6",
        "dead": "#a9b2be",
    },
    "dark": {
        "page": "#0d1117",
        "ink": "#e6edf3",
        "soft": "#9aa7b5",
        "line": "#57616d",
        "prompt": "#262d36",
        "draft": "#1c3557",
        "draft_ink": "#a9cbff",
        "target": "#54310f",
        "target_ink": "#ffc591",
        "band": "#241c14",
        "bar": "#6ea4ee",
        "dead": "#6b7683",
    },
}

PROMPT = "def add(a, b):"
DRAFTED = [  # K = 3 tokens of each of N = 4 particles
    ["return", "a", "+"],
    ["return", "sum", "("],
    ["print", "(", "a"],
    ["return", "a", "-"],
]
BONUS = ["b", "[", "+", "b"]  # drawn from the target
WEIGHTS = [0.70, 0.22, 0.03, 0.05]
ANCESTORS = [0, 1, 0, 0]  # the row that each row goes on with

ROWS = [148, 198, 248, 298]  # the middle of each row
CHIP = 34  # height of a token
DRAFT_X, DRAFT_WIDTHS = 168, [78, 58, 42]
BONUS_X, BONUS_WIDTH = 376, 42
BAR_X, BAR_WIDTH = 562, 96
FROM_X, TO_X, RESULT_X = 724, 812, 812
RESULT_WIDTH = 176


def text(x: float, y: float, words: str, fill: str, size: int = 15, **more: str) -> str:
    """One line of text; keyword arguments are attributes, with _ for -."""
    attributes = "".join(f' {name.replace("_", "-")}="{value}"' for name, value in more.items())
    return f'<text x="{x}" y="{y}" font-size="{size}" fill="{fill}"{attributes}>{escape(words)}</text>'


def box(x: float, y: float, width: float, height: float, fill: str, radius: int = 7, **more: str) -> str:
    """A rectangle with round corners; keyword arguments as for ``text``."""
    attributes = "".join(f' {name.replace("_", "-")}="{value}"' for name, value in more.items())
    return f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="{radius}" fill="{fill}"{attributes}/>'


def chip(x: float, middle: float, width: float, word: str, fill: str, ink: str) -> str:
    """A token in its box."""
    word_at = text(x + width / 2, middle + 5, word, ink, 15, text_anchor="middle", font_family=MONO)
    return box(x, middle - CHIP / 2, width, CHIP, fill) + word_at


def heading(x: float, number: int, name: str, lines: list[str], c: dict[str, str], ink: str) -> list[str]:
    """The name of a step, its number in a circle, and what happens in it."""
    return [
        f'<circle cx="{x + 12}" cy="34" r="12" fill="{ink}"/>',
        text(x + 12, 39, str(number), c["page"], 14, text_anchor="middle", font_weight="700"),
        text(x + 32, 40, name, c["ink"], 18, font_weight="650"),
        *(text(x, 66 + 20 * i, line, c["soft"], 14) for i, line in enumerate(lines)),
    ]


def headings(c: dict[str, str]) -> list[str]:
    """The four steps, each above what it does."""
    return [
        *heading(DRAFT_X, 1, "Draft", ["the small model adds", "K tokens to each text"], c, c["draft_ink"]),
        *heading(BONUS_X, 2, "Score", ["the target reads all in", "one pass, adds a token"], c, c["target_ink"]),
        *heading(BAR_X, 3, "Weigh", ["target's probability", "over the draft's"], c, c["bar"]),
        *heading(FROM_X, 4, "Resample", ["heavy texts are copied", "over light ones"], c, c["soft"]),
    ]


def tokens(c: dict[str, str]) -> list[str]:
    """The prompt, stored once; the drafted tokens; the band of the target's pass with its own token at the end."""
    top, bottom = ROWS[0] - 28, ROWS[-1] + 28
    width = BONUS_X + BONUS_WIDTH + 24 - DRAFT_X
    edge = {"stroke": c["target_ink"], "stroke_width": "1.5"}
    band = box(DRAFT_X - 12, top, width, bottom - top, c["band"], 12, **edge)
    middle = (ROWS[0] + ROWS[-1]) / 2
    sizes = f"N = {len(ROWS)} texts, K = {len(DRAFTED[0])}"
    numbers = text(73, middle + 56, sizes, c["soft"], 13, text_anchor="middle")
    parts = [band, numbers, box(12, middle - 32, 122, 64, c["prompt"], 9)]
    parts.append(text(73, middle - 3, PROMPT, c["ink"], 13, text_anchor="middle", font_family=MONO))
    parts.append(text(73, middle + 18, "prompt, stored once", c["soft"], 11, text_anchor="middle"))
    for middle_of_row, words, bonus in zip(ROWS, DRAFTED, BONUS, strict=True):
        bend = f"M134 {middle} C150 {middle} 146 {middle_of_row} 164 {middle_of_row}"
        parts.append(f'<path d="{bend}" fill="none" stroke="{c["line"]}" stroke-width="1.5"/>')
        x = DRAFT_X
        for word, width in zip(words, DRAFT_WIDTHS, strict=True):
            parts.append(chip(x, middle_of_row, width, word, c["draft"], c["draft_ink"]))
            x += width + 6
        parts.append(chip(BONUS_X, middle_of_row, BONUS_WIDTH, bonus, c["target"], c["target_ink"]))
    return parts


def weights(c: dict[str, str]) -> list[str]:
    """A bar for each text, and how many texts of equal weight these are worth."""
    parts = []
    for row, (middle, weight) in enumerate(zip(ROWS, WEIGHTS, strict=True)):
        width = BAR_WIDTH * weight / max(WEIGHTS)
        lives = row in ANCESTORS
        parts.append(box(BAR_X, middle - 8, width, 16, c["bar" if lives else "dead"], 3))
        parts.append(text(BAR_X + width + 8, middle + 5, f"{weight:.2f}", c["ink" if lives else "soft"], 14))
    effective = 1 / sum(weight**2 for weight in WEIGHTS)
    worth = f"worth {effective:.1f} texts of {len(WEIGHTS)}: resample"
    return [*parts, text(BAR_X, ROWS[-1] + 42, worth, c["soft"], 13)]


def copies(c: dict[str, str]) -> list[str]:
    """From each row to those that go on with it; what nobody goes on with ends."""
    parts = []
    for row, ancestor in enumerate(ANCESTORS):
        start, end = ROWS[ancestor], ROWS[row]
        bend = f"M{FROM_X} {start} C{FROM_X + 50} {start} {TO_X - 50} {end} {TO_X - 8} {end}"
        parts.append(f'<path d="{bend}" fill="none" stroke="{c["bar"]}" stroke-width="2.5"/>')
        words = " ".join([*DRAFTED[ancestor], BONUS[ancestor]])
        if row not in ANCESTORS:
            cross = f"M{FROM_X} {end - 5} l10 10 m0 -10 l-10 10"
            parts.append(f'<path d="{cross}" fill="none" stroke="{c["dead"]}" stroke-width="2"/>')
        parts.append(box(RESULT_X, end - CHIP / 2, RESULT_WIDTH, CHIP, c["prompt"]))
        parts.append(text(RESULT_X + 14, end + 5, words, c["ink"], 15, font_family=MONO))
    return parts


def again(c: dict[str, str]) -> list[str]:
    """The way back to the first step."""
    right, left, bottom, tip = RESULT_X + RESULT_WIDTH / 2, DRAFT_X + 92, 384, ROWS[-1] + 36
    curve = f"V{bottom - 12} q0 12 -12 12 H{left + 12} q-12 0 -12 -12"
    way = f"M{right} {ROWS[-1] + 28} {curve} V{tip + 8}"
    arrow = f"M{left - 6} {tip + 10} L{left} {tip} L{left + 6} {tip + 10} Z"
    return [
        f'<path d="{way}" fill="none" stroke="{c["line"]}" stroke-width="1.5"/>',
        f'<path d="{arrow}" fill="{c["line"]}"/>',
        text((left + right) / 2, 408, "again, every text K + 1 tokens longer", c["soft"], 14, text_anchor="middle"),
    ]


def picture(theme: str) -> str:
    """The whole file for "light" or "dark"."""
    c = THEMES[theme]
    parts = [*headings(c), *tokens(c), *weights(c), *copies(c), *again(c)]
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" '
            f'viewBox="0 0 {WIDTH} {HEIGHT}" font-family="{SANS}">',
            "<title>One cycle: draft, score, weigh, resample</title>",
            *parts,
            "</svg>\n",
        ]
    )


if __name__ == "__main__":
    for theme in THEMES:
        (Path(__file__).parent / f"cycle_{theme}.svg").write_text(picture(theme))
