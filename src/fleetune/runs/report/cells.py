# SPDX-License-Identifier: Apache-2.0
"""Summarise a sweep: means and spreads over seeds, for every combination and along every axis.

A seed draws its own held-out rows, clients and directions, so all runs of one seed share a level.  The mean of a
value along an axis is therefore computed seed by seed (over the other axes), then over the seeds; in plots the
spread is the standard deviation of the change by tuning.  `effect` judges an axis within the seeds: the seed's
level is subtracted, as in the analysis of a randomised block design (Fisher, "The Design
of Experiments", 1935).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from fleetune.common.settings import Value
from fleetune.runs.report import runlog
from fleetune.runs.report.runlog import Number, RunLog, Step

BASE, TUNED = 0, 1  # of `runlog.measures`


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
    run: RunLog


class Stat(NamedTuple):
    """Mean, standard deviation (None of a single number), how many numbers."""

    mean: float
    spread: float | None
    number: int

    def text(self, digits: int) -> str:
        """Format as 3.912 ± 0.020."""
        more = "" if self.spread is None else f" ± {self.spread:.{digits}f}"
        return f"{self.mean:.{digits}f}{more}"


def stat(values: Sequence[Number]) -> Stat | None:
    """Return mean and sample standard deviation; None of nothing."""
    if not values:
        return None
    return Stat(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None, len(values))


def finished(members: Sequence[GridRun]) -> list[GridRun]:
    """Return the runs that finished."""
    return [m for m in members if runlog.kind_of(m.run.status) == "done"]


def complete_seeds(axes: Sequence[SweepAxis], members: Sequence[GridRun]) -> list[GridRun]:
    """Return the finished runs of seeds that have every combination (so that means compare), else all finished ones."""
    ready = finished(members)
    size = math.prod(len(a.values) for a in axes)
    full = [s for s in {m.seed for m in ready} if sum(m.seed == s for m in ready) == size]
    return [m for m in ready if m.seed in full] if full else ready


def metrics(members: Sequence[GridRun]) -> list[str]:
    """Return the measures that every finished run ends with; the loss first."""
    names = [list(runlog.measures(m.run)[1]) for m in finished(members)]
    common = [n for n in (names[0] if names else []) if all(n in other for other in names)]
    return sorted(common, key=lambda name: name != "loss")


class Combination(NamedTuple):
    """A combination of values: its finished runs over the seeds."""

    values: tuple[Value, ...]
    base: dict[str, Stat]
    tuned: dict[str, Stat]
    bytes: Stat | None
    seconds: Stat | None
    runs: int


def combinations(axes: Sequence[SweepAxis], members: Sequence[GridRun]) -> list[Combination]:
    """Return every combination that has a finished run, in the order of the grid."""
    names, ready = metrics(members), finished(members)
    out = []
    for values in dict.fromkeys(m.values for m in ready):
        here = [m for m in ready if m.values == values]
        both = [runlog.measures(m.run) for m in here]
        facts = [runlog.summarise(m.run) for m in here]
        base, tuned = (_stats([pair[side] for pair in both], names) for side in (BASE, TUNED))
        traffic, seconds = (
            stat([v for f in facts if (v := runlog.number(f[key])) is not None])
            for key in ("bytes", "seconds")
        )
        out.append(Combination(values, base, tuned, traffic, seconds, len(here)))
    order = [{v: i for i, v in enumerate(a.values)} for a in axes]
    return sorted(out, key=lambda c: [place[v] for place, v in zip(order, c.values, strict=True)])


def _stats(measured: Sequence[Mapping[str, Number]], names: Sequence[str]) -> dict[str, Stat]:
    found = {name: stat([m[name] for m in measured if name in m]) for name in names}
    return {name: value for name, value in found.items() if value is not None}


def by_seed(
    axis: int, value: Value, metric: str, members: Sequence[GridRun], side: int = TUNED
) -> dict[int, float]:
    """Return seed -> the mean measure of its finished runs at `value` of an axis, over the other axes.

    `side` is BASE or TUNED; a seed whose runs do not have the measure there is left out.
    """
    found: dict[int, list[float]] = {}
    for m in finished(members):
        if m.values[axis] == value and metric in (measured := runlog.measures(m.run)[side]):
            found.setdefault(m.seed, []).append(float(measured[metric]))
    return {seed: statistics.fmean(values) for seed, values in found.items()}


def final_measure(axis: int, value: Value, metric: str, members: Sequence[GridRun]) -> Stat | None:
    """Return a final measure at `value` of an axis: its mean, and the spread over the seeds of its change by tuning."""
    tuned, base = (by_seed(axis, value, metric, members, side) for side in (TUNED, BASE))
    return mean_and_change([(base.get(seed, 0.0), v) for seed, v in tuned.items()])


def mean_and_change(pairs: Sequence[tuple[float, float]]) -> Stat | None:
    """Return the mean of the second numbers, and the standard deviation of their difference from the first."""
    mean, change = stat([after for _, after in pairs]), stat([after - before for before, after in pairs])
    return Stat(mean.mean, change.spread, mean.number) if mean and change else None


class Effect(NamedTuple):
    """Effect of an axis on a measure: its lowest and highest mean, and the noise of such a mean (None: unknown)."""

    low: tuple[Value, float]
    high: tuple[Value, float]
    noise: float | None

    @property
    def range(self) -> float:
        """Return the highest mean less the lowest."""
        return self.high[1] - self.low[1]


def effect(number: int, axis: SweepAxis, metric: str, members: Sequence[GridRun]) -> Effect | None:
    """Return the effect of axis `number` over the `complete_seeds`; None before two of its values are finished.

    Over the seeds that have every value, y[v, s] = mean + value's part + seed's part + rest.  The noise of a
    value's mean is sqrt(sum rest^2 / ((V - 1)(S - 1)) / S).
    """
    table = {v: row for v in axis.values if (row := by_seed(number, v, metric, members))}
    if len(table) < 2:
        return None
    seeds = sorted(set.intersection(*(set(row) for row in table.values())))
    means = {v: statistics.fmean(row[s] for s in seeds or row) for v, row in table.items()}
    low, high = min(means.items(), key=lambda i: i[1]), max(means.items(), key=lambda i: i[1])
    if len(seeds) < 2:
        return Effect(low, high, None)
    level = {s: statistics.fmean(row[s] for row in table.values()) for s in seeds}
    middle = statistics.fmean(level.values())
    rest = [row[s] - means[v] - level[s] + middle for v, row in table.items() for s in seeds]
    variance = math.fsum(r * r for r in rest) / ((len(table) - 1) * (len(seeds) - 1))
    return Effect(low, high, math.sqrt(variance / len(seeds)))


class CurvePoint(NamedTuple):
    """A point of a curve over rounds: the loss (see `loss_curve`) and the mean bytes so far."""

    round: int
    loss: Stat
    bytes: float


def loss_curve(axis: int, value: Value, members: Sequence[GridRun]) -> list[CurvePoint]:
    """Return the loss by round at `value` of an axis, at the rounds that all its finished runs measured.

    Its spread is that of the change since the first of those rounds, over the seeds.
    """
    every: dict[int, list[dict[int, Step]]] = {}
    for m in finished(members):
        if m.values[axis] == value:
            measured = {s.round: s for s in runlog.steps(m.run) if "loss" in s.losses}
            every.setdefault(m.seed, []).append(measured)
    curves = [steps for of_seed in every.values() for steps in of_seed]
    rounds = sorted(set.intersection(*(set(c) for c in curves))) if curves else []
    by_round = {
        r: [statistics.fmean(c[r].losses["loss"] for c in of_seed) for of_seed in every.values()]
        for r in rounds
    }
    out = []
    for r, losses in by_round.items():
        found = mean_and_change(list(zip(by_round[rounds[0]], losses, strict=True)))
        if found is not None:
            out.append(CurvePoint(r, found, statistics.fmean(c[r].total or 0 for c in curves)))
    return out
