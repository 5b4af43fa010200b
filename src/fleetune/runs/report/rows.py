# SPDX-License-Identifier: Apache-2.0
"""Draw one row per client with its name at the left: stacked bars of counts, or a value before and after."""

from __future__ import annotations

from collections.abc import Sequence

from fleetune.runs.report.axes import PlotAxis, counts, numbers
from fleetune.runs.report.bars import legend
from fleetune.runs.report.svg import (
    COLOURS,
    WIDEST,
    WIDTH,
    axis_break,
    fixed,
    frame,
    rect_at,
    text_at,
    tipped,
)

NAME = 22  # characters of a name that are shown
BETTER, WORSE, SAME = 0, 1, 7  # colours


def shortened(name: str, room: int = NAME) -> str:
    """Return a name that fits in so many characters."""
    return name if len(name) <= room else name[: room - 1] + "…"


def stacked_rows(
    ident: str,
    title: str,
    desc: str,
    names: Sequence[str],
    series: Sequence[tuple[str, Sequence[float]]],
    tips: Sequence[str],
    *,
    label: str,
    colours: Sequence[int] = (),
) -> str:
    """Draw a horizontal bar per name, each the stack of its series; `label` names the axis, the legend is below."""
    totals = [sum(values[i] for _, values in series) for i in range(len(names))]
    shades = list(colours) or [i % COLOURS for i in range(len(series))]
    chart = _Rows(names, counts(totals, label))
    for i, tip in enumerate(tips):
        base, cells = 0.0, ""
        for (_, values), colour in zip(series, shades, strict=True):
            if values[i]:
                x, end = chart.px(base), chart.px(base + values[i])
                cells += rect_at(x, chart.y(i) - chart.thick / 2, end - x, chart.thick, f"stack c{colour}")
            base += values[i]
        chart.marks.append(tipped(tip, cells + chart.hit(i)))
    entries = [(name, c) for (name, _), c in zip(series, shades, strict=True)] if len(series) > 1 else []
    return chart.svg(ident, title, desc, entries)


def dumbbells(
    ident: str,
    title: str,
    desc: str,
    names: Sequence[str],
    pairs: Sequence[tuple[float, float]],
    tips: Sequence[str],
    changes: Sequence[bool | None],
    *,
    label: str,
) -> str:
    """Draw each name's value before (hollow) and after (filled), joined by a stroke in the colour of the change.

    `changes` says of each whether it is better, worse, or neither (None).
    """
    chart = _Rows(names, numbers([v for pair in pairs for v in pair], label))
    for i, ((before, after), better, tip) in enumerate(zip(pairs, changes, tips, strict=True)):
        colour = SAME if better is None else BETTER if better else WORSE
        y, x0, x1 = fixed(chart.y(i)), chart.px(before), chart.px(after)
        link = f'<path class="link c{colour}" d="M{fixed(x0)} {y}H{fixed(x1)}"/>'
        hollow = f'<circle class="hollow" cx="{fixed(x0)}" cy="{y}" r="3.4"/>'
        filled = _after(x1, chart.y(i), colour)
        chart.marks.append(tipped(tip, link + hollow + filled + chart.hit(i)))
    kinds = ((BETTER, True, "better"), (WORSE, False, "worse"), (SAME, None, "the same"))
    entries = [(word, colour) for colour, better, word in kinds if better in changes]
    return chart.svg(ident, title, desc, entries)


def _after(x: float, y: float, colour: int) -> str:
    """Draw the value after: a disc, and a triangle where it is worse, so that colour alone does not say it."""
    if colour == WORSE:
        return f'<path class="mark c{colour}" d="M{fixed(x)} {fixed(y)}m0-4.8l4.6 8h-9.2z"/>'
    return f'<circle class="mark c{colour}" cx="{fixed(x)}" cy="{fixed(y)}" r="3.8"/>'


class _Rows:
    """A chart of rows under construction: `marks` are added in pixels."""

    def __init__(self, names: Sequence[str], x: PlotAxis) -> None:
        self.names, self.x = [shortened(name) for name in names], x
        self.pitch = 19.0 if len(names) <= 30 else 14.0
        self.thick = self.pitch - 5
        self.left = 14.0 + WIDEST * max((len(name) for name in self.names), default=1)
        self.right, self.top = WIDTH - 16.0, 8.0
        self.marks: list[str] = []

    def y(self, row: int) -> float:
        """Return the middle of a row."""
        return self.top + (row + 0.5) * self.pitch

    def px(self, value: float) -> float:
        """Return the horizontal position of a value."""
        return self.left + self.x.at(value) * (self.right - self.left)

    def hit(self, row: int) -> str:
        """Draw what shows the tip: the whole row."""
        return rect_at(0, self.y(row) - self.pitch / 2, self.right, self.pitch, "hit")

    def svg(self, ident: str, title: str, desc: str, entries: Sequence[tuple[str, int]]) -> str:
        """Return the finished drawing, with a legend of `entries` (name, colour) below."""
        bottom = self.top + len(self.names) * self.pitch + 4
        out = []
        for value, text in self.x.ticks:
            x = fixed(self.px(value))
            out.append(f'<path class="grid" d="M{x} {fixed(self.top)}V{fixed(bottom)}"/>')
            out.append(text_at(self.px(value), bottom + 14, text, anchor="middle"))
        out += [text_at(self.left - 8, self.y(i) + 4, n, anchor="end") for i, n in enumerate(self.names)]
        out.append(text_at((self.left + self.right) / 2, bottom + 31, self.x.label, "strong", "middle"))
        if self.x.broken:
            turned = axis_break(0, 0).replace(
                "<g>", f'<g transform="translate({fixed(self.left)} {fixed(bottom)}) rotate(90)">'
            )
            out.append(turned)
            desc += " The axis does not begin at 0."
        key, height = legend(entries, 4.0, bottom + 42, WIDTH)
        return frame(
            title, desc, WIDTH, bottom + 40 + height, "".join(out) + "".join(self.marks) + key, ident
        )
