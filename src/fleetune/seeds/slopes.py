"""Measure slope, noise and curvature along random directions, and derive the learning rate of two-point descent.

A step along a direction z of +1s and -1s is w <- w - eta g z, with g = z . grad L_B the slope on a batch B (Malladi et al. 2023,
arXiv 2305.17333).  Over z and B the loss changes by

    E[change] = -eta G + (eta^2 / 2) h (G + s^2 / b),      G = |grad L|^2,   h = E[z' H z] = tr H,

which is least at eta = G / (h (G + s^2 / b)).  s^2 / b is the variance that the rows of a batch of b give to the slope; the
largest eigenvalue is neglected beside h.  G is measured as the mean of g^2 less that variance, over a few directions (`along`).
Curvature may be much higher a few steps away, so all is measured again after a short walk at the rate that was found.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from fleetune.data import Batch, Batches, Encoded, collate
from fleetune.evaluation.losses import batch_loss, pad_id, row_losses
from fleetune.models.net.model import Model
from fleetune.seeds.descent import Position, descend, two_point
from fleetune.seeds.noise import probe, run_key
from fleetune.seeds.scale_view import view_on
from fleetune.seeds.view import View

DIRECTIONS: Final = 6  # at a point
ROWS: Final = 24  # of a direction
STEPS: Final = 16  # of the walk
GRID: Final = 1e-9  # of the walk's coefficients: a fraction of any weight's own precision
LIMIT: Final = (1 << 31) - 1
CAREFUL: Final = 0.4  # share of the rate at which the first step's loss is least: G falls, noise stays
CAP: Final = 0.35  # lr times curvature, at most: a walk that is averaged with others must itself be stable


@dataclass(frozen=True)
class Slopes:
    """What was measured along some directions at one point.  Units: nats, and weights in their own unit."""

    gradient: float  # G, the squared norm of the gradient
    noise: float  # s^2, the variance of a slope on one row
    curvature: float  # h, the mean of |z' H z|: no step is safer where the loss is concave
    slopes: tuple[float, ...]  # of each direction
    curvatures: tuple[float, ...]  # of each direction, with its sign

    def signal(self, batch: int) -> float:
        """Return the share of a squared slope on so many rows that is the gradient's: 0 to 1."""
        seen = self.gradient + self.noise / batch
        return max(0.0, self.gradient / seen) if seen > 0 else 0.0


@dataclass(frozen=True)
class Probe:
    """How to measure: the directions' law and pool, the size of the perturbation, a key, and the rows of a step."""

    law: str
    K: int
    eps: float
    key: int
    batch: int


def rate(points: Sequence[Slopes], batch: int, averaged: float = 1.0) -> float:
    """Return the learning rate for batches of so many rows, by the least favourable of the points.

    `averaged` devices walk along directions of their own and are averaged: the noise of the mean is that much less, while
    each walk must be stable alone.  0 where nothing can be told: no slope beyond the noise of the rows, or no curvature.
    """
    curvature = max(point.curvature for point in points)
    signal = min(point.signal(batch) for point in points)
    if not (curvature > 0 and math.isfinite(curvature)):
        return 0.0
    return min(CAREFUL * signal * math.sqrt(averaged), CAP) / curvature


def measure(
    model: Model,
    rows: Sequence[Encoded],
    how: Probe,
    choose: Callable[[Slopes], float],
    on_losses: Callable[[int, int], None] = lambda done, total: None,
) -> list[Slopes]:
    """Return what is found at the base and, unless `choose` makes no rate of that, where a walk at its rate leads.

    The model is left as it was.  Takes 3 forward passes over the rows of each direction, and 2 over those of each step;
    `on_losses(done, total)` is called after each, with how many losses of rows there were.
    """
    key = run_key(how.key.to_bytes(8, "little"))
    view = view_on(model, run_key=key, law=how.law, grid=GRID)
    model.attachment = view
    done, total = 0, 2 * 3 * DIRECTIONS * min(ROWS, len(rows)) + 2 * STEPS * min(how.batch, ROWS)

    def counted(more: int) -> None:
        nonlocal done
        done += more
        on_losses(done, total)

    try:
        points = [_at_point(model, view, rows, how, 0, counted)]
        if step := choose(points[0]):
            _walk(model, view, rows, how, step, counted)
            points.append(_at_point(model, view, rows, how, DIRECTIONS, counted))
    finally:
        view.remove()
        model.attachment = None
    return points


def _at_point(
    model: Model, view: View, rows: Sequence[Encoded], how: Probe, first: int, counted: Callable[[int], None]
) -> Slopes:
    """Measure along `DIRECTIONS` members of the pool from `first` on, each on up to `ROWS` of the rows."""
    size, measured = min(ROWS, len(rows)), []
    for k in range(first, first + DIRECTIONS):
        few = [rows[(k * size + i) % len(rows)] for i in range(size)]
        batch = collate(few, pad_id(model), model.device)
        middle, tokens = row_losses(model, batch)
        sides: list[np.ndarray] = []

        def loss(batch: Batch = batch, sides: list[np.ndarray] = sides) -> float:
            sides.append(row_losses(model, batch)[0])
            return 0.0

        two_point(view, probe(how.law, how.K, k % how.K), how.eps, loss)
        measured.append(along(middle, sides[0], sides[1], tokens, how.eps))
        counted(3 * size)
    slopes, variances, curvatures = np.array(measured).T
    noise = float(variances.mean())
    squared, curvature = float((slopes**2).mean()), float(np.abs(curvatures).mean())
    return Slopes(
        squared - noise, noise * size, curvature, tuple(slopes.tolist()), tuple(curvatures.tolist())
    )


def _walk(
    model: Model, view: View, rows: Sequence[Encoded], how: Probe, step: float, counted: Callable[[int], None]
) -> None:
    """Take `STEPS` two-point steps at a rate from the base; the view stays where they lead."""

    def units(number: int, g: float) -> int:
        counted(2 * min(how.batch, ROWS))
        return max(-LIMIT, min(LIMIT, round(-g * step / GRID)))

    position = Position(how.law, how.K, np.zeros(0, np.uint64), np.zeros(0, np.int64))
    batches = Batches(rows, pad_id(model), how.key, model.device).steps(STEPS, min(how.batch, ROWS))
    ids = [(1 << 32) | (k % how.K) for k in range(STEPS)]  # of another pool than what is measured
    descend(model, view, position, ids, batches, batch_loss, eps=how.eps, clip=0.0, to_units=units)


def along(
    middle: np.ndarray, plus: np.ndarray, minus: np.ndarray, tokens: np.ndarray, eps: float
) -> tuple[float, float, float]:
    """Return (slope, variance of the slope, curvature) along one direction.

    Takes the summed losses l0, l+, l- float64[b] of each row at w, w + eps z and w - eps z, and its answer tokens int64[b].  The
    slope is the mean of the rows' (l+ - l-) / (2 eps) weighted by tokens, its variance that of a ratio of sums (Cochran 1977,
    Sampling Techniques, section 2.11), the curvature (l+ + l- - 2 l0) / eps^2.
    """
    total, rows = int(tokens.sum()), len(tokens)
    own = (plus - minus) / (2 * eps)
    slope = float(own.sum()) / total
    rest = own - slope * tokens
    variance = float((rest**2).sum()) * rows / max(1, rows - 1) / total**2
    return slope, variance, float((plus + minus - 2 * middle).sum()) / total / eps**2
