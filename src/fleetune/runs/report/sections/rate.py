# SPDX-License-Identifier: Apache-2.0
"""Show how a learning rate was found: the losses that were tried, or what was measured along random directions."""

from __future__ import annotations

import math

from fleetune.common.display import human_time
from fleetune.runs.report import axes, page, svg
from fleetune.runs.report.axes import PlotAxis
from fleetune.runs.report.runlog import Event, RunLog, list_of, num_of, number, text_of


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
        f"rate-{name.replace('_', '-')}", f"Loss by {name}", desc, _decades([r for r, _ in points], name),
        axes.numbers([v for _, v in points], "loss after the trial"),
    )  # fmt: skip
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
