"""Give the standard error of a loss, and of its difference from another loss on the same rows.

With the loss sum L_i (nats) and the scored tokens T_i of each of n rows, the loss R = sum L_i / sum T_i is a ratio of two sums
over independent rows (Cochran 1977, Sampling Techniques, 3rd edition, section 6.4):

    se(R) = sqrt(n / (n - 1) sum (L_i - R T_i)^2) / sum T_i

The same formula with L'_i - L_i for L_i gives the difference of two models, and with s_i / g_i the share of a gain that is
kept.  docs/watch.md says what such an error means.
"""

import math
from collections.abc import Sequence
from typing import Final, NamedTuple

ERRORS: Final = 2.0  # standard errors within which a difference is noise


class RowLosses(NamedTuple):
    """The losses of rows: sums in nats, and numbers of scored tokens (1 each where a row is scored once)."""

    sums: Sequence[float]
    counts: Sequence[int]


class Difference(NamedTuple):
    """A difference of two losses, nats a token; its standard error, None for one row; and the number of rows."""

    value: float
    error: float | None
    rows: int

    @property
    def noise(self) -> bool:
        """Whether it is too small to be told from nothing; also where its error is not known."""
        return within_noise(self.value, self.error)


def within_noise(value: float, error: float | None) -> bool:
    """Whether a difference is within two standard errors, or has none; one that is not finite is not noise."""
    return math.isfinite(value) and (error is None or abs(value) <= ERRORS * error)


def ratio(above: Sequence[float], below: Sequence[float]) -> tuple[float, float | None]:
    """Return sum(above) / sum(below) and its standard error, None for fewer than two rows; NaN where there is nothing below."""
    n, total = len(above), math.fsum(below)
    if not total:
        return math.nan, None
    R = _sum(above) / total
    if n < 2 or not math.isfinite(R):
        return R, None
    squares = math.fsum((a - R * b) ** 2 for a, b in zip(above, below, strict=True))
    return R, math.sqrt(n / (n - 1) * squares) / abs(total)


def difference(before: RowLosses, after: RowLosses) -> Difference | None:
    """Return by how much the loss `after` is above that `before`; None unless both are of the same rows, by their tokens."""
    if list(before.counts) != list(after.counts) or not sum(before.counts):
        return None
    changes = [a - b for a, b in zip(after.sums, before.sums, strict=True)]
    value, error = ratio(changes, before.counts)
    return Difference(value, error, len(changes))


def _sum(values: Sequence[float]) -> float:
    return math.fsum(values) if all(map(math.isfinite, values)) else sum(values)  # inf, or NaN
