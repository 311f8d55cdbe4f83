"""A picture of how the particles of one generation descend from each other, written as SVG by hand.

Time runs left to right, one column per cycle. A line joins every particle to the particle it descends from: grey if
the line died out, blue if some final particle descends from it, orange for the returned sequence. Below stands the
effective sample size of each cycle, and below that the text which the returned lineage wrote.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from xml.sax.saxutils import escape

import torch

from smc_compile.errors import InputError, OptionError
from smc_compile.options import ESS_THRESHOLD
from smc_compile.result import Generation

DEAD, ALIVE, RETURNED = "#d3d7de", "#3d6fb4", "#e8590c"
INK, MUTED, RULE = "#1f2933", "#6b7785", "#e9ecf0"
ROOT, LEFT, RIGHT, TOP, ESS_HEIGHT, TEXT_HEIGHT = 78.0, 136.0, 60.0, 116.0, 84.0, 104.0
LONGEST_LABEL = 17  # characters of returned text written under one cycle


@dataclass(frozen=True)
class Genealogy:
    """One request's tree. Level 0 holds the first particles, level c+1 those after cycle c.

    Attributes:
        parents: [C][N], the particle of level c that particle n of level c+1 descends from.
        families: [C+1][N], how many final particles descend from each (0: the line died out).
        lineage: [C+1], the particle of each level that the returned sequence descends from.
        rows: [C+1][N], the row each particle is drawn in; siblings are adjacent, so no two lines cross.
        weights: [N], normalised final weights.
        ess: [C].
    """

    parents: list[list[int]]
    families: list[list[int]]
    lineage: list[int]
    rows: list[list[int]]
    weights: list[float]
    ess: list[float]

    @property
    def n_cycles(self) -> int:
        return len(self.parents)

    @property
    def n_particles(self) -> int:
        return len(self.weights)

    def resampled(self, cycle: int) -> bool:
        """Whether any particle changed hands at the end of ``cycle``."""
        return self.parents[cycle] != list(range(self.n_particles))


def trace_genealogy(generation: Generation, request: int = 0) -> Genealogy:
    """Follow the ancestors of one request back from its final particles."""
    batch, _, n_particles = generation.ancestors.shape
    if not 0 <= request < batch:
        raise InputError(f"There is no request {request}.", f"the generation holds {batch}, counted from 0")
    n_cycles = int((~generation.ess[request].isnan()).sum())  # until this request finished
    if n_cycles == 0 or n_particles == 0:
        raise InputError(
            "This generation has no genealogy to draw.",
            f'method "{generation.stats.method}" recorded {n_cycles} cycles of {n_particles} particles',
            'draw a generation made with method="smc"',
        )
    parents: list[list[int]] = generation.ancestors[request, :n_cycles].tolist()
    families = [[1] * n_particles]
    for row in reversed(parents):
        counts = [0] * n_particles
        for child, parent in enumerate(row):
            counts[parent] += families[0][child]
        families.insert(0, counts)
    weights = normalised_weights(generation, request)
    lineage = [returned_particle(generation, request, weights)]
    for row in reversed(parents):
        lineage.insert(0, row[lineage[0]])
    rows = [list(range(n_particles))]
    for row in parents:
        above = rows[-1]
        order = sorted(range(n_particles), key=lambda child: (above[row[child]], child))
        rows.append([order.index(child) for child in range(n_particles)])
    return Genealogy(parents, families, lineage, rows, weights, generation.ess[request, :n_cycles].tolist())


def normalised_weights(generation: Generation, request: int) -> list[float]:
    """Final weights that sum to one; uniform where every weight is zero or undefined."""
    weights = generation.log_weights[request].double().softmax(-1)
    if not bool(weights.isfinite().all()):
        weights = torch.full_like(weights, 1 / weights.numel())
    return weights.tolist()


def returned_particle(generation: Generation, request: int, weights: Sequence[float]) -> int:
    """Index of the particle that was returned: the heaviest of those equal to the returned sequence."""
    equal = (generation.particles[request] == generation.sequences[request]).all(-1)
    candidates = [n for n, same in enumerate(equal.tolist()) if same]
    if not candidates:
        raise InputError("The returned sequence is none of the particles.", f"request {request}")
    return max(candidates, key=lambda n: weights[n])


def texts_by_cycle(tokens: Sequence[str], widths: Sequence[int]) -> list[str]:
    """The returned text cut into cycles of so many tokens; the first one of all comes from the prompt."""
    ends = [1 + end for end in accumulate(widths)]
    return ["".join(tokens[a:b]) for a, b in pairwise([0, *ends[:-1], len(tokens)])]


def visible(text: str, limit: int = LONGEST_LABEL) -> str:
    """One line with line ends shown, runs of blanks shortened, at most ``limit`` characters that XML allows."""
    text = text.replace("\n", " ⏎ ").replace("\t", " ")
    text = "".join(character if character.isprintable() else "·" for character in text)
    text = " ".join(text.split()) or "␣"
    return text if len(text) <= limit else text[: limit - 1] + "…"


def draw_ancestry(
    generation: Generation,
    path: str | Path,
    request: int = 0,
    tokens: list[str] | None = None,
    *,
    ess_threshold: float = ESS_THRESHOLD,
) -> Path:
    """Write the genealogy of one request's particles to ``path`` as SVG.

    Args:
        generation: a result of ``method="smc"``.
        path: where to write; must end in ``.svg``.
        request: which request of the batch.
        tokens: the new tokens of the returned sequence as text, written under the cycles that drew them.
        ess_threshold: the fraction of N below which the run resampled, drawn as a dashed line.

    Returns:
        The path written.
    """
    path = check_picture_path(path)
    genealogy = trace_genealogy(generation, request)
    texts = texts_by_cycle(tokens, generation.widths[request, : genealogy.n_cycles].tolist()) if tokens else []
    path.write_text(render(genealogy, texts, ess_threshold), encoding="utf-8")
    return path


def check_picture_path(path: str | Path) -> Path:
    """Refuse what cannot be written, before any work is done."""
    path = Path(path)
    if path.suffix.lower() != ".svg":
        raise OptionError(
            f"Cannot write the picture to {path}.",
            f"only SVG is written, and the suffix is {path.suffix!r}",
            f"name it {path.with_suffix('.svg').name}; any browser opens it and prints it to PNG or PDF",
        )
    if not path.absolute().parent.is_dir():
        raise OptionError(f"Cannot write the picture to {path}.", f"{path.absolute().parent} is not a folder")
    return path


@dataclass(frozen=True)
class Canvas:
    """Where things stand, in SVG units."""

    column: float
    row: float
    n_cycles: int
    n_particles: int
    has_text: bool

    @property
    def width(self) -> float:
        return max(LEFT + self.column * self.n_cycles + RIGHT, 640.0)

    @property
    def tree_bottom(self) -> float:
        return TOP + self.row * (self.n_particles - 1)

    @property
    def ess_top(self) -> float:
        return self.tree_bottom + 58.0

    @property
    def height(self) -> float:
        return self.ess_top + ESS_HEIGHT + 40.0 + (TEXT_HEIGHT if self.has_text else 0.0)

    def x(self, level: int) -> float:
        return LEFT + self.column * level

    def y(self, row: int) -> float:
        return TOP + self.row * row

    def ess_y(self, value: float) -> float:
        return self.ess_top + ESS_HEIGHT * (1 - max(0.0, min(1.0, value / self.n_particles)))


def render(genealogy: Genealogy, texts: Sequence[str] = (), ess_threshold: float = ESS_THRESHOLD) -> str:
    """The whole picture as one SVG document."""
    g = genealogy
    column = min(110.0, max(30.0, 960.0 / g.n_cycles))
    canvas = Canvas(column, min(30.0, max(9.0, 330.0 / g.n_particles)), g.n_cycles, g.n_particles, bool(texts))
    width, height = canvas.width, canvas.height
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" height="{height:.0f}" '
        f'viewBox="0 0 {width:.0f} {height:.0f}" '
        'font-family="Inter, -apple-system, Segoe UI, Helvetica, Arial, sans-serif">',
        f'<rect width="{width:.0f}" height="{height:.0f}" fill="#ffffff"/>',
        *heading(g, canvas),
        *resampling_rules(g, canvas),
        *root_fan(g, canvas),
        *links(g, canvas),
        *dots(g, canvas),
        *ess_panel(g, canvas, ess_threshold),
        *text_strip(texts, canvas),
        "</svg>",
    ]
    return "\n".join(lines) + "\n"


def label(x: float, y: float, text: str, fill: str = MUTED, size: float = 12, **attributes: str) -> str:
    """One line of text; underscores in attribute names become hyphens."""
    extra = "".join(f' {name.replace("_", "-")}="{value}"' for name, value in attributes.items())
    return f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size:g}" fill="{fill}"{extra}>{escape(text)}</text>'


def heading(g: Genealogy, canvas: Canvas) -> Iterator[str]:
    """Title and legend."""
    times = sum(g.resampled(cycle) for cycle in range(g.n_cycles))
    roots = sum(1 for family in g.families[0] if family)
    title = f"{g.n_particles} particles, {g.n_cycles} cycles"
    often = {0: "never resampled", 1: "resampled once"}.get(times, f"resampled {times} times")
    detail = f"{often} · the survivors descend from {roots} of the first {g.n_particles} particles"
    yield label(24, 32, title, INK, 17, font_weight="600")
    yield label(24, 51, detail)
    x = 24.0
    for colour, text, space in (
        (RETURNED, "returned sequence", 138),
        (ALIVE, "other survivors", 120),
        (DEAD, "died out", 0),
    ):
        yield f'<path d="M{x:.0f} 68h18" stroke="{colour}" stroke-width="3" stroke-linecap="round"/>'
        yield label(x + 25, 72, text)
        x += space + 25


def resampling_rules(g: Genealogy, canvas: Canvas) -> Iterator[str]:
    """A faint vertical line through every cycle whose population was resampled."""
    for cycle in range(g.n_cycles):
        if g.resampled(cycle):
            x = canvas.x(cycle + 1)
            yield (
                f'<path class="resampled" d="M{x:.1f} {TOP - 12:.1f}V{canvas.ess_top + ESS_HEIGHT:.1f}" '
                f'stroke="{RULE}" stroke-width="1"/>'
            )


def curve(x0: float, y0: float, x1: float, y1: float) -> str:
    """Path data from one point to the next, horizontal at both ends."""
    if y0 == y1:
        return f"M{x0:.1f} {y0:.1f}H{x1:.1f}"
    middle = (x0 + x1) / 2
    return f"M{x0:.1f} {y0:.1f}C{middle:.1f} {y0:.1f} {middle:.1f} {y1:.1f} {x1:.1f} {y1:.1f}"


def stroke(family: int, returned: bool, n_particles: int) -> tuple[str, float, str]:
    """Class, width and colour of a line with so many final descendants."""
    width = 1.6 + 2.6 * math.sqrt(family / n_particles)
    if returned:
        return "returned", width + 0.9, RETURNED
    return ("survived", width, ALIVE) if family else ("dead", 1.0, DEAD)


def line(kind: str, family: int, returned: bool, data: str, n_particles: int) -> str:
    """One line of the tree."""
    name, width, colour = stroke(family, returned, n_particles)
    return (
        f'<path class="{kind} {name}" d="{data}" fill="none" stroke="{colour}" stroke-width="{width:.2f}" '
        'stroke-linecap="round"/>'
    )


def root_fan(g: Genealogy, canvas: Canvas) -> Iterator[str]:
    """From the prompt to the first particles."""
    x0, y0 = ROOT, (TOP + canvas.tree_bottom) / 2
    for n in sorted(range(g.n_particles), key=lambda n: (n == g.lineage[0], g.families[0][n])):
        data = curve(x0, y0, canvas.x(0), canvas.y(g.rows[0][n]))
        yield line("root", g.families[0][n], n == g.lineage[0], data, g.n_particles)
    yield f'<circle cx="{x0}" cy="{y0:.1f}" r="5" fill="{INK}"/>'
    yield label(x0 - 11, y0 + 4, "prompt", INK, text_anchor="end")


def links(g: Genealogy, canvas: Canvas) -> Iterator[str]:
    """One line per particle and cycle, the dead first so that survivors lie on top."""
    drawn = []
    for cycle, parents in enumerate(g.parents):
        for child, parent in enumerate(parents):
            family = g.families[cycle + 1][child]
            returned = g.lineage[cycle + 1] == child
            data = curve(
                canvas.x(cycle),
                canvas.y(g.rows[cycle][parent]),
                canvas.x(cycle + 1),
                canvas.y(g.rows[cycle + 1][child]),
            )
            drawn.append((returned, family, line("link", family, returned, data, g.n_particles)))
    yield from (text for _, _, text in sorted(drawn, key=lambda item: item[:2]))


def dots(g: Genealogy, canvas: Canvas) -> Iterator[str]:
    """A dot per particle; in the last column its area is the particle's weight."""
    for level, families in enumerate(g.families):
        last = level == g.n_cycles
        for n, family in enumerate(families):
            _, _, colour = stroke(family, n == g.lineage[level], g.n_particles)
            radius = min(2.6, canvas.row / 4) if family else min(1.8, canvas.row / 6)
            if last:
                radius = max(1.2, min(0.45 * canvas.row, 10.0) * math.sqrt(g.weights[n] / max(g.weights)))
            title = f"<title>weight {g.weights[n]:.3f}</title>" if last else ""
            yield (
                f'<circle cx="{canvas.x(level):.1f}" cy="{canvas.y(g.rows[level][n]):.1f}" r="{radius:.2f}" '
                f'fill="{colour}">{title}</circle>'
            )
    yield label(canvas.x(g.n_cycles), TOP - 20, "final weight", size=11, text_anchor="middle")


def ess_panel(g: Genealogy, canvas: Canvas, ess_threshold: float) -> Iterator[str]:
    """The effective sample size at the end of each cycle, before resampling."""
    x0, x1, base = canvas.x(0), canvas.x(g.n_cycles), canvas.ess_y(0)
    points = [(canvas.x(cycle + 1), canvas.ess_y(value)) for cycle, value in enumerate(g.ess)]
    points.insert(0, (x0, canvas.ess_y(g.n_particles)))  # the first tokens come from the target: equal weights
    yield label(24, canvas.ess_top - 20, "Effective sample size", INK, 12, font_weight="600")
    for value in (0, g.n_particles):
        y = canvas.ess_y(value)
        yield f'<path d="M{x0:.1f} {y:.1f}H{x1:.1f}" stroke="{RULE}"/>'
        yield label(x0 - 10, y + 4, str(value), size=11, text_anchor="end")
    path = "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
    yield f'<path d="M{path}L{x1:.1f} {base:.1f}L{x0:.1f} {base:.1f}Z" fill="{ALIVE}" fill-opacity="0.09"/>'
    y = canvas.ess_y(ess_threshold * g.n_particles)
    yield f'<path class="threshold" d="M{x0:.1f} {y:.1f}H{x1:.1f}" stroke="{MUTED}" stroke-dasharray="4 4"/>'
    yield label(x0 - 10, y + 4, f"{ess_threshold * g.n_particles:g}", size=11, text_anchor="end")
    yield label(x0 - 10, y + 16, "resample", size=9, text_anchor="end")
    yield f'<path class="ess" d="M{path}" fill="none" stroke="{ALIVE}" stroke-width="2" stroke-linejoin="round"/>'
    for cycle, (x, y) in enumerate(points[1:]):
        fill = ALIVE if g.resampled(cycle) else "#ffffff"
        yield (
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.2" fill="{fill}" stroke="{ALIVE}" stroke-width="1.5">'
            f"<title>cycle {cycle + 1}: {g.ess[cycle]:.2f}</title></circle>"
        )
    step = max(1, math.ceil(g.n_cycles / 12))
    for cycle in range(step, g.n_cycles + 1, step):
        yield label(canvas.x(cycle), base + 17, str(cycle), size=11, text_anchor="middle")
    yield label(x0, base + 17, "cycle", size=11, text_anchor="middle")


def text_strip(texts: Sequence[str], canvas: Canvas) -> Iterator[str]:
    """What the returned lineage wrote in each cycle."""
    if not texts:
        return
    top = canvas.ess_top + ESS_HEIGHT + 36
    yield label(24, top + 8, "Returned", INK, 12, font_weight="600")
    yield label(24, top + 23, "text", INK, 12, font_weight="600")
    for cycle, text in enumerate(texts):
        x = canvas.x(cycle) + canvas.column / 2 + 2
        yield label(
            x,
            top,
            visible(text),
            RETURNED,
            10.5,
            font_family="ui-monospace, Menlo, Consolas, DejaVu Sans Mono, monospace",
            transform=f"rotate(50 {x:.1f} {top:.1f})",
        )
