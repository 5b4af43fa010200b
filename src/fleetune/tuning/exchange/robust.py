# SPDX-License-Identifier: Apache-2.0
"""Combine a round's replies by a rule that a minority of liars cannot lead: median, trimmed mean, clipping, votes.

    mean          sum_c n_c x_c / sum_c n_c, n_c the rows of client c        McMahan et al. 2017, arXiv 1602.05629
    mean:TIMES    the same, no n_c above TIMES the median of the round       Portnoy et al. 2020, arXiv 2004.04986
    median        of each coordinate                                         Yin et al. 2018, arXiv 1803.01498, Definition 1
    trimmed-mean  of each coordinate, without ceil(share m) of the m numbers at either end      the same, Definition 2
    norm-clip     every move cut to the median size of the round, then the mean           Sun et al. 2019, arXiv 1911.07963
    sign-vote     the sign that most have, times the median size of the round      Bernstein et al. 2018, arXiv 1802.04434

A method adds each reply as named arrays (`Rule.combining`, then `add`), and gets the combination of all (`tensors`).

- All rules but the mean count every client once.  Rows are what a client says of itself, so a weight by rows would be the
  liar's to choose; and the bounds of Yin et al. are for equal weights.
- Portnoy et al. cut weights so that a given share of the clients has at most a given weight together; a multiple of the
  median does so too, and needs no guess of how many lie.  `replies.py` cuts them (`Replies.most`, `lighter`).
- Size is the root mean square of a move's numbers.  The vote's step has that size, so a learning rate means the same
  under every rule (the paper and FeedSign, arXiv 2501.17610, agree on a constant instead).
- A number that a client could not have is NaN: a direction that its walk did not meet.  A coordinate is then combined among
  the clients that have it, and counts by their share of all, as it does in the mean.
- Every column is sorted before it is added up, so the order of the replies changes no bit.
- Vectors lie on disk (`Spool`) and are read by columns: beside the outcome and where the moves began (8 bytes a number
  each), there are `NUMBERS` numbers in memory, whatever the number of clients.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from types import MappingProxyType
from typing import Final

import numpy as np

from fleetune.tuning.exchange.averaging import NOTHING, Mean, Tensors
from fleetune.tuning.exchange.spool import Spool

SHARE: Final = Fraction(1, 5)  # cut off at either end by trimmed-mean
FEWEST: Final = 3  # replies of which one can be outvoted
TIMES: Final = 4.0  # the median device: what one may count, by what it says of itself
ONCE: Final = 1.0  # the same of rows in a fleet's mean; more gains nothing (docs/safety.md)
NUMBERS: Final = 1 << 19  # of all clients that are in memory at a time; about 20 MB with what is made of them

# (values float64[m, d], where their moves began float64[d], sizes float64[m], share) -> float64[d]
Reduce = Callable[[np.ndarray, np.ndarray, np.ndarray, Fraction], np.ndarray]


def trimmed(values: np.ndarray, share: Fraction) -> np.ndarray:
    """Return float64[d]: each column's mean without ceil(share m) of its m numbers at either end; NaN is no number.

    One or two numbers always stay, so 1/2 is the median and 0 the mean.
    """
    ordered, have = np.sort(values, axis=0), np.count_nonzero(~np.isnan(values), axis=0)
    cut = -(-have * share.numerator // share.denominator)
    cut = np.minimum(cut, np.maximum(have - 1, 0) // 2)
    place = np.arange(len(values))[:, None]
    kept = (place >= cut) & (place < have - cut)
    mean = np.where(kept, ordered, 0.0).sum(axis=0) / np.maximum(have - 2 * cut, 1)
    found: np.ndarray = mean * (have / len(values)) + 0.0  # + 0.0: no minus zero
    return found


def clipped(values: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Return float64[m, d]: moves, those of more than the usual size cut down to it."""
    most = usual(sizes)
    factors = np.divide(most, sizes, out=np.ones(len(sizes)), where=sizes > most)
    found: np.ndarray = values * factors[:, None]
    return found


def vote(values: np.ndarray, size: float) -> np.ndarray:
    """Return float64[d]: the sign that most numbers of a column have, times `size`; 0 where votes are equal."""
    have = np.count_nonzero(~np.isnan(values), axis=0)
    found: np.ndarray = np.sign(np.nansum(np.sign(values), axis=0)) * size * (have / len(values)) + 0.0
    return found


def usual(sizes: Sequence[float] | np.ndarray) -> float:
    """Return the lower median of the sizes that are not 0; 0 where all are."""
    moving = np.sort([s for s in sizes if s > 0])
    return float(moving[(len(moving) - 1) // 2]) if len(moving) else 0.0


def size_of(move: np.ndarray) -> float:
    """Return the root mean square of the numbers that are not NaN; 0 where there are none."""
    numbers = move[~np.isnan(move)]
    return math.sqrt(float(np.square(numbers).mean())) if numbers.size else 0.0


REDUCE: Final[Mapping[str, Reduce]] = MappingProxyType(
    {
        "median": lambda values, start, sizes, share: trimmed(values, Fraction(1, 2)),
        "trimmed-mean": lambda values, start, sizes, share: trimmed(values, share),
        "norm-clip": lambda values, start, sizes, share: (
            start + trimmed(clipped(values - start, sizes), Fraction(0))
        ),
        "sign-vote": lambda values, start, sizes, share: vote(values, usual(sizes)),
    }
)


@dataclass(frozen=True)
class Rule:
    """How the replies of a round become one; `parse` makes it from a recipe's text."""

    name: str = "mean"
    share: Fraction = SHARE  # of trimmed-mean
    times: float = math.inf  # of mean: the median rows of a round, which a reply counts at most
    spool: Spool | None = None  # where vectors lie; only the mean needs none

    @property
    def text(self) -> str:
        """Return the rule as a recipe has it."""
        if self.times < math.inf:
            return f"{self.name}:{self.times:g}"
        return self.name if self.share == SHARE else f"{self.name}:{float(self.share)}"

    @property
    def absent(self) -> float:
        """Return what stands for a number that a client could not have: nothing, which the mean counts as 0."""
        return 0.0 if self.name == "mean" else math.nan

    def combining(
        self, start: Mapping[str, np.ndarray] = NOTHING, sums: Mapping[str, np.ndarray] = NOTHING
    ) -> Mean | Robust:
        """Return an empty combination of moves from `start`, or of moves as such; its `sums` begin with `sums`."""
        if self.name == "mean":
            return Mean(sums)
        assert self.spool is not None
        return Robust(self, self.spool, start, sums)


MEAN: Final = Rule()


def parse(text: str) -> Rule:
    """Return the rule of a recipe's `aggregation`; ValueError, in plain words, when there is none."""
    name, colon, number = text.partition(":")
    if name != "mean" and name not in REDUCE:
        raise ValueError(f"aggregation = {text!r} is none of mean, {', '.join(REDUCE)}")
    if not colon:
        return Rule(name)
    try:
        found = float(number)
    except ValueError:
        found = math.nan
    if name == "mean" and 1 <= found < math.inf:
        return Rule(name, times=found)
    share = Fraction(found).limit_denominator(1000) if 0 < found < 1 else Fraction(0)
    if name == "trimmed-mean" and 0 < share < Fraction(1, 2):
        return Rule(name, share)
    raise ValueError(
        f"aggregation = {text!r}: only mean takes a number, from 1 on, such as mean:4, and trimmed-mean a share, between 0 "
        "and 0.5, such as trimmed-mean:0.3"
    )


class Robust:
    """The combination of vectors by a rule; it takes them one at a time."""

    def __init__(
        self, rule: Rule, spool: Spool, start: Mapping[str, np.ndarray], sums: Mapping[str, np.ndarray]
    ) -> None:
        self.total = 0.0  # vectors: each counts once
        self._rule, self._spool, self._start, self._sums = rule, spool, start, sums
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._dtype = np.dtype(np.float64)  # in the spool: one that holds every number as it came
        self._at: list[int] = []
        self._sizes: list[float] = []

    def add(self, n: float, tensors: Mapping[str, np.ndarray]) -> None:
        """Count `tensors` once, whatever the weight `n`; NaN is a number that this client could not have."""
        if not self._shapes:
            self._shapes = {name: t.shape for name, t in tensors.items()}
            self._dtype = np.result_type(np.float32, *tensors.values())
        flat = np.concatenate([np.ravel(tensors[name]) for name in self._shapes]).astype(self._dtype)
        self._sizes.append(size_of(flat - self._began()))
        self._at.append(self._spool.store(flat.tobytes()))
        self.total += 1

    def tensors(self) -> Tensors:
        """Return the combination, float64; {} when nothing was added."""
        if not self._at:
            return {}
        began, sizes = self._began(), np.array(self._sizes)
        found, width = np.zeros(len(began)), max(1, NUMBERS // len(self._at))
        for first in range(0, len(began), width):
            columns = slice(first, min(first + width, len(began)))
            values = np.stack([self._read(at, columns) for at in self._at])
            reduce = REDUCE[self._rule.name]
            found[columns] = reduce(values, began[columns], sizes, self._rule.share)
        ends = np.cumsum([math.prod(shape) for shape in self._shapes.values()])[:-1]
        parts = zip(self._shapes.items(), np.split(found, ends), strict=True)
        return {name: part.reshape(shape) for (name, shape), part in parts}

    def sums(self) -> Tensors:
        """Return the combination times the number of vectors, which stands for their sum."""
        return {name: self._sums.get(name, 0.0) + self.total * t for name, t in self.tensors().items()}

    def _began(self) -> np.ndarray:
        """Return float64[d], where the moves began."""
        parts = [
            np.ravel(self._start[name]) if name in self._start else np.zeros(math.prod(shape))
            for name, shape in self._shapes.items()
        ]
        return np.concatenate(parts).astype(np.float64)

    def _read(self, at: int, columns: slice) -> np.ndarray:
        item = self._dtype.itemsize
        data = self._spool.read(at + columns.start * item, (columns.stop - columns.start) * item)
        return np.frombuffer(data, self._dtype).astype(np.float64)
