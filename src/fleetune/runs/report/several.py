# SPDX-License-Identifier: Apache-2.0
"""Compare several runs on one page: losses, results, costs and the differences of their recipes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from fleetune.common import paired
from fleetune.common.display import change, human_bytes, human_time, improved, show
from fleetune.common.paired import RowLosses
from fleetune.runs.report import axes, page, runlog, svg
from fleetune.runs.report.page import TableCell, esc, flat, true_minus
from fleetune.runs.report.runlog import Number, RunLog, Step, kind_of, list_of, map_of, number, read
from fleetune.runs.report.sections.configuration import PATHS, options
from fleetune.runs.report.unlike import APART, caveats
from fleetune.runs.report.words import differences


def compare(runs: Sequence[Path]) -> str:
    """Return one page with several runs overlaid: loss by rounds, by bytes and by time, results, differences.

    UsageError when one of the folders does not exist.
    """
    seen = [read(path) for path in runs]
    names = _short([run.name for run in seen])
    facts = [runlog.summarise(run) for run in seen]
    body = [
        f'<header><p class="over">fleetune · comparison</p><h1>{len(seen)} runs side by side</h1>'
        f'<p class="lead">{esc(_closest(seen, names, facts, alike=not caveats(seen)))}</p>{_warnings(seen)}</header>',
        page.section("result", "Results", _results(seen, names, facts)),
        page.section("course", "Training", _overlaid(seen, names)),
        page.section("differences", "What differs in their configuration", _differences(seen, names)),
    ]
    return page.document("fleetune: comparison of " + ", ".join(names), "\n".join(body))


def _short(names: Sequence[str]) -> list[str]:
    """Shorten run names to fit beside a line: number and method, if that tells them apart."""
    short = ["-".join(name.split("-")[:2])[:22] for name in names]
    return short if len(set(short)) == len(short) else list(names)


def _closest(
    runs: Sequence[RunLog], names: Sequence[str], facts: Sequence[Mapping[str, object]], *, alike: bool
) -> str:
    """Name the run with the lowest loss, where losses are `alike`, and that with the fewest bytes."""
    known = [(v, n) for n, f in zip(names, facts, strict=True) if (v := number(f["tuned_loss"])) is not None]
    sizes = [(v, n) for n, f in zip(names, facts, strict=True) if (v := number(f["bytes"])) is not None]
    best = f"Lowest validation loss: {min(known)[1]} ({min(known)[0]:.3f}). " if known and alike else ""
    if best and (near := _near(dict(zip(names, runs, strict=True)), min(known)[1])):
        best += f"Within noise of it, row by row: {', '.join(near)}. "
    return best + (f"Fewest bytes: {min(sizes)[1]} ({human_bytes(min(sizes)[0])})." if sizes else "")


def _near(runs: Mapping[str, RunLog], best: str) -> list[str]:
    """List the runs whose loss is not above that of the best by more than noise, where the losses of their rows are known."""
    lowest = losses_of(runs[best])
    if lowest is None:
        return []
    found = {name: paired.difference(lowest, own) for name, run in runs.items() if (own := losses_of(run))}
    return [name for name, diff in found.items() if name != best and diff is not None and diff.noise]


def losses_of(run: RunLog) -> RowLosses | None:
    """Return the losses of the rows under a run's result, as its eval.json has them; None where it has none."""
    stated = map_of(run.final, "losses")
    sums, counts = list_of(stated, "tuned"), list_of(stated, "tokens")
    if not sums or len(sums) != len(counts):
        return None
    values = [number(value) for value in [*sums, *counts]]
    if any(value is None for value in values):
        return None
    return RowLosses([float(v or 0) for v in values[: len(sums)]], [int(v or 0) for v in values[len(sums) :]])


def _warnings(runs: Sequence[RunLog]) -> str:
    told = [f"These runs {caveat}: {APART}." for caveat in caveats(runs)]
    told += [runlog.changed(run.name) for run in runs if not run.intact]
    return "".join(f'<p class="alert">{esc(text)}</p>' for text in told)


def _results(runs: Sequence[RunLog], names: Sequence[str], facts: Sequence[Mapping[str, object]]) -> str:
    head = ["run", "method", "model", "status", "rounds", "base", "tuned", "change"]
    head += ["sent", "received", "time", "peak memory"]
    rows: list[list[str | TableCell]] = []
    for name, f in zip(names, facts, strict=True):
        base, tuned = number(f["base_loss"]), number(f["tuned_loss"])
        error = number(f["change_error"])
        kind, _ = page.verdict(improved("loss", base, tuned, error))
        row: list[str | TableCell] = [
            name,
            str(f["method"] or "-"),
            page.short_name(str(f["model"] or "-")),
            kind_of(str(f["status"])),
        ]
        row += [TableCell(str(f["rounds"])), TableCell(show("loss", base)), TableCell(show("loss", tuned))]
        row.append(TableCell(true_minus(change("loss", base, tuned, error)) or "-", kind))
        row += [TableCell(human_bytes(number(f[key]))) for key in ("bytes_up", "bytes_down")]
        row += [TableCell(human_time(number(f["seconds"]))), TableCell(human_bytes(number(f["peak_rss"])))]
        rows.append(row)
    keys = "".join(
        f'<li class="c{i % svg.COLOURS}"><span></span>{esc(run.name)}</li>' for i, run in enumerate(runs)
    )
    return page.table("Validation loss and costs", head, rows, "names") + f'<ul class="key">{keys}</ul>'


def _overlaid(runs: Sequence[RunLog], names: Sequence[str]) -> str:
    every = [[s for s in runlog.steps(run) if "loss" in s.losses] for run in runs]
    losses = [s.losses["loss"] for steps in every for s in steps]
    if not losses:
        return "<p>No run has been measured yet.</p>"
    y = axes.numbers(losses, "validation loss")
    moved = [[float(s.total or 0) for s in steps] for steps in every]
    spent = [_elapsed(runlog.steps(run)) for run in runs]
    clocks = [[clock[s.round] for s in steps] for clock, steps in zip(spent, every, strict=True)]
    bytes_axis, at = axes.bytes_axis(moved)
    views = [
        (
            "round",
            axes.integers([s.round for t in every for s in t], "round"),
            [[float(s.round) for s in t] for t in every],
        ),
        ("bytes exchanged", bytes_axis, [[at(v) for v in values] for values in moved]),
        ("time", axes.durations([v for c in clocks for v in c], "time in rounds"), clocks),
    ]
    remarks = ["Round 0 is the model before tuning.", "Cumulative, both ways, all clients."]
    remarks.append("The rounds alone, without the evaluations between them.")
    if bytes_axis.log:
        remarks[1] += " Round 0, before any byte, has no place on a logarithmic axis."
    right = 16 + svg.WIDEST * max(map(len, names))
    figures = ""
    for i, (what, x, xs) in enumerate(views):
        title = f"Validation loss by {what}"
        plot = svg.Plot(f"overlay-{i}", title, f"{len(runs)} runs.", x, y, right=right)
        for k, (name, steps) in enumerate(zip(names, every, strict=True)):
            points = [(at_x, s.losses["loss"]) for at_x, s in zip(xs[k], steps, strict=True)]
            tips = [f"{name}, round {s.round}: {s.losses['loss']:.3f}, {human_bytes(s.total)}" for s in steps]
            plot.line(points, k, tips, dash=k >= svg.COLOURS)
            if points:
                plot.end(points[-1], name, k)
        figures += page.figure(plot.svg(), title, remarks[i])
    figures += _peaks(names, [number(runlog.summarise(run)["peak_rss"]) for run in runs])
    data = _loss_table(names, every)
    return f'<div class="figures">{figures}</div><details><summary>the numbers</summary>{data}</details>'


def _loss_table(names: Sequence[str], every: Sequence[Sequence[runlog.Step]]) -> str:
    rounds = sorted({s.round for steps in every for s in steps})
    by = [{s.round: s.losses["loss"] for s in steps} for steps in every]
    rows: list[list[str | TableCell]] = [
        [str(r), *(TableCell(show("loss", b.get(r))) for b in by)] for r in rounds
    ]
    return page.table("Validation loss by round", ["round", *names], rows)


def _peaks(names: Sequence[str], peaks: Sequence[Number | None]) -> str:
    known = [(name, v, i) for i, (name, v) in enumerate(zip(names, peaks, strict=True)) if v is not None]
    if not known:
        return ""
    ticks = tuple((float(k), name) for k, (name, _, _) in enumerate(known))
    x = axes.PlotAxis(-0.6, len(known) - 0.4, ticks, "run")
    y = axes.sizes([v for _, v, _ in known], "peak memory")
    plot = svg.Plot("peaks", "Peak memory of each run", f"{len(known)} runs.", x, y)
    for k, (name, value, colour) in enumerate(known):
        plot.bar(k, value, colour, f"{name}: {human_bytes(value)}")
    return page.figure(plot.svg(), "Peak memory", "Resident memory of the process that ran the fleet.")


def _elapsed(steps: Sequence[Step]) -> dict[int, float]:
    """Return the seconds from the start to the end of each round."""
    total, out = 0.0, {}
    for step in steps:
        total += step.seconds or 0.0
        out[step.round] = total
    return out


def _configs(runs: Sequence[RunLog]) -> list[dict[str, str]]:
    """Return the options of each run; of paths the last part, where that tells them apart as well."""
    whole, short = [dict(flat(run.config)) for run in runs], [dict(options(run)) for run in runs]
    for key in PATHS:
        if len({c.get(key) for c in whole}) != len({c.get(key) for c in short}):
            for config, full in zip(short, whole, strict=True):
                config[key] = full.get(key, "-")
    return short


def _differences(runs: Sequence[RunLog], names: Sequence[str]) -> str:
    unlike, same = differences(_configs(runs))
    rows: list[list[str | TableCell]] = [[key, *values] for key, values in unlike]
    if not rows:
        return f"<p>Nothing: all {same} options are equal.</p>"
    return (
        page.table("Options that are not equal", ["option", *names], rows)
        + f"<p>{same} other options are equal.</p>"
    )
