# SPDX-License-Identifier: Apache-2.0
"""Plots as SVG text: axes with sensible ticks and units, lines, dots, bars, stacked bars, a heat map.

What is drawn is plain text for `report.py` to put into a page: no script, no font, no library.  Colours are
classes `c0` ... `c7` and CSS variables that `STYLE` defines for light and dark pages (the Okabe-Ito palette,
"Color Universal Design", 2008, with lighter variants on dark), so one drawing serves both.  Series differ in
marker shape as well as in colour.  Every text is escaped here, at the one place where text becomes markup.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from html import escape as escape_markup

from fleetune.ui import clean

COLOURS = 8
CHAR = 6.1  # mean advance of an 11 px system font, used to keep labels apart

_LIGHT = "#0072b2 #d55e00 #009e73 #cc79a7 #e69f00 #56b4e9 #8a7d00 #6b7280"
_DARK = "#4ba9e2 #f08a4b #35c69b #e29bc4 #f2b93b #9ad6f7 #d6ca55 #98a2ad"


def _variables(palette: str) -> str:
    return "".join(f"--s{i}:{colour};" for i, colour in enumerate(palette.split()))


STYLE = (
    f":root{{{_variables(_LIGHT)}--dot:.42}}\n"
    f"@media screen and (prefers-color-scheme:dark){{:root{{{_variables(_DARK)}--dot:.6}}}}\n"
    + "".join(f".c{i}{{--k:var(--s{i})}}" for i in range(COLOURS))
    + """
.ink{--k:var(--ink)}
svg{display:block;width:100%;height:auto;font-size:11px;overflow:visible}
svg text{fill:var(--muted);font-variant-numeric:tabular-nums}
svg .strong{fill:var(--ink);font-weight:600}
svg .own{fill:var(--k);font-weight:600}
svg .grid{stroke:var(--rule);stroke-width:1;shape-rendering:crispEdges}
svg .axis{stroke:var(--muted);stroke-width:1;shape-rendering:crispEdges}
svg .line{fill:none;stroke:var(--k);stroke-width:2;stroke-linejoin:round;stroke-linecap:round}
svg .median{stroke-width:3}
svg .mark{fill:var(--k);stroke:var(--card);stroke-width:1}
svg .dot{fill:var(--k);fill-opacity:var(--dot)}
svg .bar{fill:var(--k)}
svg .stack{fill:var(--k);stroke:var(--card);stroke-width:1}
svg .band{fill:var(--k);fill-opacity:.16}
svg .leader{fill:none;stroke:var(--k);stroke-opacity:.5;stroke-dasharray:1 3}
svg .ref{stroke:var(--muted);stroke-width:1;stroke-dasharray:4 3}
svg .hit{fill:transparent}
svg g:hover>.hit{fill:var(--ink);fill-opacity:.08}
"""
)

_UNITS = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1.0, "B"))
_CLOCK = (1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 10800, 21600, 43200, 86400)


@dataclass(frozen=True, slots=True)
class Axis:
    """One axis: the range shown, ticks as (value, text), its label; `log` places values by logarithm."""

    lo: float
    hi: float
    ticks: tuple[tuple[float, str], ...]
    label: str
    log: bool = False

    def at(self, value: float) -> float:
        """Position of `value` along the axis, 0 at `lo` and 1 at `hi`."""
        if self.log:
            return math.log(value / self.lo) / math.log(self.hi / self.lo)
        return (value - self.lo) / (self.hi - self.lo)


def escape(text: str) -> str:
    """Text as markup: without control characters, with `<`, `&` and quotes escaped."""
    return escape_markup(clean(text))


def usable(value: object) -> bool:
    """True for a finite number of a size that can be drawn."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e18


def nice_step(span: float, count: int) -> float:
    """The smallest 1, 2 or 5 times a power of ten that cuts `span` into at most `count` parts."""
    raw = span / max(count, 1)
    power = 10.0 ** math.floor(math.log10(raw))
    return next(m * power for m in (1.0, 2.0, 5.0, 10.0) if raw <= m * power * (1 + 1e-9))


def _multiples(lo: float, hi: float, step: float) -> list[float]:
    first, last = math.ceil(lo / step - 1e-9), math.floor(hi / step + 1e-9)
    return [k * step for k in range(first, last + 1)]


def _range(values: Iterable[float], zero: bool) -> tuple[float, float]:
    finite = [v for v in values if usable(v)] or [0.0, 1.0]
    lo, hi = min(finite), max(finite)
    if zero:
        lo, hi = min(lo, 0.0), max(hi, 0.0)
    if hi - lo <= 1e-9 * max(abs(lo), abs(hi)):
        room = 0.05 * abs(hi) or 1.0
        lo, hi = (lo, hi + room) if zero else (lo - room, hi + room)
    return lo, hi


def numbers(
    values: Iterable[float], label: str, *, zero: bool = False, count: int = 5, snap: bool = True
) -> Axis:
    """A linear axis of plain numbers; `snap` widens the range to whole steps."""
    lo, hi = _range(values, zero)
    step = nice_step(hi - lo, count)
    digits = max(0, -math.floor(math.log10(step) + 1e-9))
    return _linear(lo, hi, step, label, lambda v: f"{v:.{digits}f}" if abs(v) < 1e6 else f"{v:.3g}", snap)


def counts(values: Iterable[float], label: str) -> Axis:
    """A linear axis of counts from zero: no ticks between whole numbers."""
    lo, hi = _range(values, zero=True)
    return _linear(lo, hi, max(1.0, nice_step(hi - lo, 5)), label, lambda v: f"{v:,.0f}", snap=True)


def whole(values: Iterable[float], label: str, *, pad: float = 0.0, count: int = 10) -> Axis:
    """A linear axis of whole numbers (rounds), `pad` units wider on both sides for bars."""
    lo, hi = _range(values, zero=False)
    step = max(1.0, nice_step(hi - lo, count))
    return _linear(lo - pad, hi + pad, step, label, lambda v: f"{v:.0f}", snap=False)


def sizes(values: Iterable[float], label: str, *, count: int = 5, snap: bool = True) -> Axis:
    """A linear axis of bytes from zero, all ticks in one decimal unit."""
    lo, hi = _range(values, zero=True)
    scale, unit = next((s, u) for s, u in _UNITS if hi >= s or s == 1.0)
    step = max(nice_step(hi - lo, count), 1.0)
    return _linear(lo, hi, step, label, lambda v: f"{v / scale:g} {unit}" if v else "0", snap)


def log_sizes(values: Iterable[float], label: str) -> Axis:
    """A logarithmic axis of bytes; decades, or 1-2-5 where fewer than three decades show."""
    positive = [v for v in values if usable(v) and v > 0] or [1.0, 10.0]
    lo, hi = min(positive) / 1.25, max(positive) * 1.25
    steps = (1,) if math.log10(hi / lo) >= 3 else (1, 2, 5)
    exponents = range(math.floor(math.log10(lo)), math.ceil(math.log10(hi)) + 1)
    ticks = [m * 10.0**e for e in exponents for m in steps if lo <= m * 10.0**e <= hi]
    return Axis(lo, hi, tuple((t, _size(t)) for t in ticks), label, log=True)


def _size(value: float) -> str:
    scale, unit = next((s, u) for s, u in _UNITS if value >= s * (1 - 1e-9) or s == 1.0)
    return f"{value / scale:.3g} {unit}"


def _clock(seconds: float) -> str:
    scale, unit = next((s, u) for s, u in ((86400, "d"), (3600, "h"), (60, "min"), (1, "s")) if seconds >= s)
    return f"{seconds / scale:g} {unit}"


def durations(values: Iterable[float], label: str, *, count: int = 6) -> Axis:
    """A linear axis of seconds from zero with ticks at round seconds, minutes or hours."""
    lo, hi = _range(values, zero=True)
    steps = (float(s) for s in _CLOCK if (hi - lo) / s <= count)
    step = next(steps, math.ceil((hi - lo) / count / 86400) * 86400.0)
    return _linear(lo, hi, step, label, lambda v: _clock(v) if v else "0", snap=False)


def _linear(lo: float, hi: float, step: float, label: str, text: Callable[[float], str], snap: bool) -> Axis:
    if snap:
        lo, hi = math.floor(lo / step + 1e-9) * step, math.ceil(hi / step - 1e-9) * step
    return Axis(lo, hi, tuple((v, text(v)) for v in _multiples(lo, hi, step)), label)


def sparse(values: Sequence[float]) -> bool:
    """True where a logarithmic axis reads better: positive values over more than a decade and a half."""
    positive = [v for v in values if usable(v) and v > 0]
    return len(positive) > 1 and max(positive) / min(positive) > 30


def _kind(colour: int) -> str:
    """The class of a colour number; -1 is the text colour."""
    return f"c{colour % COLOURS}" if colour >= 0 else "ink"


def _n(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")


def _text(x: float, y: float, text: str, kind: str = "", anchor: str = "start") -> str:
    css = f' class="{kind}"' if kind else ""
    side = f' text-anchor="{anchor}"' if anchor != "start" else ""
    return f'<text x="{_n(x)}" y="{_n(y)}"{css}{side}>{escape(text)}</text>'


def _rect(x: float, y: float, w: float, h: float, kind: str, more: str = "") -> str:
    return f'<rect class="{kind}" x="{_n(x)}" y="{y:.2f}" width="{w:.2f}" height="{max(h, 0):.2f}"{more}/>'


def _tipped(tip: str, inner: str) -> str:
    return f"<g><title>{escape(tip)}</title>{inner}</g>"


def _marker(shape: int, x: float, y: float, kind: str) -> str:
    r = 3.4
    if shape % 4 == 0:
        return f'<circle class="mark {kind}" cx="{_n(x)}" cy="{_n(y)}" r="{r}"/>'
    paths = (
        f"m-{r}-{r}h{2 * r}v{2 * r}h-{2 * r}z",
        "m0-4.4l4.2 7.4h-8.4z",
        "m0-4.8l4.2 4.8-4.2 4.8-4.2-4.8z",
    )
    return f'<path class="mark {kind}" d="M{_n(x)} {_n(y)}{paths[shape % 4 - 1]}"/>'


def frame(title: str, desc: str, width: float, height: float, body: str, ident: str) -> str:
    """The svg element with its accessible title and description around `body`."""
    return (
        f'<svg viewBox="0 0 {_n(width)} {_n(height)}" role="img" aria-labelledby="{ident}-t {ident}-d">'
        f'<title id="{ident}-t">{escape(title)}</title><desc id="{ident}-d">{escape(desc)}</desc>{body}</svg>'
    )


@dataclass(slots=True)
class Plot:
    """A plot under construction: marks are added in data units, `svg` adds axes and closes it.

    `ident` makes ids unique in the page, `desc` is what a reader who does not see the plot is told, `right`
    the room for labels at line ends.
    """

    ident: str
    title: str
    desc: str
    x: Axis
    y: Axis
    width: float = 520.0
    height: float = 280.0
    right: float = 18.0
    marks: list[str] = field(default_factory=list)
    ends: list[tuple[float, float, str, int]] = field(default_factory=list)

    @property
    def left(self) -> float:
        """Where the plot area begins: after the widest tick label."""
        return 14.0 + CHAR * max((len(text) for _, text in self.y.ticks), default=1)

    def px(self, value: float) -> float:
        """Horizontal position of a data value."""
        return self.left + self.x.at(value) * (self.width - self.left - self.right)

    def py(self, value: float) -> float:
        """Vertical position of a data value; 26 px above are for the axis name, 40 below for ticks."""
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
        """A line through points, broken where a value cannot be drawn; up to 80 points get markers."""
        kind, path, pen = _kind(colour), "", "M"
        for x, y in points:
            if not (usable(x) and usable(y)):
                pen = "M"
                continue
            path += f"{pen}{_n(self.px(x))} {_n(self.py(y))}"
            pen = "L"
        dashes = ' stroke-dasharray="5 4"' if dash else ""
        self.marks.append(f'<path class="line {kind}" d="{path}"{dashes}/>')
        if not markers or len(points) > 80:
            return
        for (x, y), tip in zip(points, tips, strict=True):
            if usable(x) and usable(y):
                hit = f'<circle class="hit" cx="{_n(self.px(x))}" cy="{_n(self.py(y))}" r="10"/>'
                self.marks.append(_tipped(tip, hit + _marker(colour, self.px(x), self.py(y), kind)))

    def dot(self, x: float, y: float, colour: int, tip: str, shift: float = 0.0) -> None:
        """One pale dot, moved `shift` pixels aside so that dots of equal x stay apart."""
        cx, cy = _n(self.px(x) + shift), _n(self.py(y))
        place = f'class="dot {_kind(colour)}" cx="{cx}" cy="{cy}" r="3"'
        self.marks.append(f"<circle {place}><title>{escape(tip)}</title></circle>")

    def dash(self, x: float, y: float, half: float, colour: int, tip: str) -> None:
        """A short horizontal stroke centred on a point (a median)."""
        cx, cy = self.px(x), _n(self.py(y))
        stroke = f'<path class="line median {_kind(colour)}" d="M{_n(cx - half)} {cy}H{_n(cx + half)}"/>'
        self.marks.append(_tipped(tip, stroke))

    def band(self, points: Sequence[tuple[float, float, float]], colour: int = 0) -> None:
        """The area between two curves: points are (x, low, high)."""
        drawn = [p for p in points if all(usable(v) for v in p)]
        there = [f"{_n(self.px(x))} {_n(self.py(high))}" for x, _, high in drawn]
        back = [f"{_n(self.px(x))} {_n(self.py(low))}" for x, low, _ in reversed(drawn)]
        if drawn:
            self.marks.append(f'<path class="band {_kind(colour)}" d="M{"L".join(there + back)}z"/>')

    def bar(self, x: float, y: float, colour: int, tip: str, base: float = 0.0, kind: str = "bar") -> None:
        """A vertical bar from `base` to `y`, 0.72 units wide (at most 56 px)."""
        slot = (self.width - self.left - self.right) / max(self.x.hi - self.x.lo, 1e-9)
        w, top = min(0.72 * slot, 56.0) if slot > 8 else slot + 0.2, self.py(y)
        body = _rect(self.px(x) - w / 2, top, w, self.py(base) - top, f"{kind} {_kind(colour)}")
        self.marks.append(_tipped(tip, body) if tip else body)

    def reference(self, value: float, text: str, *, below: bool = False) -> None:
        """A dashed level with its text at the right end, above the level or below it."""
        y = self.py(value)
        self.marks.append(
            f'<path class="ref" d="M{_n(self.left)} {_n(y)}H{_n(self.width - self.right)}"/>'
            + _text(self.width - self.right, y + (13 if below else -5), text, anchor="end")
        )

    def end(self, point: tuple[float, float], text: str, colour: int) -> None:
        """A name for the line that ends in `point`, right of the plot; a faint leader joins the two."""
        if usable(point[0]) and usable(point[1]):
            self.ends.append((self.py(point[1]), self.px(point[0]), text, colour % COLOURS))

    def _end_labels(self) -> str:
        """Line names, pushed apart where they would overlap."""
        ordered = sorted(self.ends)
        ys = spread([end[0] for end in ordered], 14.0, 20.0, self.height - 40.0)
        x, out = self.width - self.right + 8, ""
        for y, (from_y, from_x, text, colour) in zip(ys, ordered, strict=True):
            if x - from_x > 20:
                leader = f"M{_n(from_x + 6)} {_n(from_y)}L{_n(x - 3)} {_n(y)}"
                out += f'<path class="leader c{colour}" d="{leader}"/>'
            out += _text(x, y + 4, text, f"own c{colour}")
        return out

    def svg(self) -> str:
        """The finished drawing."""
        x1, y0, y1 = self.width - self.right, self.py(self.y.hi), self.py(self.y.lo)
        out = [_text(2, 12, self.y.label, "strong")]
        for value, text in self.y.ticks:
            y = self.py(value)
            out.append(f'<path class="grid" d="M{_n(self.left)} {_n(y)}H{_n(x1)}"/>')
            out.append(_text(self.left - 8, y + 4, text, anchor="end"))
        taken = -math.inf
        for value, text in self.x.ticks:
            x, half = self.px(value), CHAR * len(text) / 2
            out.append(f'<path class="axis" d="M{_n(x)} {_n(y1)}v4"/>')
            if x - half > taken + 8 and x + half <= self.width + 2:
                out.append(_text(x, y1 + 17, text, anchor="middle"))
                taken = x + half
        out.append(f'<path class="axis" d="M{_n(self.left)} {_n(y1)}H{_n(x1)}"/>')
        out.append(_text((self.left + x1) / 2, y1 + 34, self.x.label, "strong", "middle"))
        body = "".join(out) + "".join(self.marks) + self._end_labels()
        assert y0 <= y1
        return frame(self.title, self.desc, self.width, self.height, body, self.ident)


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


def _legend(names: Sequence[tuple[str, int]], x: float, y: float, room: int) -> str:
    rows = []
    for i, (name, colour) in enumerate(names):
        shown = name if len(name) <= room else name[: room - 1] + "…"
        top = y + 18 * i
        rows.append(_tipped(name, _rect(x, top, 11, 11, f"bar c{colour}") + _text(x + 17, top + 9.5, shown)))
    return "".join(rows)


def stacked_bars(
    ident: str,
    title: str,
    desc: str,
    columns: Sequence[str],
    series: Sequence[tuple[str, Sequence[float]]],
    tips: Sequence[str],
    *,
    labels: tuple[str, str],
    width: float = 1080.0,
    height: float = 300.0,
    colours: Sequence[int] = (),
) -> str:
    """Vertical bars, one a column, each the stack of its series; the legend stands right in stacking order.

    `labels` names the x and the y axis.  Column names are written where each of them fits, else thinned.
    """
    totals = [sum(values[i] for _, values in series) for i in range(len(columns))]
    x = Axis(-0.6, len(columns) - 0.4, _named_ticks(columns, width - 240), labels[0])
    right = 190.0 if len(series) > 1 else 18.0
    plot = Plot(ident, title, desc, x, counts(totals, labels[1]), width, height, right)
    kind = "stack" if (width - right - plot.left) / max(len(columns), 1) > 8 else "bar"
    shades = list(colours) or [i % COLOURS for i in range(len(series))]
    for i in range(len(columns)):
        base, cut = 0.0, len(plot.marks)
        for (_, values), colour in zip(series, shades, strict=True):
            if values[i]:
                plot.bar(i, base + values[i], colour, "", base, kind)
            base += values[i]
        plot.marks[cut:] = [_tipped(tips[i], "".join(plot.marks[cut:]))]
    if len(series) > 1:
        names = [(name, c) for (name, _), c in zip(series, shades, strict=True)]
        plot.marks.append(_legend(names[::-1], width - right + 20, 30.0, 26))
    return plot.svg()


def _named_ticks(names: Sequence[str], room: float) -> tuple[tuple[float, str], ...]:
    """A tick for every name, or where they do not fit for numbers that are multiples of 2, 5, 10, ..."""
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
    width: float = 1080.0,
) -> str:
    """A heat map of counts, shaded by each row's share of its column; above it a strip of column totals.

    Cells are drawn as one path a shade (10 of them), so 200 columns stay small; a tip tells a column.
    """
    totals = [sum(values[i] for _, values in rows) for i in range(len(columns))]
    names = [name if len(name) <= 26 else name[:25] + "…" for name, _ in rows]
    left = 16.0 + CHAR * max(map(len, names), default=1)
    cell = (width - left - 20.0) / max(len(columns), 1)
    tall = 22.0 if len(rows) <= 12 else 16.0
    strip, gap = 56.0, 0.0 if cell < 6 else 1.0
    top, peak = 20.0 + strip + 8.0, max(totals, default=0.0) or 1.0
    shades: dict[int, str] = {}
    for r, (_, values) in enumerate(rows):
        for c, value in enumerate(values):
            level = math.ceil(10 * value / totals[c]) if totals[c] and value > 0 else 0
            corner = f"M{left + c * cell:.1f} {_n(top + r * tall)}"
            shades[level] = (
                shades.get(level, "") + f"{corner}h{cell - gap:.2f}v{tall - 1:.0f}h-{cell - gap:.2f}z"
            )
    body = [_text(2, 12, f"rows in each column (largest {peak:,.0f})", "strong")]
    for c, total in enumerate(totals):
        h = strip * total / peak
        body.append(_rect(left + c * cell, 20 + strip - h, cell - gap, h, "bar c7"))
    body += [
        f'<path class="bar c0" fill-opacity="{0.03 + 0.097 * level:.2f}" d="{path}"/>'
        for level, path in sorted(shades.items())
    ]
    body += [_text(left - 8, top + r * tall + tall / 2 + 3.5, n, anchor="end") for r, n in enumerate(names)]
    bottom = top + len(rows) * tall
    wide = CHAR * max(map(len, columns), default=1) + 6 <= cell
    if wide:
        body += [
            _text(left + (c + 0.5) * cell, bottom + 14, n, anchor="middle") for c, n in enumerate(columns)
        ]
    for c, tip in enumerate(tips):
        body.append(_tipped(tip, _rect(left + c * cell, 20, cell, bottom - 20, "hit")))
    foot = bottom + (34 if wide else 18)
    body.append(_text(left, foot, label, "strong"))
    body.append(_scale(width - 20, foot))
    return frame(title, desc, width, foot + 8, "".join(body), ident)


def _scale(right: float, y: float) -> str:
    cells = "".join(
        _rect(
            right - 160 + 10 * level, y - 10, 10, 10, "bar c0", f' fill-opacity="{0.03 + 0.097 * level:.2f}"'
        )
        for level in range(11)
    )
    left = _text(right - 168, y, "share of the client's rows  0 %", anchor="end")
    return left + cells + _text(right - 160 + 118, y, "100 %")
