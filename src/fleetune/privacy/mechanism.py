"""Release a sum of vectors, one of each client or row, with differential privacy: the Gaussian mechanism on integers.

A vector is a client's whole reply of a round (DP-FedAvg: McMahan et al., ICLR 2018, arXiv 1710.06963), or in one local step the
gradient of a row (DP-SGD: Abadi et al. 2016, arXiv 1607.00133) or the difference of its two losses (DPZero: Zhang et al. 2024,
arXiv 2310.09639).  The noise is that of Canonne, Kamath, Steinke 2020, arXiv 2004.00010.  From w, client k moves by x_k, and

    y_k = trunc(x_k min(1, C / |x_k|) / g)          integers, |y_k| <= C / g
    w'  = w + g / (q N) (sum_k y_k + e)             e_i ~ discrete Gaussian of deviation s = z C / g

- q is the probability with which each of N clients takes part, N a public number: the denominator never depends on who did.
- One client moves the sum by at most C / g (L2), so a round is a Gaussian mechanism of noise multiplier z, subsampled by q.
- The grid g = z C / 2^24 makes s = 2^24: rounding is far below the noise, the sums are exact in any order, and no bit of a
  float tells what was added (Mironov 2012).  Truncation only shortens, so the bound holds for the integers themselves.
- The noise comes from `os.urandom`: no seed of the run decides any of it, for whoever draws it again could subtract it.
- Acceptance probabilities are float64: a noise is within a factor 1 +- 2^-48 of its probability, 10^-8 of epsilon per 10^6.

Releases are accounted by Google's `dp-accounting`; add or remove one (client, or row).  The stated epsilon is by privacy loss
distributions (PLD; Koskela et al. 2020, arXiv 1906.03049), which are tight.  Noise for a budget is sought by Renyi divergences
(Mironov 2017, arXiv 1702.07476), quick and never too low, then lowered by PLD.
"""

from __future__ import annotations

import functools
import importlib.metadata
import logging
import math
import os
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np

from fleetune.common.display import check_installed

S: Final = 1 << 24  # deviation of the noise, in units of the grid
AT_ONCE: Final = 1 << 17  # numbers of noise that are drawn together
MARGIN: Final = 1 - 2.0**-20  # of the bound: a norm in float64 is nearer to the true one


@dataclass(frozen=True)
class Privacy:
    """How a sum is released; all of it is public and fixed before round 1."""

    clip: float  # C, L2 norm of the vector of one client, or row
    noise: float  # z, noise multiplier: deviation over clip
    q: float  # with which each of N takes part, by a draw of its own; 1: all do
    N: int  # 0: noise, q and N are each real device's own, and not known here

    @property
    def grid(self) -> float:
        """Return g, the size of a unit."""
        return self.noise * self.clip / S

    def combining(self, start: Mapping[str, np.ndarray]) -> PrivateSum:
        """Return an empty sum of moves from `start`."""
        return PrivateSum(self, start)

    @property
    def text(self) -> str:
        """Return the mechanism in words."""
        if not self.N:
            return f"Poisson sampling by each device, clipped to {self.clip:.4g} (L2), discrete Gaussian noise of its own"
        how = f"Poisson sampling at {self.q:.4g} of {self.N:,}" if self.q < 1 else f"all {self.N:,}"
        return (
            f"{how}, clipped to {self.clip:.4g} (L2), discrete Gaussian noise of multiplier {self.noise:.4g}, "
            f"over {self.q * self.N:g}"
        )

    def units(self, moves: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Return y_k, the integers int64 of one vector, which `moves` holds in named parts."""
        return units_of(moves, self.clip, self.grid)


@dataclass(frozen=True)
class Measuring(Privacy):
    """A mechanism that writes down each vector's norm and size, and releases next to nothing; its clip is to be tiny."""

    seen: list[float] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)

    def units(self, moves: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        self.sizes.append(sum(move.size for move in moves.values()))
        self.seen.append(math.sqrt(sum(float(np.square(move).sum()) for move in moves.values())))
        return super().units(moves)


@dataclass(frozen=True)
class Sealed(Privacy):
    """The same sum, of vectors that the clients have cut and made noisy themselves: the server sees their sum alone.

    Each of `least` clients or more adds noise of deviation z C / sqrt(least), which is s units of the grid, so that any sum has
    z C or more.  Sums of such discrete Gaussians are discrete Gaussian but for far less than 10^-100 (Kairouz et al. 2021,
    Theorem 1).  Without noise (z = 0) the grid is C / 2^24.
    """

    least: int = 0  # vectors of a sum
    total: np.ndarray | None = None  # int64[d], the sum of a round

    @property
    def grid(self) -> float:
        return self.noise * self.clip / S / math.sqrt(self.least) if self.noise else self.clip / S

    @property
    def text(self) -> str:
        noise = (
            f", each with its share of discrete Gaussian noise of multiplier {self.noise:.4g}"
            if self.noise
            else ""
        )
        return f"secure sum of {self.least:,} of {self.N:,} or more, clipped to {self.clip:.4g} (L2){noise}, over {self.N:,}"

    def vector(self, moves: Mapping[str, np.ndarray]) -> np.ndarray:
        """Return int64[d], what a client gives to the sum: its moves in the order of their names, cut, with its noise."""
        flat = flattened(self.units(moves))
        return flat + discrete_gaussian(len(flat)) if self.noise else flat

    def combining(self, start: Mapping[str, np.ndarray]) -> PrivateSum:
        return SealedSum(self, start)


def flattened(parts: Mapping[str, np.ndarray]) -> np.ndarray:
    """Return the parts as one vector, in the order of their names."""
    return np.concatenate([np.ravel(parts[name]) for name in sorted(parts)])


class PrivateSum:
    """A sum under `Privacy`, of vectors that are added one at a time; it combines the replies of a round, too."""

    total = 1.0  # never 0: noise is released where nobody took part, too

    def __init__(self, privacy: Privacy, start: Mapping[str, np.ndarray]) -> None:
        """`start` is where moves begin, one array for each that a vector has."""
        self._privacy = privacy
        self._start = {name: np.asarray(t, np.float64) for name, t in start.items()}
        self._sums = {name: np.zeros(t.shape, np.int64) for name, t in start.items()}

    def add(self, n: float, tensors: Mapping[str, np.ndarray]) -> None:
        """Count `tensors` once, whatever the weight `n`."""
        moves = {name: np.asarray(tensors[name], np.float64) - t for name, t in self._start.items()}
        for name, units in self._privacy.units(moves).items():
            self._sums[name] += units

    def tensors(self) -> dict[str, np.ndarray]:
        """Return the new tensors, float64; the noise is drawn here, anew at every call."""
        unit = self._privacy.grid / (self._privacy.q * self._privacy.N)
        return {
            name: self._start[name] + unit * (total + self._noise(total.size).reshape(total.shape))
            for name, total in self._sums.items()
        }

    def _noise(self, count: int) -> np.ndarray:
        return discrete_gaussian(count)

    def sums(self) -> dict[str, np.ndarray]:
        """Methods that need sums beside the combination are refused before a run (`Method.cannot_combine`)."""
        raise NotImplementedError("a private round releases one sum")


class SealedSum(PrivateSum):
    """A sum that has come as one, its noise in it: `Sealed.total`."""

    def __init__(self, privacy: Sealed, start: Mapping[str, np.ndarray]) -> None:
        super().__init__(privacy, start)
        assert privacy.total is not None
        sizes = [self._sums[name].size for name in sorted(self._sums)]
        parts = np.split(privacy.total, np.cumsum(sizes)[:-1])
        self._sums = {
            n: part.reshape(self._sums[n].shape) for n, part in zip(sorted(self._sums), parts, strict=True)
        }

    def _noise(self, count: int) -> np.ndarray:
        return np.zeros(count, np.int64)


def units_of(moves: Mapping[str, np.ndarray], clip: float, grid: float) -> dict[str, np.ndarray]:
    """Return int64 arrays y with |y| <= clip / grid over all of them: the moves, cut to `clip` and truncated to the grid.

    Moves that are not finite become 0.
    """
    top = float(np.max([np.abs(move).max(initial=0.0) for move in moves.values()], initial=0.0))
    if not 0.0 < top < math.inf:  # NaN where one is
        return {name: np.zeros(move.shape, np.int64) for name, move in moves.items()}
    norm = top * math.sqrt(sum(float(np.square(move / top).sum()) for move in moves.values()))
    factor = min(1.0, clip / norm) * MARGIN / grid
    return {name: np.trunc(move * factor).astype(np.int64) for name, move in moves.items()}


def sample(members: Sequence[int], q: float) -> list[int]:
    """Return each of the clients or rows with probability q, by the system's generator; all where q is 1.  There may be none."""
    bits = 53
    return [member for member in members if q >= 1 or secrets.randbits(bits) < q * (1 << bits)]


# The discrete Gaussian of deviation 2^24 (Canonne, Kamath, Steinke 2020, Algorithms 1 to 3, with t = s = 2^24) ---------------


def discrete_gaussian(count: int) -> np.ndarray:
    """Return int64[count] of the discrete Gaussian: P(x) proportional to exp(-x^2 / (2 s^2)), s = `S`."""
    found = np.empty(count, np.int64)
    done = 0
    while done < count:
        y = _discrete_laplace(min(AT_ONCE, 2 * (count - done) + 64))
        far = (np.abs(y) - S) / S  # (|Y| - s^2 / t) / s
        y = y[_bernoulli_exp(far * far / 2)][: count - done]
        found[done : done + len(y)] = y
        done += len(y)
    return found


def _discrete_laplace(count: int) -> np.ndarray:
    """Return at most int64[count] with P(x) proportional to exp(-|x| / s): those of so many tries that were accepted."""
    words = _words(count)
    u = (words & np.uint64(S - 1)).astype(np.int64)  # uniform in [0, s)
    negative = (words >> np.uint64(63)).astype(bool)
    v = np.floor(_exponentials(count)).astype(np.int64)  # P(V >= v) = exp(-v)
    x = u + S * v
    taken = _bernoulli_exp(u / S) & ~(negative & (x == 0))  # zero has one sign
    return np.asarray(np.where(negative, -x, x)[taken])


def _bernoulli_exp(gamma: np.ndarray) -> np.ndarray:
    """Return bool: true with probability exp(-gamma)."""
    return np.asarray(_exponentials(len(gamma)) > gamma)


def _exponentials(count: int) -> np.ndarray:
    """Return float64[count] of the exponential distribution of mean 1."""
    return np.asarray(-np.log((_words(count) + 0.5) * 2.0**-64))


def _words(count: int) -> np.ndarray:
    """Return uint64[count] from the system's generator."""
    return np.frombuffer(os.urandom(8 * count), np.uint64)


ORDERS: Final = (*(1.5 + x / 10 for x in range(95)), *range(11, 64), 128, 256, 512)  # of Renyi divergences
FINE: Final = 7  # halvings of the interval between the two accountants' noise
LOOSE: Final = 0.6  # of the noise by Renyi divergences: less never suffices
MOST_NOISE: Final = 1e6  # multiplier
COARSE: Final = 1000  # releases
LARGE: Final = 100.0  # epsilon, from which on it is a bound


Releases = tuple[tuple[float, float, int], ...]  # (noise multiplier, rate of the sample or 1: all, how many)


def epsilon(noise: float, q: float, releases: int, delta: float) -> float:
    """Return epsilon after so many Gaussian releases of multiplier `noise`, each on a Poisson sample of rate q (1: all)."""
    return epsilon_of(((noise, q, releases),), delta)


@functools.lru_cache(maxsize=4096)
def epsilon_of(releases: Releases, delta: float) -> float:
    """Return epsilon after releases of several kinds.

    Infinity without noise; 0 before the first release.  Without sampling, Gaussian releases of multipliers z_i are one of
    (sum z_i^-2)^(-1/2), exactly.  Beyond `LARGE` it is the bound by Renyi divergences: nobody needs three digits of that;
    so it is where privacy losses are far below the PLD's interval, which makes that the looser of the two bounds.
    """
    releases = tuple(made for made in releases if made[2])
    if not all(noise for noise, _, _ in releases):
        return math.inf
    if all(q >= 1 for _, q, _ in releases):
        exact = _accounting().gaussian_mechanism.get_epsilon_gaussian
        return float(exact(sum(n / z**2 for z, _, n in releases) ** -0.5, delta)) if releases else 0.0
    if (bound := _renyi(releases, delta)) > LARGE:
        return bound
    # of privacy losses, rounded up: costs 0.1 % of epsilon at most
    interval = 1e-3 if sum(n for _, _, n in releases) <= COARSE else 1e-4
    accountant = _accounting().pld.PLDAccountant(value_discretization_interval=interval)
    for noise, q, n in releases:
        accountant.compose(_release(noise, q), n)
    return min(bound, float(accountant.get_epsilon(delta)))


def renyi_epsilon(noise: float, q: float, releases: int, delta: float) -> float:
    """Return the upper bound on `epsilon` by Renyi divergences."""
    return _renyi(((noise, q, releases),), delta)


def _renyi(releases: Releases, delta: float) -> float:
    accountant, told = _accounting().rdp.RdpAccountant(ORDERS), logging.getLogger("absl")
    level = told.level
    try:
        # it warns of orders that it leaves out, which makes the bound larger, not wrong
        told.setLevel(logging.ERROR)
        for noise, q, n in releases:
            accountant.compose(_release(noise, q), n)
    finally:
        told.setLevel(level)
    return float(accountant.get_epsilon(delta))


def noise_for(budget: float, q: float, releases: int, delta: float) -> float:
    """Return a noise multiplier of three digits after which `epsilon` is at most `budget`: the least, unless that is tiny.

    ValueError where none below 10^6 suffices.
    """
    high = 0.2
    while renyi_epsilon(high, q, releases, delta) > budget:
        high *= 1.2
        if high > MOST_NOISE:
            raise ValueError(f"no noise gives epsilon {budget:g} after {releases:,} releases")
    low = high * LOOSE
    for _ in range(FINE):
        middle = math.sqrt(low * high)
        if epsilon(middle, q, releases, delta) <= budget:
            high = middle
        else:
            low = middle
    digits = 10.0 ** (2 - math.floor(math.log10(high)))
    found = math.ceil(high * digits)
    # near PLD's interval, more noise may cost more
    while epsilon(found / digits, q, releases, delta) > budget:
        found += 1
    return found / digits


def releases_within(budget: float, noise: float, q: float, most: int, delta: float) -> int:
    """Return after how many of `most` releases epsilon is still at most `budget`."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        if epsilon(noise, q, middle, delta) <= budget:
            low = middle
        else:
            high = middle - 1
    return low


def accounting_version() -> str:
    """Return the accountant's name and version."""
    _accounting()
    return f"dp-accounting {importlib.metadata.version('dp-accounting')}, PLD"


def _release(noise: float, q: float) -> Any:
    events = _accounting()
    release = events.GaussianDpEvent(noise)
    return release if q >= 1 else events.PoissonSampledDpEvent(q, release)


def _accounting() -> Any:
    """Return the package; UsageError where it is missing."""
    check_installed("the account of privacy", "privacy", "dp_accounting")
    import dp_accounting
    import dp_accounting.gaussian_mechanism
    import dp_accounting.pld
    import dp_accounting.rdp

    return dp_accounting
