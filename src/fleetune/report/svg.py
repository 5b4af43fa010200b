"""Draw plots as SVG text: lines, bands and levels on two axes, and a row a name with bars or values before and after.

Colours are classes `c0` .. `c7` and CSS variables of `style.css`, for light and dark pages (the Okabe-Ito palette, "Color
Universal Design", 2008); series differ in marker shape as well.  Every text is escaped here, where it becomes markup.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from html import escape as escape_markup

from fleetune.common.display import clean

COLOURS = 8  # of `style.css`
WIDTH = 460.0  # of a drawing: its text is about 12 px where two stand side by side, 9 on a telephone
WIDEST = 7.2  # advance of bold text, and of the larger text of a telephone: for names that must not be cut
CHAR = 6.1  # mean advance of an 11 px system font, used to keep labels apart
BETTER, WORSE, SAME = 0, 1, 7  # colours
_TINY = 1e-18  # what is nearer to zero is drawn as zero


# ---------------------------------------------------------------- axes


@dataclass(frozen=True, slots=True)
class PlotAxis:
    """One axis: the range shown, ticks as (value, text), its label; `log` places values by logarithm."""

    lo: float
    hi: float
    ticks: tuple[tuple[float, str], ...]
    label: str
    log: bool = False

    @property
    def broken(self) -> bool:
        """Return whether a linear axis leaves out 0, so that differences look larger than they are."""
        return not self.log and (self.lo > 0 or self.hi < 0)

    def at(self, value: float) -> float:
        """Return the position of `value` along the axis, 0 at `lo` and 1 at `hi`."""
        if self.log:
            return math.log(value / self.lo) / math.log(self.hi / self.lo)
        return (value - self.lo) / (self.hi - self.lo)


def usable(value: object) -> bool:
    """Return whether a value is a finite number of a size that can be drawn."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e18


def nice_step(span: float, count: int) -> float:
    """Return the smallest 1, 2 or 5 times a power of ten that cuts `span` into at most `count` parts."""
    raw = span / max(count, 1)
    power = 10.0 ** math.floor(math.log10(raw))
    return next(m * power for m in (1.0, 2.0, 5.0, 10.0) if raw <= m * power * (1 + 1e-9))


def _range(values: Iterable[float], zero: bool) -> tuple[float, float]:
    finite = [v if abs(v) > _TINY else 0.0 for v in values if usable(v)] or [0.0, 1.0]
    lo, hi = min(finite), max(finite)
    if zero:
        lo, hi = min(lo, 0.0), max(hi, 0.0)
    if hi - lo <= 1e-9 * max(abs(lo), abs(hi)):
        room = 0.05 * abs(hi) or 1.0
        lo, hi = (lo, hi + room) if zero else (lo - room, hi + room)
    return lo, hi


def numbers(values: Iterable[float], label: str) -> PlotAxis:
    """Make a linear axis of plain numbers, widened to whole steps."""
    lo, hi = _range(values, zero=False)
    step = nice_step(hi - lo, 5)
    digits = max(0, -math.floor(math.log10(step) + 1e-9))
    return _linear(
        lo, hi, step, label, lambda v: f"{v:.{digits}f}" if abs(v) < 1e6 else f"{v:.3g}", snap=True
    )


def counts(values: Iterable[float], label: str) -> PlotAxis:
    """Make a linear axis of counts from zero: no ticks between whole numbers."""
    lo, hi = _range(values, zero=True)
    return _linear(lo, hi, max(1.0, nice_step(hi - lo, 5)), label, lambda v: f"{v:,.0f}", snap=True)


def integers(values: Iterable[float], label: str) -> PlotAxis:
    """Make a linear axis of whole numbers (rounds)."""
    lo, hi = _range(values, zero=False)
    step = max(1.0, nice_step(hi - lo, 10))
    return _linear(lo, hi, step, label, lambda v: f"{v:.0f}", snap=False)


def _linear(
    lo: float, hi: float, step: float, label: str, text: Callable[[float], str], *, snap: bool
) -> PlotAxis:
    if snap:
        lo = math.floor(lo / step + 1e-9) * step
        hi = max(math.ceil(hi / step - 1e-9) * step, lo + step)
    places = range(math.ceil(lo / step - 1e-9), math.floor(hi / step + 1e-9) + 1)
    return PlotAxis(lo, hi, tuple((k * step, text(k * step)) for k in places), label)


def sparse(values: Sequence[float]) -> bool:
    """Return whether a logarithmic axis reads better: positive values over more than a decade and a half."""
    return min(values) > _TINY and max(values) / min(values) > 30


# ---------------------------------------------------------------- marks


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


def rect_at(x: float, y: float, w: float, h: float, kind: str) -> str:
    """Draw a rectangle from its upper left corner, in pixels."""
    return f'<rect class="{kind}" x="{fixed(x)}" y="{y:.2f}" width="{w:.2f}" height="{max(h, 0):.2f}"/>'


def tipped(tip: str, inner: str) -> str:
    """Return marks with a text that shows when one points at them."""
    return f"<g><title>{escape(tip)}</title>{inner}</g>"


def shortened(text: str, room: int) -> str:
    """Return a text that fits in so many characters."""
    return text if len(text) <= room else text[: room - 1] + "…"


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


def frame(title: str, desc: str, width: float, height: float, body: str, ident: str) -> str:
    """Return the svg element with its accessible title and description around `body`."""
    return (
        f'<svg viewBox="0 0 {fixed(width)} {fixed(height)}" role="img" aria-labelledby="{ident}-t {ident}-d">'
        f'<title id="{ident}-t">{escape(title)}</title><desc id="{ident}-d">{escape(desc)}</desc>{body}</svg>'
    )


# ---------------------------------------------------------------- two axes


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
    right: float = 18.0
    marks: list[str] = field(default_factory=list)
    ends: list[tuple[float, float, str, str]] = field(default_factory=list)

    @property
    def left(self) -> float:
        """Return where the plot area begins: after the widest tick label."""
        return 14.0 + CHAR * max((len(text) for _, text in self.y.ticks), default=1)

    def px(self, value: float) -> float:
        """Return the horizontal position of a data value."""
        return self.left + self.x.at(value) * (WIDTH - self.left - self.right)

    def py(self, value: float) -> float:
        """Return the vertical position of a data value, of 280 px; 26 above are for the axis name, 40 below for ticks."""
        return 26.0 + (1.0 - self.y.at(value)) * 214.0

    def line(self, points: Sequence[tuple[float, float]], colour: int = 0, tips: Sequence[str] = ()) -> None:
        """Draw a line through points, broken where a value cannot be drawn; up to 80 points with tips get markers."""
        kind, path, pen = _kind(colour), "", "M"
        for x, y in points:
            if not (usable(x) and usable(y)):
                pen = "M"
                continue
            path += f"{pen}{fixed(self.px(x))} {fixed(self.py(y))}"
            pen = "L"
        self.marks.append(f'<path class="line {kind}" d="{path}"/>')
        for (x, y), tip in zip(points, tips if len(points) <= 80 else (), strict=False):
            if usable(x) and usable(y):
                hit = f'<circle class="hit" cx="{fixed(self.px(x))}" cy="{fixed(self.py(y))}" r="10"/>'
                self.marks.append(tipped(tip, hit + _marker(colour, self.px(x), self.py(y), kind)))

    def band(self, points: Sequence[tuple[float, float, float]], colour: int = 0) -> None:
        """Draw the area between two curves: points are (x, low, high)."""
        drawn = [p for p in points if all(usable(v) for v in p)]
        there = [f"{fixed(self.px(x))} {fixed(self.py(high))}" for x, _, high in drawn]
        back = [f"{fixed(self.px(x))} {fixed(self.py(low))}" for x, low, _ in reversed(drawn)]
        if drawn:
            self.marks.append(f'<path class="band {_kind(colour)}" d="M{"L".join(there + back)}z"/>')

    def reference(self, value: float, text: str) -> None:
        """Draw a dashed level with its text above its right end."""
        y, right = self.py(value), WIDTH - self.right
        level = f'<path class="ref" d="M{fixed(self.left)} {fixed(y)}H{fixed(right)}"/>'
        self.marks.append(level + text_at(right, y - 5, text, anchor="end"))

    def end(self, point: tuple[float, float], text: str, colour: int) -> None:
        """Name the line that ends in `point`, right of the plot; a faint leader joins the two."""
        if usable(point[0]) and usable(point[1]):
            self.ends.append((self.py(point[1]), self.px(point[0]), text, _kind(colour)))

    def _end_labels(self) -> str:
        """Return the line names, pushed apart where they would overlap."""
        ordered = sorted(self.ends)
        ys = spread([end[0] for end in ordered], 14.0, 20.0, 240.0)
        x, out = WIDTH - self.right + 8, ""
        for y, (from_y, from_x, text, kind) in zip(ys, ordered, strict=True):
            if x - from_x > 20:
                leader = f"M{fixed(from_x + 6)} {fixed(from_y)}L{fixed(x - 3)} {fixed(y)}"
                out += f'<path class="leader {kind}" d="{leader}"/>'
            out += text_at(x, y + 4, text, f"own {kind}")
        return out

    def svg(self) -> str:
        """Return the finished drawing."""
        x1, y1 = WIDTH - self.right, self.py(self.y.lo)
        out = [text_at(2, 12, self.y.label, "strong")]
        for value, text in self.y.ticks:
            y = self.py(value)
            out.append(f'<path class="grid" d="M{fixed(self.left)} {fixed(y)}H{fixed(x1)}"/>')
            out.append(text_at(self.left - 8, y + 4, text, anchor="end"))
        taken = -math.inf
        for value, text in self.x.ticks:
            x, half = self.px(value), CHAR * len(text) / 2
            out.append(f'<path class="axis" d="M{fixed(x)} {fixed(y1)}v4"/>')
            if x - half > taken + 8 and x + half <= WIDTH + 2:
                out.append(text_at(x, y1 + 17, text, anchor="middle"))
                taken = x + half
        out.append(f'<path class="axis" d="M{fixed(self.left)} {fixed(y1)}H{fixed(x1)}"/>')
        desc = self.desc
        if self.y.broken:  # a stub with a zigzag
            zigzag = f"M{fixed(self.left)} {fixed(y1)}v-5l-4-2.5 8-4-4-2.5v-6"
            out.append(tipped("this axis does not begin at 0", f'<path class="break" d="{zigzag}"/>'))
            desc += " The vertical axis does not begin at 0."
        out.append(text_at((self.left + x1) / 2, y1 + 34, self.x.label, "strong", "middle"))
        body = "".join(out) + "".join(self.marks) + self._end_labels()
        return frame(self.title, desc, WIDTH, 280.0, body, self.ident)


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


# ---------------------------------------------------------------- a row a name


def stacked_rows(
    ident: str,
    title: str,
    desc: str,
    names: Sequence[str],
    series: Sequence[tuple[str, Sequence[float]]],
    tips: Sequence[str],
    *,
    label: str,
) -> str:
    """Draw a horizontal bar per name, each the stack of its series; `label` names the axis, the legend is below."""
    chart = _ChartRows(
        names, counts([sum(values[i] for _, values in series) for i in range(len(names))], label)
    )
    for i, tip in enumerate(tips):
        base, cells = 0.0, ""
        for colour, (_, values) in enumerate(series):
            if values[i]:
                x, end = chart.px(base), chart.px(base + values[i])
                top = chart.y(i) - chart.thick / 2
                cells += rect_at(x, top, end - x, chart.thick, f"stack {_kind(colour)}")
            base += values[i]
        chart.marks.append(tipped(tip, cells + chart.hit(i)))
    entries = [(name, i % COLOURS) for i, (name, _) in enumerate(series)] if len(series) > 1 else []
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

    `changes` says of each whether it is better, worse, or neither (None).  The value after is a triangle where it is worse,
    so that colour alone does not say it.
    """
    chart = _ChartRows(names, numbers([v for pair in pairs for v in pair], label))
    for i, ((before, after), better, tip) in enumerate(zip(pairs, changes, tips, strict=True)):
        colour = SAME if better is None else BETTER if better else WORSE
        y, x0, x1 = fixed(chart.y(i)), fixed(chart.px(before)), fixed(chart.px(after))
        link = f'<path class="link c{colour}" d="M{x0} {y}H{x1}"/>'
        hollow = f'<circle class="hollow" cx="{x0}" cy="{y}" r="3.4"/>'
        filled = f'<circle class="mark c{colour}" cx="{x1}" cy="{y}" r="3.8"/>'
        if colour == WORSE:
            filled = f'<path class="mark c{colour}" d="M{x1} {y}m0-4.8l4.6 8h-9.2z"/>'
        chart.marks.append(tipped(tip, link + hollow + filled + chart.hit(i)))
    kinds = ((BETTER, True, "better"), (WORSE, False, "worse"), (SAME, None, "the same"))
    entries = [(word, colour) for colour, better, word in kinds if better in changes]
    return chart.svg(ident, title, desc, entries)


class _ChartRows:
    """A chart of rows under construction: `marks` are added in pixels."""

    def __init__(self, names: Sequence[str], x: PlotAxis) -> None:
        self.names, self.x = [shortened(name, 22) for name in names], x
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
        desc += " The axis does not begin at 0." if self.x.broken else ""
        key, height = legend(entries, 4.0, bottom + 42)
        body = "".join(out) + "".join(self.marks) + key
        return frame(title, desc, WIDTH, bottom + 40 + height, body, ident)


def legend(entries: Sequence[tuple[str, int]], left: float, top: float) -> tuple[str, float]:
    """Draw a legend of (name, colour) in as many lines as it needs; return it with its height in pixels (0: nothing)."""
    out, x, y = [], left, top
    for name, colour in entries:
        shown = shortened(name, 28)
        room = 15 + CHAR * len(shown) + 18
        if x > left and x + 15 + WIDEST * len(shown) > WIDTH:
            x, y = left, y + 17
        mark = rect_at(x, y, 10, 10, f"bar c{colour}") + text_at(x + 15, y + 9, shown)
        out.append(tipped(name, mark))
        x += room
    return "".join(out), (y + 16 - top if entries else 0.0)
