# SPDX-License-Identifier: Apache-2.0
"""Draw counts by column: stacked bars, or a heat map where bars would be too many."""

from __future__ import annotations

import math
from collections.abc import Sequence

from fleetune.runs.report.axes import PlotAxis, counts, nice_step
from fleetune.runs.report.svg import CHAR, COLOURS, WIDTH, Plot, fixed, frame, rect_at, text_at, tipped

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
