# SPDX-License-Identifier: Apache-2.0
"""Lay out plot axes with few round ticks in the unit of the data: numbers, counts, bytes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

_UNITS = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1.0, "B"))
_TINY = 1e-18  # what is nearer to zero is drawn as zero


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


def _multiples(lo: float, hi: float, step: float) -> list[float]:
    first, last = math.ceil(lo / step - 1e-9), math.floor(hi / step + 1e-9)
    return [k * step for k in range(first, last + 1)]


def _range(values: Iterable[float], zero: bool) -> tuple[float, float]:
    finite = [v if abs(v) > _TINY else 0.0 for v in values if usable(v)] or [0.0, 1.0]
    lo, hi = min(finite), max(finite)
    if zero:
        lo, hi = min(lo, 0.0), max(hi, 0.0)
    if hi - lo <= 1e-9 * max(abs(lo), abs(hi)):
        room = 0.05 * abs(hi) or 1.0
        lo, hi = (lo, hi + room) if zero else (lo - room, hi + room)
    return lo, hi


def numbers(
    values: Iterable[float], label: str, *, zero: bool = False, count: int = 5, snap: bool = True
) -> PlotAxis:
    """Make a linear axis of plain numbers; `snap` widens the range to whole steps."""
    lo, hi = _range(values, zero)
    step = nice_step(hi - lo, count)
    digits = max(0, -math.floor(math.log10(step) + 1e-9))
    return _linear(lo, hi, step, label, lambda v: f"{v:.{digits}f}" if abs(v) < 1e6 else f"{v:.3g}", snap)


def counts(values: Iterable[float], label: str) -> PlotAxis:
    """Make a linear axis of counts from zero: no ticks between whole numbers."""
    lo, hi = _range(values, zero=True)
    return _linear(lo, hi, max(1.0, nice_step(hi - lo, 5)), label, lambda v: f"{v:,.0f}", snap=True)


def integers(values: Iterable[float], label: str, *, pad: float = 0.0, count: int = 10) -> PlotAxis:
    """Make a linear axis of whole numbers (rounds), `pad` units wider on both sides for bars."""
    lo, hi = _range(values, zero=False)
    step = max(1.0, nice_step(hi - lo, count))
    return _linear(lo - pad, hi + pad, step, label, lambda v: f"{v:.0f}", snap=False)


def sizes(values: Iterable[float], label: str, *, count: int = 5, snap: bool = True) -> PlotAxis:
    """Make a linear axis of bytes from zero, all ticks in one decimal unit."""
    lo, hi = _range(values, zero=True)
    scale, unit = next((s, u) for s, u in _UNITS if hi >= s or s == 1.0)
    step = max(nice_step(hi - lo, count), 1.0)
    return _linear(lo, hi, step, label, lambda v: f"{v / scale:g} {unit}" if v else "0", snap)


def log_sizes(values: Iterable[float], label: str) -> PlotAxis:
    """Make a logarithmic axis of bytes; decades, or 1-2-5 where fewer than three decades show."""
    positive = [v for v in values if usable(v) and v > _TINY] or [1.0, 10.0]
    lo, hi = min(positive) / 1.25, max(positive) * 1.25
    steps = (1,) if math.log10(hi / lo) >= 3 else (1, 2, 5)
    exponents = range(math.floor(math.log10(lo)), math.ceil(math.log10(hi)) + 1)
    ticks = [m * 10.0**e for e in exponents for m in steps if lo <= m * 10.0**e <= hi]
    return PlotAxis(lo, hi, tuple((t, _size(t)) for t in ticks), label, log=True)


def _size(value: float) -> str:
    scale, unit = next((s, u) for s, u in _UNITS if value >= s * (1 - 1e-9) or s == 1.0)
    return f"{value / scale:.3g} {unit}"


def _linear(
    lo: float, hi: float, step: float, label: str, text: Callable[[float], str], snap: bool
) -> PlotAxis:
    if snap:
        lo = math.floor(lo / step + 1e-9) * step
        hi = max(math.ceil(hi / step - 1e-9) * step, lo + step)
    return PlotAxis(lo, hi, tuple((v, text(v)) for v in _multiples(lo, hi, step)), label)


def sparse(values: Sequence[float]) -> bool:
    """Return whether a logarithmic axis reads better: positive values over more than a decade and a half."""
    positive = [v for v in values if usable(v) and v > _TINY]
    return len(positive) > 1 and max(positive) / min(positive) > 30


def bytes_axis(series: Sequence[Sequence[float]]) -> tuple[PlotAxis, Callable[[float], float]]:
    """Make an axis for cumulative bytes; zero has no place on a logarithmic one and becomes NaN (not drawn)."""
    label = "bytes sent and received so far"
    every = [v for values in series for v in values]
    if not sparse(every):
        return sizes(every, label, count=8, snap=False), lambda value: value
    axis = log_sizes(every, label + " (log)")
    return axis, lambda value: value if value > 0 else math.nan
