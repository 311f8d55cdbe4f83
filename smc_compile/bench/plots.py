"""Pictures of a sweep: speed with its bound, and where the time of a cycle goes. Drawn with matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

from smc_compile.bench.figures import Row
from smc_compile.bench.genealogy import ALIVE, DEAD, INK, MUTED, RETURNED, RULE
from smc_compile.bench.sweep_points import PARTS
from smc_compile.errors import OptionError

NAMES = {
    "n_particles": "particles N",
    "lookahead": "draft tokens a cycle K",
    "prompt_length": "tokens of the prompt",
    "new_tokens": "new tokens, room in the suffix",
    "requests": "requests at once",
}
SHORT = {"n_particles": "N", "lookahead": "K", "prompt_length": "P", "new_tokens": "T", "requests": "B"}
COLOURS = {"draft": "#a9c4e6", "score": ALIVE, "resample": "#f3b48a", "host": DEAD, "per_cycle": ALIVE}
PALEST, DARKEST = (0xA9, 0xC4, 0xE6), (0x1B, 0x3A, 0x66)  # of the lines of a grid
WIDE_RANGE = 12.0  # speeds further apart than this are drawn on a logarithmic axis
STYLE: Any = {
    "font.family": "sans-serif",
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": DEAD,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "svg.fonttype": "none",
}
GAP = 0.06  # between labels, of the height of a panel


def check_plot_path(path: str | None) -> None:
    """Refuse what cannot be drawn before minutes have been spent.

    Raises:
        OptionError: for another kind of file, a folder that is not there, or without matplotlib.
    """
    if path is None:
        return
    if Path(path).suffix.lower() not in (".svg", ".png"):
        raise OptionError(f"Cannot draw {path}.", "only SVG and PNG are written", "let it end in .svg or .png")
    if not Path(path).absolute().parent.is_dir():
        raise OptionError(f"Cannot write {path}.", f"{Path(path).absolute().parent} is not a folder")
    if find_spec("matplotlib") is None:
        raise OptionError(
            "--plot needs matplotlib.",
            "it is not installed",
            'pip install "smc_compile[plots]", or leave --plot out: --json keeps the figures',
        )


def draw(rows: Sequence[Row], over: Sequence[str], path: str | Path, title: str, subtitle: str) -> None:
    """Write the picture of a sweep over one axis or, where ``over`` names two, of the grid."""
    from matplotlib import rc_context

    with rc_context(STYLE):
        figure = grid_figure(rows, over) if len(over) == 2 else axis_figure(rows, over[0])
        figure.text(0.02, 0.955, title, size=14, weight="bold", va="center")
        figure.text(0.02, 0.895, subtitle, size=9, color=MUTED, va="center")
        figure.savefig(path, dpi=160, facecolor="white")


def axis_figure(rows: Sequence[Row], name: str) -> Any:
    """Speed on the left, milliseconds of a cycle on the right."""
    figure, (speed, cost) = panels(2)
    draw_speed(speed, rows, name)
    draw_cost(cost, rows, name)
    return figure


def grid_figure(rows: Sequence[Row], over: Sequence[str]) -> Any:
    """Speed against the second axis, one line for each value of the first."""
    figure, (panel,) = panels(1)
    first, second = over
    values = sorted({row[first] for row in rows})
    labels = []
    for value, colour in zip(values, shades(len(values)), strict=True):
        own = [row for row in rows if row[first] == value]
        x, y = [row[second] for row in own], [row["tokens_per_second"] for row in own]
        panel.plot(x, y, color=colour, lw=2, marker="o", ms=4.5)
        panel.plot(x, [row["bound_tokens_per_second"] for row in own], color=colour, lw=1, ls=(0, (1, 2)))
        labels.append((y[-1], f"{SHORT[first]}={value}", colour))
    scale_x(panel, sorted({row[second] for row in rows}))
    scale_speed(panel, [row[key] for row in rows for key in ("tokens_per_second", "bound_tokens_per_second")])
    panel.set_xlabel(NAMES[second])
    panel.set_title("tokens/s; dotted: the bound", loc="left", size=10, color=INK, pad=10)
    label_ends(panel, labels)
    return figure


def draw_speed(panel: Any, rows: Sequence[Row], name: str) -> None:
    """Tokens/s with the range of the rounds, the bound, and the one-token loop where it was timed."""
    x = [row[name] for row in rows]
    speed, bound = ([row[key] for row in rows] for key in ("tokens_per_second", "bound_tokens_per_second"))
    loop = [row["loop_tokens_per_second"] for row in rows]
    below = [row["tokens_per_second"] - row["tokens_per_second_min"] for row in rows]
    above = [row["tokens_per_second_max"] - row["tokens_per_second"] for row in rows]
    panel.plot(x, bound, color=INK, lw=1.3)
    panel.errorbar(x, speed, yerr=[below, above], color=ALIVE, lw=2.2, marker="o", ms=5.5, elinewidth=1, capsize=0)
    labels = [(bound[-1], "bound", INK), (speed[-1], "SMC", ALIVE)]
    drawn = [*bound, *(row[f"tokens_per_second_{end}"] for row in rows for end in ("min", "max"))]
    if None not in loop:
        panel.plot(x, loop, color=RETURNED, lw=1.4, ls=(0, (5, 3)))
        labels.append((loop[-1], "one-token loop", RETURNED))
        drawn += loop
    scale_x(panel, x)
    scale_speed(panel, drawn)
    panel.set_xlabel(NAMES[name])
    panel.set_title("tokens/s", loc="left", size=10, color=INK, pad=10)
    label_ends(panel, labels)


def draw_cost(panel: Any, rows: Sequence[Row], name: str) -> None:
    """One bar a point, stacked by part where that is known, with the bound as a mark across it."""
    places = list(range(len(rows)))
    base = [0.0] * len(rows)
    labels = []
    whole = any(row["host_ms"] is None for row in rows)
    for part in ("per_cycle",) if whole else PARTS:
        heights = [row["ms_per_cycle" if whole else f"{part}_ms"] for row in rows]
        panel.bar(places, heights, bottom=base, width=0.62, color=COLOURS[part], edgecolor="white", linewidth=0.6)
        labels.append((base[-1] + heights[-1] / 2, "cycle" if whole else part, darker(COLOURS[part])))
        base = [low + height for low, height in zip(base, heights, strict=True)]
    for place, row in zip(places, rows, strict=True):
        panel.plot(
            [place - 0.4, place + 0.4], [row["bound_ms_per_cycle"]] * 2, color=INK, lw=1.8, solid_capstyle="butt"
        )
    labels.append((rows[-1]["bound_ms_per_cycle"], "bound", INK))
    for place, top in zip(places, base, strict=True):
        panel.annotate(short(top), (place, top), (0, 3), textcoords="offset points", ha="center", size=8, color=MUTED)
    panel.set_xticks(places, [f"{row[name]:,}" for row in rows])
    panel.set_xlim(-0.6, len(rows) - 0.4)
    panel.set_ylim(0, 1.1 * max(*base, *(row["bound_ms_per_cycle"] for row in rows)))
    panel.set_xlabel(NAMES[name])
    panel.set_title("milliseconds a cycle", loc="left", size=10, color=INK, pad=10)
    label_ends(panel, labels)


# ---- panels and labels ----------------------------------------------------------------------------------------------


def panels(count: int) -> tuple[Any, Sequence[Any]]:
    """A figure with ``count`` bare panels, and room for labels on the right of each."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11.5, 4.8) if count == 2 else (8.5, 5.2))
    axes = figure.subplots(1, count, squeeze=False)[0]
    figure.subplots_adjust(
        left=0.06 if count == 2 else 0.08, right=0.93 if count == 2 else 0.9, top=0.76, bottom=0.13, wspace=0.42
    )
    for panel in axes:
        panel.spines[["top", "right", "left"]].set_visible(False)
        panel.tick_params(which="both", length=0)
        panel.grid(axis="y", color=RULE, lw=0.8)
        panel.set_axisbelow(True)
    return figure, axes


def scale_x(panel: Any, values: Sequence[int]) -> None:
    """A tick at each value; logarithmic where they grow by a factor."""
    if len(values) > 2 and all(right >= 1.6 * left for left, right in pairwise(values)):
        panel.set_xscale("log", base=2)
    panel.set_xticks(values, [f"{value:,}" for value in values])
    panel.minorticks_off()


def scale_speed(panel: Any, values: Sequence[float]) -> None:
    """From zero, or logarithmic where the values lie far apart."""
    if max(values) > WIDE_RANGE * min(values):
        panel.set_yscale("log", subs=[2, 5])
        panel.set_ylim(min(values) / 1.5, max(values) * 1.5)
    else:
        panel.set_ylim(0, 1.08 * max(values))
    panel.yaxis.set_major_formatter(lambda value, _: short(value))
    panel.yaxis.set_minor_formatter(lambda value, _: short(value))


def label_ends(panel: Any, labels: Sequence[tuple[float, str, str]]) -> None:
    """Write (height in data, text, colour) on the right of the panel, apart from each other."""
    to_share = panel.transData + panel.transAxes.inverted()
    x = panel.get_xlim()[1]
    heights = [float(to_share.transform((x, y))[1]) for y, _, _ in labels]
    for height, (_, text, colour) in zip(spread_out(heights, GAP), labels, strict=True):
        panel.text(1.015, height, text, transform=panel.transAxes, color=colour, size=9.5, va="center", clip_on=False)


def spread_out(heights: Sequence[float], gap: float) -> list[float]:
    """Moved as little as it takes to stand ``gap`` apart, in the same order: each crowd is centred where it was."""
    order = sorted(range(len(heights)), key=lambda i: heights[i])
    crowds: list[list[int]] = []
    for index in order:
        crowds.append([index])
        while len(crowds) > 1 and lowest(crowds[-1], heights, gap) - highest(crowds[-2], heights, gap) < gap:
            crowds[-2:] = [crowds[-2] + crowds[-1]]
    placed = [0.0] * len(heights)
    for crowd in crowds:
        for rank, index in enumerate(crowd):
            placed[index] = lowest(crowd, heights, gap) + rank * gap
    return placed


def lowest(crowd: Sequence[int], heights: Sequence[float], gap: float) -> float:
    return sum(heights[i] for i in crowd) / len(crowd) - gap * (len(crowd) - 1) / 2


def highest(crowd: Sequence[int], heights: Sequence[float], gap: float) -> float:
    return lowest(crowd, heights, gap) + gap * (len(crowd) - 1)


def shades(count: int) -> list[str]:
    """From pale to dark blue."""
    steps = [i / max(count - 1, 1) for i in range(count)]
    mixed = [[round(a + (b - a) * t) for a, b in zip(PALEST, DARKEST, strict=True)] for t in steps]
    return ["#{:02x}{:02x}{:02x}".format(*colour) for colour in mixed]


def darker(colour: str) -> str:
    """Readable as text on white."""
    parts = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
    return "#" + "".join(f"{round(0.72 * part):02x}" for part in parts)


def short(value: float) -> str:
    """Three significant digits, with thousands set apart."""
    return f"{value:,.0f}" if value >= 99.5 or value == int(value) else f"{value:.3g}"
