# SPDX-License-Identifier: Apache-2.0
"""Write a sweep as one page: for every axis the loss by round and by bytes, and each final measure by value.

Means and spreads are those of `cells`; the drawings are also given as files of their own, for papers.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from fleetune.common.display import human_bytes, human_time, metric, show
from fleetune.common.settings import Value
from fleetune.runs.report import axes as scales
from fleetune.runs.report import cells as numbers
from fleetune.runs.report import page, runlog, svg
from fleetune.runs.report.cells import Combination, CurvePoint, Effect, GridRun, Stat, SweepAxis
from fleetune.runs.report.page import esc, flat
from fleetune.runs.report.runlog import RunLog
from fleetune.runs.report.sections.configuration import options
from fleetune.runs.report.unlike import APART, caveats

SPREAD = "Mean over the seeds and the other values; band: standard deviation over the seeds of the change by tuning."


def grid(
    name: str, axes: Sequence[SweepAxis], members: Sequence[GridRun], planned: int
) -> tuple[str, dict[str, str]]:
    """Return (the page, file name -> SVG) of a sweep of which `members` have begun and `planned` runs are to be."""
    used, made = numbers.complete_seeds(axes, members), tables(axes, members)
    figures: dict[str, str] = {}
    parts = [page.section("effects", "What each varied value does", _effects(made))]
    for i, axis in enumerate(axes):
        drawn = _course(i, axis, used) | _finals(i, axes, used)
        figures |= {ident: d.drawing for ident, d in drawn.items()}
        body = "".join(page.figure(d.drawing, d.title, d.words, data=d.data) for d in drawn.values())
        parts.append(
            page.section(f"axis-{i}", axis.name, f'<div class="figures">{body}</div>' if body else "")
        )
    parts += [
        page.section("cells", "Every combination", _combinations(made, len(axes))),
        page.section("runs", "Every run", _runs(axes, members)),
        page.section("configuration", "What all runs share", _shared(members)),
    ]
    html = page.document(f"{name} - fleetune", _header(name, axes, members, planned) + "\n".join(parts))
    return html, {ident: svg.standalone(drawing) for ident, drawing in figures.items()}


def value_text(value: Value) -> str:
    """Format a value."""
    return dict(flat({"": value}))[""]


def slug(name: str) -> str:
    """Turn a name into a part of a file's name and of an id in the page."""
    return re.sub(r"[^A-Za-z0-9_]+", "-", name).strip("-")


def _header(name: str, axes: Sequence[SweepAxis], members: Sequence[GridRun], planned: int) -> str:
    ready = len(numbers.finished(members))
    seeds = len({m.seed for m in members})
    varied = "; ".join(f"{a.name} in {', '.join(map(value_text, a.values))}" for a in axes)
    lead = f"{page.counted(planned, 'run')}, {page.counted(seeds, 'seed')}{' so far' if ready < planned else ''}. {varied}"
    over = f'<p class="over">fleetune · sweep</p><h1>{esc(name)}</h1><p class="lead">{esc(lead)}</p>'
    if ready < planned:
        text = f"{ready} of {planned} runs are finished. Means are over the seeds that are whole, if there are any."
        over += f'<p class="alert">{esc(text)}</p>'
    return f"<header>{over}</header>"


# Along an axis ------------------------------------------------------------------------------------


class Figure(NamedTuple):
    """A figure: the drawing, its title, a remark, and its numbers as a table."""

    drawing: str
    title: str
    words: str
    data: str = ""


def _course(number: int, axis: SweepAxis, members: Sequence[GridRun]) -> dict[str, Figure]:
    """Return file name -> the loss by round and by bytes, a line a value."""
    found = {v: c for v in axis.values if (c := numbers.loss_curve(number, v, members))}
    points = [p for curve in found.values() for p in curve]
    if not points:
        return {}
    y = scales.numbers([edge for p in points for edge in _edges(p.loss)], "validation loss")
    by_bytes, at = scales.bytes_axis([[p.bytes for p in curve] for curve in found.values()])
    by_round = scales.integers([p.round for p in points], "round")
    out = {}
    views = [("round", by_round), ("bytes", by_bytes)]
    for what, x in views[: 1 if _same_bytes(found.values()) else 2]:
        ident, title = f"loss-by-{what}-{slug(axis.name)}", f"Validation loss by {what}, for each {axis.name}"
        names = [f"{axis.name} {value_text(v)}" for v in found]
        plot = _plot(ident, title, x, y, names)
        places = [[float(p.round) if what == "round" else at(p.bytes) for p in c] for c in found.values()]
        tips = [
            [f"{name}, round {p.round}: {p.loss.text(3)}, {human_bytes(p.bytes)}" for p in curve]
            for name, curve in zip(names, found.values(), strict=True)
        ]
        stats = [[p.loss for p in curve] for curve in found.values()]
        _lines(
            plot,
            [MeanLine(*parts) for parts in zip(range(len(names)), names, places, stats, tips, strict=True)],
        )
        data = _course_table(axis, found) if what == "round" else ""
        out[ident] = Figure(plot.svg(), title, SPREAD, data)
    return out


def _same_bytes(curves: Iterable[Sequence[CurvePoint]]) -> bool:
    """Return whether a round moves the same bytes everywhere, so that by bytes is by round once more."""
    each = [p.bytes / p.round for curve in curves for p in curve if p.round]
    return not each or max(each) - min(each) <= 0.02 * max(each)


def _edges(value: Stat) -> tuple[float, float]:
    return value.mean - (value.spread or 0.0), value.mean + (value.spread or 0.0)


def _plot(ident: str, title: str, x: scales.PlotAxis, y: scales.PlotAxis, names: Sequence[str]) -> svg.Plot:
    right = 16 + svg.WIDEST * max((len(n) for n in names), default=0)
    return svg.Plot(ident, title, f"Lines: {', '.join(names) or 'one'}.", x, y, right=right)


class MeanLine(NamedTuple):
    """A mean with its spread; `colour` -1 is the text's, without a name there is no label."""

    colour: int
    name: str
    xs: Sequence[float]
    stats: Sequence[Stat]
    tips: Sequence[str]
    band: bool = True


def _lines(plot: svg.Plot, lines: Sequence[MeanLine]) -> None:
    """Draw the bands first, so that no line is under one."""
    for line in lines:
        if line.band and any(s.spread for s in line.stats):
            edges = [(x, *_edges(s)) for x, s in zip(line.xs, line.stats, strict=True)]
            plot.band(edges, line.colour)
    for line in lines:
        points = [(x, s.mean) for x, s in zip(line.xs, line.stats, strict=True)]
        plot.line(points, line.colour, line.tips, dash=line.colour >= svg.COLOURS)
        if line.name and points:
            plot.end(points[-1], line.name, line.colour)


def _course_table(axis: SweepAxis, found: Mapping[Value, Sequence[CurvePoint]]) -> str:
    by = [{p.round: p.loss for p in curve} for curve in found.values()]
    rounds = sorted({r for curve in by for r in curve})
    head = ["round", *(f"{axis.name} {value_text(v)}" for v in found)]
    rows: list[list[str | page.TableCell]] = [
        [str(r), *(page.TableCell(c[r].text(3) if r in c else "-") for c in by)] for r in rounds
    ]
    return page.table(
        "Validation loss by round: mean over the seeds, standard deviation of the change", head, rows
    )


def _finals(number: int, axes: Sequence[SweepAxis], members: Sequence[GridRun]) -> dict[str, Figure]:
    """Return file name -> each final measure by the values of an axis; a line for each value of one other axis."""
    axis = axes[number]
    out = {}
    for name in numbers.metrics(members):
        lines = {"mean" if len(axes) > 1 else "": _by_value(number, axis, name, members)}
        others = [i for i in range(len(axes)) if i != number]
        if len(others) == 1 and len(axes[others[0]].values) <= svg.COLOURS:
            other = axes[others[0]]
            for value in other.values:
                here = [m for m in members if m.values[others[0]] == value]
                lines[f"{other.name} {value_text(value)}"] = _by_value(number, axis, name, here)
        if drawn := _final(axis, name, lines):
            out[f"{slug(name)}-by-{slug(axis.name)}"] = drawn
    return out


def _by_value(number: int, axis: SweepAxis, name: str, members: Sequence[GridRun]) -> dict[Value, Stat]:
    every = {v: numbers.final_measure(number, v, name, members) for v in axis.values}
    return {v: s for v, s in every.items() if s is not None}


def _final(axis: SweepAxis, name: str, lines: Mapping[str, Mapping[Value, Stat]]) -> Figure | None:
    every = [s for line in lines.values() for s in line.values()]
    if not every:
        return None
    x, places = _values_axis(axis)
    banded = next(iter(lines.values())).values()  # of the mean: more bands than one would hide each other
    y = scales.numbers([s.mean for s in every] + [e for s in banded for e in _edges(s)], metric(name).label)
    title = f"{metric(name).label[:1].upper()}{metric(name).label[1:]} at the end, by {axis.name}"
    plot = _plot(f"{slug(name)}-by-{slug(axis.name)}", title, x, y, [n for n in lines if n])
    digits = metric(name).digits
    drawn = []
    for k, (label, line) in enumerate(lines.items()):
        tips = [f"{label or axis.name} at {value_text(v)}: {s.text(digits)}" for v, s in line.items()]
        drawn.append(
            MeanLine(k - 1, label, [places[v] for v in line], list(line.values()), tips, band=k == 0)
        )
    _lines(plot, drawn[::-1])  # the mean on top
    head = [axis.name, *(n or "mean" for n in lines)]
    rows: list[list[str | page.TableCell]] = [
        [
            value_text(v),
            *(page.TableCell(line[v].text(digits) if v in line else "-") for line in lines.values()),
        ]
        for v in axis.values
    ]
    data = page.table(
        f"{metric(name).label}: mean over the seeds, standard deviation of the change", head, rows
    )
    return Figure(plot.svg(), title, SPREAD, data)


def _values_axis(axis: SweepAxis) -> tuple[scales.PlotAxis, dict[Value, float]]:
    """Return an axis with a tick at every value, and each value's position: by size (or its logarithm) for numbers."""
    if all(isinstance(v, int | float) and not isinstance(v, bool) for v in axis.values):
        at = {v: float(v) for v in axis.values}
        log = scales.sparse(list(at.values())) and min(at.values()) > 0
    else:
        at, log = {v: float(i) for i, v in enumerate(axis.values)}, False
    lo, hi = min(at.values()), max(at.values())
    room = 0.05 * (hi - lo) or 0.5
    lo, hi = (lo / 1.2, hi * 1.2) if log else (lo - room, hi + room)
    ticks = tuple((at[v], value_text(v)) for v in sorted(axis.values, key=lambda v: at[v]))
    return scales.PlotAxis(lo, hi, ticks, axis.name + (" (log)" if log else ""), log), at


# Tables -------------------------------------------------------------------------------------------


class Tables(NamedTuple):
    """A sweep's results as text, for the console and the page, and as values (`record`)."""

    head: list[str]
    rows: list[list[str]]
    effects_head: list[str]
    effects: list[list[str]]
    record: dict[str, Any]
    caveats: list[str]  # of which axes the values are not measured alike


EFFECTS = ["varied", "measure", "lowest mean", "highest mean", "difference", "noise of a mean"]


def tables(axes: Sequence[SweepAxis], members: Sequence[GridRun]) -> Tables:
    """Return every combination (mean ± standard deviation over the seeds), and the effect of each varied setting."""
    names, found = numbers.metrics(members), numbers.combinations(axes, members)
    measured = [part for n in names for part in (f"{metric(n).label}, base", "tuned")]
    used = numbers.complete_seeds(axes, members)
    every = [
        (axis, name, e)
        for i, axis in enumerate(axes)
        for name in names
        if (e := numbers.effect(i, axis, name, used)) is not None
    ]
    apart = {axis.name: c for i, axis in enumerate(axes) if (c := _caveat(i, used))}
    record = {
        "cells": [_record(axes, cell) for cell in found],
        "effects": [
            {
                "varied": a.name,
                "measure": n,
                "low": e.low,
                "high": e.high,
                "difference": e.range,
                "noise": e.noise,
                "caveat": apart.get(a.name, ""),
            }
            for a, n, e in every
        ],
    }
    return Tables(
        [*(a.name for a in axes), "runs", *measured, "bytes", "time"],
        [_row(cell, names) for cell in found],
        EFFECTS,
        [_effect(axis, name, e) for axis, name, e in every],
        record,
        [f"{name}: the runs {caveat}; {APART}" for name, caveat in apart.items()],
    )


def _caveat(number: int, members: Sequence[GridRun]) -> str:
    """Say why the losses at the values of an axis do not compare, all else being equal; "" where they do."""
    alike: dict[tuple[object, ...], list[RunLog]] = {}
    for m in members:
        alike.setdefault((m.seed, *m.values[:number], *m.values[number + 1 :]), []).append(m.run)
    return next((found[0] for runs in alike.values() if (found := caveats(runs))), "")


def _record(axes: Sequence[SweepAxis], cell: Combination) -> dict[str, object]:
    values = {a.name: v for a, v in zip(axes, cell.values, strict=True)}
    sides = {"base": cell.base, "tuned": cell.tuned}
    stats = {side: {n: s._asdict() for n, s in found.items()} for side, found in sides.items()}
    costs = {"bytes": cell.bytes and cell.bytes.mean, "seconds": cell.seconds and cell.seconds.mean}
    return {"values": values, "runs": cell.runs, **stats, **costs}


def _row(cell: Combination, names: Sequence[str]) -> list[str]:
    out = [*map(value_text, cell.values), str(cell.runs)]
    for n in names:
        out += [side[n].text(metric(n).digits) if n in side else "-" for side in (cell.base, cell.tuned)]
    spent = [s.mean if s else None for s in (cell.bytes, cell.seconds)]
    return [*out, human_bytes(spent[0]), human_time(spent[1])]


def _effect(axis: SweepAxis, name: str, found: Effect) -> list[str]:
    digits = metric(name).digits
    ends = [f"{v:.{digits}f} at {value_text(value)}" for value, v in (found.low, found.high)]
    noise = "-" if found.noise is None else f"{found.noise:.{digits}f}"
    return [axis.name, metric(name).label, *ends, f"{found.range:.{digits}f}", noise]


def _effects(made: Tables) -> str:
    if not made.effects:
        return ""
    words = (
        "Noise: the standard error of a mean, from how the seeds differ in what the values do. "
        "A difference of a few times the noise or less says little."
    )
    rows: list[list[str | page.TableCell]] = [[*r[:2], *map(page.TableCell, r[2:])] for r in made.effects]
    caption = "At the end of tuning, over the seeds and the other values"
    told = "".join(f'<p class="alert">{esc(text)}.</p>' for text in made.caveats)
    return told + page.table(caption, made.effects_head, rows) + f"<p>{words}</p>"


def _combinations(made: Tables, axes: int) -> str:
    rows: list[list[str | page.TableCell]] = [[*r[:axes], *map(page.TableCell, r[axes:])] for r in made.rows]
    caption = "Mean and standard deviation over the seeds; bytes and time are of one run"
    return page.table(caption, made.head, rows) if rows else ""


def _runs(axes: Sequence[SweepAxis], members: Sequence[GridRun]) -> str:
    rows: list[list[str | page.TableCell]] = []
    for m in members:
        f = runlog.summarise(m.run)
        base, tuned = (show("loss", runlog.number(f[k])) for k in ("base_loss", "tuned_loss"))
        costs = human_bytes(runlog.number(f["bytes"])), human_time(runlog.number(f["seconds"]))
        cells = [page.TableCell(t) for t in (base, tuned, *costs)]
        rows.append([m.run.name, *map(value_text, m.values), str(m.seed), m.run.status, *cells])
    titles = ["run", *(a.name for a in axes), "seed", "status", "base", "tuned", "bytes", "time"]
    return page.table("The folders of the runs, with the validation loss", titles, rows) if rows else ""


def _shared(members: Sequence[GridRun]) -> str:
    configs = [options(m.run) for m in members]
    common = [pair for pair in (configs[0] if configs else []) if all(pair in c for c in configs)]
    return page.fact_list(common, "config")
