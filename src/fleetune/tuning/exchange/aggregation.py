"""Make the replies of a round one: the mean (FedAvg), LoRA averaged as products, and rules that a minority of liars cannot lead.

    mean          sum_c n_c x_c / sum_c n_c, n_c the rows of client c        McMahan et al. 2017, arXiv 1602.05629
    mean:TIMES    the same, no n_c above TIMES the median of the round       Portnoy et al. 2020, arXiv 2004.04986
    median        of each coordinate                                         Yin et al. 2018, arXiv 1803.01498, Definition 1
    trimmed-mean  of each coordinate, without ceil(share m) of the m numbers at either end      the same, Definition 2
    norm-clip     every move cut to the median size of the round, then the mean           Sun et al. 2019, arXiv 1911.07963
    sign-vote     the sign that most have, times the median size of the round      Bernstein et al. 2018, arXiv 1802.04434

All rules but the mean count every client once: rows are the client's own claim.  Size is the root mean square of a move's
numbers.  NaN stands for a number that a client could not have (a direction that its walk did not meet): the coordinate is
combined among the clients that have it, times their share of all.  Columns are sorted before they are summed, so the order of
replies changes no bit.

A round moves the model w by `Delta = mean_k w_k - w`.  The server steps along it, with -Delta as a gradient ("pseudo-gradient"):

    avg           w <- w + eta Delta                                    McMahan et al. 2017, arXiv 1602.05629
    avgm          m <- beta m + Delta;  w <- w + eta m                  Hsu et al. 2019, arXiv 1909.06335
    adam          m <- beta_1 m + (1 - beta_1) Delta                    Reddi et al. 2021, arXiv 2003.00295, Algorithm 2
                  v <- beta_2 v + (1 - beta_2) Delta^2
                  w <- w + eta m / (sqrt(v) + tau)                      from m = 0, v = tau^2, no bias correction

These are float64; the caller rounds once.  The numbers are the papers', but for adam's eta: 1e-3 is what OpenFedLLM (arXiv
2402.06954) sets for LoRA.  SCAFFOLD is Karimireddy et al. 2020, arXiv 1910.06378, Algorithm 1, option II.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from types import MappingProxyType
from typing import Final

import numpy as np

from fleetune.common.files import storage_error
from fleetune.privacy.mechanism import Privacy, PrivateSum

Tensors = dict[str, np.ndarray]
NOTHING: Final[Mapping[str, np.ndarray]] = MappingProxyType({})


class Mean:
    """FedAvg (McMahan et al. 2017, Algorithm 1): sum_k n_k w_k / sum_k n_k, tensor by tensor, float64."""

    def __init__(self, sums: Mapping[str, np.ndarray] = NOTHING) -> None:
        """`sums` is what the sums begin with, float64."""
        self.total = 0.0  # sum_k n_k
        self._sums: Tensors = {name: s.copy() for name, s in sums.items()}

    def sums(self) -> Tensors:
        """Return sum_k n_k w_k."""
        return dict(self._sums)

    def add(self, n: float, tensors: Mapping[str, np.ndarray]) -> None:
        """Count `tensors` with weight `n`; they are added one at a time, so memory does not grow with the devices."""
        for name, value in tensors.items():
            if name not in self._sums:
                self._sums[name] = np.zeros(value.shape, np.float64)
            self._sums[name] += n * value.astype(np.float64)
        self.total += n

    def tensors(self) -> Tensors:
        """Return the mean; {} when nothing was added."""
        return {name: s / self.total for name, s in self._sums.items()}


# Rules --------------------------------------------------------------------------------------------------

SHARE: Final = Fraction(1, 5)  # cut off at either end by trimmed-mean
FEWEST: Final = 3  # replies of which one can be outvoted
TIMES: Final = 4.0  # the median device: what one may count, by what it says of itself
ONCE: Final = 1.0  # the same of rows in a fleet's mean; more gains nothing (docs/safety.md)
IN_MEMORY: Final = 1 << 22  # bytes of a round; more lie on disk
NUMBERS: Final = 1 << 19  # of all clients that are in memory at a time; about 20 MB with what is made of them

# (values float64[m, d], where their moves began float64[d], sizes float64[m], share) -> float64[d]
Reduce = Callable[[np.ndarray, np.ndarray, np.ndarray, Fraction], np.ndarray]


def trimmed(values: np.ndarray, share: Fraction) -> np.ndarray:
    """Return float64[d]: each column's mean without ceil(share m) of its m numbers at either end; NaN is no number.

    One or two numbers always stay, so 1/2 gives the median and 0 the mean.
    """
    ordered, have = np.sort(values, axis=0), np.count_nonzero(~np.isnan(values), axis=0)
    cut = -(-have * share.numerator // share.denominator)
    cut = np.minimum(cut, np.maximum(have - 1, 0) // 2)
    place = np.arange(len(values))[:, None]
    kept = (place >= cut) & (place < have - cut)
    mean = np.where(kept, ordered, 0.0).sum(axis=0) / np.maximum(have - 2 * cut, 1)
    return np.asarray(mean * (have / len(values)) + 0.0)  # + 0.0: no minus zero


def median(values: np.ndarray) -> np.ndarray:
    """Return float64[d]: each column's median, the mean of the middle two of an even number; NaN is no number."""
    return trimmed(values, Fraction(1, 2))


def clipped(values: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Return float64[m, d]: moves, those of more than the usual size cut down to it."""
    most = usual(sizes)
    factors = np.divide(most, sizes, out=np.ones(len(sizes)), where=sizes > most)
    return np.asarray(values * factors[:, None])


def vote(values: np.ndarray, size: float) -> np.ndarray:
    """Return float64[d]: the sign that most numbers of a column have, times `size`; 0 where votes are equal."""
    have = np.count_nonzero(~np.isnan(values), axis=0)
    return np.asarray(np.sign(np.nansum(np.sign(values), axis=0)) * size * (have / len(values)) + 0.0)


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
        "median": lambda values, start, sizes, share: median(values),
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
    privacy: Privacy | None = None  # of private

    @property
    def text(self) -> str:
        """Return the rule as a recipe has it."""
        if self.privacy is not None:
            return self.privacy.text
        if self.times < math.inf:
            return f"{self.name}:{self.times:g}"
        return self.name if self.share == SHARE else f"{self.name}:{float(self.share)}"

    @property
    def absent(self) -> float:
        """Return what stands for a number that a client could not have: nothing, which the mean counts as 0."""
        return 0.0 if self.name in ("mean", PRIVATE) else math.nan

    def combining(
        self, start: Mapping[str, np.ndarray] = NOTHING, sums: Mapping[str, np.ndarray] = NOTHING
    ) -> Mean | Robust | PrivateSum:
        """Return an empty combination of moves from `start`; its `sums` begin with `sums`."""
        if self.name == "mean":
            return Mean(sums)
        if self.privacy is not None:
            return self.privacy.combining(start)
        assert self.spool is not None
        return Robust(self, self.spool, start, sums)


MEAN: Final = Rule()
PRIVATE: Final = "private"  # a sum with noise: the recipe's `privacy` chooses it


def parse(text: str) -> Rule:
    """Return the rule of a recipe's `aggregation`; ValueError, in plain words, when there is none."""
    name, colon, number = text.partition(":")
    if name != "mean" and name not in REDUCE:
        raise ValueError(f"aggregation = {text!r} is not one of mean, {', '.join(REDUCE)}")
    if not colon:
        return Rule(name)
    try:
        value = float(number)
    except ValueError:
        value = math.nan
    if name == "mean" and 1 <= value < math.inf:
        return Rule(name, times=value)
    share = Fraction(value).limit_denominator(1000) if 0 < value < 1 else Fraction(0)
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
        combined, width = np.zeros(len(began)), max(1, NUMBERS // len(self._at))
        for first in range(0, len(began), width):
            columns = slice(first, min(first + width, len(began)))
            values = np.stack([self._read(at, columns) for at in self._at])
            reduce = REDUCE[self._rule.name]
            combined[columns] = reduce(values, began[columns], sizes, self._rule.share)
        ends = np.cumsum([math.prod(shape) for shape in self._shapes.values()])[:-1]
        parts = zip(self._shapes.items(), np.split(combined, ends), strict=True)
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


class Spool:
    """Bytes that are read again by their offset; StorageError when the disk does not take them."""

    def __init__(self, folder: Path, in_memory: int = IN_MEMORY) -> None:
        self._folder = folder
        self._file = tempfile.SpooledTemporaryFile(in_memory, "w+b", dir=str(folder))  # noqa: SIM115

    def store(self, data: bytes) -> int:
        """Append `data`; return its offset."""
        try:
            offset = self._file.seek(0, 2)
            self._file.write(data)
        except OSError as error:
            raise storage_error(error, self._folder) from error
        return offset

    def read(self, offset: int, size: int) -> bytes:
        """Return `size` bytes from `offset` on."""
        try:
            self._file.seek(offset)
            return self._file.read(size)
        except OSError as error:
            raise storage_error(error, self._folder) from error

    def close(self) -> None:
        """Let go of the file, which is then gone."""
        self._file.close()


# LoRA by its products -------------------------------------------------------------------------------------


def cut(tensors: Mapping[str, np.ndarray], pairs: Mapping[str, tuple[str, str]], rank: int) -> Tensors:
    """Return an adapter with only the first `rank` directions of every layer; tensors outside `pairs` as they are."""
    b_names, a_names = ({pair[i] for pair in pairs.values()} for i in (0, 1))
    return {
        n: np.ascontiguousarray(t[:, :rank] if n in b_names else t[:rank] if n in a_names else t)
        for n, t in tensors.items()
    }


def product_mean(
    weighted: Iterable[tuple[float, Mapping[str, np.ndarray]]],
    pairs: Mapping[str, tuple[str, str]],
    start: Mapping[str, np.ndarray],
) -> tuple[Tensors, float]:
    """Average LoRA by its products: per layer the B', A' nearest to sum_k p_k B_k A_k (exact before the cut).

    The plain average of A and of B is not the average of the products: (mean B)(mean A) != mean(B A).
    `pairs` maps a layer to the names of its (B [out, r], A [r, in]), `start` is the adapter that the devices
    began with.  A device may have a lower rank r_k than `start`: it was sent the first r_k directions (`cut`),
    and the others stay as they were for it,

        G = sum_k p_k (B_k A_k + B[:, r_k:] A[r_k:])        p_k = n_k / sum n

    The mean is kept as stacked factors `[p_1 B_1 .. p_m B_m, B t] [A_1; ..; A_m; A]`, t_i the share of those
    who were not sent direction i, and as the dense product from where that is smaller.  Its SVD needs only two
    thin QRs and an SVD of the stack's size; the best factors are B' = U sqrt(S), A' = sqrt(S) V', exact when G
    has rank <= r.  Directions that G does not need get their row of A back, with zeros in B: they can still learn.

    Tensors outside `pairs` (a head's) are averaged plainly.  Returns the tensors and the share of the squared
    norm that the cut left out.  FlexLoRA (Bai et al. 2024, arXiv 2402.11505) does the same with the dense
    product, and without what low ranks were not sent.
    """
    factors = {name for pair in pairs.values() for name in pair}
    stacks = {pair: _Stack(start[pair[0]], start[pair[1]]) for pair in pairs.values()}
    plain = Mean()
    for n, tensors in weighted:
        plain.add(n, {k: v for k, v in tensors.items() if k not in factors})
        for (b_name, a_name), stack in stacks.items():
            stack.add(n, tensors[b_name], tensors[a_name])
    if not plain.total:
        return {}, 0.0
    result = {name: m.astype(np.float32) for name, m in plain.tensors().items()}
    lost = kept = 0.0
    for (b_name, a_name), stack in stacks.items():
        b, a, s = _best(*stack.factors(), start[a_name])
        result[b_name], result[a_name] = b.astype(np.float32), a.astype(np.float32)
        kept += float((s[: len(a)] ** 2).sum())
        lost += float((s[len(a) :] ** 2).sum())
    return result, lost / (kept + lost) if kept + lost else 0.0


class _Stack:
    """Factors of sum_k n_k (B_k A_k + B[:, r_k:] A[r_k:]) for one layer, never larger than that sum is dense."""

    def __init__(self, b: np.ndarray, a: np.ndarray) -> None:
        self.b, self.a = b.astype(np.float64), a.astype(np.float64)
        self.left, self.right = np.zeros((len(b), 0)), np.zeros((0, a.shape[1]))
        self.total, self.away = 0.0, np.zeros(len(a))  # away[i]: sum of n_k with r_k <= i

    def add(self, n: float, b_k: np.ndarray, a_k: np.ndarray) -> None:
        """Count a device's factors with weight `n`."""
        self.left = np.concatenate([self.left, n * b_k.astype(np.float64)], axis=1)
        self.right = np.concatenate([self.right, a_k.astype(np.float64)])
        self.total += n
        self.away[len(a_k) :] += n
        if len(self.right) > max(self.right.shape[1], len(self.left)):
            self.left, self.right = self.left @ self.right, np.eye(self.right.shape[1])

    def factors(self) -> tuple[np.ndarray, np.ndarray]:
        """Return (left, right) whose product is the mean."""
        left = np.concatenate([self.left, self.b * self.away], axis=1) / self.total
        right = np.concatenate([self.right, self.a])
        used = np.concatenate([np.ones(self.left.shape[1], bool), self.away > 0])
        return left[:, used], right[used]


def _best(
    left: np.ndarray, right: np.ndarray, spare: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return B', A' of `spare`'s rank, and all singular values of left right; `spare` [r, in] fills idle directions."""
    q_left, r_left = np.linalg.qr(left)
    q_right, r_right = np.linalg.qr(right.T)
    u, s, vt = np.linalg.svd(r_left @ r_right.T)
    used = int((s[: len(spare)] > 1e-12 * s[0]).sum())  # the rest is float64's rounding
    root = np.sqrt(s[:used])
    b, a = np.zeros((len(left), len(spare))), spare.astype(np.float64)
    b[:, :used] = (q_left @ u[:, :used]) * root
    a[:used] = root[:, None] * (vt[:used] @ q_right.T)
    return b, a, s


BETA: Final = 0.9
BETA_2: Final = 0.99
TAU: Final = 1e-3

# every rule of a server, and its usual learning rate
ETA: Final[Mapping[str, float]] = MappingProxyType({"avg": 1.0, "avgm": 1.0, "adam": 1e-3})


def server_rate(rule: str, lr: float) -> float:
    """Return a rule's own learning rate where `lr` is 0; 0 stays for avg, whose own is 1 and needs no word."""
    return lr if lr or rule == "avg" else ETA[rule]


def check_server(rule: str, *, lr: float) -> None:
    """Raise ValueError, in plain words, for a rule or rate that cannot be."""
    if rule not in ETA:
        raise ValueError(f"server = {rule!r} is not one of {', '.join(ETA)}")
    if not 0 <= lr < 1e3:
        raise ValueError(f"server lr = {lr} must be 0 (the rule's own) or positive")


def server_step(
    rule: str,
    w: Mapping[str, np.ndarray],
    delta: Mapping[str, np.ndarray],
    moments: Mapping[str, np.ndarray],
    *,
    lr: float = 0.0,
) -> tuple[Tensors, Tensors]:
    """Return (w, moments) after one server step along `delta` = mean_k w_k - w, both by tensor name, float64.

    `moments` is {} before the first step; afterwards it holds "m/NAME" and "v/NAME" where the rule has them.
    `lr` 0 stands for the rule's own (`ETA`).
    """
    eta = lr or ETA[rule]
    moved: Tensors = {}
    kept: Tensors = {}
    for name, value in w.items():
        d = delta[name].astype(np.float64)
        if rule == "avg":
            change = d
        elif rule == "avgm":
            change = kept[f"m/{name}"] = BETA * moments.get(f"m/{name}", 0.0) + d
        else:
            m = BETA * moments.get(f"m/{name}", 0.0) + (1 - BETA) * d
            v = BETA_2 * moments.get(f"v/{name}", np.full(d.shape, TAU**2)) + (1 - BETA_2) * (d * d)
            kept[f"m/{name}"], kept[f"v/{name}"] = m, v
            change = m / (np.sqrt(v) + TAU)
        moved[name] = value.astype(np.float64) + eta * change
    return moved, kept


def client_variate(
    c_k: Mapping[str, np.ndarray],
    c: Mapping[str, np.ndarray],
    w: Mapping[str, np.ndarray],
    w_k: Mapping[str, np.ndarray],
    travelled: float,
) -> Tensors:
    """Return SCAFFOLD's c_k' = c_k - c + (w - w_k) / (tau eta), float64; `travelled` is tau eta, the sum of the steps' lr.

    A missing name of `c_k` or `c` counts as zeros (nobody has a variate before round 1).
    """
    return {
        name: c_k.get(name, 0.0)
        - np.asarray(c.get(name, 0.0), np.float64)
        + (value.astype(np.float64) - w_k[name].astype(np.float64)) / travelled
        for name, value in w.items()
    }
