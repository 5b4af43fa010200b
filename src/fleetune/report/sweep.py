"""Summarise a sweep: a table of means over the seeds, a CSV with a row a run, a page with a plot for every axis.

A seed draws its own held-out rows, clients and directions, so all runs of one seed share a level.  So the mean at a value is
computed seed by seed (over the other axes), then over the seeds; the spread is that of the change by tuning.
"""

import io
import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from csv import DictWriter
from dataclasses import dataclass
from typing import Any, NamedTuple

from fleetune.common.display import human_bytes, human_time, metric
from fleetune.common.settings import Value
from fleetune.report import page, runlog, svg
from fleetune.report.page import TableCell, esc


@dataclass(frozen=True)
class SweepAxis:
    """A varied setting: the name the user gave it, the key it stands for, and its values."""

    name: str
    key: str  # alpha, an option of the recipe, or set.NAME
    values: tuple[Value, ...]


class GridRun(NamedTuple):
    """A run of a sweep, at the values of the axes in their order."""

    values: tuple[Value, ...]
    seed: int
    run: runlog.RunLog

    @property
    def finished(self) -> bool:
        """Whether it is done."""
        return runlog.kind_of(self.run.status) == "done"


class Stat(NamedTuple):
    """Mean, standard deviation (None of a single number), how many numbers."""

    mean: float
    spread: float | None
    number: int

    def text(self, digits: int) -> str:
        """Format as 3.912 ± 0.020."""
        more = "" if self.spread is None else f" ± {self.spread:.{digits}f}"
        return f"{self.mean:.{digits}f}{more}"


def stat(values: Sequence[runlog.Number]) -> Stat:
    """Return mean and sample standard deviation of one number or more."""
    spread = statistics.stdev(values) if len(values) > 1 else None
    return Stat(statistics.fmean(values), spread, len(values))


def metrics(members: Sequence[GridRun]) -> list[str]:
    """Return the measures that every finished run begins and ends with; the loss first."""
    names = [n for m in members if m.finished for n in map(set, runlog.measures(m.run))]
    return sorted(set.intersection(*names), key=lambda n: (n != "loss", n)) if names else []


# The table ------------------------------------------------------------------------------------------


# values, runs, lr (of its runs), base, tuned (by measure mean, spread, number), bytes and seconds (means of a run)
Cell = Mapping[str, Any]


def combinations(axes: Sequence[SweepAxis], members: Sequence[GridRun]) -> Sequence[Cell]:
    """Return every combination of values that has a finished run, in the order of the grid."""
    names = metrics(members)
    cells = []
    for values in itertools.product(*(a.values for a in axes)):
        here = [m.run for m in members if m.values == values and m.finished]
        if not here:
            continue
        cell: dict[str, Any] = {
            "values": {a.name: v for a, v in zip(axes, values, strict=True)},
            "runs": len(here),
        }
        if "set.lr" not in {a.key for a in axes}:
            cell["lr"] = sorted({rate for run in here if (rate := rate_of(run)) is not None})
        measured, facts = [runlog.measures(run) for run in here], [runlog.summarise(run) for run in here]
        for side, name in enumerate(("base", "tuned")):
            cell[name] = {n: stat([pair[side][n] for pair in measured])._asdict() for n in names}
        for cost in ("bytes", "seconds"):
            known = [v for f in facts if (v := runlog.number(f[cost])) is not None]
            cell[cost] = statistics.fmean(known) if known else None
        cells.append(cell)
    return cells


def rate_of(run: runlog.RunLog) -> runlog.Number | None:
    """Return the learning rate that a run worked with, given or found; None where it does not say."""
    return runlog.num_of(runlog.map_of(run.config, "set"), "lr")


def table(cells: Sequence[Cell]) -> tuple[list[str], list[list[str]]]:
    """Return the head and the rows: mean ± standard deviation over the seeds of every combination; ([], []) of none."""
    rows, rated = [], all(cell.get("lr") for cell in cells)
    for cell in cells:
        sides = [
            Stat(**cell[side][n]).text(metric(n).digits) for n in cell["base"] for side in ("base", "tuned")
        ]
        costs = [human_bytes(cell["bytes"]), human_time(cell["seconds"])]
        lr = [" to ".join(dict.fromkeys(f"{cell['lr'][i]:g}" for i in (0, -1)))] if rated else []
        what = [*map(runlog.value_text, cell["values"].values()), str(cell["runs"])]
        rows.append([*what, *lr, *sides, *costs])
    if not cells:
        return [], []
    measured = [part for n in cells[0]["base"] for part in (f"{metric(n).label}, base", "tuned")]
    return [*cells[0]["values"], "runs", *["lr"] * rated, *measured, "bytes", "time"], rows


def apart(members: Sequence[GridRun]) -> list[str]:
    """Say why losses of runs of one seed do not compare; [] where they do."""
    seeds = dict.fromkeys(m.seed for m in members)
    found = [runlog.caveats([m.run for m in members if m.seed == seed]) for seed in seeds]
    return [f"the runs {caveat}; {runlog.APART}" for caveat in dict.fromkeys(itertools.chain(*found))]


def csv(axes: Sequence[SweepAxis], members: Sequence[GridRun]) -> str:
    """Return a row a run: the values, the seed, the status, measures before and after, bytes and seconds."""
    rows = []
    for m in members:
        base, tuned = runlog.measures(m.run)
        facts = runlog.summarise(m.run)
        rows.append(
            {
                "run": m.run.name,
                **{a.name: v for a, v in zip(axes, m.values, strict=True)},
                "seed": m.seed,
                **({} if "lr" in {a.name for a in axes} else {"lr": rate_of(m.run)}),
                "status": m.run.status,
                **{f"base_{n}": v for n, v in base.items()},
                **{f"tuned_{n}": v for n, v in tuned.items()},
                **{key: facts[key] for key in ("bytes_up", "bytes_down", "seconds")},
            }
        )
    listed = io.StringIO()
    writer = DictWriter(
        listed, list(dict.fromkeys(name for row in rows for name in row)), lineterminator="\n"
    )
    writer.writeheader()
    writer.writerows({name: _safe(value) for name, value in row.items()} for row in rows)
    return listed.getvalue() if rows else ""


def _safe(value: object) -> object:
    """Keep a text from being read as a formula by a spreadsheet."""
    return f"'{value}" if isinstance(value, str) and value[:1] in ("=", "+", "-", "@", "\t", "\r") else value


# The page -------------------------------------------------------------------------------------------


def html(
    name: str,
    head: tuple[str, Sequence[tuple[str, str]]],
    axes: Sequence[SweepAxis],
    members: Sequence[GridRun],
    planned: int,
) -> str:
    """Return the page of a sweep of which `members` have begun and `planned` runs are to be; `head` is a title and facts."""
    ready = sum(m.finished for m in members)
    alerts = [f"{text}." for text in apart(members)]
    if ready < planned:
        alerts.append(
            f"{ready} of {planned} runs are finished. Plots are of the seeds that are whole, if there are any."
        )
    told = "".join(f'<p class="alert">{esc(text)}</p>' for text in alerts)
    title, facts = head
    over = f'<p class="over">{esc(title)}</p><h1>{esc(name)}</h1>{told}{page.fact_list(facts)}'
    figures = "".join(
        _figure(number, axes, measure, complete_seeds(axes, members))
        for number in range(len(axes))
        for measure in metrics(members)
    )
    columns, rows = table(combinations(axes, members))
    cells: list[list[str | TableCell]] = [[*r[: len(axes)], *map(TableCell, r[len(axes) :])] for r in rows]
    caption = "Mean and standard deviation over the seeds; bytes and time are of one run"
    parts = [
        page.section(
            "axes", "What each value does", f'<div class="figures">{figures}</div>' if figures else ""
        ),
        page.section("cells", "Every combination", page.table(caption, columns, cells) if cells else ""),
    ]
    return page.document(f"{name} - fleetune", f"<header>{over}</header>" + "\n".join(parts))


def complete_seeds(axes: Sequence[SweepAxis], members: Sequence[GridRun]) -> list[GridRun]:
    """Return the finished runs of seeds that have every combination (so that means compare), else all finished ones."""
    ready = [m for m in members if m.finished]
    size = math.prod(len(a.values) for a in axes)
    whole = [m for m in ready if sum(other.seed == m.seed for other in ready) == size]
    return whole or ready


def final(number: int, value: Value, measure: str, members: Sequence[GridRun]) -> Stat | None:
    """Return a final measure at `value` of axis `number`: its mean, and the spread over the seeds of its change by tuning."""
    by_seed: dict[int, list[tuple[runlog.Number, runlog.Number]]] = {}
    for m in members:
        if m.values[number] == value:
            base, tuned = runlog.measures(m.run)
            by_seed.setdefault(m.seed, []).append((tuned[measure], tuned[measure] - base[measure]))
    if not by_seed:
        return None
    ends, changes = zip(
        *(map(statistics.fmean, zip(*pairs, strict=True)) for pairs in by_seed.values()), strict=True
    )
    return Stat(statistics.fmean(ends), stat(changes).spread, len(ends))


def _figure(number: int, axes: Sequence[SweepAxis], measure: str, members: Sequence[GridRun]) -> str:
    """Draw a measure by the values of an axis: the mean and, of two axes, a line for each value of the other one."""
    axis, label, digits = axes[number], metric(measure).label, metric(measure).digits
    groups = {"mean" if len(axes) == 2 else "": members}
    if len(axes) == 2:
        other = axes[1 - number]
        groups |= {
            f"{other.name} {runlog.value_text(v)}": [m for m in members if m.values[1 - number] == v]
            for v in other.values
        }
    found = [
        {v: s for v in axis.values if (s := final(number, v, measure, group))} for group in groups.values()
    ]
    mean, *_ = found
    edges = [(s.mean - (s.spread or 0.0), s.mean + (s.spread or 0.0)) for s in mean.values()]
    x, places = _values_axis(axis)
    y = svg.numbers(
        [s.mean for line in found for s in line.values()] + [e for pair in edges for e in pair], label
    )
    title = f"{label[:1].upper()}{label[1:]} at the end, by {axis.name}"
    right = 20 + svg.WIDEST * max(map(len, groups))
    plot = svg.Plot(f"axis-{number}-{measure}", title, f"Lines: {', '.join(groups)}.", x, y, right=right)
    if any(s.spread for s in mean.values()):
        plot.band([(places[v], *pair) for v, pair in zip(mean, edges, strict=True)], -1)
    # the mean on top
    for colour, (name, line) in reversed(list(enumerate(zip(groups, found, strict=True), -1))):
        points = [(places[v], s.mean) for v, s in line.items()]
        tips = [f"{name or axis.name} at {runlog.value_text(v)}: {s.text(digits)}" for v, s in line.items()]
        plot.line(points, colour, tips)
        if name and points:
            plot.end(points[-1], name, colour)
    rows: list[list[str | TableCell]] = [
        [runlog.value_text(v), *(TableCell(line[v].text(digits) if v in line else "-") for line in found)]
        for v in axis.values
    ]
    caption = f"{label}: mean over the seeds, standard deviation of the change"
    data = page.table(caption, [axis.name, *(name or "mean" for name in groups)], rows)
    words = "Mean over the seeds and the other values; band: standard deviation over the seeds of the change by tuning."
    return page.figure(plot.svg(), title, words, data=data)


def _values_axis(axis: SweepAxis) -> tuple[svg.PlotAxis, dict[Value, float]]:
    """Return an axis with a tick at every value, and each value's position: by size (or its logarithm) for numbers."""
    at = {v: float(i) for i, v in enumerate(axis.values)}
    log = False
    if all(isinstance(v, int | float) and not isinstance(v, bool) for v in axis.values):
        at = {v: float(v) for v in axis.values}
        log = svg.sparse(list(at.values())) and min(at.values()) > 0
    lo, hi = min(at.values()), max(at.values())
    room = 0.05 * (hi - lo) or 0.5
    lo, hi = (lo / 1.2, hi * 1.2) if log else (lo - room, hi + room)
    ticks = tuple((at[v], runlog.value_text(v)) for v in sorted(axis.values, key=lambda v: at[v]))
    return svg.PlotAxis(lo, hi, ticks, axis.name + (" (log)" if log else ""), log), at
