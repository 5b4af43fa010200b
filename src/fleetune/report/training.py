# SPDX-License-Identifier: Apache-2.0
"""Plot a run round by round: loss, spread over the clients, memory and bytes, with every number in a table."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence

from fleetune.common.display import human_bytes, human_time, metric, show
from fleetune.report import axes, page, svg
from fleetune.report.axes import PlotAxis
from fleetune.report.clients import client_name
from fleetune.report.page import TableCell
from fleetune.report.runlog import Event, Number, RunLog, Step, list_of, num_of, number, text_of

EQUAL = 0.02  # values that differ by less than this share are drawn as a sentence
MAX_DOTS = 4000  # above it the spread plot shows ranges in place of single clients


def course(run: RunLog, steps: Sequence[Step], facts: Mapping[str, object]) -> str:
    """Return plots of loss, spread, memory and bytes, and the table of all rounds."""
    measured = [s for s in steps if "loss" in s.losses]
    figures = ""
    if len(measured) > 1:
        points = [(float(s.round), s.losses["loss"]) for s in measured]
        tips = [
            f"round {s.round}: {show('loss', s.losses['loss'])}, {human_bytes(s.total)}" for s in measured
        ]
        first, last = measured[0].round, measured[-1].round
        desc = f"From {points[0][1]:.3f} in round {first} to {points[-1][1]:.3f} in round {last}."
        y = axes.numbers([p[1] for p in points], "validation loss")
        plot = svg.Plot(
            "loss-round", "Validation loss by round", desc, axes.integers([p[0] for p in points], "round"), y
        )
        moved = [float(s.total or 0) for s in measured]
        x, at = axes.bytes_axis([moved])
        by = svg.Plot("loss-bytes", "Validation loss by bytes exchanged", desc, x, y)
        for drawing, xs in ((plot, [p[0] for p in points]), (by, [at(v) for v in moved])):
            drawing.right = 50.0
            drawing.end((xs[-1], points[-1][1]), f"{points[-1][1]:.3f}", 0)
            if first == 0:
                drawing.reference(points[0][1], f"base {points[0][1]:.3f}")
            drawing.line(list(zip(xs, [p[1] for p in points], strict=True)), 0, tips)
        figures = page.figure(plot.svg(), "Validation loss by round", "Round 0 is the model before tuning.")
        words = "Cumulative, both ways, all clients."
        if not _constant([float(s.up or 0) + float(s.down or 0) for s in steps if s.up or s.down]):
            figures += page.figure(by.svg(), "Validation loss by bytes exchanged", words)
    costs, said = _costs(run, steps, facts)
    figures += _spread(run) + costs
    body = f'<div class="figures">{figures}</div>' if figures else ""
    words = f"<p>{page.esc(said)}</p>" if said else ""
    return body + words + (_every_round(steps) if run.rounds else "")


def _constant(values: Sequence[float], share: float = EQUAL) -> bool:
    """Return whether values are equal but for a small share, so that a plot of them says no more than a sentence."""
    return not values or max(values) - min(values) <= share * max(values)


def _spread(run: RunLog) -> str:
    rounds: dict[int, list[Event]] = {}
    for event in run.clients:
        if num_of(event, "loss") is not None:
            rounds.setdefault(int(num_of(event, "round") or 0), []).append(event)
    if not rounds:
        return ""
    losses = {r: sorted(num_of(e, "loss") or 0.0 for e in events) for r, events in rounds.items()}
    every = [v for values in losses.values() for v in values]
    desc = f"{len(every)} losses of clients in {len(rounds)} rounds, {min(every):.3f} to {max(every):.3f}."
    x = axes.integers(list(map(float, rounds)), "round", pad=0.6)
    y = axes.numbers(every, "training loss")
    plot = svg.Plot("spread", "Training loss of each client by round", desc, x, y)
    alone = len(every) == len(rounds)
    _draw_spread(
        plot,
        (plot.width - plot.left - plot.right) / (x.hi - x.lo),
        rounds,
        losses,
        lambda c: client_name(run, c),
    )
    rows: list[list[str | TableCell]] = [
        [str(r), *_cells(len(v), v[0], *_quartiles(v), v[-1])] for r, v in losses.items()
    ]
    head = ["round", "clients", "lowest", "quarter", "median", "three quarters", "highest"]
    words = "One dot per client. Bar: median."
    if len(every) > MAX_DOTS:
        words = "Bands: all clients and their middle half. Line: median."
    words = "One client in each round." if alone else words
    words += (
        " As the clients report it: the mean over their local steps of the round, on the rows they train on."
    )
    data = page.table("Training loss over the clients of a round", head, rows)
    title = "Training loss of the client" if alone else "Training loss over the clients"
    return page.figure(plot.svg(), title, words, data=data)


def _draw_spread(
    plot: svg.Plot,
    slot: float,
    rounds: Mapping[int, Sequence[Event]],
    losses: Mapping[int, Sequence[Number]],
    name: Callable[[object], str],
) -> None:
    """Draw a dot a client or, for many, bands, with the medians; a round is `slot` pixels wide."""
    total = sum(map(len, losses.values()))
    alone = total == len(losses)
    if alone:
        tips = [f"round {r}: {v[0]:.3f}" for r, v in losses.items()]
        plot.line([(float(r), v[0]) for r, v in losses.items()], 0, tips)
    elif total > MAX_DOTS:
        plot.band([(float(r), v[0], v[-1]) for r, v in losses.items()])
        plot.band([(float(r), *_quartiles(v)[::2]) for r, v in losses.items()])
    else:
        for r, events in rounds.items():
            for i, event in enumerate(events):
                loss = num_of(event, "loss") or 0.0
                aside = ((i * 0.618034 + 0.5) % 1 - 0.5) * min(0.6 * slot, 70.0)
                plot.dot(r, loss, 0, f"round {r}, client {name(event.get('client'))}: {loss:.3f}", aside)
    medians = [(float(r), statistics.median(v)) for r, v in losses.items() if not alone]
    if slot > 8:
        for at, median in medians:
            plot.dash(at, median, min(0.36 * slot, 40.0), -1, f"round {at:.0f}: median {median:.3f}")
    else:
        plot.line(medians, -1, markers=False)


def _quartiles(ordered: Sequence[Number]) -> tuple[float, float, float]:
    if len(ordered) < 2:
        return (float(ordered[0]),) * 3
    low, mid, high = statistics.quantiles(ordered, n=4, method="inclusive")
    return low, mid, high


def _cells(count: int, *values: float) -> list[TableCell]:
    return [TableCell(str(count)), *(TableCell(f"{v:.3f}") for v in values)]


def _every_round(steps: Sequence[Step]) -> str:
    names = list(dict.fromkeys(name for s in steps for name in s.losses))
    own_names = list(dict.fromkeys(name for s in steps for name in s.own))
    head = [
        "round",
        *(metric(n).label for n in (*names, *own_names)),
        "replies",
        "sent",
        "received",
        "so far",
        "time",
        "memory",
    ]
    rows: list[list[str | TableCell]] = []
    for s in steps:
        row: list[str | TableCell] = [str(s.round)]
        row += [TableCell(show(n, s.losses.get(n))) for n in names]
        row += [TableCell(_figure(s.own.get(n))) for n in own_names]
        used = "-" if s.accepted is None else str(s.accepted)
        if s.accepted is not None and s.asked is not None:
            used += f" of {s.asked}"
        row += [TableCell(used), *(TableCell(human_bytes(v)) for v in (s.up, s.down, s.total))]
        rows.append([*row, TableCell(human_time(s.seconds)), TableCell(human_bytes(s.rss))])
    table = page.table("Every round: bytes are sums over its clients", head, rows)
    shut = len(rows) > 31
    return f"<details{'' if shut else ' open'}><summary>Every round in numbers</summary>{table}</details>"


def _figure(value: Number | None) -> str:
    """Format a method's own figure, which may be of any size: four digits, a count whole."""
    if value is None:
        return "-"
    return f"{value:,.0f}" if value == int(value) else f"{value:.4g}"


def _costs(run: RunLog, steps: Sequence[Step], facts: Mapping[str, object]) -> tuple[str, str]:
    """Return plots of memory and bytes, and what is the same in every round in words."""
    figures, same = _memory(run, steps, facts), []
    memory = (
        ""
        if figures or not (peak := number(facts["peak_rss"]))
        else f" Peak memory {human_bytes(peak)}, about the same in every round."
    )
    asked = {s.round: s.asked for s in steps}
    for ident, word, colour in (("up", "sent", 0), ("down", "received", 2)):
        values = [(s.round, v) for s in steps if (v := s.up if ident == "up" else s.down) is not None]
        if not values:
            continue
        rounds, most = [float(r) for r, _ in values], max(v for _, v in values)
        total = sum(v for _, v in values)
        if _constant([float(v) for _, v in values]):
            same.append(f"{word} {human_bytes(total / len(values))}")
            continue
        desc = f"At most {human_bytes(most)} in a round, {human_bytes(total)} in all."
        title = f"Bytes {word} by the clients"
        y = axes.sizes([v for _, v in values], f"{word} in a round")
        plot = svg.Plot(f"bytes-{ident}", title, desc, axes.integers(rounds, "round", pad=0.6), y)
        for r, v in values:
            n = asked[r]
            tip = f"round {r}: {human_bytes(v)}" + (f", {human_bytes(v / n)} per client" if n else "")
            plot.bar(r, v, colour, tip)
        figures += page.figure(plot.svg(), title, desc)
    moved = f"In every round the clients {' and '.join(same)} together." if same else ""
    return figures, (moved + memory).strip()


def _memory(run: RunLog, steps: Sequence[Step], facts: Mapping[str, object]) -> str:
    values = [(float(s.round), float(s.rss)) for s in steps if s.rss is not None]
    peak = number(facts["peak_rss"])
    if not values or peak is None or _constant([v for _, v in values], 0.1):
        return ""
    params = num_of(run.start, "params")
    width = {"fp32": 4, "bf16": 2, "fp16": 2}.get(text_of("dtype", run.config, run.env))
    bare = params * width if params is not None and width else None
    desc = f"Peak {human_bytes(peak)}" + (f"; the weights alone are {human_bytes(bare)}." if bare else ".")
    y = axes.sizes([peak, bare or 0, *(v for _, v in values)], "resident memory")
    plot = svg.Plot(
        "memory", "Memory by round", desc, axes.integers([r for r, _ in values], "round", pad=0.4), y
    )
    if bare and bare > 0.15 * peak:  # lower down its text would stand on the axis
        plot.reference(bare, f"weights alone {human_bytes(bare)}", below=True)
    plot.reference(peak, f"peak {human_bytes(peak)}")
    plot.line(values, 3, [f"round {r:.0f}: {human_bytes(v)}" for r, v in values])
    return page.figure(plot.svg(), "Memory of the process", desc)


def rates(run: RunLog) -> str:
    """Return a sentence for each rate that was found, and a plot of each that was tried; "" for a run that found none."""
    return "".join(_sentence(event) + _trial(event) for event in run.rates)


def _sentence(event: Event) -> str:
    rate, seconds = num_of(event, "rate"), num_of(event, "seconds")
    words = f"{text_of('setting', event)} = {rate:g} was found" if rate is not None else "No rate was found"
    took = f" in {human_time(seconds)}" if seconds is not None else ""
    why = text_of("why", event)
    return f"<p>{page.esc(f'{words}{took}: {why}.')}</p>"


def _trial(event: Event) -> str:
    pairs = zip(list_of(event, "rates"), list_of(event, "losses"), strict=False)
    points = [(float(r), float(v)) for r, v in pairs if _positive(r) and number(v) is not None]  # type: ignore[arg-type]
    points = [(r, v) for r, v in points if math.isfinite(v)]
    if len(points) < 2:
        return ""
    name = text_of("setting", event)
    lowest = min(loss for _, loss in points)
    desc = f"{len(points)} rates from {points[0][0]:.2g} to {points[-1][0]:.2g}; the lowest loss is {lowest:.3f}."
    plot = svg.Plot(
        f"rate-{name.replace('_', '-')}",
        f"Loss by {name}",
        desc,
        _decades([r for r, _ in points], name),
        axes.numbers([v for _, v in points], "loss after the trial"),
    )
    plot.line(points, 0, [f"{r:.3g}: {v:.3f}" for r, v in points])
    words = (
        "Training rows that the trial did not train on; rates after which the model was lost are left out."
    )
    return page.figure(plot.svg(), f"Loss by {name}", words)


def _positive(value: object) -> bool:
    found = number(value)
    return found is not None and found > 0


def _decades(values: list[float], label: str) -> PlotAxis:
    """Return a logarithmic axis with a tick at 1 and 3 of every decade."""
    lo, hi = min(values) / 1.3, max(values) * 1.3
    powers = range(math.floor(math.log10(lo)), math.ceil(math.log10(hi)) + 1)
    ticks = [s * 10.0**p for p in powers for s in (1, 3) if lo <= s * 10.0**p <= hi]
    return PlotAxis(lo, hi, tuple((t, f"{t:.0e}".replace("e-0", "e-")) for t in ticks), label, log=True)
