# SPDX-License-Identifier: Apache-2.0
"""Draw counts by column or by row: stacked bars, a heat map where bars would be too many, values before and after."""

from __future__ import annotations

import math
from collections.abc import Sequence

from fleetune.report.axes import PlotAxis, counts, nice_step, numbers
from fleetune.report.svg import (
    CHAR,
    COLOURS,
    WIDEST,
    WIDTH,
    Plot,
    axis_break,
    fixed,
    frame,
    rect_at,
    text_at,
    tipped,
)

LEGEND = 28  # characters of a name in a legend


def stacked_bars(
    ident: str,
    title: str,
    desc: str,
    columns: Sequence[str],
    series: Sequence[tuple[str, Sequence[float]]],
    tips: Sequence[str],
    *,
    labels: tuple[str, str],
    width: float = WIDTH,
    height: float = 240.0,
    colours: Sequence[int] = (),
) -> str:
    """Draw vertical bars, one a column, each the stack of its series; the legend stands below.

    `labels` names the x and the y axis.  Column names are written where each of them fits, else thinned.
    """
    totals = [sum(values[i] for _, values in series) for i in range(len(columns))]
    x = PlotAxis(-0.6, len(columns) - 0.4, _named_ticks(columns, width - 60), labels[0])
    right = 18.0
    plot = Plot(ident, title, desc, x, counts(totals, labels[1]), width, height, right)
    kind = "stack" if (width - right - plot.left) / max(len(columns), 1) > 8 else "bar"
    shades = list(colours) or [i % COLOURS for i in range(len(series))]
    for i in range(len(columns)):
        base, cut = 0.0, len(plot.marks)
        for (_, values), colour in zip(series, shades, strict=True):
            if values[i]:
                plot.bar(i, base + values[i], colour, "", base, kind)
            base += values[i]
        plot.marks[cut:] = [tipped(tips[i], "".join(plot.marks[cut:]))]
    entries = [(name, c) for (name, _), c in zip(series, shades, strict=True)] if len(series) > 1 else []
    key, more = legend(entries, 4.0, height + 4, width)
    plot.marks.append(key)
    return plot.svg().replace(
        f'0 0 {fixed(width)} {fixed(height)}"', f'0 0 {fixed(width)} {fixed(height + more)}"', 1
    )


def legend(entries: Sequence[tuple[str, int]], left: float, top: float, width: float) -> tuple[str, float]:
    """Draw a legend of (name, colour) in as many lines as it needs; return it with its height in pixels (0: nothing)."""
    out, x, y = [], left, top
    for name, colour in entries:
        shown = name if len(name) <= LEGEND else name[: LEGEND - 1] + "…"
        room = 15 + CHAR * len(shown) + 18
        if x > left and x + room - 18 > width:
            x, y = left, y + 17
        mark = rect_at(x, y, 10, 10, f"bar c{colour}") + text_at(x + 15, y + 9, shown)
        out.append(tipped(name, mark))
        x += room
    return "".join(out), (y + 16 - top if entries else 0.0)


def _named_ticks(names: Sequence[str], room: float) -> tuple[tuple[float, str], ...]:
    """Return a tick for every name or, where they do not fit, for numbers that are multiples of 2, 5, 10, ..."""
    each = max(map(len, names), default=1) * CHAR + 8
    most = max(int(room / each), 1)
    step = 1 if len(names) <= most else math.ceil(max(nice_step(len(names), most), 1.0))
    places = [int(name) if name.isdecimal() else i for i, name in enumerate(names)]
    return tuple((float(i), name) for i, name in enumerate(names) if places[i] % step == 0)


def heat_map(
    ident: str,
    title: str,
    desc: str,
    columns: Sequence[str],
    rows: Sequence[tuple[str, Sequence[float]]],
    tips: Sequence[str],
    *,
    label: str,
    width: float = WIDTH,
) -> str:
    """Draw a heat map of counts, shaded by each row's share of its column; above it a strip of column totals.

    Cells are drawn as one path a shade (10 of them), so 200 columns stay small; a tip tells a column.
    """
    totals = [sum(values[i] for _, values in rows) for i in range(len(columns))]
    names = [name if len(name) <= 20 else name[:19] + "…" for name, _ in rows]
    left = 16.0 + CHAR * max(map(len, names), default=1)
    cell = (width - left - 20.0) / max(len(columns), 1)
    tall = 22.0 if len(rows) <= 12 else 16.0
    strip, gap = 44.0, 0.0 if cell < 6 else 1.0
    top, peak = 20.0 + strip + 8.0, max(totals, default=0.0) or 1.0
    body = [text_at(2, 12, f"rows in each column (largest {peak:,.0f})", "strong")]
    for c, total in enumerate(totals):
        h = strip * total / peak
        body.append(rect_at(left + c * cell, 20 + strip - h, cell - gap, h, "bar c7"))
    body += _shaded_cells(rows, totals, (left, top), (cell, tall), gap)
    body += [text_at(left - 8, top + r * tall + tall / 2 + 3.5, n, anchor="end") for r, n in enumerate(names)]
    bottom = top + len(rows) * tall
    wide = CHAR * max(map(len, columns), default=1) + 6 <= cell
    if wide:
        body += [
            text_at(left + (c + 0.5) * cell, bottom + 14, n, anchor="middle") for c, n in enumerate(columns)
        ]
    for c, tip in enumerate(tips):
        body.append(tipped(tip, rect_at(left + c * cell, 20, cell, bottom - 20, "hit")))
    foot = bottom + (34 if wide else 18)
    body.append(text_at(2, foot, label, "strong"))
    body.append(_scale(2, foot + 20))
    return frame(title, desc, width, foot + 28, "".join(body), ident)


def _shaded_cells(
    rows: Sequence[tuple[str, Sequence[float]]],
    totals: Sequence[float],
    corner: tuple[float, float],
    size: tuple[float, float],
    gap: float,
) -> list[str]:
    """Draw the cells of a heat map, of one `size` each from the upper left `corner` on: a path for each shade."""
    (left, top), (cell, tall) = corner, size
    shades: dict[int, str] = {}
    for r, (_, values) in enumerate(rows):
        for c, value in enumerate(values):
            level = math.ceil(10 * value / totals[c]) if totals[c] and value > 0 else 0
            start = f"M{left + c * cell:.1f} {fixed(top + r * tall)}"
            shades[level] = (
                shades.get(level, "") + f"{start}h{cell - gap:.2f}v{tall - 1:.0f}h-{cell - gap:.2f}z"
            )
    return [
        f'<path class="bar c0" fill-opacity="{0.03 + 0.097 * level:.2f}" d="{path}"/>'
        for level, path in sorted(shades.items())
    ]


def _scale(left: float, y: float) -> str:
    words = "share of the client's rows  0 %"
    x = left + CHAR * len(words)
    cells = "".join(
        rect_at(x + 10 * level, y - 9, 10, 10, "bar c0", f' fill-opacity="{0.03 + 0.097 * level:.2f}"')
        for level in range(11)
    )
    return text_at(left, y, words) + cells + text_at(x + 118, y, "100 %")


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
