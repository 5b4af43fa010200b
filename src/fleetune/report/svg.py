# SPDX-License-Identifier: Apache-2.0
"""Draw plots as SVG text: lines, dots, bars, bands and levels on two axes.

A drawing is plain text for a page: no script, no font, no library.  Colours are classes `c0` ... `c7` and
CSS variables that `plot.css` defines for light and dark pages (the Okabe-Ito palette, "Color Universal
Design", 2008, with lighter variants on dark), so one drawing serves both.  Series differ in marker shape as
well as in colour.  Every text is escaped here, at the one place where text becomes markup.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape as escape_markup
from pathlib import Path

from fleetune.common.display import clean
from fleetune.report.axes import PlotAxis, usable

COLOURS = 8  # of `plot.css`
WIDTH = 460.0  # of a drawing: its text is about 12 px where two stand side by side, 9 on a telephone
WIDEST = 7.2  # advance of bold text, and of the larger text of a telephone: for names that must not be cut
CHAR = 6.1  # mean advance of an 11 px system font, used to keep labels apart


def escape(text: str) -> str:
    """Return text as markup: without control characters, with `<`, `&` and quotes escaped."""
    return escape_markup(clean(text))


def _kind(colour: int) -> str:
    """Return the class of a colour number; -1 is the text colour."""
    return f"c{colour % COLOURS}" if colour >= 0 else "ink"


def fixed(value: float) -> str:
    """Format a coordinate with at most one decimal."""
    return f"{value:.1f}".removesuffix(".0")


def text_at(x: float, y: float, text: str, kind: str = "", anchor: str = "start") -> str:
    """Draw a text, escaped, with its `anchor` (start, middle, end) at a position in pixels."""
    css = f' class="{kind}"' if kind else ""
    side = f' text-anchor="{anchor}"' if anchor != "start" else ""
    return f'<text x="{fixed(x)}" y="{fixed(y)}"{css}{side}>{escape(text)}</text>'


def rect_at(x: float, y: float, w: float, h: float, kind: str, more: str = "") -> str:
    """Draw a rectangle from its upper left corner, in pixels."""
    return f'<rect class="{kind}" x="{fixed(x)}" y="{y:.2f}" width="{w:.2f}" height="{max(h, 0):.2f}"{more}/>'


def tipped(tip: str, inner: str) -> str:
    """Return marks with a text that shows when one points at them."""
    return f"<g><title>{escape(tip)}</title>{inner}</g>"


def _marker(shape: int, x: float, y: float, kind: str) -> str:
    r = 3.4
    if shape % 4 == 0:
        return f'<circle class="mark {kind}" cx="{fixed(x)}" cy="{fixed(y)}" r="{r}"/>'
    paths = (
        f"m-{r}-{r}h{2 * r}v{2 * r}h-{2 * r}z",
        "m0-4.4l4.2 7.4h-8.4z",
        "m0-4.8l4.2 4.8-4.2 4.8-4.2-4.8z",
    )
    return f'<path class="mark {kind}" d="M{fixed(x)} {fixed(y)}{paths[shape % 4 - 1]}"/>'


def axis_break(x: float, y: float) -> str:
    """Draw the mark of an axis that does not begin at 0: a stub with a zigzag, upwards from a position in pixels."""
    zigzag = f"M{fixed(x)} {fixed(y)}v-5l-4-2.5 8-4-4-2.5v-6"
    return f'<g><title>this axis does not begin at 0</title><path class="break" d="{zigzag}"/></g>'


def frame(title: str, desc: str, width: float, height: float, body: str, ident: str) -> str:
    """Return the svg element with its accessible title and description around `body`."""
    return (
        f'<svg viewBox="0 0 {fixed(width)} {fixed(height)}" role="img" aria-labelledby="{ident}-t {ident}-d">'
        f'<title id="{ident}-t">{escape(title)}</title><desc id="{ident}-d">{escape(desc)}</desc>{body}</svg>'
    )


def plot_style() -> str:
    """Return the style that drawings need."""
    return Path(__file__).with_name("plot.css").read_text(encoding="utf-8")


def standalone(drawing: str) -> str:
    """Return a drawing as a file of its own: namespace, size, and the light style without variables, on white.

    Programs other than browsers do not know CSS variables, and paper is white.
    """
    style = re.sub(r"@media[^{]*\{([^{}]*\{[^{}]*\})*[^{}]*\}", "", plot_style())
    rules = [(selector.strip(), body) for selector, body in re.findall(r"([^{}]+)\{([^{}]*)\}", style)]
    values = dict(
        pair for name, body in rules if name == ":root" for pair in re.findall(r"(--\w+):([^;]+)", body)
    )
    colours = {name: body.removeprefix("--k:") for name, body in rules if body.startswith("--k:")}
    out = f"svg{{background:{values['--card']}}}"
    for name, body in rules:
        if name != ":root" and name not in colours:
            each = colours.items() if "var(--k)" in body else [("", "")]
            out += "".join(f"{name}{colour}{{{body.replace('var(--k)', value)}}}" for colour, value in each)
    out = re.sub(r"var\((--\w+)\)", lambda match: values[match[1]].strip(), out)
    head, rest = drawing.split(">", 1)
    width, height = head.split('viewBox="0 0 ')[1].split('"')[0].split()
    size = f'xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
    return f"{head.replace('<svg ', '<svg ' + size, 1)}><style>{out}</style>{rest}\n"


@dataclass(slots=True)
class Plot:
    """A plot under construction: marks are added in data units, `svg` adds axes and closes it.

    `ident` makes ids unique in the page, `desc` describes the plot to readers who do not see it, `right` is
    the room for labels at line ends.
    """

    ident: str
    title: str
    desc: str
    x: PlotAxis
    y: PlotAxis
    width: float = WIDTH
    height: float = 280.0
    right: float = 18.0
    marks: list[str] = field(default_factory=list)
    ends: list[tuple[float, float, str, int]] = field(default_factory=list)

    @property
    def left(self) -> float:
        """Return where the plot area begins: after the widest tick label."""
        return 14.0 + CHAR * max((len(text) for _, text in self.y.ticks), default=1)

    def px(self, value: float) -> float:
        """Return the horizontal position of a data value."""
        return self.left + self.x.at(value) * (self.width - self.left - self.right)

    def py(self, value: float) -> float:
        """Return the vertical position of a data value; 26 px above are for the axis name, 40 below for ticks."""
        return 26.0 + (1.0 - self.y.at(value)) * (self.height - 66.0)

    def line(
        self,
        points: Sequence[tuple[float, float]],
        colour: int = 0,
        tips: Sequence[str] = (),
        *,
        dash: bool = False,
        markers: bool = True,
    ) -> None:
        """Draw a line through points, broken where a value cannot be drawn; up to 80 points get markers."""
        kind, path, pen = _kind(colour), "", "M"
        for x, y in points:
            if not (usable(x) and usable(y)):
                pen = "M"
                continue
            path += f"{pen}{fixed(self.px(x))} {fixed(self.py(y))}"
            pen = "L"
        dashes = ' stroke-dasharray="5 4"' if dash else ""
        self.marks.append(f'<path class="line {kind}" d="{path}"{dashes}/>')
        if not markers or len(points) > 80:
            return
        for (x, y), tip in zip(points, tips, strict=True):
            if usable(x) and usable(y):
                hit = f'<circle class="hit" cx="{fixed(self.px(x))}" cy="{fixed(self.py(y))}" r="10"/>'
                self.marks.append(tipped(tip, hit + _marker(colour, self.px(x), self.py(y), kind)))

    def dot(self, x: float, y: float, colour: int, tip: str, shift: float = 0.0) -> None:
        """Draw one pale dot, moved `shift` pixels aside so that dots of equal x stay apart."""
        cx, cy = fixed(self.px(x) + shift), fixed(self.py(y))
        place = f'class="dot {_kind(colour)}" cx="{cx}" cy="{cy}" r="3"'
        self.marks.append(f"<circle {place}><title>{escape(tip)}</title></circle>")

    def dash(self, x: float, y: float, half: float, colour: int, tip: str) -> None:
        """Draw a short horizontal stroke centred on a point (a median)."""
        cx, cy = self.px(x), fixed(self.py(y))
        stroke = (
            f'<path class="line median {_kind(colour)}" d="M{fixed(cx - half)} {cy}H{fixed(cx + half)}"/>'
        )
        self.marks.append(tipped(tip, stroke))

    def band(self, points: Sequence[tuple[float, float, float]], colour: int = 0) -> None:
        """Draw the area between two curves: points are (x, low, high)."""
        drawn = [p for p in points if all(usable(v) for v in p)]
        there = [f"{fixed(self.px(x))} {fixed(self.py(high))}" for x, _, high in drawn]
        back = [f"{fixed(self.px(x))} {fixed(self.py(low))}" for x, low, _ in reversed(drawn)]
        if drawn:
            self.marks.append(f'<path class="band {_kind(colour)}" d="M{"L".join(there + back)}z"/>')

    def bar(self, x: float, y: float, colour: int, tip: str, base: float = 0.0, kind: str = "bar") -> None:
        """Draw a vertical bar from `base` to `y`, 0.72 units wide (at most 56 px)."""
        slot = (self.width - self.left - self.right) / max(self.x.hi - self.x.lo, 1e-9)
        w, top = min(0.72 * slot, 56.0) if slot > 8 else slot + 0.2, self.py(y)
        body = rect_at(self.px(x) - w / 2, top, w, self.py(base) - top, f"{kind} {_kind(colour)}")
        self.marks.append(tipped(tip, body) if tip else body)

    def reference(self, value: float, text: str, *, below: bool = False) -> None:
        """Draw a dashed level with its text at the right end, above the level or below it."""
        y = self.py(value)
        self.marks.append(
            f'<path class="ref" d="M{fixed(self.left)} {fixed(y)}H{fixed(self.width - self.right)}"/>'
            + text_at(self.width - self.right, y + (13 if below else -5), text, anchor="end")
        )

    def end(self, point: tuple[float, float], text: str, colour: int) -> None:
        """Name the line that ends in `point`, right of the plot; a faint leader joins the two."""
        if usable(point[0]) and usable(point[1]):
            self.ends.append((self.py(point[1]), self.px(point[0]), text, colour % COLOURS))

    def _end_labels(self) -> str:
        """Return the line names, pushed apart where they would overlap."""
        ordered = sorted(self.ends)
        ys = spread([end[0] for end in ordered], 14.0, 20.0, self.height - 40.0)
        x, out = self.width - self.right + 8, ""
        for y, (from_y, from_x, text, colour) in zip(ys, ordered, strict=True):
            if x - from_x > 20:
                leader = f"M{fixed(from_x + 6)} {fixed(from_y)}L{fixed(x - 3)} {fixed(y)}"
                out += f'<path class="leader c{colour}" d="{leader}"/>'
            out += text_at(x, y + 4, text, f"own c{colour}")
        return out

    def svg(self) -> str:
        """Return the finished drawing."""
        x1, y0, y1 = self.width - self.right, self.py(self.y.hi), self.py(self.y.lo)
        out = [text_at(2, 12, self.y.label, "strong")]
        for value, text in self.y.ticks:
            y = self.py(value)
            out.append(f'<path class="grid" d="M{fixed(self.left)} {fixed(y)}H{fixed(x1)}"/>')
            out.append(text_at(self.left - 8, y + 4, text, anchor="end"))
        taken = -math.inf
        for value, text in self.x.ticks:
            x, half = self.px(value), CHAR * len(text) / 2
            out.append(f'<path class="axis" d="M{fixed(x)} {fixed(y1)}v4"/>')
            if x - half > taken + 8 and x + half <= self.width + 2:
                out.append(text_at(x, y1 + 17, text, anchor="middle"))
                taken = x + half
        out.append(f'<path class="axis" d="M{fixed(self.left)} {fixed(y1)}H{fixed(x1)}"/>')
        out.append(axis_break(self.left, y1) if self.y.broken else "")
        out.append(text_at((self.left + x1) / 2, y1 + 34, self.x.label, "strong", "middle"))
        body = "".join(out) + "".join(self.marks) + self._end_labels()
        assert y0 <= y1
        desc = f"{self.desc} The vertical axis does not begin at 0." if self.y.broken else self.desc
        return frame(self.title, desc, self.width, self.height, body, self.ident)


def spread(ys: Sequence[float], gap: float, lo: float, hi: float) -> list[float]:
    """Move sorted positions apart by at least `gap`, within [lo, hi] as far as they fit."""
    out: list[float] = []
    for y in ys:
        out.append(max(y, lo, out[-1] + gap if out else lo))
    ceiling = hi
    for i in range(len(out) - 1, -1, -1):
        out[i] = min(out[i], ceiling)
        ceiling = out[i] - gap
    return out
